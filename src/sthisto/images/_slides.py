"""Slides: TIFF of every kind by tifffile, formats of scanners by OpenSlide (the extra ``slides``), read in parts."""

import logging
import re
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from sthisto.images._image import channels_first

logger = logging.getLogger("sthisto")

CONVERT = "convert the slide to a pyramidal TIFF or OME-Zarr (bioformats2raw, vips)"
EXTRA = "install the extra for slides: pip install 'sthisto[slides]'"
FORMATS = {".mrxs", ".vms", ".vmu", ".ndpi", ".scn", ".bif", ".svslide", ".dcm", ".czi", ".vsi"}
_MASK = re.compile(r"mask|label|annotation|segment", re.IGNORECASE)  # names of images that are no slides
_UNITS = {"nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}  # both signs for micro occur
_TAG_UNITS = {2: 25400.0, 3: 1e4, "um": 1.0, "µm": 1.0, "\\u00B5m": 1.0, "micron": 1.0}  # inch, cm; words are ImageJ's
_TAG_RANGE = (0.05, 20.0)  # micrometers per pixel that tags of a slide can mean; 72 and 96 dpi would be 353 and 265


def open_tiff(path: Path, max_pixels: int) -> tuple[list[Any], dict[str, Any]]:
    """Levels of the slide in a TIFF, finest first, and what the file states: mpp of the first, white and alpha."""
    import tifffile  # noqa: PLC0415

    with ExitStack() as stack:
        try:
            tiff = stack.enter_context(tifffile.TiffFile(path))
            series = _slide_series(path, tiff.series)
        except (ArithmeticError, LookupError, TypeError, tifffile.TiffFileError) as error:  # raised by broken headers
            msg = f"{path} could not be read as a TIFF: {error}. Copy the file again, or {CONVERT}."
            raise ValueError(msg) from error
        page = series.keyframe
        if page.compression == tifffile.COMPRESSION.APERIO_JP2000_YCBC:  # tifffile decodes wrong colors
            return open_slide(path)
        _refuse_unreadable(path, series, max_pixels)
        described = _ome_pixels(tiff, page)
        stated = {"mpp": _mpp(tiff, page, described), "white": _white(page, described)}
        if not _is_plain(page):
            return [_read_whole(path)], {"mpp": stated["mpp"]}
        if all(level.keyframe.is_memmappable and level.dataoffset is not None for level in series.levels):
            index = tiff.series.index(series)
            mapped = (tifffile.memmap(path, series=index, level=k, mode="r") for k in range(len(series.levels)))
            levels: list[Any] = [_Plain(path, level.offset, level.dtype, level.shape) for level in mapped]
        else:
            levels, store = _lazy(series)
            weakref.finalize(store, stack.pop_all().close)
    return levels, stated | {"alpha": _alpha(path, page, levels[-1])}


def _slide_series(path: Path, series: list[Any]) -> Any:
    """Choose the slide among the images of a file: the largest, but no mask where there is an image in color."""
    images = [image for image in series if not _MASK.search(image.name)]
    largest = max(series, key=_n_pixels)
    if not images:
        raise ValueError(
            f"{path}: its only image is {largest.name!r}, by its name no slide. Pass its pixels as an array."
        )
    color = [image for image in images if _n_samples(image) >= 3 and 4 * _n_pixels(image) >= _n_pixels(largest) / 25]
    chosen = max(color or images, key=_n_pixels)
    if chosen is not largest:
        logger.warning("%s: %r is taken for the slide, not the larger %r", path, chosen.name, largest.name)
    return chosen


def _n_pixels(series: Any) -> int:
    return prod(size for axis, size in zip(series.axes, series.shape, strict=False) if axis in "YX")


def _n_samples(series: Any) -> int:
    return prod(size for axis, size in zip(series.axes, series.shape, strict=False) if axis in "SC")


@dataclass(frozen=True)
class _Plain:
    """Uncompressed pixels of a file, mapped while a part of them is copied: a lasting map would fill the memory."""

    path: Path
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __getitem__(self, part: Any) -> NDArray[Any]:
        whole = np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
        return np.array(whole[part])


def _refuse_unreadable(path: Path, series: Any, max_pixels: int) -> None:
    """Refuse early what would otherwise fail in the middle of a run or go unnoticed."""
    if not {"Y", "X"} <= set(series.axes) <= set("YXSCQ"):
        found = f"axes {series.axes} of shape {series.shape}"
        raise ValueError(f"{path}: one plane is wanted; found {found}. Pass one plane as an array.")
    size = series.keyframe.parent.filehandle.size
    truncated = any(level.dataoffset is not None and level.dataoffset + level.nbytes > size for level in series.levels)
    for page in (page for level in series.levels for page in level.pages if page is not None):
        parts = prod(page.keyframe.chunked)
        if len(page.dataoffsets) < parts and not page.keyframe.is_contiguous:
            raise ValueError(
                f"{path} is damaged: {page.shape} pixels have {parts} tiles or strips, and the file lists "
                f"{len(page.dataoffsets)}. Copy or export the file again."
            )
        ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False)]
        truncated |= max(ends, default=np.inf) > size
    if truncated:
        raise ValueError(f"{path} is truncated: it ends before its pixels do. Copy or export the file again.")
    page = series.keyframe
    if not _is_plain(page):
        refuse_large(path, page.imagelength, page.imagewidth, max_pixels)
    elif not page.is_contiguous:
        rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
        refuse_large(path, min(rows, page.imagelength), columns, max_pixels)


