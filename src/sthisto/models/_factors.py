"""Expression as a few factors: spots weighted by their precision, loadings shrunk by their standard errors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree
from scipy.special import softmax

from sthisto._statistics import RANK, leading_components

SMOOTHING = 1.5  # pitches, of the first smoothing, from which the spots' noise is estimated
N_NEIGHBORS = 12  # of that smoothing
EXTREME = 5.0  # no spot counts for more than this many times the typical one, or less than its inverse
NARROWEST = 0.25  # standard errors, of the mixture that true loadings are modeled by; each further one is twice as wide
STEPS = 100  # of expectation maximization
BLOCK = 4096  # spots at once
TINY = np.finfo(np.float64).tiny

Floats = NDArray[np.float64]
Expression = Callable[[NDArray[np.intp]], Floats]  # rows (b,) -> deviations from the gene means (b, g)


def spot_variance(xy: Floats, y: Expression) -> Floats:
    """Mean square (n,) of a section's spots about their neighbors' mean."""
    k = min(N_NEIGHBORS + 1, len(xy))
    distance, near = cKDTree(xy).query(xy, k=range(2, k + 1))  # from the second: not itself
    weight = softmax(-(distance**2) / (2 * SMOOTHING**2), axis=1)
    variance = np.empty(len(xy))
    for rows in _blocks(len(xy)):
        others, columns = np.unique(near[rows], return_inverse=True)
        ends = np.arange(0, columns.size + 1, k - 1)
        mean = sparse.csr_array((weight[rows].ravel(), columns.ravel(), ends), shape=(len(rows), len(others)))
        variance[rows] = ((y(rows) - mean @ y(others)) ** 2).mean(axis=1)
    return variance


def normalized_variance(variance: Floats) -> Floats:
    """Variances (n,) in units of their geometric mean, extremes clipped."""
    variance = variance.clip(min=TINY)
    usual: Floats = variance / np.exp(np.log(variance).mean())
    return usual.clip(1 / EXTREME, EXTREME)


@dataclass(frozen=True)
class Factors:
    """Leading factors of expression, their loadings, and how much of these is more than noise."""

    z: Floats  # (n, f) of unit variance
    loadings: Floats  # (f, g), regression of the genes on z
    shrinkage: Floats  # (f, g), factor on each loading
    weight: Floats  # (n, 1) of the spots

    @classmethod
    def of(cls, y: Expression, variance: Floats, similarity: Floats, n_factors: int) -> "Factors":
        """Decompose deviations from the gene means; factors beyond the rank are zero.

        Spots are weighted by their variance (n,) and by the similarity (n,) of their section, 0 to 1.
        """
        weight = (similarity / variance)[:, None]
        total = sum(weight[rows].T @ y(rows) ** 2 for rows in _blocks(len(weight)))  # (1, g)
        found = leading_components((np.sqrt(weight[rows]) * y(rows) for rows in _blocks(len(weight))), n_factors)
        axes = np.pad(found, ((0, 0), (0, n_factors - found.shape[1])))
        scores = np.concatenate([y(rows) @ axes for rows in _blocks(len(weight))])
        scale = np.sqrt((scores**2).mean(axis=0))
        z, loadings = scores / (scale + TINY), scale[:, None] * axes.T
        information = (weight * z**2).sum(axis=0)  # (f,)
        unexplained = (total - information @ loadings**2).clip(min=0)
        noise = np.sqrt(unexplained / max(similarity.sum() - n_factors, 1))  # (1, g)
        error = np.sqrt(similarity @ (weight * z**2))[:, None] / (information + TINY)[:, None] * noise
        return cls(z, loadings, shrinkage_factors(loadings, error), weight)

    def leave_one_out(
        self, y: Floats, held_out: Floats, leverage: Floats | float, rows: NDArray[np.intp] | slice = slice(None)
    ) -> Floats:
        """Expression (m, g) of held-out factors (m, f) of some spots; see :func:`leave_one_out_expression`."""
        information = (self.weight * self.z**2).sum(axis=0)
        return leave_one_out_expression(
            y,
            self.z[rows],
            self.loadings,
            held_out,
            leverage,
            influence=self.weight[rows] * self.z[rows] / (information + TINY),
            shrinkage=self.shrinkage,
        )


def leave_one_out_expression(
    y: Floats,  # (m, g)
    z: Floats,  # (m, f)
    loadings: Floats,  # (f, g)
    held_out: Floats,  # (m, f) factors as predicted without the spot
    leverage: Floats | float,  # (m, 1) of the section means
    *,
    influence: Floats,  # (m, f) c_i
    shrinkage: Floats | float = 1.0,  # (f, g)
) -> Floats:
    """Expression (m, g) predicted from held-out factors, with each spot also taken out of loadings and section mean.

    Loadings are the regression of y on the factors, so without spot i they are L - c_i r_i / (1 - c_i z_i), with r_i
    the residual of y_i and c_i = w_i z_i / sum_j w_j z_j^2. Along the factors the section's level already leaves the
    spot out of the mean; r is what it cannot reach.
    """
    residual = y - z @ loadings
    own = (held_out * influence) @ np.broadcast_to(shrinkage, loadings.shape)
    own /= 1 - (influence * z).sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):  # a spot alone in its section cannot be held out
        expression: Floats = held_out @ (shrinkage * loadings) - residual * (own + leverage / (1 - leverage))
    return expression


def shrinkage_factors(loadings: Floats, error: Floats) -> Floats:
    """Factor (f, g) on each loading, given its standard error (f, g): adaptive shrinkage.

    The true loadings of a factor are modeled as a mixture of normals about zero, fitted to all genes, and each loading
    is replaced by its posterior mean (Stephens 2017, doi:10.1093/biostatistics/kxw041).
    """
    error = np.maximum(error, RANK * np.abs(loadings)) + TINY
    return np.array([_posterior_shares(each) for each in np.abs(loadings) / error])


def _posterior_shares(ratio: Floats) -> Floats:
    """Posterior means (g,) of effects in units of their estimates, from the estimates' ratios to their errors."""
    widest = np.log2(max(ratio.max(), NARROWEST) / NARROWEST)
    widths = np.append(0.0, NARROWEST * 2.0 ** np.arange(np.ceil(widest) + 1))
    total = 1 + widths[:, None] ** 2
    log_likelihood = -0.5 * (ratio**2 / total + np.log(total))  # (k, g)
    likelihood = np.exp(log_likelihood - log_likelihood.max(axis=0))
    weight = np.full((len(widths), 1), 1 / len(widths))
    for _ in range(STEPS):
        posterior = weight * likelihood
        posterior /= posterior.sum(axis=0)
        weight = posterior.mean(axis=1, keepdims=True)
    shares: Floats = ((1 - 1 / total) * posterior).sum(axis=0)
    return shares


def _blocks(n: int) -> Iterator[NDArray[np.intp]]:
    return (np.arange(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK))
