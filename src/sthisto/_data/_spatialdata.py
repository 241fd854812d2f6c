"""SpatialData at the API boundary: verbs are written for one AnnData, into which a table of a SpatialData is turned.

Spots are the centroids of what the table annotates, in those elements' own coordinates, which readers write into
``obsm["spatial"]``, too. For patches they are registered to the image by the transformations to a coordinate system
that both have: rotated, flipped and shifted by these but not scaled, as the image carries its own scale. A length
stays what it is among the shapes, so that most often nothing moves at all, whichever of several images is taken.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from sthisto import grids
from sthisto._data._cells import Cells, is_geojson, read_cells, read_geojson
from sthisto._data._elements import (
    ATTRIBUTES,
    Region,
    element_region,
    regions_of,
    registered_to,
    table_of,
    transformation_to,
    transformed,
)
from sthisto._data._images import ELEMENT
from sthisto._data._shapes import INSTANCE_KEY, dense_spatialdata
from sthisto._data._store import records, write
from sthisto._messages import listed
from sthisto.images import Image

P = ParamSpec("P")
R = TypeVar("R")
Floats = NDArray[np.float64]

SLOTS = ("obs", "var", "obsm", "varm", "obsp", "layers", "uns")
PROXIED = {("obsm", "spatial"), ("uns", "spatial")}  # what the proxy has in place of the table's own


@dataclass(frozen=True)
class SpatialDataView:
    """A SpatialData, with the names of the table and of the images that a verb is to use.

    Every verb takes a SpatialData as it is where it has one table and one image; where it has several, this names them.

    Parameters
    ----------
    sdata
        The SpatialData.
    table_key
        Name of the table; None takes the only one.
    image_key
        Name of the image, or ``{region: name}``; None takes the one used for the features, else the only one.

    Examples
    --------
    >>> import sthisto
    >>> sthisto.SpatialDataView("a SpatialData", table_key="square_016um").table_key
    'square_016um'
    """

    sdata: Any
    table_key: str | None = None
    image_key: str | Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class VerbArguments:
    """Which parameters of a verb have to do with a SpatialData; None where it has no such parameter.

    Attributes
    ----------
    adata
        The object.
    image
        Takes the image of each region.
    library_key
        Takes the column that names the region of each row, where there are several.
    reference
        Another object, fitted.
    grid
        Points in the coordinates of the shapes; what is returned becomes a SpatialData.
    images_of
        Name of the parameter with the key of the fit or features whose images are used again; None: they are new.
    kind
        Whether that key is of a "fit" or of "features".
    fit_added
        Name of the parameter with the key of the fit that the verb writes.
    new_rows
        What is returned has rows of its own, at positions on the images.
    """

    adata: str = "adata"
    image: str | None = None
    library_key: str | None = None
    reference: str | None = None
    grid: str | None = None
    images_of: str | None = None
    kind: Literal["fit", "features"] = "fit"
    fit_added: str | None = None
    new_rows: bool = False

    def names(self) -> list[str]:
        """Parameters that are declared."""
        declared = (self.adata, self.image, self.library_key, self.reference, self.grid, self.images_of, self.fit_added)
        return [name for name in declared if name is not None]


def accepts_spatialdata(
    adata: str = "adata",
    *,
    image: str | None = None,
    library_key: str | None = None,
    reference: str | None = None,
    grid: str | None = None,
    images_of: str | None = None,
    kind: Literal["fit", "features"] = "fit",
    fit_added: str | None = None,
    new_rows: bool = False,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a verb that is written for AnnData take a SpatialData or a :class:`SpatialDataView` as well.

    The parameters are those of :class:`VerbArguments`, by name. The verb is given a proxy of the table whose positions
    and image come from the elements. What it writes goes into the table once it is through; what it returns becomes a
    table or, from a grid, a SpatialData.

    Raises
    ------
    TypeError
        When the verb is defined: it has no parameter of a declared name.
    """
    declared = VerbArguments(
        adata=adata,
        image=image,
        library_key=library_key,
        reference=reference,
        grid=grid,
        images_of=images_of,
        kind=kind,
        fit_added=fit_added,
        new_rows=new_rows,
    )

    def decorate(verb: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(verb)
        unknown = [name for name in declared.names() if name not in signature.parameters]
        if unknown:
            raise TypeError(f"{verb.__name__} has no parameters {listed(unknown)}, which it declares.")

        @wraps(verb)
        def front(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            options = bound.arguments
            if declared.reference and is_spatialdata(options[declared.reference]):
                options[declared.reference] = table_of(*_named(options[declared.reference])[:2])[1]
            if not is_spatialdata(options[declared.adata]):
                return verb(*bound.args, **bound.kwargs)
            table = TableView.open(declared, options)
            options.update(table.replaced())
            result = verb(*bound.args, **bound.kwargs)
            table.write_back()
            returned: R = table.returned(result)
            return returned

        return front

    return decorate


def is_spatialdata(thing: object) -> bool:
    """Whether it is a SpatialData or a view of one, asked without loading the library."""
    return isinstance(thing, SpatialDataView) or any(
        kind.__name__ == "SpatialData" and kind.__module__.startswith("spatialdata.") for kind in type(thing).mro()
    )


def _named(thing: Any) -> tuple[Any, str | None, str | Mapping[str, str] | None]:
    """SpatialData, table and image by name."""
    return (
        (thing.sdata, thing.table_key, thing.image_key) if isinstance(thing, SpatialDataView) else (thing, None, None)
    )


class RegionImages(Mapping[str, Image]):
    """Images of the regions. A region without one is an error for whoever asks for it, and only then."""

    def __init__(self, regions: Mapping[str, Region]) -> None:
        self._regions = regions

    def __getitem__(self, name: str) -> Image:
        region = self._regions[name]
        if region.image is None:
            raise KeyError(region.no_image)
        return region.image

    def __iter__(self) -> Iterator[str]:
        return iter(self._regions)

    def __len__(self) -> int:
        return len(self._regions)


@dataclass(frozen=True)
class TableView:
    """A table of a SpatialData, and the AnnData that stands for it in a verb.

    Attributes
    ----------
    sdata, table
        As the user has them.
    proxy
        What the verb is given.
    regions
        The sections, by name.
    declared, options
        Parameters of the verb that have to do with SpatialData, and all values as the caller gave them.
    """

    sdata: Any
    table: AnnData
    proxy: AnnData
    regions: dict[str, Region]
    declared: VerbArguments
    options: Mapping[str, Any]

    @classmethod
    def open(cls, declared: VerbArguments, options: Mapping[str, Any]) -> "TableView":
        """Read what the options of a verb name."""
        sdata, table_key, image_key = _named(options[declared.adata])
        key, table = table_of(sdata, table_key)
        regions = regions_of(sdata, key, table)
        names = _image_names(table, regions, declared, options, image_key)
        regions = {name: registered_to(sdata, region, names.get(name), key) for name, region in regions.items()}
        view = cls(sdata, table, _proxy(table, regions), regions, declared, dict(options))
        given = options.get(declared.library_key or "")
        if len(regions) > 1 and given not in (None, view.region_key):
            raise ValueError(
                f"library_key={given!r}: the table annotates {len(regions)} elements ({listed(regions)}), "
                f"each a section of its own, which obs[{view.region_key!r}] names. Leave library_key= out."
            )
        return view

    @property
    def region_key(self) -> str:
        """Column of the table that names the region of each row."""
        return str(self.table.uns[ATTRIBUTES]["region_key"])

    def replaced(self) -> dict[str, Any]:
        """Arguments in place of those that the caller gave."""
        declared, new = self.declared, {self.declared.adata: self.proxy}
        if declared.library_key and len(self.regions) > 1:
            new[declared.library_key] = self.region_key
        if declared.image and any(region.image or region.no_image for region in self.regions.values()):
            only = next(iter(self.regions.values())).image if len(self.regions) == 1 else None
            new[declared.image] = only or RegionImages(self.regions)
        if declared.grid:
            new[declared.grid] = self._grid(self.options[declared.grid])
        return new

    def _grid(self, grid: Any) -> Any:
        """Transform the grid that was asked for to the image, as its points count in the shapes' coordinates."""
        if isinstance(grid, int | float | np.integer):
            return grid
        cells = self._cells(grid)
        if isinstance(cells, Cells):
            return cells.at(self._moved(cells.xy, cells.obs, Region.on_image))
        if len(self.regions) > 1:
            return grid
        region = next(iter(self.regions.values()))
        if isinstance(grid, grids.Lattice):
            corners = region.on_image(grid.points([[0, 0], [1, 0], [0, 1]]))
            return grids.Lattice(corners[0], corners[1:] - corners[0])
        xy = np.asarray(grid, dtype=np.float64)
        return region.on_image(xy) if xy.ndim == 2 and xy.shape[1] == 2 else grid

    def _cells(self, grid: Any) -> Any:
        """Cells in the coordinates of the shapes: of a table or shapes by name, outlines, or an AnnData of cells."""
        if isinstance(grid, str) and grid not in self.sdata.shapes and not is_geojson(grid):
            region, finer = self.points_of(grid)
            numbers = finer.obs[finer.uns[ATTRIBUTES]["instance_key"]].to_numpy()[region.rows]
            return Cells(region.xy, pd.DataFrame({INSTANCE_KEY: numbers}, index=finer.obs_names[region.rows]))
        element = self.outlines(grid)
        cells = read_cells(grid if element is None else element)
        if element is None or not isinstance(cells, Cells):
            return cells
        cells = cells.at(cells.xy, **{INSTANCE_KEY: element.index.to_numpy()})
        if "transform" not in element.attrs:
            return cells
        [region] = self.regions.values()
        matrix = transformation_to(element_region("grid=", element, cells.xy), region.name, region.element)
        return cells.at(transformed(matrix, cells.xy))

    def outlines(self, grid: Any) -> Any:
        """Shapes that are the grid, by name or as they are or of a file; None where it has none."""
        if isinstance(grid, str) and grid in self.sdata.shapes:
            grid = self.sdata.shapes[grid]
        if is_geojson(grid):
            grid = read_geojson(Path(grid))
        if not hasattr(grid, "geometry"):
            return None
        if len(self.regions) > 1:
            raise ValueError(
                f"the outlines of grid= belong to one section, but the table annotates {len(self.regions)} elements "
                f"({listed(self.regions)}). Pass an AnnData of cells with obs[{self.region_key!r}]."
            )
        return grid

    def _moved(self, xy: Floats, obs: pd.DataFrame, move: Callable[[Region, Floats], Floats]) -> Floats:
        """Move points of each region, which ``obs`` names where there are several."""
        if len(self.regions) == 1:
            return move(next(iter(self.regions.values())), xy)
        if self.region_key not in obs:
            return xy
        names, moved = obs[self.region_key].astype(str).to_numpy(), xy.copy()
        for name, region in self.regions.items():
            moved[names == name] = move(region, xy[names == name])
        return moved

    def points_of(self, name: str) -> tuple[Region, AnnData]:
        """Give the places of another table, such as a finer binning, in the coordinates of the only region."""
        if self.options.get("max_distance") is not None:
            raise ValueError(f"max_distance= with grid={name!r}, which is taken whole.")
        table = table_of(self.sdata, name)[1]
        [region] = self.regions.values()
        others = regions_of(self.sdata, name, table)
        if len(others) > 1:
            raise ValueError(f"grid={name!r}: this table annotates {len(others)} elements ({listed(others)}), not one.")
        [other] = others.values()
        return replace(other, xy=transformed(transformation_to(other, region.name, region.element), other.xy)), table

    def write_back(self) -> None:
        """Put into the table what was written into the proxy, and take out what was removed from it."""
        for slot in SLOTS:
            before, after = getattr(self.table, slot), getattr(self.proxy, slot)
            names = [name for name in after if name is not None and (slot, name) not in PROXIED]
            for name in [n for n in before if n is not None and n not in after and (slot, n) not in PROXIED]:
                del before[name]
            write(self.table, **{slot: {name: after[name] for name in names if not _same(before, after, name)}})
        self._name_images()

    def _name_images(self) -> None:
        """Note with a new fit to which images its positions were registered, so that the same are taken again."""
        fit = records(self.table, "fit").get(str(self.options.get(self.declared.fit_added or "")), {})
        if "state" in fit:
            fit["regions"] = np.array(list(self.regions), dtype=str)
            fit["images"] = np.array([region.image_name for region in self.regions.values()], dtype=str)

    def returned(self, result: Any) -> Any:
        """Turn what a verb returned into what belongs to a SpatialData."""
        if not isinstance(result, AnnData):
            return result
        result.uns.pop("spatial", None)
        if self.declared.grid:
            return dense_spatialdata(self, result, self.options[self.declared.grid])
        if self.declared.new_rows:
            result.obsm["spatial"] = self._moved(result.obsm["spatial"], result.obs, Region.from_image)
            return result
        for region in self.regions.values():
            result.obsm["spatial"][region.rows] = region.xy
        result.uns[ATTRIBUTES] = dict(self.table.uns[ATTRIBUTES])
        return result


def to_anndata(thing: Any, library_key: str | None = None) -> tuple[Any, str | None]:
    """Give an AnnData to draw for a SpatialData or a view of one, with its images, and the column of its sections.

    Anything else is returned as it is.
    """
    if not is_spatialdata(thing):
        return thing, library_key
    view = TableView.open(VerbArguments(library_key="library_key"), {"adata": thing, "library_key": library_key})
    view.proxy.uns["spatial"] = {name: _spatial_entry(region) for name, region in view.regions.items()}
    return view.proxy, view.region_key if len(view.regions) > 1 else library_key


def _spatial_entry(region: Region) -> dict[str, Any]:
    """A region's image and scale factors as readers write them into ``uns["spatial"]``."""
    factors: dict[str, float] = {}
    if "radius" in region.element:
        factors["spot_diameter_fullres"] = 2 * float(np.median(region.element["radius"]))
    elif hasattr(region.element, "geometry"):
        factors["spot_diameter_fullres"] = float(np.sqrt(np.median(region.element.area)))
    if region.image is None:
        return {"images": {}, "scalefactors": factors}
    pixels, factors["tissue_hires_scalef"] = region.image.thumbnail()
    if region.image.mpp is not None:
        factors["microns_per_pixel"] = region.image.mpp
    return {"images": {"hires": pixels}, "scalefactors": factors}


def _image_names(
    table: AnnData,
    regions: Mapping[str, Region],
    declared: VerbArguments,
    options: Mapping[str, Any],
    wanted: str | Mapping[str, str] | None,
) -> dict[str, str | None]:
    """Names of the images to register regions to: as asked for, else those of the fit, else those of the features.

    None stands for the only one; empty is an image that is no element, to which nothing is registered.
    """
    if declared.image and options[declared.image] is not None:
        if wanted is not None:
            raise ValueError(f"image= with image_key={wanted!r}: pass an image or name one, not both.")
        return dict.fromkeys(regions, "")
    if wanted is not None or declared.images_of is None:
        return dict(wanted) if isinstance(wanted, Mapping) else dict.fromkeys(regions, wanted)
    key, fit = options[declared.images_of], {}
    if declared.kind == "fit":
        fit = records(table, "fit").get(key, {})
        if any(map(str, fit.get("images", ()))):
            return {str(name): str(image) for name, image in zip(fit["regions"], fit["images"], strict=True)}
        key = options.get("features_key") or fit.get("features_key") or "X_histo"
    record = records(table, "features").get(key)
    if record is None:
        return {}
    paths = {str(name): str(image) for name, image in zip(record["sections"], record["image"], strict=True)}
    return {name: path.removeprefix(ELEMENT) if path.startswith(ELEMENT) else "" for name, path in paths.items()}


def _proxy(table: AnnData, regions: Mapping[str, Region]) -> AnnData:
    """Make an AnnData that shares the table's arrays, with the spots in the coordinates of the images."""
    xy = np.full((table.n_obs, 2), np.nan)
    for region in regions.values():
        xy[region.rows] = region.on_image(region.xy)
    proxy = AnnData(X=table.X, obs=table.obs, var=table.var)
    for slot in ("varm", "obsp", "layers"):
        write(proxy, **{slot: {name: value for name, value in getattr(table, slot).items() if name is not None}})
    write(proxy, obsm={**table.obsm, "spatial": xy})
    proxy.uns.update(table.uns)
    proxy.uns["spatial"] = {name: {} for name in regions} if len(regions) == 1 else {}
    return proxy


def _same(before: Any, after: Any, name: str) -> bool:
    if name not in before:
        return False
    old, new = before[name], after[name]
    return bool(new.equals(old)) if isinstance(new, pd.Series | pd.DataFrame) else new is old
