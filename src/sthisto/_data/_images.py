"""Stained images of sections, opened once a call, and the scale that they are taken at."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

from sthisto._data._fit_record import Fit
from sthisto._data._scale import factor_of, factors_of, resolve_scale
from sthisto._data._section import SectionData, SectionImage, spatial_entries
from sthisto._data._store import COORDINATES
from sthisto._messages import listed, warn
from sthisto.images import Image, check_scale, check_tissue, is_blank, open_image

IMAGES = ("fullres", "hires", "lowres")  # names in uns["spatial"], the sharpest first
ELEMENT = "sdata:"  # prefix of the path of an image that is an element of a SpatialData
VISIUM_SPOT = 0.55  # diameter of a spot in pitches: 55 um spots every 100 um, the commonest array
FEW = 10  # spots, too few to decide whether they are on tissue
THUMBNAIL = 2000  # px, the longer side of the image that is kept for drawing
FACTOR_ROUNDING = 0.002  # of a scale factor, as an image has whole pixels
logger = logging.getLogger("sthisto")


def open_section_image(
    adata: AnnData,
    section: SectionData,
    image: Any = None,
    *,
    mpp: float | None = None,
    pitch_um: float | None = None,
) -> SectionImage:
    """Open the image that was given, else the sharpest in ``uns["spatial"]``, and check it against the spots."""
    opened, path = _find(adata, section.name, image)
    check_scale(opened, section.xy)
    mpp = resolve_scale(adata, section, opened.mpp, mpp=mpp, pitch_um=pitch_um)
    registered = opened.source.startswith(ELEMENT)  # by the transformations of a SpatialData
    doubt = "" if registered or len(section) < FEW else check_tissue(opened, section.xy[section.in_tissue], mpp)
    if doubt:
        warn(f"section {section.name!r}: {doubt}")
    return SectionImage(opened, mpp, path)


def open_unchecked(adata: AnnData, name: str, image: Any = None) -> tuple[Image, str]:
    """Open a section's image, and give its path, without comparing it with the spots."""
    return _find(adata, name, image)


def open_image_anywhere(
    adata: AnnData, section: SectionData, image: Any = None, *, mpp: float | None = None, pitch_um: float | None = None
) -> SectionImage:
    """Open a section's image at its scale; a blank image, and spots outside of the image, pass."""
    opened, path = _find(adata, section.name, image, refuse=False)
    return SectionImage(opened, resolve_scale(adata, section, opened.mpp, mpp=mpp, pitch_um=pitch_um), path)


def open_feature_image(adata: AnnData, section: SectionData, image: Any = None) -> SectionImage:
    """Open the image that the section's features were taken from, or the one given, at the features' scale."""
    metadata = section.metadata
    if metadata is None:
        return open_section_image(adata, section, image)
    return _reopened(adata, section, metadata.image, metadata.mpp, image)


def open_fit_image(adata: AnnData, section: SectionData, fit: Fit, image: Any = None) -> SectionImage:
    """Open the image that the section was fitted on, or that of one that was not fitted."""
    if section.model_key not in fit.sections:
        return open_feature_image(adata, section, image)
    at = list(fit.sections).index(section.model_key)
    return _reopened(adata, section, str(fit.image_paths[at]), float(fit.image_mpp[at]), image)


def _reopened(adata: AnnData, section: SectionData, path: str, mpp: float, image: Any) -> SectionImage:
    """Open an image of known path and scale again, or another one in its place."""
    if image is None:
        opened = _recorded(adata, section.name, path)
    else:
        opened, path = _find(adata, section.name, image)
    check_scale(opened, section.xy)
    return SectionImage(opened, mpp, path)


def small_image(adata: AnnData, section: SectionData, opened: SectionImage) -> dict[str, dict[str, Any]]:
    """Give what ``uns["spatial"]`` lacks for scanpy and squidpy to draw the section: nothing where it has hires."""
    stored, factors = _stored_images(adata, section.name), factors_of(adata, section.name)
    if "hires" in stored or opened.image.source.startswith(ELEMENT):  # an element is drawn from where it is
        return {}
    given = factor_of(factors, "tissue_hires_scalef")
    side = THUMBNAIL if given is None else max(1, round(max(opened.image.shape) * given))
    if side > 2 * THUMBNAIL:  # a factor that was given stays as it is, so there is no small image for it
        return {}
    pixels, factor = opened.image.thumbnail(side)
    added = {"tissue_hires_scalef": factor} if given is None else {}
    if factor_of(factors, "spot_diameter_fullres") is None and np.isfinite(section.pitch):
        added["spot_diameter_fullres"] = VISIUM_SPOT * section.pitch
    fits = given is None or abs(factor / given - 1) < FACTOR_ROUNDING
    return {"images": {"hires": pixels} if fits else {}, "scalefactors": added}


def spot_diameter(adata: AnnData, section: SectionData) -> float:
    """Diameter of the spots in pixels by the scale factors, else that of Visium's: 55 um of 100."""
    return factor_of(factors_of(adata, section.name), "spot_diameter_fullres") or VISIUM_SPOT * section.pitch


def stored_image(adata: AnnData, name: str) -> tuple[Image, str] | None:
    """The sharpest image of a section in ``uns["spatial"]`` and its key; None where there is none."""
    stored = _stored_images(adata, name)
    key = _sharpest(stored, name) if stored else None
    return None if key is None else (_stored(adata, name, key), key)


