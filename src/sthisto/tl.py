"""Learn expression from tissue, predict it at the spots and on dense grids, and keep what was learnt."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from tqdm.auto import tqdm

from sthisto import _slide, encoders, evaluation, grids
from sthisto.encoders._encode import encode
from sthisto.images import Image, check_scale, sample_patches
from sthisto.metrics import lognorm
from sthisto.models import MODELS, Model, Patches, Section
from sthisto.models._sections import pack_names, unpack_names
from sthisto.uncertainty import Spread

if TYPE_CHECKING:
    from anndata import AnnData


def fit(  # noqa: PLR0913  what a fit can be told, all with defaults
    adata: "AnnData",
    model: str = "attention",
    *,
    features_key: str = "X_histo",
    layer: str | None = None,
    genes: Iterable[str] | None = None,
    train_on: str | NDArray[np.bool_] | None = None,
    library_key: str | None = None,
    image: Any = None,
    params: Mapping[str, Any] | None = None,
    random_state: int = 0,
    device: str | None = None,
    key_added: str = "sthisto",
    progress: bool = True,
) -> None:
    """Learn expression from image features, positions and the measured spots around.

    Several sections are learnt together: features are standardised and gene means taken per section, and what is
    learnt is shared. Positions count within a section; the attention model also lays sections of one tissue over each
    other where their expression clearly says how, and lets none speak that does not fit. Spots outside ``train_on`` are
    never seen, neither as target nor as context.

    Parameters
    ----------
    adata
        Section with log-normalised expression, spot centres in ``obsm["spatial"]`` and image features in ``obsm``.
    model
        Name in :data:`sthisto.models.MODELS`.
    features_key
        Features (n, d) in ``obsm``, from :func:`sthisto.pp.extract_features` or elsewhere.
    layer
        Layer with log-normalised expression; ``None`` reads ``X``.
    genes
        Genes to model; ``None`` takes ``var["highly_variable"]`` where present, else all.
    train_on
        Boolean column of ``obs``, or mask (n,): the spots that may be learnt from.
    library_key
        Column of ``obs`` that names the section of each spot, where there are several.
    image
        Picture for models that read pixels: a path, an array, ``"hires"`` or ``"lowres"`` of ``uns["spatial"]``, or
        ``{library: picture}``. ``None`` takes the one that the features were taken from, else the sharpest in
        ``uns["spatial"]``. A path is kept as it is given; an array has to be passed again to predict.
    params
        Settings of the model; every iterative one takes ``{"epochs": n}``.
    random_state
        Seed; the same seed gives the same bits on a CPU.
    device
        Where networks train, as torch names it; ``None`` takes a GPU where there is one.
    key_added
        Name of the fit, also of the layers that :func:`predict` writes.
    progress
        Show progress bars.

    Returns
    -------
    Nothing. Writes

    ``uns["sthisto"]["fit"][key_added]`` : the fitted model as plain arrays, its settings and its training curves

    Raises
    ------
    KeyError
        Unknown model, gene, layer or column; no coordinates or features; no image for a model that reads pixels.
    TypeError
        ``params`` that no file could keep.
    ValueError
        Raw counts, NaN, negative or infinite values, several sections without ``library_key``, unknown params, too
        few spots; spots outside the image or an image of unknown scale.

    References
    ----------
    The attention model goes beyond HisToSGE (arXiv 2407.20518), whose own is ``model="histosge"``; each model's module
    gives its paper and equations.

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic()
    >>> sthisto.pp.extract_features(adata, progress=False)
    >>> sthisto.tl.fit(adata, "ridge", progress=False)
    >>> sthisto.tl.predict(adata)
    >>> adata.layers["sthisto"].shape == adata.shape
    True
    """
    _slide.check_key(key_added)
    settings = _slide.plain_params(params)
    built, spec = _build(model, settings), MODELS[model]
    record_key, features_key = features_key, features_key if "features" in spec.inputs else ""
    chosen, training = _slide.genes_to_model(adata, genes), _slide.training_rows(adata, train_on)
    places = {name: place.keep(training) for name, place in _slide.places(adata, library_key).items()}
    places = {name: place for name, place in places.items() if len(place.rows)}
    _refuse_few(places, model, spec.min_spots)
    measured = [_slide.expression(adata, place.rows, chosen, layer) for place in places.values()]
    pixels = [
        _Pixels.find(adata, name, place, image, record_key) if "patches" in spec.inputs else None
        for name, place in places.items()
    ]
    sections = [
        replace(
            _section(adata, place, features_key, each.around(place.xy, built) if each else None), expression=expression
        )
        for place, expression, each in zip(places.values(), measured, pixels, strict=True)
    ]
    heldback = built.fit(sections, seed=random_state, device=device or "", progress=progress)
    spread = Spread.fit(np.concatenate(measured), np.concatenate(heldback))
    rows = np.concatenate([place.rows for place in places.values()])
    record = _slide.Fit(
        model=model,
        params=settings,
        genes=chosen,
        libraries=np.array(list(places), dtype=str),
        library_key=library_key or "",
        features_key=features_key,
        layer=layer or "",
        seed=int(random_state),
        pitch=np.array([place.pitch for place in places.values()]),
        spots=adata.obs_names[rows].to_numpy().astype(str),
        xy=np.concatenate([place.xy for place in places.values()]),
        arrays={**built.state(), **spread.state(), **_Pixels.state(pixels)},
        history=built.history,
    )
    _slide.write_fit(adata, key_added, record)


def predict(
    adata: "AnnData",
    *,
    reference: "AnnData | None" = None,
    key: str = "sthisto",
    library_key: str | None = None,
    features_key: str | None = None,
    image: Any = None,
) -> "AnnData | None":
    """Predict expression at the section's own spots: measured ones denoised, hidden ones filled in.

    With ``reference``, an object that was fitted, the spots of ``adata`` are predicted from their image features (and
    positions among themselves) alone: the section was only stained.

    Parameters
    ----------
    adata
        Section with spot centres and features; fitted, unless ``reference`` is given. Sections of a fitted object
        that had no training spots are predicted from their image, too.
    reference
        Fitted object, or what :func:`load` gave.
    key
        Name of the fit, and of the layers.
    library_key
        Column of ``obs`` that names the sections of ``adata``, with ``reference``; else the fit knows.
    features_key
        Features in ``obsm``; ``None`` takes the name used in ``fit``.
    image
        Picture for models that read pixels, as in :func:`fit`; ``None`` takes the one used there.

    Returns
    -------
    Without ``reference`` nothing; writes

    ``layers[key]``, ``layers[f"{key}_std"]`` : (n, n_vars) float32, the expression and the standard deviation of a new
    measurement of it; NaN for genes that are not modelled, which ``var[f"{key}_modelled"]`` tells

    With ``reference`` an AnnData of its genes: ``X`` the prediction, ``layers["std"]``.

    Raises
    ------
    KeyError
        Not fitted, no features, or no image for a model that reads pixels.
    FileNotFoundError
        The image file is not where it was.
    ValueError
        State that is damaged, newer, or of other genes or spots; features of another length; a section never fitted,
        with a model that reads no image.

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic(n_sections=2)
    >>> sthisto.pp.extract_features(adata, library_key="library", progress=False)
    >>> measured, stained = (adata[adata.obs["library"] == name].copy() for name in ("synthetic_0", "synthetic_1"))
    >>> sthisto.tl.fit(measured, "ridge", library_key="library", progress=False)
    >>> sthisto.tl.predict(stained, reference=measured, library_key="library").shape == stained.shape
    True
    """
    found = _slide.read_fit(adata if reference is None else reference, key)
    fitted, spread = _restore(found), Spread.restore(found.arrays)
    record_key = features_key or found.features_key or "X_histo"
    features_key = record_key if found.features_key else ""
    if reference is None:
        _slide.gene_columns(adata, found.genes)
        places = _slide.fitted_places(adata, found)
    else:
        stained = _slide.places(adata, library_key)
        places = {name: replace(place, known=_slide.UNSEEN) for name, place in stained.items()}
    mean = np.empty((adata.n_obs, len(found.genes)), dtype=np.float32)
    for name, place in places.items():
        pixels = _Pixels.again(adata, found, name, place, image, record_key)
        patches = pixels.around(place.xy, fitted) if pixels else None
        mean[place.rows] = fitted.predict(_section(adata, place, features_key, patches))
    np.maximum(mean, 0, out=mean)
    if reference is None:
        _slide.write_prediction(adata, key, found.genes, mean, spread(mean))
        return None
    return _slide.new_slide(adata, found.genes, mean, spread(mean), adata.obs.copy(), adata.obsm["spatial"])


def upsample(
    adata: "AnnData",
    grid: "int | grids.Lattice | ArrayLike" = 2,
    *,
    image: Any = None,
    features: NDArray[np.float32] | None = None,
    encoder: str | encoders.Encoder | None = None,
    max_distance: float | None = None,
    key: str = "sthisto",
    batch_size: int = 64,
    device: str | None = None,
    progress: bool = True,
) -> "AnnData":
    """Predict expression on a dense grid, as a new AnnData.

    The points are described as the spots were, from the same picture at the same scale, so that the map runs through
    what :func:`predict` gives at the spots.

    Parameters
    ----------
    adata
        A fitted section, or several.
    grid
        An integer refines the spots' own array: ``2`` gives 4 times as many points. Else a
        :class:`sthisto.grids.Lattice`, or points (m, 2) in full-resolution pixels, x then y, in one section.
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
        enough that the map has no gaps between neighbouring spots; given points are all kept.
    key
        Name of the fit.
    batch_size
        Patches described at once.
    device
        Where a learnt encoder runs.
    progress
        Show progress bars.

    Returns
    -------
    AnnData, one row a point: ``X`` (m, g) float32, non-negative, on the scale of the training expression;
    ``layers["std"]`` the standard deviation of a new measurement; ``obsm["spatial"]`` full-resolution pixels;
    ``obs["array_row"]``, ``obs["array_col"]`` integers on the refined lattice; ``obs["nearest_spot"]``,
    ``obs["distance_um"]`` (NaN where the scale is unknown) and ``obs["measured"]``, whether a training spot sits there;
    ``uns["spatial"]`` as in ``adata``, with the grid's pitch as spot diameter, so that
    ``sq.pl.spatial_scatter(dense, shape="square")`` draws a gapless map.

    Raises
    ------
    KeyError
        Not fitted, no image to take features from, or an encoder that is not found by name.
    FileNotFoundError
        The image file is not where it was.
    ValueError
        No lattice to refine, no point in reach, points outside the image, features of another length, state that is
        damaged or of another object.

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
    found = _slide.read_fit(adata, key)
    fitted, spread = _restore(found), Spread.restore(found.arrays)
    places = _slide.fitted_places(adata, found)
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
    mean = np.concatenate(
        [
            fitted.predict(_points(adata, found, fitted, name, places[name], points, look, image))
            for (name, points), look in zip(laid.items(), looks, strict=True)
        ]
    )
    np.maximum(mean, 0, out=mean)
    obs = _slide.points_obs(adata, found, places, laid)
    xy = np.concatenate([points.xy for points in laid.values()])
    diameters = {name: points.pitch for name, points in laid.items()}
    return _slide.new_slide(adata, found.genes, mean, spread(mean), obs, xy, diameters)


