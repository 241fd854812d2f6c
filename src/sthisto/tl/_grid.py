"""The points of a dense map: a refined array, a lattice, cells, or points as given."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sthisto import grids
from sthisto._data import Cells, GridPoints, SectionData

SPARE = 1.1  # of the covering radius: spots are printed a little off their sites
ON_SITE = 0.2  # pitches of the grid: a spot further from its site was not measured there


def make_grid(grid: Any, section: SectionData, max_distance: float | None) -> GridPoints:
    """Points of the grid near the section's spots in tissue.

    Raises
    ------
    ValueError
        Neither a whole number, a lattice, nor finite points (m, 2); no point within ``max_distance``.
    """
    spots = section.xy[section.in_tissue]
    if isinstance(grid, grids.Lattice):
        fine, radius, spot_index = grid, 0.75 * section.pitch, grid.index(section.xy)
        distance = np.linalg.norm(fine.points(spot_index) - section.xy, axis=1)
        return _covering(
            fine, spots, radius, max_distance, spot_index=spot_index, on_spot=distance <= ON_SITE * fine.pitch
        )
    if not isinstance(grid, Cells | str) and np.ndim(grid) == 0:
        factor, own = _whole(grid), grids.Lattice.fit(section.xy)
        return _covering(
            own.refine(factor),
            spots,
            SPARE * own.reach,
            max_distance,
            spot_index=own.index(section.xy) * factor,
            on_spot=np.ones(len(section), dtype=bool),
        )
    cells = grid if isinstance(grid, Cells) else None
    xy = cells.xy if cells else _points(grid)
    if max_distance is not None:
        near = grids.within(xy, spots, max_distance)
        xy, cells = xy[near], cells.keep(near) if cells else None
    if not len(xy):
        raise ValueError(f"no point of the grid is within max_distance={max_distance} px of a spot.")
    several = len(np.unique(xy, axis=0)) > 1
    return GridPoints(xy, grids.spacing(xy) if several else section.pitch, cells=cells)


def _whole(grid: Any) -> int:
    """A refinement as an integer, also where it came as 2.0."""
    if isinstance(grid, bool | np.bool_) or not isinstance(grid, int | float | np.number) or grid != int(grid):
        raise ValueError(f"grid={grid!r}: expected a whole number of 1 or more, a sthisto.grids.Lattice, or points.")
    return int(grid)


def _covering(
    fine: grids.Lattice,
    spots: NDArray[np.float64],
    radius: float,
    max_distance: float | None,
    *,
    spot_index: NDArray[np.int64],
    on_spot: NDArray[np.bool_],
) -> GridPoints:
    index = fine.cover(spots, radius if max_distance is None else max_distance)
    if not len(index):
        raise ValueError(f"no point of the grid is within max_distance={max_distance} px of a spot.")
    return GridPoints(fine.points(index), fine.pitch, index, spot_index, on_spot)


def _points(grid: Any) -> NDArray[np.float64]:
    """Points as the user gave them."""
    expected = (
        "expected a whole number, a sthisto.grids.Lattice, finite points (m, 2) in full-resolution pixels, x then y, "
        "or cells: an AnnData, a GeoDataFrame or the path of a GeoJSON."
    )
    try:
        xy = np.asarray(grid, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"grid={grid!r}: {expected}") from error
    if xy.ndim != 2 or xy.shape[1] != 2 or not len(xy) or not np.isfinite(xy).all():
        raise ValueError(f"grid of shape {xy.shape}: {expected}")
    return xy
