"""The spots of a section over its image, before anything is computed."""

from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

from sthisto import _data
from sthisto.pl._panels import Drawn, show_save_return


def spots(
    adata: AnnData,
    *,
    image: Any = None,
    library_key: str | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Drawn:
    """Draw the spots over the tissue, to see whether the image belongs to them.

    Nothing has to be computed before, and spots outside the image are drawn, too, in orange.

    Parameters
    ----------
    adata
        Section with spot centers in ``obsm["spatial"]``.
    image
        Image as in :func:`sthisto.pp.extract_features`; ``None`` takes the sharpest in ``uns["spatial"]``.
    library_key
        Column of ``obs`` that names the section of each spot: one panel each.
    show, save, return_fig
        Show the figure (``None``: in interactive sessions), write it to a file, return it.

    Returns
    -------
    The figure, or a list of the axes, or ``None`` where the figure was shown

    Raises
    ------
    KeyError
        No coordinates or no image.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import sthisto
    >>> [ax] = sthisto.pl.spots(sthisto.datasets.synthetic(50, n_genes=20), show=False)
    >>> ax.get_title()
    'synthetic_0: 0 of 50 spots outside the image'
    """
    import matplotlib.pyplot as plt  # noqa: PLC0415  importing sthisto must not load it

    table = _data.to_anndata(adata)[0]
    sections = _data.read_sections(table, library_key)
    figure, axes = plt.subplots(1, len(sections), figsize=(5 * len(sections), 5), layout="constrained", squeeze=False)
    for ax, (name, section) in zip(axes[0], sections.items(), strict=True):
        opened, _ = _data.open_unchecked(table, name, image)
        (height, width), (pixels, _) = opened.shape, opened.thumbnail(1000)
        ax.imshow(pixels, extent=(0, width, height, 0))
        outside = ((section.xy < 0) | (section.xy > [width, height])).any(axis=1)
        ax.scatter(*section.xy.T, s=6, facecolors="none", edgecolors=np.where(outside, "tab:orange", "tab:cyan"))
        ax.set_title(f"{name}: {outside.sum()} of {len(section)} spots outside the image")
        ax.set_axis_off()
    return show_save_return(figure, axes[0], show=show, save=save, return_fig=return_fig)
