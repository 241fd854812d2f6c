"""Features of a whole image, computed once on a grid and interpolated at any position."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist, pdist

from sthisto._statistics import FeatureStatistics, leading_components

COMPONENTS = 20  # of the features, as in the gene test
LIMIT = 5.0  # standard deviations
N_KERNEL = 30  # kernel components: more change the statistic in its third decimal
N_SAMPLE = 600  # grid points that the kernel components are computed from
CHUNK = 8192  # grid points whose kernel is computed at once

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class FeatureRaster:
    """Features on a square grid that covers an image and a margin of background around it.

    A candidate transformation then costs an interpolation and not another pass over the image. Positions beyond the
    grid take the value of its border, which is background: spots outside the image are a case like any other.

    Attributes
    ----------
    origin
        (2,) position of the first grid point, full-resolution pixels, x then y.
    step
        Distance between grid points, pixels.
    values
        (rows, columns, d) float32.
    tissue
        (rows, columns) grid points near tissue, which were computed one by one; the others have one common value.
    size
        (2,) width and height of the image, pixels.
    extent
        Side of the patch whose features a point has, pixels.
    """

    origin: Floats
    step: float
    values: NDArray[np.float32]
    tissue: NDArray[np.bool_]
    size: Floats
    extent: float

    @classmethod
    def of(
        cls,
        encode: Callable[[Floats], NDArray[np.float32]],
        size: tuple[float, float],
        step: float,
        *,
        extent: float,
        tissue: Floats | None = None,
        max_points: int = 9000,
    ) -> "FeatureRaster":
        """Compute the features of an image.

        Parameters
        ----------
        encode
            Gives features (m, d) of points (m, 2), pixels.
        size
            Width and height of the image, pixels.
        step
            Distance between grid points, pixels; more where the tissue would need more than ``max_points``.
        extent
            Side of the patch around a point, pixels.
        tissue
            (k, 2) points on tissue: away from them all is background, everywhere where there are none. ``None``:
            tissue throughout.
        max_points
            Grid points to compute, at most (about).
        """
        axes, near = _grid(size, step, extent, tissue)
        if near.sum() > max_points:
            step *= float(np.sqrt(near.sum() / max_points))
            axes, near = _grid(size, step, extent, tissue)
        x, y = axes
        points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
        first = encode(points[near.ravel()])
        values = np.empty((len(points), first.shape[1]), dtype=np.float32)
        values[near.ravel()] = first
        background = np.flatnonzero(~near)
        if len(background):
            some = background[np.linspace(0, len(background) - 1, 32).astype(np.intp)]
            values[background] = np.median(encode(points[some]), axis=0)
        shape = len(y), len(x)
        return cls(np.array([x[0], y[0]]), step, values.reshape(*shape, -1), near, np.array(size), extent)

    def at(self, xy: Floats) -> NDArray[np.float32]:
        """Values (..., d) at positions (..., 2), bilinear."""
        rows, columns, d = self.values.shape
        place = np.clip((xy - self.origin) / self.step, 0, [columns - 1.001, rows - 1.001])
        corner = place.astype(np.intp)
        weight = (place - corner).astype(np.float32)
        flat, first = self.values.reshape(-1, d), corner[..., 1] * columns + corner[..., 0]
        right, down = weight[..., :1], weight[..., 1:]
        above = flat[first] * (1 - right) + flat[first + 1] * right
        below = flat[first + columns] * (1 - right) + flat[first + columns + 1] * right
        values: NDArray[np.float32] = above * (1 - down) + below * down
        return values

    def inside(self, xy: Floats) -> NDArray[np.bool_]:
        """Mask (...,) of positions (..., 2) inside the image."""
        return np.asarray(((xy >= 0) & (xy <= self.size)).all(axis=-1))

    def tissue_center(self) -> Floats:
        """Mean position (2,) of the grid points near tissue; the middle of an image without any."""
        if not self.tissue.any():
            return self.size / 2
        y, x = np.nonzero(self.tissue)
        center: Floats = self.origin + self.step * np.array([x.mean(), y.mean()])
        return center

    def kernel_components(self, *, random_state: int = 0) -> "FeatureRaster":
        """Leading components of a Gaussian kernel on the features, by Nystrom's method.

        Ridge regression on them is kernel ridge regression, at the cost of a linear one.
        """
        flat = self.values.reshape(-1, self.values.shape[-1])
        near = np.flatnonzero(self.tissue)
        nothing = replace(self, values=np.zeros((*self.values.shape[:2], 1), np.float32))
        if len(near) < 2:
            return nothing
        statistics = FeatureStatistics.of(flat[near])
        axes = leading_components([statistics.standardize(flat[near]).clip(-LIMIT, LIMIT)], COMPONENTS)
        random = np.random.default_rng(random_state)
        chosen = flat[random.permutation(near)[:N_SAMPLE]]

        def components(features: NDArray[np.float32]) -> Floats:
            projected: Floats = statistics.standardize(features).clip(-LIMIT, LIMIT) @ axes
            return projected

        sample = components(chosen)
        length = float(np.median(pdist(sample)))
        if not length > 0:
            return nothing

        def kernel(features: NDArray[np.float32]) -> Floats:
            near_sample: Floats = np.exp(-0.5 * (cdist(components(features), sample) / length) ** 2)
            return near_sample

        variance, vectors = np.linalg.eigh(kernel(chosen))
        kept = variance[-N_KERNEL:] > 1e-6 * variance[-1]
        weights = (vectors[:, -N_KERNEL:] / np.sqrt(np.maximum(variance[-N_KERNEL:], 1e-12)))[:, kept]
        mean = kernel(chosen).mean(axis=0) @ weights
        values = [kernel(flat[i : i + CHUNK]) @ weights - mean for i in range(0, len(flat), CHUNK)]
        shape = self.values.shape[:2]
        return replace(self, values=np.concatenate(values).astype(np.float32).reshape(*shape, -1))


def _grid(
    size: tuple[float, float], step: float, extent: float, tissue: Floats | None
) -> tuple[tuple[Floats, Floats], NDArray[np.bool_]]:
    """Grid points along x and y, and which (rows, columns) are near tissue."""
    margin = extent / 2 + step
    x, y = (np.arange(-margin, side + margin + step, step) for side in size)
    if tissue is None:
        return (x, y), np.ones((len(y), len(x)), dtype=bool)
    points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    if not len(tissue):
        return (x, y), np.zeros((len(y), len(x)), dtype=bool)
    distance = cKDTree(tissue).query(points, p=np.inf, distance_upper_bound=extent / 2 + step)[0]
    return (x, y), np.isfinite(distance).reshape(len(y), len(x))
