"""Hide spots, fit, and score what was hidden."""

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from tqdm.auto import tqdm

from sthisto import _data, evaluation, grids
from sthisto._data import SectionImage
from sthisto.metrics import lognorm
from sthisto.models import MODELS, Model, Patches, Section, build, reads_pixels

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

from sthisto.tl._sections import model_section


@_data.accepts_spatialdata(image="image", library_key="library_key", images_of="features_key", kind="features")
def evaluate(  # noqa: PLR0913  options of an experiment, all with defaults
    adata: "AnnData | SpatialData",
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
    :meth:`sthisto.evaluation.Split.run`); ``value``. Writes

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
    >>> report = sthisto.tl.evaluate(adata, "idw", split="random", counts_layer="counts")
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
    reads = any("features" in MODELS[name].inputs for name in settings)
    read = _data.with_features if reads else _data.add_metadata
    places = read(adata, _data.read_sections(adata, library_key), features_key)
    tissue = _data.training_rows(adata, None)
    places = {name: each.keep(tissue[each.rows]) for name, each in places.items()}
    measured = _measured(adata, places.values(), layer, counts_layer, genes)
    seeing = [name for name, own in settings.items() if reads_pixels(name, build(name, own))]
    pixels = [_data.open_feature_image(adata, place, image) for place in places.values() if seeing]
    hidings = [
        (
            name,
            seed,
            [grids.hold_out(section.xy, fraction, block=side, random_state=seed) for section in measured.sections],
        )
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
                built = build(model, own)
                patches = _patches(pixels, places.values(), built) if model in seeing else ()
                parts.append(trial.run(model, built, patches=patches, random_state=seed, device=device or ""))
                bar.update()
            parts.append(trial.reference_scores(random_state=seed))
            tables.append(pd.concat(parts, ignore_index=True).assign(split=name, repeat=seed - random_state))
    choice = "given" if measured.columns is not None else "all spots" if paper else "each training half"
    report = pd.concat(tables, ignore_index=True).assign(genes=choice)
    if not paper:
        first = (report["model"] == next(iter(settings))) & (report["split"] == next(iter(splits)))
        r = report[first & (report["metric"] == "pearson")].groupby("gene")["value"].mean()
        _data.write(adata, var={"pcc_heldout": r.reindex(adata.var_names).to_numpy()})
    return report[["model", "split", "repeat", "library", "genes", "gene", "metric", "value"]]


def _settings(models: str | Iterable[str], params: Mapping[str, Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """Give the settings of each model, all of which can be built."""
    names = [models] if isinstance(models, str) else list(models)
    if not names:
        raise ValueError(f"no model to evaluate (there are: {', '.join(sorted(MODELS))}).")
    unnamed = sorted(set(params or {}) - set(names))
    if unnamed:
        raise KeyError(f"params of {', '.join(map(repr, unnamed))}, but the models are {', '.join(map(repr, names))}.")
    settings = {name: _data.plain_params((params or {}).get(name)) for name in names}
    for name, own in settings.items():
        build(name, own)
    return settings


def _splits(split: str | Iterable[str], block: float) -> dict[str, float | None]:
    """Sides of the blocks to hide, None for single spots, by the names of the splits."""
    sides = {"random": None, "block": block}
    names = [split] if isinstance(split, str) else list(split)
    if not names or not set(names) <= set(sides):
        raise ValueError(f"split={split!r}: expected 'random', 'block' or both.")
    return {name: sides[name] for name in names}


def _measured(
    adata: "AnnData",
    places: Collection[_data.SectionData],
    layer: str | None,
    counts_layer: str | None,
    genes: Iterable[str] | None,
) -> evaluation.Dataset:
    """Read all that trials are cut from."""
    if counts_layer is not None and layer is not None:
        raise ValueError(f"layer={layer!r} beside counts_layer={counts_layer!r}: with counts, expression is made anew.")
    anew = counts_layer is not None and genes is None
    given = _data.genes_to_model(adata, _data.gene_names(adata) if anew else genes)
    counts = None if counts_layer is None else _counts(adata, counts_layer)
    sections = [model_section(place, build("idw")) for place in places]
    if counts is None:
        values = [_data.expression(adata, place.rows, given, layer) for place in places]
        return evaluation.Dataset(sections=sections, expression=values, genes=given, columns=np.arange(len(given)))
    return evaluation.Dataset(
        sections=sections,
        expression=[lognorm(counts[place.rows]) for place in places],
        genes=_data.gene_names(adata),
        columns=None if anew else _data.gene_columns(adata, given),
        counts=[counts[place.rows] for place in places],
    )


def _patches(pixels: Iterable[SectionImage], places: Iterable[_data.SectionData], model: Model) -> list[Patches]:
    """Give a model that reads pixels those of each section."""
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
