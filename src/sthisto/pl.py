"""Pictures: what was measured beside what is predicted, and how the training went.

Every function returns what scanpy's do: nothing where the picture was shown, else its axes, or the figure with
``return_fig=True``. Positions are full-resolution pixels with y downwards, as in the image; sizes are true sizes.
"""
# ruff: noqa: PLC0415  importing sthisto must not load matplotlib

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import Voronoi

from sthisto import _slide, grids
from sthisto.evaluation import CEILING, COPY, GENE_MEAN, gene_means

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.collections import Collection
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["evaluation", "genes", "history"]

Floats = NDArray[np.float64]

CURVES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: safe for the colour-blind
PANEL_INCHES = 3.6  # two panels and a colour bar fill a notebook's width
NOTEBOOK_INCHES = 9.0
PICTURE_PX = 1000  # more pixels than a panel can show


def genes(  # noqa: PLR0913  options of a picture, all with defaults
    adata: AnnData,
    dense: AnnData | None = None,
    genes: str | Sequence[str] = (),
    *,
    layer: str | None = None,
    library: str | None = None,
    library_key: str | None = None,
    image: bool = True,
    cmap: str = "viridis",
    vmin: float | str = "p1",
    vmax: float | str = "p99",
    ncols: int | None = None,
    scale_bar: bool = True,
    show: bool | None = None,
    save: "str | Path | None" = None,
    return_fig: bool = False,
) -> "Figure | list[Axes] | None":
    """Draw genes over the tissue: the measured spots, and beside them the dense prediction on the same colour scale.

    Side by side and on one scale it can be seen what the prediction adds and what it leaves out. Spots are circles of
    their true diameter; dense points are the cells of their lattice, hexagons or squares, so that they leave no gaps.

    Parameters
    ----------
    adata
        Measured spots, ``obsm["spatial"]`` (n, 2) in full-resolution pixels, x then y. Picture, scale factors and
        spot diameter are taken from ``uns["spatial"]`` where they are there; a spot of unknown diameter is drawn 0.55
        of the distance to its neighbour wide, which is Visium's.
    dense
        What :func:`sthisto.tl.upsample` returned.
    genes
        One or several of ``var_names``.
    layer
        Layer of ``adata`` to draw instead of ``X``: ``"sthisto"`` shows the denoised spots.
    library
        The section to draw where there are several.
    library_key
        ``obs`` column that tells the sections apart, in ``adata`` and ``dense`` alike.
    image
        Draw the picture of the section underneath, where there is one.
    cmap
        A colour map of matplotlib; the default reads the same with colour blindness and in grey.
    vmin, vmax
        Limits of the colours: numbers, or percentiles as ``"p99"``, of which the wider over both panels is taken.
    ncols
        Genes side by side; by default one with ``dense``, up to three without.
    scale_bar
        Draw a scale bar in the first panel where the micrometres per pixel are known:
        ``scalefactors["microns_per_pixel"]``, or from :func:`sthisto.pp.extract_features`.
    show, save, return_fig
        Show the picture (``None``: in interactive sessions), write it to a file, return its figure.

    Returns
    -------
    The figure, or the axes gene by gene, or ``None`` where the picture was shown

    Raises
    ------
    KeyError
        A gene, layer, section or the coordinates are not there.
    ValueError
        No gene is named, a gene has no values, a limit is no percentile, or it is not said which section to draw.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic(50, n_genes=20)
    >>> axes = sthisto.pl.genes(adata, genes=["region_00", "noise_04"], show=False)
    >>> [ax.get_title() for ax in axes]
    ['region_00', 'noise_04']
    """
    names = [genes] if isinstance(genes, str) else list(genes)
    if not names:
        raise ValueError(f"no gene to draw: pass genes= (there are {adata.n_vars}, as {list(adata.var_names[:5])}).")
    library, rows = _section(adata, library, library_key)
    panels = [_spots(adata, rows, names, layer, library)]
    if dense is not None:
        same = library if library_key else None  # without a picture the two do not name their one section alike
        panels.append(_points(dense, _section(dense, same, library_key)[1], names))
    picture = _picture(adata, library) if image else None
    figure, grid = _grid_of_panels(panels, len(names), ncols)
    for i, (gene, axes) in enumerate(zip(names, grid, strict=True)):
        norm = _norm([panel.values[:, i] for panel in panels], vmin, vmax)
        for panel, ax in zip(panels, axes, strict=True):
            if picture is not None:
                _draw_picture(ax, *picture)
            drawn = ax.add_collection(panel.collection(i, ax, cmap=cmap, norm=norm), autolim=False)
            ax.set_title(_title(adata, gene), fontsize="medium")
            ax.set_xlabel(panel.name)
        figure.colorbar(drawn, ax=axes, label="expression", shrink=0.75, aspect=25, pad=0.02)
    mpp = _mpp(adata, library) if scale_bar else None
    if mpp is not None:
        _draw_scale_bar(grid[0][0], mpp)
    return _finish(figure, [ax for axes in grid for ax in axes], show=show, save=save, return_fig=return_fig)


