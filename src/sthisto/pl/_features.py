"""Image features over the tissue, as colors."""

from pathlib import Path

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scipy.special import ndtr

from sthisto import _data
from sthisto.pl._maps import draw_title
from sthisto.pl._panels import AxesGiven, Drawn, panel_grid, show_save_return
from sthisto.pl._spots import Floats, drawn_sections, frame_of, spot_patches

COLOR_SCALE = 1.5  # robust standard deviations from the median to one sixth and five sixths of a color channel


def features(
    adata: AnnData,
    features_key: str = "X_histo",
    *,
    library_key: str | None = None,
    image: bool = True,
    ax: AxesGiven = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Drawn:
    """Draw the first three principal components of the image features as red, green and blue.

    Spots with similar features have similar colors. Where the colors follow tissue structures, the features can inform
    a model about them; where they are noise or follow the borders of the image, they cannot.

    Components are computed per section, of standardized features. A component's median is the middle of its color
    channel, scaled by the median absolute deviation, so that tissue rims and folds, which vary most, do not use up the
    range.

    Parameters
    ----------
    adata
        Spots with ``obsm["spatial"]`` (n, 2) in full-resolution pixels, and features.
    features_key
        Features in ``obsm``, (n, d).
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
        The features, a section or the coordinates are missing.
    ValueError
        Features are not finite or have fewer than three components, or ``ax`` holds another number of axes.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic(60, n_genes=20)
    >>> sthisto.pp.extract_features(adata)
    >>> picture, colors = sthisto.pl.features(adata, show=False)
    >>> colors.get_xlabel()[:18]
    'red, green, blue: '
    """
    adata, library_key = _data.to_anndata(adata, library_key)
    sections = drawn_sections(adata, library_key)
    patches = {name: spot_patches(adata, rows, name, fill=True) for name, rows in sections.items()}
    colors = {
        name: component_colors(_data.features(adata, features_key, rows), f"obsm[{features_key!r}]")
        for name, rows in sections.items()
    }
    frames = {name: frame_of([drawn]) for name, drawn in patches.items()}
    grid = panel_grid(adata, frames, 1, image="panel" if image else False, ax=ax)
    for name, [panel], title_ax in zip(sections, grid.panels, grid.title_axes, strict=True):
        rgb, share = colors[name]
        patches[name].draw(panel, facecolors=rgb)
        panel.set_xlabel(f"red, green, blue: {', '.join(f'{part:.0%}' for part in share)} of variance")
        draw_title(title_ax, f"{features_key}, {name}" if len(sections) > 1 else features_key)
    return show_save_return(grid.figure, grid.axes, show=show, save=save, return_fig=return_fig)


def component_colors(features: NDArray[np.float32], where: str) -> tuple[Floats, Floats]:
    """First three principal components of features (n, d) as RGB (n, 3) from 0 to 1, and their shares of variance (3,).

    The sign of a component is set by its largest loading.
    """
    centered = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    deviation = centered.std(axis=0)
    standardized = centered[:, deviation > 0] / deviation[deviation > 0]
    values, vectors = np.linalg.eigh(standardized.T @ standardized)
    if (values > 1e-9 * values.max(initial=0)).sum() < 3:
        raise ValueError(f"{where} of shape {features.shape} has fewer than three principal components to draw.")
    axes = vectors[:, :-4:-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), range(3)])
    scores = standardized @ axes
    from_median = scores - np.median(scores, axis=0)
    spread = 1.4826 * np.median(np.abs(from_median), axis=0)  # the standard deviation of a normal distribution
    rgb = ndtr(from_median / (COLOR_SCALE * np.where(spread > 0, spread, scores.std(axis=0))))
    return rgb, values[:-4:-1] / values.sum()
