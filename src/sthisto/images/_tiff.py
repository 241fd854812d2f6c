"""TIFF of every kind: levels that are read in parts, and the file's scale."""

import logging
import re
import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger("sthisto")

CONVERT = (
    "convert the slide to a pyramidal TIFF or OME-Zarr (vips, bioformats2raw), or read one of its levels with "
    "tiffslide or openslide and pass that as an array"
)
_UNITS = {"nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}  # both signs for micro occur
_TAG_UNITS = {2: 25400.0, 3: 1e4, "um": 1.0, "µm": 1.0, "\\u00B5m": 1.0, "micron": 1.0}  # inch, cm; words are ImageJ's
_TAG_RANGE = (0.05, 20.0)  # micrometers per pixel that tags of a slide can mean; 72 and 96 dpi would be 353 and 265


def open_tiff(path: Path) -> tuple[list[Any], float | None]:
    """Levels of the largest image in a TIFF, finest first, and micrometers per pixel of the first."""
    import tifffile  # noqa: PLC0415

    with ExitStack() as stack:
        try:
            tiff = stack.enter_context(tifffile.TiffFile(path))
            series = max(tiff.series, key=lambda series: prod(series.shape))
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # raised by broken headers
            msg = f"{path} could not be read as a TIFF: {error}. Copy the file again, or {CONVERT}."
            raise ValueError(msg) from error
        _refuse_unreadable(path, series)
        mpp = _mpp(tiff, series)
        if not _is_plain(series.keyframe):
            return [_read_whole(path)], mpp
        if all(level.keyframe.is_memmappable and level.dataoffset is not None for level in series.levels):
            index = tiff.series.index(series)
            mapped = (tifffile.memmap(path, series=index, level=k, mode="r") for k in range(len(series.levels)))
            return [_Plain(path, level.offset, level.dtype, level.shape) for level in mapped], mpp
        levels, store = _lazy(series)
        weakref.finalize(store, stack.pop_all().close)
    return levels, mpp


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


def _refuse_unreadable(path: Path, series: Any) -> None:
    """Refuse early what would otherwise fail in the middle of a run or go unnoticed."""
    from tifffile import COMPRESSION  # noqa: PLC0415

    if not {"Y", "X"} <= set(series.axes) <= set("YXSCQ"):
        found = f"axes {series.axes} of shape {series.shape}"
        raise ValueError(f"{path}: one plane is wanted; found {found}. Pass one plane as an array.")
    if series.keyframe.compression == COMPRESSION.APERIO_JP2000_YCBC:
        raise ValueError(f"{path}: Aperio's JPEG 2000 in YCbCr (33003) would come out in wrong colors; {CONVERT}.")
    for page in (page for level in series.levels for page in level.pages if page is not None):
        ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False)]
        if max(ends, default=np.inf) > page.parent.filehandle.size:
            raise ValueError(f"{path} is truncated: it ends before its pixels do. Copy or export the file again.")


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


def _mpp(tiff: Any, series: Any) -> float | None:
    """Micrometers per pixel by OME, else Aperio, else the resolution tags."""
    page = series.keyframe
    for pixels in _ome_pixels(tiff):
        size, unit = pixels.get("PhysicalSizeX"), _UNITS.get(pixels.get("PhysicalSizeXUnit", "µm"))
        if pixels.get("SizeX") == str(page.imagewidth) and size and unit:
            return float(size) * unit
    aperio = re.search(r"\bMPP\s*=\s*(\d*\.?\d+)", page.description)
    if aperio:
        return float(aperio[1])
    unit = _TAG_UNITS.get((tiff.imagej_metadata or {}).get("unit", page.resolutionunit))
    mpp = unit / page.resolution[0] if unit and page.resolution[0] else 0.0
    return mpp if _TAG_RANGE[0] <= mpp <= _TAG_RANGE[1] else None


def _ome_pixels(tiff: Any) -> list[ElementTree.Element]:
    """List the images that an OME-TIFF describes; none where the description is damaged, as the pixels may not be."""
    if not tiff.is_ome:
        return []
    try:
        return ElementTree.fromstring(tiff.ome_metadata).findall(".//{*}Pixels")
    except ElementTree.ParseError as error:
        logger.warning("%s: the OME description is damaged (%s), its pixel size is lost.", tiff.filename, error)
        return []
