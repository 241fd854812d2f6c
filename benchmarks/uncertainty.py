"""How far the stated uncertainty and the genes called predictable can be relied on, on real sections.

    python benchmarks/uncertainty.py [--data DIR] [--models attention] [--sections B4 C2] [--seeds 3] [--parts spread
    genes]

``spread``: half of the spots are hidden, at random and in blocks, the model is fitted on the others and asked for its
intervals. Coverage is in percent of the hidden measurements, of all genes, of those seen in more than half of the
training spots, and of the rarer ones. Most measurements are exactly 0, where the distribution has a step, so coverage
is that of the randomised probability integral transform; an interval itself holds whole steps and so covers more, which
is the column ``bounds``. ``width`` is the mean width of the 90 % intervals relative to that of the narrowest interval
of constant width for each gene (quantiles of the training spots) with the same coverage on the hidden spots.
``std and error`` is the rank correlation of the standard deviation with the absolute error over all hidden
measurements, and its mean over genes.

``genes``: to the genes of a section are added as many that have nothing to do with its picture, but the
autocorrelation of real ones: each is one of the real genes, shifted over its bounding box as over a torus by a quarter
to three quarters of either side, and mirrored by chance (spots off the tissue take the nearest one's value), which on
some sections leaves a part of the pattern where it was; genes of another tissue, turned at random and laid over; and
Poisson counts of Gaussian fields of three lengths (pitches). Figures: real genes called at q < .05 in percent; added
ones among those called in percent; and added ones with p < .05 in percent.
"""

from functools import cache

import numpy as np
from heldout import BLOCK, Rows, Table, Tissue, parser
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.stats import false_discovery_control, spearmanr

from sthisto import grids
from sthisto._crossfit import block_folds, refit_of
from sthisto.models import MODELS, Section
from sthisto.tl._gene_test import MAX_SPOTS, N_FOLDS
from sthisto.tl._uncertainty import UncertaintyModel
from sthisto.uncertainty import SurrogateTest, p_values

LEVELS = (0.8, 0.9, 0.95)
LENGTHS = (2.0, 6.0, 15.0)  # pitches, of the Gaussian fields
STRANGERS = {"B4": "MOB1", "C2": "MOB1", "C3": "MOB2", "MOB1": "C2", "MOB2": "B4", "151673": "MOB2"}

Floats = NDArray[np.float64]


def spread(tissue: Tissue, hidden: Rows, name: str, random_state: int) -> dict[str, list[float]]:
    """Coverage, sharpness and rank correlations of one model on the hidden spots."""
    genes = tissue.genes(~hidden)
    training = tissue.section(~hidden, genes)

    model = MODELS[name].load()()
    held_out = model.fit([training], random_state=random_state, device="cpu", progress=False)
    spec = MODELS[name]
    fitted = UncertaintyModel.fit(
        [training],
        held_out,
        with_features="features" in spec.inputs,
        refit=None if spec.iterative else refit_of(name, {}, random_state=random_state, device="cpu"),
        min_spots=spec.min_spots,
        random_state=random_state,
    )
    points, truth = tissue.section(hidden), tissue.expression(hidden, genes)
    mean, covariates = np.maximum(model.predict(points), 0), fitted.covariates(points)
    less, up_to = fitted.calibration.cumulative(truth, mean, covariates)
    even = less + (up_to - less) * np.random.default_rng(random_state).uniform(size=less.shape)
    often = (training.expression > 0).mean(axis=0) > 0.5
    covered = {
        part: [100 * float((np.abs(even[:, chosen] - 0.5) < level / 2).mean()) for level in LEVELS]
        for part, chosen in (("all", often | True), ("often seen", often), ("rarer", ~often))
    }
    low, high = fitted.calibration.interval(mean, covariates, 0.9)
    std, error = fitted.calibration.std(mean, covariates), np.abs(truth - mean)
    held = (low <= truth) & (truth <= high)
    varied = np.flatnonzero((np.ptp(error, axis=0) > 0) & (np.ptp(std, axis=0) > 0))
    ranks = [spearmanr(std[:, gene], error[:, gene]).statistic for gene in varied]
    return covered | {
        "bounds": [100 * float(held.mean())],
        "width": [float((high - low).mean() / constant_width(truth, training.expression, float(held.mean())))],
        "std and error": [float(spearmanr(std, error, axis=None).statistic), float(np.mean(ranks))],
        "extrapolated": [100 * float(fitted.extrapolated(covariates).mean())],
    }


def constant_width(truth: NDArray[np.float32], training: NDArray[np.float32], coverage: float) -> float:
    """Mean width of the central intervals of each gene's own training values that cover as much."""
    for level in np.linspace(0.5, 0.999, 250):
        low, high = np.quantile(training, [(1 - level) / 2, (1 + level) / 2], axis=0)
        if ((low <= truth) & (truth <= high)).mean() >= coverage:
            break
    return float((high - low).mean())


