"""One record of a tissue section: where its spots are, at which scale, and what is known of them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from sthisto import grids
from sthisto._data._fit_record import Fit
from sthisto._data._store import ARRAY, COORDINATES, coordinates, refuse_lazy, tissue_rows
from sthisto._messages import listed
from sthisto.images import Image, sample_patches

HEAVY = ("weights", "weights_sha256")  # of an encoder's record, kept in uns alone
SECTION = "section"  # the name of a section that nobody named
UNFITTED = "a section that was only stained"  # the model's key for the sections of another object
DOUBLED = 0.05  # share of spots on sites that hold another one; single real sections have none


@dataclass(frozen=True)
class FeatureMetadata:
    """How the features of one section were made.

    Attributes
    ----------
    encoder
        As ``encoders.restore`` takes it: name, provenance, perhaps weights.
    patch_um, window_um
        Sides of the patch, and of the window over which tokens are averaged (None: a patch for each point).
    mpp
        Micrometers per full-resolution pixel.
    image
        Path as it was given, "uns:hires", or "" for an array.
    """

    encoder: Mapping[str, Any]
    patch_um: float
    mpp: float
    image: str
    window_um: float | None = None

    def settings(self) -> dict[str, Any]:
        """What has to be equal for two sets of features to compare."""
        provenance = {
            key: value
            for key, value in _plain(self.encoder.get("provenance", {})).items()
            if key in ("sha256", "repo_id", "pooling", "precision")
        }
        return {
            "encoder": str(self.encoder["encoder"]),
            "patch_um": round(float(self.patch_um), 3),
            "window_um": 0.0 if self.window_um is None else round(float(self.window_um), 3),
            **provenance,
        }

    def text(self) -> str:
        """As JSON, without weights."""
        encoder = {key: value for key, value in _plain(self.encoder).items() if key not in HEAVY}
        return json.dumps({**vars(self), "encoder": encoder}, sort_keys=True, default=_plain_value)


@dataclass(frozen=True)
class SectionImage:
    """The stained image of one section.

    Attributes
    ----------
    image
        The pixels, with their scale to full resolution.
    mpp
        Micrometers per full-resolution pixel.
    path
        As it was given, "uns:hires", or "" for an array.
    """

    image: Image
    mpp: float
    path: str

    def patches(self, xy: NDArray[np.float64], model: Any) -> Callable[[NDArray[np.intp]], NDArray[np.uint8]]:
        """Patches of the model's size around rows of xy (m, 2)."""
        return lambda rows: sample_patches(self.image, xy[rows], model.patch_um / self.mpp, model.input_size)


@dataclass(frozen=True, kw_only=True)
class SectionData:
    """One section of an AnnData.

    Attributes
    ----------
    name
        As the user has it: in ``obs[library_key]``, else in ``uns["spatial"]``.
    model_key
        As a fitted model knows it: its name, or ``UNFITTED``.
    rows
        (n,) of the AnnData.
    xy
        (n, 2) full-resolution pixels, x then y.
    pitch
        Pixels between neighboring spots of the whole section, the unit of length of the models; NaN for one spot.
    array
        "hexagonal", "square", "oblique", or "scattered" where there is no lattice.
    in_tissue
        (n,) spots that are fitted and mapped.
    features, metadata
        (n, d) image features and how they were made; None where they were not read, or are from elsewhere.
    expression
        (n, g) log-normalized; None where it was not read.
    image
        The stained image and its scale; None where it was not opened.
    prior
        (n, g) expression as predicted elsewhere; None where there is none.
    """

    name: str
    model_key: str
    rows: NDArray[np.intp]
    xy: NDArray[np.float64]
    pitch: float
    array: str
    in_tissue: NDArray[np.bool_]
    features: NDArray[np.float32] | None = None
    metadata: FeatureMetadata | None = None
    expression: NDArray[np.float32] | None = None
    image: SectionImage | None = None
    prior: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def mpp(self) -> float | None:
        """Micrometers per full-resolution pixel, where known."""
        if self.metadata is not None:
            return self.metadata.mpp
        return self.image.mpp if self.image is not None else None

    def keep(self, kept: NDArray[np.bool_]) -> "SectionData":
        """Only the spots that a mask (n,) keeps; the pitch stays that of the whole section."""
        return replace(
            self,
            rows=self.rows[kept],
            xy=self.xy[kept],
            in_tissue=self.in_tissue[kept],
            features=None if self.features is None else self.features[kept],
            expression=None if self.expression is None else self.expression[kept],
            prior=None if self.prior is None else self.prior[kept],
        )


def spatial_entries(adata: AnnData) -> dict[str, Mapping[str, Any]]:
    """Sections in ``uns["spatial"]`` by name; what other tools keep there is passed over."""
    shared = adata.uns.get(COORDINATES)
    if not isinstance(shared, Mapping):
        return {}
    parts = ("images", "scalefactors", "metadata")
    return {
        str(name): entry
        for name, entry in shared.items()
        if isinstance(entry, Mapping) and (not entry or any(part in entry for part in parts))
    }


