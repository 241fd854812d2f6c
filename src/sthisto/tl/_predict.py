"""Predict expression at the section's own spots."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sthisto import _data
from sthisto.models import Model, Section
from sthisto.uncertainty import Covariates, check_level

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

from sthisto.tl._sections import Pixels, restore, section_of
from sthisto.tl._uncertainty import UncertaintyModel


@_data.accepts_spatialdata
def predict(
    adata: "AnnData | SpatialData",
    *,
    reference: "AnnData | None" = None,
    key: str = "sthisto",
    library_key: str | None = None,
    features_key: str | None = None,
    image: Any = None,
    interval: float | None = None,
    table_key: str | None = None,
    image_key: str | None = None,
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
    interval
        Also give bounds that hold a new measurement with this probability, such as 0.9.
    table_key, image_key
        Names of the table and of the image where ``adata`` is a SpatialData that has several.

    Returns
    -------
    Without ``reference`` nothing; writes

    ``layers[key]``, ``layers[f"{key}_std"]`` : (n, n_vars) float32, the expression and the standard deviation of a new
    measurement of it; NaN for genes that are not modelled, which ``var[f"{key}_modelled"]`` tells

    ``layers[f"{key}_low"]``, ``layers[f"{key}_high"]`` : the bounds, with ``interval``

    ``obs[f"{key}_extrapolated"]`` : whether a spot is far from anything seen: further from training spots than
    predictions were
    tested at, or of a look that is unlike theirs

    With ``reference`` an AnnData of its genes: ``X`` the prediction, ``layers["std"]``, ``layers["low"]``,
    ``layers["high"]``, ``obs["extrapolated"]``.

    Raises
    ------
    KeyError
        Not fitted, no features, or no image for a model that reads pixels.
    FileNotFoundError
        The image file is not where it was.
    ValueError
        State that is damaged, older or newer, or of other genes or spots; features of another length; a section never
        fitted, with a model that reads no image; ``interval`` that is no probability.

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
    if interval is not None:
        check_level(interval)
    found = _data.read_fit(adata if reference is None else reference, key)
    fitted, trust = restore(found), UncertaintyModel.restore(found)
    if reference is None:
        _data.gene_columns(adata, found.genes)
        places = _data.fitted_places(adata, found)
    else:
        stained = _data.places(adata, library_key)
        places = {name: replace(place, known=_data.UNFITTED) for name, place in stained.items()}
    mean = np.empty((adata.n_obs, len(found.genes)), dtype=np.float32)
    distance, unlike = np.empty(adata.n_obs), np.empty(adata.n_obs)
    for name, place in places.items():
        section = spots_of(adata, found, fitted, name, place, image, features_key)
        mean[place.rows], seen = fitted.predict(section), trust.look(section)
        distance[place.rows], unlike[place.rows] = seen.distance, seen.unlike
    np.maximum(mean, 0, out=mean)
    looked = Covariates(distance, unlike)
    layers, extrapolated = trust.layers(mean, looked, interval), trust.extrapolated(looked)
    if reference is None:
        _data.write_prediction(adata, key, found.genes, mean, layers, extrapolated)
        return None
    return _data.new_slide(
        adata, found.genes, mean, layers, adata.obs.assign(extrapolated=extrapolated), adata.obsm["spatial"]
    )


def spots_of(  # noqa: PLR0917  shared by two
    adata: "AnnData",
    found: _data.Fit,
    fitted: Model,
    name: str,
    place: _data.Place,
    image: Any,
    features_key: str | None = None,
) -> Section:
    """Spots of a section, as a model that was fitted takes them."""
    record_key = features_key or found.features_key or "X_histo"
    pixels = Pixels.again(adata, found, name, place, image, record_key)
    patches = pixels.around(place.xy, fitted) if pixels else None
    return section_of(adata, place, record_key if found.features_key else "", patches)
