"""Nuclei of a section stained with hematoxylin and eosin, by thresholds and watershed: a plain method without training.

1. Stains are separated by the optical densities of Ruifrok & Johnston (2001).
2. One threshold of hematoxylin for the whole image: that of Otsu over tissue, times ``STRICT``. A nucleus also exceeds
   the mean of its surroundings.
3. What touches is split by the watershed of the distance to the border, from maxima that are ``DEPTH_UM`` deep.
4. What is small, or no darker than the ring around it, is dropped.

The image is read in tiles that overlap by ``MARGIN_UM``; a nucleus belongs to the tile that its center is in.
"""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice, product, repeat
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from sthisto.images._image import Image
from sthisto.images._patches import as_points, sample_patches
from sthisto.images._tissue import tissue_points

MPP = 0.5  # um per pixel to work at; finer images are averaged
MAX_MPP = 1.1  # coarser, a nucleus of 6 um has fewer than 5 pixels across
TILE, SAMPLE, SAMPLES = 1024, 256, 64  # pixels of a tile, and of the squares that the threshold is taken from
MARGIN_UM = 32.0
TISSUE = 0.1  # hematoxylin of tissue at least, optical density
STRICT, ABOVE, CONTRAST = 1.15, 0.25, 0.2  # thresholds: whole image, over the surroundings, over the ring
SURROUNDINGS_UM, RING_UM, SMOOTH_UM, OPEN_UM, DEPTH_UM = 25.0, 2.0, 0.8, 1.0, 0.75
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])  # optical density of hematoxylin and eosin in RGB
UNMIX = np.linalg.pinv(STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True))[:, 0].astype(np.float32)
DENSITY = -np.log((np.arange(256) + 1) / 256).astype(np.float32)

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Nuclei:
    """Nuclei of an image.

    Attributes
    ----------
    xy
        (n, 2) centers, full-resolution pixels, x then y.
    area_um2
        (n,) square micrometers.
    roundness
        (n,) area over that of the disc with the same major axis: 1 for a disc, less for a spindle.
    hematoxylin
        (n,) mean optical density of the stain.
    """

    xy: NDArray[np.float64]
    area_um2: Floats
    roundness: Floats
    hematoxylin: Floats

    def __len__(self) -> int:
        return len(self.xy)

    def keep(self, rows: NDArray[np.bool_]) -> "Nuclei":
        """Only the nuclei that a mask (n,) keeps."""
        return Nuclei(self.xy[rows], self.area_um2[rows], self.roundness[rows], self.hematoxylin[rows])


def find_nuclei(
    image: Image,
    mpp: float,
    *,
    near: ArrayLike | None = None,
    max_distance: float = np.inf,
    min_area_um2: float = 15.0,
    max_area_um2: float = 400.0,
) -> Nuclei:
    """Find the nuclei of a section stained with hematoxylin and eosin.

    Thresholds and a watershed, without training: good for positions and counts, less so for outlines, and worse than a
    trained network (StarDist, Cellpose, InstanSeg) where nuclei are pale or crowded.

    Parameters
    ----------
    image
        The stained section. It is read in tiles, so that slides of any size fit into memory.
    mpp
        Micrometers per full-resolution pixel.
    near, max_distance
        Only nuclei within so many full-resolution pixels of these points (m, 2). ``None``: everywhere.
    min_area_um2, max_area_um2
        Smallest and largest area of a nucleus.

    Returns
    -------
    The nuclei, from top to bottom tile by tile.

    Raises
    ------
    ValueError
        Pixels larger than about 1 um, which show no nuclei; no tissue; sizes out of order.

    Examples
    --------
    >>> from sthisto.images import open_image
    >>> y, x = np.mgrid[:200, :300]
    >>> pixels = np.full((200, 300, 3), [225, 150, 190], np.uint8)
    >>> pixels[(x - 150) ** 2 + (y - 100) ** 2 < 64] = [70, 40, 120]
    >>> nuclei = find_nuclei(open_image(pixels), mpp=0.5)
    >>> nuclei.xy.round().tolist(), nuclei.area_um2.round().tolist()
    ([[150.0, 100.0]], [46.0])
    """
    stored_mpp = mpp / image.scales[0]
    if not (np.isfinite(mpp) and 0 < stored_mpp <= MAX_MPP):
        raise ValueError(
            f"the image has {stored_mpp:.3g} um per pixel, where a nucleus of 6 um has {6 / stored_mpp:.1f} across: "
            f"nuclei can be found at {MAX_MPP:g} um or less. Pass the full-resolution image as image=, and check mpp."
        )
    if not 0 < min_area_um2 < max_area_um2:
        raise ValueError(f"min_area_um2={min_area_um2} and max_area_um2={max_area_um2}: 0 < smallest < largest.")
    coarsening = max(1, int(MPP / stored_mpp + 1e-6))
    pixel = coarsening / image.scales[0]  # full-resolution pixels of one that is worked on
    points = None if near is None else as_points(near)
    side = math.ceil(max(image.shape) / pixel / math.ceil(max(image.shape) / pixel / TILE))
    work = _Work(image, pixel, coarsening * stored_mpp, side, (min_area_um2, max_area_um2))
    threshold, parts = work.threshold(), list[Nuclei]()
    corners = _corners(image, side * pixel, points, max_distance)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while some := list(islice(corners, 16)):  # memory holds these
            parts.extend(pool.map(work.nuclei, some, repeat(threshold)))
    found = Nuclei(*(np.concatenate([getattr(part, name) for part in parts]) for name in Nuclei.__annotations__))
    return found if points is None else found.keep(cKDTree(points).query(found.xy)[0] <= max_distance)


