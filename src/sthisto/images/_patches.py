"""Square patches at any position and scale, cut so that each stored chunk is decoded once."""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice, product
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sthisto.images._image import Image, block_edges, resized

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

Batch = tuple[NDArray[np.intp], NDArray[np.uint8]]  # rows (b,), patches (b, input_size, input_size, 3)
Square = tuple[int, "PillowImage"]  # row, the pixels around its patch
_IN_FLIGHT = 2**26  # bytes of squares that wait to be resampled: large squares go a few at a time


def sample_patches(image: Image, xy: ArrayLike, side: float, input_size: int) -> NDArray[np.uint8]:
    """Cut a square patch at every point, all of one size in the tissue and one size in pixels.

    Encoders take a fixed number of pixels at a fixed scale, and images come at any resolution: each patch is taken from
    the coarsest level that still has the detail, coarsened by powers of two as far as that keeps the detail (means of
    blocks of 2 x 2, 4 x 4, ... pixels, counted from the image's corner), and resampled by a triangle filter:
    antialiased where it shrinks, bilinear where it grows.

    The square is moved to begin on a whole pixel of that level, or of the patch where these are finer: by half a pixel
    of the patch at most. Otherwise the filter would blur between pixels and not on them, and features would depend on
    the position of a point within its pixel.

    Parameters
    ----------
    image
        The image.
    xy
        (n, 2) centers, full-resolution pixels, x then y; continuous, the center of pixel i being i + 0.5.
    side
        Side of the square in full-resolution pixels; micrometers / ``image.mpp``.
    input_size
        Side of a patch in its own pixels.

    Returns
    -------
    Patches, (n, input_size, input_size, 3) uint8 RGB, in the order of ``xy``; white beyond the border. Where ``side``
    at the level's scale equals ``input_size``, they are the stored pixels.

    Raises
    ------
    ValueError
        ``xy`` is not (n, 2) finite numbers; ``side`` or ``input_size`` is not positive; float pixels outside [0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> image = Image((np.arange(64, dtype=np.uint8).reshape(8, 8),), (1.0,), None, "")
    >>> sample_patches(image, [[2, 1], [0, 0]], side=2, input_size=2)[..., 0]
    array([[[  1,   2],
            [  9,  10]],
    <BLANKLINE>
           [[255, 255],
            [255,   0]]], dtype=uint8)
    """
    points = as_points(xy)
    patches = np.empty((len(points), input_size, input_size, 3), np.uint8)
    for rows, batch in patch_batches(image, points, side, input_size):
        patches[rows] = batch
    return patches


def patch_batches(
    image: Image, xy: ArrayLike, side: float, input_size: int, *, batch_size: int = 64, first: int = 0
) -> Iterator[Batch]:
    """Yield the patches of :func:`sample_patches` in batches, in the order in which the image is stored.

    A stored chunk (a tile, or a strip as wide as the slide) takes far longer to decode than a patch to cut. Points are
    visited from top to bottom, so that every chunk is decoded once and kept only while a later point needs it: memory
    holds a band of the slide, about ``side`` plus 1000 pixels high, and never all patches.

    Parameters
    ----------
    image, xy, side, input_size
        As in :func:`sample_patches`.
    batch_size
        Patches per batch; the last may be smaller.
    first
        Points to skip, in the order of :func:`visiting_order`: interrupted work resumes there, and the batches are
        those of an uninterrupted run where ``first`` is a multiple of ``batch_size``.

    Yields
    ------
    rows, patches
        (b,) rows of ``xy``, each in exactly one batch, and (b, input_size, input_size, 3) uint8 RGB.

    Raises
    ------
    ValueError
        As :func:`sample_patches`, at the call and not at the first batch; ``batch_size`` is not positive, ``first``
        negative.

    Examples
    --------
    >>> import numpy as np
    >>> image = Image((np.zeros((50, 50, 3), np.uint8),), (1.0,), None, "")
    >>> [rows.tolist() for rows, _ in patch_batches(image, [[9, 9], [40, 9], [9, 40]], 8, 4, batch_size=2)]
    [[0, 1], [2]]
    """
    if not batch_size > 0:
        raise ValueError(f"batch_size has to be positive; found {batch_size}.")
    if first < 0:
        raise ValueError(f"first is a number of points to skip; found {first}.")
    plan = _plan(image, xy, side, input_size)
    return _batches(plan, input_size, batch_size, first)


