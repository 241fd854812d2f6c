"""Spatial domains over the tissue, and the labels they are compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from sthisto import _data, grids
from sthisto.pl._colors import NONE, label_colors, matched_colors
from sthisto.pl._panels import TEXT_INCHES, AxesGiven, Drawn, panel_grid, show_save_return
from sthisto.pl._spots import Rows, SpotPatches, drawn_sections, frame_of, matching_rows, spot_patches

Codes: TypeAlias = NDArray[np.int64]
LEGEND_INCHES = 0.22  # a row of it


@dataclass(frozen=True)
class Labels:
    """Labels of one panel, in all sections that are drawn."""

    name: str
    categories: list[str]
    codes: dict[str, Codes]  # (patches,) of every section, -1 without a label
    patches: dict[str, SpotPatches]
    spot_codes: dict[str, Codes]  # (spots,) the same at the spots, to compare panels by
    stored_colors: Any  # uns[f"{key}_colors"]


def domains(
    adata: AnnData,
    key: str | Sequence[str] = "spatial_domain",
    *,
    reference: str | None = None,
    dense: AnnData | None = None,
    palette: Sequence[str] | Mapping[str, str] | None = None,
    library_key: str | None = None,
    image: bool = False,
    ax: AxesGiven = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Drawn:
    """Draw spatial domains as filled cells next to the labels they are compared with, in matching colors.

    Cluster numbers are arbitrary, so each domain takes the color of the reference label that it overlaps most, each
    color used once (Kuhn 1955, the Hungarian method). The title has the adjusted Rand index (Hubert and Arabie 1985):
    1 for identical partitions, 0 on average for random ones. It is computed over the spots that have both labels; with
    dense points, a spot has the label of the nearest point.

    Parameters
    ----------
    adata
        Spots, ``obsm["spatial"]`` (n, 2) in full-resolution pixels; or dense points alone.
    key
        ``obs`` column of the labels, or several to compare: text, whole numbers or categories. NaN is drawn grey.
    reference
        ``obs`` column of known labels, drawn in the first panel.
    dense
        Dense points; of their ``obs``, the columns of ``key`` that exist are drawn.
    palette
        Colors of the first panel's labels, in the order of the categories or by their names. By default
        ``uns[f"{key}_colors"]``, where scanpy stores them, else nine colors that are distinct with color blindness and
        shades of them. The other panels take their colors from the first.
    library_key
        ``obs`` column that names the section of each row; all sections are drawn.
    image
        Draw the section's image in a panel of its own, where there is one.
    ax, show, save, return_fig
        As in :func:`sthisto.pl.genes`.

    Returns
    -------
    The figure; or its axes, section by section; or ``None`` where the figure was shown

    Raises
    ------
    KeyError
        A column, section, the coordinates or a label's color are missing.
    ValueError
        No spot has a label, numbers are not whole, there are too few colors, or ``ax`` holds another number of axes.

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
    adata, library_key = _data.to_anndata(adata, library_key)
    dense, _ = _data.to_anndata(dense, library_key)
    sections = drawn_sections(adata, library_key)
    panels = [_spot_labels(adata, column, sections) for column in [*([] if reference is None else [reference]), *keys]]
    if dense is not None:
        panels += _point_labels(adata, dense, keys, sections, library_key)
    colors = _colors(panels, palette)
    grid = panel_grid(
        adata,
        {name: frame_of(labels.patches[name] for labels in panels) for name in sections},
        len(panels),
        image="panel" if image else False,
        text_inches=TEXT_INCHES + LEGEND_INCHES * max(map(_legend_rows, panels)),
        ax=ax,
    )
    for name, block in zip(sections, grid.panels, strict=True):
        for labels, label_color, panel in zip(panels, colors, block, strict=True):
            _draw(panel, labels, label_color, name)
            panel.set_title(_title(labels, panels[0] if reference else None, name), fontsize="medium")
        if len(sections) > 1:
            block[0].set_ylabel(name)
    return show_save_return(grid.figure, grid.axes, show=show, save=save, return_fig=return_fig)


def _spot_labels(adata: AnnData, column: str, sections: Mapping[str, Rows]) -> Labels:
    labels = _categorical(adata, column, "adata")
    codes = _codes(labels, sections, f"adata.obs[{column!r}]")
    patches = {name: spot_patches(adata, rows, name, fill=True) for name, rows in sections.items()}
    return Labels(column, _names(labels), codes, patches, codes, adata.uns.get(f"{column}_colors"))


