"""Scores of models beside each other."""
# ruff: noqa: PLC0415  importing sthisto must not load matplotlib

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from sthisto.evaluation import CEILING, COPY, GENE_MEAN, gene_means

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

from sthisto.pl._axes import PANEL_INCHES, AxesGiven, finish, given_axes, root_of
from sthisto.pl._colors import CURVES


def evaluation(
    table: "DataFrame",
    metric: str = "pearson",
    *,
    genes: Sequence[str] | None = None,
    ax: AxesGiven = None,
    show: bool | None = None,
    save: "str | Path | None" = None,
    return_fig: bool = False,
) -> "Figure | list[Axes] | None":
    """Draw how well models predict hidden spots: their means, split by split, and two of them gene by gene.

    A bar is the mean of a model, a point each repeat (and section) of it: bars whose points all lie apart differ. The
    line above is the noise ceiling, what a perfect predictor would reach. In the last panel each point is a gene: below
    the diagonal, the first of the two models has the higher figure; how many lie above is said there.

    Parameters
    ----------
    table
        What :func:`sthisto.tl.evaluate` returned.
    metric
        The score to draw, one of those in the table.
    genes
        Two models to compare gene by gene, the first along x; by default the first two of the table. The first split
        is drawn, as the mean over repeats and sections.
    ax
        Axes to draw into, one for every panel; by default a new figure.
    show, save, return_fig
        Show the picture (``None``: in interactive sessions), write it to a file, return its figure.

    Returns
    -------
    The figure, or its axes: one for every split and, where there are two models, that of the genes; or ``None`` where
    the picture was shown

    Raises
    ------
    KeyError
        The table does not have the metric or a model, or does not have it gene by gene.
    ValueError
        ``genes`` does not name two models, or ``ax`` holds another number of axes.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic(60, n_genes=20)
    >>> table = sthisto.tl.evaluate(adata, "idw", counts_layer="counts", n_repeats=2, progress=False)
    >>> [ax.get_title() for ax in sthisto.pl.evaluation(table, show=False)]
    ['random', 'block']
    """
    means = gene_means(table, metric)
    models = [str(model) for model in means["model"].unique() if model != CEILING]
    pair = _pair(models, genes)
    splits = means["split"].unique()
    widths = [0.6 + 0.42 * len(models)] * len(splits) + [PANEL_INCHES] * bool(pair)
    axes = _new_axes(widths, len(splits)) if ax is None else given_axes(ax, len(widths))
    for split, panel in zip(splits, axes, strict=False):
        _draw_models(panel, means[means["split"] == split], models)
        panel.set_title(str(split), fontsize="medium")
    axes[0].set_ylabel(f"{metric}, mean over genes")
    if pair:
        _draw_pair(axes[-1], table[(table["metric"] == metric) & (table["split"] == splits[0])], pair)
        axes[-1].set_title(f"{metric} of genes, {splits[0]}", fontsize="medium")
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return finish(root_of(axes[0]), axes, show=show, save=save, return_fig=return_fig)


def _new_axes(widths: Sequence[float], n_splits: int) -> "list[Axes]":
    """Make panels side by side, those of the splits with one y axis."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(sum(widths) + 0.8, 3.6), layout="constrained")
    axes = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
    for ax in axes[1:n_splits]:
        ax.sharey(axes[0])
        ax.tick_params(labelleft=False)
    return axes


def _pair(models: Sequence[str], asked: Sequence[str] | None) -> list[str]:
    """Two models to compare gene by gene; none where there are no two and none are asked for."""
    pair = [model for model in models if model != GENE_MEAN][:2] if asked is None else list(asked)
    unknown = [model for model in pair if model not in models]
    if unknown:
        raise KeyError(f"models {unknown} are not in the table (there are: {', '.join(models)}).")
    if asked is not None and len(set(pair)) != 2:
        raise ValueError(f"genes={asked!r}: name two models, of {', '.join(models)}.")
    return pair if len(pair) == 2 else []


def _draw_models(ax: "Axes", means: "DataFrame", models: Sequence[str]) -> None:
    """Bars of the means, a point each repeat and section, and the ceiling."""
    for i, (model, color) in enumerate(zip(models, cycle(CURVES), strict=False)):
        values = means.loc[means["model"] == model, "value"].to_numpy()
        shade = "0.6" if model in (GENE_MEAN, COPY) else color
        ax.bar(i, values.mean(), width=0.7, color=shade, alpha=0.45)
        ax.scatter(i + np.linspace(-0.2, 0.2, len(values) + 2)[1:-1], values, s=14, color=shade, zorder=3)
    ceiling = means.loc[means["model"] == CEILING, "value"].to_numpy()
    if len(ceiling):
        ax.axhspan(ceiling.min(), ceiling.max(), color="0.5", alpha=0.25, linewidth=0)
        ax.axhline(ceiling.mean(), color="0.3", linestyle="--", linewidth=1)
        ax.text(len(models) - 0.55, ceiling.mean(), "noise ceiling", ha="right", va="bottom", fontsize="small")
    ax.set_xticks(range(len(models)), models, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_xlim(-0.6, len(models) - 0.4)


def _draw_pair(ax: "Axes", table: "DataFrame", pair: Sequence[str]) -> None:
    """Scatter the genes' means over repeats and sections, one model against another."""
    wide = table[table["gene"].notna()].pivot_table(index="gene", columns="model", values="value")
    if not set(pair) <= set(wide):
        raise KeyError(f"the table has no scores gene by gene of this metric for {' and '.join(pair)}.")
    x, y = (wide[model].to_numpy() for model in pair)
    ax.scatter(x, y, s=9, alpha=0.5, color=CURVES[0], linewidths=0, rasterized=True)
    low, high = np.nanmin([x, y]), np.nanmax([x, y])
    ax.plot([low, high], [low, high], color="0.3", linewidth=1)
    above, scored = int((y > x).sum()), int((np.isfinite(x) & np.isfinite(y)).sum())
    ax.text(0.03, 0.97, f"above: {above} of {scored}", transform=ax.transAxes, va="top", fontsize="small")
    ax.set(xlabel=pair[0], ylabel=pair[1], aspect="equal")
