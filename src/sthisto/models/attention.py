r"""Attention over measured spots: a point takes the expression of the spots around it, by place and by look.

HisToSGE's attention (arXiv 2407.20518) never sees the expression measured next to the point that it predicts. Here it
does. Expression, less its section's gene means, is reduced to a few factors z; a point i with reduced features f and
position p (in spot pitches) reads each factor from the anchors j, measured spots, through heads h of two kinds,

    z(i) = sum_h sum_j a_h(i, j) u_hj + level of the section
    a_h(i, j) = M(|p_i - p_j| / l_h)  by place, among spots of the same section (M: Matern 3/2); 0.7 of that among
                sections of one tissue, which are laid over each other first (models/_alignment.py)
    a_h(i, j) = exp(-|f_i - f_j|^2 / 2 r_h^2)  by look, among all sections

The values u are not the measured z themselves but solved from them, so that neighbours who say the same do not count
twice (kriging: Rasmussen and Williams 2006, eq. 2.25), and far from everything the prediction goes back to the gene
means. A softmax with learned metrics in their place was tried and is behind on every section (benchmarks/LABBOOK.md): a
few hundred noisy spots do not carry thousands of weights.

- Spots speak as loudly as they were measured: spot j has noise variance v_j, from a first smoothing, so a spot with few
  molecules counts less, in the factors and as context.
- Sections that do not fit each other are left apart: one of the choices below is that they have nothing to say to each
  other, and where it has the evidence it takes over.
- Nothing is set by a single best choice: heads are mixed over a small grid of (l, r, share of look, noise e), each
  factor its own way, by evidence to the power 0.3 (Gruenwald and van Ommen 2017). With K (n, j) the mixed heads of all
  spots over the anchors, L the Cholesky factor of its anchor rows, D = diag(v) and Psi = D^-1/2 K L^-T, a single
  eigendecomposition Psi^T Psi = B diag(k) B^T serves all factors and noises:

    u = L^-T B diag(1 / (k + e)) B^T Psi^T D^-1/2 z,    evidence: log det(Psi Psi^T + e I),

  and what each spot would be without itself follows from its leverage.
- Up to ``n_anchors`` spots all are anchors and the solution is exact; beyond, a random choice of them carries the map
  (Quinonero-Candela and Rasmussen 2005, section 4) and the cost is linear in the spots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, solve_triangular
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist, pdist
from scipy.special import logsumexp, softmax
from tqdm.auto import tqdm

from sthisto.models import Section
from sthisto.models._alignment import Frames, lay_over
from sthisto.models._sections import Centring
from sthisto.models.gp import LEVEL, RANK, forget, gauss, matern

OUTLYING = 5.0  # features beyond so many deviations are artefacts: folds, ink, dust
SMOOTHING = 1.5  # pitches, of the first smoothing that tells loud spots from quiet ones
LOUDEST = 5.0  # no spot counts for more than this many times the usual, or less than its inverse
LEADING = 8  # factors that sections are laid over each other by
JITTER = 1e-6  # of the anchors' kernel, against rounding

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Spots:
    """What attention compares, for spots or points of all sections in one pool."""

    xy: Floats  # (n, 2) in units of the pitch
    section: NDArray[np.int64]  # (n,), -1 for a section that was not fitted
    frame: NDArray[np.int64]  # (n,), positions compare within a frame
    look: Floats  # (n, q) reduced features

    def __getitem__(self, rows: NDArray[np.intp]) -> "Spots":
        return Spots(*(each[rows] for each in vars(self).values()))


@dataclass(kw_only=True)
class Attention:
    """Attention over measured spots, by place and by look.

    ``coherence`` is how much the expression of two sections of one tissue agrees at the same place; 0 lays none over
    another. ``n_factors=None`` takes 15, or 30 above 1 000 training spots; ``n_components`` of the features are
    compared. ``lengths`` l are in units of the spot pitch, ``feature_lengths`` r in units of the median distance of the
    reduced features, ``looks`` are the shares of look, ``noises`` in units of the signal; ``power`` tempers the
    evidence.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> xy, look = rng.uniform(0, 8, (60, 2)), rng.normal(size=(60, 5)).astype(np.float32)
    >>> spots = Section(name="a", xy=xy, features=look, expression=look[:, :2] + 3)
    >>> model = Attention()
    >>> held_back = model.fit([spots], seed=0, device="cpu", progress=False)
    >>> model.predict(Section(name="a", xy=xy[:4], features=look[:4])).shape
    (4, 2)
    """

    n_factors: int | None = None
    n_components: int = 20
    n_anchors: int = 1000
    coherence: float = 0.7
    lengths: Sequence[float] = (1.0, 3.0, 9.0)
    feature_lengths: Sequence[float] = (0.7, 1.4)
    looks: Sequence[float] = (0.3, 0.7)
    noises: Sequence[float] = tuple(np.geomspace(0.03, 100, 11).tolist())
    power: float = 0.3
    history: dict[str, Floats] = field(default_factory=dict, init=False, repr=False)

    def fit(self, sections: Sequence[Section], *, seed: int, device: str, progress: bool) -> list[NDArray[np.float32]]:
        """Learn from all sections together; return the leave-one-out predictions, (n, g) a section.

        Raises
        ------
        ValueError
            Two sections of one name, or one without features or expression.
        """
        centring = Centring.of(sections, with_features=True)
        features = np.concatenate([centring.standardised(section) for section in sections]).clip(-OUTLYING, OUTLYING)
        axes = np.ascontiguousarray(np.linalg.svd(features, full_matrices=False)[2][: self.n_components].T)  # (d, q)
        xy = np.concatenate([section.xy for section in sections])
        of = np.repeat(np.arange(len(sections)), centring.n_spots)
        y = centring.deviations(sections)
        variance = _spot_variance(xy, of, y)
        z, loadings = _factors(y, variance, self.n_factors or (30 if len(y) > 1000 else 15))
        frames = self._lay_over(xy, z[:, :LEADING] * np.linalg.norm(loadings[:LEADING], axis=1), of)
        placed = np.concatenate([frames.place(section.xy, each) for each, section in enumerate(sections)])
        spots = Spots(placed, of, frames.frame[of], features @ axes)
        chosen = np.sort(np.random.default_rng(seed).permutation(len(y))[: self.n_anchors])
        anchors = spots[chosen]
        scale = np.median(pdist(anchors.look)) or 1.0
        self._state: dict[str, NDArray[Any]] = {
            **centring.state(),
            **vars(anchors),
            **{f"frames_{name}": value for name, value in vars(frames).items()},
            "axes": axes,
            "loadings": loadings,
            "kinship": np.array([1.0, 0.0])[: min(len(sections), 2)],
            "lengths": np.array(self.lengths),
            "feature_lengths": np.array(self.feature_lengths) * scale,
        }
        values, held_back = self._mix(spots, chosen, z, variance, progress=progress)
        self._state |= values
        return centring.expression(forget(y, z, loadings, held_back, centring.leverage()))

    def predict(self, points: Section) -> NDArray[np.float32]:
        """Expression (m, g) at the points; of a section that was not fitted, from the look alone.

        Raises
        ------
        ValueError
            No features, or another number of them than in ``fit``.
        """
        state, centring = self._state, Centring.restore(self._state)
        frames = Frames(*(state[f"frames_{name}"] for name in Frames.__dataclass_fields__))
        base, section = centring.mean_of(points.name), centring.index(points.name)
        placed = frames.place(points.xy, section) if section >= 0 else points.xy
        frame = frames.frame[section] if section >= 0 else -1
        predicted = np.empty((len(points), len(base)), dtype=np.float32)
        for rows, features in centring.chunks(points):
            look = features.clip(-OUTLYING, OUTLYING) @ state["axes"]
            sections, frames_of = np.full(len(look), section), np.full(len(look), frame)
            place, alike = self._heads(Spots(placed[rows], sections, frames_of, look))
            z = (place @ state["by_place"]).sum(axis=(0, 1)) + (alike @ state["by_look"]).sum(axis=(0, 1))
            if section >= 0:
                z += state["level"][section]
            predicted[rows] = base + z @ state["loadings"]
        return predicted

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Anchors, their reduced features and their values in every head and factor."""
        return dict(self._state)

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Take up what :meth:`state` gave."""
        self._state = dict(state)

    def _lay_over(self, xy: Floats, z: Floats, of: NDArray[np.int64]) -> Frames:
        """Frames of the sections, each its own without coherence."""
        frames = lay_over(xy, z, of)
        if self.coherence > 0:
            return frames
        s = len(frames.frame)
        return Frames(np.arange(s), np.tile(np.eye(2), (s, 1, 1)), np.zeros((s, 2)))

    def _heads(self, points: Spots) -> tuple[Floats, Floats]:
        """Attention over the anchors by place and by look, (k, h, m, j) each for k kinships of the sections."""
        state = self._state
        own = points.section[:, None] == state["section"]
        kinship = state["kinship"][:, None, None]
        near = np.where(own, 1.0, kinship * self.coherence) * (points.frame[:, None] == state["frame"])  # (k, m, j)
        beside = np.where(own | (points.section[:, None] < 0), 1.0, kinship)  # a strange section has the look alone
        away, unlike = cdist(points.xy, state["xy"]), cdist(points.look, state["look"])
        place = np.stack([matern(away / length) for length in state["lengths"]])  # (h, m, j)
        look = np.stack([gauss(unlike / length) for length in state["feature_lengths"]])
        return near[:, None] * place, beside[:, None] * look

    def _mix(
        self, spots: Spots, chosen: NDArray[np.intp], z: Floats, variance: Floats, *, progress: bool
    ) -> tuple[dict[str, Floats], Floats]:
        """Solve every mixture of heads and weigh it; give the values (k, h, j, f) and held-back factors (n, f)."""
        place, alike = self._heads(spots)
        same = LEVEL * (spots.section[:, None] == self._state["section"])
        mixtures = list(product(range(len(place)), range(place.shape[1]), range(alike.shape[1]), self.looks))
        solved = [
            self._solve((1 - look) * place[k, a] + look * alike[k, b] + same, chosen, z, variance)
            for k, a, b, look in tqdm(mixtures, desc="attention", unit="mixture", disable=not progress)
        ]
        shares = softmax([evidence for evidence, _, _ in solved], axis=0)  # (mixtures, f)
        by_place = np.zeros((*place.shape[:2], len(chosen), z.shape[1]))
        by_look = np.zeros((*alike.shape[:2], len(chosen), z.shape[1]))
        held_back = np.zeros_like(z)
        for (k, a, b, look), share, (_, values, left_out) in zip(mixtures, shares, solved, strict=True):
            by_place[k, a] += share * (1 - look) * values
            by_look[k, b] += share * look * values
            held_back += share * left_out
        every = by_place.sum(axis=(0, 1)) + by_look.sum(axis=(0, 1))  # the level is part of all mixtures
        own = self._state["section"] == np.arange(spots.section.max() + 1)[:, None]  # (s, j)
        return {"by_place": by_place, "by_look": by_look, "level": LEVEL * (own @ every)}, held_back

    def _solve(
        self, kernel: Floats, chosen: NDArray[np.intp], z: Floats, variance: Floats
    ) -> tuple[Floats, Floats, Floats]:
        """Tempered log evidence (f,), values (j, f) and held-back factors (n, f), averaged over the noises.

        ``kernel`` (n, j) is the mixed attention of all spots over the anchors, which are the rows ``chosen``.
        """
        quiet = np.sqrt(variance)[:, None]
        noises = np.array(self.noises)
        lower, _ = cho_factor(kernel[chosen] + JITTER * LEVEL * np.eye(len(chosen)), lower=True)
        psi = solve_triangular(lower, kernel.T, lower=True).T / quiet  # (n, j)
        k, b = np.linalg.eigh(psi.T @ psi)
        psi, target = psi @ b, z / quiet
        inverse = 1 / (k.clip(min=0)[:, None] + noises)  # (j, e)
        rotated = psi.T @ target  # (j, f)
        explained = (rotated**2).T @ inverse  # (f, e)
        s2 = ((target**2).sum(axis=0)[:, None] - explained).clip(min=1e-12) / (noises * len(z))  # at its maximum
        determinant = (len(z) - len(k)) * np.log(noises) - np.log(inverse).sum(axis=0)
        evidence = -0.5 * self.power * (determinant + len(z) * np.log(s2))
        share = softmax(evidence, axis=1)  # (f, e)
        mixed = inverse @ share.T * rotated  # (j, f)
        left = target[..., None] - np.stack([psi @ (rotated * each[:, None]) for each in inverse.T], axis=-1)
        left_out = target - (left / (1 - psi**2 @ inverse).clip(min=1e-6)[:, None] * share).sum(axis=-1)  # (n, f)
        return logsumexp(evidence, axis=1), solve_triangular(lower, b @ mixed, lower=True, trans=1), left_out * quiet


def _spot_variance(xy: Floats, of: NDArray[np.int64], y: Floats) -> Floats:
    """Variance (n,) of each spot about its neighbours' mean, relative to the geometric mean over all spots."""
    variance = np.empty(len(y))
    for rows in (np.flatnonzero(of == section) for section in np.unique(of)):
        k = min(13, len(rows))
        distance, near = cKDTree(xy[rows]).query(xy[rows], k=range(2, k + 1))  # from the second: not itself
        weight = softmax(-(distance**2) / (2 * SMOOTHING**2), axis=1)
        around = np.stack([share @ y[rows[others]] for share, others in zip(weight, near, strict=True)])
        variance[rows] = ((y[rows] - around) ** 2).mean(axis=1)
    variance = variance.clip(min=np.finfo(np.float64).tiny)
    relative: Floats = variance / np.exp(np.log(variance).mean())
    return relative.clip(1 / LOUDEST, LOUDEST)


def _factors(y: Floats, variance: Floats, n_factors: int) -> tuple[Floats, Floats]:
    """Factors of y (n, g), spots weighted by precision: scores (n, f) of unit variance and loadings (f, g)."""
    _, s, vt = np.linalg.svd(y / np.sqrt(variance)[:, None], full_matrices=False)
    f = max(1, min(n_factors, int((s > RANK * s[0]).sum())))
    scores = y @ vt[:f].T
    unit = np.sqrt((scores**2).mean(axis=0)) + np.finfo(np.float64).tiny
    return scores / unit, unit[:, None] * vt[:f]
