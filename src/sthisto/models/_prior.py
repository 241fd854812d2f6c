r"""A prior from elsewhere: predictions of another model, calibrated on the training spots, and the rest learned.

A prior gives an expression p for every spot and point: a zero-shot predictor, or a fit of other sections. With p~ its
deviations from its mean over a section's training spots, V its leading axes over genes and y the measured expression,

    y = level + V (s * (p~ V) + f) + noise,     s: slopes, one a factor;  f: what the model learns in the prior's axes

- The level is the section's own mean, since means differ between cohorts more than patterns do.
- Slopes are shrunk towards a common one, as far as their errors require (Efron and Morris 1973; heterogeneity by
  DerSimonian and Laird 1986), and the common one towards a mixture of "useless" (0) and "useful" (about 1). Its error
  is a jackknife over spots: genes and factors of one spot are no independent evidence. No slope is negative.
- The model is fitted twice: on the measured expression, as without a prior, and in the axes of the prior on what the
  prior leaves. The weight between both is a regression on cross-validated predictions, in which prior, slopes and
  models are fitted again without the held-out spots; it starts from the probability that the prior is useful, with the
  weight of ``STRENGTH`` spots. So a prior without information is ignored, and with few spots a useful one decides.

The axes matter as much as the slopes: few spots do not determine loadings, a prior of other sections has them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sthisto._statistics import leading_components
from sthisto.models._model import HeldOut, Model, Section, State
from sthisto.models._standardize import expression_of, pack_names, unpack_names

N_AXES = 15
USEFUL, SLOPE_STD = 0.9, 0.5  # of priors that somebody chose to pass; their slopes are around 1
DEPENDENCE = 2.0  # spots next to each other repeat each other: factor on the variance of a slope
FEW = 12  # spots below which all factors share a slope
STRENGTH = 50  # spots that the weight starts with
N_FOLDS = 5
MANY_SPOTS = 300  # above which the models' own held-out predictions are good enough
EXACT = 1e-9  # share of the variance that is noise at least: a prior may equal the measurement
TINY = np.finfo(np.float64).tiny
PREFIX = "prior."

Floats = NDArray[np.float64]


def slopes(measured: Floats, predicted: Floats) -> tuple[Floats, float]:
    """Slopes (k,) of centered measured on predicted factors (n, k), and the probability that the prior is useful."""
    n = len(measured)
    square, product = (predicted**2).sum(axis=0) + TINY, (measured * predicted).sum(axis=0)
    residual = ((measured**2).sum(axis=0) - product**2 / square) / max(n - 2, 1)
    noise = ((n - 2) * residual + 4 * residual.mean()) / (n + 2) + EXACT * (measured**2).mean() + TINY
    top, bottom = (measured * predicted / noise).sum(axis=1), (predicted**2 / noise).sum(axis=1)
    common = top.sum() / bottom.sum()
    without = (top.sum() - top) / (bottom.sum() - bottom).clip(min=TINY)
    jackknife = (n - 1) / n * ((without - without.mean()) ** 2).sum()
    variance = max(jackknife, DEPENDENCE / bottom.sum())
    useless = -0.5 * (common**2 / variance + np.log(variance))
    wide = variance + SLOPE_STD**2
    useful = -0.5 * ((common - 1) ** 2 / wide + np.log(wide))
    odds = np.clip(useful - useless + np.log(USEFUL / (1 - USEFUL)), -50, 50)
    probability = float(1 / (1 + np.exp(-odds)))
    center = max(0.0, (common * SLOPE_STD**2 + variance) / wide)
    if center == 0:
        probability = 0.0
    if n < FEW:
        return np.full(len(square), probability * center), probability
    return probability * _shrunk(product / square, DEPENDENCE * noise / square, center), probability


def _shrunk(estimates: Floats, variance: Floats, center: float) -> Floats:
    """Non-negative estimates (k,), shrunk towards a center as far as their variances require."""
    weight = 1 / variance
    excess = (weight * (estimates - center) ** 2).sum() - (len(estimates) - 1)
    between = max(excess, 0.0) / max(weight.sum() - (weight**2).sum() / weight.sum(), TINY)
    shrunk: Floats = (center + between / (between + variance) * (estimates - center)).clip(min=0)
    return shrunk


@dataclass(frozen=True)
class PriorRegression:
    """What training spots show of a prior.

    Attributes
    ----------
    names
        Sections (s,).
    level, center
        (s + 1, g) mean of the measured expression and of the prior; the last row pools all training spots.
    axes
        (g, k), orthonormal; genes that the prior lacks have zeros.
    slopes
        (k,).
    useful
        Probability that the prior is of use.
    """

    names: list[str]
    level: Floats
    center: Floats
    axes: Floats
    slopes: Floats
    useful: float

    @classmethod
    def fit(cls, sections: Sequence[Section]) -> "PriorRegression":
        """Regress measured expression on the prior, which NaN columns mark as lacking a gene."""
        measured = [expression_of(each).astype(np.float64) for each in sections]
        priors = [np.nan_to_num(prior_of(each).astype(np.float64)) for each in sections]
        level, center = _means(measured), _means(priors)
        deviations = np.concatenate([p - mean for p, mean in zip(priors, center, strict=False)])
        axes = leading_components([deviations], N_AXES) if deviations.any() else np.empty((deviations.shape[1], 0))
        own = np.concatenate([y - mean for y, mean in zip(measured, level, strict=False)])
        fitted, useful = slopes(own @ axes, deviations @ axes) if axes.size else (np.empty(0), 0.0)
        return cls([each.name for each in sections], level, center, axes, fitted, useful)

    def index(self, name: str) -> int:
        """Row of a section; -1, the pooled one, where it was not fitted."""
        return self.names.index(name) if name in self.names else -1

    def factors(self, points: Section) -> Floats:
        """Contribution (m, k) of the prior in its axes."""
        prior = np.nan_to_num(prior_of(points).astype(np.float64))
        factors: Floats = (prior - self.center[self.index(points.name)]) @ self.axes * self.slopes
        return factors

    def rest(self, section: Section) -> Floats:
        """What the prior leaves (n, k) of a section's expression, in its axes."""
        deviation = expression_of(section) - self.level[self.index(section.name)]
        rest: Floats = deviation @ self.axes - self.factors(section)
        return rest

    def expression(self, factors: Floats, name: str) -> Floats:
        """Expression (m, g) of factors (m, k)."""
        expression: Floats = self.level[self.index(name)] + factors @ self.axes.T
        return expression


