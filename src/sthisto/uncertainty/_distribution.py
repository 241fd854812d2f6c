r"""The distribution of a new measurement about its prediction: zeros, and what is measured where there is no zero.

Log-normalised counts are not normal. Most values of most genes are exactly 0, and the rest lie far from it, so that no
multiple of a standard deviation covers a given share. With x = log(m / mean of the gene) for a predicted mean m,

    P(y = 0) = exp(-a_g e^(p x))
    y | y > 0 = typical_g location(x) + spread_g width(x) e,    e from what gene g showed on held-back spots

a_g is set so that the expected number of zeros is the number seen, the power p (shared) by likelihood: without
overdispersion and differences of depth it would be 1 (a Poisson count). ``location`` and ``width`` are curves over x
that all genes share, because depth differs over a tissue and with it what one molecule weighs. The quantiles of e are
each gene's own, from standardised residuals of spots that were held back, placed at k / (n + 1) as in split-conformal
prediction (Vovk et al. 2019, doi:10.1007/s10994-018-5755-8; Lei et al. 2018, doi:10.1080/01621459.2017.1307116), with
the weight of a few spots from genes of a like level, as rare genes have few values above 0 of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LOWEST_LEVEL = 0.05  # of a gene's mean: predictions below say no more than that there is next to nothing
POWERS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
HALVINGS = 14  # to less than a thousandth
RANGE = 30.0  # the search for a_g goes from its value without x divided by this to times this
ENOUGH_SPOTS, ENOUGH_GENES = 1000, 200  # to choose the power by
BINS = 12  # of the shared curves
BAND = 50  # genes of a like level
PRIOR_SPOTS = 20  # that these count for beside a gene's own
_TAIL = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45)
LEVELS = np.array([*_TAIL, 0.5, *(1 - tail for tail in reversed(_TAIL))])

Floats = NDArray[np.float64]
Curve = tuple[Floats, Floats]


@dataclass(frozen=True)
class PredictiveDistribution:
    """What may be measured where a mean was predicted.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> rate = rng.uniform(0.2, 2, (400, 30))
    >>> outcomes = PredictiveDistribution.fit(rng.poisson(rate).astype(float), rate, np.ones((400, 30)))
    >>> new = rng.poisson(rate[:5])
    >>> low, high = (outcomes.quantile(p, rate[:5], np.ones((5, 30))) for p in (0.01, 0.99))
    >>> bool(((low <= new) & (new <= high)).mean() > 0.95)
    True
    """

    mean: Floats  # (g,) of each gene
    zeros: Floats  # (g,) a_g
    power: float
    typical: Floats  # (g,) mean of the values above 0
    location: Curve
    spread: Floats  # (g,)
    width: Curve
    quantiles: Floats  # (levels, g) of e

    @classmethod
    def fit(cls, measured: Floats, predicted: Floats, wider: Floats) -> "PredictiveDistribution":
        """Learn from spots that were held back.

        Parameters
        ----------
        measured, predicted
            (n, g), non-negative.
        wider
            (n, g), times that the deviation is what it is next to measured spots.
        """
        mean = measured.mean(axis=0) + np.finfo(np.float64).tiny
        x, seen = _relative(predicted, mean), measured > 0
        empty = (~seen).sum(axis=0)
        power = _power(x, seen)
        typical = np.divide(measured.sum(axis=0), seen.sum(axis=0), out=np.ones_like(mean), where=seen.any(axis=0))
        location = _curve(x, measured / typical, seen)
        residual = (measured - typical * np.interp(x, *location)) / wider
        common = (residual**2).mean(where=seen) if seen.any() else 0.0
        enough = PRIOR_SPOTS / 2
        own = (residual**2).sum(axis=0, where=seen) + enough * common
        spread = np.sqrt(own / (seen.sum(axis=0) + enough)) + np.finfo(np.float64).tiny
        squares = _curve(x, (residual / spread) ** 2, seen)
        width = squares[0], np.sqrt(squares[1])
        standard = np.where(seen, residual / (spread * np.maximum(np.interp(x, *width), 1e-6)), np.nan)
        zeros = _zeros(np.exp(power * x), empty)
        return cls(mean, zeros, power, typical, location, spread, width, _quantiles(standard, mean))

    def quantile(self, p: float, predicted: NDArray[np.floating], wider: Floats) -> Floats:
        """Value (m, g) below which a new measurement lies with probability p, for predicted means (m, g)."""
        empty, middle, width = self._parts(predicted, wider)
        above = np.clip((p - empty) / np.maximum(1 - empty, 1e-12), 0, 1)
        deviation = np.empty_like(empty)
        for gene in range(empty.shape[1]):
            deviation[:, gene] = np.interp(above[:, gene], LEVELS, self.quantiles[:, gene])
        return np.where(p <= empty, 0, np.maximum(middle + width * deviation, 0))

    def cumulative(self, values: Floats, predicted: NDArray[np.floating], wider: Floats) -> tuple[Floats, Floats]:
        """Probability (m, g) to measure less than the values, and that or less; they differ at 0 alone.

        A number drawn evenly between the two is evenly distributed over (0, 1) where the distribution is right: the
        randomised probability integral transform (Czado, Gneiting and Held 2009, doi:10.1111/j.1541-0420.2009.01191.x).
        Beyond the quantiles that are kept, the tail's probability is given as its half.
        """
        empty, middle, width = self._parts(predicted, wider)
        deviation, above = (values - middle) / np.maximum(width, np.finfo(np.float64).tiny), np.empty_like(empty)
        for gene in range(empty.shape[1]):
            above[:, gene] = np.interp(
                deviation[:, gene], self.quantiles[:, gene], LEVELS, left=LEVELS[0] / 2, right=(1 + LEVELS[-1]) / 2
            )
        whole = empty + (1 - empty) * above
        return np.where(values <= 0, 0, whole), np.where(values <= 0, empty, whole)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Give everything as named numeric arrays."""
        return {f"outcomes_{name}": np.asarray(value) for name, value in vars(self).items()}

    @classmethod
    def restore(cls, state: Mapping[str, NDArray[np.generic]]) -> "PredictiveDistribution":
        """Undo :meth:`state`; other entries are left alone."""
        found = {name: np.asarray(state[f"outcomes_{name}"], dtype=np.float64) for name in cls.__dataclass_fields__}
        at, of = found["location"], found["width"]
        return cls(
            found["mean"],
            found["zeros"],
            float(found["power"]),
            found["typical"],
            (at[0], at[1]),
            found["spread"],
            (of[0], of[1]),
            found["quantiles"],
        )

    def _parts(self, predicted: NDArray[np.floating], wider: Floats) -> tuple[Floats, Floats, Floats]:
        """Probability of 0, middle and width (m, g) of what is not."""
        x = _relative(predicted, self.mean)
        middle = self.typical * np.interp(x, *self.location)
        return np.exp(-self.zeros * np.exp(self.power * x)), middle, self.spread * np.interp(x, *self.width) * wider


