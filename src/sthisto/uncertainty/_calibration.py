"""Standard deviations, intervals and probabilities of new measurements, from held-out predictions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sthisto.uncertainty._distribution import LEVELS, PredictiveDistribution
from sthisto.uncertainty._variance import DistanceInflation, MeanVarianceTrend

CHUNK = 2048

Floats = NDArray[np.float64]
Means = NDArray[np.float32]


@dataclass(frozen=True)
class Covariates:
    """What the error of a prediction depends on, besides its mean.

    Attributes
    ----------
    distance
        (m,) pitches to the nearest training spot; infinite in a section without any.
    novelty
        (m,) novelty score of the tissue, 1 where it is typical.
    """

    distance: Floats
    novelty: Floats

    def __getitem__(self, rows: NDArray[np.intp]) -> "Covariates":
        return Covariates(self.distance[rows], self.novelty[rows])

    @classmethod
    def join(cls, parts: "Iterable[Covariates]") -> "Covariates":
        """Pool the points of several sections."""
        distance, novelty = zip(*((part.distance, part.novelty) for part in parts), strict=True)
        return cls(np.concatenate(distance), np.concatenate(novelty))


@dataclass(frozen=True)
class HeldOutPredictions:
    """Predictions of spots that the model was not fitted on.

    Attributes
    ----------
    measured, predicted
        (n, g) expression; rows of NaN in ``predicted`` were not held out.
    covariates
        Of the same spots.
    """

    measured: Means
    predicted: Means
    covariates: Covariates

    @classmethod
    def join(cls, parts: "Sequence[HeldOutPredictions]") -> "HeldOutPredictions":
        """Pool the spots of several sections."""
        return cls(
            np.concatenate([part.measured for part in parts]),
            np.concatenate([part.predicted for part in parts]),
            Covariates.join(part.covariates for part in parts),
        )

    def finite(self) -> "HeldOutPredictions":
        """Only the rows that were predicted, with negative predictions set to 0."""
        rows = np.flatnonzero(np.isfinite(self.predicted).all(axis=1))
        return HeldOutPredictions(self.measured[rows], np.maximum(self.predicted[rows], 0), self.covariates[rows])


@dataclass(frozen=True)
class Calibration:
    """Distribution of a new measurement where a mean was predicted.

    Attributes
    ----------
    trend
        Standard deviation by gene and level.
    inflation
        Its growth with distance and novelty.
    distribution
        Zeros, and quantiles of the values above 0.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> rate = rng.uniform(0.5, 2, (300, 20)).astype(np.float32)
    >>> near = Covariates(np.ones(300), np.ones(300))
    >>> calibration = Calibration.fit(HeldOutPredictions(rng.poisson(rate).astype(np.float32), rate, near))
    >>> low, high = calibration.interval(rate[:2], near[:2], 0.9)
    >>> bool((low <= rate[:2]).all() and (rate[:2] <= high).all())
    True
    """

    trend: MeanVarianceTrend
    inflation: DistanceInflation
    distribution: PredictiveDistribution

    @classmethod
    def fit(cls, left_out: HeldOutPredictions, blocks: HeldOutPredictions | None = None) -> "Calibration":
        """Fit to spots left out one at a time, and to others held out in whole blocks.

        Without ``blocks`` the standard deviation does not grow with distance. Raises ValueError for fewer than two
        held-out spots.
        """
        trend = MeanVarianceTrend.fit(left_out.measured, np.maximum(left_out.predicted, 0))
        left_out = left_out.finite()
        parts = [left_out] if blocks is None else [left_out, blocks.finite()]
        covariates = Covariates.join(part.covariates for part in parts)
        inflation = DistanceInflation.fit(
            np.concatenate([_squared(part, trend) for part in parts]),
            covariates.distance,
            covariates.novelty,
            _explained(left_out),
            float(np.median(left_out.covariates.distance)),
        )
        factor = np.sqrt(inflation(left_out.covariates.distance, left_out.covariates.novelty))
        distribution = PredictiveDistribution.fit(
            left_out.measured.astype(np.float64), left_out.predicted.astype(np.float64), factor
        )
        return cls(trend, inflation, distribution)

    def std(self, mean: Means, covariates: Covariates) -> Means:
        """Standard deviation (m, g) of a new measurement where the means (m, g) are predicted."""
        std = np.empty(mean.shape, dtype=np.float32)
        for rows, factor in self._chunks(covariates):
            std[rows] = self.trend(mean[rows]) * factor
        return std

    def interval(self, mean: Means, covariates: Covariates, level: float) -> tuple[Means, Means]:
        """Bounds (m, g) of the central interval that contains a new measurement with probability ``level``.

        Raises ValueError for a level that is no probability, or above 0.998.
        """
        check_level(level)
        low, high = (np.empty(mean.shape, dtype=np.float32) for _ in range(2))
        for rows, factor in self._chunks(covariates):
            for bound, p in ((low, (1 - level) / 2), (high, (1 + level) / 2)):
                bound[rows] = self.distribution.quantile(p, mean[rows].astype(np.float64), factor)
        return low, high

    def cumulative(self, values: Means, mean: Means, covariates: Covariates) -> tuple[Floats, Floats]:
        """Probabilities (m, g) of a measurement below the values, and of one up to and including them."""
        factor = np.sqrt(self.inflation(covariates.distance, covariates.novelty))
        return self.distribution.cumulative(values.astype(np.float64), mean.astype(np.float64), factor)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """All parts as named numeric arrays."""
        return {**self.trend.state(), **self.inflation.state(), **self.distribution.state()}

    @classmethod
    def restore(cls, state: Mapping[str, NDArray[np.generic]]) -> "Calibration":
        """Undo :meth:`state`; other entries are ignored."""
        return cls(
            MeanVarianceTrend.restore(state), DistanceInflation.restore(state), PredictiveDistribution.restore(state)
        )

    def _chunks(self, covariates: Covariates) -> Iterator[tuple[slice, Floats]]:
        """Rows, a few at a time as intermediate arrays are float64, and the factor (m, g) on the standard deviation."""
        for start in range(0, len(covariates.distance), CHUNK):
            rows = slice(start, start + CHUNK)
            yield rows, np.sqrt(self.inflation(covariates.distance[rows], covariates.novelty[rows]))


def _squared(part: HeldOutPredictions, trend: MeanVarianceTrend) -> Floats:
    """Squared residuals (n, g) in units of the variance; 1 where a gene has none."""
    variance = trend(part.predicted).astype(np.float64) ** 2
    squared: Floats = (part.measured - part.predicted).astype(np.float64) ** 2
    return np.divide(squared, variance, out=np.ones_like(variance), where=variance > 0)


def _explained(left_out: HeldOutPredictions) -> Floats:
    """Variance (g,) that the model explains next to measured spots, relative to the residual variance."""
    residual = ((left_out.measured - left_out.predicted) ** 2).mean(axis=0, dtype=np.float64)
    total = left_out.measured.var(axis=0, dtype=np.float64)
    explained: Floats = np.divide(total, residual, out=np.ones_like(total), where=residual > 0) - 1
    return np.maximum(explained, 0)


def check_level(level: float) -> None:
    """Refuse an ``interval=`` that is no probability, or beyond the quantiles that are kept."""
    highest = float(LEVELS[-1] - LEVELS[0])
    if not 0 < level <= highest:
        raise ValueError(f"interval={level}: expected a probability above 0 and up to {highest:.3f}, as 0.9.")
