"""Seconds of the main job on real sections: features, fit, and a map of 16 times the spots.

    python benchmarks/speed.py [--data DIR] [--sections C2 151673]

``patches/s`` is ``pp.extract_features`` with the hand-crafted encoder, and in brackets without reading and decoding the
picture; ``fit`` takes 1 000 genes of all spots; ``upsample`` predicts ``grid=4`` from features that are there.
"""

import time
from pathlib import Path

import anndata as ad
import numpy as np
from heldout import parser
from sections_data import SECTIONS

import sthisto
from sthisto import grids
from sthisto.evaluation import choose_genes
from sthisto.images import open_image
from sthisto.metrics import lognorm


def measure(name: str, data: Path) -> list[float]:
    """Patches a second, the same without the decoding, seconds to fit, points, and seconds to upsample."""
    source = SECTIONS[name]
    adata = ad.read_h5ad(data / source.table)
    image = None if source.image is None else data / source.image
    clock = [time.perf_counter()]
    sthisto.pp.extract_features(adata, image=image, pitch_um=source.pitch_um)
    clock.append(time.perf_counter())
    opened = None if image is None else open_image(image)
    clock.append(time.perf_counter())
    sthisto.pp.extract_features(adata, image=opened, pitch_um=source.pitch_um)
    clock.append(time.perf_counter())
    chosen = choose_genes(adata.X, np.zeros(adata.n_obs), 1000, least_seen=source.min_share)
    adata.X = lognorm(adata.X)
    clock.append(time.perf_counter())
    sthisto.tl.fit(adata, genes=adata.var_names[chosen])
    clock.append(time.perf_counter())
    lattice = grids.Lattice.fit(adata.obsm["spatial"])
    fine = lattice.refine(4)
    points = fine.points(fine.cover(adata.obsm["spatial"], 1.1 * lattice.reach))
    _, nearest = grids.nearest(points, adata.obsm["spatial"])
    features = adata.obsm["X_histo"][nearest[:, 0]]
    clock.append(time.perf_counter())
    sthisto.tl.upsample(adata, points, features=features)
    clock.append(time.perf_counter())
    whole, _, bare, _, fit, _, upsample = np.diff(clock)
    return [adata.n_obs / whole, adata.n_obs / bare, fit, len(points), upsample]


def main() -> None:
    arguments = parser(__doc__).parse_args()
    print("| section | patches/s (decoded) | fit, s | points | upsample, s |\n|---|---|---|---|---|")
    for name in arguments.sections:
        whole, bare, fit, points, upsample = measure(name, arguments.data)
        print(f"| {name} | {whole:.0f} ({bare:.0f}) | {fit:.1f} | {points:.0f} | {upsample:.1f} |", flush=True)


if __name__ == "__main__":
    main()
