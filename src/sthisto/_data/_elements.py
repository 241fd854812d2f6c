"""Elements of a SpatialData: where the rows of a table are, and how they are registered to an image."""

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from sthisto import grids
from sthisto._data._images import ELEMENT
from sthisto._messages import listed
from sthisto.images import Image, open_image

Floats = NDArray[np.float64]

ATTRIBUTES = "spatialdata_attrs"
TOLERANCE = 1.0  # pixels of the image that two transformations to it may differ by


@dataclass(frozen=True)
class Region:
    """The spots on one element that a table annotates: a section.

    Attributes
    ----------
    name, element
        In the SpatialData.
    rows
        (n,) of the table.
    xy
        (n, 2) centroids in the element's own coordinates.
    image_name, image
        The image that it was registered to; None where there is none.
    to_image
        (3, 3) from these coordinates to the image, lengths kept; None where they are the same.
    no_image
        Why there is no image, for whoever needs one.
    """

    name: str
    element: Any
    rows: NDArray[np.intp]
    xy: Floats
    image_name: str = ""
    image: Image | None = None
    to_image: Floats | None = None
    no_image: str = ""

    def on_image(self, xy: Floats) -> Floats:
        """Points (m, 2) of the element's coordinates, in those of the image."""
        return xy if self.to_image is None else transformed(self.to_image, xy)

    def from_image(self, xy: Floats) -> Floats:
        """Undo :meth:`on_image`."""
        if self.to_image is None:
            return xy
        return transformed(np.asarray(np.linalg.inv(self.to_image), np.float64), xy)


def table_of(sdata: Any, key: str | None) -> tuple[str, AnnData]:
    """Give the table of that name, or the only one, with its name."""
    names = list(sdata.tables)
    if key is None and len(names) != 1:
        raise KeyError(
            f"the SpatialData has {len(names)} tables ({listed(names)}). Name one: "
            "sthisto.SpatialDataView(sdata, table_key=...)."
        )
    if key is not None and key not in names:
        raise KeyError(f"no table {key!r} in the SpatialData (found: {listed(names)}).")
    name = names[0] if key is None else key
    return name, sdata.tables[name]


def regions_of(sdata: Any, key: str, table: AnnData) -> dict[str, Region]:
    """Give the spots on each element that the table annotates."""
    attributes: dict[str, Any] = table.uns.get(ATTRIBUTES, {})
    region_key, instance = attributes.get("region_key"), attributes.get("instance_key")
    if region_key not in table.obs or instance not in table.obs:
        raise ValueError(
            f"table {key!r} annotates no shapes, so where its rows are is unknown. Name the shapes: "
            "sdata.set_table_annotates_spatialelement(table_name, region, region_key, instance_key)."
        )
    elements = {**sdata.shapes, **sdata.points, **sdata.labels}
    names, instances = table.obs[region_key].astype(str).to_numpy(), table.obs[instance]
    found = {}
    for name in map(str, pd.unique(names)):
        if name not in elements:
            raise ValueError(f"table {key!r} annotates {name!r}, which is not there (found: {listed(elements)}).")
        rows = np.flatnonzero(names == name)
        centers = _centers(elements[name], name)
        at = centers.index.get_indexer(pd.Index(instances.iloc[rows]))
        if (at < 0).any():
            raise ValueError(
                f"table {key!r} annotates {int((at < 0).sum())} of {len(at)} places that {name!r} does not have, such "
                f"as {instances.iloc[rows[at < 0][0]]}: obs[{instance!r}] and the element's index should agree."
            )
        found[name] = Region(name, elements[name], rows, centers.to_numpy()[at])
    return found


def element_region(name: str, element: Any, xy: Floats) -> Region:
    """All of an element, whose centers (n, 2) are known."""
    return Region(name, element, np.arange(len(xy)), xy)


def _centers(element: Any, name: str) -> pd.DataFrame:
    """Centroids of circles, polygons, points or labels in their own coordinates, columns x and y."""
    from spatialdata import get_centroids  # noqa: PLC0415

    if hasattr(element, "geometry"):
        middles = element.geometry.centroid
        found = pd.DataFrame({"x": middles.x.to_numpy(), "y": middles.y.to_numpy()}, index=element.index)
    else:
        system, matrix = next(iter(matrices(element, name).items()))
        there = get_centroids(element, coordinate_system=system).compute()
        own = transformed(np.asarray(np.linalg.inv(matrix), np.float64), there[["x", "y"]].to_numpy(np.float64))
        found = pd.DataFrame(own, columns=["x", "y"], index=there.index)
    if not found.index.is_unique:
        raise ValueError(f"the index of {name!r} is not unique, so the table's rows could not be assigned to places.")
    return found


