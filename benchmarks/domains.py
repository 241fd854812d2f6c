"""Spatial domains of cortex 151673 against its seven labelled layers.

    python benchmarks/domains.py [--data DIR] [--methods kmeans stagate stmask] [--inputs raw denoised dense]
        [--seeds 0 1 2] [--epochs N]

Adjusted Rand index of every method on what was measured (raw), on what ``tl.predict`` makes of it (denoised) and on a
map of 4 times the spots from ``tl.upsample`` (dense), whose labels are carried to the nearest spots. The 3 000 most
variable genes, as STAGATE's authors take them. Embeddings are clustered by Gaussians with one covariance, the nearest
in scikit-learn to the authors' mclust; in brackets by k-means. Seconds are of one search, by the clock and of processor
time, memory its peak above what the process held before and the peak of the whole process. The labels are used for the
score alone.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import scanpy as sc
from anndata import AnnData
from peak_memory import forget_peak, peak_gb, resident_gb
from sections_data import DATA, SECTIONS

import sthisto
from sthisto import domains
from sthisto.domains import agreement, carry

LAYERS = 7
GENES = 3000
EMBEDDING = {name: spec.embedding for name, spec in domains.METHODS.items()}


def inputs(data: Path, wanted: list[str], say: str = "attention") -> tuple[AnnData, dict[str, AnnData]]:
    """Read the section with its labels, and make the tables that domains are sought in, by name."""
    adata = sc.read_h5ad(data / SECTIONS["151673"].table)
    sc.pp.highly_variable_genes(adata, flavor="seurat_v3", n_top_genes=GENES)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    tables = {"raw": adata.copy()}
    if set(wanted) - {"raw"}:
        sthisto.pp.extract_features(adata, pitch_um=SECTIONS["151673"].pitch_um)
        sthisto.tl.fit(adata, say)
    if "denoised" in wanted:
        sthisto.tl.predict(adata)
        tables["denoised"] = adata[:, adata.var["sthisto_modelled"]].copy()
        tables["denoised"].X = tables["denoised"].layers["sthisto"]
    if "dense" in wanted:
        tables["dense"] = sthisto.tl.upsample(adata, 2)
    return adata, {name: tables[name] for name in wanted}


def score(adata: AnnData, table: AnnData, method: str, random_state: int, epochs: int | None) -> tuple[float, float]:
    """Give the adjusted Rand index with Gaussians and with k-means; NaN for the latter where nothing is embedded."""
    iterates = domains.METHODS[method].iterative
    params = {"epochs": epochs} if iterates and epochs else {}
    sthisto.tl.spatial_domains(table, method, LAYERS, params=params, random_state=random_state)
    if not EMBEDDING[method]:
        return _agreement(adata, table, table.obs["spatial_domain"]), np.nan
    by = [
        domains.cluster(table.obsm[EMBEDDING[method]], how, LAYERS, random_state=random_state)
        for how in ("mixture", "kmeans")
    ]
    return _agreement(adata, table, by[0]), _agreement(adata, table, by[1])


def _agreement(adata: AnnData, table: AnnData, found) -> float:
    if table.n_obs != adata.n_obs:
        found = carry(found, table.obsm["spatial"], adata.obsm["spatial"])
    return agreement(found, adata.obs["layer"])


def run(adata: AnnData, tables: dict[str, AnnData], arguments: argparse.Namespace) -> dict[tuple[str, str], list]:
    """Score, seconds and memory of every method on every input, a row a seed."""
    found = defaultdict(list)
    for random_state in arguments.seeds:
        for method in arguments.methods:
            for name, table in tables.items():
                held, start, busy = resident_gb(), time.perf_counter(), time.process_time()
                forget_peak()
                scores = score(adata, table, method, random_state, arguments.epochs)
                row = [*scores, time.perf_counter() - start, time.process_time() - busy, peak_gb() - held, peak_gb()]
                found[method, name].append(row)
                print(
                    f"seed {random_state} {method:8s} {name:9s} {table.n_obs} points: ARI {row[0]:.3f} ({row[1]:.3f}), "
                    f"{row[2]:.0f} s ({row[3]:.0f} s busy), +{row[4]:.2f} GB, peak {row[5]:.2f} GB",
                    flush=True,
                )
    return found


def told(rows: list) -> str:
    """Mean and spread over seeds, and what one search took."""
    means, spread = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) if len(rows) > 1 else np.zeros(6)
    second = "" if np.isnan(means[1]) else f" ({means[1]:.3f} ± {spread[1]:.3f})"
    return f"{means[0]:.3f} ± {spread[0]:.3f}{second}, {means[2]:.0f} s, {means[5]:.1f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--methods", nargs="+", default=["kmeans", "stagate", "stmask"])
    parser.add_argument("--inputs", nargs="+", default=["raw", "denoised", "dense"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int)
    arguments = parser.parse_args()
    found = run(*inputs(arguments.data, arguments.inputs), arguments)
    print(f"\n| | {' | '.join(arguments.inputs)} |\n|---{'|---' * len(arguments.inputs)}|")
    for method in arguments.methods:
        print(f"| {method} | {' | '.join(told(found[method, name]) for name in arguments.inputs)} |")


if __name__ == "__main__":
    main()
