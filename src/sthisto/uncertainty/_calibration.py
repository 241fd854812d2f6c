"""Standard deviations, intervals and probabilities of new measurements, from predictions that were held back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sthisto.uncertainty._outcomes import LEVELS, Outcomes
from sthisto.uncertainty._reach import Reach
from sthisto.uncertainty._spread import Spread

CHUNK = 2048

Floats = NDArray[np.float64]
Means = NDArray[np.float32]


@dataclass(frozen=True)
class HeldBack:
    """Spots that were predicted without having been learnt from; rows of NaN were not."""

    measured: Means  # (n, g)
    predicted: Means  # (n, g)
    distance: Floats  # (n,) pitches to the nearest spot that was learnt from
    unlike: Floats  # (n,) how unusual the tissue looks, 1 as usual

    def there(self) -> "HeldBack":
        """Only the rows that were predicted, without negative values: predictions have none."""
        rows = np.isfinite(self.predicted).all(axis=1)
        return HeldBack(
            self.measured[rows], np.maximum(self.predicted[rows], 0), self.distance[rows], self.unlike[rows]
        )


@dataclass(frozen=True)
class Calibration:
    """What a new measurement may be where a mean was predicted.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> rate = rng.uniform(0.5, 2, (300, 20)).astype(np.float32)
    >>> near, usual = np.ones(300), np.ones(300)
    >>> calibration = Calibration.fit(HeldBack(rng.poisson(rate).astype(np.float32), rate, near, usual))
    >>> low, high = calibration.interval(rate[:2], near[:2], usual[:2], 0.9)
    >>> bool((low <= rate[:2]).all() and (rate[:2] <= high).all())
    True
    """

    spread: Spread
    reach: Reach
    outcomes: Outcomes

    @classmethod
    def fit(cls, left_out: HeldBack, blocks: HeldBack | None = None) -> "Calibration":
        """Learn from spots left out among their neighbours, and from others left out in whole blocks.

        Without ``blocks`` nothing tells of larger distances, and the spread does not grow with them.

        Raises
        ------
        ValueError
            Fewer than two spots were held back.
        """
        spread = Spread.fit(left_out.measured, np.maximum(left_out.predicted, 0))
        left_out = left_out.there()
        parts = [left_out] if blocks is None else [left_out, blocks.there()]
        squared = [((part.measured - part.predicted) / spread(part.predicted)) ** 2 for part in parts]
        missed = ((left_out.measured - left_out.predicted) ** 2).mean(axis=0, dtype=np.float64)
        varied = left_out.measured.var(axis=0, dtype=np.float64)
        explained = np.divide(varied, missed, out=np.ones_like(varied), where=missed > 0) - 1
        reach = Reach.fit(
            np.concatenate(squared).astype(np.float64),
            np.concatenate([part.distance for part in parts]),
            np.concatenate([part.unlike for part in parts]),
            np.maximum(explained, 0),
            float(np.median(left_out.distance)),
        )
        wider = np.sqrt(reach(left_out.distance, left_out.unlike))
        outcomes = Outcomes.fit(left_out.measured.astype(np.float64), left_out.predicted.astype(np.float64), wider)
        return cls(spread, reach, outcomes)

    def std(self, mean: Means, distance: Floats, unlike: Floats) -> Means:
        """Give the standard deviation (m, g) of a new measurement.

        Parameters
        ----------
        mean
            (m, g) predicted.
        distance
            (m,) pitches to the nearest measured spot; infinite in a section that has none.
        unlike
            (m,) how unusual the tissue looks, 1 as usual.
        """
        [std] = self._by_rows(
            mean, distance, unlike, 1, lambda part, wider: [self.spread(part.astype(np.float32)) * wider]
        )
        return std

    def interval(self, mean: Means, distance: Floats, unlike: Floats, level: float) -> tuple[Means, Means]:
        """Give bounds (m, g) that hold a new measurement with probability ``level``, as much missing on either side.

        Raises
        ------
        ValueError
            A level that is no probability, or above 0.998.
        """
        check_level(level)
        low, high = self._by_rows(
            mean,
            distance,
            unlike,
            2,
            lambda part, wider: [self.outcomes.quantile(p, part, wider) for p in ((1 - level) / 2, (1 + level) / 2)],
        )
        return low, high

    def cumulative(self, values: Means, mean: Means, distance: Floats, unlike: Floats) -> tuple[Floats, Floats]:
        """Give the probability (m, g) to measure less than the values, and that or less."""
        wider = np.sqrt(self.reach(distance, unlike))
        return self.outcomes.cumulative(values.astype(np.float64), mean.astype(np.float64), wider)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Give everything as named numeric arrays."""
        return {**self.spread.state(), **self.reach.state(), **self.outcomes.state()}

    @classmethod
    def restore(cls, state: Mapping[str, NDArray[np.generic]]) -> "Calibration":
        """Undo :meth:`state`; other entries are left alone."""
        return cls(Spread.restore(state), Reach.restore(state), Outcomes.restore(state))

    def _by_rows(
        self,
        mean: Means,
        distance: Floats,
        unlike: Floats,
        n: int,
        give: Callable[[Floats, Floats], list[NDArray[np.floating]]],
    ) -> list[Means]:
        """Arrays (m, g), some rows at a time: the steps between are in float64."""
        arrays = [np.empty(mean.shape, dtype=np.float32) for _ in range(n)]
        for start in range(0, len(mean), CHUNK):
            rows = slice(start, start + CHUNK)
            wider = np.sqrt(self.reach(distance[rows], unlike[rows]))
            for array, part in zip(arrays, give(mean[rows].astype(np.float64), wider), strict=True):
                array[rows] = part
        return arrays


def check_level(level: float) -> None:
    """Refuse what is no probability, or more than the quantiles that are kept tell of."""
    most = float(LEVELS[-1] - LEVELS[0])
    if not 0 < level <= most:
        raise ValueError(f"interval={level}: expected a probability above 0 and up to {most:.3f}, as 0.9.")
