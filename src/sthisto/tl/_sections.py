"""Sections as models take them, from sections as AnnData has them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sthisto import _data, evaluation, models
from sthisto._data import Fit, SectionData
from sthisto._messages import warn
from sthisto.models import FeatureStatistics, Model, Section

if TYPE_CHECKING:
    from anndata import AnnData

N_GENES = 1000  # modelled where nobody chose


def without_device(params: Mapping[str, Any] | None) -> tuple[dict[str, Any], str]:
    """Settings as files keep them, and where networks are to train."""
    settings = _data.plain_params(params)
    device = settings.pop("device", None) or ""
    if not isinstance(device, str):
        raise TypeError(f"device is {device!r}, but has to be a text as 'cpu' or 'cuda:1'")
    return settings, device


def restore(fit: Fit) -> Model:
    """The fitted model of a record."""
    return models.restore(fit.model, fit.params, fit.arrays)


def model_section(
    section: SectionData,
    model: Model,
    *,
    xy: NDArray[np.float64] | None = None,
    features: NDArray[np.float32] | None = None,
    prior: NDArray[np.float32] | None = None,
) -> Section:
    """One section's spots, or with ``xy`` (m, 2) pixels and what is known there other points, as models take them."""
    spots = xy is None
    places = section.xy if xy is None else xy
    own = section.features
    return Section(
        name=section.model_key,
        xy=places / section.pitch,
        features=own if spots else features,
        expression=section.expression if spots else None,
        patches=None if section.image is None else section.image.patches(places, model),
        pitch_um=None if section.mpp is None else section.pitch * section.mpp,
        prior=section.prior if spots else prior,
        feature_statistics=None if own is None else FeatureStatistics.of(own[section.in_tissue]),
    )


def genes_to_fit(
    adata: "AnnData",
    genes: Iterable[str] | int | None,
    sections: Mapping[str, SectionData],
    mask: NDArray[np.bool_],
    layer: str | None,
) -> NDArray[np.str_]:
    """Names of the genes to model: given, or marked as highly variable, else the most variable of the training spots.

    Chosen by ``layers["counts"]`` where there are counts, else by the log-normalized expression.
    """
    number = number_of_genes(genes)
    if number is None and (genes is not None or _data.marks_genes(adata) or adata.n_vars <= N_GENES):
        return _data.genes_to_model(adata, genes)  # type: ignore[arg-type]  # a number is handled below
    rows = [each.rows[mask[each.rows]] for each in sections.values()]
    spots, labels = np.concatenate(rows), np.repeat(np.arange(len(rows)), list(map(len, rows)))
    counted = "counts" in _data.layer_names(adata)
    marked = evaluation.choose_genes(
        _data.sparse_values(adata, spots, "counts" if counted else layer),
        labels,
        number or N_GENES,
        least_seen=evaluation.least_seen(len(spots), len(rows)),
        flavor="seurat_v3" if counted else "seurat",
    )
    chosen = _data.gene_names(adata)[marked]
    if number is None:
        warn(
            f"adata.var has no 'highly_variable': the {len(chosen)} most variable of {adata.n_vars} genes are fitted. "
            "Name others with genes=, or take all: genes=adata.var_names."
        )
    return chosen


def number_of_genes(genes: Iterable[str] | int | None) -> int | None:
    """How many genes to choose, None where they are named or left to the default."""
    if genes is None or isinstance(genes, str) or not isinstance(genes, Integral | float):
        return None
    if isinstance(genes, bool | float) or genes < 1:
        raise ValueError(f"genes={genes!r}: expected names, or a whole number of 1 or more.")
    return int(genes)


def training_sections(
    adata: "AnnData",
    sections: Mapping[str, SectionData],
    mask: NDArray[np.bool_],
    genes: NDArray[np.str_],
    layer: str | None,
) -> dict[str, SectionData]:
    """The spots that a mask (n_obs,) leaves for training, with their expression; sections without one are left out."""
    kept = {name: each.keep(mask[each.rows]) for name, each in sections.items()}
    return {
        name: replace(each, expression=_data.expression(adata, each.rows, genes, layer))
        for name, each in kept.items()
        if len(each)
    }


def fitted_training_sections(
    adata: "AnnData", fit: Fit, image: Any = None, *, with_prior: Callable[..., dict[str, SectionData]] | None = None
) -> dict[str, SectionData]:
    """The sections that a fit was made on, with all that it was made from."""
    sections = _data.read_fitted_sections(adata, fit)
    sections = read_inputs(adata, sections, fit, restore(fit), image=image)
    if with_prior is not None:
        sections = with_prior(adata, sections, fit.genes)
    mask = np.isin(adata.obs_names.to_numpy().astype(str), fit.spots)
    return training_sections(adata, sections, mask, fit.genes, fit.layer or None)


def read_inputs(
    adata: "AnnData",
    sections: Mapping[str, SectionData],
    fit: Fit,
    model: Model,
    *,
    features_key: str | None = None,
    image: Any = None,
) -> dict[str, SectionData]:
    """Sections with the features and images that a fitted model reads, compared with those of the fit.

    Raises
    ------
    KeyError
        No features, or no image for a model that reads pixels.
    ValueError
        Features that were not made as those of the fit; ``features_key`` for a model that reads none.
    """
    if features_key is not None and not fit.features_key:
        raise ValueError(f"features_key={features_key!r}: model {fit.model!r} reads no image features.")
    key = features_key or fit.features_key
    read = _data.with_features(adata, sections, key) if key else _data.add_metadata(adata, sections, "X_histo")
    for each in read.values():
        _data.compare_settings(fit.feature_settings, each)
    if not models.reads_pixels(fit.model, model):
        return read
    return {name: replace(each, image=_data.open_fit_image(adata, each, fit, image)) for name, each in read.items()}
