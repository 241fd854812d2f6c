"""Square patches at any place and scale, cut so that each stored chunk is decoded once."""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sthisto.images._image import Image, block_edges, resized

Batch = tuple[NDArray[np.intp], NDArray[np.uint8]]  # rows (b,), patches (b, field, field, 3)
_IN_FLIGHT = 2**26  # bytes of cut squares that wait to be resampled: large squares go a few at a time


def sample_patches(image: Image, xy: ArrayLike, side: float, field: int) -> NDArray[np.uint8]:
    """Cut a square patch at every point, all of one size in the tissue and one size in pixels.

    Encoders want a fixed field of pixels at a fixed scale, points lie anywhere, and pictures come at any resolution:
    each patch is centred on its point to a fraction of a pixel, taken from the coarsest level that still has the
    detail, and resampled by a triangle filter: antialiased where it shrinks, bilinear where it grows. A patch changes
    continuously with its point, and neighbouring patches fit together without a seam.

    Parameters
    ----------
    image
        The picture.
    xy
        (n, 2) centres, full-resolution pixels, x then y; continuous, the centre of pixel i being i + 0.5.
    side
        Side of the square in full-resolution pixels; micrometres / ``image.mpp``.
    field
        Side of a patch in its own pixels.

    Returns
    -------
    Patches, (n, field, field, 3) uint8 RGB, in the order of ``xy``; white beyond the border. Where ``side`` at the
    level's scale equals ``field`` and the square lies on whole pixels, they are the stored pixels.

    Raises
    ------
    ValueError
        ``xy`` is not (n, 2) finite numbers; ``side`` or ``field`` is not positive; float pixels outside [0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> image = Image((np.arange(64, dtype=np.uint8).reshape(8, 8),), (1.0,), None, "")
    >>> sample_patches(image, [[2, 1], [0, 0]], side=2, field=2)[..., 0]
    array([[[  1,   2],
            [  9,  10]],
    <BLANKLINE>
           [[255, 255],
            [255,   0]]], dtype=uint8)
    """
    points = as_points(xy)
    patches = np.empty((len(points), field, field, 3), np.uint8)
    for rows, batch in patch_batches(image, points, side, field):
        patches[rows] = batch
    return patches


def patch_batches(image: Image, xy: ArrayLike, side: float, field: int, *, batch_size: int = 64) -> Iterator[Batch]:
    """Yield the patches of :func:`sample_patches` in batches, in the order in which the picture is stored.

    A stored chunk (a tile, or a strip as wide as the slide) costs far more to decode than a patch to cut. Points are
    visited from top to bottom, so that every chunk is decoded once and kept only while a later point needs it: memory
    holds a band of the slide, about ``side`` plus 1000 pixels high, and never all patches.

    Parameters
    ----------
    image, xy, side, field
        As in :func:`sample_patches`.
    batch_size
        Patches a batch; the last may be smaller.

    Yields
    ------
    rows, patches
        (b,) rows of ``xy``, each in exactly one batch, and (b, field, field, 3) uint8 RGB. Pictures in memory keep the
        order of ``xy``.

    Raises
    ------
    ValueError
        As :func:`sample_patches`, at the call and not at the first batch; ``batch_size`` is not positive.

    Examples
    --------
    >>> import numpy as np
    >>> image = Image((np.zeros((50, 50, 3), np.uint8),), (1.0,), None, "")
    >>> [rows.tolist() for rows, _ in patch_batches(image, [[9, 9], [40, 9], [9, 40]], 8, 4, batch_size=2)]
    [[0, 1], [2]]
    """
    xy = as_points(xy)
    for name, value in (("side", side), ("field", field), ("batch_size", batch_size)):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} has to be positive; found {value}.")
    level = max(k for k, scale in enumerate(image.scales) if k == 0 or scale * side >= field * (1 - 1e-6))
    scale = image.scales[level]
    corners = np.round(xy * scale - side * scale / 2, 6)  # whole pixels stay whole through the division by mpp
    boxes = np.hstack([corners, np.round(corners + side * scale, 6)])  # left, top, right, bottom in level pixels
    return _batches(image, level, boxes, field, batch_size)


def as_points(xy: ArrayLike) -> NDArray[np.float64]:
    """(n, 2) finite coordinates, or a ValueError."""
    points = np.asarray(xy, np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"xy has to be (n, 2), x then y; found an array of shape {points.shape}.")
    if not np.isfinite(points).all():
        lost = int((~np.isfinite(points)).any(1).sum())
        raise ValueError(f"xy of {lost} of {len(points)} points is not finite. Leave those points out.")
    return points


