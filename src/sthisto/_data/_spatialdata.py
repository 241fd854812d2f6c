"""SpatialData at the door: the verbs are written for one AnnData, here a SpatialData becomes one and results go back.

Spots are the centroids of what the table annotates, in those elements' own coordinates, which readers write into
``obsm["spatial"]``, too. For patches they are laid onto the image by the transformations to a coordinate system that
both lie in: turned, flipped and shifted as these say but not scaled, as the picture carries its own scale. A length
stays what it is among the shapes, so that most often nothing moves at all, whichever of several pictures is taken.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import pandas as pd
from anndata import AnnData

from sthisto import grids
from sthisto._data._elements import ATTRIBUTES, Region, laid_on, moved, regions_of, table_of, way_to
from sthisto._data._pictures import ELEMENT
from sthisto._data._records import UNS, listed, write
from sthisto.images import Image

P = ParamSpec("P")
R = TypeVar("R")

SLOTS = ("obs", "var", "obsm", "varm", "obsp", "layers", "uns")
STAND_INS = {("obsm", "spatial"), ("uns", "spatial")}  # what the stand-in has in place of the table's own


def accepts_spatialdata(verb: Callable[P, R]) -> Callable[P, R]:
    """Let a verb that is written for AnnData take a SpatialData as well.

    The verb calls its object ``adata`` and has the parameters ``table_key`` and ``image_key``, which it leaves to this
    front. It is given a stand-in of the table whose positions and ``image`` come from the elements. What it writes goes
    into the table once it is through; what it returns becomes a table or, from a ``grid``, a SpatialData.

    Raises
    ------
    KeyError
        No table or image of that name, or several and no name.
    ValueError
        ``table_key`` or ``image_key`` with an AnnData; a table that annotates no shapes; elements that cannot be laid
        over each other.
    """
    signature = inspect.signature(verb)

    @wraps(verb)
    def front(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        options = bound.arguments
        if is_spatialdata(options.get("reference")):
            options["reference"] = table_of(options["reference"], options["table_key"])[1]
            options["table_key"] = options["table_key"] if is_spatialdata(options["adata"]) else None
        if not is_spatialdata(options["adata"]):
            _refuse_keys(options)
            return verb(*bound.args, **bound.kwargs)
        opened = Opened.of(options)
        result = verb(*bound.args, **bound.kwargs)
        opened.put_back()
        given: R = opened.given(result)
        return given

    return front


def is_spatialdata(thing: object) -> bool:
    """Whether it is a SpatialData, asked without loading the library."""
    return any(
        kind.__name__ == "SpatialData" and kind.__module__.startswith("spatialdata.") for kind in type(thing).mro()
    )


class Pictures(Mapping[str, Image]):
    """Pictures of the regions. A region without one is an error for whoever looks at it, and only then."""

    def __init__(self, regions: Mapping[str, Region]) -> None:
        self._regions = regions

    def __getitem__(self, name: str) -> Image:
        region = self._regions[name]
        if region.image is None:
            raise KeyError(region.without)
        return region.image

    def __iter__(self) -> Iterator[str]:
        return iter(self._regions)

    def __len__(self) -> int:
        return len(self._regions)


@dataclass(frozen=True)
class Opened:
    """A table of a SpatialData, and the AnnData that stands for it while a verb is at work."""

    sdata: Any
    table: AnnData
    stand_in: AnnData
    regions: dict[str, Region]
    options: Mapping[str, Any]  # as the caller gave them

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Opened":
        """Read what the options of a verb name, and put the stand-in in its place."""
        sdata, asked = options["adata"], dict(options)
        key, table = table_of(sdata, asked.get("table_key"))
        regions = regions_of(sdata, key, table)
        names = _image_names(table, asked, regions)
        regions = {name: laid_on(sdata, region, names.get(name), key) for name, region in regions.items()}
        opened = cls(sdata, table, _stand_in(table, regions), regions, asked)
        opened._check()
        options["adata"] = opened.stand_in
        if len(regions) > 1 and "library_key" in options:
            options["library_key"] = table.uns[ATTRIBUTES]["region_key"]
        if "image" in options and any(region.image or region.without for region in regions.values()):
            only = next(iter(regions.values())).image if len(regions) == 1 else None
            options["image"] = only or Pictures(regions)
        if "grid" in options:
            options["grid"] = opened._grid()
        return opened

    def _check(self) -> None:
        """Refuse at once what would show at the end of a long run."""
        tells, given = self.table.uns[ATTRIBUTES]["region_key"], self.options.get("library_key")
        if len(self.regions) > 1 and given not in (None, tells):
            raise ValueError(
                f"library_key={given!r}: the table annotates {len(self.regions)} elements ({listed(self.regions)}), "
                f"each a section of its own, which obs[{tells!r}] names. Leave library_key= out."
            )
        genes = list(_fit_of(self.table, self.options).get("genes", self.rasters))
        missing = [gene for gene in self.rasters if gene not in genes]
        if missing:
            raise KeyError(
                f"rasters= names genes that the fit does not have: {listed(missing)} (it has {listed(genes)})."
            )

    @property
    def rasters(self) -> list[str]:
        """Genes to be made into pictures."""
        asked = self.options.get("rasters") or ()
        return [asked] if isinstance(asked, str) else list(asked)

    def _grid(self) -> Any:
        """Lay the grid that was asked for onto the image, as its points count in the shapes' coordinates."""
        grid, region = self.options["grid"], next(iter(self.regions.values()))
        if isinstance(grid, int | np.integer) or len(self.regions) > 1:
            return grid
        if isinstance(grid, str):
            return region.laid(self.points_of(grid)[0].xy)
        if isinstance(grid, grids.Lattice):
            corners = region.laid(grid.points([[0, 0], [1, 0], [0, 1]]))
            return grids.Lattice(corners[0], corners[1:] - corners[0])
        xy = np.asarray(grid, dtype=np.float64)
        return region.laid(xy) if xy.ndim == 2 and xy.shape[1] == 2 else grid

    def points_of(self, name: str) -> tuple[Region, AnnData]:
        """Give the places of another table, such as a finer binning, in the coordinates of the only region."""
        if self.options.get("max_distance") is not None:
            raise ValueError(f"max_distance= beside grid={name!r}, which is taken whole.")
        table = table_of(self.sdata, name)[1]
        [region] = self.regions.values()
        found = regions_of(self.sdata, name, table)
        if len(found) > 1:
            raise ValueError(f"grid={name!r}: this table annotates {len(found)} elements ({listed(found)}), not one.")
        [other] = found.values()
        return replace(other, xy=moved(way_to(other, region.name, region.element), other.xy)), table

    def put_back(self) -> None:
        """Put into the table what was written into the stand-in."""
        for slot in SLOTS:
            before, after = getattr(self.table, slot), getattr(self.stand_in, slot)
            new = {name: after[name] for name in after if not _same(before, after, name)}
            write(self.table, **{slot: {name: new[name] for name in new if (slot, name) not in STAND_INS}})
        self._name_images()

    def _name_images(self) -> None:
        """Note beside a new fit on which images its positions were laid, so that the same are taken for it again."""
        fit = _fit_of(self.table, {"key": self.options.get("key_added")})
        if "features_key" in self.options and "state" in fit:
            fit["regions"] = np.array(list(self.regions), dtype=str)
            fit["images"] = np.array([region.image_name for region in self.regions.values()], dtype=str)

    def given(self, result: Any) -> Any:
        """Turn what a verb returned into what belongs beside a SpatialData."""
        if not isinstance(result, AnnData):
            return result
        result.uns.pop("spatial", None)
        if "grid" in self.options:
            from sthisto._data._shapes import dense_sections  # noqa: PLC0415  it needs this module

            return dense_sections(self, result)
        for region in self.regions.values():
            result.obsm["spatial"][region.rows] = region.xy
        result.uns[ATTRIBUTES] = dict(self.table.uns[ATTRIBUTES])
        return result


