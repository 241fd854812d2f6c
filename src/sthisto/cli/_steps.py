"""The steps that commands share: counts, genes, features, fit."""

import codecs
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from sthisto import _data, encoders, evaluation, metrics, pp, tl, uncertainty
from sthisto.encoders import Encoder
from sthisto.models import MODELS, build

if TYPE_CHECKING:
    from anndata import AnnData

from sthisto.cli._job import FEATURES, FIT, MODEL, N_GENES, Job, logger

FEATURE_OPTIONS = ("encoder", "weights", "patch_um", "mpp", "pitch_um")
FIT_OPTIONS = ("model", "params", "genes", "layer", "seed", "test_genes")


def prepare(adata: "AnnData", job: Job) -> list[str] | None:
    """Log-normalize raw counts and choose genes; return those asked for by name."""
    genes = None if job.args.genes is None else names_in(job.args.genes)
    _data.genes_to_model(adata, genes)
    _normalize(adata, job, genes)
    check_expression(adata, job, genes)
    return genes


def _normalize(adata: "AnnData", job: Job, genes: list[str] | None) -> None:
    args = job.args
    if args.layer not in (None, "X") or not are_counts(adata.X):
        return
    others = [name for name in _data.layer_names(adata) if name != "counts" and _log_normalized(adata.layers[name])]
    if others and args.layer is None:
        raise ValueError(
            f"adata.X holds raw counts, but layers hold log-normalized expression ({', '.join(others)}). "
            f"Choose one: --layer {others[0]}, or --layer X to normalize the counts."
        )
    counts = adata.X
    adata.layers.setdefault("counts", counts)
    adata.X = metrics.lognorm(counts)
    logger.info("X holds raw counts: scaled to 10 000 a spot over all %d genes, then log1p", adata.n_vars)
    if genes is None and "highly_variable" in adata.var:
        job.reuse(f"var['highly_variable'] of {job.source}")
    elif genes is None:
        adata.var["highly_variable"] = choose_genes(adata, counts, args.library_key)


def counts_layer(adata: "AnnData", layer: str | None) -> str | None:
    """Name the layer with raw counts, unless the person named one with expression; X may hold them, too."""
    if layer not in (None, "X"):
        return None
    if are_counts(adata.X):
        adata.layers["counts"] = adata.X
        logger.info("X holds raw counts")
    elif layer == "X" or "counts" not in adata.layers or not are_counts(adata.layers["counts"]):
        logger.info("no raw counts: genes are scored as they are in the file, and no noise ceiling is given")
        return None
    logger.info("expression from the counts, %d genes chosen again on each training half", N_GENES)
    return "counts"


def are_counts(matrix: Any) -> bool:
    """Whether a matrix holds counts: whole numbers, none below 0, not all 0."""
    values = _values(matrix)
    return bool(values.size and values.min() >= 0 and values.max() > 0 and (values == np.rint(values)).all())


def _log_normalized(matrix: Any) -> bool:
    values = _values(matrix)
    return bool(values.size and np.isfinite(values).all() and values.min() >= 0 and not are_counts(matrix))


def _values(matrix: Any) -> Any:
    if matrix is None:
        return np.empty(0)
    return matrix.data if sparse.issparse(matrix) else np.asarray(matrix)


def choose_genes(adata: "AnnData", counts: Any, library_key: str | None) -> evaluation.Mask:
    """Mask (g,) of the genes worth modelling: seen often enough, then the most variable."""
    libraries = _data.section_rows(adata, library_key)
    least = evaluation.least_seen(adata.n_obs, len(libraries))
    labels = np.zeros(adata.n_obs) if library_key is None else adata.obs[library_key].to_numpy()
    chosen = evaluation.choose_genes(sparse.csr_matrix(counts), labels, N_GENES, least_seen=least)
    logger.info(
        "%d of %d genes chosen: seen in %s, then by variance (seurat_v3) where over %d",
        chosen.sum(),
        adata.n_vars,
        f"{least:.0%} of the spots" if least else "any spot",
        N_GENES,
    )
    return chosen


def extract(adata: "AnnData", job: Job, encoder: str | Encoder | None = None, **others: Any) -> None:
    """Extract features by the options; ``others`` override them."""
    args = job.args
    options = {
        "image": image_in(args.image),
        "library_key": args.library_key,
        "patch_um": args.patch_um,
        "mpp": args.mpp,
        "pitch_um": args.pitch_um,
    } | others
    with job.step("features"):
        pp.extract_features(
            adata,
            encoder or encoders.load(args.encoder or "handcrafted", weights=args.weights, device=args.device),
            key_added=FEATURES,
            **options,
        )


