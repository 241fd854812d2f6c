"""Expression over the tissue: measured, denoised and dense, and its predictive standard deviation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

from sthisto import _data
from sthisto.pl._maps import (
    EXPRESSION,
    RELATIVE,
    STD,
    GeneMap,
    draw_genes,
    gene_list,
    gene_title,
    gene_values,
    reliability,
    unit_of,
)
from sthisto.pl._panels import AxesGiven, Drawn, ImageOption, show_save_return
from sthisto.pl._spots import Rows, drawn_sections, matching_rows, spot_patches

MIN_SHARE = 0.05  # of a gene's highest prediction: below it, ratios to nearly 0 would dominate the map
EXTRAPOLATED = "extrapolated"


@dataclass(frozen=True)
class Source:
    """A table and layer that a panel is drawn from."""

    panel: str
    table: AnnData
    argument: str  # "adata" or "dense"
    layer: str | None
    unit: str

    def map(self, section: str, rows: Rows, names: list[str]) -> GeneMap:
        """Genes of one section."""
        values = gene_values(self.table, rows, names, self.layer, self.argument)
        patches = spot_patches(self.table, rows, section, fill=self.argument == "dense")
        return GeneMap(self.panel, self.unit, patches, values)


def genes(
    adata: AnnData,
    genes: str | Sequence[str],
    *,
    dense: AnnData | None = None,
    panels: str | Sequence[str] | None = None,
    layer: str | None = None,
    key: str = "sthisto",
    library_key: str | None = None,
    image: ImageOption = True,
    ax: AxesGiven = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
    **style: Any,
) -> Drawn:
    """Draw genes over the tissue: measured, denoised and dense on one color scale, and their uncertainty.

    One color scale for all panels shows what the prediction adds and what it smooths away. Spots are discs of their
    true diameter. Dense points, bins of Visium HD and the spots of arrays more than 40 spots wide are the cells of
    their lattice, without gaps. The title has the gene's correlation on held-out spots where
    :func:`sthisto.tl.test_genes` measured it, and a warning where that is below 0.1, or where image features predict
    the gene no better than they predict random patterns of the same smoothness (q of 0.05 or more).

    Parameters
    ----------
    adata
        Measured spots, ``obsm["spatial"]`` (n, 2) in full-resolution pixels, x then y; or a SpatialData or
        :class:`sthisto.SpatialDataView`, as for every other argument that takes an AnnData. Image, scale factors and
        spot diameter are read from ``uns["spatial"]``; a spot of unknown diameter is drawn 0.55 of the pitch wide, as
        on Visium. A scale bar is drawn where the micrometers per pixel are known.
    genes
        One or several of ``var_names``. Many are arranged in a grid.
    dense
        Output of :func:`sthisto.tl.upsample`.
    panels
        What to draw of every gene, left to right: ``"measured"``, ``"denoised"`` (:func:`sthisto.tl.predict`),
        ``"dense"``, and ``"uncertainty"`` (of the dense points, or of the denoised spots without them) on a color
        scale of its own. By default ``"measured"`` and, where it is given, ``"dense"``.
    layer
        Layer of ``adata`` with the measured values, instead of ``X``.
    key
        Name of the fit, after which ``predict`` named its layers.
    library_key
        ``obs`` column that names the section of each row, in ``adata`` and ``dense``. All sections of ``adata`` are
        drawn.
    image
        Draw the section's image under the spots, where there is one, or ``"panel"``: in a panel of its own.
    ax
        Axes to draw into, one for every panel; by default a new figure.
    show, save, return_fig
        Show the figure (``None``: in interactive sessions), write it to a file, return it.
    **style
        ``vmin`` and ``vmax``, numbers or percentiles as ``"p99"``; ``cmap``, ``norm``, ``alpha`` and other properties
        of :class:`matplotlib.collections.Collection`. By default colors go from the first percentile to the 99th of
        the values that are not 0, the wider over the panels, and span at least 0.1.

    Returns
    -------
    The figure; or the axes gene by gene, in a gene section by section; or ``None`` where the figure was shown

    Raises
    ------
    KeyError
        A gene, layer, section or the coordinates are missing.
    ValueError
        No gene is named, a gene has no values, there is no such panel, a limit is not a percentile, or ``ax`` holds
        another number of axes.
    TypeError
        ``adata`` is no AnnData, or a keyword is unknown.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic(50, n_genes=20)
    >>> axes = sthisto.pl.genes(adata, ["region_00", "noise_04"], show=False)
    >>> [ax.get_title("left") for ax in axes]
    ['region_00', 'noise_04']
    """
    names = gene_list(genes)
    adata, library_key = _data.to_anndata(adata, library_key)
    dense, _ = _data.to_anndata(dense, library_key)
    kinds = [panels] if isinstance(panels, str) else panels or ["measured", *(["dense"] if dense is not None else [])]
    sections = drawn_sections(adata, library_key)
    sources = [_source(kind, adata, dense, names, layer=layer, key=key) for kind in kinds]
    maps = {
        name: [
            source.map(name, rows if source.table is adata else matching_rows(source.table, name, library_key), names)
            for source in sources
        ]
        for name, rows in sections.items()
    }
    tables = [table for table in (adata, dense) if table is not None] if set(kinds) - {"measured"} else []
    titles = [(gene_title(adata, name), *reliability(tables, name, key)) for name in names]
    grid = draw_genes(adata, titles, maps, image=image, ax=ax, style=style)
    return show_save_return(grid.figure, grid.axes, show=show, save=save, return_fig=return_fig)


def _source(
    kind: str, adata: AnnData, dense: AnnData | None, names: list[str], *, layer: str | None, key: str
) -> Source:
    """Where a panel's values are; refuses panels whose table or layer is missing."""
    unit = STD if kind == "uncertainty" else EXPRESSION
    if kind == "dense" or (kind == "uncertainty" and dense is not None):
        if dense is None:
            raise ValueError("a panel 'dense' shows the output of sthisto.tl.upsample: pass it as dense=.")
        return Source(kind, dense, "dense", "std" if unit == STD else None, unit)
    layers = {"measured": layer, "denoised": key, "uncertainty": f"{key}_std"}
    if kind not in layers:
        raise ValueError(f"no panel {kind!r}: there are 'measured', 'denoised', 'dense' and 'uncertainty'.")
    if kind != "measured" and layers[kind] not in adata.layers:
        raise KeyError(
            f"no layer {layers[kind]!r} (found: {_data.layer_names(adata)}): run sthisto.tl.predict(adata) "
            "first, or pass key=."
        )
    if kind == "measured":  # which may be counts: these have a color scale of their own
        unit = unit_of(gene_values(adata, np.arange(adata.n_obs), names, layer, "adata"))
    return Source((kind == "measured" and layer) or kind, adata, "adata", layers[kind], unit)


