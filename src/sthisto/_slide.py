"""The only file that knows where things live in AnnData.

Readers turn a table into plain arrays and refuse what the models could not survive, saying what was looked for, what is
there and what to do. Writers put results back in one step, so an error on the way leaves the user's object as it was.
State is data: strings, numbers, arrays and one safetensors blob, which h5ad and zarr keep to the bit.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData, ImplicitModificationWarning
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as from_safetensors
from safetensors.numpy import save as to_safetensors
from scipy import sparse

from sthisto import grids
from sthisto.images import Image, open_image

logger = logging.getLogger("sthisto")

UNS = "sthisto"
SCHEMA = 1
PITCH_UM = {"hexagonal": 100.0, "square": 200.0}  # Visium; the first Spatial Transcriptomics arrays
LIBRARY = "section"  # the name of a section that nobody named


@dataclass(frozen=True)
class Fit:
    """A fitted model as ``uns`` keeps it."""

    model: str
    params: dict[str, Any]
    genes: NDArray[np.str_]  # (g,)
    libraries: NDArray[np.str_]  # (s,) sections it was fitted on
    library_key: str  # "" where there is one section without a column of its own
    features_key: str  # "" where the model reads none
    layer: str  # "" for X
    seed: int
    spots: NDArray[np.str_]  # (n,) names of the spots it learnt from
    arrays: dict[str, NDArray[np.generic]]  # the model's state and its spread's
    history: dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Place:
    """Where the spots of one section are."""

    rows: NDArray[np.intp]  # (n,) of the AnnData
    xy: NDArray[np.float64]  # (n, 2) full-resolution pixels
    pitch: float  # pixels between neighbouring spots of the whole section

    def keep(self, mask: NDArray[np.bool_]) -> "Place":
        """Only the spots that a mask (n_obs,) over all rows keeps; the pitch stays that of the whole section."""
        kept = mask[self.rows]
        return Place(self.rows[kept], self.xy[kept], self.pitch)


@dataclass(frozen=True)
class Description:
    """How the features under one key were made."""

    encoder: str
    patch_um: float
    libraries: list[str]
    mpp: list[float]  # um per full-resolution pixel of each section
    image: list[str]  # path as it was given, "uns:hires", or "" for an array

    def mpp_of(self, library: str) -> float:
        """Scale of a section."""
        return self.mpp[self._at(library)]

    def image_of(self, library: str) -> str | None:
        """Give what ``image=`` was for a section."""
        path = self.image[self._at(library)]
        if not path:
            raise KeyError(
                f"the features of section {library!r} were taken from an array, which is not kept: pass it again as "
                "image=, or pass features= for the points."
            )
        return path.removeprefix("uns:")

    def _at(self, library: str) -> int:
        if library not in self.libraries:
            raise KeyError(
                f"no features were extracted for section {library!r} (there are: {_listed(self.libraries)})."
            )
        return self.libraries.index(library)


# --- reading -------------------------------------------------------------------------------------------------------


def sections(adata: AnnData, library_key: str | None) -> dict[str, NDArray[np.intp]]:
    """Rows of each section by its name, in the order of first appearance."""
    if not adata.obs_names.is_unique:
        double = adata.obs_names[adata.obs_names.duplicated()][0]
        raise ValueError(
            f"adata.obs_names are not unique: {double!r} occurs more than once, so results could not be told apart. "
            "Call adata.obs_names_make_unique() first."
        )
    if library_key is None:
        return {_only_library(adata): np.arange(adata.n_obs)}
    if library_key not in adata.obs:
        raise KeyError(f"no column {library_key!r} in adata.obs (found: {_listed(adata.obs.columns)}).")
    labels = adata.obs[library_key]
    if labels.isna().any():
        raise ValueError(f"{int(labels.isna().sum())} rows of adata.obs[{library_key!r}] name no section. Drop them.")
    names = labels.astype(str).to_numpy()
    return {str(name): np.flatnonzero(names == name) for name in pd.unique(names)}


def positions(adata: AnnData, rows: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the spot centres (n, 2) of the rows: full-resolution pixels, x then y."""
    if "spatial" not in adata.obsm:
        raise KeyError(
            f"no spot coordinates: adata.obsm['spatial'] is missing (found: {_listed(adata.obsm)}). It holds the "
            "spots' centres (n, 2) in full-resolution pixels, x then y, as squidpy.read.visium writes it."
        )
    whole = np.asarray(adata.obsm["spatial"])
    if whole.ndim != 2 or whole.shape[1] < 2 or not np.issubdtype(whole.dtype, np.number):
        raise ValueError(f"adata.obsm['spatial'] is {whole.dtype} of shape {whole.shape}; expected numbers (n, 2).")
    xy = whole[rows, :2].astype(np.float64)
    if not np.isfinite(xy).all():
        wrong = int((~np.isfinite(xy)).any(axis=1).sum())
        raise ValueError(f"{wrong} of {len(xy)} spots have NaN or infinite coordinates. Drop them: adata[...].copy().")
    repeated = len(xy) - len(np.unique(xy, axis=0))
    if repeated:
        raise ValueError(
            f"{repeated} of {len(xy)} spots share their coordinates with another spot. If adata holds several "
            "sections, pass library_key= with the obs column that names them; if spots were read twice, drop one of each pair."
        )
    return xy


