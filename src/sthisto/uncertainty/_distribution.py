"""Distribution of a new measurement about its prediction: the probability of a zero, and quantiles of the rest."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LOWEST, HIGHEST = 0.05, 1e6  # of a gene's mean: predictions beyond are taken for these
POWERS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
HALVINGS = 14  # to less than a thousandth
RANGE = 30.0  # the search for a_g goes from its value without x divided by this to times this
ENOUGH_SPOTS, ENOUGH_GENES = 1000, 200  # to choose the power by
BINS = 12  # of the shared curves
BAND = 50  # genes of similar level
PRIOR_SPOTS = 20  # weight of these beside a gene's own residuals
_TAIL = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45)
LEVELS = np.array([*_TAIL, 0.5, *(1 - tail for tail in reversed(_TAIL))])

Floats = NDArray[np.float64]
Curve = tuple[Floats, Floats]


@dataclass(frozen=True)
class PredictiveDistribution:
    r"""Zero-inflated distribution of a new measurement where a mean was predicted.

    Log-normalized counts are not normal: most values of most genes are exactly 0 and the rest are far from it, so no
    multiple of a standard deviation covers a given share. With x = log(m / mean of the gene) for a predicted mean m,

        P(y = 0) = exp(-a_g e^(p x))
        y | y > 0 = typical_g location(x) + scale_g width(x) e,    e from the held-out residuals of gene g

    a_g is set so that the expected number of zeros is the observed one, the power p (shared) by likelihood: without
    overdispersion and differences of depth it would be 1 (a Poisson count). ``location`` and ``width`` are curves over
    x that all genes share, because depth varies over a tissue and with it the value of one molecule. The quantiles of e
    are each gene's own, from standardized residuals of held-out spots, placed at k / (n + 1) as in split-conformal
    prediction (Vovk et al. 2019, doi:10.1007/s10994-018-5755-8; Lei et al. 2018, doi:10.1080/01621459.2017.1307116),
    with the weight of a few spots from genes of similar level, as rare genes have few values above 0 of their own. A
    gene without any count among the held-out spots has x = 0 everywhere.

    Attributes
    ----------
    mean
        (g,) of each gene over the held-out spots.
    zeros
        (g,) a_g.
    power
        p.
    typical
        (g,) mean of the values above 0.
    location, width
        Curves over x: positions and values.
    scale
        (g,) standard deviation of the values above 0.
    quantiles
        (levels, g) of e.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> rate = rng.uniform(0.2, 2, (400, 30))
    >>> distribution = PredictiveDistribution.fit(rng.poisson(rate).astype(float), rate, np.ones((400, 30)))
    >>> new = rng.poisson(rate[:5])
    >>> low, high = (distribution.quantile(p, rate[:5], np.ones((5, 30))) for p in (0.01, 0.99))
    >>> bool(((low <= new) & (new <= high)).mean() > 0.95)
    True
    """

    mean: Floats
    zeros: Floats
    power: float
    typical: Floats
    location: Curve
    scale: Floats
    width: Curve
    quantiles: Floats

    @classmethod
    def fit(cls, measured: Floats, predicted: Floats, factor: Floats) -> "PredictiveDistribution":
        """Fit to held-out spots.

        Parameters
        ----------
        measured, predicted
            (n, g), non-negative.
        factor
            (n, g), the standard deviation in units of that next to measured spots.
        """
        mean = measured.mean(axis=0)
        x, detected = _log_ratio(predicted, mean), measured > 0
        n_detected = detected.sum(axis=0)
        power = _power(x, detected)
        typical = np.divide(measured.sum(axis=0), n_detected, out=np.ones_like(mean), where=n_detected > 0)
        location = _curve(x, measured / typical, detected)
        residual = (measured - typical * np.interp(x, *location)) / factor
        common = (residual**2).mean(where=detected) if detected.any() else 0.0
        prior = PRIOR_SPOTS / 2
        own = (residual**2).sum(axis=0, where=detected) + prior * common
        scale = np.sqrt(own / (n_detected + prior)) + np.finfo(np.float64).tiny
        squares = _curve(x, (residual / scale) ** 2, detected)
        width = squares[0], np.sqrt(squares[1])
        standard = np.where(detected, residual / (scale * np.maximum(np.interp(x, *width), 1e-6)), np.nan)
        zeros = _zeros(np.exp(power * x), len(x) - n_detected)
        return cls(mean, zeros, power, typical, location, scale, width, _quantiles(standard, mean))

    def quantile(self, p: float, predicted: NDArray[np.floating], factor: Floats) -> Floats:
        """Quantile (m, g) at probability p of a new measurement, for predicted means (m, g)."""
        zero, middle, width = self._parts(predicted, factor)
        above = np.clip((p - zero) / np.maximum(1 - zero, 1e-12), 0, 1)
        deviation = np.empty_like(zero)
        for gene in range(zero.shape[1]):
            deviation[:, gene] = np.interp(above[:, gene], LEVELS, self.quantiles[:, gene])
        return np.where(p <= zero, 0, np.maximum(middle + width * deviation, 0))

    def cumulative(self, values: Floats, predicted: NDArray[np.floating], factor: Floats) -> tuple[Floats, Floats]:
        """Probabilities (m, g) of a measurement below the values, and up to them; they differ at 0 alone.

        A number drawn uniformly between the two is uniform over (0, 1) where the distribution is right: the randomized
        probability integral transform (Czado, Gneiting and Held 2009, doi:10.1111/j.1541-0420.2009.01191.x). Beyond the
        quantiles that are kept, the tail's probability is given as its half.
        """
        zero, middle, width = self._parts(predicted, factor)
        deviation, above = (values - middle) / np.maximum(width, np.finfo(np.float64).tiny), np.empty_like(zero)
        for gene in range(zero.shape[1]):
            above[:, gene] = np.interp(
                deviation[:, gene], self.quantiles[:, gene], LEVELS, left=LEVELS[0] / 2, right=(1 + LEVELS[-1]) / 2
            )
        up_to = zero + (1 - zero) * above
        return np.where(values <= 0, 0, up_to), np.where(values <= 0, zero, up_to)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """All attributes as named numeric arrays."""
        return {f"distribution_{name}": np.asarray(value) for name, value in vars(self).items()}

    @classmethod
    def restore(cls, state: Mapping[str, NDArray[np.generic]]) -> "PredictiveDistribution":
        """Undo :meth:`state`; other entries are ignored."""
        names = cls.__dataclass_fields__
        mean, zeros, power, typical, location, scale, width, quantiles = (
            np.asarray(state[f"distribution_{name}"], dtype=np.float64) for name in names
        )
        curves = (location[0], location[1]), (width[0], width[1])
        return cls(mean, zeros, float(power), typical, curves[0], scale, curves[1], quantiles)

    def _parts(self, predicted: NDArray[np.floating], factor: Floats) -> tuple[Floats, Floats, Floats]:
        """Probability of 0, middle and width (m, g) of the values above."""
        x = _log_ratio(predicted, self.mean)
        middle = self.typical * np.interp(x, *self.location)
        return np.exp(-self.zeros * np.exp(self.power * x)), middle, self.scale * np.interp(x, *self.width) * factor


def _log_ratio(predicted: NDArray[np.floating], mean: Floats) -> Floats:
    """Logarithm (m, g) of predicted means over the genes' means; 0 for a gene without counts."""
    ratio = np.divide(predicted, mean, out=np.ones(predicted.shape), where=mean > HIGHEST * np.finfo(np.float64).tiny)
    logarithm: Floats = np.log(ratio.clip(LOWEST, HIGHEST))
    return logarithm