def visiting_order(image: Image, xy: ArrayLike, side: float, input_size: int) -> NDArray[np.intp]:
    """Rows (n,) of ``xy`` in the order in which :func:`patch_batches` visits them, whatever the size of its batches.

    Parameters
    ----------
    image, xy, side, input_size
        As in :func:`sample_patches`.

    Examples
    --------
    >>> import numpy as np
    >>> image = Image((np.zeros((50, 50, 3), np.uint8),), (1.0,), None, "")
    >>> visiting_order(image, [[9, 9], [40, 9], [9, 40]], 8, 4).tolist()
    [0, 1, 2]
    """
    return _plan(image, xy, side, input_size).order


def as_points(xy: ArrayLike) -> NDArray[np.float64]:
    """(n, 2) finite coordinates, or a ValueError."""
    points = np.asarray(xy, np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"xy has to be (n, 2), x then y; found an array of shape {points.shape}.")
    if not np.isfinite(points).all():
        lost = int((~np.isfinite(points)).any(1).sum())
        raise ValueError(f"xy of {lost} of {len(points)} points is not finite. Leave those points out.")
    return points


@dataclass(frozen=True)
class _Plan:
    """The pixels that each patch is made of, and the order of the visit. Rectangles are left, top, right, bottom."""

    image: Image
    level: int
    early: int  # blocks are coarsened by this as they are read, each once
    late: int  # and the square around a patch by this
    covers: NDArray[np.intp]  # (n, 4) squares to read, in pixels ``early`` times coarser than the level's
    boxes: NDArray[np.float64]  # (n, 4) the patch in its square, in pixels ``early * late`` times coarser
    blocks: tuple[NDArray[np.intp], NDArray[np.intp]] | None  # borders along y and x; None: squares are read one by one
    order: NDArray[np.intp]  # (n,)


