"""Axes, scale bars, and what is done with a finished figure."""
# ruff: noqa: PLC0415  importing sthisto must not load matplotlib

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from anndata import AnnData

from sthisto.pl._pictures import BESIDE, UNDER, draw_picture, mpp_of, pictures_of
from sthisto.pl._spots import Floats

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AxesGiven: TypeAlias = "Axes | Sequence[Axes] | None"

PANEL_INCHES = 3.6  # two panels and a color bar fill a notebook's width
NOTEBOOK_INCHES = 9.0
BAR_INCHES = 0.75  # a color bar with its words
WORDS_INCHES = 0.6  # a line of title and one of scale bar


@dataclass(frozen=True)
class Sheet:
    """Axes laid out over the tissue: blocks of panels, each of one section, with the section's picture drawn."""

    figure: "Figure"
    blocks: "list[list[Axes]]"  # panels to draw into
    heads: "list[Axes]"  # the leftmost panel of every block, for its title
    axes: "list[Axes]"  # all of them

    def finish(self, *, show: bool | None, save: "str | Path | None", return_fig: bool) -> "Figure | list[Axes] | None":
        """Save and show, and return what is left to return."""
        return finish(self.figure, self.axes, show=show, save=save, return_fig=return_fig)


def lay_out(
    adata: AnnData,
    frames: Mapping[str, Floats],
    across: int,
    *,
    repeats: int = 1,
    image: bool | str = True,
    strength: float = UNDER,
    scale_bar: bool = True,
    ncols: int | None = None,
    bars: int = 0,
    words: float = WORDS_INCHES,
    ax: AxesGiven = None,
) -> Sheet:
    """Make the axes of a block of panels for every section, with picture and scale bar.

    Parameters
    ----------
    adata
        Holds the pictures.
    frames
        (2, 2) limits of x and y of every section, by its name.
    across
        Panels of a block.
    repeats
        Blocks of every section: one for every gene.
    image
        Draw the section's picture, where there is one, under every panel, or ``"beside"`` in one of its own.
    strength
        Opacity of a picture under panels.
    scale_bar
        Draw a scale bar in the first block of every section.
    ncols
        Blocks side by side.
    bars
        Color bars of a block.
    words
        Inches above and below a panel.
    ax
        What the user gave: none, or as many as there are panels.
    """
    pictures = pictures_of(adata, frames) if image else {}
    beside = image == "beside" and bool(pictures)
    across += beside
    limits = list(frames.values()) * repeats
    if ax is None:
        several = len(frames) if len(frames) > 1 else repeats
        figure, flat = _new_axes(limits, across, ncols or (1 if across > 1 else min(3, several)), bars, words)
    else:
        flat = given_axes(ax, len(limits) * across)
        figure = root_of(flat[0])
    blocks = [flat[i * across : (i + 1) * across] for i in range(len(limits))]
    for number, (library, block) in enumerate(zip(list(frames) * repeats, blocks, strict=True)):
        for each in block:
            _set_frame(each, frames[library])
        for each in block[:1] if beside else block:
            draw_picture(each, pictures.get(library), BESIDE if beside else strength)
        if scale_bar and number < len(frames):
            draw_scale_bar(block[0], mpp_of(adata, library))
        if beside:
            block[0].set_xlabel("picture")
    return Sheet(figure, [block[beside:] for block in blocks], [block[0] for block in blocks], flat)


def _new_axes(
    frames: Sequence[Floats], across: int, ncols: int, bars: int, words: float
) -> "tuple[Figure, list[Axes]]":
    """Make a figure of a notebook's width, with as little around the panels as their words need."""
    import matplotlib.pyplot as plt

    nrows = -(-len(frames) // ncols)
    room = NOTEBOOK_INCHES - ncols * bars * BAR_INCHES
    width = min(PANEL_INCHES, room / (across * ncols))
    tallest = max(float(np.clip(np.ptp(frame[1]) / np.ptp(frame[0]), 0.3, 3)) for frame in frames)
    size = (ncols * (across * width + bars * BAR_INCHES), nrows * (width * tallest + words))
    figure = plt.figure(figsize=size, layout="compressed")
    flat = list(figure.subplots(nrows, ncols * across, squeeze=False).flat)
    for ax in flat[len(frames) * across :]:
        ax.remove()
    return figure, flat[: len(frames) * across]


def given_axes(ax: AxesGiven, n: int) -> "list[Axes]":
    """Return the user's axes as a list; refuses another number than is needed."""
    given = list(np.ravel(np.asarray(ax, dtype=object)))
    if len(given) != n:
        raise ValueError(f"ax holds {len(given)} axes; this picture has {n} panels: pass that many, or none.")
    return given


def root_of(ax: "Axes") -> "Figure":
    """Give the figure that axes are in, however deep in its parts."""
    figure: Figure | None = ax.get_figure(root=True)
    if figure is None:
        raise ValueError("ax was removed from its figure: pass axes that are in one.")
    return figure


def _set_frame(ax: "Axes", frame: Floats) -> None:
    (left, right), (top, bottom) = frame
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def draw_scale_bar(ax: "Axes", mpp: float | None) -> None:
    """Draw, below the panel, the longest bar of 1, 2 or 5 times a power of ten within a third of its width."""
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
    figure: "Figure", axes: "Iterable[Axes]", *, show: bool | None, save: "str | Path | None", return_fig: bool
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
    return list(axes)
