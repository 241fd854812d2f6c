"""Spatial domains over the tissue, beside the labels they are compared to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from sthisto import _data, grids
from sthisto.pl._axes import WORDS_INCHES, AxesGiven, lay_out
from sthisto.pl._colors import NONE, label_colors, matched_colors
from sthisto.pl._spots import Places, Rows, frame_of, places_of, rows_beside, sections_of

Codes = NDArray[np.int64]
LEGEND_INCHES = 0.22  # a row of it


@dataclass(frozen=True)
class Labels:
    """Labels of one panel, in all sections that are drawn."""

    name: str
    categories: list[str]
    codes: dict[str, Codes]  # (places,) of every section, -1 without a label
    places: dict[str, Places]
    at_spots: dict[str, Codes]  # (spots,) the same carried to the spots, to compare panels by
    kept: Any  # uns[f"{key}_colors"]


def domains(  # noqa: PLR0913  options of a picture, all with defaults
    adata: AnnData,
    key: str | Sequence[str] = "spatial_domain",
    *,
    reference: str | None = None,
    dense: AnnData | None = None,
    palette: Sequence[str] | Mapping[str, str] | None = None,
    library: str | None = None,
    library_key: str | None = None,
    image: bool = False,
    legend: bool = True,
    scale_bar: bool = True,
    ncols: int | None = None,
    ax: AxesGiven = None,
    show: bool | None = None,
    save: "str | Path | None" = None,
    return_fig: bool = False,
) -> "Figure | list[Axes] | None":
    """Draw spatial domains as filled cells, the labels to compare them to beside, in colors that match.

    Which number a domain has is chance, so domains are given the colors of the reference's labels that they overlap
    most, each used once (Kuhn 1955, the Hungarian method): what has the same color is the same tissue as far as the
    two agree. How far they do is the adjusted Rand index in the title (Hubert and Arabie 1985): 1 for the same
    partition, 0 for one that agrees by chance. It is taken over the spots that have both labels; dense points give
    each spot the label of the point nearest to it.

    Parameters
    ----------
    adata
        Spots, ``obsm["spatial"]`` (n, 2) in full-resolution pixels; or dense points alone.
    key
        ``obs`` column of the labels, or several to compare: text, whole numbers or categories. NaN is drawn grey.
    reference
        ``obs`` column of known labels, drawn in the first panel.
    dense
        Dense points, of which the same columns are drawn where they have them.
    palette
        Colors of the first panel's labels, in the order of the categories or by their names. By default
        ``uns[f"{key}_colors"]``, where scanpy keeps them, else nine colors that read with color blindness and
        shades of them. The other panels take their colors from the first.
    library
        The section to draw where there are several; all by default.
    library_key
        ``obs`` column that tells the sections apart.
    image
        Draw the picture of the section beside, where there is one.
    legend
        Name the labels below the panels.
    scale_bar, ncols, ax
        As in :func:`sthisto.pl.genes`.
    show, save, return_fig
        Show the picture (``None``: in interactive sessions), write it to a file, return its figure.

    Returns
    -------
    The figure; or its axes, section by section; or ``None`` where the picture was shown

    Raises
    ------
    KeyError
        There is no such column or section, no coordinates, or no color for a label.
    ValueError
        No spot has a label, numbers that are no labels, too few colors, or ``ax`` of another number.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic(60, n_genes=20)
    >>> adata.obs["mine"] = adata.obs["region"].cat.rename_categories(list("edcba"))
    >>> axes = sthisto.pl.domains(adata, "mine", reference="region", show=False)
    >>> [ax.get_title() for ax in axes]
    ['region', 'mine: ARI 1.00']
    """
    keys = [key] if isinstance(key, str) else list(key)
    sections = sections_of(adata, library, library_key)
    columns = [*([] if reference is None else [reference]), *keys]
    shown = [_of_spots(adata, column, sections) for column in columns]
    if dense is not None:
        shown += _of_points(adata, dense, keys, sections, library_key)
    colors = _colors(shown, palette)
    rows = _legend_rows(shown) if legend else 0
    sheet = lay_out(
        adata,
        {name: frame_of(each.places[name] for each in shown) for name in sections},
        len(shown),
        image="beside" if image else False,
        scale_bar=scale_bar,
        ncols=ncols,
        words=WORDS_INCHES + LEGEND_INCHES * rows,
        ax=ax,
    )
    for name, block in zip(sections, sheet.blocks, strict=True):
        for labels, panel_colors, panel in zip(shown, colors, block, strict=True):
            _draw(panel, labels, panel_colors, name)
            panel.set_title(_title(labels, shown[0] if reference else None, name), fontsize="medium")
            if legend:
                _draw_legend(panel, labels, panel_colors, name, below_bar=scale_bar)
        if len(sections) > 1:
            block[0].set_ylabel(name)
    return sheet.finish(show=show, save=save, return_fig=return_fig)


def _of_spots(adata: AnnData, column: str, sections: Mapping[str, Rows]) -> Labels:
    labels = _categorical(adata, column, "adata")
    codes = {name: labels.codes.astype(np.int64)[rows] for name, rows in sections.items()}
    _refuse_none(codes, f"adata.obs[{column!r}]")
    places = {name: places_of(adata, rows, name, fill=True) for name, rows in sections.items()}
    return Labels(column, _texts(labels), codes, places, codes, adata.uns.get(f"{column}_colors"))


def _of_points(
    adata: AnnData, dense: AnnData, keys: Sequence[str], sections: Mapping[str, Rows], library_key: str | None
) -> list[Labels]:
    """Labels of the dense points under the keys that they have."""
    columns = [column for column in keys if column in dense.obs]
    if not columns:
        raise KeyError(f"no column of {list(keys)} in dense.obs (found: {list(dense.obs.columns)}).")
    rows = {name: rows_beside(dense, name, library_key) for name in sections}
    places = {name: places_of(dense, rows[name], name, fill=True) for name in sections}
    nearest = {
        name: grids.nearest(_data.positions(adata, spots), places[name].xy)[1][:, 0] for name, spots in sections.items()
    }
    found = []
    for column in columns:
        labels = _categorical(dense, column, "dense")
        codes = {name: labels.codes.astype(np.int64)[rows[name]] for name in sections}
        _refuse_none(codes, f"dense.obs[{column!r}]")
        at_spots = {name: codes[name][nearest[name]] for name in sections}
        kept = dense.uns.get(f"{column}_colors")
        found.append(Labels(f"{column}, dense", _texts(labels), codes, places, at_spots, kept))
    return found


def _categorical(table: AnnData, column: str, called: str) -> pd.Categorical:
    """Take a column as labels, in the order of its categories, else of numbers, else of the alphabet."""
    if column not in table.obs:
        raise KeyError(f"no column {column!r} in {called}.obs (found: {list(table.obs.columns)}).")
    values = table.obs[column]
    if isinstance(values.dtype, pd.CategoricalDtype):
        return pd.Categorical(values)
    if pd.api.types.is_float_dtype(values):  # whole numbers of which some are missing
        if not np.array_equal(values.dropna(), values.dropna().round()):
            raise ValueError(f"{called}.obs[{column!r}] holds numbers that are not whole, so they are no labels.")
        values = values.astype("Int64")
    return pd.Categorical(values, sorted(values.dropna().unique(), key=_order))


def _order(label: object) -> tuple[float, str]:
    """Numbers by their size, also where they are text, and before words."""
    text = str(label)
    return (float(text) if text.isdecimal() else np.inf, text)


def _texts(labels: pd.Categorical) -> list[str]:
    return [str(name) for name in labels.categories]


def _refuse_none(codes: Mapping[str, Codes], where: str) -> None:
    if not any((each >= 0).any() for each in codes.values()):
        raise ValueError(f"{where} has no label for any of the places to draw.")


def _colors(shown: Sequence[Labels], own: Sequence[str] | Mapping[str, str] | None) -> list[list[str]]:
    """Colors of every panel's labels: the first panel's own, the others' by their overlap with it."""
    first, *others = shown
    colors = label_colors(first.categories, own, first.kept)
    anchor = np.concatenate(list(first.at_spots.values()))
    matched = [
        matched_colors(np.concatenate(list(each.at_spots.values())), len(each.categories), anchor, colors)
        for each in others
    ]
    return [colors, *matched]


