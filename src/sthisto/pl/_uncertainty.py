"""How far to trust the predictions, over the tissue."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from sthisto.pl._axes import AxesGiven, lay_out
from sthisto.pl._maps import STD, STD_MAP, Map, draw_gene, draw_title, norms_of
from sthisto.pl._spots import Rows, frame_of, places_of, sections_of
from sthisto.pl._values import doubt, gene_names, gene_title, gene_values

RELATIVE = "std / expression"
FLOOR = 0.05  # of a gene's highest prediction: below it a share of next to nothing would outshine the rest


def uncertainty(  # noqa: PLR0913  options of a picture, all with defaults
    adata: AnnData,
    genes: str | Sequence[str] = (),
    *,
    relative: bool = False,
    key: str = "sthisto",
    extrapolated: str | None = "extrapolated",
    library: str | None = None,
    library_key: str | None = None,
    image: bool = True,
    cmap: str = STD_MAP,
    vmin: float | str = "p1",
    vmax: float | str = "p99",
    ncols: int | None = None,
    scale_bar: bool = True,
    ax: AxesGiven = None,
    show: bool | None = None,
    save: "str | Path | None" = None,
    return_fig: bool = False,
) -> "Figure | list[Axes] | None":
    """Draw the standard deviation of the predictions over the tissue, and strike through where nothing alike was seen.

    Parameters
    ----------
    adata
        Dense points from :func:`sthisto.tl.upsample`, or spots after :func:`sthisto.tl.predict`.
    genes
        One or several of ``var_names``.
    relative
        Draw the standard deviation as a share of the prediction, which is taken to be at least a twentieth of the
        gene's highest. Else it is in the units of the expression.
    key
        Name of the fit, where ``adata`` holds the spots: ``layers[f"{key}_std"]`` is drawn.
    extrapolated
        Boolean ``obs`` column of the points that are far from anything seen, which are struck through; of spots
        ``f"{key}_{extrapolated}"``. ``None``: none are. A table without the column has none.
    library, library_key, image, cmap, vmin, vmax, ncols, scale_bar, ax
        As in :func:`sthisto.pl.genes`.
    show, save, return_fig
        Show the picture (``None``: in interactive sessions), write it to a file, return its figure.

    Returns
    -------
    The figure; or the axes gene by gene, in a gene section by section; or ``None`` where the picture was shown

    Raises
    ------
    KeyError
        A gene, section or the coordinates are not there, or no standard deviations.
    ValueError
        No gene is named, a gene is not modelled, or ``ax`` holds another number of axes.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic(60, n_genes=20)
    >>> sthisto.tl.fit(adata, "idw", progress=False)
    >>> sthisto.tl.predict(adata)
    >>> [ax] = sthisto.pl.uncertainty(adata, "region_00", show=False)
    >>> ax.get_xlabel()
    'uncertainty'
    """
    names = gene_names(genes, adata)
    unit = RELATIVE if relative else STD
    content = {
        name: [_map(adata, rows, names, _layers(adata, key), unit, name, (extrapolated, f"{key}_{extrapolated}"))]
        for name, rows in sections_of(adata, library, library_key).items()
    }
    sheet = lay_out(
        adata,
        {name: frame_of([shown.places]) for name, [shown] in content.items()},
        1,
        repeats=len(names),
        image=image,
        scale_bar=scale_bar,
        ncols=ncols,
        bars=1,
        ax=ax,
    )
    for number, gene in enumerate(names):
        norms = norms_of(list(content.values()), number, vmin, vmax)
        for i, (name, maps) in enumerate(content.items(), number * len(content)):
            draw_gene(sheet.blocks[i], maps, number, norms, {unit: cmap})
            title = gene_title(adata, gene) + (f", {name}" if len(content) > 1 else "")
            draw_title(sheet.heads[i], title, doubt(adata, gene))
    return sheet.finish(show=show, save=save, return_fig=return_fig)


def _layers(adata: AnnData, key: str) -> tuple[str | None, str]:
    """Names of the layers of the mean (``None``: ``X``) and of the spread: of points, else of predicted spots."""
    if f"{key}_std" in adata.layers:
        return key, f"{key}_std"
    if "std" in adata.layers:
        return None, "std"
    raise KeyError(
        f"no standard deviations in adata.layers (looked for 'std' and '{key}_std', found: {sorted(adata.layers)}): "
        "pass what sthisto.tl.upsample returned, run sthisto.tl.predict(adata) first, or pass key=."
    )


def _map(  # noqa: PLR0917  private, called once
    adata: AnnData,
    rows: Rows,
    names: list[str],
    layers: tuple[str | None, str],
    unit: str,
    library: str,
    extrapolated: tuple[str | None, str],
) -> Map:
    """Cut the standard deviations of one section out."""
    mean, spread = layers
    values = gene_values(adata, rows, names, spread, "adata")
    if unit == RELATIVE:
        expected = gene_values(adata, rows, names, mean, "adata")
        lowest = FLOOR * np.nanmax(expected, axis=0)
        values /= np.maximum(expected, np.where(lowest > 0, lowest, 1))
    return Map("uncertainty", unit, places_of(adata, rows, library), values, _extrapolated(adata, rows, extrapolated))


def _extrapolated(adata: AnnData, rows: Rows, columns: tuple[str | None, str]) -> NDArray[np.bool_] | None:
    found = [column for column in columns if columns[0] is not None and column in adata.obs]
    return np.asarray(adata.obs[found[0]].to_numpy(dtype=bool)[rows]) if found else None
