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
from copy import deepcopy
from dataclasses import dataclass, fields, replace
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
UNSEEN = "a section that was only stained"  # as models know the sections of another object
PICTURES = ("fullres", "hires", "lowres")  # names in uns["spatial"], the sharpest first
DOUBLED = 0.05  # share of spots on sites that hold another one; single real sections have none


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
    pitch: NDArray[np.float64]  # (s,) pixels, the unit of length in each section
    spots: NDArray[np.str_]  # (n,) names of the spots it learnt from
    xy: NDArray[np.float64]  # (n, 2) where they were
    arrays: dict[str, NDArray[np.generic]]  # the model's state and its spread's
    history: dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Place:
    """Where the spots of one section are."""

    rows: NDArray[np.intp]  # (n,) of the AnnData
    xy: NDArray[np.float64]  # (n, 2) full-resolution pixels
    pitch: float  # pixels between neighbouring spots of the whole section; NaN for a single spot
    kind: str  # of the array: "hexagonal", "square", "oblique", or "scattered" where there is none
    known: str  # what models call the section

    def keep(self, mask: NDArray[np.bool_]) -> "Place":
        """Only the spots that a mask (n_obs,) over all rows keeps; the pitch stays that of the whole section."""
        kept = mask[self.rows]
        return replace(self, rows=self.rows[kept], xy=self.xy[kept])


@dataclass(frozen=True)
class Points:
    """Points laid over one section; on a lattice, or scattered where the last two are None."""

    xy: NDArray[np.float64]  # (m, 2) full-resolution pixels
    pitch: float  # pixels between neighbouring points
    site: NDArray[np.int64] | None = None  # (m, 2) on the lattice
    spot_site: NDArray[np.int64] | None = None  # (n, 2) of the section's spots on the same lattice


@dataclass(frozen=True)
class Description:
    """How the features of one section were made."""

    encoder: str
    patch_um: float
    mpp: float  # um per full-resolution pixel
    image: str  # path as it was given, "uns:hires", or "" for an array


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
            "sections, pass library_key= with the obs column that names them; if spots were read twice, drop one of "
            "each pair."
        )
    return xy


def places(adata: AnnData, library_key: str | None) -> dict[str, Place]:
    """Rows, coordinates and pitch of each section; refuses several sections laid over each other as one."""
    found = {}
    for library, rows in sections(adata, library_key).items():
        xy = positions(adata, rows)
        lattice = _lattice(xy)
        if library_key is None:
            _refuse_overlay(adata, xy, lattice)
        pitch = lattice.pitch if lattice else grids.spacing(xy) if len(xy) > 1 else float("nan")
        found[library] = Place(rows, xy, pitch, str(lattice.kind) if lattice else "scattered", library)
    return found


def fitted_places(adata: AnnData, fit: Fit) -> dict[str, Place]:
    """Rows and coordinates of each section, in the unit of length that the fit was made in.

    Refuses an object that the fit does not belong to. Sections of a fitted object that had no training spots pass:
    models predict them as ones they never saw.
    """
    names = adata.obs_names.to_numpy().astype(str)
    found = {}
    for library, rows in sections(adata, fit.library_key or None).items():
        xy = positions(adata, rows)
        known = library if fit.library_key else str(fit.libraries[0])  # a lone section may be renamed in uns
        if known in fit.libraries:
            pitch = float(fit.pitch[fit.libraries == known][0])
            _refuse_other_spots(fit, library, names[rows], xy, pitch)
        else:
            pitch = grids.spacing(xy) if len(xy) > 1 else float("nan")
        found[library] = Place(rows, xy, pitch, "", known)
    return found


def _lattice(xy: NDArray[np.float64]) -> grids.Lattice | None:
    try:
        return grids.Lattice.fit(xy)
    except ValueError:  # too few spots, or cells
        return None


