"""A dense map as SpatialData: points as cells of their lattice, a table that annotates them, pictures of genes."""

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
from anndata import AnnData
from scipy import sparse
from scipy.spatial import cKDTree

from sthisto import grids

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from sthisto._data._elements import Floats, Region
    from sthisto._data._spatialdata import Opened

    Part = tuple[Region, NDArray[np.intp]]  # a region and its rows of the map

TABLE, TELLS, INSTANCE = "dense", "shapes", "point"  # name of the table, and its columns that tell each row's shape
SQUARE = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])


def dense_sections(opened: "Opened", made: AnnData) -> Any:
    """Make a SpatialData of a dense map: where the measured shapes lie, in their coordinates, beside their image.

    A table that was named as the grid lends its own shapes.
    """
    from spatialdata import SpatialData  # noqa: PLC0415
    from spatialdata.models import TableModel  # noqa: PLC0415

    parts = list(_parts(opened, made))
    for region, rows in parts:
        made.obsm["spatial"][rows] = region.lifted(made.obsm["spatial"][rows])
    grid = opened.options["grid"]
    shapes = _lent(opened, made, grid) if isinstance(grid, str) else _cells(made, parts)
    images = {name: opened.sdata.images[name] for name in dict.fromkeys(r.image_name for r, _ in parts) if name}
    if opened.rasters:
        images |= {f"{region.name}_genes": _raster(made[rows], opened.rasters, region) for region, rows in parts}
    made.obs[TELLS] = made.obs[TELLS].astype("category")
    table = TableModel.parse(made, region=list(shapes), region_key=TELLS, instance_key=INSTANCE)
    return SpatialData(images=images, shapes=shapes, tables={TABLE: table})


def _parts(opened: "Opened", made: AnnData) -> "Iterator[Part]":
    """Yield each region with its rows of the map."""
    if len(opened.regions) == 1:
        yield next(iter(opened.regions.values())), np.arange(made.n_obs)
        return
    names = made.obs[opened.table.uns["spatialdata_attrs"]["region_key"]].astype(str).to_numpy()
    for name, region in opened.regions.items():
        if (names == name).any():
            yield region, np.flatnonzero(names == name)


def _lent(opened: "Opened", made: AnnData, grid: str) -> dict[str, Any]:
    """Give the shapes of the table that was the grid, and name the points as its rows."""
    region, table = opened.points_of(grid)
    made.obs_names = table.obs_names[region.rows]
    made.obs[TELLS] = np.full(made.n_obs, region.name, dtype=object)
    made.obs[INSTANCE] = table.obs[table.uns["spatialdata_attrs"]["instance_key"]].to_numpy()[region.rows]
    return {region.name: region.element}


def _cells(made: AnnData, parts: "list[Part]") -> dict[str, Any]:
    """Draw the cell of the lattice around every point: squares on a square array, hexagons on a hexagonal one."""
    from geopandas import GeoDataFrame  # noqa: PLC0415
    from shapely import polygons  # noqa: PLC0415
    from spatialdata.models import ShapesModel  # noqa: PLC0415
    from spatialdata.transformations import get_transformation  # noqa: PLC0415

    names, number = np.empty(made.n_obs, dtype=object), np.empty(made.n_obs, dtype=np.int64)
    shapes = {}
    for region, rows in parts:
        name = f"{region.name}_{TABLE}"
        names[rows], number[rows] = name, np.arange(len(rows))
        frame = GeoDataFrame(geometry=polygons(made.obsm["spatial"][rows][:, None] + cell_of(made[rows])))
        steps = deepcopy(get_transformation(region.element, get_all=True))
        shapes[name] = ShapesModel.parse(frame, transformations=steps)
    made.obs[TELLS], made.obs[INSTANCE] = names, number
    return shapes


def cell_of(made: AnnData) -> "Floats":
    """Corners (k, 2) of a point's cell about it."""
    lattice = _lattice_of(made)
    return lattice.cell if lattice else _pitch_of(made) * SQUARE


def _lattice_of(made: AnnData) -> grids.Lattice | None:
    """Give the lattice that the numbers of the points say they lie on; nothing for scattered ones."""
    if "array_row" not in made.obs:
        return None
    numbered = np.column_stack([made.obs[["array_row", "array_col"]].to_numpy(np.float64), np.ones(made.n_obs)])
    steps, _, rank, _ = np.linalg.lstsq(numbered, made.obsm["spatial"], rcond=None)
    return grids.Lattice(steps[2], steps[:2]) if rank == 3 else None


def _pitch_of(made: AnnData) -> float:
    return grids.spacing(made.obsm["spatial"]) if made.n_obs > 1 else 1.0


def _raster(made: AnnData, genes: list[str], region: "Region") -> Any:
    """Draw genes as channels of a picture: in pixels of a third of the pitch the nearest point, 0 off the map."""
    from spatialdata.models import Image2DModel  # noqa: PLC0415
    from spatialdata.transformations import Scale, Sequence, Translation, get_transformation  # noqa: PLC0415

    xy, lattice = np.asarray(made.obsm["spatial"]), _lattice_of(made)
    pitch = lattice.pitch if lattice else _pitch_of(made)
    reach = 1.001 * (lattice.reach if lattice else pitch / np.sqrt(2))
    step, low = pitch / 3, xy.min(axis=0) - pitch / 2
    width, height = np.ceil((np.ptp(xy, axis=0) + pitch) / step - 1e-6).astype(int)
    centres = low + step * (np.indices((height, width))[::-1].reshape(2, -1).T + 0.5)
    distance, nearest = cKDTree(xy).query(centres, distance_upper_bound=reach, workers=-1)
    there = np.isfinite(distance)
    part = made[:, genes].X
    values = np.asarray(part.toarray() if sparse.issparse(part) else part, np.float32)
    pixels = np.zeros((len(genes), len(centres)), np.float32)  # NaN could not be drawn
    pixels[:, there] = values[nearest[there]].T
    place = [Scale([step, step], ("x", "y")), Translation(low, ("x", "y"))]
    steps = get_transformation(region.element, get_all=True)
    return Image2DModel.parse(
        pixels.reshape(-1, height, width),
        dims=("c", "y", "x"),
        c_coords=genes,
        transformations={system: Sequence([*place, deepcopy(after)]) for system, after in steps.items()},
    )
