"""Test which genes can be predicted: block cross-validation against spatially autocorrelated surrogates."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control

from sthisto import _data
from sthisto._crossfit import Refit, block_folds, predict_folds, refit_of
from sthisto.evaluation import score
from sthisto.models import MODELS, Section
from sthisto.models._standardize import expression_of, features_of
from sthisto.tl._prior import Prior
from sthisto.tl._sections import fitted_training_sections, model_section, restore
from sthisto.uncertainty import SurrogateTest, p_values

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

BLOCK = 4.0  # pitches
N_FOLDS = 5
MAX_SPOTS = 1000  # of a section, for the p-values: their cost is cubic


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
    random_state = int(random_state)
    fit = _data.read_fit(adata, key)
    known = Prior.restore(fit)
    data = fitted_training_sections(adata, fit, image, with_prior=None if known is None else known.at_spots)
    sections = [model_section(each, restore(fit)) for each in data.values()]
    described = sections
    if features_key is not None or not fit.features_key:
        read = _data.with_features(adata, data, features_key or "X_histo")
        described = [replace(s, features=each.features) for s, each in zip(sections, read.values(), strict=True)]
    folds = block_folds(sections, N_FOLDS, BLOCK, random_state=random_state, min_spots=MODELS[fit.model].min_spots)
    refit = refit_of(fit.model, fit.params, random_state=fit.random_state)
    _data.write_gene_test(adata, key, fit.genes, scores_and_p_values(sections, described, folds, refit, random_state))


def scores_and_p_values(
    sections: Sequence[Section],
    described: Sequence[Section],
    folds: Sequence[NDArray[np.int64]],
    refit: Refit,
    random_state: int,
) -> dict[str, NDArray[np.float64]]:
    """Columns (g,) of ``var``, from sections with expression and from the same with features, by folds (n,)."""
    r, by_fold = [], []
    for section, fold, predicted in zip(sections, folds, predict_folds(sections, folds, refit), strict=True):
        measured = expression_of(section)
        r.append(_pearson(measured, predicted))
        by_fold += [_pearson(measured[fold == each], predicted[fold == each]) for each in np.unique(fold)]
    mean = _mean(np.array(by_fold))
    p = p_values(_surrogate_test(each, fold, random_state) for each, fold in zip(described, folds, strict=True))
    return {
        "pearson": _mean(np.array(r)),
        "pearson_std": np.sqrt(_mean((np.array(by_fold) - mean) ** 2)),
        "pvalue": p,
        "qvalue": false_discovery_control(p),
    }


def _surrogate_test(section: Section, fold: NDArray[np.int64], random_state: int) -> SurrogateTest:
    """Compare the genes of one section with surrogates, on some of its spots where there are many."""
    rows = np.sort(np.random.default_rng(random_state).permutation(len(section))[:MAX_SPOTS])
    part = section.keep(rows)
    return SurrogateTest.of(part.xy, features_of(part), expression_of(part), fold[rows], random_state=random_state)


def _pearson(measured: NDArray[np.float32], predicted: NDArray[np.float32]) -> NDArray[np.float64]:
    if len(measured) < 3:
        return np.full(measured.shape[1], np.nan)
    r: NDArray[np.float64] = score(measured, predicted)["pearson"]
    return r


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the finite rows (g,); NaN where there are none."""
    finite = np.isfinite(values)
    total, count = np.where(finite, values, 0).sum(axis=0), finite.sum(axis=0)
    mean: NDArray[np.float64] = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
    return mean
