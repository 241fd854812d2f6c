"""What a panel shows of one section: cells, values and the picture under them."""
# ruff: noqa: PLC0415  importing sthisto must not load matplotlib
# ruff: noqa: PLC0415  importing sthisto must not load matplotlib

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import Voronoi

from sthisto import _slide, grids

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import Collection


Floats = NDArray[np.float64]
PICTURE_PX = 1000  # more pixels than a panel can show


@dataclass(frozen=True)
class Panel:
    """One section's values at places of a true size."""

    name: str
    xy: Floats  # (n, 2)
    values: NDArray[np.float32]  # (n, g)
    size: float  # px: diameter of the spots, or pitch of the points
    cell: Floats | None = None  # (k, 2) corners of a place about its point; None: circles

    def collection(self, gene: int, ax: "Axes", **colours: Any) -> "Collection":
        """Return the places as shapes in data coordinates, coloured by a gene."""
        from matplotlib.collections import EllipseCollection, PolyCollection

        style = {"array": self.values[:, gene], "linewidths": 0, "rasterized": True, **colours}
        if self.cell is None:
            size = np.full(len(self.xy), self.size)
            return EllipseCollection(size, size, 0, units="xy", offsets=self.xy, offset_transform=ax.transData, **style)
        # neighbours share an edge: smoothing each of them would let the ground shine through as a grid of lines
        corners: Any = self.xy[:, None] + self.cell  # (n, k, 2)
        return PolyCollection(corners, antialiaseds=False, **style)


def section_of(adata: AnnData, library: str | None, library_key: str | None) -> tuple[str, NDArray[np.intp]]:
    """Return the name and the rows of the one section to draw."""
    sections = _slide.sections(adata, library_key)
    if library is None and len(sections) > 1:
        raise ValueError(f"there are {len(sections)} sections: say with library= which to draw, of {list(sections)}.")
    name = next(iter(sections)) if library is None else library
    if name not in sections:
        raise KeyError(f"no section {name!r} (found: {list(sections)}).")
    return name, sections[name]


def spots_panel(adata: AnnData, rows: NDArray[np.intp], names: list[str], layer: str | None, library: str) -> Panel:
    xy = _slide.positions(adata, rows)
    diameter = scalefactors(adata, library).get("spot_diameter_fullres")
    size = 0.55 * grids.spacing(xy) if diameter is None else float(diameter)
    return Panel(layer or "measured", xy, _values(adata, rows, names, layer, "adata"), size)


def points_panel(dense: AnnData, rows: NDArray[np.intp], names: list[str]) -> Panel:
    xy = _slide.positions(dense, rows)
    try:
        lattice = grids.Lattice.fit(xy)
    except ValueError:  # points anywhere: squares
        pitch = grids.spacing(xy)
        cell = pitch / 2 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    else:
        pitch, cell = lattice.pitch, _cell(lattice.basis)
    return Panel("predicted", xy, _values(dense, rows, names, None, "dense"), pitch, cell)


def _cell(basis: Floats) -> Floats:
    """(k, 2) corners of the part of the plane that is nearer to (0, 0) than to any other point of the lattice."""
    steps = np.indices((7, 7)).reshape(2, -1).T - 3
    voronoi = Voronoi(steps @ basis)
    corners = voronoi.vertices[voronoi.regions[voronoi.point_region[len(steps) // 2]]]
    return np.asarray(corners[np.argsort(np.arctan2(corners[:, 1], corners[:, 0]))])


def _values(
    adata: AnnData, rows: NDArray[np.intp], names: list[str], layer: str | None, called: str
) -> NDArray[np.float32]:
    missing = [name for name in names if name not in adata.var_names]
    if missing:
        alike = [near for name in missing for near in get_close_matches(name, adata.var_names, n=3)]
        there = alike or adata.var_names[:5].tolist()
        raise KeyError(f"genes {missing} are not in {called}.var_names ({adata.n_vars} there, such as {there}).")
    if layer is not None and layer not in adata.layers:
        raise KeyError(f"no layer {layer!r} in {called}.layers (found: {sorted(adata.layers)}).")
    part = adata[rows, names]
    matrix = part.X if layer is None else part.layers[layer]
    values = np.asarray(matrix.toarray() if sparse.issparse(matrix) else matrix, np.float32)
    empty = [name for name, gene in zip(names, values.T, strict=True) if not np.isfinite(gene).any()]
    if empty:
        raise ValueError(f"genes {empty} have no values in {called}: the model does not have them. Fit with genes=.")
    return values


def scalefactors(adata: AnnData, library: str) -> dict[str, Any]:
    factors: dict[str, Any] = adata.uns.get("spatial", {}).get(library, {}).get("scalefactors", {})
    return factors


def mpp_of(adata: AnnData, library: str) -> float | None:
    """Micrometres per full-resolution pixel, where known."""
    said = scalefactors(adata, library).get("microns_per_pixel")
    for record in adata.uns.get("sthisto", {}).get("features", {}).values():
        if said is None:
            said = dict(zip(record["libraries"], record["mpp"], strict=True)).get(library)
    return None if said is None else float(said)


def picture_of(adata: AnnData, library: str) -> tuple[NDArray[Any], tuple[float, float, float, float]] | None:
    """Return the picture and its extent in full-resolution pixels, or nothing where there is none but blank ones."""
    images, factors = adata.uns.get("spatial", {}).get(library, {}).get("images", {}), scalefactors(adata, library)
    for name in ("hires", "lowres"):
        pixels, factor = np.asarray(images.get(name, 0)), factors.get(f"tissue_{name}_scalef")
        if factor is not None and pixels.min() < pixels.max():
            step = -(-max(pixels.shape[:2]) // PICTURE_PX)
            pixels = pixels[::step, ::step]
            height, width = np.multiply(pixels.shape[:2], step / factor)
            return pixels, (0, width, height, 0)
    return None


def draw_picture(ax: "Axes", pixels: NDArray[Any], extent: tuple[float, float, float, float]) -> None:
    """Draw the picture, light, so that the colours over it are read."""
    limits = ax.get_xlim(), ax.get_ylim()
    ax.imshow(pixels, extent=extent, alpha=0.5, cmap="gray")
    ax.set(xlim=limits[0], ylim=limits[1])
