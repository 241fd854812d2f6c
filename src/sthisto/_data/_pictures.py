"""Pictures of sections, their scale, and the features taken from them."""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from sthisto._data._records import UNS, Description, Place, listed, write
from sthisto.images import Image, open_image

PITCH_UM = {"hexagonal": 100.0, "square": 200.0}  # Visium; the first Spatial Transcriptomics arrays
PICTURES = ("fullres", "hires", "lowres")  # names in uns["spatial"], the sharpest first
ELEMENT = "sdata:"  # what the name of a picture starts with that is an element of a SpatialData
logger = logging.getLogger("sthisto")


def find_image(adata: AnnData, library: str, image: Any, mpp: float | None = None) -> tuple[Image, str]:
    """Open a section's picture: what was given, or what ``uns["spatial"]`` holds; and a name to find it again."""
    if isinstance(image, Mapping):
        by_name = {str(name): picture for name, picture in image.items()}
        if library not in by_name:
            raise KeyError(f"image= has no entry for section {library!r} (found: {listed(by_name)}).")
        image = by_name[library]
    image = _source_image(adata, library) if image is None else image
    kept, factors = entry_of(adata, library).get("images", {}), entry_of(adata, library).get("scalefactors", {})
    told = factors.get("microns_per_pixel")  # Visium HD
    if image is None or (isinstance(image, str) and (image in kept or image in PICTURES)):
        name = image or _best_image(adata, kept, library)
        if name not in kept:
            raise KeyError(f"no image {name!r} in uns['spatial'][{library!r}]['images'] (found: {listed(kept)}).")
        factor = factors.get(f"tissue_{name}_scalef")
        if factor is None:
            raise KeyError(
                f"uns['spatial'][{library!r}] holds the image {name!r} but no scalefactors['tissue_{name}_scalef'], so "
                "its scale to the spots is unknown. Add it, or pass image= with the full-resolution picture."
            )
        return open_image(np.asarray(kept[name]), scale=float(factor), mpp=mpp or told), f"uns:{name}"
    opened = open_image(image, mpp=mpp)
    if opened.mpp is None and told:
        opened = replace(opened, mpp=float(told))
    named = isinstance(image, str | Path) or opened.source.startswith(ELEMENT)
    return opened, opened.source if named else ""


def recorded_image(adata: AnnData, library: str, path: str) -> Image:
    """Open the picture that a section's features were taken from."""
    if not path:
        raise KeyError(
            f"the features of section {library!r} were taken from an array, which is not kept: pass it again as "
            "image=, or pass features= for the points."
        )
    if path.startswith(ELEMENT):
        raise KeyError(
            f"the features of section {library!r} were taken from the image {path.removeprefix(ELEMENT)!r} of a "
            "SpatialData: pass that and not its table, or the picture as image=."
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
            "(micrometres between neighboring spots)."
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


def entry_of(adata: AnnData, library: str) -> Mapping[str, Any]:
    """Give the section's own entry of ``uns["spatial"]``, empty where there is none."""
    entry: Mapping[str, Any] = adata.uns.get("spatial", {}).get(library, {})
    return entry


def _source_image(adata: AnnData, library: str) -> str | None:
    """Path of the full-resolution file that a reader noted, as ``squidpy.read.visium`` does, where it is there."""
    path = entry_of(adata, library).get("metadata", {}).get("source_image_path")
    if path and not Path(path).exists():
        logger.info("section %r: its full-resolution image %s is not there; taking a smaller one", library, path)
        return None
    return str(path) if path else None


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
        f"no image of section {library!r} in adata.uns['spatial'] (sections: {listed(adata.uns.get('spatial', {}))}; "
        f"images of this one: {listed(images)}). Pass image= with the H&E picture that obsm['spatial'] refers to."
    )


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
    had = entry_of(adata, library)
    if "hires" in had.get("images", {}) or image.source.startswith(ELEMENT):  # an element is drawn from where it is
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
        raise KeyError(f"no features were extracted for section {library!r} (there are: {listed(libraries)}).")
    at = libraries.index(library) if library in libraries else 0
    window = float(record["window_um"]) if record.get("dense", False) else None
    return Description(record, float(record["patch_um"]), float(record["mpp"][at]), str(record["image"][at]), window)
