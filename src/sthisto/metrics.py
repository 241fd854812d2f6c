"""How good a prediction is, gene by gene: arrays in, numbers out.

Rows are spots and columns are genes everywhere. Scores are per gene because an average over genes hides which ones a
model predicts; take the mean yourself, with ``np.nanmean`` where constant genes occur. Arithmetic is float64 whatever
comes in, and a NaN anywhere in a gene's column makes that gene's score NaN: it is never skipped.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse, stats

Counts: TypeAlias = Any  # an array or a SciPy CSR table, whose classes carry no types


def pearson(truth: ArrayLike, predicted: ArrayLike) -> NDArray[np.float64]:
    """Pearson correlation over spots of every gene.

    The headline figure of the field: it asks whether high and low are in the right places and forgives scale and
    offset, which :func:`mse` does not.

    Parameters
    ----------
    truth, predicted
        (n, g), measured and predicted expression on the same scale.

    Returns
    -------
    (g,) in [-1, 1]; NaN for a gene that is constant in either array and for fewer than two spots, where correlation
    has no meaning.

    Raises
    ------
    ValueError
        The arrays are not two-dimensional or differ in shape.

    Examples
    --------
    >>> pearson([[0, 1], [1, 1], [2, 1]], [[1, 0], [3, 1], [5, 2]])
    array([ 1., nan])
    """
    return _correlation(*_pair(truth, predicted))


def spearman(truth: ArrayLike, predicted: ArrayLike) -> NDArray[np.float64]:
    """Spearman rank correlation over spots of every gene, ties given their average rank.

    Only the order counts, so a few bright spots cannot carry a gene.

    Parameters
    ----------
    truth, predicted
        (n, g), measured and predicted expression.

    Returns
    -------
    (g,) in [-1, 1]; NaN where :func:`pearson` is.

    Raises
    ------
    ValueError
        The arrays are not two-dimensional or differ in shape.

    Examples
    --------
    >>> spearman([[0], [1], [10]], [[0], [7], [8]])
    array([1.])
    """
    a, b = _pair(truth, predicted)
    return _correlation(
        stats.rankdata(a, axis=0, nan_policy="propagate"), stats.rankdata(b, axis=0, nan_policy="propagate")
    )


def mse(truth: ArrayLike, predicted: ArrayLike) -> NDArray[np.float64]:
    """Mean squared error over spots of every gene.

    Other than a correlation it penalizes a wrong level and a prediction that is too bold, and the gene's variance is
    its yardstick: that is what predicting the mean scores.

    Parameters
    ----------
    truth, predicted
        (n, g), measured and predicted expression on the same scale.

    Returns
    -------
    (g,) non-negative, in squared units of the input; NaN without spots.

    Raises
    ------
    ValueError
        The arrays are not two-dimensional or differ in shape.

    Examples
    --------
    >>> mse([[0.0], [2.0]], [[1.0], [2.0]])
    array([0.5])
    """
    a, b = _pair(truth, predicted)
    return _mean((a - b) ** 2)


def mae(truth: ArrayLike, predicted: ArrayLike) -> NDArray[np.float64]:
    """Mean absolute error over spots of every gene.

    As :func:`mse`, in the units of the expression and less moved by single spots.

    Parameters
    ----------
    truth, predicted
        (n, g), measured and predicted expression on the same scale.

    Returns
    -------
    (g,) non-negative, in units of the input; NaN without spots.

    Raises
    ------
    ValueError
        The arrays are not two-dimensional or differ in shape.

    Examples
    --------
    >>> mae([[0.0], [2.0]], [[1.0], [2.0]])
    array([0.5])
    """
    a, b = _pair(truth, predicted)
    return _mean(np.abs(a - b))


def lognorm(counts: Counts, target: float = 1e4) -> Counts:
    """Log-normalise counts: ``log1p(target * counts / total of the spot)``.

    The scale on which every model here learns; the same as ``sc.pp.normalize_total`` then ``sc.pp.log1p``, on plain
    arrays and without changing its input.

    Parameters
    ----------
    counts
        (n, g), dense or CSR. Pass all genes: the total of a spot is taken over the columns given.
    target
        Counts that every spot is scaled to.

    Returns
    -------
    (n, g) float32, CSR where the input was sparse; a spot without counts stays zero.

    Examples
    --------
    >>> lognorm([[1, 3], [0, 0]], target=4)
    array([[0.6931472, 1.3862944],
           [0.       , 0.       ]], dtype=float32)
    """
    if sparse.issparse(counts):
        scaled = counts.tocsr().astype(np.float64)
        factor = _per_spot(np.asarray(scaled.sum(axis=1)).ravel(), target)
        scaled.data = np.log1p(scaled.data * np.repeat(factor, np.diff(scaled.indptr)))
        return scaled.astype(np.float32)
    dense = np.asarray(counts, dtype=np.float64)
    return np.log1p(dense * _per_spot(dense.sum(axis=1), target)[:, None]).astype(np.float32)


def thin(counts: Counts, fraction: float = 0.5, *, random_state: int) -> tuple[Counts, Counts]:
    """Split counts at random into two parts that share a rate but no noise.

    Every molecule goes to the first part with probability ``fraction``. Parts of Poisson counts are independent given
    the rate, so one can be predicted from and the other scored against without a spot's noise being handed back to it.

    Parameters
    ----------
    counts
        (n, g) whole numbers, dense or CSR.
    fraction
        Expected share of the first part, between 0 and 1.
    random_state
        Of the draw.

    Returns
    -------
    Two of the kind and dtype of ``counts`` that add up to it.

    Raises
    ------
    ValueError
        Counts that are negative or not whole (log-normalised data), or a fraction outside [0, 1].

    Examples
    --------
    >>> first, second = thin(np.array([[10, 0], [3, 200]]), random_state=0)
    >>> first + second
    array([[ 10,   0],
           [  3, 200]])
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    first: Any = counts.tocsr().copy() if sparse.issparse(counts) else np.array(counts)
    values = first.data if sparse.issparse(counts) else first
    if not (np.isfinite(values).all() and (values >= 0).all() and (values == np.round(values)).all()):
        raise ValueError(
            "thinning splits molecules and needs raw counts: whole numbers >= 0. Values between "
            f"{values.min():g} and {values.max():g} were found; pass the counts, not normalised expression."
        )
    values[...] = np.random.default_rng(random_state).binomial(values.astype(np.int64), fraction)
    second = counts - first
    if sparse.issparse(counts):
        first.eliminate_zeros()
        second.eliminate_zeros()
    return first, second


