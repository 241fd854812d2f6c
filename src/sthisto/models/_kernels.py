"""Kriging of expression factors, averaged over a grid of kernels by their marginal likelihood.

A kernel of the grid is K = (1 - w) P + w F + level: P compares positions with one length, F image features with
another, and the level is shared within a section. With K (n, j) between n spots and j of them, the inducing points, L
the Cholesky factor of the inducing points' own rows, D = diag(v) the noise variances of the spots relative to each
other and Psi = D^-1/2 K L^-T, a single eigendecomposition Psi^T Psi = B diag(k) B^T serves all factors z and noises e:

    u = L^-T B diag(1 / (k + e)) B^T Psi^T D^-1/2 z,    evidence: log det(Psi Psi^T + e I)

(Quinonero-Candela and Rasmussen 2005, JMLR 6, section 4). Leave-one-out predictions follow from the leverages
(Rasmussen and Williams 2006, eq. 5.12). Where every spot is an inducing point, D^-1/2 K D^-1/2 itself is decomposed,
exactly. Otherwise Psi^T Psi is put together from products of P, F and level, which are summed over blocks of spots
once for the whole grid: nothing of size n x j is held, and the cost is linear in n.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular
from scipy.spatial.distance import cdist
from scipy.special import logsumexp, softmax

LEVEL = 10.0  # prior variance of a section's level, wide against the unit variance of a factor
JITTER = 1e-6  # of the inducing points' kernel, in units of LEVEL, against rounding
TINY = 1e-12  # eigenvalues below are rounding
BLOCK = 2048  # spots whose kernels are held at once
NEGLIGIBLE = 1e-7  # weight of a kernel below which held-out spots are not predicted with it

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
Kernel = tuple[int, int, float]  # index of the length, index of the feature length, weight of the features


def matern(r: Floats) -> Floats:
    """Matern 3/2 correlation at distances in units of its length."""
    scaled = np.sqrt(3) * r
    correlation: Floats = (1 + scaled) * np.exp(-scaled)
    return correlation


def gauss(r: Floats) -> Floats:
    """Squared-exponential correlation at distances in units of its length."""
    correlation: Floats = np.exp(-0.5 * r**2)
    return correlation


@dataclass(frozen=True)
class Spots:
    """What kernels compare, for spots, inducing points or points to predict."""

    xy: Floats  # (n, 2) in units of the pitch
    features: Floats  # (n, q) reduced image features
    section: NDArray[np.int64]  # (n,), -1 for a section that was not fitted
    frame: NDArray[np.int64]  # (n,) coordinate frame: positions compare within one
    similarity: Floats  # (n,) weight of the spot in a section other than its own, 0 to 1

    def __getitem__(self, rows: Rows | slice) -> "Spots":
        return Spots(*(each[rows] for each in vars(self).values()))

    def __len__(self) -> int:
        return len(self.xy)

    def level(self, other: "Spots") -> Floats:
        """Kernel (n, j) of the sections' levels."""
        same: Floats = LEVEL * (self.section[:, None] == other.section)
        return same