def _corners(
    image: Image, side: float, points: NDArray[np.float64] | None, max_distance: float
) -> Iterator[NDArray[np.float64]]:
    """Upper left corners (2,) of the tiles that may hold a nucleus near the points."""
    height, width = image.shape
    tree = None if points is None else cKDTree(points)
    for y, x in product(np.arange(0, height, side), np.arange(0, width, side)):
        corner = np.array([x, y])
        if tree is None or tree.query(corner + side / 2)[0] <= max_distance + side / np.sqrt(2):
            yield corner


@dataclass(frozen=True)
class _Work:
    """How an image is worked on: its pixels in full-resolution pixels and um, the pixels of a tile, sizes of nuclei."""

    image: Image
    pixel: float
    mpp: float
    side: int
    areas: tuple[float, float]

    def threshold(self) -> float:
        """Hematoxylin that separates nuclei from other tissue, by squares over the tissue of the whole image."""
        from skimage.filters import threshold_otsu  # noqa: PLC0415

        side = min(SAMPLE * self.pixel, *self.image.shape)
        centers = tissue_points(self.image, min(max(side, max(self.image.shape) / 32), *self.image.shape))
        some = centers[np.linspace(0, len(centers) - 1, min(SAMPLES, len(centers))).astype(int)]
        squares = sample_patches(self.image, some, side, round(side / self.pixel))
        stain = np.stack([_smooth(hematoxylin(each), self.mpp) for each in squares])
        tissue = stain[stain > TISSUE]
        if not len(tissue) or np.ptp(tissue) == 0:
            raise ValueError("the image shows no hematoxylin. Is it the section stained with hematoxylin and eosin?")
        return float(threshold_otsu(tissue))

    def nuclei(self, corner: NDArray[np.float64], threshold: float) -> Nuclei:
        """Nuclei whose centers are in a tile."""
        margin = math.ceil(MARGIN_UM / self.mpp)
        wide = self.side + 2 * margin
        center = corner + self.side * self.pixel / 2
        stain = hematoxylin(sample_patches(self.image, center[None], wide * self.pixel, wide)[0])
        found = _measured(stain, _labels(stain, self.mpp, threshold), self.mpp, CONTRAST * threshold)
        at = found.xy - margin
        mine = ((at >= 0) & (at < self.side)).all(axis=1)
        mine &= (found.area_um2 >= self.areas[0]) & (found.area_um2 <= self.areas[1])
        return replace(found, xy=corner + at * self.pixel).keep(mine)


def hematoxylin(pixels: NDArray[np.uint8]) -> Floats:
    """Optical density of hematoxylin (..., h, w) of pixels (..., h, w, 3), 0 where eosin alone explains more."""
    return np.asarray(np.maximum(DENSITY[pixels] @ UNMIX, 0))


def _smooth(stain: Floats, mpp: float) -> Floats:
    return np.asarray(ndimage.gaussian_filter(stain, SMOOTH_UM / mpp), np.float32)


def _labels(stain: Floats, mpp: float, threshold: float) -> NDArray[np.int32]:
    """Label (h, w) the pixels of nuclei, 0 elsewhere."""
    from skimage.morphology import disk, h_maxima  # noqa: PLC0415
    from skimage.segmentation import watershed  # noqa: PLC0415

    smooth = _smooth(stain, mpp)
    around = ndimage.uniform_filter(stain, round(SURROUNDINGS_UM / mpp) | 1)
    mask = (smooth > STRICT * threshold) & (smooth > around + ABOVE * threshold)
    if not mask.any():
        return np.zeros(stain.shape, np.int32)
    mask = ndimage.binary_fill_holes(ndimage.binary_opening(mask, disk(max(1, round(OPEN_UM / mpp)))))
    depth = ndimage.distance_transform_edt(mask).astype(np.float32) * np.float32(mpp)
    depth = ndimage.gaussian_filter(depth, SMOOTH_UM / 2 / mpp)
    seeds, _ = ndimage.label(h_maxima(depth, DEPTH_UM), np.ones((3, 3)))
    return np.asarray(watershed(-depth, seeds, mask=mask), np.int32)


def _measured(stain: Floats, labels: NDArray[np.int32], mpp: float, contrast: float) -> Nuclei:
    """Positions in pixels of the tile and properties of the labels that are nuclei."""
    from skimage.segmentation import expand_labels  # noqa: PLC0415

    ring = np.where(labels > 0, 0, expand_labels(labels, RING_UM / mpp))
    y, x = np.nonzero(labels)
    label, n = labels[y, x], int(labels.max()) + 1
    count = np.bincount(label, minlength=n).clip(1)

    def mean(values: NDArray[Any]) -> NDArray[np.float64]:
        return np.asarray(np.bincount(label, values, n) / count)

    cx, cy, inside = mean(x), mean(y), mean(stain[y, x])
    dx, dy = x - cx[label], y - cy[label]
    xx, yy, xy = mean(dx**2) + 1 / 12, mean(dy**2) + 1 / 12, mean(dx * dy)  # a pixel is a square
    major = 4 * np.sqrt((xx + yy) / 2 + np.hypot((xx - yy) / 2, xy))
    outside = np.bincount(ring.ravel(), stain.ravel(), n) / np.bincount(ring.ravel(), minlength=n).clip(1)
    area = count * mpp**2
    kept = inside - outside > contrast
    kept[0] = False
    rounds = np.minimum(4 * count / (np.pi * major**2), 1)
    values = (each[kept].astype(np.float32) for each in (area, rounds, inside))
    return Nuclei(np.column_stack([cx, cy])[kept] + 0.5, *values)