def _refuse_overlay(adata: AnnData, xy: NDArray[np.float64], whole: grids.Lattice | None) -> None:
    """Notice sections that share one plane: their array numbers repeat, or the array of some holds others twice.

    A table of several sections has them one after the other, so its first or last quarter shows the array of one.
    """
    numbers = ["array_row", "array_col"]
    if set(numbers) <= set(adata.obs):
        doubled = float(adata.obs[numbers].dropna().duplicated().mean()) if len(xy) else 0.0
        _refuse_doubled(doubled, "(array_row, array_col) numbers")
        return
    quarter = len(xy) // 4
    for part in (xy[:quarter], xy[len(xy) - quarter :]):
        lattice = _lattice(part)
        if lattice and not (whole and whole.pitch > 0.85 * lattice.pitch):
            doubled = 1 - len(np.unique(lattice.index(xy), axis=0)) / len(xy)
            _refuse_doubled(doubled, f"sites, {lattice.pitch:.4g} px apart,")


def _refuse_doubled(doubled: float, what: str) -> None:
    if doubled > DOUBLED:
        raise ValueError(
            f"{doubled:.0%} of the spots have {what} that another spot has: several sections seem to lie over each "
            "other. Pass library_key= with the obs column that names the section of each spot."
        )


def _refuse_other_spots(fit: Fit, library: str, names: NDArray[np.str_], xy: NDArray[np.float64], pitch: float) -> None:
    """Refuse a fit that was copied to another object: it would predict from the wrong neighbours."""
    of_fit = pd.Index(fit.spots).get_indexer(pd.Index(names))
    here = of_fit >= 0
    if not here.any():
        raise ValueError(
            f"none of the spots of section {library!r} are among the {len(fit.spots)} that the model learnt from. "
            "Predict on the object that was fitted and take rows then; for another section pass reference=."
        )
    moved = (np.abs(xy[here] - fit.xy[of_fit[here]]) > 0.01 * pitch).any(axis=1)
    if moved.any():
        raise ValueError(
            f"{int(moved.sum())} of {int(here.sum())} training spots of section {library!r} are not where they were "
            "when the model was fitted. Put the coordinates back, fit again, or, for another section, pass reference=."
        )


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
        chosen = adata.var_names[_booleans(adata.var, "highly_variable", "var")] if marked else adata.var_names
    else:
        chosen = pd.Index([genes] if isinstance(genes, str) else list(genes))
    if not adata.var_names.is_unique:
        raise ValueError("adata.var_names are not unique. Call adata.var_names_make_unique() first.")
    missing = [str(gene) for gene in chosen if gene not in adata.var_names]
    if missing:
        raise KeyError(
            f"{len(missing)} of {len(chosen)} genes are not in adata.var_names: {_listed(missing)} "
            f"(there: {_listed(adata.var_names)})."
        )
    if not len(chosen):
        why = "genes= is empty" if genes is not None else "var['highly_variable'] marks none; pass genes="
        raise ValueError(f"no gene to model: {why}.")
    return np.asarray(chosen.drop_duplicates(), dtype=str)


