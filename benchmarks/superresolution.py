"""Resolution won back, with a truth to score against: spots pooled into coarse ones, and predicted from these.

    python benchmarks/superresolution.py [--data DIR] [--models ridge gp] [--sections 151673] [--seeds 1]

Of a hexagonal array the seven spots of each hexagon are pooled, of a square one each 2 x 2, where all are there. Pooled
is one half of a binomial thinning of the counts, scored is the other: scored against the counts that were pooled, the
nearest coarse spot would win by handing each spot its own noise back. Models are fitted on the coarse section, with
image features at its positions, and predict at the true spots. Figures are Pearson r of log1p CP10K, means over genes
and seeds; squared errors would not compare, since the logarithm of a pool lies above those of its spots.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from heldout import N_GENES, Table, parser
from numpy.typing import NDArray
from scipy import sparse
from sections_data import SECTIONS, read

import sthisto
from sthisto import grids
from sthisto.evaluation import choose_genes, score
from sthisto.metrics import lognorm, thin

NEIGHBOURS = 6  # of idw: the coarse spots around
HEXAGON = np.array([[0, 0], [1, 0], [0, 1], [1, -1], [-1, 0], [0, -1], [-1, 1]])  # sites, basis at 60 degrees


@dataclass(frozen=True)
class Pools:
    """Which spots make a coarse one."""

    rows: NDArray[np.intp]  # (n,) spots that are in a whole pool
    member: NDArray[np.intp]  # (n,) the pool of each
    xy: NDArray[np.float64]  # (m, 2) centres, pixels
    widening: float  # coarse pitch in pitches

    @classmethod
    def of(cls, xy: NDArray[np.float64]) -> "Pools":
        """Pool neighbors on the lattice of the spots."""
        lattice = grids.Lattice.fit(xy)
        hexagonal = lattice.kind == "hexagonal"
        pool = hexagons(lattice.index(xy)) if hexagonal else lattice.index(xy) // 2
        size = 7 if hexagonal else 4
        _, member, count = np.unique(pool, axis=0, return_inverse=True, return_counts=True)
        rows = np.flatnonzero(count[member] == size)
        _, whole = np.unique(member[rows], return_inverse=True)
        centres = np.stack([np.bincount(whole, column) / size for column in xy[rows].T], axis=1)
        return cls(rows, whole, centres, np.sqrt(size))

    def sum(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        """(m, g) counts of the pools."""
        ones = np.ones(len(self.rows), dtype=counts.dtype)
        return sparse.csr_matrix((ones, (self.member, np.arange(len(ones))))) @ counts[self.rows]


def hexagons(site: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give the site in the middle of each site's hexagon: hexagons tile the lattice about 2a + b and -a + 3b.

    3 i + j modulo 7 is 0 in the middles, and differs among the seven sites of a hexagon.
    """
    step = np.empty((7, 2), dtype=np.int64)
    step[(HEXAGON @ [3, 1]) % 7] = HEXAGON
    return site - step[(site @ [3, 1]) % 7]


def coarsen(fine: AnnData, name: str, data: Path, pools: Pools, counts: sparse.csr_matrix) -> AnnData:
    """Make the coarse section of pooled counts, with features at its positions."""
    pooled, source = pools.sum(counts), SECTIONS[name]
    genes = choose_genes(pooled, np.zeros(pooled.shape[0]), N_GENES)
    coarse = AnnData(lognorm(pooled), var=pd.DataFrame({"highly_variable": genes}, fine.var_names))
    coarse.obsm["spatial"] = pools.xy
    coarse.uns["spatial"] = fine.uns["spatial"]
    image = None if source.image is None else data / source.image
    sthisto.pp.extract_features(coarse, image=image, pitch_um=source.pitch_um * pools.widening)
    return coarse


def run(
    fine: AnnData, coarse: AnnData, truth: NDArray[np.float32], models: list[str], random_state: int
) -> Iterator[tuple[str, float]]:
    """Mean r at the true spots, of the nearest coarse spot and of every model."""
    xy = np.asarray(fine.obsm["spatial"], dtype=float)
    nearest = grids.nearest(xy, coarse.obsm["spatial"])[1][:, 0]
    yield "nearest", mean_r(truth, coarse[nearest, coarse.var["highly_variable"]].X.toarray())
    for model in models:
        params = {"n_neighbors": NEIGHBOURS} if model == "idw" else None
        sthisto.tl.fit(coarse, model, params=params, random_state=random_state)
        dense = sthisto.tl.upsample(coarse, xy, features=np.asarray(fine.obsm["X_histo"]))
        yield model, mean_r(truth, dense.X)


def mean_r(truth: NDArray[np.float32], predicted: NDArray[np.float32]) -> float:
    return float(np.nanmean(score(truth, predicted)["pearson"]))


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(models=["idw", "ridge", "gp", "attention"], seeds=1)
    arguments = options.parse_args()
    table = Table("Predicted at the true spots from pooled ones: Pearson r against the other half of the counts")
    for name in arguments.sections:
        fine = read(name, arguments.data)
        pools = Pools.of(np.asarray(fine.obsm["spatial"], dtype=float))
        print(f"{name}: {len(pools.xy)} coarse spots of {len(pools.rows)} true ones", flush=True)
        for random_state in range(arguments.seeds):
            seen, judged = thin(sparse.csr_matrix(fine.X), random_state=random_state)
            coarse = coarsen(fine, name, arguments.data, pools, seen)
            truth = lognorm(judged[pools.rows])[:, coarse.var["highly_variable"].to_numpy()].toarray()
            for model, r in run(fine[pools.rows], coarse, truth, arguments.models, random_state):
                table.add(name, model, r)
    table.print()


if __name__ == "__main__":
    main()
