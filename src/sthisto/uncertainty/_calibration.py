"""Standard deviations, intervals and probabilities of new measurements, from predictions that were held back."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sthisto.uncertainty._distance import DistanceInflation
from sthisto.uncertainty._distribution import LEVELS, PredictiveDistribution
from sthisto.uncertainty._trend import MeanVarianceTrend

CHUNK = 2048

Floats = NDArray[np.float64]
Means = NDArray[np.float32]


@dataclass(frozen=True)
class Covariates:
    """What makes points hard to predict."""

    distance: Floats  # (m,) pitches to the nearest spot that was learnt from; infinite in a section without any
    unlike: Floats  # (m,) how unusual the tissue looks, 1 as usual

    def __getitem__(self, rows: NDArray[np.intp]) -> "Covariates":
        return Covariates(self.distance[rows], self.unlike[rows])

    @classmethod
    def join(cls, parts: "Iterable[Covariates]") -> "Covariates":
        """Pool the points of several sections."""
        distance, unlike = zip(*((part.distance, part.unlike) for part in parts), strict=True)
        return cls(np.concatenate(distance), np.concatenate(unlike))


@dataclass(frozen=True)
class HeldOutPredictions:
    """Spots that were predicted without having been learnt from; rows of NaN were not."""

    measured: Means  # (n, g)
    predicted: Means  # (n, g)
    looked: Covariates

    @classmethod
    def join(cls, parts: "Sequence[HeldOutPredictions]") -> "HeldOutPredictions":
        """Pool the spots of several sections."""
        return cls(
            np.concatenate([part.measured for part in parts]),
            np.concatenate([part.predicted for part in parts]),
            Covariates.join(part.looked for part in parts),
        )

    def there(self) -> "HeldOutPredictions":
        """Only the rows that were predicted, without negative values: predictions have none."""
        rows = np.flatnonzero(np.isfinite(self.predicted).all(axis=1))
        return HeldOutPredictions(self.measured[rows], np.maximum(self.predicted[rows], 0), self.looked[rows])


@dataclass(frozen=True)
class Calibration:
    """What a new measurement may be where a mean was predicted.

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

    spread: MeanVarianceTrend
    reach: DistanceInflation
    outcomes: PredictiveDistribution

    @classmethod
    def fit(cls, left_out: HeldOutPredictions, blocks: HeldOutPredictions | None = None) -> "Calibration":
        """Learn from spots left out among their neighbors, and from others left out in whole blocks.

        Without ``blocks`` nothing tells of larger distances, and the spread does not grow with them.

        Raises
        ------
        ValueError
            Fewer than two spots were held back.
        """
        spread = MeanVarianceTrend.fit(left_out.measured, np.maximum(left_out.predicted, 0))
        left_out = left_out.there()
        parts = [left_out] if blocks is None else [left_out, blocks.there()]
        every = HeldOutPredictions.join(parts).looked
        reach = DistanceInflation.fit(
            np.concatenate([_squared(part, spread) for part in parts]),
            every.distance,
            every.unlike,
            _explained(left_out),
            float(np.median(left_out.looked.distance)),
        )
        wider = np.sqrt(reach(left_out.looked.distance, left_out.looked.unlike))
        outcomes = PredictiveDistribution.fit(
            left_out.measured.astype(np.float64), left_out.predicted.astype(np.float64), wider
        )
        return cls(spread, reach, outcomes)

    def std(self, mean: Means, looked: Covariates) -> Means:
        """Give the standard deviation (m, g) of a new measurement where the means (m, g) are predicted."""
        std = np.empty(mean.shape, dtype=np.float32)
        for rows, wider in self._rows(looked):
            std[rows] = self.spread(mean[rows]) * wider
        return std

    def interval(self, mean: Means, looked: Covariates, level: float) -> tuple[Means, Means]:
        """Give bounds (m, g) that hold a new measurement with probability ``level``, as much missing on either side.

        Raises
        ------
        ValueError
            A level that is no probability, or above 0.998.
        """
        check_level(level)
        low, high = (np.empty(mean.shape, dtype=np.float32) for _ in range(2))
        for rows, wider in self._rows(looked):
            for bound, p in ((low, (1 - level) / 2), (high, (1 + level) / 2)):
                bound[rows] = self.outcomes.quantile(p, mean[rows].astype(np.float64), wider)
        return low, high

    def cumulative(self, values: Means, mean: Means, looked: Covariates) -> tuple[Floats, Floats]:
        """Give the probability (m, g) to measure less than the values, and that or less."""
        wider = np.sqrt(self.reach(looked.distance, looked.unlike))
        return self.outcomes.cumulative(values.astype(np.float64), mean.astype(np.float64), wider)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Give everything as named numeric arrays."""
        return {**self.spread.state(), **self.reach.state(), **self.outcomes.state()}

    @classmethod
    def restore(cls, state: Mapping[str, NDArray[np.generic]]) -> "Calibration":
        """Undo :meth:`state`; other entries are left alone."""
        return cls(
            MeanVarianceTrend.restore(state), DistanceInflation.restore(state), PredictiveDistribution.restore(state)
        )

    def _rows(self, looked: Covariates) -> Iterator[tuple[slice, Floats]]:
        """Rows, a few at a time as the steps between are in float64, and how much wider (m, g) the spread is there."""
        for start in range(0, len(looked.distance), CHUNK):
            rows = slice(start, start + CHUNK)
            yield rows, np.sqrt(self.reach(looked.distance[rows], looked.unlike[rows]))


def _squared(part: HeldOutPredictions, spread: MeanVarianceTrend) -> Floats:
    """Squared residuals (n, g) in units of the variance; 1 where a gene has none."""
    variance = spread(part.predicted).astype(np.float64) ** 2
    squared: Floats = (part.measured - part.predicted).astype(np.float64) ** 2
    return np.divide(squared, variance, out=np.ones_like(variance), where=variance > 0)


def _explained(left_out: HeldOutPredictions) -> Floats:
    """Variance (g,) that the model explains next to measured spots, relative to what it leaves."""
    missed = ((left_out.measured - left_out.predicted) ** 2).mean(axis=0, dtype=np.float64)
    varied = left_out.measured.var(axis=0, dtype=np.float64)
    explained: Floats = np.divide(varied, missed, out=np.ones_like(varied), where=missed > 0) - 1
    return np.maximum(explained, 0)


def check_level(level: float) -> None:
    """Refuse what is no probability, or more than the quantiles that are kept tell of."""
    most = float(LEVELS[-1] - LEVELS[0])
    if not 0 < level <= most:
        raise ValueError(f"interval={level}: expected a probability above 0 and up to {most:.3f}, as 0.9.")
