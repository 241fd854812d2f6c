"""Which sections have something to say to each other.

Two sections are kin where what is known of one helps to tell the other: where the evidence of both together, in one
kernel whose attention across them counts c, is largest for c above 0. It is taken for a few c on a few hundred spots
of each, tempered as everywhere, and averaged:

    kinship = sum_c c p(z of both | c)^power / sum_c p(z of both | c)^power.

A section is compared with those it is laid over and with the few whose gene means are most like its own, so that the
cost grows with the sections and not with their pairs. Others count as strangers to it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from sthisto.models._kernels import KernelAverage, Spots
from sthisto.models.gp import LEVEL

RELATIVES = 8  # other sections that a section is compared with, and may listen to
LOOKED_AT = 200  # spots of each
SHARES = (0.0, 0.5, 1.0)  # c

Floats = NDArray[np.float64]


def likeness(gene_mean: Floats) -> Floats:
    """Correlation (s, s) of the gene means (s, g): high within a patient, lower across, whatever the depth."""
    with np.errstate(invalid="ignore", divide="ignore"):  # a section may be flat
        correlation: Floats = np.nan_to_num(np.atleast_2d(np.corrcoef(gene_mean)))
    return correlation


def relatives(frame: NDArray[np.int64], alike: Floats) -> list[NDArray[np.intp]]:
    """For each section the others that it is compared with, nearest first."""
    nearness = alike + 10.0 * (frame[:, None] == frame)
    np.fill_diagonal(nearness, -np.inf)
    most = min(RELATIVES, len(frame) - 1)
    return [np.argsort(-row, kind="stable")[:most] for row in nearness]


def similarity(
    spots: Spots,
    z: Floats,
    variance: Floats,
    compared: Sequence[NDArray[np.intp]],
    mixtures: KernelAverage,
    *,
    draw: Callable[[int, int], NDArray[np.intp]],
) -> Floats:
    """Kinship (s, s) of sections, 1 of each with itself; NaN where they were not compared.

    ``draw(section, most)`` gives rows of a section.
    """
    found = np.full((len(compared), len(compared)), np.nan)
    np.fill_diagonal(found, 1.0)
    rows = [draw(section, LOOKED_AT) for section in range(len(compared))]
    for one, others in enumerate(compared):
        for other in (other for other in others if np.isnan(found[one, other])):
            pair = np.concatenate([rows[one], rows[other]])
            found[one, other] = found[other, one] = _of_pair(spots[pair], z[pair], variance[pair], mixtures)
    return found


def standing(kin: Floats) -> Floats:
    """How much each section (s,) is kin to the others, 1 of the most; all 1 where none is kin to another."""
    others = np.where(np.eye(len(kin), dtype=bool) | np.isnan(kin), 0.0, kin)
    mean = others.sum(axis=1) / np.maximum((~np.isnan(kin)).sum(axis=1) - 1, 1)
    stands: Floats = mean / mean.max() if mean.max() > 0 else np.ones(len(kin))
    return stands


def _of_pair(spots: Spots, z: Floats, variance: Floats, mixtures: KernelAverage) -> float:
    """Mean c of two sections' spots by evidence."""
    every = np.arange(len(spots))
    evidence = []
    for share in SHARES:
        heard = replace(spots, similarity=np.full(len(spots), np.sqrt(share)))
        place, look = mixtures.heads(heard, heard)
        kernel = 0.5 * place.mean(axis=0) + 0.5 * look.mean(axis=0) + LEVEL * (spots.section[:, None] == spots.section)
        evidence.append(mixtures.condition(kernel, every, z, variance)[0].sum())
    return float(np.array(SHARES) @ softmax(evidence))
