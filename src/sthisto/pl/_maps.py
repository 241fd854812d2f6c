"""Maps of genes: values from a table, color scales, titles with the gene's predictability, and drawing."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from sthisto import _data
from sthisto._messages import near
from sthisto.pl._colors import WARNING, color_map, color_norm, extension
from sthisto.pl._panels import BACKGROUND_ALPHA, LABEL_PAD, AxesGiven, ImageOption, PanelGrid, panel_grid, root_figure
from sthisto.pl._spots import Rows, SpotPatches, frame_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values: TypeAlias = NDArray[np.float32]

EXPRESSION, COUNTS, OTHER = "log-normalized expression", "counts", "expression"
MAX_LOG = 14.0  # log-normalized values are lower: log1p of a million
STD, RELATIVE = "std of expression", "std / expression"
COLOR_MAPS = {STD: "cividis", RELATIVE: "cividis"}  # others than the expression's, so that the two are not mixed up
FADED = 0.5  # opacity of extrapolated points
FALSE_DISCOVERY_RATE = 0.05
LOW_R = 0.1  # less than a hundredth of a gene's variance is predicted
SYMBOLS = ("symbol", "gene_symbol", "gene_symbols", "gene_name", "feature_name")
LABEL_INCHES = 2.0  # of the longest label
CHARACTER_INCHES = 0.068  # of a title, on average


@dataclass(frozen=True)
class GeneMap:
    """Genes of one section, from one source."""

    name: str
    unit: str
    patches: SpotPatches
    values: Values  # (n, g)
    hatched: NDArray[np.bool_] | None = None  # (n,) outside the training domain


def draw_genes(
    adata: AnnData,
    titles: Sequence[tuple[str, str, bool]],
    maps: Mapping[str, Sequence[GeneMap]],
    *,
    image: ImageOption,
    ax: AxesGiven,
    style: Mapping[str, Any],
) -> PanelGrid:
    """Draw a block of maps for every gene and section.

    ``titles`` are of every gene: its title, a note on its predictability, and whether that is a warning. ``style``
    holds ``vmin``, ``vmax``, ``cmap`` and ``norm`` of the first panel's unit, and properties of all patches.
    """
    every = [drawn for section in maps.values() for drawn in section]
    units = list(dict.fromkeys(drawn.unit for drawn in every))
    style = check_style(style)
    alpha = style.pop("alpha", 1.0)
    colors: dict[str, Any] = {name: style.pop(name) for name in ("vmin", "vmax", "cmap", "norm") if name in style}
    grid = panel_grid(
        adata,
        {name: frame_of(drawn.patches for drawn in section) for name, section in maps.items()},
        len(next(iter(maps.values()))),
        repeats=len(titles),
        image=image,
        image_alpha=1 - alpha * (1 - BACKGROUND_ALPHA),
        n_colorbars=len(units),
        ax=ax,
    )
    blocks = iter(zip(grid.panels, grid.title_axes, strict=True))
    for gene, (title, note, warning) in enumerate(titles):
        scales = {unit: _scale(every, gene, unit, colors if unit == units[0] else {}) for unit in units}
        for name, section in maps.items():
            panels, title_ax = next(blocks)
            _draw_block(panels, section, gene, scales, {"opacity": alpha, **style})
            draw_title(
                title_ax, f"{title}, {name}" if len(maps) > 1 else title, note, grid.title_inches, warning=warning
            )
    return grid


def check_style(style: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse keywords that are neither ours nor matplotlib's."""
    from matplotlib.collections import Collection  # noqa: PLC0415

    for name in style:
        if name not in {"vmin", "vmax"} and not hasattr(Collection, f"set_{name}"):
            raise TypeError(f"unexpected keyword argument {name!r}: neither an option nor a property of a Collection.")
    return dict(style)


def _scale(maps: Sequence[GeneMap], gene: int, unit: str, colors: Mapping[str, Any]) -> dict[str, Any]:
    """Color map, norm and extension of a gene's color bar: the same in all panels and sections of one unit."""
    values = [drawn.values[:, gene] for drawn in maps if drawn.unit == unit]
    norm = colors.get("norm") or color_norm(values, colors.get("vmin"), colors.get("vmax"))
    cmap = color_map(colors.get("cmap", COLOR_MAPS.get(unit, "viridis")))
    return {"norm": norm, "cmap": cmap, "extend": extension(norm, values)}


def _draw_block(
    panels: "Sequence[Axes]",
    maps: Sequence[GeneMap],
    gene: int,
    scales: Mapping[str, Mapping[str, Any]],
    style: Mapping[str, Any],
) -> None:
    """Draw the maps of a gene, and a color bar for every unit."""
    figure = root_figure(panels[0])
    for unit, scale in scales.items():
        pairs = [(ax, drawn) for ax, drawn in zip(panels, maps, strict=True) if drawn.unit == unit]
        for ax, drawn in pairs:
            mappable = _draw_map(ax, drawn, gene, {"norm": scale["norm"], "cmap": scale["cmap"], **style})
        axes = [ax for ax, _ in pairs]
        label = unit.replace(" ", "\n", 1) if len(unit) > len(STD) and _is_low(axes[0]) else unit
        bar = figure.colorbar(mappable, ax=axes, label=label, extend=scale["extend"], shrink=0.75, aspect=25, pad=0.02)
        bar.outline.set_visible(False)


