"""Where the spots and points of one section are, as shapes of a true size."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scipy.spatial import Voronoi

from sthisto import _data, grids
from sthisto.pl._pictures import scalefactors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import Collection

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
FINE = (
    40  # spots side by side, above which their discs are three or four pixels wide and pale with what lies under them
)
GAPLESS = 0.9  # spots that are this share of their pitch wide are bins that tile the plane, not discs apart


@dataclass(frozen=True)
class Places:
    """Places of a true size: discs, or the cells of a lattice."""

    xy: Floats  # (n, 2)
    size: float  # px: diameter of the spots, or pitch of the points
    cell: Floats | None = None  # (k, 2) corners of a place about its point; None: discs

    def draw(self, ax: "Axes", *, opacity: float = 1.0, **style: Any) -> "Collection":
        """Add the places to axes, in data coordinates, colored as the style says."""
        style = {"linewidths": 0, "rasterized": True, **style}
        shapes = self._discs(ax, style) if self.cell is None else self._cells(ax, self.cell, style)
        if opacity < 1:  # of all together: cells overlap by a pixel, and each seam would show
            shapes.set_agg_filter(partial(_fade, opacity))
        ax.add_collection(shapes, autolim=False)
        return shapes

    def keep(self, mask: NDArray[np.bool_]) -> "Places":
        """Only the places of a mask (n,)."""
        return Places(self.xy[mask], self.size, self.cell)

    def _discs(self, ax: "Axes", style: dict[str, Any]) -> "Collection":
        from matplotlib.collections import EllipseCollection  # noqa: PLC0415

        place: Any = {"offsets": self.xy, "offset_transform": ax.transData}
        return EllipseCollection([self.size], [self.size], [0], units="xy", **place, **style)

    def _cells(self, ax: "Axes", cell: Floats, style: dict[str, Any]) -> "Collection":
        """One outline for all cells, as a million outlines of their own would take gigabytes."""
        from matplotlib.collections import PathCollection  # noqa: PLC0415
        from matplotlib.path import Path  # noqa: PLC0415
        from matplotlib.transforms import AffineDeltaTransform  # noqa: PLC0415

        outline = Path(np.vstack([cell, cell[:1]]), closed=True)
        # neighbors share an edge: smoothing each of them would let the ground shine through as a grid of lines
        place: Any = {"offsets": self.xy, "offset_transform": ax.transData, "antialiaseds": False}
        cells = PathCollection([outline], **place, **style)
        cells.set_transform(AffineDeltaTransform(ax.transData))  # type: ignore[arg-type]  # linear axes, so affine
        return cells


def _fade(opacity: float, pixels: Floats, dpi: float) -> tuple[Floats, float, float]:
    """Make what was drawn (h, w, 4) no more opaque than this. Some shapes are filtered twice, so twice is once."""
    return np.concatenate([pixels[..., :3], np.minimum(pixels[..., 3:], opacity)], axis=2), 0, 0


def sections_of(adata: AnnData, library: str | None, library_key: str | None) -> dict[str, Rows]:
    """Name and rows of the sections to draw: the one that is named, else all."""
    if not isinstance(adata, AnnData):
        raise TypeError(
            f"pictures are drawn of AnnData, and this is {type(adata).__name__}: pass sdata.tables[...], or draw a "
            "SpatialData with spatialdata-plot."
        )
    sections = _data.sections(adata, library_key)
    if library is None:
        return sections
    if library not in sections:
        raise KeyError(f"no section {library!r} (found: {list(sections)}).")
    return {library: sections[library]}


def rows_beside(dense: AnnData, library: str, library_key: str | None) -> Rows:
    """Rows of the points laid over a section; without ``library_key`` the two may call their one section otherwise."""
    [rows] = sections_of(dense, library if library_key else None, library_key).values()
    return rows


def places_of(adata: AnnData, rows: Rows, library: str, *, fill: bool = False) -> Places:
    """Places of one section: discs of the spots' diameter, or cells where they leave no gaps or are not to leave any.

    Visium HD's bins, and points laid by ``upsample``, are as wide as their pitch, which is what tells them apart. Discs
    of a few pixels blend with the picture under them, so that their colors could not be compared with those of a
    dense map: the spots of large arrays are drawn as cells, too.
    """
    xy = _data.positions(adata, rows)
    said = scalefactors(adata, library).get("spot_diameter_fullres")
    if said is not None and len(xy) < 2:
        return Places(xy, float(said))
    lattice = _lattice(xy)
    pitch = lattice.pitch if lattice else grids.spacing(xy)
    fine = lattice is not None and np.ptp(xy, axis=0).max() > FINE * pitch
    if not (fill or fine or "nearest_spot" in adata.obs or (said is not None and float(said) >= GAPLESS * pitch)):
        return Places(xy, 0.55 * pitch if said is None else float(said))  # 55 µm spots every 100 µm, as on Visium
    if lattice is None:  # points anywhere: squares
        return Places(xy, pitch, pitch / 2 * np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]))
    return Places(_settled(xy, lattice), pitch, _cell(lattice.basis))


def frame_of(places: Iterable[Places]) -> Floats:
    """(2, 2) limits of x and y that hold every place."""
    several = list(places)
    low = np.min([each.xy.min(0) - each.size for each in several], axis=0)
    high = np.max([each.xy.max(0) + each.size for each in several], axis=0)
    return np.stack([low, high], axis=1)


def _lattice(xy: Floats) -> grids.Lattice | None:
    try:
        return grids.Lattice.fit(xy)
    except ValueError:  # too few spots, or cells
        return None


def _settled(xy: Floats, lattice: grids.Lattice) -> Floats:
    """Put places on their sites, where no two share one: spots printed a little off would overlap and leave gaps."""
    site = lattice.index(xy)
    return lattice.points(site) if len(np.unique(site, axis=0)) == len(xy) else xy


def _cell(basis: Floats) -> Floats:
    """(k, 2) corners of the part of the plane that is nearer to (0, 0) than to any other point of the lattice."""
    steps = np.indices((7, 7)).reshape(2, -1).T - 3
    voronoi = Voronoi(steps @ basis)
    corners = voronoi.vertices[voronoi.regions[voronoi.point_region[len(steps) // 2]]]
    return np.asarray(corners[np.argsort(np.arctan2(corners[:, 1], corners[:, 0]))])
