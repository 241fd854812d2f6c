"""Exact Gaussian process regression of expression on position and image features (Rasmussen and Williams 2006).

Expression less the gene means of its section is reduced to its leading factors (singular value decomposition), and each
factor t, scaled to unit variance, is a Gaussian process over spots i, j of its own:

    cov(t_i, t_j) = s2 [ (1 - w) M(|p_i - p_j| / l) + w exp(-|q_i - q_j|^2 / 2 r^2) + c + noise (i = j) ]

M is the Matern 3/2 kernel of positions in units of the spot pitch, q the leading principal components of the
standardized features and r a multiple of their median distance. M and the constant c, which gives a section a level of
its own, hold within a section only; features are compared across sections, and that is how one section helps another.

No hyperparameter is set by the single best marginal likelihood (eq. 5.8): a few hundred spots do not distinguish l from
2 l, and the best fit is overconfident. Predictions are averaged over a small grid of (w, l, r, noise), s2 maximized
out, weighted by the marginal likelihood to the power 0.3 (a power posterior: Gruenwald and van Ommen 2017, Bayesian
Analysis). It is the kriging of ``models/_kernels.py`` with every spot as an inducing point, all of the same precision;
``model="attention"`` is linear in the spots, weights them, and registers sections.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sthisto._messages import warn
from sthisto._statistics import leading_components
from sthisto.models._factors import TINY, leave_one_out_expression
from sthisto.models._kernels import KernelValues, Spots
from sthisto.models._kriging import Kriging, Solution
from sthisto.models._model import HeldOut, Section, State
from sthisto.models._standardize import SectionStandardizer

MANY = 5000  # spots above which the cost, cubic in them, is worth a warning
SAMPLE = 500  # spots by which the scale of the features is chosen

Floats = NDArray[np.float64]


@dataclass(kw_only=True)
class Gp(Kriging):
    """One exact Gaussian process per expression factor, averaged over a grid of kernels.

    Parameters
    ----------
    n_factors
        Factors of expression; ``None`` takes 15, or 30 above 1 000 training spots.
    n_components
        Leading components of the image features that are compared.
    lengths
        Lengths l of the position kernel, in spot pitches.
    feature_lengths
        Lengths r of the feature kernel, in units of the median distance of the reduced features.
    feature_weights
        Weights w of the feature kernel.
    noises
        Noise variances, in units of s2.
    power
        Exponent of the marginal likelihood by which kernels are averaged.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> xy, features = rng.uniform(0, 8, (60, 2)), rng.normal(size=(60, 5)).astype(np.float32)
    >>> spots = Section(name="a", xy=xy, features=features, expression=features[:, :2] + 3)
    >>> model = Gp()
    >>> held_out = model.fit([spots])
    >>> model.predict(Section(name="a", xy=xy[:4], features=features[:4])).shape
    (4, 2)
    """

    def _fit(
        self, sections: Sequence[Section], *, random_state: int, device: str | None, progress: bool
    ) -> tuple[State, HeldOut]:
        _warn_if_many(sum(map(len, sections)))
        standardizer = SectionStandardizer.of(sections, with_features=True)
        y, leverage = standardizer.deviations(sections), standardizer.leverage()
        z, loadings = _factors(y, self._number_of_factors(*y.shape))
        xy, ones = np.concatenate([section.xy for section in sections]), np.ones(len(y))
        section = np.repeat(np.arange(len(sections)), standardizer.n_spots)
        sample = np.sort(np.random.default_rng(random_state).permutation(len(y))[:SAMPLE])

        def evidence(features: Floats, lengths: Floats) -> float:
            spots = Spots(xy, features, section, section, ones)[sample]
            return self._average(lengths).evidence(spots, z[sample], ones[sample])

        standardizer, components, features, lengths = self._reduce(sections, standardizer, sample, evidence)
        spots, average = Spots(xy, features, section, section, ones), self._average(lengths)
        values, held_out = average.solve(spots, np.arange(len(y)), z, ones)
        levels = [values.level(section == each) for each in range(len(sections))]
        state = {
            **standardizer.state(),
            **{f"inducing_{name}": array for name, array in vars(spots).items()},
            "components": components,
            "lengths": average.lengths,
            "feature_lengths": lengths,
            "position_values": values.position,
            "feature_values": values.features,
            "level": np.array([*levels, average.unfitted_level(spots, spots, values)]),
            "loadings": loadings,
        }
        influence = z / ((z**2).sum(axis=0) + TINY)
        predicted = leave_one_out_expression(y, z, loadings, held_out, leverage, influence=influence)
        return state, standardizer.expression(predicted)

    def _solution(self, state: State, section: int) -> Solution:
        inducing = Spots(*(state[f"inducing_{name}"] for name in Spots.__dataclass_fields__))
        values = KernelValues(state["position_values"], state["feature_values"])
        return inducing, values, state["level"][section], state["loadings"]


def _factors(y: Floats, n_factors: int) -> tuple[Floats, Floats]:
    """Leading factors of y (n, g): scores (n, f) of unit variance and loadings (f, g)."""
    axes = leading_components([y], n_factors)
    scores = y @ axes
    scale = np.sqrt((scores**2).mean(axis=0))
    return scores / (scale + TINY), scale[:, None] * axes.T


def _warn_if_many(n: int) -> None:
    if n > MANY:
        warn(
            f"gp is exact, so its cost grows with the cube of the spots: {n} need about {n**2 * 100 / 1e9:.0f} GB "
            f"and {(n / 1800) ** 3 / 2:.0f} minutes on one core. model='attention' is linear in the spots."
        )
