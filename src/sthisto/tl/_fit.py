"""Fit a model of expression on tissue."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sthisto import _data
from sthisto._crossfit import refit_of
from sthisto.models import MODELS, build, reads_pixels
from sthisto.tl._prior import Prior
from sthisto.tl._sections import genes_to_fit, model_section, training_sections, without_device
from sthisto.tl._uncertainty import UncertaintyModel

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray
    from spatialdata import SpatialData

FEW_WITH_PRIOR = 5  # spots


@_data.accepts_spatialdata(
    image="image", library_key="library_key", images_of="features_key", kind="features", fit_added="key_added"
)
def fit(
    adata: "AnnData | SpatialData",
    model: str = "attention",
    *,
    features_key: str = "X_histo",
    layer: str | None = None,
    genes: Iterable[str] | int | None = None,
    train_on: "str | pd.Series[Any] | NDArray[np.bool_] | None" = None,
    library_key: str | None = None,
    image: Any = None,
    prior: Any = None,
    params: Mapping[str, Any] | None = None,
    random_state: int = 0,
    key_added: str = "sthisto",
) -> None:
    """Fit a model of expression on image features, positions and neighboring spots.

    Several sections are fitted together: features are standardized and gene means taken per section, and the rest of
    the model is shared. Positions compare within a section; the attention model also registers sections of one tissue
    to each other where their expression allows, and ignores sections whose expression does not match. Spots outside
    ``train_on``, and those with ``obs["in_tissue"]`` 0, are never used, neither as target nor as context.

    Parameters
    ----------
    adata
        Section with log-normalized expression, spot centers in ``obsm["spatial"]`` and image features in ``obsm``;
        AnnData, SpatialData or :class:`sthisto.SpatialDataView`.
    model
        Name in :data:`sthisto.models.MODELS`.
    features_key
        Features (n, d) in ``obsm``, from :func:`sthisto.pp.extract_features` or elsewhere.
    layer
        Layer with log-normalized expression; ``None`` reads ``X``.
    genes
        Names of the genes to model. A number takes the most variable on the training spots, by ``layers["counts"]``
        where present, else by the expression. ``None`` takes ``var["highly_variable"]`` where present, else all, and
        the 1 000 most variable of more than these.
    train_on
        The spots to fit on: a column of ``obs`` with True and False or 1 and 0, a mask (n,), or a Series by spot name.
    library_key
        Column of ``obs`` that names the section of each spot, where there are several.
    image
        Image for models that read pixels: a path, an array, ``"hires"`` or ``"lowres"`` of ``uns["spatial"]``, or
        ``{section: image}``. ``None`` takes the one that the features were taken from, else the sharpest in
        ``uns["spatial"]``. A path is kept as it is given; an array has to be passed again to predict.
    prior
        Expression as predicted elsewhere, which the training spots calibrate: a layer or a key of ``obsm`` (a DataFrame
        with genes as columns), or a fitted AnnData of other sections, also from :func:`load`, which predicts from image
        features. Or, as for :func:`upsample`, a callable of positions, an AnnData of points or a raster. It needs not
        have all genes, and one without information about the section is ignored.
    params
        Settings of the model; every iterative one takes ``{"epochs": n}``. ``{"device": "cuda:1"}`` is where networks
        train, as torch names it; otherwise on a GPU where there is one.
    random_state
        Seed; the same seed gives the same bits on a CPU.
    key_added
        Name of the fit, also of the layers that :func:`predict` writes.

    Notes
    -----
    With a prior, level and slopes are learned from the training spots with shrinkage, and the model learns the rest. It
    is fitted some ten times then, as the weight of the prior is cross-validated. A fitted prior is kept with the fit.

    Returns
    -------
    None. Writes ``uns["sthisto"]["fit"][key_added]``, the fitted model as plain arrays with its settings and its
    training curves, and removes from ``var`` what :func:`test_genes` found out about an earlier fit of this name.

    Raises
    ------
    KeyError
        Unknown model, gene, layer or column; no coordinates or features; no image for a model that reads pixels.
    TypeError
        ``params`` that no file could keep; a ``prior`` of another kind.
    ValueError
        Expression that is not log-normalized (counts, NaN, negative values); features that were changed after
        extraction or differ in how they were made; several sections without ``library_key``; unknown params; too few
        spots; spots outside the image, or an image of unknown scale; a prior without any of the genes.

    References
    ----------
    The attention model goes beyond HisToSGE (arXiv 2407.20518), whose own is ``model="histosge"``; each model's module
    gives its paper and equations.

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic()
    >>> sthisto.pp.extract_features(adata)
    >>> sthisto.tl.fit(adata, "ridge")
    >>> sthisto.tl.predict(adata)
    >>> adata.layers["sthisto"].shape == adata.shape
    True
    """
    _data.check_key(key_added)
    settings, where = without_device(params)
    built, spec = build(model, settings, with_prior=prior is not None), MODELS[model]
    known = None if prior is None else Prior.of(prior)
    mask = _data.training_rows(adata, train_on)
    sections = _data.read_sections(adata, library_key)
    chosen = genes_to_fit(adata, genes, sections, mask, layer)
    reads_features = "features" in spec.inputs or bool(known and known.fit)
    read = _data.with_features if reads_features else _data.add_metadata
    sections = read(adata, sections, features_key)
    if known is not None:
        sections = known.at_spots(adata, sections, chosen)
    sections = training_sections(adata, sections, mask, chosen, layer)
    _refuse_few(sections, model, spec.min_spots if known is None else FEW_WITH_PRIOR)
    if reads_pixels(model, built):
        sections = {
            name: replace(each, image=_data.open_feature_image(adata, each, image)) for name, each in sections.items()
        }
    training = [model_section(each, built) for each in sections.values()]
    seed = int(random_state)
    held_out = built.fit(training, random_state=seed, device=where, progress=True)

    uncertainty = UncertaintyModel.fit(
        training,
        held_out,
        with_features=reads_features,
        refit=None if spec.iterative else refit_of(model, settings, random_state=seed, device=where),
        min_spots=spec.min_spots,
        random_state=seed,
    )
    described = [each.metadata for each in sections.values() if reads_features and each.metadata is not None]
    images = [each.image for each in sections.values() if each.image is not None]
    record = _data.Fit(
        model=model,
        params=settings,
        genes=chosen,
        sections=np.array(list(sections), dtype=str),
        library_key=library_key or "",
        features_key=features_key if reads_features else "",
        feature_settings=json.dumps(described[0].settings(), sort_keys=True) if described else "",
        layer=layer or "",
        random_state=seed,
        pitch=np.array([each.pitch for each in sections.values()]),
        spots=adata.obs_names[np.concatenate([each.rows for each in sections.values()])].to_numpy().astype(str),
        xy=np.concatenate([each.xy for each in sections.values()]),
        image_paths=np.array([each.path for each in images], dtype=str),
        image_mpp=np.array([each.mpp for each in images]),
        arrays={**built.state(), **uncertainty.state(), **({} if known is None else known.state())},
        history=built.history,
    )
    _data.write_fit(adata, key_added, record)


def _refuse_few(sections: Mapping[str, _data.SectionData], model: str, least: int) -> None:
    n = sum(map(len, sections.values()))
    if n < least:
        raise ValueError(f"{n} training spots; model {model!r} needs at least {least}. Is train_on= right?")
    lone = [name for name, each in sections.items() if len(each) < 2]
    if lone:
        raise ValueError(f"a single training spot in section {', '.join(map(repr, lone))}: leave it out, or add spots.")