def save(adata: "AnnData", path: str | PathLike[str], *, key: str = "sthisto") -> None:
    """Write the fitted model as one safetensors file, without the section it was fitted on.

    The file holds the model's arrays and, as metadata, its settings: enough for ``predict(stained, reference=...)`` on
    another machine. Names of genes, sections and training spots travel with it.

    Parameters
    ----------
    adata
        A fitted section.
    path
        File to write; one that is there is replaced once the new one is whole.
    key
        Name of the fit.

    Raises
    ------
    KeyError
        Not fitted.

    Examples
    --------
    >>> import sthisto, tempfile, pathlib
    >>> adata = sthisto.datasets.synthetic()
    >>> sthisto.tl.fit(adata, "idw", progress=False)
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "fit.safetensors"
    >>> sthisto.tl.save(adata, path)
    >>> sthisto.tl.load(path).n_vars
    60
    """
    _slide.save_fit(_slide.read_fit(adata, key), path)


def load(path: str | PathLike[str], adata: "AnnData | None" = None, *, key_added: str = "sthisto") -> "AnnData | None":
    """Read a model that :func:`save` wrote.

    Parameters
    ----------
    path
        The file.
    adata
        Object to put the fit into, one that has the training section's spots and genes; ``None`` makes an empty one.
    key_added
        Name of the fit.

    Returns
    -------
    Nothing with ``adata``, whose ``uns["sthisto"]["fit"][key_added]`` is written; else an AnnData without spots that
    holds the fit, to be passed as ``reference=``.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        The file is damaged, no fit, or of a newer schema.

    Examples
    --------
    >>> import sthisto, tempfile, pathlib
    >>> adata = sthisto.datasets.synthetic()
    >>> sthisto.tl.fit(adata, "idw", progress=False)
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "fit.safetensors"
    >>> sthisto.tl.save(adata, path)
    >>> again = sthisto.datasets.synthetic()
    >>> sthisto.tl.load(path, again)
    >>> sthisto.tl.upsample(again, 2, progress=False).n_vars
    60
    """
    _slide.check_key(key_added)
    found = _slide.load_fit(path)
    if adata is not None:
        _slide.write_fit(adata, key_added, found)
        return None
    empty = _slide.no_spots(found.genes)
    _slide.write_fit(empty, key_added, found)
    return empty


