"""Predict expression on a dense grid."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sthisto import _data, encoders, grids
from sthisto._data import Cells, GridPoints, SectionData
from sthisto._messages import listed
from sthisto.encoders._encode import encode
from sthisto.images import check_scale
from sthisto.models import Model, Section
from sthisto.tl._grid import make_grid
from sthisto.tl._predict import refuse_other_key
from sthisto.tl._prior import Prior
from sthisto.tl._sections import model_section, read_inputs, restore
from sthisto.tl._spot_means import match_spot_means as matched
from sthisto.tl._uncertainty import UncertaintyModel
from sthisto.uncertainty import Covariates, check_level

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData


@_data.accepts_spatialdata(
    image="image", library_key="library_key", reference="reference", grid="grid", images_of="key"
)
def upsample(
    adata: "AnnData | SpatialData",
    grid: "int | str | grids.Lattice | ArrayLike | AnnData | GeoDataFrame" = 2,
    *,
    reference: "AnnData | SpatialData | None" = None,
    image: Any = None,
    features: NDArray[np.float32] | None = None,
    encoder: str | encoders.Encoder | None = None,
    max_distance: float | None = None,
    library_key: str | None = None,
    interval: float | None = None,
    match_spot_means: bool | Literal["area"] = False,
    prior: Any = None,
    key: str = "sthisto",
) -> "AnnData | SpatialData":
    """Predict expression on a dense grid or at cells, as a new object.

    Image features of the points are extracted as those of the spots were, from the same image at the same scale, so
    that the map equals what :func:`predict` gives at the spots. With ``reference``, an object that was fitted,
    ``adata`` is a section that was only stained, and its map rests on the image alone.

    Parameters
    ----------
    adata
        A fitted section, or several; or with ``reference`` one whose features were extracted.
    grid
        An integer refines the spots' own array: ``2`` gives 4 times as many points. Else a
        :class:`sthisto.grids.Lattice` (:meth:`~sthisto.grids.Lattice.split` makes the finer bins of Visium HD), or
        points (m, 2) in full-resolution pixels, x then y, in one section; or cells: an AnnData with
        ``obsm["spatial"]`` (:func:`sthisto.pp.find_nuclei`; ``obs[library_key]`` names their sections), a
        GeoDataFrame of outlines, or the path of a GeoJSON of QuPath. Of a SpatialData all of these are in the
        coordinates of the shapes, and the name of other shapes of it, or of another table, is a grid, too.
    reference
        Fitted object, or what :func:`load` returned.
    image
        Image to take the points' features or patches from; ``None`` takes the one that ``extract_features`` or
        :func:`fit` used.
    features
        Features (m, d) of the points where the user computed them elsewhere; no image is read then.
    encoder
        The encoder that ``extract_features`` used, where it is an object of one's own, has local weights, or is to run
        on another device or batch size (:func:`sthisto.encoders.load`); ``None`` loads it by its name.
    max_distance
        Points further than this from every spot are left out, full-resolution pixels. ``None``: for lattices, just far
        enough that the map has no gaps between neighboring spots; given points are all kept.
    library_key
        Column of ``obs`` that names the sections of ``adata``, with ``reference``; without, the fit has its own.
    interval
        Also give bounds that contain a new measurement with this probability, such as 0.9.
    match_spot_means
        Correct the map, smoothly, so that its points inside the footprint of a spot average to what :func:`predict`
        gives for that spot. Footprints are discs of ``scalefactors["spot_diameter_fullres"]``, else of 0.55 pitches;
        those that contain no point, or only the spot's center as with ``grid=2``, need no correction. ``"area"``
        weights each cell by its area: what the cells in a spot add up to, in proportion to their areas, is the spot's.
    prior
        For a fit with a prior, that of the points: a callable that takes positions (m, 2) in full-resolution pixels and
        returns a DataFrame with genes as columns, an AnnData of points (the nearest counts), a raster with coordinates
        ``c``, ``y`` and ``x``, or a mapping of sections to these. ``None`` uses a fitted prior again.
    key
        Name of the fit.

    Returns
    -------
    AnnData, one row a point, or a cell with its name and ``obs``:
    ``X`` (m, g) float32, non-negative, on the scale of the training expression;
    ``layers["std"]`` the standard deviation of a new measurement, and with ``interval`` its bounds ``layers["low"]``
    and ``layers["high"]``; ``obsm["spatial"]`` full-resolution pixels; ``obs["array_row"]``,
    ``obs["array_col"]`` integers on the refined lattice; ``obs["nearest_spot"]``,
    ``obs["distance_um"]`` (NaN where the scale is unknown) and ``obs["measured"]``, whether a training spot is there;
    ``obs["extrapolated"]``, whether the point is outside the training domain (as in :func:`predict`);
    ``uns["spatial"]`` as in ``adata``, with the grid's pitch as spot diameter, so that
    ``sq.pl.spatial_scatter(dense, shape="square")`` draws a gapless map.

    For a SpatialData a new SpatialData: the table ``"dense"``; the shapes that it annotates, which are the outlines or
    shapes that were the grid, else ``"<shapes>_dense"``, the cells of the lattice where the measured shapes are, with
    the same transformations; and the image that was used. :func:`rasterize` adds images of genes.

    Raises
    ------
    KeyError
        Not fitted, no image to take features from, or an encoder that is not found by name.
    FileNotFoundError
        The image file has moved.
    ValueError
        No lattice to refine, no point within ``max_distance``, points outside the image, features of another length or
        for a model that reads none, state that is damaged, newer or of another object; ``interval`` that is no
        probability; names of cells that are not unique, or unknown areas with ``match_spot_means="area"``; a fit with a
        prior that is known at the spots only, without ``prior``.

    References
    ----------
    HisToSGE, section "generation": there 4 times as many points at the mid-points of the lattice's edges.

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic()
    >>> sthisto.pp.extract_features(adata)
    >>> sthisto.tl.fit(adata, "ridge")
    >>> dense = sthisto.tl.upsample(adata, 2)
    >>> dense.n_obs > 3 * adata.n_obs
    True

    Values per cell, from an image that shows nuclei:

    >>> adata = sthisto.datasets.synthetic(60, mpp=1.0)
    >>> sthisto.pp.extract_features(adata)
    >>> sthisto.tl.fit(adata, "ridge")
    >>> nuclei = sthisto.pp.find_nuclei(adata)
    >>> cells = sthisto.tl.upsample(adata, nuclei, match_spot_means="area")
    >>> cells.n_obs == nuclei.n_obs, "area_um2" in cells.obs
    (True, True)
    """
    if interval is not None:
        check_level(interval)
    if match_spot_means not in (True, False, "area"):
        raise ValueError(f"match_spot_means={match_spot_means!r}: expected True, False or 'area'.")
    fit = _data.read_fit(adata if reference is None else reference, key)
    model, uncertainty = restore(fit), UncertaintyModel.restore(fit)
    if reference is None:
        refuse_other_key(library_key, fit.library_key)
        sections, library_key = _data.read_fitted_sections(adata, fit), fit.library_key
    else:
        sections, library_key = _data.read_stained_sections(adata, library_key), library_key or ""
    if features is not None and not fit.features_key:
        raise ValueError(f"features=: model {fit.model!r} reads no image features.")
    known = Prior.restore(fit, prior)
    sections = read_inputs(adata, sections, fit, model, image=image)
    if known is not None and match_spot_means:
        sections = known.of_spots(fit).at_spots(adata, sections, fit.genes)
    points = _grids(_data.read_cells(grid), sections, max_distance, library_key)
    described: dict[str, NDArray[np.float32] | None] = dict.fromkeys(points)
    if features is not None:
        described = dict(zip(points, _given(features, [len(each.xy) for each in points.values()]), strict=True))
    elif fit.features_key:
        extracted = _extracted(adata, fit.features_key, sections, points, image=image, encoder=encoder)
    means, parts = [], []
    for name, each in points.items():
        if fit.features_key and features is None:
            described[name] = next(extracted)
        of_points = described.pop(name)
        known_there = None if known is None else known.at_points(sections[name], each.xy, of_points, fit.genes)
        there = _points_of(sections[name], each, model, of_points, known_there)
        mean, covariates = np.maximum(model.predict(there), 0), uncertainty.covariates(there)
        if match_spot_means:
            mean = _with_spot_means(adata, model, sections[name], each, mean, by_area=match_spot_means == "area")
        means.append(mean)
        parts.append(covariates)
    mean, covariates = np.concatenate(means), Covariates.join(parts)
    measured = fit.spots if reference is None else fit.spots[:0]
    obs = _data.points_obs(adata, sections, points, library_key=library_key, measured=measured)
    return _data.new_object(
        adata,
        fit.genes,
        {"": mean, **uncertainty.layers(mean, covariates, interval)},
        obs.assign(extrapolated=uncertainty.extrapolated(covariates)),
        np.concatenate([each.xy for each in points.values()]),
        diameters={name: each.pitch for name, each in points.items()},
    )


def _grids(
    grid: Any, sections: Mapping[str, SectionData], max_distance: float | None, library_key: str
) -> dict[str, GridPoints]:
    """Points of every section; given ones belong to one section, unless they are cells that name theirs."""
    if isinstance(grid, Cells) and library_key in grid.obs and len(sections) > 1:
        return _grids_of_cells(grid, sections, max_distance, library_key)
    if len(sections) > 1 and not isinstance(grid, int | float | np.number):
        raise ValueError(f"the points of grid= belong to one section, but adata has {len(sections)}: pass one.")
    return {name: make_grid(grid, each, max_distance) for name, each in sections.items() if each.in_tissue.any()}


def _grids_of_cells(
    cells: Cells, sections: Mapping[str, SectionData], max_distance: float | None, library_key: str
) -> dict[str, GridPoints]:
    """Cells of every section that has any."""
    names = cells.obs[library_key].astype(str).to_numpy()
    unknown = sorted(set(names) - set(sections))
    if unknown:
        raise ValueError(f"cells of grid= are in sections {listed(unknown)}; adata has {listed(sections)}.")
    return {
        name: make_grid(cells.keep(names == name), each, max_distance)
        for name, each in sections.items()
        if (names == name).any()
    }


def _points_of(
    section: SectionData, points: GridPoints, model: Model, features: NDArray[np.float32] | None, prior: Any
) -> Section:
    """Points of one section, as models take them."""
    if section.image is not None and points.index is None:  # a lattice may extend over the image's border
        check_scale(section.image.image, points.xy)
    return model_section(section, model, xy=points.xy, features=features, prior=prior)


def _with_spot_means(
    adata: "AnnData",
    model: Model,
    section: SectionData,
    points: GridPoints,
    mean: NDArray[np.float32],
    *,
    by_area: bool,
) -> NDArray[np.float32]:
    """Dense means (m, g) of one section, corrected by the predictions at its spots."""
    spots = np.maximum(model.predict(model_section(section, model)), 0)
    diameter = _data.spot_diameter(adata, section)
    areas = _data.cell_areas(points.cells) if by_area else None
    return matched(mean, points.xy, spots, section.xy, pitch=section.pitch, diameter=diameter, weights=areas)


def _given(features: NDArray[np.float32], sizes: list[int]) -> list[NDArray[np.float32]]:
    """Features of the points as the user gave them, section by section."""
    whole = _data.finite_features(np.asarray(features, dtype=np.float32), sum(sizes), "features=")
    return list(np.split(whole, np.cumsum(sizes)[:-1]))


def _extracted(
    adata: "AnnData",
    key: str,
    sections: Mapping[str, SectionData],
    points: Mapping[str, GridPoints],
    *,
    image: Any,
    encoder: str | encoders.Encoder | None,
) -> Iterator[NDArray[np.float32]]:
    """Features of the points, section by section, extracted as those of the spots were."""
    loaded = None if encoder is None else encoders.load(encoder)
    for name, each in points.items():
        section, metadata = sections[name], _data.need_metadata(sections[name], key)
        loaded = encoders.restore(metadata.encoder) if loaded is None else loaded
        opened = section.image or _data.open_feature_image(adata, section, image)
        if each.index is None:  # a lattice may extend over the image's border, the spots it was fitted to may not
            check_scale(opened.image, each.xy)
        side, window = metadata.patch_um / metadata.mpp, metadata.window_um
        yield encode(opened.image, each.xy, side, loaded, window=None if window is None else window / metadata.mpp)