def _is_low(ax: "Axes") -> bool:
    """Whether a color bar's label of one line is longer than the panel is high."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    width = ax.get_position().width * root_figure(ax).get_figwidth()
    return bool(width * abs((top - bottom) / (right - left)) < LABEL_INCHES)


def _draw_map(ax: "Axes", drawn: GeneMap, gene: int, style: dict[str, Any]) -> Any:
    """Draw a gene; points outside the training domain are faint and hatched."""
    ax.set_xlabel(drawn.name)
    values, hatched = drawn.values[:, gene], drawn.hatched
    if hatched is None or not hatched.any():
        return drawn.patches.draw(ax, array=values, **style)
    outside = drawn.patches.keep(hatched)
    outside.draw(ax, array=values[hatched], **{**style, "opacity": FADED * style["opacity"]})
    outside.draw(ax, facecolors="none", edgecolors="0.2", hatch="//////")
    ax.set_xlabel(f"{drawn.name}\n(hatched: outside the training domain)", labelpad=LABEL_PAD)
    return drawn.patches.keep(~hatched).draw(ax, array=values[~hatched], **style)


def draw_title(ax: "Axes", title: str, note: str = "", inches: float = 9.0, *, warning: bool = False) -> None:
    """Write a title at the left, where it has the width of all panels, and a note under it."""
    lines = textwrap.wrap(note, max(20, int(inches / CHARACTER_INCHES)))
    text = ax.set_title("\n".join([title, *lines]), loc="left", fontsize="medium")
    if warning:
        text.set_color(WARNING)
    elif not note:
        text.set_fontweight("bold")


def gene_list(genes: str | Sequence[str]) -> list[str]:
    """Return the genes as a list; refuses none, and a table in their place."""
    if isinstance(genes, AnnData) or _data.is_spatialdata(genes):
        raise TypeError(f"genes= is a {type(genes).__name__}: name genes second, and pass dense points as dense=.")
    names = [genes] if isinstance(genes, str) else list(genes)
    if not names:
        raise ValueError("no gene to draw: name one or several of var_names.")
    return names


def gene_values(adata: AnnData, rows: Rows, names: list[str], layer: str | None, table: str) -> Values:
    """(n, g) values of genes in a layer, or in ``X``; refuses genes that are missing or have no values."""
    missing = [name for name in names if name not in adata.var_names]
    if missing:
        raise KeyError(f"genes {missing} are not in {table}.var_names: {near(missing[0], adata.var_names)}")
    if layer is not None and layer not in adata.layers:
        raise KeyError(f"no layer {layer!r} in {table}.layers (found: {_data.layer_names(adata)}).")
    part = adata[rows, names]
    matrix = part.X if layer is None else part.layers[layer]
    values = np.asarray(matrix.toarray() if sparse.issparse(matrix) else matrix, np.float32)
    empty = [name for name, gene in zip(names, values.T, strict=True) if not np.isfinite(gene).any()]
    if empty:
        raise ValueError(f"genes {empty} have no values in {table}: the model does not have them. Fit with genes=.")
    return values


def unit_of(values: Values) -> str:
    """Name what the values of measured spots are, as far as the values show it."""
    low, high = np.nanmin(values), np.nanmax(values)
    if low >= 0 and high > 1 and np.array_equal(values, np.rint(values), equal_nan=True):
        return COUNTS
    return EXPRESSION if low >= 0 and high < MAX_LOG else OTHER


def gene_title(adata: AnnData, gene: str) -> str:
    """Name the gene by its symbol, too, where ``var`` has one in addition to an identifier."""
    for column in SYMBOLS:
        symbol = adata.var.at[gene, column] if column in adata.var else None
        if isinstance(symbol, str) and symbol != gene:  # NaN where an identifier has none
            return f"{symbol} ({gene})"
    return gene


def reliability(tables: Sequence[AnnData], gene: str, key: str) -> tuple[str, bool]:
    """Summarize the gene test, and whether it is a warning: a low held-out correlation, or no link to the image."""
    r, q = (_first_number(tables, gene, f"{key}_{figure}") for figure in ("pearson", "qvalue"))
    held_out = f"held-out r {r:.2f}" if np.isfinite(r) else ""
    if r < LOW_R:
        return f"poorly predicted on held-out spots: r {r:.2f}", True
    if q >= FALSE_DISCOVERY_RATE:
        return f"no significant link to the image: q {q:.2g}" + (f" ({held_out})" if held_out else ""), True
    return held_out, False


def _first_number(tables: Sequence[AnnData], gene: str, column: str) -> float:
    values = [float(table.var.at[gene, column]) for table in tables if column in table.var and gene in table.var_names]
    return next((value for value in values if np.isfinite(value)), float("nan"))