@dataclass(frozen=True)
class _Pixels:
    """Where models that read pixels find those of one section."""

    picture: Image
    mpp: float  # um per full-resolution pixel
    path: str  # as it was given, "uns:hires", or "" for an array

    @classmethod
    def find(cls, adata: "AnnData", name: str, place: _slide.Place, image: Any, features_key: str) -> "_Pixels":
        """Open a section's picture: the one given, else that of its features, else the sharpest in uns."""
        try:
            made = _slide.description(adata, features_key, name, alone=False)
        except KeyError:  # no features, or from elsewhere
            made = None
        if image is None and made is not None and made.image:
            picture, path = _slide.recorded_image(adata, name, made.image), made.image
        elif image is None and made is not None:
            raise KeyError(f"the picture of section {name!r} was an array, which is not kept: pass it again as image=.")
        else:
            picture, path = _slide.find_image(adata, name, image)
        check_scale(picture, place.xy)
        return cls(picture, _slide.scale(place, picture, None, None) if made is None else made.mpp, path)

    @classmethod
    def again(  # noqa: PLR0917  private
        cls, adata: "AnnData", found: _slide.Fit, name: str, place: _slide.Place, image: Any, features_key: str
    ) -> "_Pixels | None":
        """Open the picture that a section was fitted on, or that of one that was not."""
        if "patches" not in MODELS[found.model].inputs:
            return None
        known = list(found.libraries)
        if place.known not in known:
            whole = place if place.kind else _slide.places(adata, found.library_key or None)[name]
            return cls.find(adata, name, whole, image, features_key)
        path = unpack_names(found.arrays["picture_paths"])[known.index(place.known)]
        mpp = float(found.arrays["picture_mpp"][known.index(place.known)])
        if image is None and not path:
            raise KeyError(f"the picture of section {name!r} was an array, which is not kept: pass it again as image=.")
        if image is None:
            picture = _slide.recorded_image(adata, name, path)
        else:
            picture, _ = _slide.find_image(adata, name, image)
        check_scale(picture, place.xy)
        return cls(picture, mpp, path)

    @staticmethod
    def state(pixels: "list[_Pixels | None]") -> dict[str, NDArray[np.generic]]:
        """Paths and scales of the fitted sections; nothing for models that read no pixels."""
        there = [each for each in pixels if each is not None]
        paths, mpp = pack_names([each.path for each in there]), np.array([each.mpp for each in there])
        return {"picture_paths": paths, "picture_mpp": mpp} if there else {}

    def around(self, xy: NDArray[np.float64], model: Any) -> Patches:
        """Patches of the model's size around rows of xy (n, 2)."""
        return lambda rows: sample_patches(self.picture, xy[rows], model.patch_um / self.mpp, model.field)


