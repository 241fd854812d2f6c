"""Nuclei against reference masks, and values per cell against a known truth.

    python benchmarks/nuclei.py [--parts fields synthetic cells speed] [--masks FOLDER]

fields     precision and recall on the two H&E fields of the package histolytics (1 500 px, about 0.5 um per pixel, high
           grade serous carcinoma), whose nuclei a trained network segmented. FOLDER is its ``histolytics/data``
           (pip download --no-deps histolytics, then unzip the wheel)
synthetic  the same on synthetic sections, whose nuclei are known; they are drawn independently and may overlap
cells      Pearson r with the true expression at the nuclei found in synthetic sections: ``upsample(cells)`` next to the
           nearest spot and inverse distance, means over the genes of a kind
speed      nuclei a second, and the share of one core

A nucleus is found if a found center is within 6 um of its center, one to one, with the smallest sum of distances.
"""

import argparse
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

import sthisto
from sthisto import grids
from sthisto.images import find_nuclei, open_image

PARTS = ("fields", "synthetic", "cells", "speed")
RADIUS_UM, FIELD_MPP = 6.0, 0.5

Points = NDArray[np.float64]


def matched(found: Points, truth: Points, radius: float) -> int:
    """Number of pairs of a found and a true center, one to one, within the radius."""
    near = cKDTree(found).sparse_distance_matrix(cKDTree(truth), radius, output_type="coo_matrix")
    graph = csr_matrix((np.ones(near.nnz), (near.row, near.col + len(found))), shape=[len(found) + len(truth)] * 2)
    _, group = connected_components(graph, directed=False)
    pairs = 0
    for _, rows in pd.Series(np.arange(near.nnz)).groupby(group[near.row]):
        i, left = np.unique(near.row[rows], return_inverse=True)
        j, right = np.unique(near.col[rows], return_inverse=True)
        cost = np.full((len(i), len(j)), 1e6)
        cost[left, right] = near.data[rows]
        pairs += int((cost[linear_sum_assignment(cost)] < 1e6).sum())
    return pairs


def line(name: str, found: Points, truth: Points, radius: float) -> str:
    """A row of the table: counts, precision, recall, F1."""
    pairs = matched(found, truth, radius)
    precision, recall = pairs / len(found), pairs / len(truth)
    f1 = 2 * pairs / (len(found) + len(truth))
    return f"| {name} | {len(truth)} | {len(found)} | {precision:.2f} | {recall:.2f} | {f1:.2f} |"


def fields(options: argparse.Namespace) -> None:
    import geopandas  # noqa: PLC0415
    import shapely  # noqa: PLC0415

    print("| field | nuclei | found | precision | recall | F1 |\n|---|---|---|---|---|---|")
    mask = np.load(options.masks / "hgsc_nest_inst_mask.npz")["nuc_raster"]
    labels = np.unique(mask[mask > 0])
    stroma = np.asarray(geopandas.read_parquet(options.masks / "hgsc_stromal_cells.parquet").geometry)  # in pixels
    large = shapely.centroid(stroma[shapely.area(stroma) * FIELD_MPP**2 >= options.min_area])
    size = ndimage.sum_labels(np.ones_like(mask), mask, labels) * FIELD_MPP**2
    nest = np.array(ndimage.center_of_mass(mask > 0, mask, labels[size >= options.min_area]))[:, ::-1] + 0.5
    truths = {"hgsc_nest.jpg": nest, "hgsc_stromal_he.jpg": shapely.get_coordinates(large)}
    for name, truth in truths.items():
        found = find_nuclei(open_image(options.masks / name), FIELD_MPP, min_area_um2=options.min_area).xy
        print(line(name.removesuffix(".jpg"), found, truth, RADIUS_UM / FIELD_MPP), flush=True)


def synthetic(_: argparse.Namespace) -> None:
    print("| um per pixel | nuclei | found | precision | recall | F1 |\n|---|---|---|---|---|---|")
    for mpp in (0.25, 0.5, 1.0):
        adata = sthisto.datasets.synthetic(100, mpp=mpp, random_state=1)
        spots, truth = adata.obsm["spatial"], adata.uns["synthetic"]["nuclei"]["synthetic_0"]
        found = sthisto.pp.find_nuclei(adata, max_distance=100 / mpp).obsm["spatial"]
        near = cKDTree(spots).query(truth)[0] <= 100 / mpp
        print(line(f"{mpp}", found, truth[near], RADIUS_UM / mpp), flush=True)


def cells(options: argparse.Namespace) -> None:
    print(
        "| kind of gene | nearest spot | inverse distance | attention | attention, spots kept |\n|---|---|---|---|---|"
    )
    scores = pd.concat([_scores(random_state) for random_state in range(options.seeds)])
    for kind, row in scores.groupby("kind").mean().iterrows():
        print(f"| {kind} | {' | '.join(f'{value:.3f}' for value in row)} |", flush=True)


def _scores(random_state: int) -> pd.DataFrame:
    """Of every gene, r over the nuclei found near the spots."""
    adata = sthisto.datasets.synthetic(300, mpp=1.0, random_state=random_state)
    sthisto.pp.extract_features(adata)
    sthisto.tl.fit(adata, random_state=random_state)
    sthisto.tl.fit(adata, "idw", key_added="idw")
    nuclei = sthisto.pp.find_nuclei(adata, max_distance=60)
    xy = nuclei.obsm["spatial"]
    nearest = grids.nearest(xy, adata.obsm["spatial"])[1][:, 0]
    predictions = {
        "nearest": adata.X[nearest].toarray(),
        "idw": sthisto.tl.upsample(adata, nuclei, key="idw").X,
        "attention": sthisto.tl.upsample(adata, nuclei).X,
        "kept": sthisto.tl.upsample(adata, nuclei, match_spot_means="area").X,
    }
    truth = sthisto.datasets.synthetic_truth(adata, xy)
    r = {name: sthisto.metrics.pearson(truth, values) for name, values in predictions.items()}
    frame = pd.DataFrame(r).assign(kind=adata.var["kind"].astype(str).to_numpy())
    return frame[frame["kind"] != "noise"]  # without a pattern, r is not defined


def speed(options: argparse.Namespace) -> None:
    adata = sthisto.datasets.synthetic(1000, mpp=0.5)
    image = open_image(adata.uns["spatial"]["synthetic_0"]["images"]["hires"])
    wall, cpu = time.perf_counter(), time.process_time()
    found = find_nuclei(image, 0.5)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    height, width = image.shape
    print(f"{height} x {width} px: {len(found)} nuclei in {wall:.1f} s, {len(found) / wall:.0f} a second; {cpu:.1f} s")
    print(f"of processor time, {len(found) / cpu:.0f} a second of one core")


def main() -> None:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    about.add_argument("--masks", type=Path, help="the folder histolytics/data")
    about.add_argument("--min-area", type=float, default=15.0, help="um2, of the reference, too")
    about.add_argument("--seeds", type=int, default=3)
    options = about.parse_args()
    if "fields" in options.parts and options.masks is None:
        about.error("--masks is needed for the part fields")
    parts = SimpleNamespace(fields=fields, synthetic=synthetic, cells=cells, speed=speed)
    for part in options.parts:
        print(f"\n## {part}\n", flush=True)
        getattr(parts, part)(options)


if __name__ == "__main__":
    main()
