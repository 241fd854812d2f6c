"""Where the spots are, section by section."""

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from sthisto import grids
from sthisto._data._records import LIBRARY, Fit, Place, listed

DOUBLED = 0.05  # share of spots on sites that hold another one; single real sections have none


def sections(adata: AnnData, library_key: str | None) -> dict[str, NDArray[np.intp]]:
    """Rows of each section by its name, in the order of first appearance."""
    if not adata.obs_names.is_unique:
        double = adata.obs_names[adata.obs_names.duplicated()][0]
        raise ValueError(
            f"adata.obs_names are not unique: {double!r} occurs more than once, so results could not be told apart. "
            "Call adata.obs_names_make_unique() first."
        )
    if library_key is None:
        return {only_library(adata): np.arange(adata.n_obs)}
    if library_key not in adata.obs:
        raise KeyError(f"no column {library_key!r} in adata.obs (found: {listed(adata.obs.columns)}).")
    labels = adata.obs[library_key]
    if labels.isna().any():
        raise ValueError(f"{int(labels.isna().sum())} rows of adata.obs[{library_key!r}] name no section. Drop them.")
    names = labels.astype(str).to_numpy()
    return {str(name): np.flatnonzero(names == name) for name in pd.unique(names)}


def positions(adata: AnnData, rows: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the spot centres (n, 2) of the rows: full-resolution pixels, x then y."""
    if "spatial" not in adata.obsm:
        raise KeyError(
            f"no spot coordinates: adata.obsm['spatial'] is missing (found: {listed(adata.obsm)}). It holds the "
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
    """Refuse a fit that was copied to another object: it would predict from the wrong neighbors."""
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


def only_library(adata: AnnData) -> str:
    names = list(adata.uns.get("spatial", {}))
    if len(names) > 1:
        raise ValueError(
            f"uns['spatial'] names {len(names)} sections ({listed(names)}). Pass library_key= with the obs column "
            f"that tells them apart (columns: {listed(adata.obs.columns)}), or drop those of other objects from uns."
        )
    return str(names[0]) if names else LIBRARY
