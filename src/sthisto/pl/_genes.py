"""Expression over the tissue."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from anndata import AnnData

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from sthisto.pl._axes import draw_scale_bar, finish, grid_of_panels, norm_of, title_of
from sthisto.pl._panels import draw_picture, mpp_of, picture_of, points_panel, section_of, spots_panel


def genes(  # noqa: PLR0913  options of a picture, all with defaults
    adata: AnnData,
    dense: AnnData | None = None,
    genes: str | Sequence[str] = (),
    *,
    layer: str | None = None,
    library: str | None = None,
    library_key: str | None = None,
    image: bool = True,
    cmap: str = "viridis",
    vmin: float | str = "p1",
    vmax: float | str = "p99",
    ncols: int | None = None,
    scale_bar: bool = True,
    show: bool | None = None,
    save: "str | Path | None" = None,
    return_fig: bool = False,
) -> "Figure | list[Axes] | None":
    """Draw genes over the tissue: the measured spots, and beside them the dense prediction on the same colour scale.

    Side by side and on one scale it can be seen what the prediction adds and what it leaves out. Spots are circles of
    their true diameter; dense points are the cells of their lattice, hexagons or squares, so that they leave no gaps.

    Parameters
    ----------
    adata
        Measured spots, ``obsm["spatial"]`` (n, 2) in full-resolution pixels, x then y. Picture, scale factors and
        spot diameter are taken from ``uns["spatial"]`` where they are there; a spot of unknown diameter is drawn 0.55
        of the distance to its neighbour wide, which is Visium's.
    dense
        What :func:`sthisto.tl.upsample` returned.
    genes
        One or several of ``var_names``.
    layer
        Layer of ``adata`` to draw instead of ``X``: ``"sthisto"`` shows the denoised spots.
    library
        The section to draw where there are several.
    library_key
        ``obs`` column that tells the sections apart, in ``adata`` and ``dense`` alike.
    image
        Draw the picture of the section underneath, where there is one.
    cmap
        A colour map of matplotlib; the default reads the same with colour blindness and in grey.
    vmin, vmax
        Limits of the colours: numbers, or percentiles as ``"p99"``, of which the wider over both panels is taken.
    ncols
        Genes side by side; by default one with ``dense``, up to three without.
    scale_bar
        Draw a scale bar in the first panel where the micrometres per pixel are known:
        ``scalefactors["microns_per_pixel"]``, or from :func:`sthisto.pp.extract_features`.
    show, save, return_fig
        Show the picture (``None``: in interactive sessions), write it to a file, return its figure.

    Returns
    -------
    The figure, or the axes gene by gene, or ``None`` where the picture was shown

    Raises
    ------
    KeyError
        A gene, layer, section or the coordinates are not there.
    ValueError
        No gene is named, a gene has no values, a limit is no percentile, or it is not said which section to draw.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic(50, n_genes=20)
    >>> axes = sthisto.pl.genes(adata, genes=["region_00", "noise_04"], show=False)
    >>> [ax.get_title() for ax in axes]
    ['region_00', 'noise_04']
    """
    names = [genes] if isinstance(genes, str) else list(genes)
    if not names:
        raise ValueError(f"no gene to draw: pass genes= (there are {adata.n_vars}, as {list(adata.var_names[:5])}).")
    library, rows = section_of(adata, library, library_key)
    panels = [spots_panel(adata, rows, names, layer, library)]
    if dense is not None:
        same = library if library_key else None  # without a picture the two do not name their one section alike
        panels.append(points_panel(dense, section_of(dense, same, library_key)[1], names))
    picture = picture_of(adata, library) if image else None
    figure, grid = grid_of_panels(panels, len(names), ncols)
    for i, (gene, axes) in enumerate(zip(names, grid, strict=True)):
        norm = norm_of([panel.values[:, i] for panel in panels], vmin, vmax)
        for panel, ax in zip(panels, axes, strict=True):
            if picture is not None:
                draw_picture(ax, *picture)
            drawn = ax.add_collection(panel.collection(i, ax, cmap=cmap, norm=norm), autolim=False)
            ax.set_title(title_of(adata, gene), fontsize="medium")
            ax.set_xlabel(panel.name)
        figure.colorbar(drawn, ax=axes, label="expression", shrink=0.75, aspect=25, pad=0.02)
    mpp = mpp_of(adata, library) if scale_bar else None
    if mpp is not None:
        draw_scale_bar(grid[0][0], mpp)
    return finish(figure, [ax for axes in grid for ax in axes], show=show, save=save, return_fig=return_fig)
