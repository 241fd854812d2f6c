"""Slides in the formats of scanners, read lazily by OpenSlide (the optional extra ``slides``)."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONVERT = "convert the slide to a pyramidal TIFF or OME-Zarr (bioformats2raw, vips)"
EXTRA = "install the extra for slides: pip install 'sthisto[slides]'"
FORMATS = {".mrxs", ".vms", ".vmu", ".ndpi", ".scn", ".bif", ".svslide", ".dcm", ".czi", ".vsi"}


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