def section_rows(adata: AnnData, library_key: str | None) -> dict[str, NDArray[np.intp]]:
    """Rows of each section by its name, in the order of first appearance."""
    refuse_lazy(adata)
    if not adata.obs_names.is_unique:
        double = adata.obs_names[adata.obs_names.duplicated()][0]
        raise ValueError(
            f"adata.obs_names are not unique: {double!r} occurs more than once, so results would be ambiguous. "
            "Call adata.obs_names_make_unique() first."
        )
    if library_key is None:
        return {_only_section(adata): np.arange(adata.n_obs)}
    if library_key not in adata.obs:
        raise KeyError(f"no column {library_key!r} in adata.obs (found: {listed(adata.obs.columns)}).")
    labels = adata.obs[library_key]
    if labels.isna().any():
        raise ValueError(f"{int(labels.isna().sum())} rows of adata.obs[{library_key!r}] name no section. Drop them.")
    names = labels.astype(str).to_numpy()
    return {str(name): np.flatnonzero(names == name) for name in pd.unique(names)}


def read_sections(adata: AnnData, library_key: str | None = None) -> dict[str, SectionData]:
    """Read each section's spots; refuses several sections that overlap as one."""
    tissue, sections = tissue_rows(adata), {}
    for name, rows in section_rows(adata, library_key).items():
        xy = coordinates(adata, rows)
        lattice = _lattice(xy)
        if library_key is None:
            _refuse_overlap(adata, xy, lattice)
        sections[name] = SectionData(
            name=name,
            model_key=name,
            rows=rows,
            xy=xy,
            pitch=lattice.pitch if lattice else _spacing(xy),
            array=str(lattice.kind) if lattice else "scattered",
            in_tissue=tissue[rows],
        )
    return sections


def read_stained_sections(adata: AnnData, library_key: str | None) -> dict[str, SectionData]:
    """Read sections that no model was fitted on."""
    return {name: replace(each, model_key=UNFITTED) for name, each in read_sections(adata, library_key).items()}


def read_fitted_sections(adata: AnnData, fit: Fit) -> dict[str, SectionData]:
    """Read each section in the unit of length that the fit was made in.

    Refuses an object that the fit does not belong to. Sections of a fitted object that had no training spots pass:
    models predict them as ones they were not fitted on.
    """
    names, tissue, sections = adata.obs_names.to_numpy().astype(str), tissue_rows(adata), {}
    for name, rows in section_rows(adata, fit.library_key or None).items():
        xy = coordinates(adata, rows)
        key = name if fit.library_key else str(fit.sections[0])  # a lone section may be renamed in uns
        if key in fit.sections:
            pitch = float(fit.pitch[fit.sections == key][0])
            _refuse_other_spots(fit, name, names[rows], xy, pitch)
        else:
            pitch = _spacing(xy)
        lattice = _lattice(xy)
        sections[name] = SectionData(
            name=name,
            model_key=key,
            rows=rows,
            xy=xy,
            pitch=pitch,
            array=str(lattice.kind) if lattice else "scattered",
            in_tissue=tissue[rows],
        )
    return sections


def _spacing(xy: NDArray[np.float64]) -> float:
    return grids.spacing(xy) if len(xy) > 1 else float("nan")


def _lattice(xy: NDArray[np.float64]) -> grids.Lattice | None:
    try:
        return grids.Lattice.fit(xy)
    except ValueError:  # too few spots, or cells
        return None


def _refuse_overlap(adata: AnnData, xy: NDArray[np.float64], whole: grids.Lattice | None) -> None:
    """Notice sections that share one plane: their array numbers repeat, or the array of some holds others twice.

    A table of several sections has them one after the other, so its first or last quarter shows the array of one.
    """
    if set(ARRAY) <= set(adata.obs) and len(xy):
        numbers = adata.obs[ARRAY].dropna()
        if len(numbers.drop_duplicates()) > 1:  # one pair for all spots is a placeholder
            _refuse_doubled(float(numbers.duplicated().mean()), "(array_row, array_col) numbers")
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
            f"{doubled:.0%} of the spots have {what} that another spot has: several sections seem to overlap. "
            "Pass library_key= with the obs column that names the section of each spot."
        )


def _refuse_other_spots(fit: Fit, name: str, spots: NDArray[np.str_], xy: NDArray[np.float64], pitch: float) -> None:
    """Refuse a fit that was copied to another object: it would predict from the wrong neighbors."""
    row = pd.Index(fit.spots).get_indexer(pd.Index(spots))
    shared = row >= 0
    if not shared.any():
        raise ValueError(
            f"none of the spots of section {name!r} are among the {len(fit.spots)} that the model was fitted on. "
            "Predict on the object that was fitted and take rows then; for another section pass reference=."
        )
    moved = (np.abs(xy[shared] - fit.xy[row[shared]]) > 0.01 * pitch).any(axis=1)
    if moved.any():
        raise ValueError(
            f"{int(moved.sum())} of {int(shared.sum())} training spots of section {name!r} have moved since the model "
            "was fitted. Restore the coordinates, fit again, or, for another section, pass reference=."
        )


def _only_section(adata: AnnData) -> str:
    names = list(spatial_entries(adata))
    if len(names) > 1:
        raise ValueError(
            f"uns['spatial'] names {len(names)} sections ({listed(names)}). Pass library_key= with the obs column "
            f"that names the section of each spot (columns: {listed(adata.obs.columns)}), or drop those of other "
            "objects from uns."
        )
    return names[0] if names else SECTION


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key): _plain(value) if isinstance(value, Mapping) else value for key, value in record.items()}


def _plain_value(value: Any) -> Any:
    """Turn numpy's arrays and numbers into what JSON has."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be recorded")
