"""Standard deviation of a new measurement about its prediction: by gene and level, by distance and novelty."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear

BINS = 24
PRIOR_SPOTS = 10.0  # held-out spots at which a gene's own factor has the weight of the common trend
CHUNK = 4096
LENGTHS = (1.0, 2.0, 4.0)  # pitches
MAX_EXPLAINED = 9.0  # s_g of a gene with nine tenths of its variance explained; estimates beyond are noise
RIDGE = 0.05  # of the residuals' number: slopes without evidence stay at 0
LOWER, UPPER = (0.2, 0.0, 0.0), (5.0, 1.0, 1.0)  # base, a, b

Floats = NDArray[np.float64]
State = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class MeanVarianceTrend:
    """Standard deviation of a new measurement as a function of the predicted mean.

    The variance of log-normalized counts depends on their level: it is small for genes that are rarely detected,
    largest where zeros and counts alternate, and shrinks again for genes that are always detected. All genes share that
    trend, as in voom (Law et al. 2014, Genome Biology), and each gene has its own factor on it.

    Attributes
    ----------
    level, variance
        (b,) predicted means, rising, and the mean squared residual at each.
    factor
        (g,) factor of each gene on the common trend.
    """

    level: Floats
    variance: Floats
    factor: Floats

    @classmethod
    def fit(cls, expression: NDArray[np.float32], predicted: NDArray[np.float32]) -> "MeanVarianceTrend":
        """Fit to measured and held-out predicted expression (n, g) of the same spots; rows of NaN are ignored."""
        rows = np.isfinite(predicted).all(axis=1)
        if rows.sum() < 2:
            raise ValueError(f"{int(rows.sum())} spots with a held-out prediction; a variance needs at least 2.")
        mean = predicted[rows].astype(np.float64)
        squared = (expression[rows] - mean) ** 2
        bins = np.array_split(np.argsort(mean, axis=None, kind="stable"), min(BINS, mean.size))
        level = np.array([mean.ravel()[each].mean() for each in bins])
        variance = np.array([squared.ravel()[each].mean() for each in bins])
        trend = np.interp(mean, level, variance)
        prior = PRIOR_SPOTS * trend.mean(axis=0) + np.finfo(np.float64).tiny
        return cls(level, variance, (squared.sum(axis=0) + prior) / (trend.sum(axis=0) + prior))

    def __call__(self, mean: NDArray[np.float32]) -> NDArray[np.float32]:
        """Standard deviations (m, g) for predicted means (m, g)."""
        std = np.empty(mean.shape, dtype=np.float32)
        for start in range(0, len(mean), CHUNK):  # interp works in float64
            rows = slice(start, start + CHUNK)
            std[rows] = np.sqrt(np.interp(mean[rows], self.level, self.variance) * self.factor)
        return std

    def state(self) -> State:
        """All attributes as named numeric arrays."""
        return {f"trend_{name}": value for name, value in vars(self).items()}

    @classmethod
    def restore(cls, state: Mapping[str, NDArray[np.generic]]) -> "MeanVarianceTrend":
        """Undo :meth:`state`; other entries are ignored."""
        return cls(*(np.asarray(state[f"trend_{name}"], dtype=np.float64) for name in cls.__dataclass_fields__))


@dataclass(frozen=True)
class DistanceInflation:
    """Growth of the variance with distance to the nearest measured spot and with the novelty of the tissue.

    Spots that are left out one at a time have neighbors one pitch away and carry no information about larger gaps;
    spots held out in whole blocks do. With v the variance next to measured spots (:class:`MeanVarianceTrend`), d the
    distance to the nearest measured spot and u the novelty score (:class:`NoveltyDetector`; 1 is typical),

        variance = v (base + a s_g (1 - exp(-(d - near) / length)) + b (u - 1)),    d >= near, u >= 1

    where s_g is the ratio of the variance that the model explains of a gene next to measured spots to the residual
    variance. With a = 1 all of it is lost far away and the variance is the gene's own about its mean; a = 0 is a model
    whose error does not depend on distance. The shape is that of an exponential variogram (Cressie 1993, Statistics for
    Spatial Data, 2.3). All genes share a, b and the length, which single genes are too noisy to estimate.

    Attributes
    ----------
    near, length
        Pitches: median distance of leave-one-out predictions, and the range of the growth.
    base
        Factor next to measured spots.
    distance_slope
        (g,) a s_g.
    novelty_slope
        b.
    max_tested_distance
        Pitches: the largest distance at which predictions were held out.
    """

    near: float
    length: float
    base: float
    distance_slope: Floats
    novelty_slope: float
    max_tested_distance: float

    @classmethod
    def fit(
        cls, squared: Floats, distance: Floats, novelty: Floats, explained: Floats, near: float
    ) -> "DistanceInflation":
        """Fit to squared standardized residuals.

        Parameters
        ----------
        squared
            (n, g), squared residuals over v.
        distance
            (n,) pitches to the nearest spot that the prediction was made from.
        novelty
            (n,) novelty scores.
        explained
            (g,) s_g, of 0 or more.
        near
            Pitches: median distance of leave-one-out predictions.
        """
        explained = np.minimum(explained, MAX_EXPLAINED)
        # Two averages over genes: of all alike, and of each by how much the model explains of it.
        weight = np.stack([np.ones_like(explained), explained / (explained.mean() or 1.0)])
        observed = (squared @ weight.T / weight.shape[1]).T.ravel()  # (2 n,)
        explained_mean = (weight @ explained / len(explained))[:, None]  # (2, 1)
        fits = []
        for length in LENGTHS:
            lost, excess = _lost(distance, near, length), np.maximum(novelty - 1, 0)
            columns = [np.ones(len(observed)), (explained_mean * lost).ravel(), np.tile(excess, 2)]
            ridge = np.diag([0.0, 1.0, 1.0]) * np.sqrt(RIDGE * len(lost))
            table, target = np.vstack([np.stack(columns, axis=1), ridge]), np.append(observed, np.zeros(3))
            solved = lsq_linear(table, target, bounds=(LOWER, UPPER))
            fits.append((solved.cost, length, solved.x))
        _, length, (base, a, b) = min(fits, key=lambda each: each[0])
        return cls(near, length, float(base), a * explained, float(b), float(distance.max()))

    def __call__(self, distance: Floats, novelty: Floats) -> Floats:
        """Factor (m, g) on the variance for distances and novelty scores (m,)."""
        lost, excess = _lost(distance, self.near, self.length), np.maximum(novelty - 1, 0)
        factor: Floats = self.base + lost[:, None] * self.distance_slope + self.novelty_slope * excess[:, None]
        return factor

    def state(self) -> State:
        """All attributes as named numeric arrays."""
        return {f"inflation_{name}": np.atleast_1d(value) for name, value in vars(self).items()}

    @classmethod
    def restore(cls, state: Mapping[str, NDArray[np.generic]]) -> "DistanceInflation":
        """Undo :meth:`state`; other entries are ignored."""
        values = {name: np.asarray(state[f"inflation_{name}"], np.float64) for name in cls.__dataclass_fields__}
        slope = values.pop("distance_slope")
        return cls(distance_slope=slope, **{name: float(value[0]) for name, value in values.items()})


def _lost(distance: Floats, near: float, length: float) -> Floats:
    """Share (n,) of the information from neighbors that is lost at a distance; all of it at infinity."""
    share: Floats = 1 - np.exp(-np.maximum(distance - near, 0) / length)
    return share
