"""Image features over the tissue, as colors."""

from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scipy.special import ndtr

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from sthisto import _data
from sthisto.pl._axes import AxesGiven, lay_out
from sthisto.pl._maps import draw_title
from sthisto.pl._spots import Floats, frame_of, places_of, sections_of

SPREAD = 1.5  # robust standard deviations from the median to where a color is five sixths of the way up or down


def features(
    adata: AnnData,
    features_key: str = "X_histo",
    *,
    library: str | None = None,
    library_key: str | None = None,
    image: bool = True,
    ncols: int | None = None,
    scale_bar: bool = True,
    ax: AxesGiven = None,
    show: bool | None = None,
    save: "str | Path | None" = None,
    return_fig: bool = False,
) -> "Figure | list[Axes] | None":
    """Draw what the encoder sees: the first three principal components of its features as red, green and blue.

    Places that look alike to the encoder have the same color. Where the colors follow the tissue's structures, the
    features can tell a model of them; where they are noise or follow the borders of the picture, they cannot.

    Each section has its own components, of features standardised over its spots, as the models standardise them. A
    component's median is its middle color, and its spread is taken from the median deviation: the rims of the tissue
    and its folds, which are what varies most, do not leave the rest in the dark.

    Parameters
    ----------
    adata
        Spots with ``obsm["spatial"]`` (n, 2) in full-resolution pixels, and features.
    features_key
        Features in ``obsm``, (n, d).
    library
        The section to draw where there are several; all by default.
    library_key
        ``obs`` column that tells the sections apart.
    image
        Draw the picture of the section beside, where there is one.
    ncols
        Sections side by side.
    scale_bar, ax
        As in :func:`sthisto.pl.genes`.
    show, save, return_fig
        Show the picture (``None``: in interactive sessions), write it to a file, return its figure.

    Returns
    -------
    The figure; or its axes, section by section; or ``None`` where the picture was shown

    Raises
    ------
    KeyError
        There are no such features, no such section, or no coordinates.
    ValueError
        Features that are not finite or do not vary in three directions, or ``ax`` of another number.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic(60, n_genes=20)
    >>> sthisto.pp.extract_features(adata, progress=False)
    >>> picture, colors = sthisto.pl.features(adata, show=False)
    >>> colors.get_xlabel()[:18]
    'red, green, blue: '
    """
    sections = sections_of(adata, library, library_key)
    places = {name: places_of(adata, rows, name, fill=True) for name, rows in sections.items()}
    colors = {
        name: component_colors(_data.features(adata, features_key, rows), f"obsm[{features_key!r}]")
        for name, rows in sections.items()
    }
    sheet = lay_out(
        adata,
        {name: frame_of([each]) for name, each in places.items()},
        1,
        image="beside" if image else False,
        scale_bar=scale_bar,
        ncols=ncols,
        ax=ax,
    )
    for name, [panel], head in zip(sections, sheet.blocks, sheet.heads, strict=True):
        rgb, share = colors[name]
        places[name].draw(panel, facecolors=rgb)
        panel.set_xlabel(f"red, green, blue: {', '.join(f'{each:.0%}' for each in share)} of variance")
        draw_title(head, features_key + (f", {name}" if len(sections) > 1 else ""))
    return sheet.finish(show=show, save=save, return_fig=return_fig)


def component_colors(features: NDArray[np.float32], where: str) -> tuple[Floats, Floats]:
    """First three principal components of features (n, d) as RGB (n, 3) from 0 to 1, and their shares of variance (3,).

    Which end of a component is bright is set by its heaviest feature, not by the solver.
    """
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    deviation = centred.std(axis=0)
    varied = centred[:, deviation > 0] / deviation[deviation > 0]
    values, vectors = np.linalg.eigh(varied.T @ varied)
    if (values > 1e-9 * values.max(initial=0)).sum() < 3:
        raise ValueError(f"{where} of shape {features.shape} does not vary in three directions, as colors do.")
    axes = vectors[:, :-4:-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), range(3)])
    scores = varied @ axes
    away = scores - np.median(scores, axis=0)
    deviation = 1.4826 * np.median(np.abs(away), axis=0)  # the standard deviation of a normal distribution
    return ndtr(away / (SPREAD * np.where(deviation > 0, deviation, scores.std(axis=0)))), values[:-4:-1] / values.sum()