def _relative(predicted: NDArray[np.floating], mean: Floats) -> Floats:
    relative: Floats = np.log(np.maximum(predicted / mean, LOWEST_LEVEL))
    return relative


def _zeros(level: Floats, empty: NDArray[np.int64]) -> Floats:
    """a_g (g,) for which the chances of 0, exp(-a_g level), add up to the zeros, half of one more or less."""
    expected = (empty + 0.5) / (len(level) + 1)
    low = np.log(-np.log(expected) / RANGE)
    high = low + 2 * np.log(RANGE)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_many = np.exp(-np.exp(middle) * level).mean(axis=0) > expected
        low, high = np.where(too_many, middle, low), np.where(too_many, high, middle)
    found: Floats = np.exp((low + high) / 2)
    return found


def _power(x: Floats, seen: NDArray[np.bool_]) -> float:
    """Power of the level that makes zeros and others the likeliest."""
    every = tuple(
        slice(None, None, -(-n // most)) for n, most in zip(x.shape, (ENOUGH_SPOTS, ENOUGH_GENES), strict=True)
    )
    x, seen = x[every], seen[every]
    likelihood = []
    for power in POWERS:
        level = np.exp(power * x)
        chance = _zeros(level, (~seen).sum(axis=0)) * level
        likelihood.append(np.where(seen, np.log(-np.expm1(-chance) + 1e-12), -chance).sum())
    return POWERS[int(np.argmax(likelihood))]


def _curve(x: Floats, values: Floats, seen: NDArray[np.bool_]) -> Curve:
    """Mean of the values that were seen, by x: bins of equal size over all genes."""
    if not seen.any():
        return np.zeros(1), np.ones(1)
    at, value = x[seen], values[seen]
    bins = np.array_split(np.argsort(at, kind="stable"), min(BINS, len(at)))
    return np.array([at[rows].mean() for rows in bins]), np.array([value[rows].mean() for rows in bins])


def _quantiles(standard: Floats, mean: Floats) -> Floats:
    """Quantiles (levels, g) of each gene's residuals (n, g), NaN where it was 0, with some from like genes."""
    found = np.zeros((len(LEVELS), len(mean)))
    even = (np.arange(PRIOR_SPOTS) + 0.5) / PRIOR_SPOTS
    order = np.argsort(mean, kind="stable")
    for band in np.array_split(order, max(1, round(len(mean) / BAND))):
        pooled = standard[:, band][np.isfinite(standard[:, band])]
        if not len(pooled):
            continue
        prior = np.quantile(pooled, even)
        for gene in band:
            own = standard[:, gene]
            values = np.sort(np.concatenate([own[np.isfinite(own)], prior]))
            found[:, gene] = np.interp(LEVELS, np.arange(1, len(values) + 1) / (len(values) + 1), values)
    return found
