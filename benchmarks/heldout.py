"""What the comparisons on real sections share: a section's spots as plain arrays, tables of figures, and options.

Genes are chosen on the training spots alone, 1 000 by seurat_v3 among those seen in a tenth of them (all on Visium).
Scores are means over genes on the held-out spots, Pearson r / mean squared error of log1p CP10K.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from numpy.typing import NDArray
from sections_data import DATA, SECTIONS, read

from sthisto import grids
from sthisto.metrics import lognorm, mse, pearson
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


def parser(about: str | None) -> argparse.ArgumentParser:
    """Options that every comparison on the real sections takes."""
    options = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=DATA, help="folder of the real sections")
    known = [name for name in ("idw", "ridge", "gp", "attention") if name in MODELS]
    options.add_argument("--models", nargs="+", default=known, choices=list(MODELS))
    options.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    options.add_argument("--seeds", type=int, default=2)
    return options
