"""Which genes follow the look of the tissue, beyond what any smooth pattern seems to.

Neighboring spots are alike, in expression and in look. A smooth pattern that has nothing to do with the picture still
correlates with it, and a model that fills gaps foretells it from its neighbors; permuted spots, which are not smooth,
make nearly every such gene significant. The question asked here is therefore: would this gene be told from the look of
the tissue as well if its own pattern lay elsewhere on it?

The statistic of a gene y (n spots) is the correlation of y with what the look alone foretells where whole blocks were
left out. That is kernel ridge regression, linear in y: the prediction is H y, with row i of H made without the block of
spot i. The null distribution is the same statistic of surrogates y*, predicted from themselves with the same H, so that
whatever leaks over the edges of the blocks because neighbors are alike leaks for them, too.

Surrogates have the autocorrelation of the gene: y is taken apart into modes of the section's own shape (eigenvectors of
an exponential kernel of the positions, as in Moran spectral randomisation: Wagner and Dray 2015,
doi:10.1111/2041-210X.12407), and in bands of modes of like roughness its coefficients are turned at random, their sum
of squares kept. Unlike a toroidal shift this needs no rectangle: tissue has edges and holes. With P (n, k) one random
unit pattern of each band and a (k,) the gene's strength in the bands, y* = P a, and all genes share the k x k tables
P'HP and P'H'HP of a draw: a thousand draws cost what one does.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist, pdist

COMPONENTS = 20  # of the features
OUTLYING = 5.0  # deviations
NOISES = (1.0, 10.0)  # ridges, averaged
LENGTH = 30.0  # pitches, of the kernel whose eigenvectors are the modes: long, so that a gradient is one of them
SMOOTHEST, GROWTH = 2.0, 1.3  # modes in the band of the smoothest, and how much more are in each further one
DRAWS = 999

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SurrogateTest:
    """How well the look of one section foretells its genes, and how well it foretells patterns like them."""

    r: Floats  # (g,)
    null: Floats  # (draws, g)
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
        draws: int = DRAWS,
    ) -> "SurrogateTest":
        """Compare the genes of a section with surrogates.

        Parameters
        ----------
        xy
            (n, 2) pitches.
        features, expression
            (n, d) and (n, g) of the spots.
        fold
            (n,) which spots are predicted together, from those of other folds; whole blocks.
        random_state
            Of the surrogates.
        draws
            Surrogates.
        """
        hat = _hat(features, fold)
        y = expression - expression.mean(axis=0, dtype=np.float64)
        modes, starts = _modes(xy)
        power = np.sqrt(np.add.reduceat((modes.T @ y) ** 2, starts, axis=0))  # (k, g)
        own = hat @ y
        r = _ratio((own * y).sum(axis=0), (own**2).sum(axis=0), (y**2).sum(axis=0))
        random, ahead, null = np.random.default_rng(random_state), hat @ modes, np.empty((draws, y.shape[1]))
        ends = np.append(starts[1:], modes.shape[1])
        for draw in null:
            turned = random.normal(size=modes.shape[1])
            turned /= np.sqrt(np.repeat(np.add.reduceat(turned**2, starts), ends - starts))
            pattern, foretold = (np.add.reduceat(each * turned, starts, axis=1) for each in (modes, ahead))  # (n, k)
            both = (power * (foretold.T @ pattern @ power)).sum(axis=0)
            draw[:] = _ratio(both, (power * (foretold.T @ foretold @ power)).sum(axis=0), (power**2).sum(axis=0))
        return cls(r, null, len(xy))


def p_values(sections: Iterable[SurrogateTest]) -> Floats:
    """P-values (g,) of genes over sections, whose correlations are averaged by their spots.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> xy = np.stack(np.meshgrid(range(12), range(12)), axis=-1).reshape(-1, 2) + 0.0
    >>> look = rng.normal(size=(144, 3)).astype(np.float32)
    >>> genes = np.stack([look[:, 0] + 5, rng.normal(size=144)], axis=1).astype(np.float32)
    >>> fold = ((xy // 4) @ [1, 3]).astype(int)
    >>> p_values([SurrogateTest.of(xy, look, genes, fold, random_state=0)]) < 0.01
    array([ True, False])
    """
    r, null, spots = np.zeros(0), np.zeros(0), 0
    for each in sections:
        r, null = (each.n_spots * new + (old if spots else 0) for new, old in ((each.r, r), (each.null, null)))
        spots += each.n_spots
    p: Floats = (1 + (null >= r).sum(axis=0)) / (1 + len(null))
    return p


def _hat(features: NDArray[np.float32], fold: NDArray[np.int64]) -> Floats:
    """(n, n) what each spot is foretold by the others, less the columns' means: only differences are correlated."""
    mean, std = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    scale = np.divide(1, std, out=np.zeros_like(std), where=std > 1e-6 * np.abs(mean))
    standard = ((features - mean) * scale).clip(-OUTLYING, OUTLYING)
    look = standard @ np.linalg.eigh(standard.T @ standard)[1][:, : -COMPONENTS - 1 : -1]
    length = np.median(pdist(look)) or 1.0
    kernel = np.exp(-0.5 * (cdist(look, look) / length) ** 2)
    hat = np.zeros_like(kernel)
    for each in np.unique(fold):
        out, seen = np.flatnonzero(fold == each), np.flatnonzero(fold != each)
        inside = kernel[np.ix_(seen, seen)]
        for noise in NOISES:
            solved = np.linalg.solve(inside + noise * np.eye(len(seen)), kernel[np.ix_(seen, out)]).T
            hat[np.ix_(out, seen)] += (solved - solved.mean(axis=1, keepdims=True)) / len(NOISES)
    centred: Floats = hat - hat.mean(axis=0)
    return centred


def _modes(xy: Floats) -> tuple[Floats, NDArray[np.intp]]:
    """Orthonormal patterns (n, n - 1), smooth ones first, none of them with a mean, and where their bands start."""
    kernel = np.exp(-cdist(xy, xy) / LENGTH)
    centred = kernel - kernel.mean(axis=0) - kernel.mean(axis=1, keepdims=True) + kernel.mean()
    modes = np.linalg.eigh(centred)[1][:, :0:-1]
    starts, size = [0], SMOOTHEST
    while starts[-1] + 2 * size < modes.shape[1]:
        starts.append(starts[-1] + round(size))
        size *= GROWTH
    return modes, np.array(starts, dtype=np.intp)


def _ratio(both: Floats, foretold: Floats, measured: Floats) -> Floats:
    """Correlations, 0 where either does not vary."""
    size = np.sqrt(np.maximum(foretold * measured, 0))
    return np.divide(both, size, out=np.zeros_like(both), where=size > 1e-12 * (1 + np.abs(both)))