def write_images(adata: AnnData, images: Mapping[str, Mapping[str, Any]]) -> None:
    """Put small images with their scale factors into ``uns["spatial"]``, next to what is there."""
    spatial = dict(adata.uns.get(COORDINATES, {}))
    for name, parts in images.items():
        if "/" in name and parts:
            warn(
                f"section {name!r}: a name with '/' would nest in files, so uns['spatial'] gets no image of it. "
                "Rename the section if it is to be drawn with its image."
            )
            continue
        stored = spatial.get(name, {})
        spatial[name] = {**stored, **{part: {**stored.get(part, {}), **new} for part, new in parts.items()}}
    if spatial:
        adata.uns[COORDINATES] = spatial


def _find(adata: AnnData, name: str, image: Any, *, refuse: bool = True) -> tuple[Image, str]:
    """Open a section's image, and give the path to find it again; ``refuse`` blank ones."""
    if isinstance(image, Mapping):
        by_name = {str(section): each for section, each in image.items()}
        if name not in by_name:
            raise KeyError(f"image= has no entry for section {name!r} (found: {listed(by_name)}).")
        image = by_name[name]
    image = _source_path(adata, name) if image is None else image
    stored = _stored_images(adata, name)
    if image is None:
        key = _sharpest(stored, name)
        if key is None:
            raise KeyError(
                f"no image of section {name!r} in adata.uns['spatial'] (sections: {listed(spatial_entries(adata))}; "
                f"images of this one: {listed(stored)}). Pass image= with the H&E image that obsm['spatial'] refers to."
            )
        return _stored(adata, name, key), f"uns:{key}"
    if isinstance(image, str) and (image in stored or image in IMAGES):
        return _stored(adata, name, image), f"uns:{image}"
    opened = open_image(image)
    if refuse:
        refuse_blank(opened, f"the image of section {name!r}")
    named = isinstance(image, str | Path) or opened.source.startswith(ELEMENT)
    return opened, opened.source if named else ""


def _recorded(adata: AnnData, name: str, path: str) -> Image:
    """Open the image of a record."""
    if not path:
        raise KeyError(
            f"the features of section {name!r} were taken from an array, which is not kept: pass it again as "
            "image=, or pass features= for the points."
        )
    if path.startswith(ELEMENT):
        raise KeyError(
            f"the features of section {name!r} were taken from the image {path.removeprefix(ELEMENT)!r} of a "
            "SpatialData: pass that and not its table, or the image as image=."
        )
    gone = f"the features of section {name!r} were taken from {path!r}, which is not there: pass it as image=."
    try:
        return _find(adata, name, path.removeprefix("uns:"))[0]
    except KeyError as error:
        raise KeyError(f"{gone} {error.args[0]}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{gone} {error} Relative paths count from {Path.cwd()}.") from error


def _stored_images(adata: AnnData, name: str) -> dict[str, Any]:
    """Images of a section in ``uns``, without empty ones."""
    images = spatial_entries(adata).get(name, {}).get("images")
    images = images if isinstance(images, Mapping) else {}
    return {str(key): each for key, each in images.items() if each is not None and np.size(each)}


def _stored(adata: AnnData, name: str, key: str) -> Image:
    """Open an image of ``uns`` at its scale."""
    stored = _stored_images(adata, name)
    if key not in stored:
        raise KeyError(f"no image {key!r} in uns['spatial'][{name!r}]['images'] (found: {listed(stored)}).")
    factor = factor_of(factors_of(adata, name), f"tissue_{key}_scalef", section=name)
    if factor is None and key == "fullres":
        factor = 1.0
    if factor is None:
        raise KeyError(
            f"uns['spatial'][{name!r}] holds the image {key!r} but no scalefactors['tissue_{key}_scalef'], so its "
            "scale to the spots is unknown. Add it, or pass image= with the full-resolution image."
        )
    return open_image(np.asarray(stored[key]), scale=factor)


def _sharpest(stored: Mapping[str, Any], name: str) -> str | None:
    """Name the sharpest image that shows anything: the usual names first, then the largest of others."""
    others = sorted((key for key in stored if key not in IMAGES), key=lambda key: -np.size(stored[key]))
    for key in (*(key for key in IMAGES if key in stored), *others):
        if not is_blank(open_image(np.asarray(stored[key]))):
            return key
        warn(f"the {key!r} image of section {name!r} is blank and was passed over.")
    return None


def refuse_blank(image: Image, what: str) -> None:
    """Refuse an image that shows nothing."""
    if is_blank(image):
        raise ValueError(f"{what} is blank: the same color throughout. Is it the stained image of this section?")


def _source_path(adata: AnnData, name: str) -> str | None:
    """Path of the full-resolution file that a reader noted, as ``squidpy.read.visium`` does, where it exists."""
    metadata = spatial_entries(adata).get(name, {}).get("metadata", {})
    path = metadata.get("source_image_path") if isinstance(metadata, Mapping) else None
    if path and not Path(path).exists():
        logger.info("section %r: its full-resolution image %s does not exist; taking a smaller one", name, path)
        return None
    return str(path) if path else None
