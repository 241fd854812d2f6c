"""Test which genes can be predicted: block cross-validation against spatially autocorrelated surrogates."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control

from sthisto import _data
from sthisto.evaluation import score
from sthisto.models import MODELS, Model, Section, build
from sthisto.models._standardize import expression_of, features_of
from sthisto.tl._sections import fitted_training_sections, model_section, restore
from sthisto.uncertainty import SurrogateTest, p_values

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

BLOCK = 4.0  # pitches
FOLDS = 5
MOST_SPOTS = 1000  # of a section, for the p-values: their cost is cubic


@_data.accepts_spatialdata(image="image", images_of="key")
def test_genes(
    adata: "AnnData | SpatialData",
    *,
    features_key: str | None = None,
    image: Any = None,
    random_state: int = 0,
    key: str = "sthisto",
) -> None:
    """Test which genes of a fit can be predicted.

    The model is fitted again five times, each time without a fifth of the spots in whole blocks, and each gene is
    compared with random patterns of the same spatial autocorrelation: could image features predict those equally well?
    Takes about five times as long as the fit, and a few seconds a section.

    Parameters
    ----------
    adata
        A fitted object, with the expression and the features that it was fitted on.
    features_key
        Features (n, d) in ``obsm`` for the comparison; ``None`` takes those of the fit, else "X_histo".
    image
        Image for models that read pixels, as in :func:`fit`.
    random_state
        Seed of the folds and of the surrogates.
    key
        Name of the fit.

    Returns
    -------
    None. Writes, NaN for genes that are not modelled,

    ``var[f"{key}_pearson"]``, ``var[f"{key}_pearson_std"]`` : Pearson r on held-out blocks, mean over sections, and its
    standard deviation over folds and sections

    ``var[f"{key}_pvalue"]``, ``var[f"{key}_qvalue"]`` : whether image features predict the gene better than patterns
    of the same autocorrelation (:class:`sthisto.uncertainty.SurrogateTest`), and the same after Benjamini and Hochberg:
    among the genes below 0.05 at most 5 % are expected to be false. The figures of ``pl`` warn of the others

    Raises
    ------
    KeyError
        Not fitted, or no features.
    ValueError
        A section within one block, or too few spots; spots or genes of another object.

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic()
    >>> sthisto.pp.extract_features(adata)
    >>> sthisto.tl.fit(adata, "ridge")
    >>> sthisto.tl.test_genes(adata)
    >>> bool((adata.var["sthisto_qvalue"] < 0.05).any())
    True
    """
    fit = _data.read_fit(adata, key)
    data = fitted_training_sections(adata, fit, image)
    sections = [model_section(each, restore(fit)) for each in data.values()]
    described = sections
    if features_key is not None or not fit.features_key:
        read = _data.with_features(adata, data, features_key or "X_histo")
        described = [replace(s, features=each.features) for s, each in zip(sections, read.values(), strict=True)]
    folds = folds_of(sections, random_state, MODELS[fit.model].min_spots)

    def refit(parts: Sequence[Section]) -> Model:
        model = build(fit.model, fit.params)
        model.fit(parts, random_state=fit.random_state, device="", progress=False)
        return model

    _data.write_gene_test(
        adata, key, fit.genes, run_test(sections, described, folds, again=refit, random_state=random_state)
    )


def folds_of(sections: Sequence[Section], random_state: int, least: int) -> list[NDArray[np.int64]]:
    """Fold (n,) of the spots of each section: whole blocks, dealt out in turn, large ones first.

    Raises
    ------
    ValueError
        A section is a single block, or too few spots are left without a fold: fewer than ``least``.
    """
    random, folds = np.random.default_rng(random_state), []
    for section in sections:
        cell = np.floor((section.xy - section.xy.min(axis=0) + random.uniform(0, BLOCK, 2)) / BLOCK)
        _, member, size = np.unique(cell, axis=0, return_inverse=True, return_counts=True)
        if len(size) < 2:
            raise ValueError(
                f"section {section.name!r} with {len(section)} spots is within one block of {BLOCK:g} pitches: too small "
                "to hold out blocks, so its genes cannot be tested."
            )
        dealt = np.empty(len(size), dtype=np.int64)
        dealt[np.argsort(-size - random.uniform(size=len(size)))] = np.arange(len(size)) % FOLDS
        folds.append(dealt[member.ravel()])
    left = [[int((fold != each).sum()) for fold in folds] for each in range(max(fold.max() for fold in folds) + 1)]
    if min(map(sum, left)) < least or min(map(min, left)) < 2:
        raise ValueError(f"too few spots to test genes: without a block {min(map(sum, left))} would be left.")
    return folds


def run_test(
    sections: Sequence[Section],
    described: Sequence[Section],
    folds: Sequence[NDArray[np.int64]],
    *,
    again: Callable[[Sequence[Section]], Model],
    random_state: int,
) -> dict[str, NDArray[np.float64]]:
    """Cross-fit over the folds, and give columns (g,) of ``var``.

    Parameters
    ----------
    sections
        Training spots with expression.
    described
        The same with features, which the model need not read.
    folds
        Of :func:`folds_of`.
    again
        Fits another model with the same settings.
    random_state
        Of the surrogates.
    """
    held_back = _held_back(sections, folds, again)
    r, by_fold = [], []
    for section, fold, predicted in zip(sections, folds, held_back, strict=True):
        measured = expression_of(section)
        r.append(_pearson(measured, predicted))
        by_fold += [_pearson(measured[fold == each], predicted[fold == each]) for each in np.unique(fold)]
    p = p_values(_surrogate_test(each, fold, random_state) for each, fold in zip(described, folds, strict=True))
    return {
        "pearson": _mean(np.array(r)),
        "pearson_std": np.sqrt(_mean((np.array(by_fold) - _mean(np.array(by_fold))) ** 2)),
        "pvalue": p,
        "qvalue": false_discovery_control(p),
    }


def _held_back(
    sections: Sequence[Section], folds: Sequence[NDArray[np.int64]], again: Callable[[Sequence[Section]], Model]
) -> list[NDArray[np.float32]]:
    """Predictions (n, g) of each section by fits that had not seen the block around each spot."""
    held_back = [np.empty_like(expression_of(section)) for section in sections]
    for each in range(max(fold.max() for fold in folds) + 1):
        pairs = list(zip(sections, folds, strict=True))
        model = again([section.keep(np.flatnonzero(fold != each)) for section, fold in pairs])
        for (section, fold), out in zip(pairs, held_back, strict=True):
            rows = np.flatnonzero(fold == each)
            if len(rows):
                out[rows] = np.maximum(model.predict(section.keep(rows)), 0)
    return held_back


def _surrogate_test(section: Section, fold: NDArray[np.int64], random_state: int) -> SurrogateTest:
    """Compare the genes of one section with surrogates, on some of its spots where there are many."""
    rows = np.sort(np.random.default_rng(random_state).permutation(len(section))[:MOST_SPOTS])
    part = section.keep(rows)
    return SurrogateTest.of(part.xy, features_of(part), expression_of(part), fold[rows], random_state=random_state)


def _pearson(measured: NDArray[np.float32], predicted: NDArray[np.float32]) -> NDArray[np.float64]:
    if len(measured) < 3:
        return np.full(measured.shape[1], np.nan)
    r: NDArray[np.float64] = score(measured, predicted)["pearson"]
    return r


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over rows (g,) of what is there; NaN where nothing is."""
    there = np.isfinite(values)
    count = there.sum(axis=0)
    total = np.where(there, values, 0).sum(axis=0)
    mean: NDArray[np.float64] = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
    return mean
