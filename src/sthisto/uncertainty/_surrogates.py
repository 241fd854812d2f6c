"""Test of association between genes and image features, against surrogates of the same spatial autocorrelation."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist, pdist

from sthisto._statistics import FeatureStatistics, leading_components

COMPONENTS = 20  # of the features
LIMIT = 5.0  # standard deviations
RIDGES = (1.0, 10.0)  # averaged
LENGTH = 30.0  # pitches, of the kernel whose eigenvectors are the modes: long, so that a gradient is one of them
FIRST_BAND, GROWTH = 2.0, 1.3  # modes in the band of the smoothest, and the factor of each further one
N_SURROGATES = 999

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SurrogateTest:
    """Test whether image features predict a gene better than random patterns of its autocorrelation.

    Neighboring spots are similar in expression and in image features. A smooth pattern without any relation to the
    image still correlates with it, and a permutation of spots, which is not smooth, would call nearly every such gene
    significant.

    The statistic of a gene y (n spots) is its correlation with the prediction from image features with whole blocks
    held out. That prediction is kernel ridge regression, linear in y: H y, with row i of H made without the block of
    spot i. The null distribution is the statistic of surrogates y*, predicted from themselves with the same H, so that
    information that leaks over the borders of blocks through autocorrelation leaks for them, too.

    Surrogates have the autocorrelation of the gene: y is decomposed into modes of the section's own shape (eigenvectors
    of an exponential kernel of the positions, as in Moran spectral randomization: Wagner and Dray 2015,
    doi:10.1111/2041-210X.12407), and within bands of modes of similar roughness its coefficients are rotated at random,
    their sum of squares kept. Unlike a toroidal shift this needs no rectangle: tissue has edges and holes. With P (n,
    k) one random unit pattern of each band and a (k,) the gene's amplitude in the bands, y* = P a, and all genes share
    the k x k tables P'HP and P'H'HP of a draw: a thousand draws cost as much as one.

    Attributes
    ----------
    r
        (g,) statistic of the genes.
    null
        (n_surrogates, g) statistic of the surrogates.
    n_spots
        Spots of the section.
    """

    r: Floats
    null: Floats
    n_spots: int

    @classmethod
    def of(
        cls,
        xy: Floats,
        features: NDArray[np.float32],
        expression: NDArray[np.float32],
        fold: NDArray[np.int64],
        *,
        random_state: int,
        n_surrogates: int = N_SURROGATES,
    ) -> "SurrogateTest":
        """Compare the genes of a section with surrogates.

        Parameters
        ----------
        xy
            (n, 2) pitches.
        features, expression
            (n, d) and (n, g) of the spots.
        fold
            (n,) folds of whole blocks; spots are predicted from those of other folds.
        random_state
            Seed of the surrogates.
        n_surrogates
            Number of surrogates.
        """
        hat = _hat(features, fold)
        y = expression - expression.mean(axis=0, dtype=np.float64)
        modes, starts = _modes(xy)
        amplitude = np.sqrt(np.add.reduceat((modes.T @ y) ** 2, starts, axis=0))  # (k, g)
        own = hat @ y
        r = _ratio((own * y).sum(axis=0), (own**2).sum(axis=0), (y**2).sum(axis=0))
        random, predicted_modes = np.random.default_rng(random_state), hat @ modes
        sizes, null = np.diff(starts, append=modes.shape[1]), np.empty((n_surrogates, y.shape[1]))
        for row in null:
            rotated = random.normal(size=modes.shape[1])
            rotated /= np.sqrt(np.repeat(np.add.reduceat(rotated**2, starts), sizes))
            pattern, predicted = (  # (n, k)
                np.add.reduceat(each * rotated, starts, axis=1) for each in (modes, predicted_modes)
            )
            product = (amplitude * (predicted.T @ pattern @ amplitude)).sum(axis=0)
            square = (amplitude * (predicted.T @ predicted @ amplitude)).sum(axis=0)
            row[:] = _ratio(product, square, (amplitude**2).sum(axis=0))
        return cls(r, null, len(xy))


def p_values(sections: Iterable[SurrogateTest]) -> Floats:
    """P-values (g,) of genes over sections, whose correlations are averaged by their numbers of spots.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> xy = np.stack(np.meshgrid(range(12), range(12)), axis=-1).reshape(-1, 2) + 0.0
    >>> features = rng.normal(size=(144, 3)).astype(np.float32)
    >>> genes = np.stack([features[:, 0] + 5, rng.normal(size=144)], axis=1).astype(np.float32)
    >>> fold = ((xy // 4) @ [1, 3]).astype(int)
    >>> p_values([SurrogateTest.of(xy, features, genes, fold, random_state=0)]) < 0.01
    array([ True, False])
    """
    tests = list(sections)
    r = np.sum([each.n_spots * each.r for each in tests], axis=0)
    null = np.sum([each.n_spots * each.null for each in tests], axis=0)
    p: Floats = (1 + (null >= r).sum(axis=0)) / (1 + len(null))
    return p


def spectral_surrogates(
    xy: Floats, values: NDArray[np.float32], number: int, random: np.random.Generator
) -> NDArray[np.float32]:
    """Random patterns (number, n, q) with the autocorrelation and the variance of values (n, q), each of mean 0.

    Parameters
    ----------
    xy
        (n, 2) pitches.
    values
        (n, q) float32.
    number
        How many.
    random
        Generator.

    Examples
    --------
    >>> xy, values = np.random.default_rng(0).normal(size=(2, 9, 2))
    >>> surrogates = spectral_surrogates(xy, values, 5, np.random.default_rng(0))
    >>> surrogates.shape, bool(np.allclose((surrogates**2).sum(axis=1), 9 * values.var(axis=0), rtol=1e-4))
    ((5, 9, 2), True)
    """
    modes, starts = _modes(xy)
    sizes = np.diff(starts, append=modes.shape[1])
    amplitude = np.sqrt(np.add.reduceat((modes.T @ values) ** 2, starts, axis=0))  # (k, q)
    surrogates = np.empty((number, *values.shape), dtype=np.float32)
    for surrogate in surrogates:
        rotated = random.normal(size=(modes.shape[1], values.shape[1]))
        norm = np.sqrt(np.add.reduceat(rotated**2, starts, axis=0))
        surrogate[:] = modes @ (rotated * np.repeat(amplitude / norm, sizes, axis=0))
    return surrogates


def _hat(features: NDArray[np.float32], fold: NDArray[np.int64]) -> Floats:
    """(n, n) matrix of the held-out predictions, less the columns' means: correlations depend on differences only."""
    standard = FeatureStatistics.of(features).standardize(features).clip(-LIMIT, LIMIT)
    components = standard @ leading_components([standard], COMPONENTS)
    length = np.median(pdist(components)) or 1.0
    kernel = np.exp(-0.5 * (cdist(components, components) / length) ** 2)
    hat = np.zeros_like(kernel)
    for each in np.unique(fold):
        out, training = np.flatnonzero(fold == each), np.flatnonzero(fold != each)
        inside = kernel[np.ix_(training, training)]
        for ridge in RIDGES:
            solved = np.linalg.solve(inside + ridge * np.eye(len(training)), kernel[np.ix_(training, out)]).T
            hat[np.ix_(out, training)] += (solved - solved.mean(axis=1, keepdims=True)) / len(RIDGES)
    centered: Floats = hat - hat.mean(axis=0)
    return centered


def _modes(xy: Floats) -> tuple[Floats, NDArray[np.intp]]:
    """Orthonormal patterns (n, n - 1), smooth ones first, all of mean 0, and where their bands start."""
    kernel = np.exp(-cdist(xy, xy) / LENGTH)
    centered = kernel - kernel.mean(axis=0) - kernel.mean(axis=1, keepdims=True) + kernel.mean()
    modes = np.linalg.eigh(centered)[1][:, :0:-1]
    starts, size = [0], FIRST_BAND
    while starts[-1] + 2 * size < modes.shape[1]:
        starts.append(starts[-1] + round(size))
        size *= GROWTH
    return modes, np.array(starts, dtype=np.intp)


def _ratio(product: Floats, predicted: Floats, measured: Floats) -> Floats:
    """Correlations from sums of products and squares; 0 where either does not vary."""
    norm = np.sqrt(np.maximum(predicted * measured, 0))
    return np.divide(product, norm, out=np.zeros_like(product), where=norm > 1e-12 * (1 + np.abs(product)))
