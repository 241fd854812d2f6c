"""Exact Gaussian process regression of expression on place and look (Rasmussen and Williams 2006).

Expression less the gene means of its section is reduced to its leading factors (singular value decomposition), and each
factor t, scaled to unit variance, is a Gaussian process over spots i, j of its own:

    cov(t_i, t_j) = s2 [ (1 - w) M(|p_i - p_j| / l) + w exp(-|q_i - q_j|^2 / 2 r^2) + c + noise (i = j) ]

M is the Matern 3/2 kernel of positions in units of the spot pitch, q the leading principal components of the
standardised features and r a multiple of their median distance. M and the constant c, which lets a section find its own
level, hold within a section only; the look is compared across sections, and that is how one section helps another.

Nothing is set by the single best marginal likelihood (eq. 5.8): a few hundred spots do not tell l from 2l, and the best
fit is overconfident. Predictions are averaged over a small grid of (w, l, r, noise), s2 maximised out, weighted by the
marginal likelihood to the power 0.3 (a power posterior: Gruenwald and van Ommen 2017, Bayesian Analysis). One
eigendecomposition a kernel serves all factors, noises and leave-one-out predictions (eq. 5.12):

    t_i - t_-i = [K^-1 t]_i / [K^-1]_ii

Cost is cubic in the pooled spots: 1 800 take half a minute on a core of its own, 3 600 eight times that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist, pdist
from scipy.special import logsumexp, softmax

from sthisto.models._factors import RANK, forget
from sthisto.models._model import Section
from sthisto.models._standardize import SectionStandardizer

LEVEL = 10.0  # c: prior variance of a section's level, wide against the unit variance of a factor


@dataclass(kw_only=True)
class Gp:
    """One exact Gaussian process per expression factor, averaged over a grid of kernels.

    ``n_factors=None`` takes 15, or 30 above 1 000 training spots; ``n_components`` of the features are compared.
    ``lengths`` l are in units of the spot pitch, ``feature_lengths`` r in units of the median distance of the reduced
    features, ``mixes`` are the w, ``noises`` in units of s2. ``power`` tempers the marginal likelihood.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> xy, look = rng.uniform(0, 8, (60, 2)), rng.normal(size=(60, 5)).astype(np.float32)
    >>> spots = Section(name="a", xy=xy, features=look, expression=look[:, :2] + 3)
    >>> model = Gp()
    >>> held_back = model.fit([spots], random_state=0, device="cpu", progress=False)
    >>> model.predict(Section(name="a", xy=xy[:4], features=look[:4])).shape
    (4, 2)
    """

    n_factors: int | None = None
    n_components: int = 20
    lengths: Sequence[float] = (1.0, 3.0, 9.0)
    feature_lengths: Sequence[float] = (0.7, 1.4)
    mixes: Sequence[float] = (0.3, 0.7)
    noises: Sequence[float] = tuple(np.geomspace(0.03, 100, 11).tolist())
    power: float = 0.3
    history: dict[str, NDArray[np.float64]] = field(default_factory=dict, init=False, repr=False)

    def fit(
        self, sections: Sequence[Section], *, random_state: int, device: str, progress: bool
    ) -> list[NDArray[np.float32]]:
        """Learn without iteration; return the leave-one-out predictions, (n, g) a section.

        A spot's expression is held back from the factors' values, their loadings and the gene means; the scores that
        the loadings are regressed on and the weights of the kernels have seen it.

        Raises
        ------
        ValueError
            Two sections of one name, or one without features or expression.
        """
        centring = SectionStandardizer.of(sections, with_features=True)
        z = np.concatenate([centring.standardised(section) for section in sections])
        # Contiguous, as it comes back from a file: another memory layout can change the last bit of a product.
        axes = np.ascontiguousarray(np.linalg.svd(z, full_matrices=False)[2][: self.n_components].T)  # (d, q)
        y = centring.deviations(sections)
        scores, loadings = _factors(y, self.n_factors or (30 if len(y) > 1000 else 15))
        look = z @ axes
        spots = {
            "xy": np.concatenate([section.xy for section in sections]),
            "section": np.repeat(np.arange(len(sections)), centring.n_spots),
            "look": look,
            "lengths": np.array(self.lengths),
            "feature_lengths": np.array(self.feature_lengths) * (np.median(pdist(look)) or 1.0),
        }
        weights, held_back = self._average(spots, scores)
        self._state: dict[str, NDArray[Any]] = {
            **centring.state(),
            **spots,
            **weights,
            "axes": axes,
            "loadings": loadings,
        }
        return centring.expression(forget(y, scores, loadings, held_back, centring.leverage()))

    def predict(self, points: Section) -> NDArray[np.float32]:
        """Expression (m, g) at the points; of a section that was not fitted, from the look alone.

        Raises
        ------
        ValueError
            No features, or another number of them than in ``fit``.
        """
        centring = SectionStandardizer.restore(self._state)
        base, section = centring.mean_of(points.name), centring.index(points.name)
        predicted = np.empty((len(points), len(base)), dtype=np.float32)
        for rows, z in centring.chunks(points):
            scores = self._scores(points.xy[rows], z @ self._state["axes"], section)
            predicted[rows] = base + scores @ self._state["loadings"]
        return predicted

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Spots, their reduced features and their weight in every kernel and factor."""
        return dict(self._state)

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Take up what :meth:`state` gave."""
        self._state = dict(state)

    def _average(
        self, spots: Mapping[str, NDArray[Any]], scores: NDArray[np.float64]
    ) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64]]:
        """Weigh the kernels; return spots' weights for each length, (lengths, n, f), and held-back scores (n, f)."""
        same = spots["section"][:, None] == spots["section"]
        near = [same * matern(cdist(spots["xy"], spots["xy"]) / length) for length in spots["lengths"]]
        alike = [gauss(cdist(spots["look"], spots["look"]) / length) for length in spots["feature_lengths"]]
        kernels = list(product(range(len(near)), range(len(alike)), self.mixes))
        fits = [self._condition((1 - w) * near[a] + w * alike[b] + LEVEL * same, scores) for a, b, w in kernels]
        shares = softmax([evidence for evidence, _, _ in fits], axis=0)  # (kernels, f)
        by_place = np.zeros((len(near), *scores.shape))
        by_look = np.zeros((len(alike), *scores.shape))
        held_back = np.zeros_like(scores)
        for (a, b, w), share, (_, solved, left_out) in zip(kernels, shares, fits, strict=True):
            by_place[a] += share * (1 - w) * solved
            by_look[b] += share * w * solved
            held_back += share * left_out
        every = by_place.sum(axis=0) + by_look.sum(axis=0)  # the level is part of all kernels
        level = [LEVEL * every[spots["section"] == k].sum(axis=0) for k in np.unique(spots["section"])]
        # A section that was not fitted has no level. Its place is taken by the one that makes the training spots, told
        # by their look alone, average to their gene means; without it the gene means of such a section are off.
        level.append(-sum(kernel @ weights for kernel, weights in zip(alike, by_look, strict=True)).mean(axis=0))
        return {"by_place": by_place, "by_look": by_look, "level": np.array(level)}, held_back

    def _condition(
        self, kernel: NDArray[np.float64], scores: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Tempered log evidence (f,), K^-1 scores (n, f) and held-back scores (n, f), averaged over the noises."""
        values, vectors = np.linalg.eigh(kernel)
        inverse = 1 / (values.clip(min=0)[:, None] + np.array(self.noises))  # (n, e)
        rotated = vectors.T @ scores
        s2 = (rotated**2).T @ inverse / len(scores)  # (f, e), at its maximum
        likelihood = 0.5 * self.power * (np.log(inverse).sum(axis=0) - len(scores) * np.log(s2))
        share = softmax(likelihood, axis=1)
        solved = np.stack([vectors @ (rotated * column[:, None]) for column in inverse.T], axis=-1)  # (n, f, e)
        left_out = scores[..., None] - solved / (vectors**2 @ inverse)[:, None, :]
        return logsumexp(likelihood, axis=1), (solved * share).sum(axis=-1), (left_out * share).sum(axis=-1)

    def _scores(self, xy: NDArray[np.float64], look: NDArray[np.float64], section: int) -> NDArray[np.float64]:
        """Factors (m, f) at points of the section, -1 for one that was not fitted."""
        state = self._state
        unlike = cdist(look, state["look"])
        scores = np.tile(state["level"][section], (len(look), 1))
        for length, weights in zip(state["feature_lengths"], state["by_look"], strict=True):
            scores += gauss(unlike / length) @ weights
        if section >= 0:
            own = state["section"] == section
            away = cdist(xy, state["xy"][own])
            for length, weights in zip(state["lengths"], state["by_place"], strict=True):
                scores += matern(away / length) @ weights[own]
        return scores


def _factors(y: NDArray[np.float64], n_factors: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Leading factors of y (n, g): scores (n, f) of unit variance and loadings (f, g)."""
    u, s, vt = np.linalg.svd(y, full_matrices=False)
    f = min(n_factors, int((s > RANK * s[0]).sum()))
    return u[:, :f] * np.sqrt(len(y)), s[:f, None] * vt[:f] / np.sqrt(len(y))


def matern(r: NDArray[np.float64]) -> NDArray[np.float64]:
    """Matern 3/2 correlation at distances in units of its length."""
    scaled = np.sqrt(3) * r
    correlation: NDArray[np.float64] = (1 + scaled) * np.exp(-scaled)
    return correlation


def gauss(r: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared-exponential correlation at distances in units of its length."""
    correlation: NDArray[np.float64] = np.exp(-0.5 * r**2)
    return correlation
