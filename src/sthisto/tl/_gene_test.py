"""Which genes of a fit to believe: told with whole blocks left out, and compared with patterns as smooth as theirs."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control

from sthisto.evaluation import score
from sthisto.models import Model, Section
from sthisto.models._standardize import expression_of, features_of
from sthisto.uncertainty import SurrogateTest, p_values

BLOCK = 4.0  # pitches
FOLDS = 5
MOST_SPOTS = 1000  # of a section, for the p-values: their cost is cubic


def folds_of(sections: Sequence[Section], random_state: int, least: int) -> list[NDArray[np.int64]]:
    """Fold (n,) of the spots of each section: whole blocks, dealt out in turn, large ones first.

    Raises
    ------
    ValueError
        A section is a single block, or too few spots are left without a fold: fewer than ``least``.
    """
    random, folds = np.random.default_rng(random_state), []
    for section in sections:
        cell = np.floor((section.xy - section.xy.min(axis=0) + random.uniform(0, BLOCK, 2)) / BLOCK)
        _, member, size = np.unique(cell, axis=0, return_inverse=True, return_counts=True)
        if len(size) < 2:
            raise ValueError(
                f"section {section.name!r} with {len(section)} spots lies in one block of {BLOCK:g} pitches: too small "
                "to tell how well its genes are told from elsewhere. Fit without test_genes."
            )
        dealt = np.empty(len(size), dtype=np.int64)
        dealt[np.argsort(-size - random.uniform(size=len(size)))] = np.arange(len(size)) % FOLDS
        folds.append(dealt[member.ravel()])
    left = [[int((fold != each).sum()) for fold in folds] for each in range(max(fold.max() for fold in folds) + 1)]
    if min(map(sum, left)) < least or min(map(min, left)) < 2:
        raise ValueError(f"too few spots for test_genes: without a block {min(map(sum, left))} would be left.")
    return folds


def judge(
    sections: Sequence[Section],
    looks: Sequence[Section],
    folds: Sequence[NDArray[np.int64]],
    *,
    again: Callable[[Sequence[Section]], Model],
    random_state: int,
) -> dict[str, NDArray[np.float64]]:
    """Cross-fit over the folds, and give columns (g,) of ``var``.

    Parameters
    ----------
    sections
        Training spots with expression.
    looks
        The same with features, which the model need not read.
    folds
        Of :func:`folds_of`.
    again
        Fits another model like the one to judge.
    random_state
        Of the surrogates.
    """
    held_back = _held_back(sections, folds, again)
    r, by_fold = [], []
    for section, fold, predicted in zip(sections, folds, held_back, strict=True):
        measured = expression_of(section)
        r.append(_pearson(measured, predicted))
        by_fold += [_pearson(measured[fold == each], predicted[fold == each]) for each in np.unique(fold)]
    p = p_values(_followed(look, fold, random_state) for look, fold in zip(looks, folds, strict=True))
    return {
        "pcc_heldout": _mean(np.array(r)),
        "pcc_heldout_std": np.sqrt(_mean((np.array(by_fold) - _mean(np.array(by_fold))) ** 2)),
        "pvalue_heldout": p,
        "qvalue_heldout": false_discovery_control(p),
    }


def _held_back(
    sections: Sequence[Section], folds: Sequence[NDArray[np.int64]], again: Callable[[Sequence[Section]], Model]
) -> list[NDArray[np.float32]]:
    """Predictions (n, g) of each section by fits that had not seen the block around each spot."""
    held_back = [np.empty_like(expression_of(section)) for section in sections]
    for each in range(max(fold.max() for fold in folds) + 1):
        pairs = list(zip(sections, folds, strict=True))
        model = again([section.keep(np.flatnonzero(fold != each)) for section, fold in pairs])
        for (section, fold), out in zip(pairs, held_back, strict=True):
            rows = np.flatnonzero(fold == each)
            if len(rows):
                out[rows] = np.maximum(model.predict(section.keep(rows)), 0)
    return held_back


def _followed(look: Section, fold: NDArray[np.int64], random_state: int) -> SurrogateTest:
    """Compare the genes of one section with surrogates, on some of its spots where there are many."""
    rows = np.sort(np.random.default_rng(random_state).permutation(len(look))[:MOST_SPOTS])
    part = look.keep(rows)
    return SurrogateTest.of(part.xy, features_of(part), expression_of(part), fold[rows], random_state=random_state)


def _pearson(measured: NDArray[np.float32], predicted: NDArray[np.float32]) -> NDArray[np.float64]:
    if len(measured) < 3:
        return np.full(measured.shape[1], np.nan)
    r: NDArray[np.float64] = score(measured, predicted)["pearson"]
    return r


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over rows (g,) of what is there; NaN where nothing is."""
    there = np.isfinite(values)
    count = there.sum(axis=0)
    total = np.where(there, values, 0).sum(axis=0)
    mean: NDArray[np.float64] = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
    return mean