@dataclass(kw_only=True)
class WithPrior(Model):
    """A model that starts from the prior its sections bring.

    Parameters
    ----------
    base
        The model, not fitted.

    Examples
    --------
    >>> from sthisto.models.ridge import Ridge
    >>> rng = np.random.default_rng(0)
    >>> xy, features = rng.uniform(0, 8, (60, 2)), rng.normal(size=(60, 5)).astype(np.float32)
    >>> truth = features[:, :3] + 3
    >>> spots = Section(name="a", xy=xy, features=features, expression=truth, prior=2 * truth)
    >>> model = WithPrior(base=Ridge())
    >>> held_out = model.fit([spots])
    >>> model.predict(Section(name="a", xy=xy[:4], features=features[:4], prior=2 * truth[:4])).shape
    (4, 3)
    """

    base: Model

    _pair: "_Pair | None" = field(default=None, init=False, repr=False, compare=False)
    _own_weight: float = field(default=1.0, init=False, repr=False, compare=False)

    state_names = tuple(PREFIX + name for name in ("names", "level", "center", "axes", "slopes", "scalars", "shift"))
    state_prefix = PREFIX

    def __getattr__(self, name: str) -> Any:
        if name in ("rgb", "patch_um", "input_size"):  # what the model reads of an image
            return getattr(self.base, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def _fit(
        self, sections: Sequence[Section], *, random_state: int, device: str | None, progress: bool
    ) -> tuple[State, HeldOut]:
        fit = partial(_Pair.fit, self.base, random_state=random_state, device=device)
        pair = fit(sections, progress=progress)
        self._pair, self.history = pair, pair.own.history
        weight = self._own_weight = 1.0 if pair.rest is None else _weight(sections, pair, fit, random_state)
        regression = pair.regression
        state: State = {
            PREFIX + "names": pack_names(regression.names),
            PREFIX + "level": regression.level,
            PREFIX + "center": regression.center,
            PREFIX + "axes": regression.axes,
            PREFIX + "slopes": regression.slopes,
            PREFIX + "scalars": np.array([weight, regression.useful]),
            PREFIX + "shift": pair.shift,
            **_prefixed("own.", pair.own.state()),
            **_prefixed("rest.", pair.rest.state() if pair.rest is not None else {}),
        }
        return state, [(weight * a + (1 - weight) * b).astype(np.float32) for a, b in pair.held_out]

    def _predict(self, points: Section, state: State) -> NDArray[np.float32]:
        if self._pair is None:
            raise RuntimeError("the model with its prior is neither fitted nor restored.")
        own, rest = self._pair.predict(points)
        return (self._own_weight * own + (1 - self._own_weight) * rest).astype(np.float32)

    def _restored(self, state: State, device: str | None) -> None:
        level, center, axes, fitted, scalars, shift = (state[name] for name in self.state_names[1:])
        names = unpack_names(state[PREFIX + "names"])
        own, rest = replace(self.base), replace(self.base)
        own.restore(_without("own.", state), device=device)
        if axes.size:
            rest.restore(_without("rest.", state), device=device)
        self._own_weight = float(scalars[0])
        regression = PriorRegression(names, level, center, axes, fitted, float(scalars[1]))
        self._pair = _Pair(regression, own, rest if axes.size else None, shift, [])


@dataclass(frozen=True)
class _Pair:
    """The model without the prior, and with it."""

    regression: PriorRegression
    own: Model
    rest: Model | None  # None: the prior is constant
    shift: Floats  # (k,) networks that end in a rectifier predict nothing below 0
    held_out: list[tuple[Floats, Floats]]

    @classmethod
    def fit(
        cls, base: Model, sections: Sequence[Section], *, random_state: int, device: str | None, progress: bool
    ) -> "_Pair":
        """Fit both; the second learns what the prior leaves."""
        regression, own, rest = PriorRegression.fit(sections), replace(base), replace(base)
        plain = [replace(each, prior=None) for each in sections]
        held_out = own.fit(plain, random_state=random_state, device=device, progress=progress)
        first = [each.astype(np.float64) for each in held_out]
        if not regression.axes.size:
            return cls(regression, own, None, np.empty(0), [(each, each) for each in first])
        left = [regression.rest(each) for each in sections]
        shift = np.concatenate(left).min(axis=0)
        targets = [
            replace(each, expression=(part - shift).astype(np.float32)) for each, part in zip(plain, left, strict=True)
        ]
        second = rest.fit(targets, random_state=random_state, device=device, progress=progress)
        both = [
            (a, regression.expression(regression.factors(each) + b + shift, each.name))
            for each, a, b in zip(sections, first, second, strict=True)
        ]
        return cls(regression, own, rest, shift, both)

    def predict(self, points: Section) -> tuple[Floats, Floats]:
        """Predictions (m, g) without the prior and with it."""
        plain = replace(points, expression=None, prior=None)
        own = self.own.predict(plain).astype(np.float64)
        if self.rest is None:
            return own, own
        factors = self.regression.factors(points) + self.rest.predict(plain) + self.shift
        return own, self.regression.expression(factors, points.name)


def prior_of(section: Section) -> NDArray[np.float32]:
    """Give the prior, or raise an error if it is missing."""
    if section.prior is None:
        raise ValueError(f"section {section.name!r} has no prior, and the model was fitted with one: pass prior=.")
    return section.prior


def _weight(sections: Sequence[Section], pair: "_Pair", fit: "Callable[..., _Pair]", random_state: int) -> float:
    """Weight of the model without the prior, by predictions of spots that neither has seen."""
    held_out = any(np.isfinite(own).any() for own, _ in pair.held_out)  # networks do not
    if held_out and sum(map(len, sections)) > MANY_SPOTS:
        both = zip(map(expression_of, sections), pair.held_out, strict=True)
        sums = [_products(measured, *predicted) for measured, predicted in both]
    else:
        sums = []
        for training, points in _folds(sections, random_state, most=N_FOLDS if held_out else 1):
            other = fit(training, progress=False)
            sums += [_products(expression_of(each), *other.predict(each)) for each in points if len(each)]
    start = 1 - pair.regression.useful
    if not sums:
        return start
    products, squares = np.concatenate(sums, axis=1)
    known = STRENGTH * (squares.mean() + TINY)
    return float(np.clip((products.sum() + known * start) / (squares.sum() + known), 0, 1))


def _means(parts: Sequence[Floats]) -> Floats:
    """Means (s + 1, g) of each section, and over all spots."""
    return np.stack([*(each.mean(axis=0) for each in parts), np.concatenate(parts).mean(axis=0)])


def _products(measured: NDArray[np.float32], own: Floats, rest: Floats) -> Floats:
    """Sums (2, n) over genes from which the weight of ``own`` is regressed; rows that were not held out are left."""
    rows = np.isfinite(own).all(axis=1) & np.isfinite(rest).all(axis=1)
    difference, error = own[rows] - rest[rows], measured[rows] - rest[rows]
    return np.stack([(difference * error).sum(axis=1), (difference**2).sum(axis=1)])


def _folds(
    sections: Sequence[Section], random_state: int, *, most: int
) -> Iterator[tuple[list[Section], list[Section]]]:
    """Training spots and those held out, in up to ``most`` folds of a fifth, or of one spot where there are few."""
    random, least = np.random.default_rng(random_state), min(map(len, sections))
    n_folds = N_FOLDS if least >= 2 * N_FOLDS else least
    folds = [random.permutation(len(each)) % n_folds for each in sections]
    for number in range(n_folds if most > 1 else 1) if least > 2 else ():
        pairs = list(zip(sections, folds, strict=True))
        yield (
            [each.keep(np.flatnonzero(fold != number)) for each, fold in pairs],
            [each.keep(np.flatnonzero(fold == number)) for each, fold in pairs],
        )


def _prefixed(name: str, state: Mapping[str, NDArray[Any]]) -> State:
    return {f"{PREFIX}{name}{key}": value for key, value in state.items()}


def _without(name: str, state: Mapping[str, NDArray[Any]]) -> State:
    start = PREFIX + name
    return {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