def uncertainty(
    adata: AnnData,
    genes: str | Sequence[str],
    *,
    relative: bool = False,
    key: str = "sthisto",
    library_key: str | None = None,
    image: ImageOption = True,
    ax: AxesGiven = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
    **style: Any,
) -> Drawn:
    """Draw the predictive standard deviation over the tissue, and hatch points outside the training domain.

    Parameters
    ----------
    adata
        Dense points from :func:`sthisto.tl.upsample`, or spots after :func:`sthisto.tl.predict`. Points are hatched
        where ``obs["extrapolated"]`` is true, spots where ``obs[f"{key}_extrapolated"]`` is.
    genes
        One or several of ``var_names``.
    relative
        Draw the standard deviation divided by the prediction, which is taken to be at least a twentieth of the gene's
        highest. By default it is in the units of the expression.
    key
        Name of the fit, where ``adata`` holds spots: ``layers[f"{key}_std"]`` is drawn.
    library_key, image, ax, show, save, return_fig, **style
        As in :func:`sthisto.pl.genes`.

    Returns
    -------
    The figure; or the axes gene by gene, in a gene section by section; or ``None`` where the figure was shown

    Raises
    ------
    KeyError
        A gene, section, the coordinates or the standard deviations are missing.
    ValueError
        No gene is named, a gene is not modelled, or ``ax`` holds another number of axes.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic(60, n_genes=20)
    >>> sthisto.tl.fit(adata, "idw")
    >>> sthisto.tl.predict(adata)
    >>> [ax] = sthisto.pl.uncertainty(adata, "region_00", show=False)
    >>> ax.get_xlabel()
    'uncertainty'
    """
    names = gene_list(genes)
    adata, library_key = _data.to_anndata(adata, library_key)
    mean, std = _layers(adata, key)
    prefix = "" if mean is None else f"{key}_"
    maps = {}
    for section, rows in drawn_sections(adata, library_key).items():
        values = gene_values(adata, rows, names, std, "adata")
        if relative:
            expected = gene_values(adata, rows, names, mean, "adata")
            lowest = MIN_SHARE * np.nanmax(expected, axis=0)
            values /= np.maximum(expected, np.where(lowest > 0, lowest, 1))
        patches, column = spot_patches(adata, rows, section), f"{prefix}{EXTRAPOLATED}"
        hatched = adata.obs[column].to_numpy(dtype=bool)[rows] if column in adata.obs else None
        maps[section] = [GeneMap("uncertainty", RELATIVE if relative else STD, patches, values, hatched)]
    titles = [(gene_title(adata, name), *reliability([adata], name, key)) for name in names]
    grid = draw_genes(adata, titles, maps, image=image, ax=ax, style=style)
    return show_save_return(grid.figure, grid.axes, show=show, save=save, return_fig=return_fig)


def _layers(adata: AnnData, key: str) -> tuple[str | None, str]:
    """Layers of the mean (``None``: ``X``) and of its standard deviation, of predicted spots or of dense points."""
    if f"{key}_std" in adata.layers:
        return key, f"{key}_std"
    if "std" in adata.layers:
        return None, "std"
    raise KeyError(
        f"no standard deviations in adata.layers (expected 'std' and '{key}_std', found: {_data.layer_names(adata)}): "
        "pass the output of sthisto.tl.upsample, run sthisto.tl.predict(adata) first, or pass key=."
    )
