"""Genes over the tissue, drawn from whatever holds them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

from sthisto.pl._axes import root_of
from sthisto.pl._colors import WARNING, map_of, norm_of
from sthisto.pl._spots import Places

EXPRESSION, STD = "expression", "std of expression"
FAINT = 0.5  # opacity of what is not to be believed
STD_MAP = "cividis"  # another map than the expression's, so that the two are not mixed up


@dataclass(frozen=True)
class Map:
    """Genes of one section as one source has them."""

    name: str
    unit: str
    places: Places
    values: NDArray[np.float32]  # (n, g)
    hatched: NDArray[np.bool_] | None = None  # (n,) places not to be believed


def draw_gene(
    block: "Sequence[Axes]",
    maps: Sequence[Map],
    gene: int,
    norms: "Mapping[str, Normalize]",
    cmaps: Mapping[str, str],
    *,
    alpha: float = 1.0,
) -> None:
    """Draw the maps of a gene into a block of panels, and a color bar for every unit."""
    drawn = {}
    for shown, ax in zip(maps, block, strict=True):
        style = {"cmap": map_of(cmaps[shown.unit]), "norm": norms[shown.unit]}
        drawn[shown.unit] = _draw_map(ax, shown, shown.values[:, gene], alpha, style)
    figure = root_of(block[0])
    for unit, mappable in drawn.items():
        axes = [ax for shown, ax in zip(maps, block, strict=True) if shown.unit == unit]
        bar = figure.colorbar(mappable, ax=axes, label=unit, shrink=0.75, aspect=25, pad=0.02)
        bar.outline.set_visible(False)


def _draw_map(
    ax: "Axes", shown: Map, values: NDArray[np.float32], alpha: float, style: dict[str, Any]
) -> "ScalarMappable":
    """Draw values (n,); those that are not to be believed are faint and struck through."""
    ax.set_xlabel(shown.name)
    if shown.hatched is None or not shown.hatched.any():
        return shown.places.draw(ax, array=values, opacity=alpha, **style)
    sound, doubtful = shown.places.keep(~shown.hatched), shown.places.keep(shown.hatched)
    doubtful.draw(ax, array=values[shown.hatched], opacity=FAINT * alpha, **style)
    doubtful.draw(ax, facecolors="none", edgecolors="0.2", hatch="//////")
    ax.set_xlabel(f"{shown.name}\n(hatched: far from anything seen)")
    return sound.draw(ax, array=values[~shown.hatched], opacity=alpha, **style)


def norms_of(
    content: Sequence[Sequence[Map]], gene: int, vmin: float | str, vmax: float | str
) -> "dict[str, Normalize]":
    """One scale for a gene in all panels and sections of one unit."""
    every = [shown for maps in content for shown in maps]
    by_unit = {shown.unit: [each.values[:, gene] for each in every if each.unit == shown.unit] for shown in every}
    return {unit: norm_of(values, vmin, vmax) for unit, values in by_unit.items()}


def draw_title(ax: "Axes", title: str, warning: str = "") -> None:
    """Write the title at the left, where it has the width of all panels, and a warning under it."""
    ax.set_title(title, loc="left", fontsize="medium", fontweight="bold")
    if warning:
        ax.set_title(f"{title}\n{warning}", loc="left", fontsize="medium", color=WARNING)
