"""The gallery: markers, domains, features, uncertainty and scores of real sections, as small JPEG files.

    python benchmarks/gallery.py -o docs/gallery [--data DIR] [--sections 151673 MOB1] [--method kmeans]
    python benchmarks/gallery.py -o FOLDER --sections C2

Prints the markers that are missing from a section's table, and the size of every figure; one that is too large for the
pages is an error. The sections of the first line may be shown with attribution; the license of C2 is unknown.
"""

import argparse
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import scanpy as sc
from anndata import AnnData
from matplotlib.figure import Figure
from PIL import Image
from sections_data import DATA, read

import sthisto

DPI, LARGEST = 100, 200_000  # bytes
QUALITIES = (88, 80, 72, 64)  # of JPEG, the best that is small enough
N_GENES = 300
PANELS = ("measured", "denoised", "dense")


@dataclass(frozen=True)
class Plan:
    """What is shown of a section."""

    markers: dict[str, str]  # identifier in the table, by symbol
    shown: tuple[tuple[str, ...], ...]  # symbols of each figure of markers
    uncertain: tuple[str, ...]
    grid: int  # refinement of the dense map
    reference: str | None = None  # obs column of known labels
    n_domains: int = 7


def same(*names: str) -> dict[str, str]:
    """Symbols that are identifiers."""
    return {name: name for name in names}


PLANS = {
    "151673": Plan(
        {
            "MBP": "ENSG00000197971",
            "PCP4": "ENSG00000183036",
            "MOBP": "ENSG00000168314",
            "HBB": "ENSG00000244734",
            "SCGB2A2": "ENSG00000110484",
        },
        (("MBP", "PCP4", "MOBP"), ("HBB", "SCGB2A2")),
        ("PCP4", "HBB"),
        2,
        "layer",
    ),
    "MOB1": Plan(
        {
            "Fabp7": "ENSMUSG00000019874",
            "Kctd12": "ENSMUSG00000098557",
            "Penk": "ENSMUSG00000045573",
            "Cdhr1": "ENSMUSG00000021803",
            "Pcp4": "ENSMUSG00000090223",
        },
        (("Fabp7", "Penk", "Cdhr1"),),
        ("Penk", "Kctd12"),
        4,
        n_domains=5,
    ),
    "C2": Plan(
        same("ERBB2", "MGP", "COL1A1", "IGKC", "AZGP1", "CRISP3"),
        (("ERBB2", "MGP", "COL1A1"), ("IGKC", "AZGP1", "CRISP3")),
        ("ERBB2", "IGKC"),
        4,
        "expr_cluster",
    ),
}


def section(name: str, data: Path) -> AnnData:
    """Read counts and features, name markers by their symbols, normalize; print which markers are missing."""
    adata, plan = read(name, data), PLANS[name]
    symbols = {identifier: symbol for symbol, identifier in plan.markers.items()}
    adata.var_names = [symbols.get(gene.split(".")[0], gene) for gene in adata.var_names]  # MOB's end in a version
    missing = [symbol for symbol in plan.markers if symbol not in adata.var_names]
    print(f"{name}: not in the table: {', '.join(missing) or 'none'}", flush=True)
    adata.layers["counts"] = adata.X
    sc.pp.highly_variable_genes(adata, flavor="seurat_v3", n_top_genes=N_GENES)
    adata.var["highly_variable"] |= adata.var_names.isin(list(plan.markers))
    adata.X = sthisto.metrics.lognorm(adata.layers["counts"])
    return adata


def dense_map(adata: AnnData, grid: int) -> AnnData:
    """Fit, test the genes, denoise the spots, and predict between them."""
    sthisto.tl.fit(adata)
    sthisto.tl.test_genes(adata)
    sthisto.tl.predict(adata)
    return sthisto.tl.upsample(adata, grid)


def draw_section(adata: AnnData, dense: AnnData, plan: Plan, method: str) -> dict[str, Figure]:
    """Draw all figures of a section but that of scores, by name."""
    figures = {}
    there = [[symbol for symbol in row if symbol in adata.var_names] for row in plan.shown]
    for i, symbols in enumerate(filter(None, there), 1):
        figures[f"markers_{i}"] = sthisto.pl.genes(adata, symbols, dense=dense, panels=PANELS, return_fig=True)
    uncertain = [symbol for symbol in plan.uncertain if symbol in dense.var_names]
    figures["uncertainty"] = sthisto.pl.uncertainty(dense, uncertain, return_fig=True)
    figures["features"] = sthisto.pl.features(adata, return_fig=True)
    figures["domains"] = draw_domains(adata, dense, plan, method)
    return figures


def draw_domains(adata: AnnData, dense: AnnData, plan: Plan, method: str) -> Figure:
    """Draw domains of measured, denoised and predicted expression next to known labels, where there are any."""
    keys = ["of measured", "of denoised"]  # not "measured": the dense table has a column of that name
    for key, table, layer in ((keys[0], adata, None), (keys[1], adata, "sthisto"), (keys[1], dense, None)):
        sthisto.tl.spatial_domains(table, method, plan.n_domains, layer=layer, key_added=key)
    return sthisto.pl.domains(adata, keys, reference=plan.reference, dense=dense, return_fig=True)


def draw_scores(adata: AnnData) -> Figure:
    """Draw held-out scores of models."""
    models = ["attention", "gp", "ridge", "idw"]
    report = sthisto.tl.evaluate(adata, models, counts_layer="counts", n_repeats=3)
    return sthisto.pl.evaluation(report, return_fig=True)


def save(figure: Figure, path: Path) -> None:
    """Write a JPEG, and refuse one that is too large."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=DPI, bbox_inches="tight", format="png")
    plt.close(figure)
    picture = Image.open(drawn).convert("RGB")
    for quality in QUALITIES:
        picture.save(path, quality=quality, optimize=True)
        size = path.stat().st_size
        if size <= LARGEST:
            print(f"{path}: {size / 1000:.0f} kB, quality {quality}", flush=True)
            return
    raise ValueError(f"{path} has {size / 1000:.0f} kB; pages take up to {LARGEST / 1000:.0f} kB.")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("-o", "--output", type=Path, required=True, help="folder for the figures")
    options.add_argument("--data", type=Path, default=DATA, help="folder of the sections")
    options.add_argument("--sections", nargs="+", default=["151673", "MOB1"], choices=list(PLANS))
    options.add_argument("--method", default="kmeans", help="of sthisto.tl.spatial_domains")
    arguments = options.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.sections:
        adata = section(name, arguments.data)
        dense = dense_map(adata, PLANS[name].grid)
        figures = draw_section(adata, dense, PLANS[name], arguments.method)
        if name == "MOB1":
            figures["scores"] = draw_scores(adata)
        for what, figure in figures.items():
            save(figure, arguments.output / f"{name}_{what}.jpg")


if __name__ == "__main__":
    main()
