"""Hold out spots, fit on the others, and score predictions of those held out."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse
from tqdm.auto import tqdm

from sthisto import _data, evaluation
from sthisto._data import SectionImage
from sthisto.metrics import lognorm
from sthisto.models import MODELS, Model, Patches, Section, build, reads_pixels

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray
    from spatialdata import SpatialData

    Split = evaluation.RandomSplit | evaluation.BlockSplit

from sthisto.tl._prior import Prior
from sthisto.tl._sections import N_GENES, model_section, number_of_genes, without_device


@_data.accepts_spatialdata(image="image", library_key="library_key", images_of="features_key", kind="features")
def evaluate(
    adata: "AnnData | SpatialData",
    models: str | Iterable[str] | Mapping[str, Mapping[str, Any] | None] = ("attention", "gp", "ridge", "idw"),
    *,
    split: "str | Split | Iterable[str | Split]" = ("random", "block"),
    n_repeats: int = 3,
    counts_layer: str | None = None,
    genes: Iterable[str] | int | None = None,
    features_key: str = "X_histo",
    layer: str | None = None,
    library_key: str | None = None,
    image: Any = None,
    prior: Any = None,
    random_state: int = 0,
) -> pd.DataFrame:
    """Hold out spots, fit each model on the others, and score its predictions of those held out.

    Genes, factors and standardization come from the training spots alone, in every repeat. Spots held out at random are
    between measured ones, so gaps have to be filled; held-out blocks have no measured neighbors. Both are headline
    figures, to be compared with ``"gene mean"`` (the training mean of each gene, whose r counts as 0) and, with counts,
    with ``"ceiling"``: the r that a perfect predictor of the true rates would reach. Compare models with
    :func:`sthisto.evaluation.compare`, draw with :func:`sthisto.pl.evaluation`.

    Parameters
    ----------
    adata
        Section with spot centers in ``obsm["spatial"]``, log-normalized expression or counts, and image features.
    models
        Names in :data:`sthisto.models.MODELS`, or a mapping of names to params, as ``{"attention": {"n_factors":
        20}}``; ``{"device": "cuda:1"}`` is where networks train.
    split
        ``"random"``, ``"block"``, or objects such as :class:`sthisto.evaluation.BlockSplit` with another fraction or
        block; :class:`sthisto.evaluation.AllSpotsSplit` is the protocol of HisToSGE's scripts.
    n_repeats
        Repeats of each split. Repeat i splits, fits and thins with the seed ``random_state + i``.
    counts_layer
        Layer with raw counts. Expression is log1p of counts per 10 000 over all genes then, genes are chosen on the
        training spots of each repeat, and the ceiling is given. ``None``: ``layer`` and the genes as they are.
    genes
        Genes to score, or with ``counts_layer`` how many to choose: ``seurat_v3`` among those detected in 10 % of the
        training spots (in any, on sections of more than 1000 spots). ``None`` chooses 1000 with ``counts_layer``, else
        takes ``var["highly_variable"]`` where present, else all. Scores of genes that were chosen on all spots are
        slightly too high.
    features_key
        Features (n, d) in ``obsm``.
    layer
        Layer with log-normalized expression; ``None`` reads ``X``.
    library_key
        Column of ``obs`` that names the section of each spot. Sections are fitted together and scored separately.
    image
        Image for models that read pixels, as in :func:`fit`.
    prior
        Expression as predicted elsewhere, as in :func:`fit`. Adds the rows ``"prior"``, the prior alone, and
        ``"<model> + prior"``, in which every fit learns from its training spots how much the prior counts.
    random_state
        Seed; the same seed gives the same scores on a CPU.

    Returns
    -------
    One long table with the columns ``model``; ``split``; ``repeat``; ``section``; ``genes``, how these were chosen
    (``"each training half"``, ``"all spots"`` or ``"given"``); ``gene``, NaN for the mean over genes; ``metric``
    (``pearson``, ``spearman``, ``mse``, ``mae``; ``seconds`` and ``peak_memory_mb`` of each fit, see
    :meth:`sthisto.evaluation.Split.run`); ``value``. Nothing is written.

    Raises
    ------
    KeyError
        Unknown model, gene, layer or column; no coordinates, features or image.
    TypeError
        Params that no file could keep.
    ValueError
        Unknown split, a fraction outside (0, 1), ``counts_layer`` without counts or with ``layer``, a number of genes
        without ``counts_layer``, expression that ``fit`` would refuse, fewer than 10 held-out spots in a section or
        fewer training spots than the models need.

    References
    ----------
    Blocks: Roberts et al. (2017), Ecography, "Cross-validation strategies for data with temporal, spatial,
    hierarchical, or phylogenetic structure".

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic()
    >>> report = sthisto.tl.evaluate(adata, "idw", split="random", counts_layer="counts")
    >>> r = report.query("gene.isna() and metric == 'pearson'").groupby("model")["value"].mean()
    >>> bool(r["gene mean"] < r["idw"] < r["ceiling"])
    True
    """
    (settings, devices), splits, seed = _settings(models), _splits(split), int(random_state)
    if isinstance(n_repeats, bool) or not isinstance(n_repeats, Integral) or n_repeats < 1:
        raise ValueError(f"n_repeats={n_repeats!r}: expected a whole number of 1 or more.")
    number, given = _number_and_names(genes, counts_layer)
    known = None if prior is None else Prior.of(prior)
    reads = any("features" in MODELS[name].inputs for name in settings) or bool(known and known.fit)
    read = _data.with_features if reads else _data.add_metadata
    found = read(adata, _data.read_sections(adata, library_key), features_key)
    if known is not None:
        found = known.at_spots(adata, found, _scored_genes(adata, counts_layer, given))
    tissue = _data.training_rows(adata, None)
    sections = [each.keep(tissue[each.rows]) for each in found.values()]
    dataset = _dataset(adata, sections, layer, counts_layer, given)
    seeing = [name for name, own in settings.items() if reads_pixels(name, build(name, own))]
    images = [_data.open_feature_image(adata, each, image) for each in sections if seeing]
    trials = [
        (each, repeat, [each.hold_out(section.xy, seed + repeat) for section in dataset.sections])
        for each in splits
        for repeat in range(n_repeats)
    ]
    _refuse_few_left(trials, dataset.sections, settings)
    tables = []
    runs = [(name, with_prior) for name in settings for with_prior in ([False] if known is None else [False, True])]
    with tqdm(total=len(trials) * len(runs), desc="evaluate") as bar:
        for each, repeat, held_out in trials:
            cut = dataset.split(held_out, n_genes=number, all_spots=each.all_spots)
            parts = []
            for model, with_prior in runs:
                built = build(model, settings[model], with_prior=with_prior)
                patches = _patches(images, sections, built) if model in seeing else ()
                label, where = f"{model} + prior" if with_prior else model, devices[model]
                parts.append(cut.run(label, built, patches=patches, random_state=seed + repeat, device=where))
                bar.update()
            parts.append(cut.reference_scores(random_state=seed + repeat))
            choice = "given" if dataset.columns is not None else "all spots" if each.all_spots else "each training half"
            tables.append(pd.concat(parts, ignore_index=True).assign(split=each.name, repeat=repeat, genes=choice))
    return pd.concat(tables, ignore_index=True)[
        ["model", "split", "repeat", "section", "genes", "gene", "metric", "value"]
    ]


def _settings(
    models: str | Iterable[str] | Mapping[str, Mapping[str, Any] | None],
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Settings of each model, all of which can be built, and where it trains."""
    given = models if isinstance(models, Mapping) else dict.fromkeys([models] if isinstance(models, str) else models)
    if not given:
        raise ValueError(f"no model to evaluate (there are: {', '.join(sorted(MODELS))}).")
    parts = {name: without_device(own) for name, own in given.items()}
    settings = {name: own for name, (own, _) in parts.items()}
    for name, own in settings.items():
        build(name, own)
    return settings, {name: device for name, (_, device) in parts.items()}