def refuse_large(path: Path, height: int, width: int, max_pixels: int) -> None:
    """ValueError where more pixels than allowed have to be decoded at once."""
    if height * width > max_pixels:
        raise ValueError(
            f"{path} has {width} x {height} pixels that have to be decoded at once, {3 * height * width / 1e9:.1f} GB, "
            f"and max_pixels is {max_pixels}. Save it as a tiled TIFF, or open it with open_image(..., max_pixels=...)."
        )


def _is_plain(page: Any) -> bool:
    """Whether the decoded numbers are gray or RGB; palettes, CMYK, white-is-zero and similar need Pillow."""
    from tifffile import COMPRESSION, PHOTOMETRIC  # noqa: PLC0415

    if page.photometric == PHOTOMETRIC.YCBCR:  # decoders of these convert it to RGB
        return page.compression in {COMPRESSION.JPEG, COMPRESSION.OJPEG, COMPRESSION.APERIO_JP2000_RGB}
    return page.photometric in {PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB}


def _read_whole(path: Path) -> Any:
    from PIL.TiffImagePlugin import TiffImageFile  # noqa: PLC0415

    try:
        with TiffImageFile(path) as whole:
            return np.asarray(whole.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: this kind of TIFF could not be read: {error}. Save it as plain RGB.") from error


def _lazy(series: Any) -> tuple[list[Any], Any]:
    """Open a zarr array for each level, and the store that all of them keep open."""
    import zarr  # noqa: PLC0415

    # Slides omit tiles of background: white, not black.
    white = np.iinfo(series.dtype).max if series.dtype.kind == "u" else 1
    store = series.aszarr(multiscales=True, fillvalue=white)
    group = zarr.open_group(store, mode="r")
    return [group[str(k)] for k in range(len(series.levels))], store


def _white(page: Any, described: Mapping[str, str]) -> int | None:
    """White level that a file states for integers; ``None`` where it states none or that of the type."""
    if page.dtype.kind != "u":
        return None
    bits = min(page.bitspersample, int(_positive(described.get("SignificantBits")) or page.bitspersample))
    for tag in ("SMaxSampleValue", "MaxSampleValue"):  # at times the highest value found, hence the bits that it needs
        highest = np.max(page.tags[tag].value) if tag in page.tags else 0
        if highest > 0:
            bits = min(bits, max(8, int(highest).bit_length()))
    return None if bits == 8 * page.dtype.itemsize else 2**bits - 1


def _alpha(path: Path, page: Any, coarsest: Any) -> str:
    """Meaning of the last of 2 or 4 samples, by the file or, where that is silent, by the values."""
    if page.samplesperpixel not in {2, 4}:
        return "straight"
    stated = {1: "premultiplied", 2: "straight"}.get(int(page.extrasamples[-1]) if page.extrasamples else 0)
    if stated:
        return stated
    part = coarsest[-1, :2048, :2048] if channels_first(coarsest.shape) else coarsest[:2048, :2048, -1]
    full = np.iinfo(page.dtype).max if page.dtype.kind in "iu" else 1
    alpha = "straight" if set(np.unique(part).tolist()) in ({full}, {0, full}) else "none"
    meaning = "taken for alpha, as it is all or nothing" if alpha == "straight" else "not used, as it is no alpha"
    logger.warning("%s does not state what its last sample is: it is %s", path, meaning)
    return alpha


def _mpp(tiff: Any, page: Any, described: Mapping[str, str]) -> float | None:
    """Micrometers per pixel by OME, else Aperio, else the resolution tags."""
    size, unit = _positive(described.get("PhysicalSizeX")), _UNITS.get(described.get("PhysicalSizeXUnit", "µm"))
    if size and unit:
        return size * unit
    aperio = re.search(r"\bMPP\s*=\s*(\d*[.,]?\d+)", page.description)
    if aperio and _positive(aperio[1]):
        return _positive(aperio[1])
    unit = _TAG_UNITS.get((tiff.imagej_metadata or {}).get("unit", page.resolutionunit))
    mpp = unit / page.resolution[0] if unit and page.resolution[0] else 0.0
    return mpp if _TAG_RANGE[0] <= mpp <= _TAG_RANGE[1] else None


def _positive(text: str | None) -> float | None:
    """Positive number of a text, with point or comma; ``None`` for any other."""
    try:
        value = float((text or "").replace(",", "."))
    except ValueError:
        return None
    return value if np.isfinite(value) and value > 0 else None


def _ome_pixels(tiff: Any, page: Any) -> Mapping[str, str]:
    """Find the attributes that an OME-TIFF states for the image; none where the description is damaged."""
    if not tiff.is_ome:
        return {}
    try:
        images = ElementTree.fromstring(tiff.ome_metadata).findall(".//{*}Pixels")
    except ElementTree.ParseError as error:
        logger.warning("%s: the OME description is damaged (%s), its pixel size is lost.", tiff.filename, error)
        return {}
    size = (str(page.imagewidth), str(page.imagelength))
    return next((image.attrib for image in images if (image.get("SizeX"), image.get("SizeY")) == size), {})


# --- OpenSlide --------------------------------------------------------------------------------------------------------


class SlideLevel:
    """A level of a slide, sliced as an array (h, w, 4): RGB and alpha, which is 0 where nothing was scanned."""

    dtype = np.dtype(np.uint8)

    def __init__(self, slide: Any, level: int) -> None:
        width, height = slide.level_dimensions[level]
        tile = (slide.properties.get(f"openslide.level[{level}].tile-{side}", 512) for side in ("height", "width"))
        self.slide, self.level = slide, level
        self.shape = (height, width, 4)
        self.chunks = (*map(int, tile), 4)

    def __getitem__(self, part: tuple[slice, slice]) -> NDArray[np.uint8]:
        (top, bottom, _), (left, right, _) = (
            axis.indices(size) for axis, size in zip(part, self.shape[:2], strict=True)
        )
        # A region begins at a pixel of the finest level, and its size is in pixels of this one.
        corner = (round(start * self.slide.level_downsamples[self.level]) for start in (left, top))
        return np.asarray(self.slide.read_region(tuple(corner), self.level, (right - left, bottom - top)))


def open_slide(path: Path) -> tuple[list[Any], dict[str, Any]]:
    """Levels of a slide, finest first, and what the file states: micrometers per pixel of the first.

    Raises
    ------
    ImportError
        OpenSlide is not installed.
    ValueError
        OpenSlide does not read the file.
    """
    try:
        openslide = import_module("openslide")
    except ImportError as error:
        raise ImportError(f"{path}: this format of slides needs OpenSlide, which is missing: {EXTRA}.") from error
    try:
        slide = openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise ValueError(f"{path}: OpenSlide does not read this slide ({error}); {CONVERT}.") from error
    mpp = slide.properties.get("openslide.mpp-x")
    return [SlideLevel(slide, level) for level in range(slide.level_count)], {"mpp": float(mpp) if mpp else None}