@dataclass(frozen=True)
class KernelValues:
    """Values of the inducing points for every length, averaged over the grid of kernels."""

    position: Floats  # (p, j, f)
    features: Floats  # (r, j, f)

    def mixed(self, other: "KernelValues", share: float) -> "KernelValues":
        """Share of these, and for the rest other ones."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return KernelValues(*(share * mine + (1 - share) * theirs for mine, theirs in pairs))

    def level(self, own: NDArray[np.bool_]) -> Floats:
        """Level (f,) of the section that some of the inducing points (j,) belong to."""
        total = self.position.sum(axis=0) + self.features.sum(axis=0)
        level: Floats = LEVEL * total[own].sum(axis=0)
        return level


@dataclass(frozen=True, kw_only=True)
class KernelAverage:
    """Grid of kernels that is averaged over."""

    lengths: Floats  # of positions, pitches
    feature_lengths: Floats
    feature_weights: Sequence[float]
    noises: Floats
    power: float  # of the marginal likelihood
    coherence: float = 0.0  # correlation of two sections at the same position of one frame

    @property
    def grid(self) -> list[Kernel]:
        """All kernels; where features have all the weight, the length of positions is no choice."""
        everything = product(range(len(self.lengths)), range(len(self.feature_lengths)), self.feature_weights)
        return [(a, b, weight) for a, b, weight in everything if weight < 1 or a == 0]

    def kernels(self, spots: Spots, inducing: Spots) -> tuple[list[Floats], list[Floats]]:
        """Kernels (n, j) of positions and of features, one a length."""
        own = spots.section[:, None] == inducing.section
        related: Any = 1.0
        near: Any = 1.0
        if not own.all():
            related = np.where(own, 1.0, spots.similarity[:, None] * inducing.similarity)
            near = np.where(own, 1.0, self.coherence * related) * (spots.frame[:, None] == inducing.frame)
        away, unlike = cdist(spots.xy, inducing.xy), cdist(spots.features, inducing.features)
        position = [near * matern(away / length) for length in self.lengths]
        return position, [related * gauss(unlike / length) for length in self.feature_lengths]

    def predict(self, spots: Spots, inducing: Spots, values: KernelValues) -> Floats:
        """Factors (n, f) of spots, without the level of their section."""
        position, features = self.kernels(spots, inducing)
        predicted = np.zeros((len(spots), values.position.shape[2]))
        for kernel, of_kernel in zip(position + features, [*values.position, *values.features], strict=True):
            predicted += kernel @ of_kernel
        return predicted

    def unfitted_level(self, spots: Spots, inducing: Spots, values: KernelValues) -> Floats:
        """Level (f,) of a section that was not fitted: spots predicted from their features average to zero."""
        nowhere = np.full(len(spots), -1)
        stained = Spots(spots.xy, spots.features, nowhere, nowhere, spots.similarity)
        total = sum(self.predict(stained[rows], inducing, values).sum(axis=0) for rows in _blocks(len(spots)))
        return -np.asarray(total) / len(spots)

    def evidence(self, spots: Spots, z: Floats, variance: Floats) -> float:
        """Tempered log marginal likelihood of the mean of all kernels, summed over the factors."""
        position, features = self.kernels(spots, spots)
        kernel = 0.5 * np.mean(position, axis=0) + 0.5 * np.mean(features, axis=0) + spots.level(spots)
        root = np.sqrt(variance)[:, None]
        return float(_Solution.of(self, *_exact_spectrum(kernel, z / root, root), z / root).evidence.sum())

    def solve(
        self,
        spots: Spots,
        inducing: Rows,
        z: Floats,
        variance: Floats,
        *,
        held_out: Rows | None = None,
        step: Callable[[], object] = bool,  # does nothing
    ) -> tuple[KernelValues, Floats]:
        """Values of the inducing points, and leave-one-out factors (m, f).

        Parameters
        ----------
        spots
            (n,).
        inducing
            Rows (j,) of the inducing points, ascending.
        z
            Factors (n, f).
        variance
            Noise variances (n,) of the spots relative to each other.
        held_out
            Rows (m,) to predict without themselves; ``None`` takes all.
        step
            Called after every kernel.
        """
        root = np.sqrt(variance)[:, None]
        target, points = z / root, spots[inducing]
        spectra = (
            _exact(self, spots, target, root)
            if len(points) == len(spots)
            else _reduced(self, spots, points, target, root)
        )
        solutions = []
        for spectrum in spectra:
            solutions.append(_Solution.of(self, *spectrum, target))
            step()
        shares = softmax([solution.evidence for solution in solutions], axis=0)  # (kernels, f)
        position = np.zeros((len(self.lengths), len(points), z.shape[1]))
        features = np.zeros((len(self.feature_lengths), len(points), z.shape[1]))
        for (a, b, weight), share, solution in zip(self.grid, shares, solutions, strict=True):
            values = share * (solution.basis @ (solution.inverse @ solution.noise_shares.T * solution.rotated))
            position[a] += (1 - weight) * values
            features[b] += weight * values
        rows = np.arange(len(spots)) if held_out is None else held_out
        left_out = np.zeros((len(rows), z.shape[1]))
        for block in _blocks(len(rows)):
            at = rows[block]
            kernels, level = self.kernels(spots[at], points), spots[at].level(points)
            for kernel, share, solution in zip(self.grid, shares, solutions, strict=True):
                if share.max() > NEGLIGIBLE:
                    psi = (_mixed(kernels, kernel) + level) / root[at] @ solution.basis
                    left_out[block] += share * solution.leave_one_out(psi, target[at])
        return KernelValues(position, features), left_out * root[rows]


@dataclass(frozen=True)
class _Solution:
    """Factors by one kernel, for all noises."""

    basis: Floats  # (j, r) L^-T B
    rotated: Floats  # (r, f) B^T Psi^T target
    inverse: Floats  # (r, e) 1 / (k + noise)
    evidence: Floats  # (f,) tempered log marginal likelihood, averaged over the noises
    noise_shares: Floats  # (f, e)

    @classmethod
    def of(cls, average: KernelAverage, k: Floats, basis: Floats, rotated: Floats, target: Floats) -> "_Solution":
        n, noises = len(target), average.noises
        inverse = 1 / (k[:, None] + noises)
        unexplained = (target**2).sum(axis=0)[:, None] - (rotated**2).T @ inverse
        s2 = unexplained.clip(min=TINY) / (noises * n)  # of the signal, at its maximum
        determinant = (n - len(k)) * np.log(noises) - np.log(inverse).sum(axis=0)
        evidence = -0.5 * average.power * (determinant + n * np.log(s2))  # (f, e)
        return cls(basis, rotated, inverse, logsumexp(evidence, axis=1), softmax(evidence, axis=1))

    def leave_one_out(self, psi: Floats, target: Floats) -> Floats:
        """Target (m, f) of spots as predicted without themselves, averaged over the noises."""
        fitted = np.stack([psi @ (self.rotated * each[:, None]) for each in self.inverse.T], axis=-1)  # (m, f, e)
        free = (1 - psi**2 @ self.inverse).clip(min=1e-6)[:, None]
        left_out: Floats = target - ((target[..., None] - fitted) / free * self.noise_shares).sum(axis=-1)
        return left_out


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, n, BLOCK))


def _mixed(kernels: tuple[list[Floats], list[Floats]], kernel: Kernel) -> Floats:
    a, b, weight = kernel
    mixed: Floats = (1 - weight) * kernels[0][a] + weight * kernels[1][b]
    return mixed


def _exact_spectrum(kernel: Floats, target: Floats, root: Floats) -> tuple[Floats, Floats, Floats]:
    """Eigenvalues (n,) of a kernel (n, n), its basis and the target in it."""
    k, vectors = np.linalg.eigh(kernel / root / root.T)
    k = k.clip(min=TINY)
    return k, vectors / np.sqrt(k) / root, np.sqrt(k)[:, None] * (vectors.T @ target)


def _exact(
    average: KernelAverage, spots: Spots, target: Floats, root: Floats
) -> Iterator[tuple[Floats, Floats, Floats]]:
    kernels, level = average.kernels(spots, spots), spots.level(spots)
    return (_exact_spectrum(_mixed(kernels, kernel) + level, target, root) for kernel in average.grid)


class _Products:
    """Products of the kernels of spots over inducing points, summed over blocks of spots, for all of the grid.

    K = (1 - w) P + w F + O indicators', with O (n, s) the sections of the spots; the target is the last factor.
    """

    def __init__(self, average: KernelAverage, inducing: Spots) -> None:
        self.average, self.inducing = average, inducing
        self.sections, of_inducing = np.unique(inducing.section, return_inverse=True)
        self.indicators = LEVEL * np.eye(len(self.sections))[of_inducing]  # (j, s)
        self.n_lengths = len(average.lengths)
        self.level = self.n_lengths + len(average.feature_lengths)
        pairs = (product(self._parts(kernel), [*self._parts(kernel), self.level + 1]) for kernel in average.grid)
        self.sums: dict[tuple[int, int], Any] = {(x, y): 0.0 for each in pairs for x, y in each if x <= y}

    def add(self, spots: Spots, target: Floats, root: Floats) -> None:
        """Add a block of spots."""
        position, features = self.average.kernels(spots, self.inducing)
        of_section = (spots.section[:, None] == self.sections).astype(float)
        parts = [*(each / root for each in (*position, *features, of_section)), target]
        for x, y in self.sums:
            self.sums[x, y] += parts[x].T @ parts[y]

    def of(self, kernel: Kernel) -> tuple[Floats, Floats]:
        """K^T D^-1 K (j, j) and K^T D^-1/2 target (j, f) of one kernel."""
        terms = list(zip(self._parts(kernel), (1 - kernel[2], kernel[2], 1.0), strict=True))
        gram = sum(
            of_x * of_y * self._expand(self._expand(self._product(x, y), x).T, y).T
            for (x, of_x), (y, of_y) in product(terms, terms)
        )
        rotated = sum(of_x * self._expand(self.sums[x, self.level + 1], x) for x, of_x in terms)
        return np.asarray(gram), np.asarray(rotated)

    def _parts(self, kernel: Kernel) -> tuple[int, int, int]:
        return kernel[0], self.n_lengths + kernel[1], self.level

    def _product(self, x: int, y: int) -> Floats:
        found: Floats = self.sums[x, y] if x <= y else self.sums[y, x].T
        return found

    def _expand(self, rows: Floats, part: int) -> Floats:
        """Rows (j, ...) of the inducing points, from rows of the sections where the part is the level."""
        return self.indicators @ rows if part == self.level else rows


def _reduced(
    average: KernelAverage, spots: Spots, inducing: Spots, target: Floats, root: Floats
) -> Iterator[tuple[Floats, Floats, Floats]]:
    """Spectra by inducing points."""
    products = _Products(average, inducing)
    for rows in _blocks(len(spots)):
        products.add(spots[rows], target[rows], root[rows])
    own, level = average.kernels(inducing, inducing), inducing.level(inducing)
    level += JITTER * LEVEL * np.eye(len(inducing))
    for kernel in average.grid:
        gram, rotated = products.of(kernel)
        lower = cholesky(_mixed(own, kernel) + level, lower=True)
        half = solve_triangular(lower, gram, lower=True)
        k, vectors = np.linalg.eigh(solve_triangular(lower, half.T, lower=True))
        basis = solve_triangular(lower, vectors, lower=True, trans=1)
        yield k.clip(min=0), basis, basis.T @ rotated