def training_rows(adata: AnnData, train_on: str | NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """Mask (n_obs,) of the rows that may be learnt from."""
    if train_on is None:
        return np.ones(adata.n_obs, dtype=bool)
    if isinstance(train_on, str):
        if train_on not in adata.obs:
            raise KeyError(f"no column {train_on!r} in adata.obs (found: {_listed(adata.obs.columns)}).")
        return _booleans(adata.obs, train_on, "obs")
    mask = np.asarray(train_on)
    if mask.dtype != bool or mask.shape != (adata.n_obs,):
        raise ValueError(
            f"train_on is {mask.dtype} of shape {mask.shape}; expected the name of a boolean obs column, or a boolean "
            f"mask of {adata.n_obs} rows, True where the spot may be learnt from."
        )
    return mask


def _booleans(table: pd.DataFrame, name: str, slot: str) -> NDArray[np.bool_]:
    """Take a column as a mask; NaN and text would count as True."""
    column = table[name].infer_objects()
    if column.isna().any() or not pd.api.types.is_bool_dtype(column):
        raise ValueError(
            f"adata.{slot}[{name!r}] is {column.dtype} with {int(column.isna().sum())} missing values; expected True "
            "or False in every row."
        )
    return column.to_numpy(dtype=bool)


def find_image(adata: AnnData, library: str, image: Any, mpp: float | None = None) -> tuple[Image, str]:
    """Open a section's picture: what was given, or what ``uns["spatial"]`` holds; and a name to find it again."""
    if isinstance(image, Mapping):
        by_name = {str(name): picture for name, picture in image.items()}
        if library not in by_name:
            raise KeyError(f"image= has no entry for section {library!r} (found: {_listed(by_name)}).")
        image = by_name[library]
    kept = _spatial(adata, library).get("images", {})
    if image is None or (isinstance(image, str) and (image in kept or image in PICTURES)):
        name = image or _best_image(adata, kept, library)
        if name not in kept:
            raise KeyError(f"no image {name!r} in uns['spatial'][{library!r}]['images'] (found: {_listed(kept)}).")
        factor = _spatial(adata, library).get("scalefactors", {}).get(f"tissue_{name}_scalef")
        if factor is None:
            raise KeyError(
                f"uns['spatial'][{library!r}] holds the image {name!r} but no scalefactors['tissue_{name}_scalef'], so "
                "its scale to the spots is unknown. Add it, or pass image= with the full-resolution picture."
            )
        return open_image(np.asarray(kept[name]), scale=float(factor), mpp=mpp), f"uns:{name}"
    opened = open_image(image, mpp=mpp)
    return opened, str(image) if isinstance(image, str | Path) else ""


def recorded_image(adata: AnnData, library: str, path: str) -> Image:
    """Open the picture that a section's features were taken from."""
    if not path:
        raise KeyError(
            f"the features of section {library!r} were taken from an array, which is not kept: pass it again as "
            "image=, or pass features= for the points."
        )
    gone = f"the features of section {library!r} were taken from {path!r}, which is not there: pass it as image=."
    try:
        return find_image(adata, library, path.removeprefix("uns:"))[0]
    except KeyError as error:
        raise KeyError(f"{gone} {error.args[0]}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{gone} {error} Relative paths count from {Path.cwd()}.") from error


def scale(place: Place, image: Image | None, mpp: float | None, pitch_um: float | None) -> float:
    """Micrometres per full-resolution pixel; refuses a scale that the pitch contradicts."""
    if pitch_um is not None and not (np.isfinite(pitch_um) and pitch_um > 0):
        raise ValueError(f"pitch_um={pitch_um:g}: a length in um is positive.")
    kind, pitch = place.kind, place.pitch
    expected = pitch_um if pitch_um is not None else PITCH_UM.get(kind)
    known = mpp if mpp is not None else (image.mpp if image else None)
    if known is not None:
        if pitch_um is not None or kind == "hexagonal":  # square arrays come at many pitches
            _refuse_contradiction(known, pitch, expected)
        return known
    if expected is None or len(place.rows) < 2:
        raise ValueError(
            f"the image's scale is unknown and the {kind} spots ({len(place.rows)}) have no standard pitch to derive "
            "it from. Pass mpp= (micrometres per full-resolution pixel) or, for two spots or more, pitch_um= "
            "(micrometres between neighbouring spots)."
        )
    message = f"{expected / pitch:.4g} um/px: a {kind} array {pitch:.4g} px apart, taken to be {expected:g} um."
    if pitch_um is None and kind != "hexagonal":
        warnings.warn(f"the image's scale is unknown; assuming {message} Pass pitch_um= or mpp=.", stacklevel=3)
    else:
        logger.info("scale: %s", message)
    return expected / pitch


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
            f"that tells them apart (columns: {_listed(adata.obs.columns)}), or drop those of other objects from uns."
        )
    return str(names[0]) if names else LIBRARY


def _spatial(adata: AnnData, library: str) -> Mapping[str, Any]:
    """Give the section's own entry of ``uns["spatial"]``, empty where there is none."""
    entry: Mapping[str, Any] = adata.uns.get("spatial", {}).get(library, {})
    return entry


