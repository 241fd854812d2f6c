"""Color scales of values and palettes of labels that are readable with color blindness."""
# ruff: noqa: PLC0415  importing sthisto must not load matplotlib

import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

if TYPE_CHECKING:
    from matplotlib.colors import Colormap, Normalize

Limit: TypeAlias = float | str | None  # a number, a percentile as "p99", or automatic

CURVES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
MUTED = (  # Paul Tol's qualitative scheme "muted", distinct for all common forms of color blindness
    "#332288",
    "#ddcc77",
    "#117733",
    "#cc6677",
    "#88ccee",
    "#882255",
    "#44aa99",
    "#999933",
    "#aa4499",
)
WARNING = "#c24e00"  # readable on white and on black
NONE = "#c8c8c8"  # no label, no value
MIN_RANGE = 0.1  # of a color scale: about a tenth of what one count adds to log-normalized expression


def color_norm(values: Sequence[NDArray[np.float32]], vmin: Limit = None, vmax: Limit = None) -> "Normalize":
    """One color scale for all panels.

    By default it goes from the lowest first percentile to the highest 99th percentile of the values that are not 0,
    and spans at least ``MIN_RANGE``. With the zeros, the 99th percentile of a rare gene's measured spots is 0, and the
    noise of its predictions would fill the scale.
    """
    from matplotlib.colors import Normalize

    low = min(_limit(panel, "p1" if vmin is None else vmin) for panel in values)
    nonzero = [panel[panel != 0] for panel in values]
    high = max(_limit(panel, "p99") for panel in nonzero) if vmax is None else max(_limit(v, vmax) for v in values)
    return Normalize(low, max(high, low + MIN_RANGE) if vmax is None or high <= low else high)


def _limit(values: NDArray[np.float32], limit: float | str) -> float:
    if not isinstance(limit, str):
        return float(limit)
    percent = re.fullmatch(r"p(\d+\.?\d*)", limit)
    if percent is None or float(percent[1]) > 100:
        raise ValueError(f"{limit!r} is not a color limit: pass a number, or a percentile as 'p99'.")
    finite = values[np.isfinite(values)]
    return float(np.percentile(finite, float(percent[1]))) if len(finite) else 0.0


def extension(norm: "Normalize", values: Sequence[NDArray[np.float32]]) -> str:
    """Return which ends of a color bar have values beyond them, as matplotlib's ``extend``."""
    bottom, top = norm.vmin, norm.vmax
    low = bottom is not None and any(np.nanmin(panel) < bottom for panel in values)
    high = top is not None and any(np.nanmax(panel) > top for panel in values)
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[low, high]


def color_map(cmap: "str | Colormap") -> "Colormap":
    """Return a color map that draws missing values grey."""
    import matplotlib as mpl

    return (mpl.colormaps[cmap] if isinstance(cmap, str) else cmap).with_extremes(bad=NONE)


def palette(n: int) -> list[str]:
    """``n`` colors for labels: nine distinct ones, then darker and lighter shades of them, then the same again."""
    shades = [*MUTED, *(_mix(c, "#000000", 0.45) for c in MUTED), *(_mix(c, "#ffffff", 0.55) for c in MUTED)]
    return [shades[i % len(shades)] for i in range(n)]


def _mix(color: str, other: str, share: float) -> str:
    from matplotlib.colors import to_hex, to_rgb

    red, green, blue = ((1 - share) * a + share * b for a, b in zip(to_rgb(color), to_rgb(other), strict=True))
    return to_hex((red, green, blue))


def label_colors(categories: Sequence[str], given: Any, stored: Any) -> list[str]:
    """Colors of categories: ``palette=``, else those that scanpy stored in ``uns``, else ours.

    As in scanpy, too few stored colors or invalid ones are ignored.
    """
    from matplotlib.colors import is_color_like, to_hex

    if isinstance(given, Mapping):
        missing = [name for name in categories if name not in given]
        if missing:
            raise KeyError(f"palette= has no color for {missing} (it names {list(given)}).")
        given = [given[name] for name in categories]
    if given is not None and len(given) < len(categories):
        raise ValueError(f"palette= has {len(given)} colors for {len(categories)} labels ({', '.join(categories)}).")
    if given is None and stored is not None and len(stored) >= len(categories) and all(map(is_color_like, stored)):
        given = list(stored)
    chosen = palette(len(categories)) if given is None else given
    return [to_hex(color) for color in chosen[: len(categories)]]


def matched_colors(
    codes: NDArray[np.integer[Any]], n: int, reference: NDArray[np.integer[Any]], colors: Sequence[str]
) -> list[str]:
    """Colors of ``n`` labels: each takes that of the reference label that it overlaps, each color used once.

    ``codes`` and ``reference`` are the labels (spots,) of the same spots, -1 without one. Labels are paired so that the
    total number of shared spots is the highest (Kuhn 1955, the Hungarian method).
    """
    both = (codes >= 0) & (reference >= 0)
    shared = np.zeros((n, len(colors)), dtype=np.int64)
    np.add.at(shared, (codes[both], reference[both]), 1)
    pairs = {i: j for i, j in zip(*linear_sum_assignment(shared, maximize=True), strict=True) if shared[i, j]}
    spare = cycle([color for color in palette(n + len(colors)) if color not in set(colors)] or palette(n))
    return [colors[pairs[i]] if i in pairs else next(spare) for i in range(n)]
