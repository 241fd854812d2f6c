"""What a prior from elsewhere adds to a section's own spots.

    python benchmarks/prior.py [--data DIR] [--models attention] [--shares 1 .5 .1 .05] [--priors fitted noise ...]

Half of the spots are held out at random and scored; of the other half a share is measured. The prior is a fit of other
sections (C2: C3 and B4; C3: C2; MOB1: MOBR11, on common genes), evaluated from the target's image features alone.
Genes are chosen on the whole training half, so that all shares are scored on the same ones. Pearson r / mean squared
error, means over genes and seeds, of the prior alone, of the own spots alone, and of both. Priors that say nothing:
``noise`` of the same mean and variance, ``spots`` and ``genes`` in another order, ``inverted`` about its means.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from heldout import Table, Tissue, parser, score
from numpy.typing import NDArray

from sthisto import grids
from sthisto.datasets._download import data_folder, fetch
from sthisto.models import Section, build

TARGETS = {"C2": ("C3", "B4"), "C3": ("C2",), "MOB1": ("MOBR11",)}
LEAST = 4  # spots
IN_ENSEMBL = ("MOB1", "MOB2")  # their distributor has the genes' symbols in one file
SYMBOLS = (
    "https://raw.githubusercontent.com/jbergenstrahle/STUtility/9a8f421499e58b13340ee386db07b0eba923c88c"
    "/inst/extdata/mouse_genes.tsv.gz"
)
SHA256 = "914e92c5d3f57770ed89a1db9ba64a95dfcbe2f0592027551eaa3e05b47495d9"

Values = NDArray[np.float32]


def read_tissue(name: str, data: Path) -> Tissue:
    """A section whose genes have their symbols, which all sections share."""
    tissue = Tissue.of(name, data)
    if name not in IN_ENSEMBL:
        return tissue
    path = fetch(SYMBOLS, data_folder(None) / "olfactory_bulb" / "mouse_genes.tsv.gz", sha256=SHA256)
    table = pd.read_csv(path, sep="\t")
    symbols = dict(zip(table["gene_id"].str.partition(".")[0], table["gene_name"], strict=True))
    adata = tissue.adata.copy()
    adata.var_names = [symbols.get(gene.partition(".")[0], gene) for gene in adata.var_names]
    return replace(tissue, adata=adata[:, ~adata.var_names.duplicated()].copy())


def prior_of(target: Tissue, sources: list[Tissue], genes, random_state: int) -> Values:
    """Expression (n, g) of the target's spots as a fit of the sources has it."""
    fitted = build("attention")
    fitted.fit([each.section(np.ones(len(each.xy), dtype=bool), genes) for each in sources], random_state=random_state)
    points = target.section(np.ones(len(target.xy), dtype=bool))
    return np.maximum(fitted.predict(Section(name="stained", xy=points.xy, features=points.features)), 0)


def changed(prior: Values, kind: str) -> Values:
    """The prior as it is, or made useless."""
    random = np.random.default_rng(7)
    if kind == "noise":
        return (prior.mean(axis=0) + prior.std(axis=0) * random.normal(size=prior.shape)).astype(np.float32)
    if kind == "spots":
        return prior[random.permutation(len(prior))]
    if kind == "genes":
        return prior[:, random.permutation(prior.shape[1])]
    return 2 * prior.mean(axis=0) - prior if kind == "inverted" else prior


def figures(target: Tissue, sources: list[Tissue], model: str, seed: int, arguments: argparse.Namespace) -> Iterator:
    """Yield share, name and figures."""
    hidden = grids.hold_out(target.xy, 0.5, random_state=seed)
    genes = target.genes(~hidden)
    for each in sources:
        genes = genes.intersection(each.adata.var_names, sort=False)
    prior, truth = prior_of(target, sources, genes, seed), target.expression(hidden, genes)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(~hidden))
    for share in arguments.shares:
        rows = np.zeros(len(hidden), dtype=bool)
        rows[order[: max(round(share * len(order)), LEAST)]] = True
        spots, points = target.section(rows, genes), target.section(hidden)
        alone = build(model)
        alone.fit([spots], random_state=seed)
        yield share, "prior alone", score(truth, prior[hidden])
        yield share, "own spots alone", score(truth, np.maximum(alone.predict(points), 0))
        for kind in arguments.priors:
            values = changed(prior, kind)
            both = build(model, with_prior=True)
            both.fit([with_prior(spots, values[rows])], random_state=seed)
            predicted = both.predict(with_prior(points, values[hidden]))
            yield share, "both" if kind == "fitted" else f"with {kind}", score(truth, np.maximum(predicted, 0))


def with_prior(section: Section, prior: Values) -> Section:
    return replace(section, prior=prior)


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(models=["attention"], sections=list(TARGETS))
    options.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.5, 0.1, 0.05])
    kinds = ["fitted", "noise", "spots", "genes", "inverted"]
    options.add_argument("--priors", nargs="+", default=kinds, choices=kinds)
    arguments = options.parse_args()
    tissue, start = cache(lambda name: read_tissue(name, arguments.data)), time.perf_counter()
    for model in arguments.models:
        tables = {
            share: Table(f"{model}, {share:.0%} of the training half measured: r / MSE") for share in arguments.shares
        }
        for name in arguments.sections:
            for seed in range(arguments.seeds):
                sources = [tissue(each) for each in TARGETS[name]]
                for share, what, found in figures(tissue(name), sources, model, seed, arguments):
                    tables[share].add(name, what, *found)
        for table in tables.values():
            table.print()
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
