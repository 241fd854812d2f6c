"""Held-out accuracy of the models on real sections: half of the spots hidden, at random and in blocks.

    python benchmarks/heldout.py [--data DIR] [--models idw ridge gp] [--sections B4 C2] [--seeds 2]

Genes are chosen on the training spots alone, 1 000 by seurat_v3 among those seen in a tenth of them (all on Visium).
Scores are means over genes on the hidden spots, Pearson r / mean squared error of log1p CP10K, and means over seeds.
``gene mean`` predicts the training mean of every gene; ``ceiling`` is the r that the true rate would reach.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from numpy.typing import NDArray
from sections_data import DATA, PARTNERS, SECTIONS, read

from sthisto import grids
from sthisto.metrics import lognorm, mse, noise_ceiling, pearson
from sthisto.models import MODELS, Section

N_GENES = 1000
BLOCK = 4.0  # side of the hidden blocks, in spot pitches

Rows = NDArray[np.bool_]
Key = tuple[str, str]  # section, model


@dataclass(frozen=True)
class Tissue:
    """A section, ready for the models: positions in spot pitches, expression of all genes."""

    name: str
    adata: AnnData
    xy: NDArray[np.float64]

    @classmethod
    def of(cls, name: str, data: Path) -> "Tissue":
        """Read the section and its features."""
        adata = read(name, data)
        adata.layers["lognorm"] = lognorm(adata.X)
        xy = np.asarray(adata.obsm["spatial"], dtype=float)
        return cls(name, adata, xy / grids.spacing(xy))

    def genes(self, train: Rows) -> pd.Index:
        """Variable genes of the training spots."""
        seen = np.asarray((self.adata.X[train] > 0).mean(axis=0)).ravel() >= SECTIONS[self.name].min_share
        counts = self.adata[train, seen].copy()
        sc.pp.highly_variable_genes(counts, flavor="seurat_v3", n_top_genes=min(N_GENES, counts.n_vars))
        return counts.var_names[counts.var["highly_variable"]]

    def expression(self, rows: Rows, genes: pd.Index) -> NDArray[np.float32]:
        """Log-normalised expression of rows and genes."""
        return self.adata[rows, genes].layers["lognorm"].toarray()

    def section(self, rows: Rows, genes: pd.Index | None = None) -> Section:
        """Spots with expression where genes are named, else points."""
        return Section(
            name=self.name,
            xy=self.xy[rows],
            features=np.asarray(self.adata.obsm["X_histo"])[rows],
            expression=None if genes is None else self.expression(rows, genes),
        )


class Table:
    """Figures by section and model, one for every seed, printed as means over the seeds."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.figures: dict[Key, list[list[float]]] = defaultdict(list)

    def add(self, section: str, model: str, *figures: float) -> None:
        """Note the figures of one seed."""
        self.figures[section, model].append(list(figures))

    def print(self, style: Callable[[float], str] = "{:.3f}".format) -> None:
        """Write the table as markdown, with the mean over sections last."""
        sections = list(dict.fromkeys(section for section, _ in self.figures))
        models = list(dict.fromkeys(model for _, model in self.figures))
        means = {key: np.mean(values, axis=0) for key, values in self.figures.items()}
        rows = [[section, *(means[section, model] for model in models)] for section in sections]
        rows.append(["mean", *(np.mean([means[section, model] for section in sections], axis=0) for model in models)])
        print(f"\n{self.title}\n\n| section | {' | '.join(models)} |\n|{'---|' * (len(models) + 1)}")
        for name, *cells in rows:
            print(f"| {name} | {' | '.join(' / '.join(style(x) for x in cell) for cell in cells)} |", flush=True)


def score(truth: NDArray[np.float32], predicted: NDArray[np.float32]) -> tuple[float, float]:
    """Mean over genes of Pearson r and of squared error; predicting one value for a gene that varies is r = 0."""
    r = np.where(np.ptp(truth, axis=0) > 0, np.nan_to_num(pearson(truth, predicted)), np.nan)
    return float(np.nanmean(r)), float(mse(truth, predicted).mean())


def run(
    tissue: Tissue, hidden: Rows, models: Iterable[str], random_state: int, beside: Tissue | None = None
) -> dict[str, list[float]]:
    """Figures of every model on the hidden spots: r, squared error, seconds to fit and to predict."""
    genes = tissue.genes(~hidden)
    if beside is not None:
        genes = genes.intersection(beside.adata.var_names, sort=False)
    training = [tissue.section(~hidden, genes)]
    if beside is not None:
        training.append(beside.section(np.ones(len(beside.xy), dtype=bool), genes))
    points, truth = tissue.section(hidden), tissue.expression(hidden, genes)
    mean = np.tile(training[0].expression.mean(axis=0), (len(truth), 1))
    figures = {"gene mean": [*score(truth, mean), 0.0, 0.0]}
    for name in models:
        model = MODELS[name].load()()
        start = time.perf_counter()
        model.fit(training, random_state=random_state, device="cpu", progress=False)
        fitted = time.perf_counter()
        predicted = model.predict(points)
        figures[name] = [*score(truth, predicted), fitted - start, time.perf_counter() - fitted]
    ceiling = pd.Series(noise_ceiling(tissue.adata.X[hidden], random_state=random_state), tissue.adata.var_names)[genes]
    return figures | {"ceiling": [float(np.nanmean(ceiling))]}


def main() -> None:
    arguments = parser(__doc__).parse_args()
    tissue = cache(lambda name: Tissue.of(name, arguments.data))
    seconds = Table("Seconds to fit / to predict the hidden half, random split")
    for title, block in (("Half hidden at random", None), (f"Half hidden in blocks of {BLOCK:g} pitches", BLOCK)):
        table = Table(f"{title}: Pearson r / MSE")
        for name in arguments.sections:
            for random_state in range(arguments.seeds):
                hidden = grids.hold_out(tissue(name).xy, 0.5, block=block, random_state=random_state)
                for model, figures in run(tissue(name), hidden, arguments.models, random_state).items():
                    table.add(name, model, *figures[:2])
                    if block is None and model in arguments.models:
                        seconds.add(name, model, *figures[2:])
        table.print()
    table = Table("Half hidden at random, a serial section beside it: Pearson r / MSE")
    for name in (name for name in arguments.sections if PARTNERS.get(name) in arguments.sections):
        for random_state in range(arguments.seeds):
            hidden = grids.hold_out(tissue(name).xy, 0.5, random_state=random_state)
            figures = run(tissue(name), hidden, arguments.models, random_state, beside=tissue(PARTNERS[name]))
            for model, values in figures.items():
                table.add(f"{name} with {PARTNERS[name]}", model, *values[:2])
    if table.figures:
        table.print()
    seconds.print("{:.1f}".format)


def parser(about: str | None) -> argparse.ArgumentParser:
    """Options that every comparison on the real sections takes."""
    options = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=DATA, help="folder of the real sections")
    known = [name for name in ("idw", "ridge", "gp", "attention") if name in MODELS]
    options.add_argument("--models", nargs="+", default=known, choices=list(MODELS))
    options.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    options.add_argument("--seeds", type=int, default=2)
    return options


if __name__ == "__main__":
    main()