def _best_image(adata: AnnData, images: Mapping[str, Any], library: str) -> str:
    """Name the sharpest picture that shows anything."""
    for name in PICTURES:
        if name not in images:
            continue
        small, _ = open_image(np.asarray(images[name])).thumbnail(500)
        if np.ptp(small, axis=(0, 1)).any():  # channel by channel: opaque black has two values
            return name
        warnings.warn(f"the {name!r} image of section {library!r} is blank and was passed over.", stacklevel=4)
    raise KeyError(
        f"no image of section {library!r} in adata.uns['spatial'] (sections: {_listed(adata.uns.get('spatial', {}))}; "
        f"images of this one: {_listed(images)}). Pass image= with the H&E picture that obsm['spatial'] refers to."
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
    pictures: Mapping[str, Mapping[str, Any]],
) -> None:
    """Put features into ``obsm``, how they were made into ``uns``, and small pictures of sections that had none."""
    write(adata, obsm={key: values})
    spatial = dict(adata.uns.get("spatial", {}))
    for library, picture in pictures.items():
        if "/" in library:
            warnings.warn(
                f"section {library!r}: a name with '/' would nest in files, so uns['spatial'] gets no picture of it. "
                "Rename the section if it is to be drawn with its image.",
                stacklevel=3,
            )
            continue
        had = spatial.get(library, {})
        spatial[library] = {**had, **{part: {**had.get(part, {}), **new} for part, new in picture.items()}}
    if spatial:
        adata.uns["spatial"] = spatial
    own = dict(adata.uns.get(UNS, {}))
    adata.uns[UNS] = {**own, "features": {**own.get("features", {}), key: dict(record)}}


def small_picture(adata: AnnData, library: str, image: Image, pitch: float) -> dict[str, dict[str, Any]]:
    """Give what ``uns["spatial"]`` lacks for scanpy and squidpy to draw the section: nothing where it has ``hires``."""
    had = _spatial(adata, library)
    if "hires" in had.get("images", {}):
        return {}
    pixels, factor = image.thumbnail()
    factors = {"tissue_hires_scalef": factor}
    if "spot_diameter_fullres" not in had.get("scalefactors", {}) and np.isfinite(pitch):
        factors["spot_diameter_fullres"] = 0.55 * pitch  # 55 um spots every 100 um, the commonest array
    return {"images": {"hires": pixels}, "scalefactors": factors}


def description(adata: AnnData, key: str, library: str, *, alone: bool) -> Description:
    """Tell how a section's features under ``key`` were made, so that more can be made alike.

    ``alone`` says that there is but one section, which may be called otherwise than it was then.
    """
    made = adata.uns.get(UNS, {}).get("features", {})
    if key not in made:
        raise KeyError(
            f"adata.obsm[{key!r}] was not made by sthisto.pp.extract_features, so the features of new points cannot be "
            "made alike: pass features= (m, d), computed the same way, beside the points."
        )
    record = made[key]
    libraries = [str(name) for name in record["libraries"]]
    if library not in libraries and not (alone and len(libraries) == 1):
        raise KeyError(f"no features were extracted for section {library!r} (there are: {_listed(libraries)}).")
    at = libraries.index(library) if library in libraries else 0
    return Description(
        str(record["encoder"]), float(record["patch_um"]), float(record["mpp"][at]), str(record["image"][at])
    )