def places(adata: AnnData, library_key: str | None) -> dict[str, Place]:
    """Rows, coordinates and pitch of each section."""
    found = {}
    for library, rows in sections(adata, library_key).items():
        xy = positions(adata, rows)
        found[library] = Place(rows, xy, grids.spacing(xy) if len(xy) > 1 else 1.0)
    return found


def expression(
    adata: AnnData, rows: NDArray[np.intp], genes: NDArray[np.str_], layer: str | None
) -> NDArray[np.float32]:
    """Log-normalised expression (n, g) of rows and genes; refuses raw counts, NaN and negative values."""
    if layer is not None and layer not in adata.layers:
        raise KeyError(f"no layer {layer!r} in adata (found: {_listed(adata.layers)}). layer=None reads adata.X.")
    matrix = adata.X if layer is None else adata.layers[layer]
    where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    if matrix is None:
        raise ValueError("adata.X is empty. Pass layer= with the layer that holds log-normalised expression.")
    values = _dense(matrix, rows, adata.var_names.get_indexer(genes))
    if not np.isfinite(values).all():
        spots, cells = int((~np.isfinite(values)).any(axis=1).sum()), int((~np.isfinite(values)).sum())
        raise ValueError(f"{where} has {cells} NaN or infinite values in {spots} training spots. Mend or drop them.")
    if values.min(initial=0) < 0:
        raise ValueError(
            f"{where} has negative values (lowest {values.min():.3g}), as after sc.pp.scale. Models here work on "
            "log-normalised expression; pass layer= with a layer that holds it."
        )
    if values.max(initial=0) > 1 and np.array_equal(values, np.rint(values)):
        raise ValueError(
            f"{where} looks like raw counts (whole numbers up to {values.max():.0f}). Normalise first: "
            "sc.pp.normalize_total(adata, target_sum=1e4); sc.pp.log1p(adata)."
        )
    return values


def features(adata: AnnData, key: str, rows: NDArray[np.intp]) -> NDArray[np.float32]:
    """Image features (n, d) of the rows."""
    if key not in adata.obsm:
        raise KeyError(
            f"no image features {key!r} in adata.obsm (found: {_listed(adata.obsm)}). "
            "Run sthisto.pp.extract_features(adata) first, or pass features_key=."
        )
    found = adata.obsm[key]
    values = np.asarray(found.todense() if sparse.issparse(found) else found)[rows].astype(np.float32)
    return finite_features(values, len(rows), f"adata.obsm[{key!r}]")


def finite_features(values: NDArray[np.float32], n: int, where: str) -> NDArray[np.float32]:
    """Refuse features (n, d) of another length or with NaN."""
    if values.ndim != 2 or len(values) != n:
        raise ValueError(f"{where} has shape {values.shape}; expected ({n}, d), one row a point.")
    if not np.isfinite(values).all():
        wrong = int((~np.isfinite(values)).any(axis=1).sum())
        raise ValueError(f"{where} has NaN or infinite values in {wrong} of {n} rows. Extract the features anew.")
    return values