def matrices(element: Any, name: str) -> dict[str, Floats]:
    """(3, 3) maps from an element's own coordinates, x then y, to each of its coordinate systems."""
    from spatialdata.transformations import get_transformation  # noqa: PLC0415

    steps, axes = get_transformation(element, get_all=True), ("x", "y")
    found = {str(system): step.to_affine_matrix(axes, axes) for system, step in steps.items()}
    if not found:
        raise ValueError(
            f"{name!r} has no transformation, so where it is is unknown. Set one with "
            "spatialdata.transformations.set_transformation."
        )
    for system, matrix in found.items():
        if not (np.isfinite(matrix).all() and abs(np.linalg.det(matrix)) > 1e-12):
            raise ValueError(f"the transformation of {name!r} to {system!r} cannot be undone: {matrix.tolist()}.")
    return found


def transformed(matrix: Floats, xy: Floats) -> Floats:
    """Apply an affine map to points (n, 2)."""
    return np.asarray(xy @ matrix[:2, :2].T + matrix[:2, 2])


def transformation_to(region: Region, name: str, element: Any) -> Floats:
    """(3, 3) map from a region's coordinates to those of another element, through a system that both have."""
    ours, theirs = matrices(region.element, region.name), matrices(element, name)
    shared = [system for system in ours if system in theirs]
    if not shared:
        raise ValueError(
            f"{name!r} is in {listed(theirs)} and {region.name!r} in {listed(ours)}: without a coordinate system in "
            "common they cannot be registered. Set a transformation of one to a system of the other."
        )
    candidates = [np.linalg.inv(theirs[system]) @ ours[system] for system in shared]
    corners = np.array(np.meshgrid(*np.array([region.xy.min(axis=0), region.xy.max(axis=0)]).T)).reshape(2, -1).T
    apart = [
        float(np.abs(transformed(matrix, corners) - transformed(candidates[0], corners)).max()) for matrix in candidates
    ]
    if max(apart) > TOLERANCE:
        raise ValueError(
            f"the transformations of {region.name!r} and {name!r} contradict each other: through "
            f"{shared[int(np.argmax(apart))]!r} points are up to {max(apart):.4g} px of {name!r} from where they are "
            f"through {shared[0]!r}. Remove the wrong one with spatialdata.transformations.remove_transformation."
        )
    return np.asarray(candidates[0])


def registered_to(sdata: Any, region: Region, name: str | None, table_key: str) -> Region:
    """Register a region to the image of that name, or to the only one; without any it stays as it is."""
    if name == "":
        return region
    if name is not None and name not in sdata.images:
        raise KeyError(f"no image {name!r} in the SpatialData (found: {_image_list(sdata)}).")
    if name is None:
        systems = set(matrices(region.element, region.name))
        near = [each for each in sdata.images if _may_be_stained(sdata.images[each], systems)]
        if len(near) != 1:
            why = (
                f"{len(near)} images share a coordinate system with {region.name!r} ({listed(sorted(systems))}), where "
                f"one is wanted; the SpatialData has {_image_list(sdata)}. Name one: "
                "sthisto.SpatialDataView(sdata, image_key=...), or pass image=."
            )
            return replace(region, no_image=why)
        [name] = near
    matrix = transformation_to(region, name, sdata.images[name])
    scale = float(np.sqrt(abs(np.linalg.det(matrix))))  # pixels of the image per unit of the shapes' coordinates
    to_image = matrix / np.array([[scale], [scale], [1.0]])
    same = np.abs(transformed(to_image, region.xy) - region.xy).max() < 1e-6 * max(1.0, float(np.abs(region.xy).max()))
    image = open_image(sdata.images[name], scale=scale, mpp=_bin_mpp(region, table_key))
    image = replace(image, source=ELEMENT + name)
    return replace(region, image_name=name, image=image, to_image=None if same else to_image)


def _bin_mpp(region: Region, table_key: str) -> float | None:
    """Micrometres per unit of Visium HD's shapes, whose names hold the side of a bin; the readers drop the scale."""
    side = re.search(r"square_(\d{3})um", f"{region.name} {table_key}")
    return float(side[1]) / grids.spacing(region.xy) if side and len(region.xy) > 1 else None


def _image_list(sdata: Any) -> str:
    """Name the images with their sizes."""
    sizes = {name: _finest(image).sizes for name, image in sdata.images.items()}
    return ", ".join(f"{name!r} ({size['y']} x {size['x']})" for name, size in sizes.items()) or "no images"


def _may_be_stained(image: Any, systems: set[str]) -> bool:
    """Whether an image can be a stained picture of something in these coordinate systems."""
    from spatialdata.transformations import get_transformation  # noqa: PLC0415

    return _finest(image).sizes["c"] <= 4 and bool(systems & set(get_transformation(image, get_all=True)))


def _finest(image: Any) -> Any:
    """Give the finest level of an image, which may have but one."""
    return next(iter(image["scale0"].data_vars.values())) if hasattr(image, "children") else image
