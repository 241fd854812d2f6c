"""Cells as points to predict at: tables, outlines, and files of QuPath."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from sthisto._data._store import coordinates
from sthisto._messages import listed

AREAS = ("area_um2", "cell_area", "area", "nucleus_area")  # columns of pp.find_nuclei, 10x, sopa; the first counts
FILES = (".geojson", ".json")
NO_CELLS = ("annotation", "tile", "tma_core")  # objects of QuPath


@dataclass(frozen=True)
class Cells:
    """Cells of a section.

    Attributes
    ----------
    xy
        (m, 2) centers.
    obs
        (m rows) what is known of them, by name.
    area
        (m,) in any unit; None where unknown.
    """

    xy: NDArray[np.float64]
    obs: pd.DataFrame
    area: NDArray[np.float64] | None = None

    def keep(self, rows: NDArray[Any]) -> "Cells":
        """Only some rows."""
        return Cells(self.xy[rows], self.obs[rows], None if self.area is None else self.area[rows])

    def at(self, xy: NDArray[np.float64], **columns: Any) -> "Cells":
        """The same in other coordinates, with more columns."""
        return replace(self, xy=xy, obs=self.obs.assign(**columns))


def read_cells(grid: Any) -> Any:
    """Cells of an AnnData, a GeoDataFrame or the path of a GeoJSON; anything else is returned as it is.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        A file without outlines; names that are not unique; empty outlines.
    """
    if is_geojson(grid):
        grid = read_geojson(Path(grid))
    if isinstance(grid, AnnData):
        found = _of_table(grid)
    elif hasattr(grid, "geometry"):
        found = _of_outlines(grid)
    else:
        return grid
    if not found.obs.index.is_unique:
        double = found.obs.index[found.obs.index.duplicated()][0]
        raise ValueError(f"the names of the cells of grid= are not unique: {double!r} occurs more than once.")
    return found


def is_geojson(grid: Any) -> bool:
    """Whether it is the path of a GeoJSON, by its name."""
    return isinstance(grid, str | Path) and Path(grid).suffix.lower() in FILES


def _of_table(table: AnnData) -> Cells:
    known = [name for name in AREAS if name in table.obs]
    area = table.obs[known[0]].to_numpy(np.float64) if known else None
    obs = table.obs.set_axis(table.obs_names.astype(str))
    return Cells(coordinates(table, np.arange(table.n_obs)), obs, area)


def _of_outlines(frame: Any) -> Cells:
    """Centroids and areas of polygons, or of circles with a radius."""
    centers = frame.geometry.centroid
    xy = np.column_stack([centers.x, centers.y]).astype(np.float64)
    if not np.isfinite(xy).all():
        raise ValueError(f"{int((~np.isfinite(xy)).any(axis=1).sum())} outlines of grid= are empty. Leave them out.")
    area = np.pi * frame["radius"].to_numpy(float) ** 2 if "radius" in frame else frame.geometry.area.to_numpy(float)
    obs = pd.DataFrame(frame.drop(columns=frame.geometry.name)).set_axis(frame.index.astype(str))
    return Cells(xy, obs, area if (area > 0).all() else None)


def read_geojson(path: Path) -> Any:
    """Outlines of a GeoJSON, as QuPath exports them, as a GeoDataFrame: cells and detections, else annotations."""
    from geopandas import GeoDataFrame  # noqa: PLC0415
    from shapely.geometry import shape  # noqa: PLC0415

    whole = json.loads(path.read_text(encoding="utf-8"))
    features = whole.get("features", [whole]) if isinstance(whole, Mapping) else whole
    about = [each.get("properties") or {} for each in features]
    cells = [number for number, each in enumerate(about) if each.get("objectType") not in NO_CELLS]
    chosen = [number for number in cells or range(len(features)) if features[number].get("geometry")]
    if not chosen:
        raise ValueError(f"no outlines in {path}, which has {len(features)} objects. Export cells from QuPath.")
    names = [str(features[number].get("id", number)) for number in chosen]
    classes = [(about[number].get("classification") or {}).get("name", "") for number in chosen]
    outlines = [shape(features[number]["geometry"]) for number in chosen]
    return GeoDataFrame({"classification": classes}, geometry=outlines, index=names)


def cell_areas(cells: Cells | None) -> NDArray[np.float64]:
    """Areas (m,) of cells, refused where they are not known."""
    if cells is None or cells.area is None:
        there = "grid= is no table of cells" if cells is None else f"columns: {listed(cells.obs.columns)}"
        raise ValueError(
            f"match_spot_means='area' needs the areas of the cells ({there}). Pass polygons, or an AnnData with one of "
            f"the columns {listed(AREAS)}."
        )
    if not (np.isfinite(cells.area) & (cells.area > 0)).all():
        raise ValueError("match_spot_means='area': areas of cells are positive numbers; some of grid= are not.")
    return cells.area
