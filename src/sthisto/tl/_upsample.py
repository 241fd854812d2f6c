"""Predict expression on a dense grid."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sthisto import _data, encoders, grids
from sthisto.encoders._encode import encode
from sthisto.images import check_scale
from sthisto.models import Model, Section
from sthisto.uncertainty import Covariates, check_level

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

from sthisto.tl._predict import spots_of
from sthisto.tl._sections import Pixels, restore
from sthisto.tl._spot_means import match_spot_means as conserved
from sthisto.tl._uncertainty import UncertaintyModel


@_data.accepts_spatialdata
def upsample(  # noqa: PLR0913  all with defaults
    adata: "AnnData | SpatialData",
    grid: "int | str | grids.Lattice | ArrayLike" = 2,
    *,
    image: Any = None,
    features: NDArray[np.float32] | None = None,
    encoder: str | encoders.Encoder | None = None,
    max_distance: float | None = None,
    key: str = "sthisto",
    interval: float | None = None,
    match_spot_means: bool = False,
    batch_size: int = 64,
    device: str | None = None,
    progress: bool = True,
    rasters: Iterable[str] | None = None,
    table_key: str | None = None,
    image_key: str | None = None,
) -> "AnnData | SpatialData":
    """Predict expression on a dense grid, as a new object.

    The points are described as the spots were, from the same picture at the same scale, so that the map runs through
    what :func:`predict` gives at the spots.

    Parameters
    ----------
    adata
        A fitted section, or several.
    grid
        An integer refines the spots' own array: ``2`` gives 4 times as many points. Else a
        :class:`sthisto.grids.Lattice` (:meth:`~sthisto.grids.Lattice.split` makes the finer bins of Visium HD), or
        points (m, 2) in full-resolution pixels, x then y, in one section; of a SpatialData in the coordinates of the
        shapes, or the name of another of its tables, whose places are taken.
    image
        Picture to take the points' features or pixels from; ``None`` takes the one that ``extract_features`` or
        :func:`fit` used.
    features
        Features (m, d) of the points where the user computed them elsewhere; no image is read then.
    encoder
        The encoder that ``extract_features`` used, where it is an object of one's own or has local weights; ``None``
        loads it by its name.
    max_distance
        Points further than this from every spot are left out, full-resolution pixels. ``None``: for lattices, just far
        enough that the map has no gaps between neighboring spots; given points are all kept.
    key
        Name of the fit.
    interval
        Also give bounds that hold a new measurement with this probability, such as 0.9.
    conserve
        Correct the map, smoothly, so that its points inside the footprint of a spot average to what :func:`predict`
        says of that spot. Footprints are discs of ``scalefactors["spot_diameter_fullres"]``, else of 0.55 pitches;
        those that hold no point, or only the spot's centre as with ``grid=2``, ask for nothing.
    batch_size
        Patches described at once.
    device
        Where a learnt encoder runs.
    progress
        Show progress bars.
    rasters
        With SpatialData, genes to draw as channels of a picture, ``"<shapes>_genes"``, pixels of a third of the pitch.
    table_key, image_key
        Names of the table and of the image where ``adata`` is a SpatialData that has several.

    Returns
    -------
    AnnData, one row a point: ``X`` (m, g) float32, non-negative, on the scale of the training expression;
    ``layers["std"]`` the standard deviation of a new measurement, and with ``interval`` its bounds ``layers["low"]``
    and ``layers["high"]``; ``obsm["spatial"]`` full-resolution pixels; ``obs["array_row"]``,
    ``obs["array_col"]`` integers on the refined lattice; ``obs["nearest_spot"]``,
    ``obs["distance_um"]`` (NaN where the scale is unknown) and ``obs["measured"]``, whether a training spot sits there;
    ``obs["extrapolated"]``, whether the point is far from anything seen, in place or look (as in :func:`predict`);
    ``uns["spatial"]`` as in ``adata``, with the grid's pitch as spot diameter, so that
    ``sq.pl.spatial_scatter(dense, shape="square")`` draws a gapless map.

    For a SpatialData a new SpatialData: the table ``"dense"``; the shapes ``"<shapes>_dense"`` that it annotates, which
    are the cells of the lattice and lie where the measured shapes do, with the same transformations; the image that was
    used, and the pictures of ``rasters``.

    Raises
    ------
    KeyError
        Not fitted, no image to take features from, or an encoder that is not found by name.
    FileNotFoundError
        The image file is not where it was.
    ValueError
        No lattice to refine, no point in reach, points outside the image, features of another length, state that is
        damaged, older, newer or of another object; ``interval`` that is no probability.

    References
    ----------
    HisToSGE, section "generation": there 4 times as many points at the mid-points of the lattice's edges.

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic()
    >>> sthisto.pp.extract_features(adata, progress=False)
    >>> sthisto.tl.fit(adata, "ridge", progress=False)
    >>> dense = sthisto.tl.upsample(adata, 2, progress=False)
    >>> dense.n_obs > 3 * adata.n_obs
    True
    """
    if interval is not None:
        check_level(interval)
    found = _data.read_fit(adata, key)
    fitted, trust = restore(found), UncertaintyModel.restore(found)
    places = _data.fitted_places(adata, found)
    if len(places) > 1 and not isinstance(grid, int | np.integer):
        raise ValueError(f"points lie in one section, but adata holds {len(places)} ({', '.join(places)}): pass one.")
    laid = {name: _lay(grid, place, max_distance) for name, place in places.items()}
    looks: Iterable[NDArray[np.float32] | None] = [None] * len(laid)
    if found.features_key and features is not None:
        looks = _given(features, [len(points.xy) for points in laid.values()])
    elif found.features_key:
        looks = _looks(
            adata, found, places, laid, image, encoder, batch_size=batch_size, device=device, progress=progress
        )
    means, looked = [], []
    for (name, points), look in zip(laid.items(), looks, strict=True):
        section = _points(adata, found, fitted, name, places[name], points, look, image)
        means.append(np.maximum(fitted.predict(section), 0))
        if match_spot_means:
            means[-1] = _conserved(adata, found, fitted, name, places[name], points.xy, means[-1], image)
        looked.append(trust.look(section))
    mean, seen = np.concatenate(means), Covariates.join(looked)
    obs = _data.points_obs(adata, found, places, laid).assign(extrapolated=trust.extrapolated(seen))
    xy = np.concatenate([points.xy for points in laid.values()])
    diameters = {name: points.pitch for name, points in laid.items()}
    return _data.new_slide(adata, found.genes, mean, trust.layers(mean, seen, interval), obs, xy, diameters)


def _points(  # noqa: PLR0917  private, called once
    adata: "AnnData",
    found: _data.Fit,
    fitted: Model,
    name: str,
    place: _data.Place,
    points: _data.Points,
    look: NDArray[np.float32] | None,
    image: Any,
) -> Section:
    """Points laid over one section as models see them."""
    pixels = Pixels.again(adata, found, name, place, image, found.features_key or "X_histo")
    if pixels and points.site is None:  # a lattice may reach over the picture's border
        check_scale(pixels.picture, points.xy)
    patches = pixels.around(points.xy, fitted) if pixels else None
    return Section(name=place.known, xy=points.xy / place.pitch, features=look, patches=patches)


def _conserved(  # noqa: PLR0917  private, called once
    adata: "AnnData",
    found: _data.Fit,
    fitted: Model,
    name: str,
    place: _data.Place,
    xy: NDArray[np.float64],
    mean: NDArray[np.float32],
    image: Any,
) -> NDArray[np.float32]:
    """Dense means (m, g) of one section, corrected by what the model says of its spots."""
    spots = spots_of(adata, found, fitted, name, place, image)
    believed = np.maximum(fitted.predict(spots), 0)
    diameter = _data.spot_diameter(adata, name, place.pitch)
    return conserved(mean, xy, believed, place.xy, pitch=place.pitch, diameter=diameter)


def _lay(grid: "int | grids.Lattice | ArrayLike", place: _data.Place, max_distance: float | None) -> _data.Points:
    """Points of the grid in reach of the section's spots."""
    if isinstance(grid, int | np.integer):
        own = grids.Lattice.fit(place.xy)
        fine, reach = own.refine(int(grid)), 1.1 * own.reach  # a tenth for spots printed off their sites
        spot_site = own.index(place.xy) * int(grid)
    elif isinstance(grid, grids.Lattice):
        fine, reach = grid, 0.75 * place.pitch
        spot_site = fine.index(place.xy)
    else:
        return _scattered(np.asarray(grid, dtype=np.float64), place, max_distance)
    site = fine.cover(place.xy, reach if max_distance is None else max_distance)
    if not len(site):
        raise ValueError(f"no point of the grid lies within max_distance={max_distance} px of a spot.")
    return _data.Points(fine.points(site), fine.pitch, site, spot_site)


