"""The record of an image, and the conversion of its pixels to RGB."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

MIN_BLOCK = 512  # pixels; smaller strips and tiles are read several at a time, as each costs a call


@dataclass(frozen=True, eq=False)
class Image:
    """An image of tissue: one or several levels, with their scale to full resolution and to micrometers.

    Coordinates of one image used on another are a common mistake, so the image carries its scale. Pixels are read on
    demand. :func:`open_image` makes one from files and arrays.

    Parameters
    ----------
    levels
        Finest first; each (h, w), (h, w, 1 to 4) or (1 or 3 or 4, h, w), of anything that can be sliced: numpy, zarr,
        dask.
    scales
        Pixels of each level per full-resolution pixel: level pixel = scale * full-resolution pixel. "Full resolution"
        is the pixel grid that ``obsm["spatial"]`` refers to, whether stored here or not.
    mpp
        Micrometers per full-resolution pixel, ``None`` where unknown.
    source
        The path as it was given, empty for arrays.
    white
        Value of white in integer pixels; ``None`` for the largest of their type.
    alpha
        Meaning of the last of 2 or 4 samples: ``"straight"`` or ``"premultiplied"`` alpha, or ``"none"``.

    Raises
    ------
    ValueError
        Levels that are no images or not finest first; scales that are not positive or not one per level.

    Examples
    --------
    >>> import numpy as np
    >>> hires = Image((np.zeros((300, 200, 3), np.uint8),), (0.1,), mpp=None, source="")
    >>> hires.shape
    (3000.0, 2000.0)
    >>> hires.read(0, -1, 1, 0, 1)[:, 0, 0]  # white above the border
    array([255,   0], dtype=uint8)
    """

    levels: tuple[Any, ...] = field(repr=False)
    scales: tuple[float, ...]
    mpp: float | None
    source: str
    white: int | None = None
    alpha: Literal["straight", "premultiplied", "none"] = "straight"

    def __post_init__(self) -> None:
        sizes = [level_size(level) for level in self.levels]
        if not sizes or len(sizes) != len(self.scales):
            raise ValueError(f"Every level needs one scale; found {len(sizes)} levels, {len(self.scales)} scales.")
        if sizes != sorted(sizes, reverse=True):
            raise ValueError(f"Levels have to come finest first; found (height, width) {sizes}.")
        for name, values in (("scale", self.scales), ("mpp", () if self.mpp is None else (self.mpp,))):
            if not all(np.isfinite(value) and value > 0 for value in values):
                raise ValueError(f"{name} has to be a positive number; found {values}.")

    @property
    def shape(self) -> tuple[float, float]:
        """Height and width in full-resolution pixels."""
        height, width = level_size(self.levels[0])
        return height / self.scales[0], width / self.scales[0]

    def read(self, level: int, y0: int, y1: int, x0: int, x1: int) -> NDArray[np.uint8]:
        """Pixels of one level as (y1 - y0, x1 - x0, 3) uint8 RGB, white beyond the border.

        Raises
        ------
        OSError
            The stored pixels are damaged.
        ValueError
            Floats outside [0, 1].
        """
        height, width = level_size(self.levels[level])
        top, bottom, left, right = max(y0, 0), min(y1, height), max(x0, 0), min(x1, width)
        pixels = np.full((y1 - y0, x1 - x0, 3), 255, np.uint8)
        if top < bottom and left < right:
            part = self.stored(level, top, bottom, left, right)
            pixels[top - y0 : bottom - y0, left - x0 : right - x0] = self._rgb(part)
        return pixels

    def thumbnail(self, max_side: int = 2000) -> tuple[NDArray[np.uint8], float]:
        """Make a small antialiased copy; memory stays at a few bands of the image.

        Parameters
        ----------
        max_side
            The longer side in pixels; less where the finest level is smaller.

        Returns
        -------
        The copy, (h, w, 3) uint8 RGB, and its pixels per full-resolution pixel.

        Raises
        ------
        OSError, ValueError
            As :meth:`read`; ``max_side`` is below 1.

        Examples
        --------
        >>> import numpy as np
        >>> small, scale = Image((np.zeros((300, 200)),), (1.0,), None, "").thumbnail(30)
        >>> small.shape, scale
        ((30, 20, 3), 0.1)
        """
        from PIL import Image as Pillow  # noqa: PLC0415

        if max_side < 1:
            raise ValueError(f"max_side is the longer side of the copy in pixels, at least 1; found {max_side}.")
        longest = max(level_size(self.levels[0]))
        target = min(max_side, longest)
        level = max(k for k, stored in enumerate(self.levels) if k == 0 or max(level_size(stored)) >= target)
        height, width = (max(1, round(side * target / longest)) for side in level_size(self.levels[0]))
        # First in width, band by band, then in height: the order of Pillow, hence the same bits.
        narrow = np.empty((level_size(self.levels[level])[0], width, 3), np.uint8)

        def shrink(y: int, band: NDArray[np.uint8]) -> None:
            narrow[y : y + len(band)] = resized(Pillow.fromarray(band), len(band), width)

        def stripe(x: int) -> NDArray[np.uint8]:
            part = np.ascontiguousarray(narrow[:, x : x + 64])
            return resized(Pillow.fromarray(part), height, part.shape[1])

        bands = self._bands(level)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow releases the interpreter
            while pair := list(islice(bands, 2)):  # memory holds these
                list(pool.map(shrink, *zip(*pair, strict=True)))
            stripes = list(pool.map(stripe, range(0, width, 64)))
        return np.concatenate(stripes, axis=1), target / longest * self.scales[0]

    @cached_property
    def overview(self) -> tuple[NDArray[np.uint8], float]:
        """Copy of at most 500 pixels and its pixels per full-resolution pixel, made once, for cheap checks."""
        finest = self.levels[0]
        step = max(level_size(finest)) // 2000
        if len(self.levels) > 1 or step < 2 or getattr(finest, "chunks", None) is not None:
            return self.thumbnail(500)
        part = finest[:, ::step, ::step] if channels_first(finest.shape) else finest[::step, ::step]
        return replace(self, levels=(part,), scales=(self.scales[0] / step,)).thumbnail(500)

    def stored(self, level: int, *box: int) -> NDArray[Any]:
        """Pixels of a box inside a level as stored, (h, w) or (h, w, c)."""
        stored = self.levels[level]
        top, bottom, left, right = box
        try:
            if channels_first(stored.shape):
                return np.moveaxis(np.asarray(stored[:, top:bottom, left:right]), 0, -1)
            return np.asarray(stored[top:bottom, left:right])
        except (LookupError, RuntimeError) as error:  # raised by decoders and incomplete indices
            where = f"rows {top} to {bottom}, columns {left} to {right}, level {level} of {self.source or 'the image'}"
            raise OSError(f"Damaged pixels at {where}: {error}. Copy or export the file again.") from error

    def _rgb(self, pixels: NDArray[Any]) -> NDArray[np.uint8]:
        """(h, w) or (h, w, 1 to 4) of any accepted type as uint8 that broadcasts to (h, w, 3)."""
        eight = _eight_bit(pixels if pixels.ndim == 3 else pixels[:, :, None], self.white)
        if eight.shape[2] in {1, 3}:
            return eight
        color, alpha = eight[:, :, :-1], eight[:, :, -1:].astype(np.uint16)  # 255 * 255 + 127 fits
        if self.alpha == "none":
            return color
        over_white = (255 - alpha) + (color if self.alpha == "premultiplied" else (color * alpha + 127) // 255)
        return np.asarray(np.minimum(over_white, 255), np.uint8)

    def _bands(self, level: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Bands of whole chunks of a level from top to bottom, each with its first row."""
        for y0, y1 in pairwise(block_edges(self.levels[level])[0]):
            yield y0, self.read(level, y0, y1, 0, level_size(self.levels[level])[1])


