"""Registration of image and spots: the statistic over shifts, and the spots on the image before and after."""
# ruff: noqa: PLC0415  importing sthisto must not load matplotlib

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from anndata import AnnData

from sthisto import _data
from sthisto.pl._maps import draw_title
from sthisto.pl._panels import (
    FIGURE_INCHES,
    AxesGiven,
    Drawn,
    draw_image,
    draw_scale_bar,
    given_axes,
    root_figure,
    set_frame,
    show_save_return,
)
from sthisto.pl._spots import (
    DrawnImage,
    Floats,
    SpotPatches,
    drawn_sections,
    frame_of,
    microns_per_pixel,
    spot_patches,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

SPOT_EDGE = "#005a9c"
THUMBNAIL = 1000  # px


def alignment(
    adata: AnnData,
    report: "DataFrame",
    *,
    image: Any = None,
    library_key: str | None = None,
    ax: AxesGiven = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Drawn:
    """Draw how well image and spots are registered, and the spots on the image before and after the correction.

    The first panel of a section is the statistic over shifts of all spots: where the image is under the spots, it has a
    clear maximum at the center. The other two panels have the spots at their coordinates and at those of the best
    transformation.

    Parameters
    ----------
    adata
        Object that was checked, ``obsm["spatial"]`` (n, 2) in full-resolution pixels, with its image in
        ``uns["spatial"]``; or a SpatialData.
    report
        Output of :func:`sthisto.pp.check_alignment` for it.
    image
        As in :func:`sthisto.pp.check_alignment`; ``None`` draws the sharpest in ``uns["spatial"]``.
    library_key
        ``obs`` column that names the section of each row; all sections of the report are drawn.
    ax
        Axes to draw into, three for every section; by default a new figure.
    show, save, return_fig
        Show the figure (``None``: in interactive sessions), write it to a file, return it.

    Returns
    -------
    The figure; or its axes, section by section; or ``None`` where the figure was shown

    Raises
    ------
    KeyError
        The report has no such section; no image.
    ValueError
        ``ax`` holds another number of axes.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic(60, n_genes=20)
    >>> report = sthisto.pp.check_alignment(adata)
    >>> profile, before, after = sthisto.pl.alignment(adata, report, show=False)
    """
    adata = _data.to_anndata(adata)[0]
    sections, rows_of_report = drawn_sections(adata, library_key), report.set_index("section").to_dict("index")
    missing = [name for name in sections if name not in rows_of_report]
    if missing:
        raise KeyError(f"the report has no section {missing} (found: {list(rows_of_report)}).")
    axes = _new_axes(len(sections)) if ax is None else given_axes(ax, 3 * len(sections))
    for number, (name, rows) in enumerate(sections.items()):
        profile_ax, *map_axes = axes[3 * number : 3 * number + 3]
        checked = rows_of_report[name]
        _draw_profile(profile_ax, checked["shifts"], checked["profile"])
        title = f"{name}: {checked['verdict']}" if len(sections) > 1 else str(checked["verdict"])
        draw_title(profile_ax, title)
        before = spot_patches(adata, rows, name)
        matrix = np.asarray(checked["matrix"], dtype=np.float64)
        after = replace(before, xy=before.xy @ matrix[:, :2].T + matrix[:, 2], cell=None)
        statistics = checked["statistic"], checked["best_statistic"]
        drawn = {"before": before, "after": after}
        _draw_spots(map_axes, drawn, statistics, _image(adata, name, image))
        draw_scale_bar(map_axes[0], microns_per_pixel(adata, name))
    return show_save_return(root_figure(axes[0]), axes, show=show, save=save, return_fig=return_fig)


def _image(adata: AnnData, section: str, image: Any) -> DrawnImage:
    """A small copy of the image and its extent in full-resolution pixels."""
    opened, _ = _data.open_unchecked(adata, section, image)
    (height, width), (pixels, _) = opened.shape, opened.thumbnail(THUMBNAIL)
    return pixels, (0.0, width, height, 0.0)


def _new_axes(n_sections: int) -> "list[Axes]":
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(FIGURE_INCHES, 3.2 * n_sections), layout="constrained")
    return list(figure.subplots(n_sections, 3, squeeze=False).flat)


def _draw_profile(ax: "Axes", shifts: Floats, profile: Floats) -> None:
    """Draw the statistic over shifts (k,) in pitches, along y and x (k, k), and mark where it is highest."""
    half = (shifts[1] - shifts[0]) / 2
    extent = (shifts[0] - half, shifts[-1] + half, shifts[-1] + half, shifts[0] - half)
    drawn = ax.imshow(profile, extent=extent, interpolation="nearest")
    root_figure(ax).colorbar(drawn, ax=ax, label="share of variance predicted", shrink=0.75).outline.set_visible(False)
    y, x = np.unravel_index(np.nanargmax(profile), profile.shape)
    ax.plot(0, 0, "+", color="white", markersize=9, label="as it is")
    ax.plot(shifts[x], shifts[y], "x", color="#d55e00", markersize=7, label="highest")
    ax.set(xlabel="shift along x (pitches)", ylabel="shift along y (pitches)")


def _draw_spots(
    axes: "Sequence[Axes]", patches: Mapping[str, SpotPatches], statistics: Sequence[float], image: DrawnImage
) -> None:
    """Draw the spots' outlines on the image, all of which is shown where spots are outside it."""
    frame = frame_of(patches.values())
    frame = frame + 0.25 * np.ptp(frame, axis=1)[:, None] * [-1, 1]
    if any(((p.xy < 0) | (p.xy > image[1][1:3])).any() for p in patches.values()):
        frame = np.stack([np.minimum(frame[:, 0], 0), np.maximum(frame[:, 1], image[1][1:3])], axis=1)
    for ax, (name, drawn), statistic in zip(axes, patches.items(), statistics, strict=True):
        set_frame(ax, frame)
        draw_image(ax, image, 1.0)
        drawn.draw(ax, facecolors="none", edgecolors=SPOT_EDGE, linewidths=0.7)
        ax.set_xlabel(f"{name}: {statistic:.3f}")
