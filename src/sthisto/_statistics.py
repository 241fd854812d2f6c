"""Statistics of image features and expression: standardization of a section, leading components."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RANK = 1e-6  # components below this share of the first are rounding noise of float32
FEW = 0.1  # share of all components up to which Lanczos iterations are faster than a full decomposition
SMALL = 500  # matrices up to this size are decomposed in full

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and inverse standard deviation of one section's image features, by which they are standardized.

    Attributes
    ----------
    mean
        Mean (d,) of each feature.
    inverse_std
        Inverse standard deviation (d,), 0 where a feature is constant.

    Examples
    --------
    >>> FeatureStatistics.of(np.array([[1, 5], [3, 5]], dtype=np.float32)).standardize(np.array([[4.0, 5.0]]))
    array([[2., 0.]])
    """

    mean: Floats
    inverse_std: Floats

    @classmethod
    def of(cls, features: NDArray[np.float32]) -> "FeatureStatistics":
        """Statistics of features (n, d); a constant that differs in its last bit only counts as constant."""
        mean, std = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
        return cls(mean, np.divide(1, std, out=np.zeros_like(std), where=std > 1e-6 * np.abs(mean)))

    def standardize(self, features: NDArray[Any]) -> Floats:
        """Features (m, d), less the mean and divided by the standard deviation."""
        standard: Floats = (features - self.mean) * self.inverse_std
        return standard

    def relative_std(self) -> Floats:
        """Give the standard deviations (d,) in units of their root mean square, as weights for one common scale."""
        std = np.divide(1, self.inverse_std, out=np.zeros_like(self.inverse_std), where=self.inverse_std > 0)
        relative: Floats = std / (np.sqrt((std**2).mean()) or 1.0)
        return relative


def leading_components(blocks: Iterable[Floats], most: int) -> Floats:
    """Leading right singular vectors (d, q), q <= ``most``, of a matrix (n, d) that comes in blocks of rows.

    The smaller of the products (n, n) and (d, d) is decomposed; blocks are held only while they are fewer rows than d.
    """
    rows, square = np.empty((0, 0)), np.empty((0, 0))
    for block in blocks:
        rows = np.concatenate([rows, block]) if rows.size else block
        if len(rows) >= rows.shape[1]:
            square, rows = rows.T @ rows + (square if square.size else 0), rows[:0]
    if square.size:
        s, axes = _largest(square + rows.T @ rows, most)
    else:
        s, left = _largest(rows @ rows.T, most)
        axes = rows.T @ left / np.where(s > 0, s, 1)
    q = max(1, int((s > RANK * s[0]).sum()))
    # Contiguous, as it comes back from a file: another memory layout can change the last bit of a product.
    return np.ascontiguousarray(axes[:, :q])


def _largest(square: Floats, most: int) -> tuple[Floats, Floats]:
    """Roots of the largest eigenvalues, descending, and their vectors."""
    n = len(square)
    if n > SMALL and most < FEW * n and square.any():
        from scipy.sparse.linalg import eigsh  # noqa: PLC0415  names of models are known without it

        values, vectors = eigsh(square, most, v0=np.random.default_rng(0).normal(size=n))
    else:
        values, vectors = np.linalg.eigh(square)
    order = np.argsort(-values, kind="stable")[:most]
    return np.sqrt(values[order].clip(min=0)), vectors[:, order]