def _plan(image: Image, xy: ArrayLike, side: float, input_size: int) -> _Plan:
    """Choose the level and its reduction, and sort the patches of chunked images from top to bottom."""
    points = as_points(xy)
    for name, value in (("side", side), ("input_size", input_size)):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} has to be positive; found {value}.")
    level = max(k for k, scale in enumerate(image.scales) if k == 0 or scale * side >= input_size * (1 - 1e-6))
    step = side * image.scales[level] / input_size
    reduction = 2 ** max(0, int(np.log2(step) + 1e-6))
    step /= reduction
    unit = min(1.0, step)
    corners = unit * np.floor(
        (points / side - 0.5) * input_size * step / unit + 0.5 + 1e-6
    )  # x.5 goes up despite rounding
    boxes = np.round(np.hstack([corners, corners + input_size * step]), 6)  # in reduced pixels
    covers = _covers(boxes, input_size)
    edges = block_edges(image.levels[level])
    # Blocks are reduced as they are read, unless their borders are in the way.
    early = reduction if all((axis[:-1] % reduction == 0).all() for axis in edges) else 1
    late = reduction // early
    blocks = (-(-edges[0] // early), -(-edges[1] // early))
    boxes -= np.tile(covers[:, :2], 2)
    covers *= late
    if _one_by_one(image.levels[level], covers, blocks, early):
        return _Plan(image, level, early, late, covers, boxes, None, np.arange(len(points)))
    order = np.lexsort((covers[:, 0], _spans(blocks[0], covers[:, 1::2])[:, 0]))
    return _Plan(image, level, early, late, covers, boxes, blocks, order)


def _one_by_one(
    stored: object, covers: NDArray[np.intp], blocks: tuple[NDArray[np.intp], NDArray[np.intp]], early: int
) -> bool:
    """Whether reading by blocks saves nothing: where any part can be read alone and is small relative to the blocks."""
    if getattr(stored, "chunks", None) is not None:
        return False
    rows, columns = _spans(blocks[0], covers[:, 1::2]), _spans(blocks[1], covers[:, ::2])
    touched = set(chain.from_iterable(product(range(*i), range(*j)) for i, j in zip(rows, columns, strict=True)))
    once = sum(int(np.diff(blocks[0])[i] * np.diff(blocks[1])[j]) for i, j in touched)
    return early == 1 or bool(np.prod(covers[:, 2:] - covers[:, :2], axis=1).sum() < once)


def _batches(plan: _Plan, input_size: int, batch_size: int, first: int) -> Iterator[Batch]:
    """Resample the boxes in their squares, in threads, as Pillow releases the interpreter."""

    def resample(row: int, square: "PillowImage") -> NDArray[np.uint8]:
        left, top, right, bottom = plan.boxes[row]
        return resized(square, input_size, input_size, (left, top, right, bottom))

    largest = 4 * np.prod(plan.boxes[:, 2:], axis=1).max(initial=1)  # bytes
    at_once = max(1, int(_IN_FLIGHT // largest))
    squares = _squares(plan, plan.order[first:])
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(first, len(plan.order), batch_size):
            left_over = min(batch_size, len(plan.order) - start)
            rows: list[int] = []
            patches: list[NDArray[np.uint8]] = []
            while group := list(islice(squares, min(at_once, left_over - len(rows)))):
                rows += [row for row, _ in group]
                patches += pool.map(resample, *zip(*group, strict=True))
            yield np.array(rows, np.intp), np.stack(patches)


def _covers(boxes: NDArray[np.float64], input_size: int) -> NDArray[np.intp]:
    """Whole pixels, (n, 4) as boxes, that count in each patch: a triangle filter extends beyond the square's border."""
    step = (boxes[:, 2:] - boxes[:, :2]) / input_size
    support = np.where(np.abs(step - 1) < 1e-6, 0, np.maximum(step, 1))
    return np.hstack([np.floor(boxes[:, :2] - support), np.ceil(boxes[:, 2:] + support)]).astype(np.intp)


def _squares(plan: _Plan, order: NDArray[np.intp]) -> Iterator[Square]:
    """Yield (row, pixels) of the covers in this order; each block is read once, and kept while a later one needs it."""
    from PIL import Image as Pillow  # noqa: PLC0415

    if plan.blocks is None:
        for row in order:
            yield int(row), _reduced(_read(plan.image, plan.level, plan.early, plan.covers[row]), plan.late)
        return
    y_edges, x_edges = plan.blocks
    rows, columns = _spans(y_edges, plan.covers[order, 1::2]), _spans(x_edges, plan.covers[order, ::2])
    touched = [tuple(product(range(*i), range(*j))) for i, j in zip(rows, columns, strict=True)]
    uses = Counter(chain.from_iterable(touched))
    held: dict[tuple[int, int], PillowImage] = {}
    for row, cells in zip(order, touched, strict=True):
        left, top, right, bottom = plan.covers[row]
        square = Pillow.new("RGB", (right - left, bottom - top), "white")
        for i, j in cells:
            if (i, j) not in held:
                box = np.array([x_edges[j], y_edges[i], x_edges[j + 1], y_edges[i + 1]])
                held[i, j] = _read(plan.image, plan.level, plan.early, box)
            square.paste(held[i, j], (int(x_edges[j] - left), int(y_edges[i] - top)))
            uses[i, j] -= 1
            if not uses[i, j]:
                del held[i, j]
        yield int(row), _reduced(square, plan.late)


def _read(image: Image, level: int, reduction: int, box: NDArray[np.intp]) -> "PillowImage":
    """Read a box, in pixels ``reduction`` times coarser than the level's."""
    from PIL import Image as Pillow  # noqa: PLC0415

    left, top, right, bottom = box * reduction
    return _reduced(Pillow.fromarray(image.read(level, top, bottom, left, right)), reduction)


def _reduced(pixels: "PillowImage", reduction: int) -> "PillowImage":
    return pixels.reduce(reduction) if reduction > 1 else pixels


def _spans(edges: NDArray[np.intp], ranges: NDArray[np.intp]) -> NDArray[np.intp]:
    """First block and end block, (n, 2), that each range of pixels (n, 2) touches; none where it is outside."""
    first = np.searchsorted(edges, ranges[:, 0], side="right") - 1
    end = np.searchsorted(edges, ranges[:, 1], side="left")
    return np.clip(np.stack([first, end], axis=1), 0, len(edges) - 1)
