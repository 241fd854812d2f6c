"""Expression as a few factors: spots weighted by how well they were measured, loadings by how well they are known."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.special import softmax

RANK = 1e-6  # factors below this share of the first are rounding noise of float32 expression
SMOOTHING = 1.5  # pitches, of the first smoothing that tells loud spots from quiet ones
LOUDEST = 5.0  # no spot counts for more than this many times the usual, or less than its inverse
NARROWEST = 0.25  # standard errors, of the mixture that true loadings are taken for; each further one is twice as wide
STEPS = 100  # of expectation maximisation
TINY = np.finfo(np.float64).tiny

Floats = NDArray[np.float64]


def spot_variance(xy: Floats, y: Floats) -> Floats:
    """Mean square (n,) of a section's spots y (n, g) about their neighbors' mean."""
    k = min(13, len(xy))
    distance, near = cKDTree(xy).query(xy, k=range(2, k + 1))  # from the second: not itself
    weight = softmax(-(distance**2) / (2 * SMOOTHING**2), axis=1)
    around = (share @ y[others] for share, others in zip(weight, near, strict=True))
    return np.array([((own - mean) ** 2).mean() for own, mean in zip(y, around, strict=True)])


def relative(variance: Floats) -> Floats:
    """Variances (n,) in units of their geometric mean, none too loud."""
    variance = variance.clip(min=TINY)
    usual: Floats = variance / np.exp(np.log(variance).mean())
    return usual.clip(1 / LOUDEST, LOUDEST)


def leading(parts: Iterable[Floats], most: int) -> Floats:
    """Leading right singular vectors (d, q) of rows (n, d) that come in parts; never are all held at once."""
    rows, square = np.empty((0, 0)), np.empty((0, 0))
    for part in parts:
        rows = np.concatenate([rows, part]) if rows.size else part
        if len(rows) >= rows.shape[1]:  # the products of columns are fewer than the rows
            square, rows = rows.T @ rows + (square if square.size else 0), rows[:0]
    if square.size:
        values, vectors = np.linalg.eigh(square + rows.T @ rows)
        s, vt = np.sqrt(values[::-1].clip(min=0)), vectors.T[::-1]
    else:
        _, s, vt = np.linalg.svd(rows, full_matrices=False)
    # Contiguous, as it comes back from a file: another memory layout can change the last bit of a product.
    return np.ascontiguousarray(vt[: max(1, min(most, int((s > RANK * s[0]).sum())))].T)


@dataclass(frozen=True)
class Factors:
    """What spots have in common, and what genes have to do with it."""

    z: Floats  # (n, f) of unit variance
    loadings: Floats  # (f, g), regression of the genes on z
    share: Floats  # (f, g) of the loadings that is more than noise
    weight: Floats  # (n, 1) of the spots

    @classmethod
    def of(cls, y: Floats, variance: Floats, heard: Floats, most: int) -> "Factors":
        """Take deviations (n, g) from the gene means apart; factors that are not there are zero.

        Spots count by their variance (n,) and by how much is heard of them (n,), 0 to 1.
        """
        weight = (heard / variance)[:, None]
        found = leading([np.sqrt(weight) * y], most)
        axes = np.pad(found, ((0, 0), (0, most - found.shape[1])))
        scores = y @ axes
        unit = np.sqrt((scores**2).mean(axis=0))
        z, loadings = scores / (unit + TINY), unit[:, None] * axes.T
        told, missed = weight * z**2, weight * (y - z @ loadings) ** 2
        error = missed.sum(axis=0) / max(heard.sum() - most, 1)  # (g,)
        spread = np.sqrt(heard @ told) / (told.sum(axis=0) + TINY)  # (f,)
        return cls(z, loadings, kept(loadings, spread[:, None] * np.sqrt(error)), weight)

    def forget(self, y: Floats, held_back: Floats, leverage: Floats) -> Floats:
        """Genes (n, g) of held-back factors (n, f); see :func:`forget`."""
        return forget(y, self.z, self.loadings, held_back, leverage, weight=self.weight, share=self.share)


def forget(
    y: Floats,  # (n, g)
    z: Floats,  # (n, f)
    loadings: Floats,  # (f, g)
    held_back: Floats,  # (n, f)
    leverage: Floats,  # (n, 1), of the section means
    *,
    weight: Floats | float = 1.0,  # (n, 1) of the spots in the loadings
    share: Floats | float = 1.0,  # (f, g) of the loadings that is predicted with
) -> Floats:
    """Expression (n, g) of held-back factors, with each spot's share taken out of the loadings and its section's mean.

    Loadings are the regression of y on the factors, so without spot i they are L - c_i r_i / (1 - c_i z_i), with r_i
    what the factors leave of y_i and c_i = w_i z_i / sum_j w_j z_j^2. Along the factors the level has already forgotten
    the mean; r is what it cannot reach.
    """
    rest, told = y - z @ loadings, weight * z**2
    influence = weight * z / (told.sum(axis=0) + TINY)
    own = (held_back * influence) @ np.broadcast_to(share, loadings.shape)
    own /= 1 - (influence * z).sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):  # a spot alone in its section cannot be held back
        forgotten: Floats = held_back @ (share * loadings) - rest * (own + leverage / (1 - leverage))
    return forgotten


def kept(loadings: Floats, error: Floats) -> Floats:
    """Share (f, g) of each loading that is more than noise, from its standard error (f, g).

    A loading is told from the spots there are, and a few hundred of them leave it a wide error. How wide the true
    loadings of a factor are is learnt from all genes, as a mixture of normals about zero, and each is drawn to zero as
    far as that and its error say: adaptive shrinkage (Stephens 2017, doi:10.1093/biostatistics/kxw041).
    """
    error = np.maximum(error, RANK * np.abs(loadings)) + TINY
    return np.array([_shares(each) for each in np.abs(loadings) / error])


def _shares(ratio: Floats) -> Floats:
    """Share (g,) of effects to keep, from their ratios to their standard errors."""
    widest = np.log2(max(ratio.max(), NARROWEST) / NARROWEST)
    widths = np.append(0.0, NARROWEST * 2.0 ** np.arange(np.ceil(widest) + 1))
    total = 1 + widths[:, None] ** 2
    log_likelihood = -0.5 * (ratio**2 / total + np.log(total))  # (k, g)
    likelihood = np.exp(log_likelihood - log_likelihood.max(axis=0))
    weight = np.full((len(widths), 1), 1 / len(widths))
    for _ in range(STEPS):
        belongs = weight * likelihood
        belongs /= belongs.sum(axis=0)
        weight = belongs.mean(axis=1, keepdims=True)
    shares: Floats = ((1 - 1 / total) * belongs).sum(axis=0)
    return shares