def _scored_genes(adata: "AnnData", counts_layer: str | None, genes: Iterable[str] | None) -> "NDArray[np.str_]":
    """All genes that a split may choose from."""
    return _data.gene_names(adata) if counts_layer is not None else _data.genes_to_model(adata, genes)


def _splits(split: "str | Split | Iterable[str | Split]") -> "list[Split]":
    names = [split] if isinstance(split, str | evaluation.RandomSplit | evaluation.BlockSplit) else list(split)
    known = (evaluation.RandomSplit, evaluation.BlockSplit)
    if not names or not all(isinstance(each, known) or each in evaluation.SPLITS for each in names):
        raise ValueError(
            f"split={split!r}: expected 'random', 'block', both, or objects as evaluation.BlockSplit(fraction=0.3)."
        )
    return [evaluation.SPLITS[each] if isinstance(each, str) else each for each in names]


def _number_and_names(genes: Iterable[str] | int | None, counts_layer: str | None) -> tuple[int, Iterable[str] | None]:
    """How many genes to choose, and which were named."""
    number = number_of_genes(genes)
    if number is None:
        return N_GENES, genes  # type: ignore[return-value]
    if counts_layer is None:
        raise ValueError(f"genes={genes}: genes are chosen by counts. Pass counts_layer=, or name the genes.")
    return number, None


