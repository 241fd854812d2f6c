"""Expression over the tissue."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from anndata import AnnData

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from sthisto.pl._axes import AxesGiven, lay_out
from sthisto.pl._maps import EXPRESSION, STD, STD_MAP, Map, draw_gene, draw_title, norms_of
from sthisto.pl._pictures import UNDER
from sthisto.pl._spots import Rows, frame_of, places_of, rows_beside, sections_of
from sthisto.pl._values import doubt, gene_names, gene_title, gene_values


@dataclass(frozen=True)
class Sources:
    """What genes are drawn from."""

    adata: AnnData
    dense: AnnData | None
    names: list[str]
    layer: str | None
    key: str
    library_key: str | None

    def map(self, kind: str, library: str, rows: Rows) -> Map:
        """Cut one section out of one source."""
        unit = STD if kind == "uncertainty" else EXPRESSION
        if kind == "dense" or (kind == "uncertainty" and self.dense is not None):
            return self._points(kind, unit, library)
        layers = {"measured": self.layer, "denoised": self.key, "uncertainty": f"{self.key}_std"}
        if kind not in layers:
            raise ValueError(f"no panel {kind!r}: there are 'measured', 'denoised', 'dense' and 'uncertainty'.")
        layer = layers[kind]
        if kind != "measured" and layer not in self.adata.layers:
            raise KeyError(
                f"no layer {layer!r} in adata.layers (found: {sorted(self.adata.layers)}): run "
                "sthisto.tl.predict(adata) first, or pass key=."
            )
        values = gene_values(self.adata, rows, self.names, layer, "adata")
        name = layer if kind == "measured" and layer else kind
        return Map(name, unit, places_of(self.adata, rows, library), values)

    def _points(self, kind: str, unit: str, library: str) -> Map:
        if self.dense is None:
            raise ValueError("a panel 'dense' draws what sthisto.tl.upsample returned: pass it as dense=.")
        rows = rows_beside(self.dense, library, self.library_key)
        values = gene_values(self.dense, rows, self.names, "std" if unit == STD else None, "dense")
        return Map(kind, unit, places_of(self.dense, rows, library, fill=True), values)

    def doubt(self, gene: str, kinds: Sequence[str]) -> str:
        """Say why the gene's predictions are not to be believed, where any are drawn."""
        if set(kinds) <= {"measured"}:
            return ""
        tables = [table for table in (self.adata, self.dense) if table is not None]
        return next(filter(None, (doubt(table, gene) for table in tables)), "")


def genes(  # noqa: PLR0913  options of a picture, all with defaults
    adata: AnnData,
    dense: AnnData | None = None,
    genes: str | Sequence[str] = (),
    *,
    panels: Sequence[str] | None = None,
    layer: str | None = None,
    key: str = "sthisto",
    library: str | None = None,
    library_key: str | None = None,
    image: bool | Literal["beside"] = True,
    cmap: str = "viridis",
    alpha: float = 1.0,
    vmin: float | str = "p1",
    vmax: float | str = "p99",
    ncols: int | None = None,
    scale_bar: bool = True,
    ax: AxesGiven = None,
    show: bool | None = None,
    save: "str | Path | None" = None,
    return_fig: bool = False,
) -> "Figure | list[Axes] | None":
    """Draw genes over the tissue: measured, denoised and dense on one color scale, and how uncertain they are.

    Side by side and on one scale it can be seen what the prediction adds and what it leaves out. Spots are discs of
    their true diameter; dense points, the bins of Visium HD, and spots of which more than 40 lie side by side, where
    discs would be specks, are the cells of their lattice, hexagons or squares, so that they leave no gaps. Where
    :func:`sthisto.tl.fit` found that a gene is not foretold on spots it had not seen (``var["qvalue_heldout"]`` of .05
    or more, or ``var["pcc_heldout"]`` below .1), the title says so.

    Parameters
    ----------
    adata
        Measured spots, ``obsm["spatial"]`` (n, 2) in full-resolution pixels, x then y. Picture, scale factors and
        spot diameter are taken from ``uns["spatial"]`` where they are there; a spot of unknown diameter is drawn 0.55
        of the distance to its neighbor wide, which is Visium's.
    dense
        What :func:`sthisto.tl.upsample` returned.
    genes
        One or several of ``var_names``.
    panels
        What to draw of every gene, left to right: of ``"measured"``, ``"denoised"`` (:func:`sthisto.tl.predict`),
        ``"dense"``, and ``"uncertainty"`` (of the dense points, or without them of the denoised spots) on a scale of
        its own. By default what was measured and, where it is given, ``dense``.
    layer
        Layer of ``adata`` that was measured, instead of ``X``.
    key
        Name of the fit, which ``predict`` named its layers by.
    library
        The section to draw where there are several; all by default.
    library_key
        ``obs`` column that tells the sections apart, in ``adata`` and ``dense`` alike.
    image
        Draw the picture of the section underneath, where there is one; ``"beside"``: in a panel of its own.
    cmap
        A color map of matplotlib; the default reads the same with color blindness and in grey.
    alpha
        Opacity of spots and points, 0 to 1: less lets the tissue shine through, and draws its picture stronger.
    vmin, vmax
        Limits of the colors: numbers, or percentiles as ``"p99"``, of which the wider over the panels is taken.
    ncols
        Blocks (a gene of a section) side by side; by default one where a block has several panels, else up to three.
    scale_bar
        Draw a scale bar in the first panel of a section where the micrometres per pixel are known:
        ``scalefactors["microns_per_pixel"]``, or from :func:`sthisto.pp.extract_features`.
    ax
        Axes to draw into, one for every panel; by default a new figure.
    show, save, return_fig
        Show the picture (``None``: in interactive sessions), write it to a file, return its figure.

    Returns
    -------
    The figure; or the axes gene by gene, in a gene section by section; or ``None`` where the picture was shown

    Raises
    ------
    KeyError
        A gene, layer, section or the coordinates are not there.
    ValueError
        No gene is named, a gene has no values, there is no such panel, a limit is no percentile, or ``ax`` holds
        another number of axes.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic(50, n_genes=20)
    >>> axes = sthisto.pl.genes(adata, genes=["region_00", "noise_04"], show=False)
    >>> [ax.get_title("left") for ax in axes]
    ['region_00', 'noise_04']
    """
    names = gene_names(genes, adata)
    kinds = [panels] if isinstance(panels, str) else panels or ["measured", *(["dense"] if dense is not None else [])]
    sources = Sources(adata, dense, names, layer, key, library_key)
    sections = sections_of(adata, library, library_key)
    content = {name: [sources.map(kind, name, rows) for kind in kinds] for name, rows in sections.items()}
    sheet = lay_out(
        adata,
        {library: frame_of(shown.places for shown in maps) for library, maps in content.items()},
        len(kinds),
        repeats=len(names),
        image=image,
        strength=1 - alpha * (1 - UNDER),
        scale_bar=scale_bar,
        ncols=ncols,
        bars=len({shown.unit for maps in content.values() for shown in maps}),
        ax=ax,
    )
    for number, gene in enumerate(names):
        norms = norms_of(list(content.values()), number, vmin, vmax)
        for i, (name, maps) in enumerate(content.items(), number * len(content)):
            draw_gene(sheet.blocks[i], maps, number, norms, {EXPRESSION: cmap, STD: STD_MAP}, alpha=alpha)
            title = gene_title(adata, gene) + (f", {name}" if len(content) > 1 else "")
            draw_title(sheet.heads[i], title, sources.doubt(gene, kinds))
    return sheet.finish(show=show, save=save, return_fig=return_fig)
