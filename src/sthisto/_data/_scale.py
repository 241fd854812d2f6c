"""Micrometers per pixel: everything that is known of it, compared, and the most reliable taken.

Sources in order of reliability: what the user passes (``mpp``, ``pitch_um``); the scale factors of Space Ranger; the
image file's own resolution; the record of features taken earlier; the size of the bins; and the pitch of the array,
which is known for Visium only. Sources that disagree by more than ``TOLERANCE`` are refused with all figures.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from anndata import AnnData

from sthisto._data._section import SectionData, spatial_entries
from sthisto._data._store import ARRAY, records
from sthisto._messages import warn

PITCH_UM = {"hexagonal": 100.0, "square": 200.0}  # Visium; the first Spatial Transcriptomics arrays
TOLERANCE = 1.5  # between two figures for one scale
OVERLAP = 1.3  # spot diameters in pitches, above which spots would overlap: bins of a gapless map have 1
BARCODE = re.compile(r"^(.*[^ACGT])?[ACGT]{16}(-\d+)?(\W.*)?$")  # of 10x, with what concatenation adds
logger = logging.getLogger("sthisto")


@dataclass(frozen=True)
class ScaleSource:
    """One figure for the scale, and where it is from.

    Attributes
    ----------
    what
        For messages.
    mpp
        Micrometers per full-resolution pixel.
    guessed
        It rests on an assumption.
    binding
        What the user passes may not contradict it; records and files may be out of date.
    """

    what: str
    mpp: float
    guessed: bool = False
    binding: bool = False


def resolve_scale(
    adata: AnnData,
    section: SectionData,
    image_mpp: float | None,
    *,
    mpp: float | None = None,
    pitch_um: float | None = None,
) -> float:
    """Micrometers per full-resolution pixel; refuses figures that contradict each other, warns where it guesses."""
    for name, value in (("mpp", mpp), ("pitch_um", pitch_um)):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value:g}: a length in um is positive.")
    refuse_overlapping_spots(adata, section)
    sources = scale_sources(adata, section, image_mpp, mpp=mpp, pitch_um=pitch_um)
    if not sources:
        raise ValueError(
            f"the image's scale is unknown and the {section.array} spots ({len(section)}) have no standard pitch to "
            "derive it from. Pass mpp= (micrometers per full-resolution pixel) or, for two spots or more, pitch_um= "
            "(micrometers between neighboring spots)."
        )
    chosen = sources[0]
    binding = [each for each in sources if mpp is None or each.binding]
    contradiction = contradicted(section, binding)
    if contradiction:
        raise ValueError(
            f"{contradiction} Are the coordinates in full-resolution pixels of this image? Pass the right mpp=, and "
            "pitch_um= where the array is not a standard one."
        )
    doubt = contradicted(section, sources)
    if doubt:
        warn(f"{doubt} {chosen.what} counts.")
    elif chosen.guessed:
        warn(f"the image's scale is unknown; assuming {chosen.mpp:.4g} um/px: {chosen.what}. Pass pitch_um= or mpp=.")
    else:
        logger.info("section %r: scale %.4g um/px, from %s", section.name, chosen.mpp, chosen.what)
    return chosen.mpp


def scale_sources(
    adata: AnnData,
    section: SectionData,
    image_mpp: float | None,
    *,
    mpp: float | None = None,
    pitch_um: float | None = None,
) -> list[ScaleSource]:
    """Everything known of a section's scale, the most reliable first."""
    factors, pitch = factors_of(adata, section.name), section.pitch
    recorded, bin_um = _recorded(adata, section), factor_of(factors, "bin_size_um")
    measurable = np.isfinite(pitch)
    sources = [
        ("mpp=", mpp),
        (f"pitch_um={pitch_um:g}" if pitch_um else "", pitch_um / pitch if pitch_um and measurable else None),
        ("scalefactors['microns_per_pixel']", factor_of(factors, "microns_per_pixel")),
        ("the image file", image_mpp),
        ("features taken earlier", recorded),
        ("scalefactors['bin_size_um']", bin_um / pitch if bin_um and measurable else None),
    ]
    known = [
        ScaleSource(what, float(value), binding=what.startswith(("mpp=", "pitch_um=")))
        for what, value in sources
        if value is not None
    ]
    standard = not (pitch_um or recorded or bin_um) and measurable
    if standard and (section.array == "hexagonal" or (section.array == "square" and not known)):
        known.append(_by_array(adata, section))
    return known


def known_mpp(adata: AnnData, section: SectionData) -> float:
    """Micrometers per pixel as far as they are known without the image and without a guess; NaN where they are not."""
    if section.mpp is not None:
        return section.mpp
    certain = [source.mpp for source in scale_sources(adata, section, None) if not source.guessed]
    return certain[0] if certain else float("nan")


