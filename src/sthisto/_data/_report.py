"""Everything known of a section, line by line: what it is, whether it agrees with the rest, and what to do."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from anndata import AnnData
from scipy import sparse

from sthisto._data._features import add_metadata, refuse_changed
from sthisto._data._images import open_unchecked
from sthisto._data._scale import contradicted, refuse_overlapping_spots, scale_sources
from sthisto._data._section import SectionData
from sthisto._data._store import IN_TISSUE, not_logarithmic, records
from sthisto._messages import listed
from sthisto.images import check_scale, check_tissue, tissue_share

OK, GUESSED, CONTRADICTORY, MISSING = "ok", "guessed", "contradictory", "missing"
FEW = 2000  # rows that show what the values of X are


@dataclass(frozen=True)
class Finding:
    """One line of a report.

    Attributes
    ----------
    check
        What was checked.
    status
        "ok", "guessed", "contradictory" or "missing".
    value
        What is there.
    advice
        What to do, "" where nothing is.
    """

    check: str
    status: str
    value: str
    advice: str = ""


def section_findings(adata: AnnData, section: SectionData, image: Any) -> Iterator[Finding]:
    """What is known of one section."""
    pitch = f"{len(section)} spots, {section.array}, pitch {section.pitch:.4g} px"
    yield Finding("array", OK, pitch)
    yield _in_tissue(adata, section)
    yield _tried("spot diameter", lambda: refuse_overlapping_spots(adata, section), "agrees with the pitch")
    image_mpp = None
    try:
        opened, path = open_unchecked(adata, section.name, image)
    except (KeyError, OSError, ValueError, TypeError) as error:
        yield Finding("image", MISSING, "none", str(error.args[0] if error.args else error))
    else:
        image_mpp = opened.mpp
        height, width = opened.shape
        yield Finding("image", OK, f"{path or 'an array'}, {width:.0f} x {height:.0f} full-resolution px")
        fits = _tried("coordinates", lambda: check_scale(opened, section.xy), "inside the image")
        yield fits
        if fits.status == OK:
            doubt = check_tissue(opened, section.xy[section.in_tissue], None)
            share = tissue_share(opened, section.xy[section.in_tissue])
            yield Finding("tissue", CONTRADICTORY if doubt else OK, f"{share:.0%} of the spots are on tissue", doubt)
    yield _scale(adata, section, image_mpp)


def expression_finding(adata: AnnData) -> Finding:
    """What the values of X are."""
    matrix = adata.X
    if matrix is None or not adata.n_obs:
        return Finding("X", MISSING, "empty", "Pass layer= with the layer that holds log-normalized expression.")
    part = matrix[: min(FEW, adata.n_obs)]
    part = part.compute() if hasattr(part, "compute") else part
    values = np.asarray(part.data if sparse.issparse(part) else part, dtype=np.float32).ravel()
    if not np.isfinite(values).all() or values.min(initial=0) < 0:
        return Finding("X", CONTRADICTORY, "NaN, infinite or negative values", "Models work on log-normalized values.")
    kind = not_logarithmic(values)
    if kind:
        return Finding("X", GUESSED, kind, "sc.pp.normalize_total(adata, target_sum=1e4); sc.pp.log1p(adata)")
    return Finding("X", OK, f"log-normalized expression, up to {values.max(initial=0):.3g}")


def record_findings(adata: AnnData, sections: dict[str, SectionData]) -> Iterator[Finding]:
    """Features and fits of the object."""
    for key in records(adata, "features"):
        if key not in adata.obsm:
            yield Finding(f"features {key}", MISSING, "recorded, but not in obsm", "Run sthisto.pp.extract_features.")
            continue
        made = [each.metadata for each in add_metadata(adata, sections, key).values() if each.metadata]
        settings = "; ".join(dict.fromkeys(f"{m.encoder['encoder']}, {m.patch_um:g} um at {m.mpp:.4g}" for m in made))
        yield _tried(f"features {key}", lambda key=key: refuse_changed(adata, key), settings or "from elsewhere")  # type: ignore[misc]
    for key, fit in records(adata, "fit").items():
        genes, spots = len(fit.get("genes", ())), len(fit.get("spots", ()))
        yield Finding(f"fit {key}", OK, f"{fit.get('model')}, {genes} genes, {spots} training spots")


def _in_tissue(adata: AnnData, section: SectionData) -> Finding:
    out = int((~section.in_tissue).sum())
    if IN_TISSUE not in adata.obs:
        return Finding("in_tissue", OK, "no such column: all spots are used")
    return Finding("in_tissue", OK, f"{out} spots outside the tissue, which are neither fitted nor mapped")


def _scale(adata: AnnData, section: SectionData, image_mpp: float | None) -> Finding:
    sources = scale_sources(adata, section, image_mpp)
    if not sources:
        return Finding("scale", MISSING, "unknown", "Pass mpp= (um per pixel) or pitch_um= (um between spots).")
    figures = listed([f"{each.mpp:.4g} um/px by {each.what}" for each in sources])
    if contradicted(section, sources):
        return Finding("scale", CONTRADICTORY, figures, "Pass the right mpp=, or pitch_um=.")
    advice = "Pass mpp= or pitch_um= to settle it." if sources[0].guessed else ""
    return Finding("scale", GUESSED if sources[0].guessed else OK, figures, advice)


def _tried(check: str, refuse: Callable[[], object], value: str) -> Finding:
    """Run a check that raises, and report it as a line."""
    try:
        refuse()
    except ValueError as error:
        return Finding(check, CONTRADICTORY, str(error).split(":")[0], str(error))
    return Finding(check, OK, value)