def _section(adata: "AnnData", place: _slide.Place, features_key: str, patches: Patches | None = None) -> Section:
    """One section's spots as models see them, without expression."""
    look = _slide.features(adata, features_key, place.rows) if features_key else None
    return Section(name=place.known, xy=place.xy / place.pitch, features=look, patches=patches)


def _points(  # noqa: PLR0917  private, called once
    adata: "AnnData",
    found: _slide.Fit,
    fitted: Model,
    name: str,
    place: _slide.Place,
    points: _slide.Points,
    look: NDArray[np.float32] | None,
    image: Any,
) -> Section:
    """Points laid over one section as models see them."""
    pixels = _Pixels.again(adata, found, name, place, image, found.features_key or "X_histo")
    if pixels and points.site is None:  # a lattice may reach over the picture's border
        check_scale(pixels.picture, points.xy)
    patches = pixels.around(points.xy, fitted) if pixels else None
    return Section(name=place.known, xy=points.xy / place.pitch, features=look, patches=patches)


def _lay(grid: "int | grids.Lattice | ArrayLike", place: _slide.Place, max_distance: float | None) -> _slide.Points:
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
    return _slide.Points(fine.points(site), fine.pitch, site, spot_site)


def _scattered(xy: NDArray[np.float64], place: _slide.Place, max_distance: float | None) -> _slide.Points:
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
    return _slide.Points(xy, grids.spacing(xy) if several else place.pitch)


