"""The spots of a section as patches of their true size, and the section's image and scale."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from sthisto import _data, grids
from sthisto._messages import warn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import Collection

Floats: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = NDArray[np.intp]
DrawnImage: TypeAlias = tuple[NDArray[np.uint8], tuple[float, float, float, float]]  # pixels; extent, full resolution

SQUARE = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
MANY_ACROSS = 40  # spots in a row, above which discs are too small for their colors to be read
GAPLESS = 0.9  # a spot diameter of this share of the pitch: bins that tile the plane, as Visium HD's
DIAMETER = 0.55  # of the pitch: 55 µm spots every 100 µm, as on Visium
IMAGE_PX = 2000  # Space Ranger's own limit; a panel shows no more


@dataclass(frozen=True)
class SpotPatches:
    """Spots or points of one section as discs, or as the cells of their lattice."""

    xy: Floats  # (n, 2)
    size: float  # px: diameter of the discs, or pitch of the cells
    cell: Floats | None = None  # (k, 2) corners of a cell about its center; None: discs

    def draw(self, ax: "Axes", *, opacity: float = 1.0, **style: Any) -> "Collection":
        """Add the patches to axes, in data coordinates."""
        style = {"linewidths": 0, "rasterized": True, **style}
        patches = self._discs(ax, style) if self.cell is None else self._cells(ax, self.cell, style)
        if opacity < 1:  # of all together: neighboring cells overlap by a pixel, where the seam would show
            patches.set_agg_filter(partial(_limit_opacity, opacity))
        ax.add_collection(patches, autolim=False)
        return patches

    def keep(self, mask: NDArray[np.bool_]) -> "SpotPatches":
        """Only the patches of a mask (n,)."""
        return replace(self, xy=self.xy[mask])

    def _discs(self, ax: "Axes", style: dict[str, Any]) -> "Collection":
        from matplotlib.collections import EllipseCollection  # noqa: PLC0415

        offsets: Any = {"offsets": self.xy, "offset_transform": ax.transData}
        return EllipseCollection([self.size], [self.size], [0], units="xy", **offsets, **style)

    def _cells(self, ax: "Axes", cell: Floats, style: dict[str, Any]) -> "Collection":
        """One outline for all cells, as a million outlines of their own would take gigabytes."""
        from matplotlib.collections import PathCollection  # noqa: PLC0415
        from matplotlib.path import Path  # noqa: PLC0415
        from matplotlib.transforms import AffineDeltaTransform  # noqa: PLC0415

        outline = Path(np.vstack([cell, cell[:1]]), closed=True)
        # antialiased edges of neighbors would let the background through as a grid of lines
        offsets: Any = {"offsets": self.xy, "offset_transform": ax.transData, "antialiaseds": False}
        cells = PathCollection([outline], **offsets, **style)
        cells.set_transform(AffineDeltaTransform(ax.transData))  # type: ignore[arg-type]  # linear axes, so affine
        return cells


def _limit_opacity(opacity: float, pixels: Floats, dpi: float) -> tuple[Floats, float, float]:
    """Limit the alpha of rendered pixels (h, w, 4); matplotlib filters some artists twice, which changes nothing."""
    return np.concatenate([pixels[..., :3], np.minimum(pixels[..., 3:], opacity)], axis=2), 0, 0


def spot_patches(adata: AnnData, rows: Rows, section: str, *, fill: bool = False) -> SpotPatches:
    """Patches of one section: discs of the spots' diameter, or cells where these leave no gaps or ``fill`` is set.

    Bins of Visium HD and points from ``upsample`` are as wide as their pitch. Discs of a few pixels blend with the
    image, so that their colors cannot be compared with a dense map's: the spots of large arrays become cells, too.
    """
    xy = _data.coordinates(adata, rows)
    diameter = scale_factor(adata, section, "spot_diameter_fullres")
    if diameter is not None and len(xy) < 2:
        return SpotPatches(xy, diameter)
    lattice = _lattice(xy)
    pitch = lattice.pitch if lattice else grids.spacing(xy)
    many = lattice is not None and np.ptp(xy, axis=0).max() > MANY_ACROSS * pitch
    gapless = diameter is not None and diameter >= GAPLESS * pitch
    if not (fill or many or gapless or "nearest_spot" in adata.obs):
        return SpotPatches(xy, diameter or DIAMETER * pitch)
    if lattice is None:
        return SpotPatches(xy, pitch, pitch * SQUARE)
    return SpotPatches(_on_sites(xy, lattice), pitch, lattice.cell)


def frame_of(patches: Iterable[SpotPatches]) -> Floats:
    """(2, 2) limits of x and y that hold all patches."""
    several = list(patches)
    low = np.min([drawn.xy.min(0) - drawn.size for drawn in several], axis=0)
    high = np.max([drawn.xy.max(0) + drawn.size for drawn in several], axis=0)
    return np.stack([low, high], axis=1)


def _lattice(xy: Floats) -> grids.Lattice | None:
    try:
        return grids.Lattice.fit(xy)
    except ValueError:  # too few spots, or cells
        return None


def _on_sites(xy: Floats, lattice: grids.Lattice) -> Floats:
    """Move spots onto their lattice sites, where no two share one: with print jitter, cells overlap and leave gaps."""
    site = lattice.index(xy)
    return lattice.points(site) if len(np.unique(site, axis=0)) == len(xy) else xy


def drawn_sections(adata: AnnData, library_key: str | None) -> dict[str, Rows]:
    """Name and rows of the sections."""
    if not isinstance(adata, AnnData):
        raise TypeError(f"expected an AnnData to draw, not {type(adata).__name__}.")
    return _data.section_rows(adata, library_key)


def matching_rows(dense: AnnData, section: str, library_key: str | None) -> Rows:
    """Rows of a section's dense points; without ``library_key`` the one section may have another name there."""
    sections = drawn_sections(dense, library_key)
    if library_key is None:
        [rows] = sections.values()
        return rows
    if section not in sections:
        raise KeyError(f"dense has no points of section {section!r} (found: {list(sections)}).")
    return sections[section]


def scale_factor(adata: AnnData, section: str, name: str) -> float | None:
    """Return a scale factor of ``uns["spatial"]``; an invalid one is no reason not to draw the section."""
    try:
        return _data.factor_of(_data.factors_of(adata, section), name, section=section)
    except ValueError as error:
        warn(f"{error} It is ignored here.")
        return None


def microns_per_pixel(adata: AnnData, section: str) -> float | None:
    """Micrometers per full-resolution pixel, by the scale factors or the image features, where known."""
    known = scale_factor(adata, section, "microns_per_pixel")
    for record in _data.records(adata, "features").values():
        known = known or dict(zip(record.get("sections", ()), record.get("mpp", ()), strict=False)).get(section)
    return None if known is None else float(known)


def section_image(adata: AnnData, section: str) -> DrawnImage | None:
    """Return the section's image and its extent in full-resolution pixels; ``None`` without one that can be read."""
    try:
        stored = _data.stored_image(adata, section)
        small = None if stored is None else stored[0].thumbnail(IMAGE_PX)[0]
    except (KeyError, ValueError) as error:
        warn(f"the image of section {section!r} is not drawn: {error.args[0]}")
        return None
    if stored is None or small is None:
        return None
    height, width = stored[0].shape
    return small, (0, width, height, 0)