def _image_names(table: AnnData, asked: Mapping[str, Any], regions: Mapping[str, Region]) -> dict[str, str | None]:
    """Names of the images to lay regions on: as asked for, else those of the fit, else those of the features.

    None stands for the only one; empty is a picture that is no element, for which nothing is laid on anything.
    """
    wanted = asked.get("image_key")
    if asked.get("image") is not None:
        if wanted is not None:
            raise ValueError(f"image= beside image_key={wanted!r}: pass a picture or name one, not both.")
        return dict.fromkeys(regions, "")
    if wanted is not None or "patch_um" in asked:  # features are made anew
        return dict(wanted) if isinstance(wanted, Mapping) else dict.fromkeys(regions, wanted)
    fit = _fit_of(table, asked)
    if any(map(str, fit.get("images", ()))):
        return {str(name): str(image) for name, image in zip(fit["regions"], fit["images"], strict=True)}
    key = asked.get("features_key") or fit.get("features_key") or "X_histo"
    record = table.uns.get(UNS, {}).get("features", {}).get(key)
    if record is None:
        return {}
    names = {str(name): str(image) for name, image in zip(record["libraries"], record["image"], strict=True)}
    return {name: path.removeprefix(ELEMENT) if path.startswith(ELEMENT) else "" for name, path in names.items()}


def _stand_in(table: AnnData, regions: Mapping[str, Region]) -> AnnData:
    """Make an AnnData that shares the table's arrays, with the spots as they lie on the images."""
    xy = np.full((table.n_obs, 2), np.nan)
    for region in regions.values():
        xy[region.rows] = region.laid(region.xy)
    made = AnnData(X=table.X, obs=table.obs, var=table.var)
    for slot in ("varm", "obsp", "layers"):
        write(made, **{slot: dict(getattr(table, slot))})
    write(made, obsm={**table.obsm, "spatial": xy})
    made.uns.update(table.uns)
    made.uns["spatial"] = {name: {} for name in regions} if len(regions) == 1 else {}
    return made


def _same(before: Any, after: Any, name: str) -> bool:
    if name not in before:
        return False
    old, new = before[name], after[name]
    return bool(new.equals(old)) if isinstance(new, pd.Series) else new is old


def _fit_of(table: AnnData, options: Mapping[str, Any]) -> dict[str, Any]:
    """Give the record of the fit that the options name, empty where there is none."""
    found: dict[str, Any] = table.uns.get(UNS, {}).get("fit", {}).get(options.get("key"), {})
    return found


def _refuse_keys(options: Mapping[str, Any]) -> None:
    for name in ("table_key", "image_key", "rasters"):
        if options.get(name) is not None:
            kind = type(options["adata"]).__name__
            raise ValueError(f"{name}= is about the elements of a SpatialData; adata is of type {kind}.")
