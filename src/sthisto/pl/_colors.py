"""Colors that read with color blindness: scales of numbers, and palettes of labels."""
# ruff: noqa: PLC0415  importing sthisto must not load matplotlib

import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

if TYPE_CHECKING:
    from matplotlib.colors import Colormap, Normalize

CURVES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
MUTED = (  # Paul Tol's qualitative scheme "muted", told apart by all common forms of color blindness
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
WARNING = "#b34700"
NONE = "#c8c8c8"  # no label, no value


def norm_of(values: Sequence[NDArray[np.float32]], vmin: float | str, vmax: float | str) -> "Normalize":
    """One scale for all panels; a gene that is the same everywhere has the lowest color."""
    from matplotlib.colors import Normalize

    low = min(_limit(v, vmin) for v in values)
    high = max(_limit(v, vmax) for v in values)
    return Normalize(low, high if high > low else low + 1)


def _limit(values: NDArray[np.float32], limit: float | str) -> float:
    if not isinstance(limit, str):
        return float(limit)
    percent = re.fullmatch(r"p(\d+\.?\d*)", limit)
    if percent is None or float(percent[1]) > 100:
        raise ValueError(f"{limit!r} is no limit of colors: pass a number, or a percentile as 'p99'.")
    return float(np.nanpercentile(values, float(percent[1])))


def map_of(cmap: "str | Colormap") -> "Colormap":
    """Return a color map in which places without a value are grey."""
    import matplotlib as mpl

    found = mpl.colormaps[cmap] if isinstance(cmap, str) else cmap
    return found.with_extremes(bad=NONE)


def palette(n: int) -> list[str]:
    """Give ``n`` colors for labels: nine that all eyes tell apart, then the same darker, then lighter, then again."""
    shades = [*MUTED, *(_mix(c, "#000000", 0.45) for c in MUTED), *(_mix(c, "#ffffff", 0.55) for c in MUTED)]
    return [shades[i % len(shades)] for i in range(n)]


def _mix(color: str, other: str, share: float) -> str:
    from matplotlib.colors import to_hex, to_rgb

    red, green, blue = ((1 - share) * a + share * b for a, b in zip(to_rgb(color), to_rgb(other), strict=True))
    return to_hex((red, green, blue))


def label_colors(categories: Sequence[str], own: Any, kept: Any) -> list[str]:
    """Colors of categories: the user's own, else those kept in ``uns`` as scanpy keeps them, else the palette.

    Parameters
    ----------
    categories
        Names, in order.
    own
        ``palette=``: colors in the order of the categories, or by their names.
    kept
        ``uns[f"{key}_colors"]``, or nothing. Too few of them, or what is no color, is passed over as scanpy does.
    """
    from matplotlib.colors import is_color_like, to_hex

    if isinstance(own, Mapping):
        missing = [name for name in categories if name not in own]
        if missing:
            raise KeyError(f"palette= has no color for {missing} (it names {list(own)}).")
        own = [own[name] for name in categories]
    if own is not None and len(own) < len(categories):
        raise ValueError(f"palette= has {len(own)} colors for {len(categories)} labels ({', '.join(categories)}).")
    if own is None and kept is not None and len(kept) >= len(categories) and all(map(is_color_like, kept)):
        own = list(kept)
    chosen = palette(len(categories)) if own is None else own
    return [to_hex(color) for color in chosen[: len(categories)]]


def matched_colors(
    codes: NDArray[np.integer[Any]], n: int, anchor: NDArray[np.integer[Any]], colors: Sequence[str]
) -> list[str]:
    """Colors of ``n`` labels, like those of the anchor's labels that they overlap most, each used once.

    Which domain has which number is chance; what is compared is where they lie. Labels are paired so that the spots
    that two of a pair share are most in all (Kuhn 1955, the Hungarian method).

    Parameters
    ----------
    codes
        (spots,) label of every spot, -1 without one.
    n
        Number of labels.
    anchor
        (spots,) label of the same spots in the panel whose colors are taken.
    colors
        Of the anchor's labels.
    """
    both = (codes >= 0) & (anchor >= 0)
    shared = np.zeros((n, len(colors)), dtype=np.int64)
    np.add.at(shared, (codes[both], anchor[both]), 1)
    pairs = {i: j for i, j in zip(*linear_sum_assignment(shared, maximize=True), strict=True) if shared[i, j]}
    spare = cycle([color for color in palette(n + len(colors)) if color not in set(colors)] or palette(n))
    return [colors[pairs[i]] if i in pairs else next(spare) for i in range(n)]