def channels_first(shape: tuple[int, ...]) -> bool:
    """Whether a shape is (c, h, w) and not (h, w, c)."""
    return len(shape) == 3 and shape[2] not in {1, 2, 3, 4} and shape[0] in {1, 3, 4}


def level_size(stored: Any) -> tuple[int, int]:
    """Height and width of a level, which is refused where it is no image."""
    shape, dtype = tuple(stored.shape), np.dtype(stored.dtype).newbyteorder("=")
    if dtype not in (bool, np.uint8, np.uint16) and dtype.kind != "f":
        msg = f"Pixels have to be boolean, uint8, uint16 or float in [0, 1]; found {dtype}. Convert them first."
        raise ValueError(msg)
    first = channels_first(shape)
    if 0 in shape or not (len(shape) == 2 or first or (len(shape) == 3 and shape[2] in {1, 2, 3, 4})):
        msg = f"An image is (h, w), (h, w, 1 to 4) or (1 or 3 or 4, h, w); found an array of shape {shape}."
        raise ValueError(msg)
    return (shape[1], shape[2]) if first else (shape[0], shape[1])


def block_edges(stored: Any) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Borders along y and x of blocks of whole chunks, where possible at least ``MIN_BLOCK`` pixels wide."""
    chunks = getattr(stored, "chunks", None) or (1,) * len(stored.shape)  # without chunks it can be cut anywhere
    first = int(channels_first(stored.shape))
    height, width = level_size(stored)
    return _grouped(chunks[first], height), _grouped(chunks[first + 1], width)


def _grouped(chunks: int | tuple[int, ...], side: int) -> NDArray[np.intp]:
    """Borders of chunks (one size as in zarr, every size as in dask), thinned to steps of ``MIN_BLOCK`` or more."""
    if not isinstance(chunks, tuple):
        return np.append(np.arange(0, side, chunks * -(-MIN_BLOCK // chunks)), side)
    borders = [0]
    for end in np.cumsum(chunks):
        if end - borders[-1] >= MIN_BLOCK or end >= side:
            borders.append(min(int(end), side))
    return np.array(borders, np.intp)


def resized(
    source: "PillowImage", height: int, width: int, box: tuple[float, float, float, float] | None = None
) -> NDArray[np.uint8]:
    """Resample to (h, w, 3) by a triangle filter: antialiased where it shrinks, bilinear where it grows.

    ``box`` is (left, top, right, bottom) in pixels of the input and may cut through them; ``None`` is all of it.
    """
    from PIL import Image as Pillow  # noqa: PLC0415

    return np.asarray(source.resize((width, height), Pillow.Resampling.BILINEAR, box))


def _eight_bit(pixels: NDArray[Any], white: int | None) -> NDArray[np.uint8]:
    kind, full = pixels.dtype.kind, white or (255 if pixels.dtype.itemsize == 1 else 65535)
    if kind == "u" and full == 255 and pixels.dtype == np.uint8:
        return pixels
    if kind == "u" and full == 65535:
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if kind == "u":
        return np.asarray(np.rint(np.minimum(pixels, full) * np.float32(255 / full)), np.uint8)
    if kind == "f" and not (pixels.min() >= 0 and pixels.max() <= 1):  # NaN fails too
        low, high = pixels.min(), pixels.max()
        raise ValueError(f"Float pixels have to be in [0, 1]; found {low} to {high}. Divide by the white level first.")
    return np.rint(pixels * np.float32(255)).astype(np.uint8)