def write_fit(adata: AnnData, key: str, fit: Fit) -> None:
    """Keep a fitted model in ``uns``."""
    own = dict(adata.uns.get(UNS, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        adata.uns[UNS] = {**own, "fit": {**own.get("fit", {}), key: pack(fit)}}


def read_fit(adata: AnnData, key: str) -> Fit:
    """Take a fitted model out of ``uns``; refuses one that is damaged or newer."""
    fits = adata.uns.get(UNS, {}).get("fit", {})
    if key not in fits:
        raise KeyError(
            f"no fitted model {key!r} in adata.uns['{UNS}']['fit'] (found: {_listed(fits)}). "
            "Run sthisto.tl.fit(adata) first."
        )
    return unpack(fits[key])


def plain_params(params: Mapping[str, Any] | None) -> dict[str, Any]:
    """Give settings as JSON keeps them, so that a model is built alike before and after a round trip."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(params or {}), default=_plain))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"params={params!r}: settings are numbers, strings, None or lists of them ({error})."
        ) from error
    return plain


def pack(fit: Fit) -> dict[str, Any]:
    """Turn a fit into what h5ad and zarr keep: strings, numbers, arrays and one safetensors blob."""
    blob = _blob(fit.arrays)
    record = {name: value for name, value in vars(fit).items() if name != "arrays"}
    record["params"] = json.dumps(fit.params)  # a dict of None and mixed lists would not come back as it was
    return {"schema": SCHEMA, "sha256": _digest(fit, blob), **record, "state": np.frombuffer(blob, dtype=np.uint8)}


def unpack(record: Mapping[str, Any]) -> Fit:
    """Undo :func:`pack`.

    Raises
    ------
    ValueError
        Anything in it is missing, changed, or of a newer schema.
    """
    fit = _fit(record)
    if "state" not in record:
        raise ValueError("the fitted model is damaged: its state is missing. Fit again.")
    return _checked(fit, np.asarray(record["state"]).astype(np.uint8).tobytes(), record)


def save_fit(fit: Fit, path: str | PathLike[str]) -> None:
    """One safetensors file: the arrays, and everything else as JSON in its metadata."""
    rest = {"schema": SCHEMA, "sha256": _digest(fit, _blob(fit.arrays)), **_rest(fit), "params": json.dumps(fit.params)}
    partial = Path(f"{path}.partial")  # a kill half-way leaves the old file
    partial.write_bytes(_blob(fit.arrays, {UNS: json.dumps(rest, default=_plain)}))
    partial.replace(path)


def load_fit(path: str | PathLike[str]) -> Fit:
    """Undo :func:`save_fit`."""
    whole = Path(path).read_bytes()
    try:
        arrays = from_safetensors(whole)
        header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
        record = json.loads(header["__metadata__"][UNS])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no whole model that sthisto.tl.save wrote: {error!r}.") from error
    return _checked(_fit(record), _blob(arrays), record)


def no_spots(genes: NDArray[np.str_]) -> AnnData:
    """Make an AnnData of genes alone."""
    return AnnData(X=np.empty((0, len(genes)), dtype=np.float32), var=pd.DataFrame(index=pd.Index(genes)))


def _blob(arrays: Mapping[str, NDArray[np.generic]], metadata: dict[str, str] | None = None) -> bytes:
    return to_safetensors({name: np.asarray(array, order="C") for name, array in arrays.items()}, metadata)


def _rest(fit: Fit) -> dict[str, Any]:
    """Everything but the arrays, a shallow copy."""
    return {name: value for name, value in vars(fit).items() if name != "arrays"}


def _plain(value: Any) -> Any:
    """Turn numpy's arrays and numbers into what JSON has."""
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"{type(value).__name__} is no setting")
    return value.tolist()


def _digest(fit: Fit, blob: bytes) -> str:
    """Checksum over all of a fit, the same whichever file it went through."""
    rest = json.dumps(_rest(fit), default=_plain, sort_keys=True)
    return hashlib.sha256(rest.encode() + blob).hexdigest()


def _checked(fit: Fit, blob: bytes, record: Mapping[str, Any]) -> Fit:
    if _digest(fit, blob) != record.get("sha256"):
        raise ValueError("the fitted model is damaged: it does not match its checksum. Fit again.")
    return replace(fit, arrays=from_safetensors(blob))


def _fit(record: Mapping[str, Any]) -> Fit:
    """Take up everything but the arrays."""
    missing = sorted({"schema", *(entry.name for entry in fields(Fit))} - {"arrays"} - set(record))
    if "schema" in record and int(record["schema"]) > SCHEMA:
        raise ValueError(
            f"the fitted model has schema {record['schema']}, this sthisto reads up to {SCHEMA}: upgrade sthisto."
        )
    if missing:
        raise ValueError(f"the fitted model is damaged: {_listed(missing)} missing. Fit again.")
    try:
        return _typed(record)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"the fitted model is damaged: {error}. Fit again.") from error


def _typed(record: Mapping[str, Any]) -> Fit:
    """Types as they were, whatever the file made of them."""
    return Fit(
        model=str(record["model"]),
        params=json.loads(record["params"]),
        genes=_texts(record["genes"]),
        libraries=_texts(record["libraries"]),
        library_key=str(record["library_key"]),
        features_key=str(record["features_key"]),
        layer=str(record["layer"]),
        seed=int(record["seed"]),
        pitch=np.asarray(record["pitch"], dtype=np.float64),
        spots=_texts(record["spots"]),
        xy=np.asarray(record["xy"], dtype=np.float64),
        arrays={},
        history={name: np.asarray(curve, dtype=np.float64) for name, curve in record["history"].items()},
    )