def _title(labels: Labels, reference: Labels | None, library: str) -> str:
    """Name the labels, and how far they agree with the reference."""
    from sklearn.metrics import adjusted_rand_score  # noqa: PLC0415  takes a second to load

    if reference is None or labels is reference:
        return labels.name
    a, b = labels.at_spots[library], reference.at_spots[library]
    both = (a >= 0) & (b >= 0)
    return f"{labels.name}: ARI {adjusted_rand_score(b[both], a[both]):.2f}" if both.any() else labels.name


def _draw(ax: "Axes", labels: Labels, colors: Sequence[str], library: str) -> None:
    from matplotlib.colors import to_rgba_array  # noqa: PLC0415

    by_code = to_rgba_array([*colors, NONE])  # -1 takes the last
    labels.places[library].draw(ax, facecolors=by_code[labels.codes[library]])


def _present(labels: Labels, library: str) -> list[int]:
    return [int(code) for code in np.unique(labels.codes[library]) if code >= 0]


def _legend_columns(labels: Labels) -> int:
    """As many names side by side as go below a panel."""
    return max(1, min(4, 28 // (4 + max(map(len, labels.categories)))))


def _legend_rows(shown: Sequence[Labels]) -> int:
    return max(-(-(len(labels.categories) + 1) // _legend_columns(labels)) for labels in shown)


def _draw_legend(ax: "Axes", labels: Labels, colors: Sequence[str], library: str, *, below_bar: bool) -> None:
    """Name the section's labels below its panel."""
    from matplotlib.patches import Patch  # noqa: PLC0415

    handles = [Patch(color=colors[code], label=labels.categories[code]) for code in _present(labels, library)]
    if (labels.codes[library] < 0).any():
        handles.append(Patch(color=NONE, label="no label"))
    ax.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        borderaxespad=2.4 if below_bar else 0.4,
        ncols=_legend_columns(labels),
        frameon=False,
        fontsize="small",
        handlelength=1,
        handleheight=1,
        handletextpad=0.5,
        columnspacing=1.2,
    )
