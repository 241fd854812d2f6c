"""KernelAverage of attention heads: solved by kriging, weighed by evidence.

One mixture is K = (1 - w) place + w look + level, of the spots over their anchors. With L the Cholesky factor of its
anchor rows, D = diag(v) the variances of the spots and Psi = D^-1/2 K L^-T, a single eigendecomposition
Psi^T Psi = B diag(k) B^T serves all factors and noises e:

    u = L^-T B diag(1 / (k + e)) B^T Psi^T D^-1/2 z,    evidence: log det(Psi Psi^T + e I),

and what each spot would be without itself follows from its leverage (Rasmussen and Williams 2006, eq. 5.12).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, solve_triangular
from scipy.spatial.distance import cdist
from scipy.special import logsumexp, softmax

from sthisto.models.gp import LEVEL, gauss, matern

JITTER = 1e-6  # of the anchors' kernel, against rounding

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Spots:
    """What attention compares, for spots, anchors or points."""

    xy: Floats  # (n, 2) in units of the pitch
    look: Floats  # (n, q) reduced features
    section: NDArray[np.int64]  # (n,), -1 for a section that was not fitted
    frame: NDArray[np.int64]  # (n,), positions compare within a frame
    similarity: Floats  # (n,) how much a section other than the spot's own hears of it, 0 to 1

    def __getitem__(self, rows: NDArray[np.intp] | slice) -> "Spots":
        return Spots(*(each[rows] for each in vars(self).values()))

    def __len__(self) -> int:
        return len(self.xy)


@dataclass(frozen=True)
class Heads:
    """Attention of spots over anchors, one head a length."""

    lengths: Floats  # by place, pitches
    feature_lengths: Floats  # by look
    coherence: float  # of two sections at the same place

    def __call__(self, spots: Spots, anchors: Spots) -> tuple[Floats, Floats]:
        """Attention by place and by look, (h, n, j) each."""
        own = spots.section[:, None] == anchors.section
        kin = np.where(own, 1.0, spots.similarity[:, None] * anchors.similarity)
        near = np.where(own, 1.0, self.coherence * kin) * (spots.frame[:, None] == anchors.frame)
        away, unlike = cdist(spots.xy, anchors.xy), cdist(spots.look, anchors.look)
        place = np.stack([near * matern(away / length) for length in self.lengths])
        return place, np.stack([kin * gauss(unlike / length) for length in self.feature_lengths])


@dataclass(frozen=True)
class Values:
    """What the anchors hold in every head, averaged over the mixtures."""

    by_place: Floats  # (h, j, f)
    by_look: Floats  # (h, j, f)
    every: Floats  # (j, f) in all heads together, which is what a level is made of

    def mixed(self, other: "Values", share: float) -> "Values":
        """Share of these, and for the rest other ones."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Values(*(share * mine + (1 - share) * theirs for mine, theirs in pairs))

    def level(self, own: NDArray[np.bool_]) -> Floats:
        """Level (f,) of a section, of which some anchors (j,) are."""
        level: Floats = LEVEL * self.every[own].sum(axis=0)
        return level


@dataclass(frozen=True)
class KernelAverage:
    """The grid that is averaged over."""

    heads: Heads
    looks: Sequence[float]  # shares of look
    noises: Floats
    power: float  # of the evidence

    @property
    def n(self) -> int:
        """How many there are."""
        return len(self._grid(len(self.heads.lengths), len(self.heads.feature_lengths)))

    def _grid(self, by_place: int, by_look: int) -> list[tuple[int, int, float]]:
        """Heads and shares of all mixtures; where look is all there is, the head by place is no choice."""
        every = product(range(by_place), range(by_look), self.looks)
        return [(a, b, look) for a, b, look in every if look < 1 or a == 0]

    def solve(
        self,
        spots: Spots,
        chosen: NDArray[np.intp],
        z: Floats,
        variance: Floats,
        step: Callable[[], object] = bool,  # does nothing
    ) -> tuple[Values, Floats]:
        """Values of the anchors, which are the rows ``chosen``, and held-back factors (n, f) of the spots.

        ``step`` is called after every mixture.
        """
        place, alike = self.heads(spots, spots[chosen])
        same = LEVEL * (spots.section[:, None] == spots.section[chosen])
        grid = self._grid(len(place), len(alike))
        solved = []
        for a, b, look in grid:
            solved.append(self.condition((1 - look) * place[a] + look * alike[b] + same, chosen, z, variance))
            step()
        shares = softmax([evidence for evidence, _, _ in solved], axis=0)  # (mixtures, f)
        by_place, by_look = (np.zeros((len(each), len(chosen), z.shape[1])) for each in (place, alike))
        held_back = np.zeros_like(z)
        for (a, b, look), share, (_, values, left_out) in zip(grid, shares, solved, strict=True):
            by_place[a] += share * (1 - look) * values
            by_look[b] += share * look * values
            held_back += share * left_out
        return Values(by_place, by_look, by_place.sum(axis=0) + by_look.sum(axis=0)), held_back

    def condition(
        self, kernel: Floats, chosen: NDArray[np.intp], z: Floats, variance: Floats
    ) -> tuple[Floats, Floats, Floats]:
        """Tempered log evidence (f,), values (j, f) and held-back factors (n, f), averaged over the noises.

        ``kernel`` (n, j) is the mixed attention of all spots over the anchors, which are the rows ``chosen``.
        """
        quiet = np.sqrt(variance)[:, None]
        lower, _ = cho_factor(kernel[chosen] + JITTER * LEVEL * np.eye(len(chosen)), lower=True)
        psi = solve_triangular(lower, kernel.T, lower=True).T / quiet  # (n, j)
        k, b = np.linalg.eigh(psi.T @ psi)
        psi, target = psi @ b, z / quiet
        inverse = 1 / (k.clip(min=0)[:, None] + self.noises)  # (j, e)
        rotated = psi.T @ target  # (j, f)
        evidence = self._evidence(target, rotated, inverse)
        share = softmax(evidence, axis=1)  # (f, e)
        mixed = inverse @ share.T * rotated  # (j, f)
        left = target[..., None] - np.stack([psi @ (rotated * each[:, None]) for each in inverse.T], axis=-1)
        left_out = target - (left / (1 - psi**2 @ inverse).clip(min=1e-6)[:, None] * share).sum(axis=-1)  # (n, f)
        return logsumexp(evidence, axis=1), solve_triangular(lower, b @ mixed, lower=True, trans=1), left_out * quiet

    def _evidence(self, target: Floats, rotated: Floats, inverse: Floats) -> Floats:
        """Tempered log evidence (f, e) of every noise, the scale of the signal at its maximum."""
        n, j = len(target), len(rotated)
        explained = (rotated**2).T @ inverse
        s2 = ((target**2).sum(axis=0)[:, None] - explained).clip(min=1e-12) / (self.noises * n)
        determinant = (n - j) * np.log(self.noises) - np.log(inverse).sum(axis=0)
        evidence: Floats = -0.5 * self.power * (determinant + n * np.log(s2))
        return evidence