def _zeros(level: Floats, n_zeros: NDArray[np.int64]) -> Floats:
    """a_g (g,) for which the probabilities of 0, exp(-a_g level), add up to the number of zeros (with half a spot)."""
    expected = (n_zeros + 0.5) / (len(level) + 1)
    low = np.log(-np.log(expected) / RANGE)
    high = low + 2 * np.log(RANGE)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_many = np.exp(-np.exp(middle) * level).mean(axis=0) > expected
        low, high = np.where(too_many, middle, low), np.where(too_many, high, middle)
    a: Floats = np.exp((low + high) / 2)
    return a


def _power(x: Floats, detected: NDArray[np.bool_]) -> float:
    """Power of the level with the largest likelihood of zeros and non-zeros."""
    every = tuple(
        slice(None, None, -(-n // most)) for n, most in zip(x.shape, (ENOUGH_SPOTS, ENOUGH_GENES), strict=True)
    )
    x, detected = x[every], detected[every]
    likelihood = []
    for power in POWERS:
        level = np.exp(power * x)
        rate = _zeros(level, (~detected).sum(axis=0)) * level
        likelihood.append(np.where(detected, np.log(-np.expm1(-rate) + 1e-12), -rate).sum())
    return POWERS[int(np.argmax(likelihood))]


def _curve(x: Floats, values: Floats, detected: NDArray[np.bool_]) -> Curve:
    """Mean of the values above 0, by x: bins of equal size over all genes."""
    if not detected.any():
        return np.zeros(1), np.ones(1)
    x, values = x[detected], values[detected]
    bins = np.array_split(np.argsort(x, kind="stable"), min(BINS, len(x)))
    return np.array([x[rows].mean() for rows in bins]), np.array([values[rows].mean() for rows in bins])


def _quantiles(standard: Floats, mean: Floats) -> Floats:
    """Quantiles (levels, g) of each gene's residuals (n, g), NaN where it was 0, with some from genes of its level."""
    quantiles = np.zeros((len(LEVELS), len(mean)))
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
            quantiles[:, gene] = np.interp(LEVELS, np.arange(1, len(values) + 1) / (len(values) + 1), values)
    return quantiles
