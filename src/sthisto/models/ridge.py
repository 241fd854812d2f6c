"""Ridge regression on image features: the regression of the HEST benchmark (Jaume et al. 2024, arXiv 2406.16192).

Features are standardized, reduced to 256 principal components and mapped to every gene linearly,

    y(f) = mean + W^T P^T (f - m) / s,    W = argmin |Y - Z P W|^2 + alpha |W|^2

with means and standardization per section (Z: standardized features, P: components, Y: expression less the gene means).
HEST sets alpha = 100 / (components x genes), next to none; here alpha is the one of a log grid with least leave-one-out
error over all genes, which the singular value decomposition Z P = U S V^T gives in closed form (Golub, Heath and Wahba
1979; Hastie et al., The Elements of Statistical Learning, eq. 7.64). An alpha for every gene was tried and is worse: a
few hundred noisy spots do not carry a thousand choices. The same error chooses between features standardized column by
column and on one common scale, which suits columns that are principal components.

    y_i - y_-i = (y_i - y^_i) / (1 - h_ii),    h_ii = 1 / n_section + sum_k U_ik^2 S_k^2 / (S_k^2 + alpha)

It reads image features and no positions: what it explains, the image explains.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sthisto._statistics import leading_components
from sthisto.models._model import Count, HeldOut, Model, NonNegative, Section, State
from sthisto.models._standardize import STATE, SectionStandardizer

Floats = NDArray[np.float64]


@dataclass(kw_only=True)
class Ridge(Model):
    """Linear map from principal components of the image features to every gene.

    Parameters
    ----------
    n_components
        Principal components of the features.
    alphas
        Penalties to choose from, in units of the number of spots.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> xy, features = rng.uniform(0, 8, (60, 2)), rng.normal(size=(60, 5)).astype(np.float32)
    >>> spots = Section(name="a", xy=xy, features=features, expression=features[:, :2] + 3)
    >>> model = Ridge()
    >>> held_out = model.fit([spots])
    >>> model.predict(Section(name="a", xy=xy[:4], features=features[:4])).shape
    (4, 2)
    """

    n_components: Count = 256
    alphas: Sequence[NonNegative] = tuple((10.0 ** (np.arange(-6, 9) / 2)).tolist())

    state_names = (*STATE, "coefficients")

    def _fit(
        self, sections: Sequence[Section], *, random_state: int, device: str | None, progress: bool
    ) -> tuple[State, HeldOut]:
        by_column = SectionStandardizer.of(sections, with_features=True)
        y, leverage = by_column.deviations(sections), by_column.leverage()
        on_one_scale = replace(by_column, common_scale=True)
        fits = []
        for standardizer in (by_column, on_one_scale):
            z = np.concatenate([standardizer.standardized(section) for section in sections])
            fits.append((standardizer, *self._regress(z, y, leverage)))
        errors = [((y - held_out) ** 2).sum(axis=1) for _, _, held_out in fits]
        standardizer, coefficients, held_out = fits[int(_is_clearly_less(errors[1], errors[0]))]
        return {**standardizer.state(), "coefficients": coefficients}, standardizer.expression(held_out)

    def _predict(self, points: Section, state: State) -> NDArray[np.float32]:
        standardizer = SectionStandardizer.restore(state)
        mean = standardizer.mean_of(points.name)
        predicted = np.empty((len(points), len(mean)), dtype=np.float32)
        for rows, z in standardizer.chunks(points):
            predicted[rows] = mean + z @ state["coefficients"]
        return predicted

    def _regress(self, z: Floats, y: Floats, leverage: Floats) -> tuple[NDArray[np.float32], Floats]:
        """Coefficients (d, g) and leave-one-out predictions (n, g) of features (n, d)."""
        components = leading_components([z], self.n_components)
        u = z @ components
        s = np.linalg.norm(u, axis=0)
        u /= np.where(s > 0, s, 1)
        rotated = u.T @ y
        least = np.inf
        for alpha in sorted(self.alphas, reverse=True):  # strongest first: a tie goes to the simpler model
            scale = np.where(s > 0, s, 1) ** 2
            shrinkage = np.where(s > 0, scale / (scale + alpha * len(y)), 0)
            with np.errstate(invalid="ignore"):  # a spot alone in its section cannot be held out: 0 / 0
                error = (y - u @ (shrinkage[:, None] * rotated)) / (1 - leverage - (u**2 @ shrinkage)[:, None])
            loss = np.nansum(error**2)
            if loss < least:
                least, best, held_out = loss, shrinkage, y - error
        coefficients = components @ ((best / np.where(s > 0, s, 1))[:, None] * rotated)
        return coefficients.astype(np.float32), held_out


def _is_clearly_less(one: Floats, other: Floats) -> bool:
    """Whether errors (n,) of the same spots are less by two standard errors: a rule should not follow noise."""
    difference = (other - one)[np.isfinite(other - one)]
    return bool(difference.sum() > 2 * np.sqrt(len(difference)) * difference.std())