def describe(adata: "AnnData", job: Job, models: Sequence[str]) -> None:
    """Extract features where one of the models reads them and they are not there."""
    if not any("features" in MODELS[model].inputs for model in models):
        return
    if FEATURES in adata.obsm and not job.asked(*FEATURE_OPTIONS):
        job.reuse(f"obsm[{FEATURES!r}] of {job.source}")
    else:
        extract(adata, job)


def learn(adata: "AnnData", job: Job, genes: list[str] | None) -> None:
    """Fit, after the features where the model reads them and they are not there."""
    reads = MODELS[job.args.model or MODEL].inputs
    # the record of the features has the scale for models that read pixels
    if "features" in reads or ("patches" in reads and job.asked("mpp", "pitch_um")):
        if FEATURES in adata.obsm and not job.asked(*FEATURE_OPTIONS):
            job.reuse(f"obsm[{FEATURES!r}] of {job.source}")
        else:
            extract(adata, job)
    fit(adata, job, genes)


def fit(adata: "AnnData", job: Job, genes: list[str] | None) -> None:
    args, model = job.args, job.args.model or MODEL
    with job.step("fit"):
        tl.fit(
            adata,
            model,
            features_key=FEATURES,
            layer=None if args.layer == "X" else args.layer,
            genes=genes,
            library_key=args.library_key,
            image=image_in(args.image),
            params=params_in(model, args.params or []) | on_device(args.device),
            random_state=args.seed or 0,
            key_added=FIT,
        )
        if args.test_genes:
            tl.test_genes(adata, image=image_in(args.image), random_state=args.seed or 0, key=FIT)


def names_in(text: str) -> list[str]:
    """Genes from a file, one a line, or from a list with commas."""
    path = Path(text)
    if path.is_file():
        lines = [line.strip() for line in _text_of(path).splitlines()]
        names = [line for line in lines if line and not line.startswith("#")]
    elif path.suffix in (".txt", ".csv", ".tsv") or "/" in text:
        raise FileNotFoundError(f"no file {text} with genes, one a line.")
    else:
        names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"no gene in {text!r}: name them with commas between, or a file with one a line.")
    return names


def _text_of(path: Path) -> str:
    """Text of a file in UTF-8, with a byte-order mark or without, in UTF-16 or in Latin-1."""
    raw = path.read_bytes()
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return raw.decode("utf-16")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def image_in(given: list[str] | None) -> str | dict[str, str] | None:
    """One picture for all, or a picture for each section by its name."""
    if not given:
        return None
    pairs = [entry.partition("=") for entry in given]
    if all(equals for _, equals, _ in pairs) and not Path(given[0]).exists():
        return {name: path for name, _, path in pairs}
    if len(given) > 1:
        raise ValueError("several --image: give each as SECTION=FILE, with the section's name in --library-key.")
    return given[0]


def check_options(job: Job) -> None:
    """Refuse before the work what would fail after it: settings of the model, device, share of an interval, image."""
    given = vars(job.args)
    if given.get("interval") is not None:
        uncertainty.check_level(given["interval"])
    params_in(given.get("model") or MODEL, given.get("params") or [])
    image_in(given.get("image"))
    if given.get("device") not in (None, "cpu"):
        from sthisto._training import pick_device  # noqa: PLC0415  it loads torch

        pick_device(given["device"])


def check_expression(adata: "AnnData", job: Job, genes: list[str] | None) -> None:
    """Refuse before the features what the fit would refuse after them: sections, genes, layer and its values."""
    layer = None if job.args.layer == "X" else job.args.layer
    chosen = _data.genes_to_model(adata, genes)
    for rows in _data.section_rows(adata, job.args.library_key).values():
        _data.expression(adata, rows, chosen, layer)


def on_device(name: str | None) -> dict[str, Any]:
    """Settings that have networks train on a device; none where it is left to be found."""
    return {"device": name} if name else {}


def params_in(model: str, given: Sequence[str]) -> dict[str, Any]:
    """Read settings of a model from ``epochs=20`` or ``epochs=20,members=2``; refuses what it does not take."""
    params: dict[str, Any] = {}
    for assignment in (each for text in given for each in re.split(r",(?=\w+=)", text)):
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"--params {assignment}: expected NAME=VALUE, as epochs=20.")
        try:
            params[name] = json.loads(value)
        except json.JSONDecodeError:
            params[name] = value
    if params:
        try:
            build(model, params)
        except (TypeError, ValueError) as error:
            raise ValueError(f"--params: {error}") from error
    return params