def _given(features: NDArray[np.float32], sizes: list[int]) -> list[NDArray[np.float32]]:
    """Features of the points as the user gave them, section by section."""
    whole = _slide.finite_features(np.asarray(features, dtype=np.float32), sum(sizes), "features=")
    return list(np.split(whole, np.cumsum(sizes)[:-1]))


def _looks(  # noqa: PLR0917  private, called once
    adata: "AnnData",
    found: _slide.Fit,
    places: Mapping[str, _slide.Place],
    laid: Mapping[str, _slide.Points],
    image: Any,
    encoder: str | encoders.Encoder | None,
    *,
    batch_size: int,
    device: str | None,
    progress: bool,
) -> Iterator[NDArray[np.float32]]:
    """Features of the laid points, section by section, made as those of the spots were."""
    for name, points in laid.items():
        made = _slide.description(adata, found.features_key, name, alone=not found.library_key)
        describe = encoders.load(made.encoder if encoder is None else encoder, device=device)
        if image is None:
            picture = _slide.recorded_image(adata, name, made.image)
        else:
            picture, _ = _slide.find_image(adata, name, image)
        # A lattice may reach over the picture's border, the spots it was laid over may not.
        check_scale(picture, points.xy if points.site is None else places[name].xy)
        side = made.patch_um / made.mpp
        yield encode(picture, points.xy, side, describe, batch_size=batch_size, progress=progress)


def _build(model: str, params: Mapping[str, Any] | None) -> Model:
    """Make the model with its settings."""
    if model not in MODELS:
        raise KeyError(f"no model {model!r} (there are: {', '.join(sorted(MODELS))}).")
    kind = MODELS[model].load()
    known = [field.name for field in fields(kind) if field.init]  # type: ignore[arg-type]  # models are dataclasses
    unknown = sorted(set(params or {}) - set(known))
    if unknown:
        raise ValueError(f"model {model!r} has no params {', '.join(unknown)} (it has: {', '.join(known)}).")
    return kind(**(params or {}))


