"""Ridge regression on image features: the head of the HEST benchmark (Jaume et al. 2024, arXiv 2406.16192).

Features are standardised, reduced to 256 principal components and mapped to every gene linearly,

    y(f) = mean + W^T P^T (f - m) / s,    W = argmin |Y - Z P W|^2 + alpha |W|^2

with means and standardisation per section (Z: standardised features, P: components, Y: expression less the gene means).
HEST sets alpha = 100 / (components x genes), next to none; here alpha is the one of a log grid with least leave-one-out
error over all genes, which the singular value decomposition Z P = U S V^T gives in closed form (Golub, Heath and Wahba
1979; Hastie et al., The Elements of Statistical Learning, eq. 7.64). An alpha for every gene was tried and is worse: a
few hundred noisy spots do not carry a thousand choices.

    y_i - y_-i = (y_i - y^_i) / (1 - h_ii),    h_ii = 1 / n_section + sum_k U_ik^2 S_k^2 / (S_k^2 + alpha)

It sees the tissue and not the place: what it explains, the image explains.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sthisto.models._model import Section
from sthisto.models._standardize import SectionStandardizer

RANK = 1e-10  # singular values below this share of the first are rounding noise


@dataclass(kw_only=True)
class Ridge:
    """Linear map from ``n_components`` principal components of the features to every gene.

    ``alphas`` is the grid of penalties, in units of the number of spots.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> xy, look = rng.uniform(0, 8, (60, 2)), rng.normal(size=(60, 5)).astype(np.float32)
    >>> spots = Section(name="a", xy=xy, features=look, expression=look[:, :2] + 3)
    >>> model = Ridge()
    >>> held_back = model.fit([spots], random_state=0, device="cpu", progress=False)
    >>> model.predict(Section(name="a", xy=xy[:4], features=look[:4])).shape
    (4, 2)
    """

    n_components: int = 256
    alphas: Sequence[float] = tuple((10.0 ** (np.arange(-6, 9) / 2)).tolist())
    history: dict[str, NDArray[np.float64]] = field(default_factory=dict, init=False, repr=False)

    def fit(
        self, sections: Sequence[Section], *, random_state: int, device: str, progress: bool
    ) -> list[NDArray[np.float32]]:
        """Learn in closed form; return the leave-one-out predictions, (n, g) a section.

        A spot's expression is held back, its image is not: it takes part in the standardisation and the components.

        Raises
        ------
        ValueError
            Two sections of one name, or one without features or expression.
        """
        centring = SectionStandardizer.of(sections, with_features=True)
        z = np.concatenate([centring.standardised(section) for section in sections])
        y = centring.deviations(sections)
        u, s, vt = np.linalg.svd(z, full_matrices=False)
        kept = slice(min(self.n_components, int((s > s[0] * RANK).sum())))
        u, s, vt = u[:, kept], s[kept], vt[kept]
        shrink, held_back = self._choose(u, s, y, centring.leverage())
        coefficients = vt.T @ ((shrink / s)[:, None] * (u.T @ y))
        self._state: dict[str, NDArray[Any]] = {**centring.state(), "coefficients": coefficients.astype(np.float32)}
        return centring.expression(held_back)

    def predict(self, points: Section) -> NDArray[np.float32]:
        """Expression (m, g) at the points.

        Raises
        ------
        ValueError
            No features, or another number of them than in ``fit``.
        """
        centring = SectionStandardizer.restore(self._state)
        base = centring.mean_of(points.name)
        predicted = np.empty((len(points), len(base)), dtype=np.float32)
        for rows, z in centring.chunks(points):
            predicted[rows] = base + z @ self._state["coefficients"]
        return predicted

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Section statistics and coefficients (d, g)."""
        return dict(self._state)

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Take up what :meth:`state` gave."""
        self._state = dict(state)

    def _choose(
        self,
        u: NDArray[np.float64],  # (n, k)
        s: NDArray[np.float64],  # (k,)
        y: NDArray[np.float64],  # (n, g)
        leverage: NDArray[np.float64],  # (n, 1), of the section means
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Shrinkage of the components (k,) and leave-one-out predictions (n, g) at the alpha of least error."""
        rotated = u.T @ y
        least = np.inf
        for alpha in sorted(self.alphas, reverse=True):  # strongest first: a tie goes to the plainer model
            d = s**2 / (s**2 + alpha * len(y))
            with np.errstate(invalid="ignore"):  # a spot alone in its section cannot be held back: 0 / 0
                error = (y - u @ (d[:, None] * rotated)) / (1 - leverage - (u**2 @ d)[:, None])
            loss = np.nansum(error**2)
            if loss < least:
                least, shrink, held_back = loss, d, y - error
        return shrink, held_back