def history(
    adata: AnnData,
    key: str = "sthisto",
    *,
    ax: "Axes | None" = None,
    show: bool | None = None,
    save: "str | Path | None" = None,
    return_fig: bool = False,
) -> "Figure | list[Axes] | None":
    """Draw the loss over the epochs of training.

    Whether a model was trained long enough, or too long, is seen where the curve of the spots held back turns up.

    Parameters
    ----------
    adata
        What :func:`sthisto.tl.fit` was called on.
    key
        Its ``key_added``.
    ax
        Axes to draw into; by default a new figure.
    show, save, return_fig
        Show the picture (``None``: in interactive sessions), write it to a file, return its figure.

    Returns
    -------
    The figure, or a list of the one axes, or ``None`` where the picture was shown

    Raises
    ------
    KeyError
        Nothing was fitted under ``key``.
    ValueError
        The model does not iterate, so it has no history.

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
    fits = adata.uns.get("sthisto", {}).get("fit", {})
    if key not in fits:
        raise KeyError(
            f"no fitted model {key!r} (found: {sorted(fits)}): run sthisto.tl.fit(adata) first, or pass key=."
        )
    curves = fits[key]["history"]
    if not curves:
        raise ValueError(f"the model {fits[key]['model']!r} is fitted in one step and has no history to draw.")
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.figure(figsize=(5, 3.2), layout="constrained").add_subplot()
    for (name, curve), colour in zip(curves.items(), cycle(CURVES), strict=False):
        ax.plot(np.arange(1, len(curve) + 1), curve, label=name, color=colour, marker="." if len(curve) == 1 else "")
    ax.set(xlabel="epoch", ylabel="loss", title=str(fits[key]["model"]))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return _finish(ax.figure.get_figure(root=True), [ax], show=show, save=save, return_fig=return_fig)


def evaluation(
    table: "DataFrame",
    metric: str = "pearson",
    *,
    genes: Sequence[str] | None = None,
    show: bool | None = None,
    save: "str | Path | None" = None,
    return_fig: bool = False,
) -> "Figure | list[Axes] | None":
    """Draw how well models predict hidden spots: their means, split by split, and two of them gene by gene.

    A bar is the mean of a model, a point each repeat (and section) of it: bars whose points all lie apart differ. The
    line above is the noise ceiling, what a perfect predictor would reach. In the last panel each point is a gene: below
    the diagonal, the first of the two models scores higher.

    Parameters
    ----------
    table
        What :func:`sthisto.tl.evaluate` returned.
    metric
        The score to draw, one of those in the table.
    genes
        Two models to compare gene by gene, the first along x; by default the first two of the table. The first split
        is drawn, as the mean over repeats and sections.
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
        ``genes`` does not name two models.

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
    import matplotlib.pyplot as plt

    means = gene_means(table, metric)
    models = [str(model) for model in means["model"].unique() if model != CEILING]
    pair = _pair(models, genes)
    splits = means["split"].unique()
    widths = [0.6 + 0.42 * len(models)] * len(splits) + [PANEL_INCHES] * bool(pair)
    figure = plt.figure(figsize=(sum(widths) + 0.8, 3.6), layout="constrained")
    axes = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
    for split, ax in zip(splits, axes, strict=False):
        if ax is not axes[0]:
            ax.sharey(axes[0])
            ax.tick_params(labelleft=False)
        _draw_models(ax, means[means["split"] == split], models)
        ax.set_title(str(split), fontsize="medium")
    axes[0].set_ylabel(f"{metric}, mean over genes")
    if pair:
        _draw_pair(axes[-1], table[(table["metric"] == metric) & (table["split"] == splits[0])], pair)
        axes[-1].set_title(f"{metric} of genes, {splits[0]}", fontsize="medium")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return _finish(figure, axes, show=show, save=save, return_fig=return_fig)


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
    for i, (model, colour) in enumerate(zip(models, cycle(CURVES), strict=False)):
        values = means.loc[means["model"] == model, "value"].to_numpy()
        shade = "0.6" if model in (GENE_MEAN, COPY) else colour
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
    ax.set(xlabel=pair[0], ylabel=pair[1], aspect="equal")