def _texts(values: Iterable[object]) -> NDArray[np.str_]:
    """Strings of a fixed width; zarr hands out numpy's new ones, which do not convert."""
    return np.array([str(value) for value in values], dtype=str)


def gene_columns(adata: AnnData, genes: NDArray[np.str_]) -> NDArray[np.intp]:
    """Columns (g,) of the fitted genes."""
    columns: NDArray[np.intp] = adata.var_names.get_indexer(genes)
    if (columns < 0).any():
        raise ValueError(
            f"the model was fitted on other genes: {int((columns < 0).sum())} of its {len(genes)} are not in "
            f"adata.var_names (first: {str(genes[columns < 0][0])!r}). Fit again, or use the object it was fitted on."
        )
    return columns


def write_prediction(
    adata: AnnData, key: str, genes: NDArray[np.str_], mean: NDArray[np.float32], std: NDArray[np.float32]
) -> None:
    """Put prediction and spread (n, g) into layers over all genes, NaN where a gene is not modelled."""
    columns = gene_columns(adata, genes)
    layers = {}
    for name, values in ((key, mean), (f"{key}_std", std)):
        layers[name] = np.full(adata.shape, np.nan, dtype=np.float32)
        layers[name][:, columns] = values
    write(adata, layers=layers, var={f"{key}_modelled": adata.var_names.isin(genes)})


def points_obs(adata: AnnData, fit: Fit, places: Mapping[str, Place], laid: Mapping[str, Points]) -> pd.DataFrame:
    """Name the points of all sections, and tell their sites and the spot nearest to each."""
    obs = pd.concat([_points_obs(adata, fit, name, places[name], points) for name, points in laid.items()])
    texts = [name for name in ("nearest_spot", fit.library_key) if name]
    return obs.astype(dict.fromkeys(texts, "category"))


def _points_obs(adata: AnnData, fit: Fit, library: str, place: Place, points: Points) -> pd.DataFrame:
    distance, spot = (each[:, 0] for each in grids.nearest(points.xy, place.xy))
    names = adata.obs_names[place.rows].to_numpy().astype(str)
    trained = np.isin(names, fit.spots)
    obs = pd.DataFrame(index=np.arange(len(spot)).astype(str))
    if points.site is not None and points.spot_site is not None:
        obs["array_row"], obs["array_col"] = (points.site - points.site.min(axis=0)).T
        obs.index = pd.Index([f"{row}x{col}" for row, col in obs.to_numpy()])
        obs["measured"] = _among(points.site, points.spot_site[trained])
    else:
        obs["measured"] = (distance == 0) & trained[spot]
    obs["nearest_spot"] = names[spot]
    obs["distance_um"] = distance * _mpp(adata, fit, library)
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
    spatial = like.uns.get("spatial", {})
    kept = {name: deepcopy(spatial[name]) for name in spatial if diameters is None or name in diameters}
    for library, entry in kept.items():
        if diameters is not None:
            entry["scalefactors"] = {**entry.get("scalefactors", {}), "spot_diameter_fullres": diameters[library]}
    if kept:
        made.uns["spatial"] = kept
    described = like.uns.get(UNS, {}).get("features")
    if described:
        made.uns[UNS] = {"features": deepcopy(described)}  # the scale, for scale bars
    return made


def _among(sites: NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows (m, 2) occur among the chosen ones."""
    return np.asarray(pd.MultiIndex.from_arrays(list(sites.T)).isin(pd.MultiIndex.from_arrays(list(chosen.T))))


def _mpp(adata: AnnData, fit: Fit, library: str) -> float:
    """Scale that the features were taken at; NaN where sthisto did not take them."""
    made = adata.uns.get(UNS, {}).get("features", {})
    for key in [fit.features_key] if fit.features_key else made:
        if key in made and library in list(made[key]["libraries"]):
            return description(adata, key, library, alone=not fit.library_key).mpp
    return float("nan")