def _restore(found: _slide.Fit) -> Model:
    built = _build(found.model, found.params)
    built.restore(found.arrays)
    return built


def _refuse_few(places: Mapping[str, _slide.Place], model: str, least: int) -> None:
    n = sum(len(place.rows) for place in places.values())
    if n < least:
        raise ValueError(f"{n} training spots; model {model!r} needs at least {least}. Is train_on= right?")
    lone = [name for name, place in places.items() if len(place.rows) < 2]
    if lone:
        raise ValueError(f"a single training spot in section {', '.join(map(repr, lone))}: leave it out, or add spots.")


def evaluate(  # noqa: PLR0913  options of an experiment, all with defaults
    adata: "AnnData",
    models: str | Iterable[str] = ("attention", "gp", "ridge", "idw"),
    *,
    split: str | Iterable[str] = ("random", "block"),
    fraction: float = 0.5,
    n_repeats: int = 3,
    block: float | None = None,
    counts_layer: str | None = None,
    n_genes: int = 1000,
    features_key: str = "X_histo",
    layer: str | None = None,
    genes: Iterable[str] | None = None,
    library_key: str | None = None,
    image: Any = None,
    params: Mapping[str, Mapping[str, Any]] | None = None,
    protocol: str = "heldout",
    random_state: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Hide spots, fit each model on the rest, and score it on what was hidden.

    Hidden means hidden: genes, factors and standardisation come from the training spots alone, in every repeat anew.
    Spots hidden at random lie between measured ones and ask for the gaps to be filled; hidden blocks ask what lies
    further off. Both are headline figures, to be read beside ``"gene mean"`` (the training mean of each gene, r counted
    0) and, with counts, ``"ceiling"``: the r that a perfect predictor of the true rates would reach. Compare models
    with :func:`sthisto.evaluation.compare`, draw with :func:`sthisto.pl.evaluation`.

    Parameters
    ----------
    adata
        Section with spot centres in ``obsm["spatial"]``, log-normalised expression or counts, and image features.
    models
        Names in :data:`sthisto.models.MODELS`.
    split
        ``"random"``, ``"block"`` or both.
    fraction
        Share of the spots of every section to hide, between 0 and 1.
    n_repeats
        Hidings of each split. Repeat i hides, fits and thins with the seed ``random_state + i``.
    block
        Side of the blocks in spot pitches; ``None`` takes 4.
    counts_layer
        Layer with raw counts. Expression is log1p of counts per 10 000 over all genes then, genes are chosen anew on
        each training part, and the ceiling is given. ``None``: ``layer`` and the genes as they are.
    n_genes
        Genes to choose with ``counts_layer``: ``seurat_v3`` among those seen in 10 % of the training spots (in any, on
        sections of more than 1000 spots).
    features_key
        Features (n, d) in ``obsm``.
    layer
        Layer with log-normalised expression; ``None`` reads ``X``.
    genes
        Genes to score; ``None`` chooses with ``counts_layer``, else takes ``var["highly_variable"]`` where present,
        else all. Genes that were chosen on all spots make every score a little too good.
    library_key
        Column of ``obs`` that names the section of each spot. Sections are fitted together and scored apart.
    image
        Picture for models that read pixels, as in :func:`fit`.
    params
        Settings by model, as ``{"attention": {"n_factors": 20}}``.
    protocol
        ``"heldout"``; or ``"paper"``, the score of HisToSGE's scripts over all spots, those learnt from included, with
        genes chosen on all spots. That rewards remembering, as the row ``"training values"`` shows, which copies them;
        its metrics are called ``pearson_all_spots`` and so on, and nothing is written.
    random_state
        Seed; the same seed gives the same scores on a CPU.
    device
        Where networks train; ``None`` takes a GPU where there is one.
    progress
        Show a progress bar over the fits.

    Returns
    -------
    One long table with the columns ``model``; ``split``; ``repeat``; ``library``, the section; ``genes``, how these
    were chosen (``"each training half"``, ``"all spots"`` or ``"given"``); ``gene``, NaN for the mean over genes;
    ``metric`` (``pearson``, ``spearman``, ``mse``, ``mae``; ``seconds`` and ``peak_memory_mb`` of each fit, see
    :meth:`sthisto.evaluation.Trial.run`); ``value``. Writes

    ``var["pcc_heldout"]`` : Pearson r of the first model and first split, mean over repeats and sections; NaN for genes
    that were never scored

    Raises
    ------
    KeyError
        Unknown model, gene, layer or column; no coordinates, features or image; params of a model that is not named.
    TypeError
        ``params`` that no file could keep.
    ValueError
        Unknown split or protocol, a fraction outside (0, 1), ``counts_layer`` without counts or beside ``layer``,
        expression that ``fit`` would refuse, fewer than 10 hidden spots in a section or fewer left than the models
        need.

    References
    ----------
    Blocks: Roberts et al. (2017), Ecography, "Cross-validation strategies for data with temporal, spatial,
    hierarchical, or phylogenetic structure".

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic()
    >>> report = sthisto.tl.evaluate(adata, "idw", split="random", counts_layer="counts", progress=False)
    >>> r = report.query("gene.isna() and metric == 'pearson'").groupby("model")["value"].mean()
    >>> bool(r["gene mean"] < r["idw"] < r["ceiling"])
    True
    """
    settings = _settings(models, params)
    splits = _splits(split, 4.0 if block is None else block)
    if protocol not in ("heldout", "paper"):
        raise ValueError(f"protocol={protocol!r}: expected 'heldout' or 'paper'.")
    if n_repeats < 1 or n_genes < 1:
        raise ValueError(f"n_repeats={n_repeats}, n_genes={n_genes}: both should be 1 or more.")
    places = _slide.places(adata, library_key)
    measured = _measured(adata, places.values(), settings, features_key, layer, counts_layer, genes)
    seeing = [name for name in settings if "patches" in MODELS[name].inputs]
    pixels = [_Pixels.find(adata, name, place, image, features_key) for name, place in places.items() if seeing]
    hidings = [
        (name, seed, [grids.hold_out(section.xy, fraction, block=side, seed=seed) for section in measured.sections])
        for name, side in splits.items()
        for seed in range(random_state, random_state + n_repeats)
    ]
    _refuse_few_left(hidings, measured.sections, settings)
    tables, paper = [], protocol == "paper"
    with tqdm(total=len(hidings) * len(settings), desc="evaluate", disable=not progress) as bar:
        for name, seed, hidden in hidings:
            trial = measured.hide(hidden, n_genes=n_genes, all_spots=paper)
            parts = []
            for model, own in settings.items():
                built = _build(model, own)
                patches = _patches(pixels, places.values(), built) if model in seeing else ()
                parts.append(trial.run(model, built, patches=patches, seed=seed, device=device or ""))
                bar.update()
            parts.append(trial.yardsticks(seed=seed))
            tables.append(pd.concat(parts, ignore_index=True).assign(split=name, repeat=seed - random_state))
    choice = "given" if measured.columns is not None else "all spots" if paper else "each training half"
    report = pd.concat(tables, ignore_index=True).assign(genes=choice)
    if not paper:
        first = (report["model"] == next(iter(settings))) & (report["split"] == next(iter(splits)))
        r = report[first & (report["metric"] == "pearson")].groupby("gene")["value"].mean()
        _slide.write(adata, var={"pcc_heldout": r.reindex(adata.var_names).to_numpy()})
    return report[["model", "split", "repeat", "library", "genes", "gene", "metric", "value"]]


def _settings(models: str | Iterable[str], params: Mapping[str, Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """Give the settings of each model, all of which can be built."""
    names = [models] if isinstance(models, str) else list(models)
    if not names:
        raise ValueError(f"no model to evaluate (there are: {', '.join(sorted(MODELS))}).")
    unnamed = sorted(set(params or {}) - set(names))
    if unnamed:
        raise KeyError(f"params of {', '.join(map(repr, unnamed))}, but the models are {', '.join(map(repr, names))}.")
    settings = {name: _slide.plain_params((params or {}).get(name)) for name in names}
    for name, own in settings.items():
        _build(name, own)
    return settings


def _splits(split: str | Iterable[str], block: float) -> dict[str, float | None]:
    """Sides of the blocks to hide, None for single spots, by the names of the splits."""
    sides = {"random": None, "block": block}
    names = [split] if isinstance(split, str) else list(split)
    if not names or not set(names) <= set(sides):
        raise ValueError(f"split={split!r}: expected 'random', 'block' or both.")
    return {name: sides[name] for name in names}


def _measured(  # noqa: PLR0917  private, called once
    adata: "AnnData",
    places: Collection[_slide.Place],
    models: Iterable[str],
    features_key: str,
    layer: str | None,
    counts_layer: str | None,
    genes: Iterable[str] | None,
) -> evaluation.Measured:
    """Read all that trials are cut from."""
    if counts_layer is not None and layer is not None:
        raise ValueError(f"layer={layer!r} beside counts_layer={counts_layer!r}: with counts, expression is made anew.")
    anew = counts_layer is not None and genes is None
    given = _slide.genes_to_model(adata, adata.var_names if anew else genes)
    counts = None if counts_layer is None else _counts(adata, counts_layer)
    look = features_key if any("features" in MODELS[name].inputs for name in models) else ""
    sections = [_section(adata, place, look) for place in places]
    if counts is None:
        values = [_slide.expression(adata, place.rows, given, layer) for place in places]
        return evaluation.Measured(sections=sections, expression=values, genes=given, columns=np.arange(len(given)))
    return evaluation.Measured(
        sections=sections,
        expression=[lognorm(counts[place.rows]) for place in places],
        genes=adata.var_names.to_numpy().astype(str),
        columns=None if anew else adata.var_names.get_indexer(given),
        counts=[counts[place.rows] for place in places],
    )


def _patches(pixels: Iterable[_Pixels], places: Iterable[_slide.Place], model: Model) -> list[Patches]:
    """Give a model that reads pixels those of each section."""
    return [each.around(place.xy, model) for each, place in zip(pixels, places, strict=True)]


def _counts(adata: "AnnData", layer: str) -> Any:
    """Raw counts (n_obs, n_vars) as CSR; refuses what are none."""
    if layer not in adata.layers:
        found = ", ".join(map(repr, adata.layers)) or "nothing"
        raise KeyError(f"no layer {layer!r} in adata (found: {found}). counts_layer= names the one with raw counts.")
    matrix = adata.layers[layer]
    counts = sparse.csr_matrix(matrix[:] if hasattr(matrix, "backend") else matrix)
    if not (np.isfinite(counts.data).all() and (counts.data >= 0).all() and (counts.data % 1 == 0).all()):
        raise ValueError(
            f"adata.layers[{layer!r}] holds no raw counts: not all values are whole numbers of 0 or more. Pass "
            "counts_layer=None to evaluate log-normalised expression."
        )
    return counts


def _refuse_few_left(
    hidings: Iterable[tuple[str, int, list[NDArray[np.bool_]]]], sections: Iterable[Section], models: Iterable[str]
) -> None:
    least = max(MODELS[name].min_spots for name in models)
    for split, _, masks in hidings:
        hidden, left = [int(mask.sum()) for mask in masks], [int((~mask).sum()) for mask in masks]
        if min(hidden) < evaluation.LEAST_HIDDEN or min(left) < 2 or sum(left) < least:
            counted = "; ".join(
                f"{section.name!r}: {h} hidden, {rest} left"
                for section, h, rest in zip(sections, hidden, left, strict=True)
            )
            raise ValueError(
                f"too few spots for the {split} split ({counted}): every section needs {evaluation.LEAST_HIDDEN} "
                f"hidden and 2 left, and the models {least} left in all."
            )