def contradicted(section: SectionData, sources: list[ScaleSource]) -> str:
    """Figures that disagree, "" where none do."""
    figures = [source.mpp for source in sources]
    if not figures or max(figures) <= TOLERANCE * min(figures):
        return ""
    known = "; ".join(f"{source.mpp:.4g} um/px by {source.what}" for source in sources)
    return f"scales of section {section.name!r} contradict each other: {known}."


def refuse_overlapping_spots(adata: AnnData, section: SectionData) -> None:
    """Notice coordinates that were multiplied by a scale factor already: spots would overlap their neighbors."""
    diameter = factor_of(factors_of(adata, section.name), "spot_diameter_fullres")
    if diameter is not None and diameter > OVERLAP * section.pitch:
        raise ValueError(
            f"the spots of section {section.name!r} are {diameter:.4g} px wide by "
            f"scalefactors['spot_diameter_fullres'] and {section.pitch:.4g} px apart by obsm['spatial']: these are not "
            "full-resolution coordinates, but probably multiplied by a scale factor such as tissue_hires_scalef. "
            "Divide them by it."
        )


def factors_of(adata: AnnData, name: str) -> Mapping[str, Any]:
    """Scale factors of a section, empty where there are none."""
    factors = spatial_entries(adata).get(name, {}).get("scalefactors")
    return factors if isinstance(factors, Mapping) else {}


def factor_of(factors: Mapping[str, Any], key: str, *, section: str = "") -> float | None:
    """A scale factor as a number, also where it was kept as text or as an array of one; None where there is none."""
    value = factors.get(key)
    if value is None:
        return None
    parts = np.asarray(value).ravel()
    if parts.size == 0 or (parts.size == 1 and parts[0] is None):
        return None
    try:
        number = float(parts[0].replace(",", ".") if isinstance(parts[0], str) else parts[0])
    except (TypeError, ValueError):
        number = np.nan
    if parts.size > 1 or not (np.isfinite(number) and number > 0):
        raise ValueError(
            f"scalefactors[{key!r}]{f' of section {section!r}' if section else ''} is {value!r}: expected one positive "
            "number."
        )
    return number


def _recorded(adata: AnnData, section: SectionData) -> float | None:
    """Scale at which features were taken earlier."""
    if section.metadata is not None:
        return section.metadata.mpp
    for record in records(adata, "features").values():
        names = [str(name) for name in record.get("sections", ())]
        if section.name in names:
            return float(record["mpp"][names.index(section.name)])
        if len(names) == 1:
            return float(record["mpp"][0])
    return None


def _by_array(adata: AnnData, section: SectionData) -> ScaleSource:
    """Scale by the standard pitch of the array's kind, which is certain where 10x's barcodes name the spots."""
    expected, pitch = PITCH_UM[section.array], section.pitch
    if _is_visium(adata, section):
        by_number = _pitch_by_numbers(adata, section)
        pitch = by_number or pitch
        return ScaleSource(f"a Visium array, {pitch:.4g} px for 100 um", expected / pitch, binding=True)
    by_number = _pitch_by_numbers(adata, section) if section.array == "hexagonal" else None
    pitch = by_number or pitch
    what = f"a {section.array} array, {pitch:.4g} px apart, taken to be {expected:g} um apart"
    return ScaleSource(what, expected / pitch, guessed=True, binding=section.array == "hexagonal")


def _is_visium(adata: AnnData, section: SectionData) -> bool:
    """Whether spots are named by 10x's barcodes on a hexagonal array."""
    names = adata.obs_names[section.rows[:50]].astype(str)
    return section.array == "hexagonal" and len(names) > 0 and all(BARCODE.match(name) for name in names)


def _pitch_by_numbers(adata: AnnData, section: SectionData) -> float | None:
    """Pixels between neighbors of the whole array by ``array_row`` and ``array_col``, also where spots are missing.

    Rows of Visium's array are numbered one by one and its columns by twos.
    """
    if not set(ARRAY) <= set(adata.obs):
        return None
    numbers = adata.obs[ARRAY].iloc[section.rows].to_numpy(dtype=np.float64)
    design = np.column_stack([numbers, np.ones(len(numbers))])
    if len(numbers) < 10 or not np.isfinite(numbers).all():
        return None
    steps, _, rank, _ = np.linalg.lstsq(design, section.xy, rcond=None)
    if rank < 3:
        return None
    along = 2 * float(np.linalg.norm(steps[1]))
    misfit = float(np.abs(design @ steps - section.xy).max())
    return along if misfit < 0.25 * along else None
