"""How fast the spread grows away from measured spots, and on tissue that looks unlike any of them.

Leave-one-out predictions have their neighbors one pitch away and tell nothing of larger gaps. Predictions held back in
whole blocks do. With v the variance next to measured spots (:class:`~sthisto.uncertainty.MeanVarianceTrend`), d the
distance
to
the nearest measured spot and u how unusual the tissue looks (:class:`~sthisto.uncertainty.NoveltyDetector`; 1 is as usual),

    variance = v (base + a s_g (1 - exp(-(d - near) / length)) + b (u - 1)),    d >= near, u >= 1

where s_g is the share of a gene's variance that the model explains next to measured spots, relative to what it leaves.
With a = 1 all of that is lost far away and the variance is the gene's own about its mean; a = 0 is a model that loses
nothing with distance. The shape is that of an exponential variogram (Cressie 1993, Statistics for Spatial Data, 2.3).
All genes share a, b and the length: single genes are too noisy to say.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear

LENGTHS = (1.0, 2.0, 4.0)  # pitches
MOST_EXPLAINED = 9.0  # s_g of a gene of which nine tenths are explained; beyond, few spots exaggerate
HOLD = 0.05  # of the evidence: slopes that nothing speaks for stay at 0
LOWEST, HIGHEST = (0.2, 0.0, 0.0), (5.0, 1.0, 1.0)  # base, a, b

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DistanceInflation:
    """Growth of the variance with distance and unusual tissue."""

    near: float  # pitches: as far as leave-one-out predictions are from their neighbors
    length: float  # pitches
    base: float
    by_place: Floats  # (g,) a s_g
    by_look: float
    tested: float  # pitches: the greatest distance at which predictions were held back

    @classmethod
    def fit(
        cls, squared: Floats, distance: Floats, unlike: Floats, explained: Floats, near: float
    ) -> "DistanceInflation":
        """Learn from squared standardised residuals.

        Parameters
        ----------
        squared
            (n, g), squared residuals over v.
        distance
            (n,) pitches from the nearest spot that each was predicted from.
        unlike
            (n,) how unusual the tissue looks.
        explained
            (g,) s_g, of 0 or more.
        near
            Pitches: the usual distance of leave-one-out predictions.
        """
        explained = np.minimum(explained, MOST_EXPLAINED)
        weight = np.stack([np.ones_like(explained), explained / (explained.mean() or 1.0)])  # all genes, and the loud
        observed = (squared @ weight.T / weight.shape[1]).T.ravel()  # (2 n,)
        lost = (weight @ explained / len(explained))[:, None]  # (2, 1)
        fits = []
        for length in LENGTHS:
            gone, strange = _gone(distance, near, length), np.maximum(unlike - 1, 0)
            columns = [np.ones(len(observed)), (lost * gone).ravel(), np.tile(strange, 2)]
            hold = np.diag([0.0, 1.0, 1.0]) * np.sqrt(HOLD * len(gone))
            table, target = np.vstack([np.stack(columns, axis=1), hold]), np.append(observed, np.zeros(3))
            solved = lsq_linear(table, target, bounds=(LOWEST, HIGHEST))
            fits.append((solved.cost, length, solved.x))
        _, length, (base, a, b) = min(fits, key=lambda each: each[0])
        return cls(near, length, float(base), a * explained, float(b), float(distance.max()))

    def __call__(self, distance: Floats, unlike: Floats) -> Floats:
        """Give the factor (m, g) on the variance for distances and unusualness (m,)."""
        gone, strange = _gone(distance, self.near, self.length), np.maximum(unlike - 1, 0)
        factor: Floats = self.base + gone[:, None] * self.by_place + self.by_look * strange[:, None]
        return factor

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Give everything as named numeric arrays."""
        numbers = np.array([self.near, self.length, self.base, self.by_look, self.tested])
        return {"reach_numbers": numbers, "reach_by_place": self.by_place}

    @classmethod
    def restore(cls, state: Mapping[str, NDArray[np.generic]]) -> "DistanceInflation":
        """Undo :meth:`state`; other entries are left alone."""
        near, length, base, by_look, tested = (float(number) for number in np.asarray(state["reach_numbers"]))
        by_place = np.asarray(state["reach_by_place"], dtype=np.float64)
        return cls(near, length, base, by_place, by_look, tested)


def _gone(distance: Floats, near: float, length: float) -> Floats:
    """Share (n,) of what neighbors tell that is lost at a distance; all of it at infinity."""
    share: Floats = 1 - np.exp(-np.maximum(distance - near, 0) / length)
    return share