def _batches(image: Image, level: int, boxes: NDArray[np.float64], field: int, batch_size: int) -> Iterator[Batch]:
    """Cut in storage order, resample in threads (Pillow lets go of the interpreter while it works)."""
    covers = _covers(boxes, field)

    def resample(row: int, square: NDArray[np.uint8]) -> NDArray[np.uint8]:
        left, top, right, bottom = boxes[row] - np.tile(covers[row, :2], 2)
        return resized(square, field, field, (left, top, right, bottom))

    squares = _squares(image, level, covers)
    largest = 3 * np.prod(covers[:, 2:] - covers[:, :2], axis=1).max(initial=1)  # bytes
    at_once = max(1, int(_IN_FLIGHT // largest))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(boxes), batch_size):
            left_over = min(batch_size, len(boxes) - start)
            rows: list[int] = []
            patches: list[NDArray[np.uint8]] = []
            while group := list(islice(squares, min(at_once, left_over - len(rows)))):
                rows += [row for row, _ in group]
                patches += pool.map(resample, *zip(*group, strict=True))
            yield np.array(rows, np.intp), np.stack(patches)


def _covers(boxes: NDArray[np.float64], field: int) -> NDArray[np.intp]:
    """Whole pixels, (n, 4) as boxes, that count in each patch: a triangle filter reaches over the square's border."""
    step = (boxes[:, 2:] - boxes[:, :2]) / field
    stored_as_wanted = (np.abs(step - 1) < 1e-6) & (boxes[:, :2] % 1 == 0)
    reach = np.where(stored_as_wanted, 0, np.maximum(step, 1))
    return np.hstack([np.floor(boxes[:, :2] - reach), np.ceil(boxes[:, 2:] + reach)]).astype(np.intp)


def _squares(image: Image, level: int, covers: NDArray[np.intp]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield (row, pixels) of every cover; of a chunked level from top to bottom, so that each block is read once."""
    if getattr(image.levels[level], "chunks", None) is None:
        for row, (left, top, right, bottom) in enumerate(covers):
            yield row, image.read(level, top, bottom, left, right)
        return
    y_edges, x_edges = block_edges(image.levels[level])
    rows, columns = _spans(y_edges, covers[:, 1::2]), _spans(x_edges, covers[:, ::2])
    touched = [tuple(product(range(*i), range(*j))) for i, j in zip(rows, columns, strict=True)]
    uses = Counter(chain.from_iterable(touched))
    held: dict[tuple[int, int], NDArray[np.uint8]] = {}
    for row in np.lexsort((covers[:, 0], rows[:, 0])):
        left, top, right, bottom = covers[row]
        square = np.full((bottom - top, right - left, 3), 255, np.uint8)
        for i, j in touched[row]:
            corner = y_edges[i], x_edges[j]
            if (i, j) not in held:
                held[i, j] = image.read(level, y_edges[i], y_edges[i + 1], x_edges[j], x_edges[j + 1])
            _paste(square, (top, left), held[i, j], corner)
            uses[i, j] -= 1
            if not uses[i, j]:
                del held[i, j]
        yield int(row), square


def _spans(edges: NDArray[np.intp], ranges: NDArray[np.intp]) -> NDArray[np.intp]:
    """First block and end block, (n, 2), that each range of pixels (n, 2) touches; none where it lies outside."""
    first = np.searchsorted(edges, ranges[:, 0], side="right") - 1
    end = np.searchsorted(edges, ranges[:, 1], side="left")
    return np.clip(np.stack([first, end], axis=1), 0, len(edges) - 1)


def _paste(
    target: NDArray[np.uint8], corner: tuple[int, int], block: NDArray[np.uint8], block_corner: tuple[int, int]
) -> None:
    """Copy what two rectangles of one picture share; corners are (y, x)."""
    into, out_of = [], []
    for axis in (0, 1):
        start = max(corner[axis], block_corner[axis])
        end = min(corner[axis] + target.shape[axis], block_corner[axis] + block.shape[axis])
        into.append(slice(start - corner[axis], end - corner[axis]))
        out_of.append(slice(start - block_corner[axis], end - block_corner[axis]))
    target[tuple(into)] = block[tuple(out_of)]
