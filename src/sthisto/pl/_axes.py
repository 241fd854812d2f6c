"""Axes, colour scales, scale bars, and what is done with a finished figure."""
# ruff: noqa: PLC0415  importing sthisto must not load matplotlib
# ruff: noqa: PLC0415  importing sthisto must not load matplotlib

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

from sthisto.pl._panels import Floats, Panel

CURVES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: safe for the colour-blind
PANEL_INCHES = 3.6  # two panels and a colour bar fill a notebook's width
NOTEBOOK_INCHES = 9.0


def grid_of_panels(panels: Sequence[Panel], n_genes: int, ncols: int | None) -> "tuple[Figure, list[list[Axes]]]":
    """Make a figure of a notebook's width, and the axes of every gene side by side."""
    import matplotlib.pyplot as plt

    across = len(panels)
    ncols = ncols or (1 if across > 1 else min(3, n_genes))
    nrows = -(-n_genes // ncols)
    (left, right), (top, bottom) = frame_of(panels)
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


def frame_of(panels: Sequence[Panel]) -> Floats:
    """(2, 2) limits of x and y that hold every place of all panels."""
    low = np.min([panel.xy.min(0) - panel.size for panel in panels], axis=0)
    high = np.max([panel.xy.max(0) + panel.size for panel in panels], axis=0)
    return np.stack([low, high], axis=1)


def norm_of(values: Sequence[NDArray[np.float32]], vmin: float | str, vmax: float | str) -> "Normalize":
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


def title_of(adata: AnnData, gene: str) -> str:
    """Name the gene by its symbol too where ``var`` has one beside an identifier."""
    for column in ("symbol", "gene_symbol", "gene_symbols", "gene_name", "feature_name"):
        symbol = adata.var.at[gene, column] if column in adata.var else None
        if isinstance(symbol, str) and symbol != gene:  # NaN where an identifier has none
            return f"{symbol} ({gene})"
    return gene


def draw_scale_bar(ax: "Axes", mpp: float) -> None:
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


def finish(
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
