"""Scores of models on held-out spots, and training curves."""
# ruff: noqa: PLC0415  importing sthisto must not load matplotlib

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData

from sthisto import _data
from sthisto.evaluation import CEILING, COPY, GENE_MEAN, gene_means
from sthisto.pl._colors import CURVES
from sthisto.pl._panels import PANEL_INCHES, AxesGiven, Drawn, given_axes, root_figure, show_save_return

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

HELD_OUT = {"random": "random spots held out", "block": "blocks of spots held out"}
ERRORS = ("mse", "mae")  # lower is better


def evaluation(
    table: "DataFrame",
    metric: str = "pearson",
    *,
    models: Sequence[str] | None = None,
    ax: AxesGiven = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Drawn:
    """Draw how well models predict held-out spots: means per split, and two models compared gene by gene.

    A bar is the mean of a model over genes, each point a repeat (and section). The dashed line is the noise ceiling,
    the score of a perfect predictor given count noise. In the last panel each point is a gene; below the diagonal, the
    first of the two models has the higher score.

    Parameters
    ----------
    table
        Output of :func:`sthisto.tl.evaluate`.
    metric
        The score to draw, one of those in the table.
    models
        Two models to compare gene by gene, the first along x; by default the first two of the table. The first split
        is drawn, as the mean over repeats and sections.
    ax
        Axes to draw into, one for every panel; by default a new figure.
    show, save, return_fig
        Show the figure (``None``: in interactive sessions), write it to a file, return it.

    Returns
    -------
    The figure, or its axes: one for every split and, where there are two models, that of the genes; or ``None`` where
    the figure was shown

    Raises
    ------
    KeyError
        The table does not have the metric or a model, or has no scores of single genes.
    ValueError
        ``models`` does not name two models, or ``ax`` holds another number of axes.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic(60, n_genes=20)
    >>> table = sthisto.tl.evaluate(adata, "idw", counts_layer="counts", n_repeats=2)
    >>> [ax.get_title() for ax in sthisto.pl.evaluation(table, show=False)]
    ['random spots held out', 'blocks of spots held out']
    """
    means = gene_means(table, metric)
    names = [str(model) for model in means["model"].unique() if model != CEILING]
    pair = _pair(names, models)
    splits = list(means["split"].unique())
    widths = [0.6 + 0.42 * len(names)] * len(splits) + [PANEL_INCHES] * bool(pair)
    axes = _new_axes(widths, len(splits)) if ax is None else given_axes(ax, len(widths))
    for split, panel in zip(splits, axes, strict=False):
        _draw_models(panel, means[means["split"] == split], names)
        panel.set_title(HELD_OUT.get(split, str(split)), fontsize="medium")
    axes[0].set_ylabel(f"{metric}, mean over genes")
    if pair:
        _draw_pair(axes[-1], table[(table["metric"] == metric) & (table["split"] == splits[0])], pair, metric)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return show_save_return(root_figure(axes[0]), axes, show=show, save=save, return_fig=return_fig)


def _new_axes(widths: Sequence[float], n_splits: int) -> "list[Axes]":
    """Make panels side by side, those of the splits with one y axis."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(sum(widths) + 0.8, 3.6), layout="constrained")
    axes = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
    for ax in axes[1:n_splits]:
        ax.sharey(axes[0])
        ax.tick_params(labelleft=False)
    return axes


def _pair(models: Sequence[str], given: Sequence[str] | None) -> list[str]:
    """Two models to compare gene by gene; none where there are no two and none are given."""
    pair = [model for model in models if model != GENE_MEAN][:2] if given is None else list(given)
    unknown = [model for model in pair if model not in models]
    if unknown:
        raise KeyError(f"models {unknown} are not in the table (there are: {', '.join(models)}).")
    if given is not None and not len(pair) == len(set(pair)) == 2:
        raise ValueError(f"models={given!r}: name two models, of {', '.join(models)}.")
    return pair if len(pair) == 2 else []


def _draw_models(ax: "Axes", means: "DataFrame", models: Sequence[str]) -> None:
    """Bars of the means, a point for each repeat and section, and the ceiling."""
    import matplotlib as mpl

    for i, (model, color) in enumerate(zip(models, cycle(CURVES), strict=False)):
        values = means.loc[means["model"] == model, "value"].to_numpy()
        shade = "0.6" if model in (GENE_MEAN, COPY) else color
        ax.bar(i, values.mean(), width=0.7, color=shade, alpha=0.45)
        ax.scatter(i + np.linspace(-0.2, 0.2, len(values) + 2)[1:-1], values, s=14, color=shade, zorder=3)
    ceiling = means.loc[means["model"] == CEILING, "value"].to_numpy()
    if len(ceiling):
        color = mpl.rcParams["text.color"]  # visible on dark styles, too
        ax.axhspan(ceiling.min(), ceiling.max(), color="0.5", alpha=0.25, linewidth=0)
        ax.axhline(ceiling.mean(), color=color, linestyle="--", linewidth=1)
        ax.annotate(
            "noise ceiling",
            (len(models) - 0.5, ceiling.max()),
            (0, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize="small",
        )
    ax.margins(y=0.1)
    ax.set_xticks(range(len(models)), models, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_xlim(-0.6, len(models) - 0.4)


def _draw_pair(ax: "Axes", table: "DataFrame", pair: Sequence[str], metric: str) -> None:
    """Scatter the genes' means over repeats and sections, one model against another, and count who is better."""
    import matplotlib as mpl

    scores = table[table["gene"].notna()].pivot_table(index="gene", columns="model", values="value")
    if not set(pair) <= set(scores):
        raise KeyError(f"the table has no scores of single genes for {' and '.join(pair)} in this metric.")
    x, y = (scores[model].to_numpy() for model in pair)
    ax.scatter(x, y, s=9, alpha=0.5, color=CURVES[0], linewidths=0, rasterized=True)
    low, high = np.nanmin([x, y]), np.nanmax([x, y])
    ax.plot([low, high], [low, high], color=mpl.rcParams["text.color"], linewidth=1)
    first, second = int((x > y).sum()), int((y > x).sum())
    if metric in ERRORS:
        first, second = second, first
    scored = int((np.isfinite(x) & np.isfinite(y)).sum())
    held_out = HELD_OUT.get(table["split"].iloc[0], table["split"].iloc[0])
    ax.set_title(f"{metric} of {scored} genes,\n{held_out}", fontsize="medium")
    ax.set(xlabel=f"{pair[0]} (better for {first})", ylabel=f"{pair[1]} (better for {second})", aspect="equal")


def history(
    adata: AnnData,
    key: str = "sthisto",
    *,
    ax: "Axes | None" = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Drawn:
    """Draw the loss over the epochs of training.

    A validation loss that still falls at the end calls for more epochs; one that rises shows overfitting.

    Parameters
    ----------
    adata
        Object on which :func:`sthisto.tl.fit` was called.
    key
        Its ``key_added``.
    ax
        Axes to draw into; by default a new figure.
    show, save, return_fig
        Show the figure (``None``: in interactive sessions), write it to a file, return it.

    Returns
    -------
    The figure, or a list of the one axes, or ``None`` where the figure was shown

    Raises
    ------
    KeyError
        Nothing was fitted under ``key``.
    ValueError
        The model is not trained in epochs.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import numpy as np, sthisto
    >>> adata = sthisto.datasets.synthetic(50, n_genes=20)
    >>> adata.uns["sthisto"] = {"fit": {"sthisto": {"model": "mine", "history": {"train": np.array([3.0, 2.0, 1.5])}}}}
    >>> [ax] = sthisto.pl.history(adata, show=False)
    >>> ax.get_legend_handles_labels()[1]
    ['train']
    """
    import matplotlib.pyplot as plt

    fits = _data.records(_data.to_anndata(adata)[0], "fit")
    if key not in fits:
        raise KeyError(
            f"no fitted model {key!r} (found: {sorted(fits)}): run sthisto.tl.fit(adata) first, or pass key=."
        )
    curves, model = fits[key]["history"], str(fits[key]["model"])
    if not curves:
        raise ValueError(
            f"the model {model!r} is fitted in one step, without epochs to draw. sthisto.pl.evaluation draws how well "
            "it predicts, sthisto.pl.genes and sthisto.pl.uncertainty draw its predictions."
        )
    if ax is None:
        ax = plt.figure(figsize=(5, 3.2), layout="constrained").add_subplot()
    for (name, curve), color in zip(curves.items(), cycle(CURVES), strict=False):
        ax.plot(np.arange(1, len(curve) + 1), curve, label=name, color=color, marker="." if len(curve) == 1 else "")
    ax.set(xlabel="epoch", ylabel="loss", title=model)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return show_save_return(root_figure(ax), [ax], show=show, save=save, return_fig=return_fig)