def _dataset(
    adata: "AnnData",
    places: Sequence[_data.SectionData],
    layer: str | None,
    counts_layer: str | None,
    genes: Iterable[str] | None,
) -> evaluation.Dataset:
    """Read all that splits are made of."""
    if counts_layer is not None and layer is not None:
        raise ValueError(
            f"layer={layer!r} and counts_layer={counts_layer!r}: with counts, expression is computed from them."
        )
    chosen_later = counts_layer is not None and genes is None
    given = _data.genes_to_model(adata, _data.gene_names(adata) if chosen_later else genes)
    counts = None if counts_layer is None else _counts(adata, counts_layer)
    sections = [model_section(place, build("idw")) for place in places]
    if counts is None:
        values = [_data.expression(adata, place.rows, given, layer) for place in places]
        return evaluation.Dataset(sections=sections, expression=values, genes=given, columns=np.arange(len(given)))
    return evaluation.Dataset(
        sections=sections,
        expression=[lognorm(counts[place.rows]) for place in places],
        genes=_data.gene_names(adata),
        columns=None if chosen_later else _data.gene_columns(adata, given),
        counts=[counts[place.rows] for place in places],
    )


def _patches(pixels: Iterable[SectionImage], places: Iterable[_data.SectionData], model: Model) -> list[Patches]:
    """Patches of each section for a model that reads pixels."""
    return [each.patches(place.xy, model) for each, place in zip(pixels, places, strict=True)]


def _counts(adata: "AnnData", layer: str) -> Any:
    """Raw counts (n_obs, n_vars) as CSR; refuses what are none."""
    if layer not in _data.layer_names(adata):
        found = ", ".join(map(repr, _data.layer_names(adata))) or "nothing"
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
    trials: "Iterable[tuple[Split, int, list[NDArray[np.bool_]]]]", sections: Sequence[Section], models: Iterable[str]
) -> None:
    least = max(MODELS[name].min_spots for name in models)
    for split, _, masks in trials:
        out, left = [int(mask.sum()) for mask in masks], [int((~mask).sum()) for mask in masks]
        if min(out) < evaluation.MIN_HELD_OUT or min(left) < 2 or sum(left) < least:
            counted = "; ".join(
                f"{section.name!r}: {h} held out, {rest} left"
                for section, h, rest in zip(sections, out, left, strict=True)
            )
            raise ValueError(
                f"too few spots for the {split.name} split ({counted}): every section needs {evaluation.MIN_HELD_OUT} "
                f"held out and 2 left, and the models {least} left in all."
            )