@dataclass(frozen=True)
class _Panel:
    """One section's values at places of a true size."""

    name: str
    xy: Floats  # (n, 2)
    values: NDArray[np.float32]  # (n, g)
    size: float  # px: diameter of the spots, or pitch of the points
    cell: Floats | None = None  # (k, 2) corners of a place about its point; None: circles

    def collection(self, gene: int, ax: "Axes", **colours: Any) -> "Collection":
        """Return the places as shapes in data coordinates, coloured by a gene."""
        from matplotlib.collections import EllipseCollection, PolyCollection

        style = {"array": self.values[:, gene], "linewidths": 0, "rasterized": True, **colours}
        if self.cell is None:
            size = np.full(len(self.xy), self.size)
            return EllipseCollection(size, size, 0, units="xy", offsets=self.xy, offset_transform=ax.transData, **style)
        # neighbours share an edge: smoothing each of them would let the ground shine through as a grid of lines
        corners: Any = self.xy[:, None] + self.cell  # (n, k, 2)
        return PolyCollection(corners, antialiaseds=False, **style)


def _section(adata: AnnData, library: str | None, library_key: str | None) -> tuple[str, NDArray[np.intp]]:
    """Return the name and the rows of the one section to draw."""
    sections = _slide.sections(adata, library_key)
    if library is None and len(sections) > 1:
        raise ValueError(f"there are {len(sections)} sections: say with library= which to draw, of {list(sections)}.")
    name = next(iter(sections)) if library is None else library
    if name not in sections:
        raise KeyError(f"no section {name!r} (found: {list(sections)}).")
    return name, sections[name]


def _spots(adata: AnnData, rows: NDArray[np.intp], names: list[str], layer: str | None, library: str) -> _Panel:
    xy = _slide.positions(adata, rows)
    diameter = _scalefactors(adata, library).get("spot_diameter_fullres")
    size = 0.55 * grids.spacing(xy) if diameter is None else float(diameter)
    return _Panel(layer or "measured", xy, _values(adata, rows, names, layer, "adata"), size)


def _points(dense: AnnData, rows: NDArray[np.intp], names: list[str]) -> _Panel:
    xy = _slide.positions(dense, rows)
    try:
        lattice = grids.Lattice.fit(xy)
    except ValueError:  # points anywhere: squares
        pitch = grids.spacing(xy)
        cell = pitch / 2 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    else:
        pitch, cell = lattice.pitch, _cell(lattice.basis)
    return _Panel("predicted", xy, _values(dense, rows, names, None, "dense"), pitch, cell)


