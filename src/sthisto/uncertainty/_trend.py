"""The standard deviation of a new measurement about its prediction, by gene and level.

The variance of log-normalised counts follows their level: it is small where a gene is hardly seen, largest where zeros
and counts alternate, and shrinks again for genes that are seen everywhere. All genes share that trend, as in voom (Law
et al. 2014, Genome Biology); each gene has its own factor on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 24
PRIOR_SPOTS = 10.0  # a gene's own factor counts for as much as the common trend once it was held back this often
CHUNK = 4096


@dataclass(frozen=True)
class MeanVarianceTrend:
    """Standard deviation of a new measurement, as a function of the predicted mean."""

    level: NDArray[np.float64]  # (b,) predicted means, rising
    variance: NDArray[np.float64]  # (b,) mean squared residual around each
    factor: NDArray[np.float64]  # (g,) of each gene on the common trend

    @classmethod
    def fit(cls, expression: NDArray[np.float32], predicted: NDArray[np.float32]) -> "MeanVarianceTrend":
        """Learn from measured and held-back expression (n, g) of the same spots.

        Raises
        ------
        ValueError
            Fewer than two spots were held back.
        """
        seen = np.isfinite(predicted).all(axis=1)
        if seen.sum() < 2:
            raise ValueError(f"{int(seen.sum())} spots with a held-back prediction; the spread needs at least 2.")
        mean = predicted[seen].astype(np.float64)
        squared = (expression[seen] - mean) ** 2
        order = np.argsort(mean, axis=None, kind="stable")
        bins = np.array_split(order, min(BINS, len(order)))
        level = np.array([mean.ravel()[rows].mean() for rows in bins])
        variance = np.array([squared.ravel()[rows].mean() for rows in bins])
        trend = np.interp(mean, level, variance)
        prior = PRIOR_SPOTS * trend.mean(axis=0) + np.finfo(np.float64).tiny
        factor = (squared.sum(axis=0) + prior) / (trend.sum(axis=0) + prior)
        return cls(level, variance, factor)

    def __call__(self, mean: NDArray[np.float32]) -> NDArray[np.float32]:
        """Give standard deviations (m, g) for predicted means (m, g)."""
        std = np.empty(mean.shape, dtype=np.float32)
        for start in range(0, len(mean), CHUNK):  # interp works in float64
            rows = slice(start, start + CHUNK)
            std[rows] = np.sqrt(np.interp(mean[rows], self.level, self.variance) * self.factor)
        return std

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Give everything as named numeric arrays."""
        return {"spread_level": self.level, "spread_variance": self.variance, "spread_factor": self.factor}

    @classmethod
    def restore(cls, state: Mapping[str, NDArray[np.generic]]) -> "MeanVarianceTrend":
        """Undo :meth:`state`; other entries are left alone."""
        return cls(*(np.asarray(state[f"spread_{name}"], dtype=np.float64) for name in ("level", "variance", "factor")))