def noise_ceiling(
    counts: Counts, *, random_state: int, transform: Callable[..., Counts] = lognorm, n_repeats: int = 5
) -> NDArray[np.float64]:
    """Pearson r that a perfect predictor of the true rate would reach against the observed expression.

    Counts are noisy, so r = 1 cannot be reached; this is the upper bound, gene by gene. Halves a, b of the counts
    (:func:`thin`) share the rate and not the noise. Their correlation r, averaged over ``n_repeats`` splits, gives the
    reliability of the whole as 2r / (1 + r), and the square root of it is the correlation of the whole with its
    noise-free rate. Any difference between spots that is not Poisson noise counts as signal: the figure is generous.

    Parameters
    ----------
    counts
        (n, g) raw counts, dense or CSR; all genes where ``transform`` needs the total of a spot.
    random_state
        Of the splits.
    transform
        From counts to the scale on which predictions are scored.
    n_repeats
        Splits to average over.

    Returns
    -------
    (g,) in [0, 1]; 0 where the halves do not agree (mean r <= 0, a split with a constant half counting as r = 0), since
    no signal was found there; NaN only for a gene that is constant, as in :func:`pearson`, so that both are averaged
    over the same genes.

    Raises
    ------
    ValueError
        ``counts`` are not counts.

    References
    ----------
    Spearman (1910), Brown (1910): the reliability of a test from its halves. Thinning: Neufeld et al. (2023),
    Biostatistics, "Inference after latent variable estimation for single-cell RNA sequencing data".

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> rate = rng.gamma(2.0, 1.0, size=(500, 1))
    >>> noise_ceiling(rng.poisson(np.hstack([rate, 50 * rate])), random_state=0, transform=np.asarray).round(1)
    array([0.7, 1. ])
    """
    seeds = np.random.SeedSequence(random_state).generate_state(n_repeats)
    halves = ((_dense(transform(half)) for half in thin(counts, random_state=int(s))) for s in seeds)
    r = np.mean([np.nan_to_num(pearson(*pair)) for pair in halves], axis=0).clip(min=0)
    whole = _dense(transform(counts))
    ceiling: NDArray[np.float64] = np.where(_varies(whole), np.sqrt(2 * r / (1 + r)), np.nan)
    return ceiling


def _pair(truth: ArrayLike, predicted: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.asarray(truth, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(
            f"truth and prediction must be arrays (spots, genes) of one shape, got {a.shape} and {b.shape}"
        )
    return a, b


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    r = np.full(a.shape[1], np.nan)
    if len(a) < 2:
        return r
    varies = _varies(a) & _varies(b)
    a, b = ((x[:, varies] - x[:, varies].mean(axis=0)) / np.ptp(x[:, varies], axis=0) for x in (a, b))
    r[varies] = (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    clipped: NDArray[np.float64] = np.clip(r, -1, 1)  # rounding can step over
    return clipped


def _varies(x: NDArray[np.float64]) -> NDArray[np.bool_]:
    # By the range: the variance of a constant can come out as rounding noise instead of zero. NaN compares false.
    return np.ptp(x, axis=0) > 0 if len(x) else np.zeros(x.shape[1], dtype=bool)


def _mean(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x.mean(axis=0) if len(x) else np.full(x.shape[1], np.nan)


def _per_spot(total: NDArray[np.float64], target: float) -> NDArray[np.float64]:
    return np.divide(target, total, out=np.zeros_like(total), where=total > 0)


def _dense(x: Counts) -> NDArray[np.float64]:
    return np.asarray(x.toarray() if sparse.issparse(x) else x, dtype=np.float64)