def _point_labels(
    adata: AnnData, dense: AnnData, keys: Sequence[str], sections: Mapping[str, Rows], library_key: str | None
) -> list[Labels]:
    """Labels of the dense points, of the keys that they have."""
    columns = [column for column in keys if column in dense.obs]
    if not columns:
        raise KeyError(f"no column of {list(keys)} in dense.obs (found: {list(dense.obs.columns)}).")
    rows = {name: matching_rows(dense, name, library_key) for name in sections}
    patches = {name: spot_patches(dense, rows[name], name, fill=True) for name in sections}
    nearest = {
        name: grids.nearest(_data.coordinates(adata, spots), patches[name].xy)[1][:, 0]
        for name, spots in sections.items()
    }
    panels = []
    for column in columns:
        labels = _categorical(dense, column, "dense")
        codes = _codes(labels, rows, f"dense.obs[{column!r}]")
        spot_codes = {name: codes[name][nearest[name]] for name in sections}
        colors = dense.uns.get(f"{column}_colors")
        panels.append(Labels(f"{column}, dense", _names(labels), codes, patches, spot_codes, colors))
    return panels


def _categorical(table: AnnData, column: str, argument: str) -> pd.Categorical:
    """Return a column as labels, in the order of its categories, else of numbers, else of the alphabet."""
    if column not in table.obs:
        raise KeyError(f"no column {column!r} in {argument}.obs (found: {list(table.obs.columns)}).")
    values = table.obs[column]
    if isinstance(values.dtype, pd.CategoricalDtype):
        return pd.Categorical(values)
    if pd.api.types.is_float_dtype(values):  # whole numbers of which some are missing
        if not np.array_equal(values.dropna(), values.dropna().round()):
            raise ValueError(f"{argument}.obs[{column!r}] holds numbers that are not whole, so they are no labels.")
        values = values.astype("Int64")
    return pd.Categorical(values, sorted(values.dropna().unique(), key=_order))


def _order(label: object) -> tuple[float, str]:
    """Numbers by their size, also where they are text, and before words."""
    text = str(label)
    return (float(text) if text.isdecimal() else np.inf, text)


def _names(labels: pd.Categorical) -> list[str]:
    return [str(name) for name in labels.categories]


def _codes(labels: pd.Categorical, sections: Mapping[str, Rows], where: str) -> dict[str, Codes]:
    codes = {name: labels.codes.astype(np.int64)[rows] for name, rows in sections.items()}
    if not any((section >= 0).any() for section in codes.values()):
        raise ValueError(f"{where} has no label for any of the spots to draw.")
    return codes


def _colors(panels: Sequence[Labels], given: Sequence[str] | Mapping[str, str] | None) -> list[list[str]]:
    """Colors of every panel's labels: the first panel's own, the others' by their overlap with it."""
    first, *others = panels
    colors = label_colors(first.categories, given, first.stored_colors)
    reference = np.concatenate(list(first.spot_codes.values()))
    matched = [
        matched_colors(np.concatenate(list(labels.spot_codes.values())), len(labels.categories), reference, colors)
        for labels in others
    ]
    return [colors, *matched]


def _title(labels: Labels, reference: Labels | None, section: str) -> str:
    """Name the labels, and their agreement with the reference."""
    from sklearn.metrics import adjusted_rand_score  # noqa: PLC0415  takes a second to load

    if reference is None or labels is reference:
        return labels.name
    a, b = labels.spot_codes[section], reference.spot_codes[section]
    both = (a >= 0) & (b >= 0)
    return f"{labels.name}: ARI {adjusted_rand_score(b[both], a[both]):.2f}" if both.any() else labels.name


def _legend_columns(labels: Labels) -> int:
    """Names in a row: as many as fit below a panel, in rows of equal length."""
    n, most = len(labels.categories), max(1, min(4, 28 // (4 + max(map(len, labels.categories)))))
    return -(-n // -(-n // most))


def _legend_rows(labels: Labels) -> int:
    return -(-(len(labels.categories) + 1) // _legend_columns(labels))


def _draw(ax: "Axes", labels: Labels, colors: Sequence[str], section: str) -> None:
    """Draw the section's labels, and name them below the panel."""
    from matplotlib.colors import to_rgba_array  # noqa: PLC0415
    from matplotlib.patches import Patch  # noqa: PLC0415

    codes = labels.codes[section]
    labels.patches[section].draw(ax, facecolors=to_rgba_array([*colors, NONE])[codes])  # -1 takes the last
    handles = [Patch(color=colors[code], label=labels.categories[code]) for code in np.unique(codes) if code >= 0]
    if (codes < 0).any():
        handles.append(Patch(color=NONE, label="no label"))
    ax.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        borderaxespad=2.4,  # below the scale bar
        ncols=_legend_columns(labels),
        frameon=False,
        fontsize="small",
        handlelength=1,
        handleheight=1,
        handletextpad=0.5,
        columnspacing=1.2,
    )