def _scattered(xy: NDArray[np.float64], place: _data.Place, max_distance: float | None) -> _data.Points:
    """Points as the user gave them."""
    if xy.ndim != 2 or xy.shape[1] != 2 or not len(xy) or not np.isfinite(xy).all():
        raise ValueError(
            f"grid of shape {xy.shape}: expected an integer, a sthisto.grids.Lattice, or finite points (m, 2) in "
            "full-resolution pixels, x then y."
        )
    if max_distance is not None:
        xy = xy[grids.within(xy, place.xy, max_distance)]
        if not len(xy):
            raise ValueError(f"no point of the grid lies within max_distance={max_distance} px of a spot.")
    several = len(np.unique(xy, axis=0)) > 1
    return _data.Points(xy, grids.spacing(xy) if several else place.pitch)


def _given(features: NDArray[np.float32], sizes: list[int]) -> list[NDArray[np.float32]]:
    """Features of the points as the user gave them, section by section."""
    whole = _data.finite_features(np.asarray(features, dtype=np.float32), sum(sizes), "features=")
    return list(np.split(whole, np.cumsum(sizes)[:-1]))


def _looks(  # noqa: PLR0917  private, called once
    adata: "AnnData",
    found: _data.Fit,
    places: Mapping[str, _data.Place],
    laid: Mapping[str, _data.Points],
    image: Any,
    encoder: str | encoders.Encoder | None,
    *,
    batch_size: int,
    device: str | None,
    progress: bool,
) -> Iterator[NDArray[np.float32]]:
    """Features of the laid points, section by section, made as those of the spots were."""
    describe = None if encoder is None else encoders.load(encoder, device=device)
    for name, points in laid.items():
        made = _data.description(adata, found.features_key, name, alone=not found.library_key)
        if describe is None:
            describe = encoders.restore(made.encoder, device=device)
        if image is None:
            picture = _data.recorded_image(adata, name, made.image)
        else:
            picture, _ = _data.find_image(adata, name, image)
        # A lattice may reach over the picture's border, the spots it was laid over may not.
        check_scale(picture, points.xy if points.site is None else places[name].xy)
        side, window = made.patch_um / made.mpp, None if made.window_um is None else made.window_um / made.mpp
        yield encode(picture, points.xy, side, describe, window=window, batch_size=batch_size)
