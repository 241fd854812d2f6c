"""A dense map as SpatialData: points as cells of their lattice, a table that annotates them, images of genes."""

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

    Part = tuple[Region, NDArray[np.intp]]  # a region and its rows of the map

TABLE, REGION_KEY, INSTANCE_KEY, CELLS = "dense", "shapes", "point", "cells"
SQUARE = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])


def dense_spatialdata(table: Any, dense: AnnData, grid: Any) -> Any:
    """Make a SpatialData of a dense map: where the measured shapes are, in their coordinates, with their image.

    What was given as the grid lends its own shapes: a table or shapes by name, or outlines.
    """
    from spatialdata import SpatialData  # noqa: PLC0415
    from spatialdata.models import TableModel  # noqa: PLC0415

    parts = list(_parts(table, dense))
    for region, rows in parts:
        dense.obsm["spatial"][rows] = region.from_image(dense.obsm["spatial"][rows])
    shapes = _lent(table, dense, grid) or _cells(dense, parts)
    names = dict.fromkeys(region.image_name for region, _ in parts if region.image_name)
    dense.obs[REGION_KEY] = dense.obs[REGION_KEY].astype("category")
    annotated = TableModel.parse(dense, region=list(shapes), region_key=REGION_KEY, instance_key=INSTANCE_KEY)
    return SpatialData(
        images={name: table.sdata.images[name] for name in names}, shapes=shapes, tables={TABLE: annotated}
    )


def rasterized(sdata: Any, genes: list[str]) -> dict[str, Any]:
    """Draw genes of a dense map as channels of an image for each of its shapes, "<shapes>_genes"."""
    dense = sdata.tables[TABLE]
    shapes = dense.obs[REGION_KEY].astype(str).to_numpy()
    images = {}
    for name in dict.fromkeys(shapes):
        measured = name.removesuffix(f"_{TABLE}")
        images[f"{measured}_genes"] = _raster(dense[shapes == name], genes, sdata.shapes[name])
    return images


def _parts(table: Any, dense: AnnData) -> "Iterator[Part]":
    """Yield each region with its rows of the map."""
    if len(table.regions) == 1:
        yield next(iter(table.regions.values())), np.arange(dense.n_obs)
        return
    names = dense.obs[table.region_key].astype(str).to_numpy()
    for name, region in table.regions.items():
        if (names == name).any():
            yield region, np.flatnonzero(names == name)


def _lent(table: Any, dense: AnnData, grid: Any) -> dict[str, Any]:
    """Give the shapes that were the grid, which the points are rows of; nothing where it had none."""
    if isinstance(grid, str) and grid in table.sdata.tables and grid not in table.sdata.shapes:
        shapes = {(region := table.points_of(grid)[0]).name: region.element}
    elif (outlines := table.outlines(grid)) is not None:
        shapes = {grid if isinstance(grid, str) and grid in table.sdata.shapes else CELLS: outlines}
    else:
        return {}
    [(name, element)] = shapes.items()
    if "transform" not in element.attrs:
        element = _parsed(element.loc[dense.obs[INSTANCE_KEY]], next(iter(table.regions.values())))
    dense.obs[REGION_KEY] = np.full(dense.n_obs, name, dtype=object)
    return {name: element}


def _parsed(frame: Any, region: "Region") -> Any:
    """Outlines as an element, where a region is."""
    from spatialdata.models import ShapesModel  # noqa: PLC0415
    from spatialdata.transformations import get_transformation  # noqa: PLC0415

    return ShapesModel.parse(frame, transformations=deepcopy(get_transformation(region.element, get_all=True)))


def _cells(dense: AnnData, parts: "list[Part]") -> dict[str, Any]:
    """Draw the cell of the lattice around every point: squares on a square array, hexagons on a hexagonal one."""
    from geopandas import GeoDataFrame  # noqa: PLC0415
    from shapely import polygons  # noqa: PLC0415

    names, number = np.empty(dense.n_obs, dtype=object), np.empty(dense.n_obs, dtype=np.int64)
    shapes = {}
    for region, rows in parts:
        name = f"{region.name}_{TABLE}"
        names[rows], number[rows] = name, np.arange(len(rows))
        frame = GeoDataFrame(geometry=polygons(dense.obsm["spatial"][rows][:, None] + cell_of(dense[rows])))
        shapes[name] = _parsed(frame, region)
    dense.obs[REGION_KEY], dense.obs[INSTANCE_KEY] = names, number
    return shapes


def cell_of(dense: AnnData) -> "Floats":
    """Corners (k, 2) of a point's cell about it."""
    lattice = _lattice_of(dense)
    return lattice.cell if lattice else _pitch_of(dense) * SQUARE


def _lattice_of(dense: AnnData) -> grids.Lattice | None:
    """Give the lattice by the numbers of the points; nothing for scattered ones."""
    if "array_row" not in dense.obs:
        return None
    numbered = np.column_stack([dense.obs[["array_row", "array_col"]].to_numpy(np.float64), np.ones(dense.n_obs)])
    steps, _, rank, _ = np.linalg.lstsq(numbered, dense.obsm["spatial"], rcond=None)
    return grids.Lattice(steps[2], steps[:2]) if rank == 3 else None


def _pitch_of(dense: AnnData) -> float:
    return grids.spacing(dense.obsm["spatial"]) if dense.n_obs > 1 else 1.0


def _raster(dense: AnnData, genes: list[str], shapes: Any) -> Any:
    """Draw genes as channels of an image: in pixels of a third of the pitch the nearest point, 0 off the map."""
    from spatialdata.models import Image2DModel  # noqa: PLC0415
    from spatialdata.transformations import Scale, Sequence, Translation, get_transformation  # noqa: PLC0415

    xy, lattice = np.asarray(dense.obsm["spatial"]), _lattice_of(dense)
    pitch = lattice.pitch if lattice else _pitch_of(dense)
    radius = 1.001 * (lattice.reach if lattice else pitch / np.sqrt(2))
    step, low = pitch / 3, xy.min(axis=0) - pitch / 2
    width, height = np.ceil((np.ptp(xy, axis=0) + pitch) / step - 1e-6).astype(int)
    centers = low + step * (np.indices((height, width))[::-1].reshape(2, -1).T + 0.5)
    distance, nearest = cKDTree(xy).query(centers, distance_upper_bound=radius, workers=-1)
    there = np.isfinite(distance)
    part = dense[:, genes].X
    values = np.asarray(part.toarray() if sparse.issparse(part) else part, np.float32)
    pixels = np.zeros((len(genes), len(centers)), np.float32)  # NaN could not be drawn
    pixels[:, there] = values[nearest[there]].T
    place = [Scale([step, step], ("x", "y")), Translation(low, ("x", "y"))]
    steps = get_transformation(shapes, get_all=True)
    return Image2DModel.parse(
        pixels.reshape(-1, height, width),
        dims=("c", "y", "x"),
        c_coords=genes,
        transformations={system: Sequence([*place, deepcopy(after)]) for system, after in steps.items()},
    )
