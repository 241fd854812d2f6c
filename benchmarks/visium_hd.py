"""Seconds and memory of a Visium HD section of 1 000 000 bins of 2 um, from 16 um bins to maps of 8 and of 2 um.

    python benchmarks/visium_hd.py [--side 1000] [--genes 200] [--parts 1]

An invented section: smooth maps determine its picture (0.5 um a pixel, a TIFF on disk) and the rates of its genes, from
which the counts of the 2 um bins are drawn, sparse. They are summed to bins of 16 um, which the model learns from. The
map of 2 um is made in parts of 50 000 points, each written and let go; ``--parts`` says how many are timed. The
correlation is that of the predicted expression of 8 um bins with their true rates.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc
import tifffile
from anndata import AnnData
from peak_memory import forget_peak, peak_gb
from scipy import sparse
from scipy.ndimage import gaussian_filter

import sthisto
from sthisto import grids

BIN_UM, MPP = 2, 0.5
COARSE = 8  # bins of 2 um along a bin of 16
PART = 50_000


@contextmanager
def measured(what: str) -> Iterator[None]:
    """Print the seconds and the peak of the process's memory."""
    forget_peak()
    start = time.perf_counter()
    yield
    print(f"| {what} | {time.perf_counter() - start:.1f} | {peak_gb():.2f} |", flush=True)


def rates(side: int, n_genes: int, random_state: int = 0) -> Iterator[np.ndarray]:
    """Yield the rate (side, side) of each gene: one of eight maps, sharp or soft, and how high it is."""
    rng = np.random.default_rng(random_state)
    for gene in range(n_genes):
        x = maps(side)[gene % 8] * rng.uniform(0.5, 1.5)
        yield 0.05 * rng.gamma(2.0) * np.exp(x) / np.exp(x).mean()


def maps(side: int, random_state: int = 1) -> np.ndarray:
    """Smooth maps (8, side, side) of unit variance, from 20 to 100 um wide."""
    if side not in KEPT:
        rng = np.random.default_rng(random_state)
        made = [gaussian_filter(rng.normal(size=(side, side)).astype(np.float32), s) for s in np.linspace(10, 50, 8)]
        KEPT[side] = np.stack([each / each.std() for each in made])
    return KEPT[side]


KEPT: dict[int, np.ndarray] = {}


def make(folder: Path, side: int, n_genes: int) -> None:
    """Write the section: table of 2 um bins and picture."""
    rng = np.random.default_rng(2)
    columns = [sparse.csc_matrix(rng.poisson(rate).astype(np.float32).reshape(-1, 1)) for rate in rates(side, n_genes)]
    row, column = np.indices((side, side)).reshape(2, -1)
    adata = AnnData(sparse.csr_matrix(sparse.hstack(columns, format="csr")))
    adata.obsm["spatial"] = (np.stack([column, row], axis=1) + 0.5) * BIN_UM / MPP
    adata.obs["array_row"], adata.obs["array_col"] = row, column
    adata.write_h5ad(folder / "square_002um.h5ad")
    colors = 180 + 25 * maps(side)[:6].reshape(2, 3, side, side).sum(axis=0)
    fine = np.kron(colors.clip(0, 255).astype(np.uint8).transpose(1, 2, 0), np.ones((4, 4, 1), np.uint8))
    fine -= rng.integers(0, 20, fine.shape, dtype=np.uint8).clip(max=fine)
    tifffile.imwrite(folder / "image.btf", fine, bigtiff=True, tile=(256, 256), compression="zlib")


def pooled(adata: AnnData, side: int) -> AnnData:
    """Sum the bins of 2 um in squares of 8 x 8, without a dense table."""
    row, column = (adata.obs[name].to_numpy() // COARSE for name in ("array_row", "array_col"))
    wide = -(-side // COARSE)
    which = sparse.csr_matrix((np.ones(adata.n_obs, np.float32), (row * wide + column, np.arange(adata.n_obs))))
    made = AnnData(which @ adata.X, var=adata.var)
    rows, columns = np.indices((wide, wide)).reshape(2, -1)
    made.obsm["spatial"] = (np.stack([columns, rows], axis=1) + 0.5) * COARSE * BIN_UM / MPP
    return made


def score(dense: AnnData, side: int, n_genes: int, factor: int) -> float:
    """Mean over genes of the correlation of a map with the true rates of its bins."""
    at = np.floor(dense.obsm["spatial"] * MPP / (BIN_UM * factor)).astype(int)
    found = []
    for gene, rate in enumerate(rates(side, n_genes)):
        true = rate.reshape(side // factor, factor, side // factor, factor).mean(axis=(1, 3))
        found.append(np.corrcoef(np.log1p(true[at[:, 1], at[:, 0]]), dense.X[:, gene])[0, 1])
    return float(np.mean(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1000, help="bins of 2 um along the section")
    parser.add_argument("--genes", type=int, default=200)
    parser.add_argument("--parts", type=int, default=1, help="parts of the 2 um map to time")
    arguments = parser.parse_args()
    side, n_genes = arguments.side, arguments.genes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        making = multiprocessing.get_context("spawn").Process(target=make, args=(folder, side, n_genes))
        making.start()  # in a process of its own, so that its memory is not counted
        making.join()
        run(folder, side, n_genes, arguments.parts)


def run(folder: Path, side: int, n_genes: int, parts: int) -> None:
    """Go the whole way, step by step."""
    print("| step | s | peak of the process, GB |\n|---|---|---|")
    with measured(f"read {side * side} bins of 2 um"):
        bins = ad.read_h5ad(folder / "square_002um.h5ad")
    with measured("find their lattice"):
        lattice = grids.Lattice.fit(bins.obsm["spatial"])
    with measured("sum to 16 um, normalise"):
        adata = pooled(bins, side)
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
    with measured(f"extract_features of {adata.n_obs} bins of 16 um"):
        sthisto.pp.extract_features(adata, image=folder / "image.btf", mpp=MPP, pitch_um=16, patch_um=56)
    with measured(f"fit, {n_genes} genes"):
        sthisto.tl.fit(adata)
    coarse = grids.Lattice.fit(adata.obsm["spatial"])
    with measured("upsample to 8 um"):
        dense = sthisto.tl.upsample(adata, coarse.split(2))
    told = f"{dense.n_obs} bins of 8 um, correlation with the truth {score(dense, side, n_genes, 4):.3f}"
    del dense
    sites = lattice.index(bins.obsm["spatial"])
    starts = range(0, len(sites), PART)
    with measured(f"upsample to 2 um, {min(parts, len(starts))} of {len(starts)} parts"):
        for number, start in enumerate(starts[:parts]):
            part = sthisto.tl.upsample(adata, lattice.points(sites[start : start + PART]))
            part.write_h5ad(folder / f"part_{number}.h5ad")
    print(f"\n{told}; the 2 um table stayed sparse: {bins.X.nnz} of {bins.X.shape[0] * bins.X.shape[1]} values")


if __name__ == "__main__":
    main()
