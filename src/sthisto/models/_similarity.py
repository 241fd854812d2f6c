"""Pairwise similarity of sections, estimated from marginal likelihoods.

Two sections are similar where one helps to predict the other: where the evidence of both together, in one kernel whose
correlation across them is c, is largest for c above 0. It is taken for a few c on a few hundred spots of each, tempered
as everywhere, and averaged:

    similarity = sum_c c p(z of both | c)^power / sum_c p(z of both | c)^power.

A section is compared with those it is registered to and with the few whose gene means are most like its own, so that
the cost grows with the sections and not with their pairs. Others count as dissimilar.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from sthisto.models._kernels import KernelAverage, Spots

N_CANDIDATES = 8  # other sections that a section is compared with, and may borrow spots from
N_SPOTS = 200  # of each section
CORRELATIONS = (0.0, 0.5, 1.0)  # c

Floats = NDArray[np.float64]


def gene_mean_correlation(gene_mean: Floats) -> Floats:
    """Correlation (s, s) of the gene means (s, g): high within a patient, lower across, whatever the depth."""
    with np.errstate(invalid="ignore", divide="ignore"):  # a section may be flat
        correlation: Floats = np.nan_to_num(np.atleast_2d(np.corrcoef(gene_mean)))
    return correlation


def candidates(frame: NDArray[np.int64], correlation: Floats) -> list[NDArray[np.intp]]:
    """For each section the others that it is compared with, nearest first."""
    nearness = correlation + 10.0 * (frame[:, None] == frame)
    np.fill_diagonal(nearness, -np.inf)
    most = min(N_CANDIDATES, len(frame) - 1)
    return [np.argsort(-row, kind="stable")[:most] for row in nearness]


def section_similarity(
    spots: Spots,
    z: Floats,
    variance: Floats,
    compared: Sequence[NDArray[np.intp]],
    average: KernelAverage,
    *,
    draw: Callable[[int, int], NDArray[np.intp]],
) -> Floats:
    """Similarity (s, s) of sections, 1 of each with itself; NaN where they were not compared.

    ``draw(section, most)`` gives rows of a section.
    """
    found = np.full((len(compared), len(compared)), np.nan)
    np.fill_diagonal(found, 1.0)
    rows = [draw(section, N_SPOTS) for section in range(len(compared))]
    for one, others in enumerate(compared):
        for other in (other for other in others if np.isnan(found[one, other])):
            pair = np.concatenate([rows[one], rows[other]])
            evidence = [
                average.evidence(
                    replace(spots[pair], similarity=np.full(len(pair), np.sqrt(c))), z[pair], variance[pair]
                )
                for c in CORRELATIONS
            ]
            found[one, other] = found[other, one] = float(np.array(CORRELATIONS) @ softmax(evidence))
    return found


def centrality(similarity: Floats) -> Floats:
    """Mean similarity (s,) of each section to the others, 1 for the largest; all 1 where none is similar to another."""
    others = np.where(np.eye(len(similarity), dtype=bool) | np.isnan(similarity), 0.0, similarity)
    mean = others.sum(axis=1) / np.maximum((~np.isnan(similarity)).sum(axis=1) - 1, 1)
    central: Floats = mean / mean.max() if mean.max() > 0 else np.ones(len(similarity))
    return central