def _cell(basis: Floats) -> Floats:
    """(k, 2) corners of the part of the plane that is nearer to (0, 0) than to any other point of the lattice."""
    steps = np.indices((7, 7)).reshape(2, -1).T - 3
    voronoi = Voronoi(steps @ basis)
    corners = voronoi.vertices[voronoi.regions[voronoi.point_region[len(steps) // 2]]]
    return np.asarray(corners[np.argsort(np.arctan2(corners[:, 1], corners[:, 0]))])


def _values(
    adata: AnnData, rows: NDArray[np.intp], names: list[str], layer: str | None, called: str
) -> NDArray[np.float32]:
    missing = [name for name in names if name not in adata.var_names]
    if missing:
        alike = [near for name in missing for near in get_close_matches(name, adata.var_names, n=3)]
        there = alike or adata.var_names[:5].tolist()
        raise KeyError(f"genes {missing} are not in {called}.var_names ({adata.n_vars} there, such as {there}).")
    if layer is not None and layer not in adata.layers:
        raise KeyError(f"no layer {layer!r} in {called}.layers (found: {sorted(adata.layers)}).")
    part = adata[rows, names]
    matrix = part.X if layer is None else part.layers[layer]
    values = np.asarray(matrix.toarray() if sparse.issparse(matrix) else matrix, np.float32)
    empty = [name for name, gene in zip(names, values.T, strict=True) if not np.isfinite(gene).any()]
    if empty:
        raise ValueError(f"genes {empty} have no values in {called}: the model does not have them. Fit with genes=.")
    return values


def _scalefactors(adata: AnnData, library: str) -> dict[str, Any]:
    factors: dict[str, Any] = adata.uns.get("spatial", {}).get(library, {}).get("scalefactors", {})
    return factors


def _mpp(adata: AnnData, library: str) -> float | None:
    """Micrometres per full-resolution pixel, where known."""
    said = _scalefactors(adata, library).get("microns_per_pixel")
    for record in adata.uns.get("sthisto", {}).get("features", {}).values():
        if said is None:
            said = dict(zip(record["libraries"], record["mpp"], strict=True)).get(library)
    return None if said is None else float(said)


def _picture(adata: AnnData, library: str) -> tuple[NDArray[Any], tuple[float, float, float, float]] | None:
    """Return the picture and its extent in full-resolution pixels, or nothing where there is none but blank ones."""
    images, factors = adata.uns.get("spatial", {}).get(library, {}).get("images", {}), _scalefactors(adata, library)
    for name in ("hires", "lowres"):
        pixels, factor = np.asarray(images.get(name, 0)), factors.get(f"tissue_{name}_scalef")
        if factor is not None and pixels.min() < pixels.max():
            step = -(-max(pixels.shape[:2]) // PICTURE_PX)
            pixels = pixels[::step, ::step]
            height, width = np.multiply(pixels.shape[:2], step / factor)
            return pixels, (0, width, height, 0)
    return None


def _draw_picture(ax: "Axes", pixels: NDArray[Any], extent: tuple[float, float, float, float]) -> None:
    """Draw the picture, light, so that the colours over it are read."""
    limits = ax.get_xlim(), ax.get_ylim()
    ax.imshow(pixels, extent=extent, alpha=0.5, cmap="gray")
    ax.set(xlim=limits[0], ylim=limits[1])


# --- axes ------------------------------------------------------------------------------------------------------------


def _grid_of_panels(panels: Sequence[_Panel], n_genes: int, ncols: int | None) -> "tuple[Figure, list[list[Axes]]]":
    """Make a figure of a notebook's width, and the axes of every gene side by side."""
    import matplotlib.pyplot as plt

    across = len(panels)
    ncols = ncols or (1 if across > 1 else min(3, n_genes))
    nrows = -(-n_genes // ncols)
    (left, right), (top, bottom) = _frame(panels)
    width = min(PANEL_INCHES, NOTEBOOK_INCHES / (across * ncols))
    height = width * np.clip((bottom - top) / (right - left), 0.3, 3) + 0.6
    figure = plt.figure(figsize=(across * ncols * width, nrows * height), layout="compressed")
    flat = list(figure.subplots(nrows, ncols * across, squeeze=False).flat)
    for ax in flat[n_genes * across :]:
        ax.remove()
    for ax in flat[: n_genes * across]:
        ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return figure, [flat[i * across : (i + 1) * across] for i in range(n_genes)]


def _frame(panels: Sequence[_Panel]) -> Floats:
    """(2, 2) limits of x and y that hold every place of all panels."""
    low = np.min([panel.xy.min(0) - panel.size for panel in panels], axis=0)
    high = np.max([panel.xy.max(0) + panel.size for panel in panels], axis=0)
    return np.stack([low, high], axis=1)


def _norm(values: Sequence[NDArray[np.float32]], vmin: float | str, vmax: float | str) -> "Normalize":
    """One scale for all panels; a gene that is the same everywhere has the lowest colour."""
    from matplotlib.colors import Normalize

    low = min(_limit(v, vmin) for v in values)
    high = max(_limit(v, vmax) for v in values)
    return Normalize(low, high if high > low else low + 1)


def _limit(values: NDArray[np.float32], limit: float | str) -> float:
    if not isinstance(limit, str):
        return float(limit)
    percent = re.fullmatch(r"p(\d+\.?\d*)", limit)
    if percent is None or float(percent[1]) > 100:
        raise ValueError(f"{limit!r} is no limit of colours: pass a number, or a percentile as 'p99'.")
    return float(np.nanpercentile(values, float(percent[1])))


def _title(adata: AnnData, gene: str) -> str:
    """Name the gene by its symbol too where ``var`` has one beside an identifier."""
    for column in ("symbol", "gene_symbol", "gene_symbols", "gene_name", "feature_name"):
        symbol = adata.var.at[gene, column] if column in adata.var else None
        if isinstance(symbol, str) and symbol != gene:  # NaN where an identifier has none
            return f"{symbol} ({gene})"
    return gene


def _draw_scale_bar(ax: "Axes", mpp: float) -> None:
    """Draw, below the panel, the longest bar of 1, 2 or 5 times a power of ten within a third of its width."""
    from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar  # type: ignore[import-untyped]

    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    widest = (right - left) * mpp / 3
    power = 10 ** np.floor(np.log10(widest))
    um = power * max(digit for digit in (1, 2, 5) if digit * power <= widest)
    label = f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} µm"
    bar = AnchoredSizeBar(
        ax.transData,
        um / mpp,
        label,
        loc="upper left",
        bbox_to_anchor=(0, 0),  # the corner of the panel, so that nothing is covered
        bbox_transform=ax.transAxes,
        size_vertical=(bottom - top) / 150,
        color="black",
        frameon=False,
        borderpad=0.3,
        pad=0,
        sep=3,
    )
    ax.add_artist(bar)


def _finish(
    figure: "Figure", axes: "list[Axes]", *, show: bool | None, save: "str | Path | None", return_fig: bool
) -> "Figure | list[Axes] | None":
    """Save and show, and return what is left to return."""
    import matplotlib.pyplot as plt

    if save is not None:
        figure.savefig(save, dpi=200, bbox_inches="tight")
    if return_fig:
        return figure
    if plt.isinteractive() if show is None else show:
        plt.show()
        return None
    return axes