def genes_to_model(adata: AnnData, genes: Iterable[str] | None) -> NDArray[np.str_]:
    """Names of the genes to model: those asked for, else the highly variable ones, else all."""
    if genes is None:
        marked = "highly_variable" in adata.var
        chosen = adata.var_names[adata.var["highly_variable"].to_numpy(bool)] if marked else adata.var_names
    else:
        chosen = pd.Index([genes] if isinstance(genes, str) else list(genes))
    missing = [str(gene) for gene in chosen if gene not in adata.var_names]
    if missing:
        raise KeyError(
            f"{len(missing)} of {len(chosen)} genes are not in adata.var_names: {_listed(missing)} "
            f"(there: {_listed(adata.var_names)})."
        )
    if not len(chosen):
        raise ValueError("no gene to model: var['highly_variable'] marks none. Pass genes=.")
    if not adata.var_names.is_unique:
        raise ValueError("adata.var_names are not unique. Call adata.var_names_make_unique() first.")
    return np.asarray(chosen.drop_duplicates(), dtype=str)


def training_rows(adata: AnnData, train_on: str | NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """Mask (n_obs,) of the rows that may be learnt from."""
    if train_on is None:
        return np.ones(adata.n_obs, dtype=bool)
    if isinstance(train_on, str):
        if train_on not in adata.obs:
            raise KeyError(f"no column {train_on!r} in adata.obs (found: {_listed(adata.obs.columns)}).")
        train_on = adata.obs[train_on].to_numpy()
    mask = np.asarray(train_on)
    if mask.dtype != bool or mask.shape != (adata.n_obs,):
        raise ValueError(
            f"train_on is {mask.dtype} of shape {mask.shape}; expected a boolean mask or obs column of "
            f"{adata.n_obs} rows, True where the spot may be learnt from."
        )
    return mask


def find_image(adata: AnnData, library: str, image: Any, mpp: float | None = None) -> tuple[Image, str]:
    """Open a section's picture: what was given, or what ``uns["spatial"]`` holds; and a name to find it again."""
    if isinstance(image, Mapping):
        if library not in image:
            raise KeyError(f"image= has no entry for section {library!r} (found: {_listed(image)}).")
        image = image[library]
    kept = adata.uns.get("spatial", {}).get(library, {}).get("images", {})
    if image is None or (isinstance(image, str) and image in kept):
        name = image or _best_image(kept, library)
        factor = adata.uns["spatial"][library].get("scalefactors", {}).get(f"tissue_{name}_scalef")
        if factor is None:
            raise KeyError(
                f"uns['spatial'][{library!r}] holds the image {name!r} but no scalefactors['tissue_{name}_scalef'], so "
                "its scale to the spots is unknown. Add it, or pass image= with the full-resolution picture."
            )
        return open_image(np.asarray(kept[name]), scale=float(factor), mpp=mpp), f"uns:{name}"
    opened = open_image(image, mpp=mpp)
    return opened, str(image) if isinstance(image, str | Path) else ""


def scale(
    xy: NDArray[np.float64], image: Image | None, mpp: float | None, pitch_um: float | None
) -> tuple[float, float]:
    """Micrometres per full-resolution pixel and the pitch in pixels; refuses a scale that the pitch contradicts."""
    try:
        lattice = grids.Lattice.fit(xy)
        kind, pitch = str(lattice.kind), lattice.pitch
    except ValueError:  # scattered spots: their spacing is all there is
        kind, pitch = "scattered", grids.spacing(xy)
    expected = pitch_um if pitch_um is not None else PITCH_UM.get(kind)
    known = mpp if mpp is not None else (image.mpp if image else None)
    for name, value in (("mpp", known), ("pitch_um", pitch_um)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value:g}: a length in um is positive.")
    if known is not None:
        if pitch_um is not None or kind == "hexagonal":  # square arrays come at many pitches
            _refuse_contradiction(known, pitch, expected)
        return known, pitch
    if expected is None:
        raise ValueError(
            f"the image's scale is unknown and the {kind} spots have no standard pitch to derive it from. Pass mpp= "
            "(micrometres per full-resolution pixel) or pitch_um= (micrometres between neighbouring spots)."
        )
    message = f"{expected / pitch:.4g} um/px: a {kind} array {pitch:.4g} px apart, taken to be {expected:g} um."
    if pitch_um is None and kind != "hexagonal":
        warnings.warn(f"the image's scale is unknown; assuming {message} Pass pitch_um= or mpp=.", stacklevel=3)
    else:
        logger.info("scale: %s", message)
    return expected / pitch, pitch


def _refuse_contradiction(mpp: float, pitch: float, expected: float | None) -> None:
    if expected is not None and not 1 / 1.5 <= mpp * pitch / expected <= 1.5:
        raise ValueError(
            f"a scale of {mpp:.4g} um/px puts the spots {mpp * pitch:.4g} um apart, but their pitch is {expected:g} "
            "um. Are the coordinates in full-resolution pixels of this image? Otherwise correct mpp= or pitch_um=."
        )


def _only_library(adata: AnnData) -> str:
    names = list(adata.uns.get("spatial", {}))
    if len(names) > 1:
        raise ValueError(
            f"uns['spatial'] names {len(names)} sections ({_listed(names)}). Pass library_key= with the obs column "
            f"that tells them apart (columns: {_listed(adata.obs.columns)}), or take one section: adata[...].copy()."
        )
    return str(names[0]) if names else LIBRARY


def _best_image(images: Mapping[str, Any], library: str) -> str:
    """Name the sharpest picture that shows anything."""
    shown = [name for name in ("fullres", "hires", "lowres") if name in images]
    for name in shown:
        picture = np.asarray(images[name])
        if picture.min() < picture.max():
            return name
        warnings.warn(f"the {name!r} image of section {library!r} is blank and was passed over.", stacklevel=5)
    raise KeyError(
        f"no image of section {library!r} in adata.uns['spatial'] (found: {_listed(images)}). "
        "Pass image= with the path of the H&E picture that obsm['spatial'] refers to."
    )


def _dense(matrix: Any, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> NDArray[np.float32]:
    """Rows and columns of any matrix AnnData holds: dense, CSR, CSC, or on disk."""
    if isinstance(matrix, sparse.csc_matrix | sparse.csc_array):
        part = matrix[:, columns][rows]
    else:
        every = len(rows) == matrix.shape[0]
        part = matrix[:] if every else matrix[rows]  # on-disk matrices take sorted rows, then columns in memory
        part = part[:, columns]
    return np.asarray(part.toarray() if sparse.issparse(part) else part, dtype=np.float32)


def _listed(names: Iterable[object], most: int = 8) -> str:
    names = [str(name) for name in names]
    return (
        ", ".join(repr(name) for name in names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
        or "nothing"
    )


# --- writing -------------------------------------------------------------------------------------------------------


def write(adata: AnnData, **slots: Mapping[str, Any]) -> None:
    """Set ``obsm``/``layers``/``var``/``obs`` entries; a view becomes an object of its own, as scanpy does it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        for slot, entries in slots.items():
            for key, value in entries.items():
                getattr(adata, slot)[key] = value


def check_key(key: str) -> str:
    """Keys with a slash would nest silently in h5ad and zarr."""
    if not isinstance(key, str) or not key or "/" in key:
        raise ValueError(f"key_added={key!r}: expected a non-empty name without '/'.")
    return key


def write_features(
    adata: AnnData,
    key: str,
    values: NDArray[np.float32],
    record: Mapping[str, Any],
    pictures: Mapping[str, dict[str, Any]],
) -> None:
    """Put features into ``obsm``, how they were made into ``uns``, and a small picture where a section had none."""
    write(adata, obsm={key: values})
    spatial = dict(adata.uns.get("spatial", {}))
    for library, entry in pictures.items():
        if not spatial.get(library, {}).get("images"):
            spatial[library] = entry
    if spatial:
        adata.uns["spatial"] = spatial
    own = dict(adata.uns.get(UNS, {}))
    adata.uns[UNS] = {**own, "features": {**own.get("features", {}), key: dict(record)}}


def small_picture(image: Image, pitch: float) -> dict[str, Any]:
    """Give an entry of ``uns["spatial"]`` that scanpy and squidpy can draw."""
    pixels, factor = image.thumbnail()
    diameter = 0.55 * pitch  # 55 um spots every 100 um, the commonest array
    return {
        "images": {"hires": pixels},
        "scalefactors": {"tissue_hires_scalef": factor, "spot_diameter_fullres": diameter},
    }


def features_record(adata: AnnData, key: str) -> Description:
    """Tell how the features under ``key`` were made, so that more can be made alike."""
    made = adata.uns.get(UNS, {}).get("features", {})
    if key not in made:
        raise KeyError(
            f"adata.obsm[{key!r}] was not made by sthisto.pp.extract_features, so the features of new points cannot be "
            "made alike: pass features= (m, d), computed the same way, beside the points."
        )
    record = made[key]
    return Description(
        encoder=str(record["encoder"]),
        patch_um=float(record["patch_um"]),
        libraries=[str(name) for name in record["libraries"]],
        mpp=[float(mpp) for mpp in record["mpp"]],
        image=[str(path) for path in record["image"]],
    )


def write_fit(adata: AnnData, key: str, fit: Fit) -> None:
    """Keep a fitted model in ``uns``."""
    own = dict(adata.uns.get(UNS, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        adata.uns[UNS] = {**own, "fit": {**own.get("fit", {}), key: pack(fit)}}


def read_fit(adata: AnnData, key: str) -> Fit:
    """Take a fitted model out of ``uns``; refuses one that is damaged, newer, or of other genes."""
    fits = adata.uns.get(UNS, {}).get("fit", {})
    if key not in fits:
        raise KeyError(
            f"no fitted model {key!r} in adata.uns['{UNS}']['fit'] (found: {_listed(fits)}). "
            "Run sthisto.tl.fit(adata) first."
        )
    return unpack(fits[key])


def pack(fit: Fit) -> dict[str, Any]:
    """Turn a fit into what h5ad and zarr keep: strings, numbers, arrays and one safetensors blob."""
    blob = to_safetensors({name: np.ascontiguousarray(array) for name, array in fit.arrays.items()})
    record = {name: value for name, value in vars(fit).items() if name != "arrays"}
    record["state"] = np.frombuffer(blob, dtype=np.uint8)
    return {"schema": SCHEMA, "sha256": hashlib.sha256(blob).hexdigest(), **record}


def unpack(record: Mapping[str, Any]) -> Fit:
    """Undo :func:`pack`."""
    if "state" not in record or "sha256" not in record:
        raise ValueError("the fitted model is damaged: its state is missing. Fit again.")
    blob = np.asarray(record["state"], dtype=np.uint8).tobytes()
    if hashlib.sha256(blob).hexdigest() != record["sha256"]:
        raise ValueError("the fitted model is damaged: its state does not match its checksum. Fit again.")
    return _fit(record, from_safetensors(blob))


def save_fit(fit: Fit, path: str | PathLike[str]) -> None:
    """One safetensors file: the arrays, and everything else as JSON in its metadata."""
    rest = {name: value for name, value in vars(fit).items() if name != "arrays"}
    metadata = json.dumps({"schema": SCHEMA, **rest}, default=lambda value: np.asarray(value).tolist())
    arrays = {name: np.ascontiguousarray(array) for name, array in fit.arrays.items()}
    partial = Path(f"{path}.partial")  # a kill half-way leaves the old file
    partial.write_bytes(to_safetensors(arrays, {UNS: metadata}))
    partial.replace(path)


def load_fit(path: str | PathLike[str]) -> Fit:
    """Undo :func:`save_fit`."""
    blob = Path(path).read_bytes()
    try:
        arrays = from_safetensors(blob)
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        record = json.loads(header["__metadata__"][UNS])
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} holds no model that sthisto.tl.save wrote: {error!r}.") from error
    return _fit(record, arrays)


def no_spots(genes: NDArray[np.str_]) -> AnnData:
    """Make an AnnData of genes alone."""
    return AnnData(X=np.empty((0, len(genes)), dtype=np.float32), var=pd.DataFrame(index=pd.Index(genes)))


def _fit(record: Mapping[str, Any], arrays: dict[str, NDArray[np.generic]]) -> Fit:
    """Types as they were, whatever the file made of them."""
    schema = int(record.get("schema", 0))
    if schema > SCHEMA:
        raise ValueError(f"the fitted model has schema {schema}, this sthisto reads up to {SCHEMA}: upgrade sthisto.")
    missing = set(Fit.__dataclass_fields__) - {"arrays"} - set(record)
    if missing:
        raise ValueError(f"the fitted model is damaged: {_listed(sorted(missing))} missing. Fit again.")
    return Fit(
        params={name: _plain(value) for name, value in record["params"].items()},
        seed=int(record["seed"]),
        arrays=arrays,
        history={name: np.asarray(curve, dtype=np.float64) for name, curve in record["history"].items()},
        genes=np.asarray(record["genes"], dtype=str),
        libraries=np.asarray(record["libraries"], dtype=str),
        spots=np.asarray(record["spots"], dtype=str),
        model=str(record["model"]),
        library_key=str(record["library_key"]),
        features_key=str(record["features_key"]),
        layer=str(record["layer"]),
    )


def _plain(value: Any) -> Any:
    """Numpy scalars that a round trip through a file makes of Python's."""
    return value.item() if isinstance(value, np.generic) else value


def write_prediction(
    adata: AnnData, key: str, genes: NDArray[np.str_], mean: NDArray[np.float32], std: NDArray[np.float32]
) -> None:
    """Put prediction and spread (n, g) into layers over all genes, NaN where a gene is not modelled."""
    columns = adata.var_names.get_indexer(genes)
    if (columns < 0).any():
        raise ValueError(
            f"the model was fitted on other genes: {int((columns < 0).sum())} of its {len(genes)} are not in "
            f"adata.var_names (first: {str(genes[columns < 0][0])!r}). Fit again, or use the object it was fitted on."
        )
    layers = {}
    for name, values in ((key, mean), (f"{key}_std", std)):
        layers[name] = np.full(adata.shape, np.nan, dtype=np.float32)
        layers[name][:, columns] = values
    write(adata, layers=layers, var={f"{key}_modelled": adata.var_names.isin(genes)})


def points_obs(  # noqa: PLR0917  plain arrays of one section
    adata: AnnData,
    fit: Fit,
    library: str,
    place: Place,
    xy: NDArray[np.float64],  # (m, 2)
    site: NDArray[np.int64] | None,  # (m, 2) of the points on their lattice, None for scattered ones
    spot_site: NDArray[np.int64] | None,  # (n, 2) of the section's spots on that lattice
) -> pd.DataFrame:
    """Name the points, and tell their sites and the spot nearest to each."""
    distance, spot = (each[:, 0] for each in grids.nearest(xy, place.xy))
    names = adata.obs_names[place.rows].to_numpy()
    trained = np.isin(names, fit.spots)
    obs = pd.DataFrame(index=np.arange(len(xy)).astype(str))
    if site is not None and spot_site is not None:
        obs["array_row"], obs["array_col"] = (site - site.min(axis=0)).T
        obs.index = obs["array_row"].astype(str) + "x" + obs["array_col"].astype(str)
        obs["measured"] = _among(site, spot_site[trained])
    else:
        obs["measured"] = (distance == 0) & trained[spot]
    obs["nearest_spot"] = names[spot]
    obs["distance_um"] = distance * _mpp(adata, fit, library)
    obs.index.name = None
    if fit.library_key:
        obs.index = library + "_" + obs.index
        obs[fit.library_key] = library
    return obs


def new_slide(  # noqa: PLR0917  the parts of an AnnData
    like: AnnData,
    genes: NDArray[np.str_],
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
    obs: pd.DataFrame,
    xy: NDArray[np.float64],
    diameters: Mapping[str, float] | None = None,
) -> AnnData:
    """Make an AnnData of predictions that plots, clusters and concatenates like a measured one."""
    own = like.var.drop(columns=[name for name in like.var if str(name).endswith("_modelled")])
    var = own.reindex(genes) if pd.Index(genes).isin(like.var_names).all() else pd.DataFrame(index=pd.Index(genes))
    made = AnnData(X=mean, obs=obs, var=var, obsm={"spatial": np.asarray(xy)}, layers={"std": std})
    made.obs = made.obs.astype({name: "category" for name in made.obs if made.obs[name].dtype == object})
    spatial = dict(like.uns.get("spatial", {}))
    for library, diameter in (diameters or {}).items():
        if library in spatial:
            factors = {**spatial[library].get("scalefactors", {}), "spot_diameter_fullres": diameter}
            spatial[library] = {**spatial[library], "scalefactors": factors}
    if spatial:
        made.uns["spatial"] = spatial
    described = like.uns.get(UNS, {}).get("features")
    if described:
        made.uns[UNS] = {"features": described}  # the scale, for scale bars
    return made


def _among(sites: NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows (m, 2) occur among the chosen ones."""
    return np.asarray(pd.MultiIndex.from_arrays(list(sites.T)).isin(pd.MultiIndex.from_arrays(list(chosen.T))))


def _mpp(adata: AnnData, fit: Fit, library: str) -> float:
    """Scale that the features were taken at; NaN where sthisto did not take them."""
    made = adata.uns.get(UNS, {}).get("features", {})
    for key in [fit.features_key] if fit.features_key else made:
        if key in made and library in list(made[key]["libraries"]):
            return features_record(adata, key).mpp_of(library)
    return float("nan")