def believed(tissue: Tissue, other: Tissue, random_state: int) -> dict[str, list[float]]:
    """Genes called predictable among real ones and ones that have nothing to do with the tissue."""
    whole = np.ones(len(tissue.xy), dtype=bool)
    section = tissue.section(whole, tissue.genes(whole))
    random = np.random.default_rng(random_state)
    section = section.keep(np.sort(random.permutation(len(section))[:MAX_SPOTS]))
    [fold] = block_folds([section], N_FOLDS, BLOCK, random_state=random_state, min_spots=20)

    def p(expression: NDArray[np.float32]) -> Floats:
        return p_values([SurrogateTest.of(section.xy, section.features, expression, fold, random_state=random_state)])

    real = p(section.expression)
    added = {"shifted": shifted(section, random), "of another tissue": turned(section, other, random)}
    added |= {f"field of {length:g}": field(section, length, random) for length in LENGTHS}
    figures = {"real genes": [100 * float((false_discovery_control(real) < 0.05).mean())]}
    for name, expression in added.items():
        strange = p(expression)
        called = false_discovery_control(np.concatenate([real, strange])) < 0.05
        false = 100 * float(called[len(real) :].sum() / max(called.sum(), 1))
        figures[name] = [false, 100 * float((strange < 0.05).mean())]
    return figures


def shifted(section: Section, random: np.random.Generator) -> NDArray[np.float32]:
    """Each gene moved elsewhere on the tissue, its own way."""
    xy = section.xy - section.xy.min(axis=0)
    span, tree = np.ptp(xy, axis=0) + 1, cKDTree(xy)
    moved = np.empty_like(section.expression)
    for gene in range(moved.shape[1]):
        source = (xy - random.uniform(0.25, 0.75, 2) * span) % span
        mirrored = random.uniform(size=2) < 0.5
        source = np.where(mirrored, span - 1 - source, source)
        moved[:, gene] = section.expression[tree.query(source)[1], gene]
    return moved


def turned(section: Section, other: Tissue, random: np.random.Generator) -> NDArray[np.float32]:
    """Genes of another tissue, each turned its own way and brought to the size of this one."""
    whole = np.ones(len(other.xy), dtype=bool)
    there = other.section(whole, other.genes(whole))
    own, theirs = (each - (each.min(axis=0) + each.max(axis=0)) / 2 for each in (section.xy, there.xy))
    scale, tree = np.ptp(theirs, axis=0).mean() / np.ptp(own, axis=0).mean(), cKDTree(theirs)
    laid = np.empty((len(own), there.expression.shape[1]), dtype=np.float32)
    for gene, angle in enumerate(random.uniform(0, 2 * np.pi, laid.shape[1])):
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        laid[:, gene] = there.expression[tree.query(own @ turn)[1], gene]
    return laid


def field(section: Section, length: float, random: np.random.Generator) -> NDArray[np.float32]:
    """Poisson counts, as many genes, whose log rates are Gaussian fields of Matern 3/2 covariance."""
    away = np.sqrt(3) * np.linalg.norm(section.xy[:, None] - section.xy[None], axis=2) / length
    root = np.linalg.cholesky((1 + away) * np.exp(-away) + 1e-6 * np.eye(len(away)))
    rate = np.exp(0.7 * root @ random.normal(size=section.expression.shape))
    return np.log1p(random.poisson(rate)).astype(np.float32)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--parts", nargs="+", default=["spread", "genes"], choices=["spread", "genes"])
    options.set_defaults(models=["attention"], seeds=3)
    arguments = options.parse_args()
    tissue = cache(lambda name: Tissue.of(name, arguments.data))
    for model in arguments.models if "spread" in arguments.parts else []:
        for title, block in (("at random", None), (f"in blocks of {BLOCK:g} pitches", BLOCK)):
            table = Table(f"{model}, half hidden {title}: coverage of 80 / 90 / 95 % intervals, and the rest")
            for name in arguments.sections:
                for random_state in range(arguments.seeds):
                    hidden = grids.hold_out(tissue(name).xy, 0.5, block=block, random_state=random_state)
                    for column, figures in spread(tissue(name), hidden, model, random_state).items():
                        table.add(name, column, *figures)
            table.print("{:.2f}".format)
    if "genes" in arguments.parts:
        table = Table("Real genes called, %; of the added genes: share of those called, % / with p < .05, %")
        for name in arguments.sections:
            for random_state in range(arguments.seeds):
                for column, figures in believed(tissue(name), tissue(STRANGERS[name]), random_state).items():
                    table.add(name, column, *figures)
        table.print("{:.1f}".format)


if __name__ == "__main__":
    main()
