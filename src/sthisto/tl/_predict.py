"""Predict expression at the section's own spots."""

from typing import TYPE_CHECKING, Any

import numpy as np

from sthisto import _data
from sthisto.tl._prior import Prior
from sthisto.tl._sections import model_section, read_inputs, restore
from sthisto.tl._uncertainty import UncertaintyModel
from sthisto.uncertainty import Covariates, check_level

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


@_data.accepts_spatialdata(image="image", library_key="library_key", reference="reference", images_of="key")
def predict(
    adata: "AnnData | SpatialData",
    *,
    reference: "AnnData | SpatialData | None" = None,
    key: str = "sthisto",
    library_key: str | None = None,
    features_key: str | None = None,
    image: Any = None,
    prior: Any = None,
    interval: float | None = None,
) -> "AnnData | None":
    """Predict expression at the section's own spots: measured ones denoised, hidden ones filled in.

    With ``reference``, an object that was fitted, the spots of ``adata`` are predicted from their image features (and
    positions among themselves) alone: the section was only stained. Its features have to be made by the same encoder
    and at the same patch size as those of the fit.

    Parameters
    ----------
    adata
        Section with spot centers and features; fitted, unless ``reference`` is given. Sections of a fitted object
        that had no training spots are predicted from their image, too.
    reference
        Fitted object, or what :func:`load` returned.
    key
        Name of the fit, and of the layers.
    library_key
        Column of ``obs`` that names the sections of ``adata``, with ``reference``; without, the fit has its own.
    features_key
        Features in ``obsm``; ``None`` takes the name used in :func:`fit`.
    image
        Image for models that read pixels, as in :func:`fit`; ``None`` takes the one used there.
    prior
        For a fit with a prior, that of these spots, as in :func:`fit`. ``None`` takes the layer, key of ``obsm`` or
        fitted model that was named there.
    interval
        Also give bounds that contain a new measurement with this probability, such as 0.9.

    Returns
    -------
    Without ``reference`` None; writes

    ``layers[key]``, ``layers[f"{key}_std"]`` : (n, n_vars) float32, the expression and the standard deviation of a new
    measurement of it; NaN for genes that are not modelled, which ``var[f"{key}_modelled"]`` marks

    ``layers[f"{key}_low"]``, ``layers[f"{key}_high"]`` : the bounds, with ``interval``

    ``obs[f"{key}_extrapolated"]`` : whether a spot is outside the training domain: further from training spots than
    predictions were tested at, or with image features dissimilar to theirs

    With ``reference`` an AnnData of its genes: ``X`` the prediction, ``layers["std"]``, ``layers["low"]``,
    ``layers["high"]``, ``obs["extrapolated"]``.

    Raises
    ------
    KeyError
        Not fitted, no features, or no image for a model that reads pixels.
    FileNotFoundError
        The image file has moved.
    ValueError
        State that is damaged or newer, or of other genes or spots; features of another encoder, patch size or length;
        a section that was not fitted, with a model that reads no image; ``interval`` that is no probability; an option
        that the fit does not use; a prior that was not kept with the fit.

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic(n_sections=2)
    >>> sthisto.pp.extract_features(adata, library_key="library")
    >>> measured, stained = (adata[adata.obs["library"] == name].copy() for name in ("synthetic_0", "synthetic_1"))
    >>> sthisto.tl.fit(measured, "ridge", library_key="library")
    >>> sthisto.tl.predict(stained, reference=measured, library_key="library").shape == stained.shape
    True
    """
    if interval is not None:
        check_level(interval)
    fit = _data.read_fit(adata if reference is None else reference, key)
    model, uncertainty = restore(fit), UncertaintyModel.restore(fit)
    if reference is None:
        refuse_other_key(library_key, fit.library_key)
        _data.gene_columns(adata, fit.genes)
        sections = _data.read_fitted_sections(adata, fit)
    else:
        sections = _data.read_stained_sections(adata, library_key)
    known = Prior.restore(fit, prior)
    sections = read_inputs(adata, sections, fit, model, features_key=features_key, image=image)
    sections = sections if known is None else known.at_spots(adata, sections, fit.genes)
    mean = np.empty((adata.n_obs, len(fit.genes)), dtype=np.float32)
    parts = []
    for each in sections.values():
        points = model_section(each, model)
        mean[each.rows] = np.maximum(model.predict(points), 0)
        parts.append(uncertainty.covariates(points))
    order = np.argsort(np.concatenate([each.rows for each in sections.values()]))
    covariates = Covariates.join(parts)[order]
    layers = {"": mean, **uncertainty.layers(mean, covariates, interval)}
    extrapolated = uncertainty.extrapolated(covariates)
    if reference is None:
        _data.write_prediction(adata, key, fit, layers, extrapolated)
        return None
    obs = adata.obs.assign(extrapolated=extrapolated)
    return _data.new_object(adata, fit.genes, layers, obs, _data.coordinates(adata, np.arange(adata.n_obs)))


def refuse_other_key(library_key: str | None, fitted: str) -> None:
    """Refuse a column that the fit does not use."""
    if library_key is not None and library_key != fitted:
        known = f"library_key={fitted!r}" if fitted else "one section, without library_key"
        raise ValueError(f"library_key={library_key!r}: the model was fitted with {known}. Leave it out.")
