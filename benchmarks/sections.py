"""Several sections: what one lends to another, what is known of one that was only stained, and what many cost.

    python benchmarks/sections.py [--data DIR] [--models attention ridge] [--seeds 2]
    python benchmarks/sections.py --scale [--n-sections 20] [--n-spots 4000]

``beside``: half of the spots hidden at random, the other half alone and with another section. ``towards``: a section of
which nothing is measured, and of which a tenth of the spots is, told from another one; what is hidden is scored. Genes
are chosen on the training half or, where nothing is measured, on the other section alone; ``gene mean`` predicts the
means of that section. Pearson r / mean squared error, means over genes and seeds.
"""

import argparse
import resource
import time
from functools import cache

import numpy as np
from heldout import Rows, Table, Tissue, parser, score
from numpy.typing import NDArray

from sthisto import grids
from sthisto.models import MODELS, Section

BESIDE = [("C2", "C3"), ("C3", "C2"), ("MOB1", "MOB2"), ("MOB2", "MOB1"), ("C2", "B4")]
TOWARDS = [("C2", "C3"), ("C3", "C2"), ("MOB1", "MOB2")]
FEW = 0.1
WIDTH, FACTORS, FEATURES, GENES = 80, 12, 100, 1000  # of the synthetic sections: spots in a row, what they are made of


def fit_and_score(
    model: str, training: list[Section], points: Section, truth: NDArray[np.float32], random_state: int
) -> tuple[float, float]:
    """Figures of one model on hidden spots."""
    fitted = MODELS[model].load()()
    fitted.fit(training, random_state=random_state, device="cpu", progress=False)
    return score(truth, fitted.predict(points))


def beside(tissue: Tissue, other: Tissue, models: list[str], random_state: int) -> dict[str, tuple[float, float]]:
    """Half of a section, alone and with another one, on the genes of both."""
    hidden = grids.hold_out(tissue.xy, 0.5, random_state=random_state)
    genes = tissue.genes(~hidden).intersection(other.adata.var_names, sort=False)
    own, second = tissue.section(~hidden, genes), other.section(everything(other), genes)
    points, truth = tissue.section(hidden), tissue.expression(hidden, genes)
    found = {}
    for model in models:
        found[f"{model} alone"] = fit_and_score(model, [own], points, truth, random_state)
        found[f"{model} beside"] = fit_and_score(model, [own, second], points, truth, random_state)
    return found


def towards(source: Tissue, target: Tissue, models: list[str], random_state: int) -> dict[str, tuple[float, float]]:
    """Nine tenths of a section, with nothing of it measured and with the last tenth, from another one."""
    hidden = grids.hold_out(target.xy, 1 - FEW, random_state=random_state)
    genes = source.genes(everything(source)).intersection(target.adata.var_names, sort=False)
    known, few = source.section(everything(source), genes), target.section(~hidden, genes)
    points, truth = target.section(hidden), target.expression(hidden, genes)
    found = {"gene mean": score(truth, np.tile(known.expression.mean(axis=0), (len(truth), 1)))}
    for model in models:
        found[f"{model}, none"] = fit_and_score(model, [known], points, truth, random_state)
        found[f"{model}, {FEW:.0%}"] = fit_and_score(model, [known, few], points, truth, random_state)
    return found


def everything(tissue: Tissue) -> Rows:
    return np.ones(len(tissue.xy), dtype=bool)


def synthetic(n_sections: int, n_spots: int, random_state: int = 0) -> list[Section]:
    """Sections of one tissue, each a little off the one before, with counts of 1 000 genes."""
    rng = np.random.default_rng(random_state)
    waves, phase = rng.normal(scale=0.15, size=(2, FACTORS)), rng.uniform(0, 6, FACTORS)
    shown, loadings = rng.normal(size=(FACTORS, FEATURES)), rng.normal(scale=0.5, size=(FACTORS, GENES))
    xy = np.stack(np.divmod(np.arange(n_spots), WIDTH)[::-1], axis=1).astype(float)
    sections = []
    for each in range(n_sections):
        z = np.cos(xy @ waves + phase + 0.02 * each)
        look = z @ shown + rng.normal(scale=4, size=(n_spots, FEATURES))
        counts = rng.poisson(np.exp(z @ loadings - 1))
        placed = xy @ rotation(rng.uniform(0, 2 * np.pi)).T
        expression = np.log1p(counts).astype(np.float32)
        sections.append(Section(name=str(each), xy=placed, features=look.astype(np.float32), expression=expression))
    return sections


def rotation(angle: float) -> NDArray[np.float64]:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def scale(n_sections: int, n_spots: int) -> None:
    """Time and memory of one fit of many sections, the sections themselves included."""
    sections = synthetic(n_sections, n_spots)
    before, start = peak(), time.perf_counter()
    model = MODELS["attention"].load()()
    model.fit(sections, random_state=0, device="cpu", progress=True)
    seconds = time.perf_counter() - start
    frames = len(np.unique(model.state()["frames_frame"]))
    print(f"{n_sections} sections of {n_spots} spots, {GENES} genes: {seconds:.0f} s, peak {peak():.2f} GB")
    print(f"(before the fit {before:.2f} GB; laid over each other in {frames} frames)")


def peak() -> float:
    """Most memory (GB) that the process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def compare(arguments: argparse.Namespace) -> None:
    tissue = cache(lambda name: Tissue.of(name, arguments.data))
    tables = Table("Half hidden at random, alone and beside another section"), Table("From another section")
    for random_state in range(arguments.seeds):
        for name, other in BESIDE:
            for model, figures in beside(tissue(name), tissue(other), arguments.models, random_state).items():
                tables[0].add(f"{name} with {other}", model, *figures)
        for name, other in TOWARDS:
            for model, figures in towards(tissue(name), tissue(other), arguments.models, random_state).items():
                tables[1].add(f"{name} to {other}", model, *figures)
    for table in tables:
        table.print()


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(models=["attention", "ridge"])
    options.add_argument("--scale", action="store_true", help="measure time and memory on synthetic sections instead")
    options.add_argument("--n-sections", type=int, default=20)
    options.add_argument("--n-spots", type=int, default=4000)
    arguments = options.parse_args()
    if arguments.scale:
        scale(arguments.n_sections, arguments.n_spots)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
