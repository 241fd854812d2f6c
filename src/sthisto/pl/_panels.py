"""Axes over the tissue, with the section's image and a scale bar, and what is done with a finished figure."""
# ruff: noqa: PLC0415  importing sthisto must not load matplotlib

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from anndata import AnnData

from sthisto._files import whole_file
from sthisto.pl._spots import DrawnImage, Floats, microns_per_pixel, section_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AxesGiven: TypeAlias = "Axes | Sequence[Axes] | None"
Drawn: TypeAlias = "Figure | list[Axes] | None"  # what every plot returns
ImageOption: TypeAlias = bool | Literal["panel"]

PANEL_INCHES = 3.6
MIN_PANEL_INCHES = 1.2
NARROW_INCHES = 3.0
LABEL_PAD = 20  # points: a label below the scale bar
FIGURE_INCHES = 9.0  # the width of a notebook
TALL_INCHES = 14.0  # blocks move side by side rather than make a figure taller
COLORBAR_INCHES = 0.75
TEXT_INCHES = 0.6  # a title line and a scale bar
BACKGROUND_ALPHA = 0.35  # of an image under patches whose colors are to be read


@dataclass(frozen=True)
class PanelGrid:
    """Blocks of panels, each of one section, with its image drawn."""

    figure: "Figure"
    panels: "list[list[Axes]]"  # of every block, to draw into
    title_axes: "list[Axes]"  # the leftmost axes of every block
    axes: "list[Axes]"  # all of them
    title_inches: float  # width of a block


def panel_grid(
    adata: AnnData,
    frames: Mapping[str, Floats],
    n_panels: int,
    *,
    repeats: int = 1,
    image: ImageOption = True,
    image_alpha: float = BACKGROUND_ALPHA,
    n_colorbars: int = 0,
    text_inches: float = TEXT_INCHES,
    ax: AxesGiven = None,
) -> PanelGrid:
    """Make the axes of a block of panels for every section, with image and scale bar.

    ``frames`` are the (2, 2) limits of x and y of every section, by its name, and ``repeats`` the blocks of each: one
    for every gene. ``text_inches`` is the height of the text above and below a panel.
    """
    images = {name: section_image(adata, name) for name in frames} if image else {}
    own_panel = image == "panel" and any(images.values())
    n_panels += own_panel
    limits = list(frames.values()) * repeats
    if ax is None:
        figure, flat = _new_axes(limits, n_panels, n_colorbars, text_inches)
    else:
        flat = given_axes(ax, len(limits) * n_panels)
        figure = root_figure(flat[0])
    inches = flat[0].get_position().width * figure.get_figwidth()
    narrow = inches < NARROW_INCHES
    blocks = [flat[i * n_panels : (i + 1) * n_panels] for i in range(len(limits))]
    for number, (name, block) in enumerate(zip(list(frames) * repeats, blocks, strict=True)):
        for panel in block:
            set_frame(panel, frames[name])
            panel.xaxis.labelpad = LABEL_PAD if narrow else 4
        for panel in block[:1] if own_panel else block:
            draw_image(panel, images.get(name), 1.0 if own_panel else image_alpha)
        if number < len(frames):
            draw_scale_bar(block[0], microns_per_pixel(adata, name))
        if own_panel:
            block[0].set_xlabel("image")
    panels, title_axes = [block[own_panel:] for block in blocks], [block[0] for block in blocks]
    return PanelGrid(figure, panels, title_axes, flat, inches * n_panels)


def _new_axes(
    frames: Sequence[Floats], n_panels: int, n_colorbars: int, text_inches: float
) -> "tuple[Figure, list[Axes]]":
    """Make a figure of a notebook's width with the blocks in a grid, one below the other while that is not too tall."""
    import matplotlib.pyplot as plt

    aspect = max(float(np.clip(np.ptp(frame[1]) / np.ptp(frame[0]), 0.3, 3)) for frame in frames)
    colorbars = n_colorbars * COLORBAR_INCHES

    def panel_width(ncols: int) -> float:
        return min(PANEL_INCHES, (FIGURE_INCHES - ncols * colorbars) / (n_panels * ncols))

    def height(ncols: int) -> float:
        return -(-len(frames) // ncols) * (panel_width(ncols) * aspect + text_inches)

    ncols = 1 if n_panels > 1 else min(3, len(frames))
    while height(ncols) > TALL_INCHES and ncols < len(frames) and panel_width(ncols + 1) > MIN_PANEL_INCHES:
        ncols += 1
    figure = plt.figure(
        figsize=(ncols * (n_panels * panel_width(ncols) + colorbars), height(ncols)), layout="compressed"
    )
    flat = list(figure.subplots(-(-len(frames) // ncols), ncols * n_panels, squeeze=False).flat)
    for ax in flat[len(frames) * n_panels :]:
        ax.remove()
    return figure, flat[: len(frames) * n_panels]


def given_axes(ax: AxesGiven, n: int) -> "list[Axes]":
    """Return the user's axes as a list; refuses another number than is needed."""
    given = list(np.ravel(np.asarray(ax, dtype=object)))
    if len(given) != n:
        raise ValueError(f"ax holds {len(given)} axes; this figure has {n} panels: pass that many, or none.")
    return given


def root_figure(ax: "Axes") -> "Figure":
    """Return the figure of axes, which may be in a subfigure."""
    figure: Figure | None = ax.get_figure(root=True)
    if figure is None:
        raise ValueError("ax was removed from its figure: pass axes that are in one.")
    return figure


def set_frame(ax: "Axes", frame: Floats) -> None:
    (left, right), (top, bottom) = frame
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def draw_image(ax: "Axes", image: DrawnImage | None, alpha: float) -> None:
    """Draw an image in full-resolution pixels and leave the limits of the axes as they are."""
    if image is not None:
        limits = ax.get_xlim(), ax.get_ylim()
        ax.imshow(image[0], extent=image[1], alpha=alpha)
        ax.set(xlim=limits[0], ylim=limits[1])


def draw_scale_bar(ax: "Axes", mpp: float | None) -> None:
    """Draw, below the panel, the longest bar of 1, 2 or 5 times a power of ten within a third of its width."""
    import matplotlib as mpl
    from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar  # type: ignore[import-untyped]

    if mpp is None:
        return
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
        bbox_to_anchor=(0, 0),  # the corner of the panel, so that no spot is covered
        bbox_transform=ax.transAxes,
        size_vertical=(bottom - top) / 150,
        color=mpl.rcParams["text.color"],  # readable on dark styles, too
        frameon=False,
        borderpad=0.3,
        pad=0,
        sep=3,
    )
    ax.add_artist(bar)


def show_save_return(
    figure: "Figure", axes: "Iterable[Axes]", *, show: bool | None, save: str | Path | None, return_fig: bool
) -> Drawn:
    """Save and show a figure as asked, and return what is left to return."""
    import matplotlib.pyplot as plt

    if save is not None:
        path = Path(save)  # without a suffix, the draft of the file needs the one that matplotlib would add
        with whole_file(path if path.suffix else f"{path}.{plt.rcParams['savefig.format']}") as draft:
            figure.savefig(draft, dpi=200, bbox_inches="tight")
    if return_fig:
        return figure
    if plt.isinteractive() if show is None else show:
        plt.show()
        return None
    return list(axes)
