"""Held-out accuracy: hold out spots, fit on the others and score predictions of those held out; compare models.

Genes, factors and standardization come from the training spots alone, because scores over training spots reward a model
for memorizing: copying the training values reaches r = 0.7 there.
Plain arrays and models; :func:`sthisto.tl.evaluate` is the same for AnnData.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations, repeat
from pathlib import Path
from threading import Event, Thread
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse, stats

from sthisto import _crossfit, grids, metrics
from sthisto.grids._spots import check_fraction
from sthisto.models import Model, Patches, Section

__all__ = [
    "ALL_SPOTS",
    "CEILING",
    "COPY",
    "GENE_MEAN",
    "PRIOR",
    "AllSpotsSplit",
    "BlockSplit",
    "Dataset",
    "RandomSplit",
    "Split",
    "choose_genes",
    "compare",
    "gene_means",
    "least_seen",
    "score",
]

# Rows in addition to those of the models
GENE_MEAN, CEILING, COPY, PRIOR = "gene mean", "ceiling", "training values", "prior"
ALL_SPOTS = "_all_spots"  # ends the name of a score that counts training spots too
CORRELATIONS = ("pearson", "spearman")
MIN_HELD_OUT = 10  # spots of a section: a correlation over fewer is noise
LEAST_SEEN = 0.1  # of the training spots, for a gene to be scored
OFTEN = 10  # spots in which a gene is seen, for its variance to be compared where that of rarer genes cannot be
MANY_SPOTS = 1000  # on larger sections rare genes are scored, too
SAMPLING_SECONDS = 0.002
MEMORY = Path("/proc/self/statm")  # Linux: pages of this process

Counts: TypeAlias = Any  # a SciPy CSR table (n, all genes), whose classes carry no types
Mask: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class RandomSplit:
    """Hold out spots at random: they are between measured spots, and the gaps have to be filled.

    Parameters
    ----------
    fraction
        Share of the spots of every section to hold out, between 0 and 1.
    """

    fraction: float = 0.5
    name: ClassVar[str] = "random"
    all_spots: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fraction(self.fraction)

    def hold_out(self, xy: NDArray[np.float64], random_state: int) -> Mask:
        """Mask (n,) of the held-out spots at xy (n, 2), in pitches."""
        return grids.hold_out(xy, self.fraction, random_state=random_state)


@dataclass(frozen=True, kw_only=True)
class BlockSplit:
    """Hold out whole square blocks, so that no neighbor of a held-out spot is measured (Roberts et al. 2017).

    Parameters
    ----------
    fraction
        Share of the spots of every section to hold out, between 0 and 1.
    block
        Side of the blocks in pitches.
    """

    fraction: float = 0.5
    block: float = 4.0
    name: ClassVar[str] = "block"
    all_spots: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fraction(self.fraction)

    def hold_out(self, xy: NDArray[np.float64], random_state: int) -> Mask:
        """Mask (n,) of the held-out spots at xy (n, 2), in pitches."""
        return grids.hold_out(xy, self.fraction, block=self.block, random_state=random_state)


@dataclass(frozen=True, kw_only=True)
class AllSpotsSplit(RandomSplit):
    """The protocol of HisToSGE's scripts: spots are held out at random, and all are scored, training spots included.

    Genes are chosen on all spots. The score rewards memorization, as the row ``"training values"`` shows, which copies
    them; its metrics are called ``pearson_all_spots`` and so on.
    """

    all_spots: ClassVar[bool] = True


SPLITS: dict[str, "RandomSplit | BlockSplit"] = {"random": RandomSplit(), "block": BlockSplit()}


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Sections with all that was measured, to be split into training and held-out spots."""

    sections: Sequence[Section]  # without expression
    expression: Sequence[Any]  # (n, g) of each section, dense or CSR, log-normalised
    genes: NDArray[np.str_]  # (g,)
    columns: NDArray[np.intp] | None = None  # the genes to score; None: chosen by the counts of each split
    counts: Sequence[Counts] | None = None  # (n, g) of each section

    def split(self, held_out: Sequence[Mask], *, n_genes: int, all_spots: bool = False) -> "Split":
        """Hold out spots, and choose genes on the others where they are not given.

        Parameters
        ----------
        held_out
            (n,) mask of each section.
        n_genes
            Genes to choose, among those seen in a tenth of the training spots; seen at all, where sections have more
            than 1000 spots on average.
        all_spots
            Score training spots, too, with genes chosen on all spots.

        Raises
        ------
        ValueError
            Neither genes nor counts to choose them by, or no gene is seen often enough.
        """
        kept = [~mask | all_spots for mask in held_out]
        columns = self._choose(kept, n_genes) if self.columns is None else self.columns
        cut = [whole[:, columns] for whole in self.expression]
        values = [part.toarray() if sparse.issparse(part) else part for part in cut]
        sections = [_of_genes(section, columns) for section in self.sections]
        return Split(
            sections=[replace(section, expression=v) for section, v in zip(sections, values, strict=True)],
            held_out=held_out,
            genes=self.genes[columns].tolist(),
            all_spots=all_spots,
            counts=self.counts,
            columns=columns,
        )

    def _choose(self, kept: Sequence[Mask], n_genes: int) -> NDArray[np.intp]:
        if self.counts is None:
            raise ValueError("genes are chosen by counts: give columns= or counts=.")
        parts = [counts[mask] for counts, mask in zip(self.counts, kept, strict=True)]
        labels = np.repeat(np.arange(len(parts)), [part.shape[0] for part in parts])
        least = least_seen(sum(map(len, self.sections)), len(self.sections))
        chosen = choose_genes(sparse.vstack(parts, format="csr"), labels, n_genes, least_seen=least)
        return np.flatnonzero(chosen)


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split of a dataset: models are fitted on the training spots and scored on the held-out ones.

    Examples
    --------
    >>> from sthisto.models.idw import Idw
    >>> rng = np.random.default_rng(0)
    >>> xy = rng.uniform(0, 8, (60, 2))
    >>> spots = Section(name="a", xy=xy, expression=np.sin(xy).astype(np.float32) + 1)
    >>> split = Split(sections=[spots], held_out=[np.arange(60) % 2 == 0], genes=["sin x", "sin y"])
    >>> table = split.run("idw", Idw(), random_state=0, device="cpu")
    >>> bool(table.query("gene.isna() and metric == 'pearson'")["value"].item() > 0.5)
    True
    """

    sections: Sequence[Section]  # whole, with the expression (n, g) of the genes
    held_out: Sequence[Mask]  # (n,) of each section
    genes: Sequence[str]  # (g,)
    all_spots: bool = False  # score training spots, too
    counts: Sequence[Counts] | None = None  # (n, all genes) of each section, for the ceiling
    columns: NDArray[np.intp] | None = None  # (g,) of the genes in the counts

    def run(
        self, name: str, model: Model, *, patches: Sequence[Patches] = (), random_state: int, device: str
    ) -> pd.DataFrame:
        """Fit a model and score it.

        Negative predictions count as 0, as in :func:`sthisto.tl.predict`.

        Parameters
        ----------
        name
            Of the model, for the table.
        model
            Fresh model.
        patches
            Of each section, for a model that reads pixels.
        random_state, device
            Passed to its ``fit``.

        Returns
        -------
        Columns ``model``, ``section``, ``gene`` (NaN: mean over genes), ``metric``, ``value``. Further
        metrics, with ``section`` NaN as sections are fitted together: ``seconds`` of the fit, ``peak_memory_mb`` that
        the process grew by at most while it ran. The latter is resident main memory, sampled every 2 ms (Python's own
        accounting does not see torch's); memory left over from earlier fits is used again and not counted, a GPU's
        is not seen, and where the system has no ``/proc`` it is NaN.
        """
        whole = [replace(each, patches=p) for each, p in zip(self.sections, patches or repeat(None), strict=False)]
        training = _crossfit.training_spots(whole, self.held_out)
        start = time.perf_counter()
        with _memory() as peak:
            model.fit(training, random_state=random_state, device=device, progress=False)
        cost = {"seconds": time.perf_counter() - start, "peak_memory_mb": peak[0]}
        predicted = _crossfit.predict(model, _crossfit.points_of(whole, self._scored()))
        costs = pd.DataFrame({"model": name, "metric": list(cost), "value": list(cost.values())})
        return pd.concat([self._table(name, predicted), costs], ignore_index=True)

    def reference_scores(self, *, random_state: int) -> pd.DataFrame:
        """Score reference predictions: what models have to exceed, and the noise ceiling.

        ``"gene mean"`` is the mean over the training spots; it does not vary, so its correlation is counted as 0.
        ``"ceiling"``, where there are counts, is the Pearson r that a perfect predictor of the true rates would reach
        on the held-out spots (:func:`sthisto.metrics.noise_ceiling`). Where all spots are scored there is no ceiling
        but ``"training values"``, which copies them. ``"prior"`` is the one that the sections bring, as it is.

        Parameters
        ----------
        random_state
            Of the binomial thinning.

        Returns
        -------
        As :meth:`run`, without costs.
        """
        tables = []
        for name in (GENE_MEAN, *([COPY] if self.all_spots else [])):
            whole = [_simple(_measured(section), held_out, copy=name == COPY) for section, held_out in self._pairs()]
            tables.append(self._table(name, [w[rows] for w, rows in zip(whole, self._scored(), strict=True)]))
        if all(section.prior is not None for section in self.sections):
            values = [_prior(section, held_out) for section, held_out in self._pairs()]
            tables.append(self._table(PRIOR, [v[rows] for v, rows in zip(values, self._scored(), strict=True)]))
        if self.counts is not None and self.columns is not None and not self.all_spots:
            tables += [
                self._ceiling(counts[held_out], section.name, random_state)
                for counts, (section, held_out) in zip(self.counts, self._pairs(), strict=True)
            ]
        return pd.concat(tables, ignore_index=True)

    def _ceiling(self, counts: Counts, section: str, random_state: int) -> pd.DataFrame:
        def scale(part: Counts) -> Counts:
            return metrics.lognorm(part)[:, self.columns]  # totals of the spots are over all genes

        r = metrics.noise_ceiling(counts, random_state=random_state, transform=scale)
        return _long(CEILING, section, self.genes, {"pearson": r})

    def _pairs(self, masks: Sequence[Mask] | None = None) -> Iterator[tuple[Section, Mask]]:
        return zip(self.sections, self.held_out if masks is None else masks, strict=True)

    def _scored(self) -> list[Mask]:
        return [held_out | self.all_spots for held_out in self.held_out]

    def _table(self, name: str, predicted: Sequence[NDArray[np.float32]]) -> pd.DataFrame:
        suffix, tables = ALL_SPOTS * self.all_spots, []
        for (section, rows), values in zip(self._pairs(self._scored()), predicted, strict=True):
            figures = score(_measured(section)[rows], values)
            named = {f"{metric}{suffix}": figure for metric, figure in figures.items()}
            tables.append(_long(name, section.name, self.genes, named))
        return pd.concat(tables, ignore_index=True)


def score(truth: NDArray[np.float32], predicted: NDArray[np.float32]) -> dict[str, NDArray[np.float64]]:
    """Score a prediction gene by gene.

    Parameters
    ----------
    truth, predicted
        (n, g), measured and predicted expression on one scale.

    Returns
    -------
    ``pearson``, ``spearman``, ``mse``, ``mae``, each (g,). A gene that varies but is predicted not to has correlation
    0: leaving it out would reward a model for giving up on genes. Only a gene that is constant in ``truth`` is NaN.

    Examples
    --------
    >>> score(np.array([[0.0, 1.0], [2.0, 1.0]]), np.array([[1.0, 1.0], [1.0, 1.0]]))["pearson"]
    array([ 0., nan])
    """
    varies = np.ptp(truth, axis=0) > 0
    figures = {name: getattr(metrics, name)(truth, predicted) for name in (*CORRELATIONS, "mse", "mae")}
    for name in CORRELATIONS:
        figures[name] = np.where(varies & np.isfinite(predicted).all(axis=0), np.nan_to_num(figures[name]), np.nan)
    return figures


def least_seen(n_spots: int, n_sections: int) -> float:
    """Share of the spots that a gene has to be seen in: a tenth, but on large sections rare genes are modelled, too."""
    return 0.0 if n_spots > MANY_SPOTS * n_sections else LEAST_SEEN


def choose_genes(
    values: Counts,
    sections: NDArray[np.generic],
    n_genes: int,
    *,
    least_seen: float = LEAST_SEEN,
    flavor: Literal["seurat_v3", "seurat"] = "seurat_v3",
) -> Mask:
    """Choose genes worth modelling by the expression of the training spots alone: seen often enough, most variable.

    Choosing on all spots would leak information of the held-out ones: a gene that varies there would be chosen.

    Parameters
    ----------
    values
        (n, all genes) CSR counts of the training spots, or log-normalized expression with ``flavor="seurat"``.
    sections
        (n,) which section each spot belongs to; variances are ranked within sections.
    n_genes
        So many are chosen, or all where fewer are seen often enough.
    least_seen
        Share of the spots that a gene has to be seen in; in one spot at least.
    flavor
        Of :func:`scanpy.pp.highly_variable_genes`.

    Returns
    -------
    (all genes,) mask.

    Raises
    ------
    ValueError
        No gene is seen often enough, or there are too few genes and spots to rank genes by.

    References
    ----------
    Stuart et al. (2019), Cell, "Comprehensive integration of single-cell data" (``"seurat_v3"``); Satija et al. (2015),
    Nature Biotechnology, "Spatial reconstruction of single-cell gene expression data" (``"seurat"``).

    Examples
    --------
    >>> from scipy.sparse import csr_matrix
    >>> choose_genes(csr_matrix(np.eye(4) + [1, 0, 0, 0]), np.zeros(4), 2, least_seen=0.5)
    array([ True, False, False, False])
    """
    seen = np.asarray((values > 0).mean(axis=0)).ravel()
    chosen: Mask = (seen > 0) & (seen >= least_seen)
    if not chosen.any():
        raise ValueError(
            f"no gene is seen in {least_seen:.0%} of the {values.shape[0]} training spots. Name some with genes=."
        )
    if chosen.sum() > n_genes:
        chosen[chosen] = _most_variable(values[:, chosen], sections, n_genes, flavor)
    return chosen


def _most_variable(values: Counts, sections: NDArray[np.generic], n_genes: int, flavor: str) -> Mask:
    """Mask (g,) of the most variable genes.

    The regression of variances on means fails where many genes are seen in a few spots only, as their points coincide:
    then these genes are left out.
    """
    import scanpy as sc  # noqa: PLC0415  importing sthisto must not load scanpy

    often: Mask = np.asarray((values > 0).sum(axis=0)).ravel() >= OFTEN
    several = "section" if len(np.unique(sections)) > 1 else None
    for kept in (np.ones_like(often), often):
        if kept.sum() <= n_genes:
            return kept
        part = sc.AnnData(values[:, kept], obs={"section": sections.astype(str)})
        try:
            ranked = sc.pp.highly_variable_genes(
                part, flavor=flavor, n_top_genes=n_genes, batch_key=several, inplace=False
            )
        except ValueError as error:
            failure = error
        else:
            chosen = np.zeros_like(kept)
            chosen[kept] = ranked["highly_variable"].to_numpy(dtype=bool)
            return chosen
    raise ValueError(
        f"{len(often)} genes on {len(sections)} training spots are too few to rank by variance ({failure}). Pass "
        f"genes={len(often)} to take them all, or name some with genes=."
    ) from failure


def compare(table: pd.DataFrame, metric: str = "pearson", *, confidence: float = 0.95) -> pd.DataFrame:
    """Compare models by their paired differences, with intervals.

    Splits and sections differ in difficulty by more than models do, but equally for all models: differences on the same
    held-out spots reveal what means over different ones hide. The interval is Student's t interval for the mean of the
    differences of gene-averaged scores, one difference for each repeat of each section. Repeats on one section share
    spots, so with a single section it covers other splits of that section, not other tissue.

    Parameters
    ----------
    table
        From :func:`sthisto.tl.evaluate`, or several of them joined, where ``section`` or a column that you add
        identifies the section.
    metric
        The score to compare by.
    confidence
        Of the interval.

    Returns
    -------
    One row a split and pair of models: ``split``, ``model``, ``other``, ``difference`` (mean of model less other),
    ``low``, ``high``, ``n`` (differences it is the mean of). With one difference the interval is NaN.

    Raises
    ------
    KeyError
        ``metric`` is not in the table.
    ValueError
        Confidence outside (0, 1), fewer than two models, or rows that no column distinguishes.

    Examples
    --------
    >>> rows = [("a", r, 0.3 + r / 10) for r in range(3)] + [("b", r, 0.1 + r / 9) for r in range(3)]
    >>> table = pd.DataFrame(rows, columns=["model", "repeat", "value"])
    >>> table = table.assign(split="random", section="s", gene=np.nan, metric="pearson")
    >>> compare(table).round(3)
        split model other  difference    low   high  n
    0  random     a     b       0.189  0.161  0.216  3
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: expected a number between 0 and 1, as 0.95.")
    means = gene_means(table, metric)
    means = means[means["model"] != CEILING]
    units = [str(name) for name in means if name not in ("model", "gene", "genes", "metric", "value")]
    if means.duplicated(["model", *units]).any():
        raise ValueError(f"rows repeat each other in {', '.join(units)}: add a column that identifies the section.")
    wide = means.pivot(index=units, columns="model", values="value")[means["model"].unique()]
    if wide.shape[1] < 2:
        raise ValueError(f"a comparison takes two models or more; the table has {', '.join(map(str, wide))}.")
    rows = [
        (split, model, other, *_interval(part[model].sub(part[other]).dropna().to_numpy(), confidence))
        for split, part in ((split, wide.xs(split, level="split")) for split in means["split"].unique())
        for model, other in combinations(map(str, wide), 2)
    ]
    return pd.DataFrame(rows, columns=["split", "model", "other", "difference", "low", "high", "n"])


def gene_means(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Rows of a metric's means over genes.

    Parameters
    ----------
    table
        From :func:`sthisto.tl.evaluate`.
    metric
        One of its metrics.

    Raises
    ------
    KeyError
        ``metric`` is not in the table.
    """
    of_metric = table[table["metric"] == metric]
    if of_metric.empty:
        raise KeyError(f"no metric {metric!r} in the table (there are: {', '.join(table['metric'].unique())}).")
    return of_metric[of_metric["gene"].isna()]


def _interval(differences: NDArray[np.float64], confidence: float) -> tuple[float, float, float, int]:
    mean, n = float(differences.mean()) if len(differences) else np.nan, len(differences)
    if n < 2:
        return mean, np.nan, np.nan, n
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * differences.std(ddof=1) / np.sqrt(n))
    return mean, mean - half, mean + half, n


def _long(model: str, section: str, genes: Sequence[str], figures: Mapping[str, NDArray[np.float64]]) -> pd.DataFrame:
    """One row a metric and gene, the mean over genes first; genes without a score do not count."""
    scored = {name: figure[np.isfinite(figure)] for name, figure in figures.items()}
    values = [[each.mean() if len(each) else np.nan, *figures[name]] for name, each in scored.items()]
    return pd.DataFrame(
        {
            "model": model,
            "section": section,
            "gene": [np.nan, *genes] * len(values),
            "metric": np.repeat(list(figures), 1 + len(genes)),
            "value": np.concatenate(values),
        }
    )


def _of_genes(section: Section, columns: NDArray[np.intp]) -> Section:
    return section if section.prior is None else replace(section, prior=section.prior[:, columns])


def _prior(section: Section, held_out: Mask) -> NDArray[np.float32]:
    """(n, g) the prior, and the training means of genes that it lacks."""
    means = np.broadcast_to(_measured(section)[~held_out].mean(axis=0), _measured(section).shape)
    return means if section.prior is None else np.where(np.isnan(section.prior), means, section.prior)


def _simple(expression: NDArray[np.float32], held_out: Mask, *, copy: bool) -> NDArray[np.float32]:
    """(n, g) the training means, or the training values where there are any."""
    predicted = np.tile(expression[~held_out].mean(axis=0), (len(expression), 1))
    if copy:
        predicted[~held_out] = expression[~held_out]
    return predicted


def _measured(section: Section) -> NDArray[np.float32]:
    if section.expression is None:
        raise ValueError(f"section {section.name!r} has no measured expression to score against.")
    return section.expression


@contextmanager
def _memory() -> Iterator[list[float]]:
    """Give a list whose one entry will be the MB that the process grew by at most."""
    peak = [np.nan]
    if not MEMORY.exists():
        yield peak
        return
    before, peak[0], done = _resident(), 0.0, Event()

    def watch() -> None:
        while not done.wait(SAMPLING_SECONDS):
            peak[0] = max(peak[0], _resident() - before)

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak[0] = max(peak[0], _resident() - before)


def _resident() -> float:
    return int(MEMORY.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
