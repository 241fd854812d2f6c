"""The command line: files in, files out.

Each command reads an AnnData file, does what is missing, says what it decided, and writes its result whole or not at
all. What the person did wrong ends in one line and exit code 2; decisions go to stderr, the result to stdout.
"""
# ruff: noqa: PLC0415  --help and mistakes in the options are answered without loading scanpy or matplotlib

import argparse
import json
import logging
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from scipy import sparse

from sthisto import __version__, _slide, datasets, evaluation, grids, metrics, pl, pp, tl
from sthisto.encoders import ENCODERS
from sthisto.models import MODELS

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame

logger = logging.getLogger("sthisto")

MODEL, FEATURES, FIT = "attention", "X_histo", "sthisto"
EVALUATED = ("attention", "gp", "ridge", "idw")
N_GENES = 1000
PICTURES = (".jpg", ".pdf", ".png", ".svg")
KINDS: dict[type, Any] = {bool: bool, int: int, float: int | float, str: str, tuple: list}  # of JSON, for a default
FEATURE_OPTIONS = ("encoder", "weights", "patch_um", "mpp", "pitch_um")
FIT_OPTIONS = ("model", "params", "genes", "layer", "seed")
DEMO_GENES = ("region_00", "fine_01", "density_02")  # one of each kind that the picture tells of


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Pipelines need to tell a mistake in their input from a fault of the program: the first is one line on stderr and 2,
    the second a traceback.

    Parameters
    ----------
    argv
        Arguments without the program's name; ``None`` takes those of the process.

    Returns
    -------
    0, or 2 where the input was wrong, or 130 where the run was interrupted.

    Raises
    ------
    SystemExit
        2 for options that cannot be read, 0 after ``--help``.

    Examples
    --------
    >>> main(["fit", "section.h5ad", "--save", "nowhere/fit.safetensors"])
    2
    """
    args = _parser().parse_args(argv)
    job = _Job(args)
    with _spoken(quiet=args.quiet):
        try:
            summary, text = args.run(job)
        except (KeyError, ValueError, OSError, ImportError) as error:
            if args.debug:
                traceback.print_exc()
            print(f"sthisto: error: {_one_line(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("sthisto: interrupted, nothing half-written is left", file=sys.stderr)
            return 130
    told = {"command": args.command, "version": __version__, **summary, "seconds": job.seconds}
    print(json.dumps(told) if args.json else text)
    return 0


@dataclass
class _Job:
    """One run: its options, and what is told of it at the end."""

    args: argparse.Namespace
    seconds: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)

    @property
    def progress(self) -> bool:
        return not self.args.quiet and sys.stderr.isatty()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        logger.info("%s: %.1f s", name, self.seconds[name])

    def asked(self, *options: str) -> list[str]:
        """Which of the options were given, as they are typed."""
        return [f"--{name.replace('_', '-')}" for name in options if getattr(self.args, name) is not None]

    def reuse(self, what: str) -> None:
        logger.info("reusing %s", what)
        self.reused.append(what)


# --- commands ------------------------------------------------------------------------------------------------------


def _features(job: _Job) -> tuple[dict[str, Any], str]:
    _check_output(job.args.output, ".h5ad")
    adata = _read(job)
    _extract(adata, job)
    _write(adata, job.args.output, job)
    n, d = adata.obsm[FEATURES].shape
    return {"output": str(job.args.output), "spots": n, "features": d}, f"{job.args.output}: {n} spots x {d} features"


def _fit(job: _Job) -> tuple[dict[str, Any], str]:
    args = job.args
    if args.output is None and args.save is None:
        raise ValueError("nowhere to write to: name a section to write with -o, a model with --save, or both.")
    for path, suffix in ((args.output, ".h5ad"), (args.save, ".safetensors")):
        _check_output(path, suffix)
    adata = _read(job)
    _learn(adata, job, _prepare(adata, job))
    written = [str(path) for path in (args.output, args.save) if path is not None]
    if args.output is not None:
        _write(adata, args.output, job)
    if args.save is not None:
        tl.save(adata, args.save, key=FIT)
    fit = _slide.read_fit(adata, FIT)
    summary = {"output": written, "model": fit.model, "spots": len(fit.spots), "genes": len(fit.genes)}
    text = f"{' and '.join(written)}: {fit.model}, fitted to {len(fit.genes)} genes on {len(fit.spots)} spots"
    return {**summary, "reused": job.reused}, text


def _upsample(job: _Job) -> tuple[dict[str, Any], str]:
    args = job.args
    show = _drawing(args)
    _check_output(args.output, ".h5ad")
    _check_output(args.picture, *PICTURES)
    adata = _read(job)
    if show:
        _slide.genes_to_model(adata, show)  # a misspelt gene is told before the work
    fits = adata.uns.get("sthisto", {}).get("fit", {})
    anew = job.asked(*FIT_OPTIONS, *FEATURE_OPTIONS)
    if FIT in fits and not anew:
        job.reuse(f"the fitted model in {args.section}")
        _refuse_unmodelled(show, _slide.read_fit(adata, FIT).genes)
    else:
        if FIT in fits:
            logger.info("fitting again, as %s is given", ", ".join(anew))
        genes = _prepare(adata, job)
        _refuse_unmodelled(show, _slide.genes_to_model(adata, genes))
        _learn(adata, job, genes)
    fit = _slide.read_fit(adata, FIT)
    if show and len(fit.libraries) > 1:
        raise ValueError(f"--picture draws one section, and {args.section} holds {len(fit.libraries)}. Leave it out.")
    with job.step("upsample"):
        dense = tl.upsample(adata, args.grid, image=_image(args.image), device=args.device, progress=job.progress)
    _write(dense, args.output, job)
    if show:
        _draw(adata, dense, show, args.picture, layer=fit.layer or None, library_key=fit.library_key or None)
    paths = {"output": str(args.output), "picture": str(args.picture) if show else None}
    sizes = {"model": fit.model, "spots": adata.n_obs, "points": dense.n_obs, "genes": dense.n_vars}
    text = f"{args.output}: {dense.n_obs} points x {dense.n_vars} genes, from {adata.n_obs} spots"
    return {**paths, **sizes, "reused": job.reused}, text + (f"\n{args.picture}: {', '.join(show)}" if show else "")


def _evaluate(job: _Job) -> tuple[dict[str, Any], str]:
    args = job.args
    _check_output(args.output, ".csv")
    _check_output(args.picture, *PICTURES)
    adata = _read(job)
    models = _names(args.models)
    unknown = sorted(set(models) - set(MODELS))
    if unknown:
        raise ValueError(f"--models {','.join(unknown)}: there are {', '.join(MODELS)}.")
    counts = _counts_layer(adata, args.layer)
    _describe(adata, job, models)
    with job.step("evaluate"):
        table = tl.evaluate(
            adata,
            models,
            split=args.split or ("random", "block"),
            fraction=args.fraction,
            n_repeats=args.repeats,
            counts_layer=counts,
            n_genes=N_GENES,
            features_key=FEATURES,
            layer=None if counts or args.layer == "X" else args.layer,
            genes=None if args.genes is None else _names(args.genes),
            library_key=args.library_key,
            image=_image(args.image),
            random_state=args.seed or 0,
            device=args.device,
            progress=job.progress,
        )
    for path, write in ((args.output, _write_table), (args.picture, _draw_table)):
        if path is not None:
            with job.step(f"write {path.name}"), _whole_file(path) as partial:
                write(table, partial)
    return _told_scores(table, args)


def _told_scores(table: "DataFrame", args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Mean Pearson r of each model in each split, as data and as text."""
    means = (
        evaluation.gene_means(table, "pearson").groupby(["split", "model"], sort=False)["value"].mean().reset_index()
    )
    scores: dict[str, dict[str, float]] = {}
    for split, model, r in zip(means["split"], means["model"], means["value"], strict=True):
        scores.setdefault(str(split), {})[str(model)] = float(r)
    width = max(len(model) for each in scores.values() for model in each) + 2
    rows = [
        f"  {model:<{width}}" + "".join(f"{each[model]:>10.3f}" for each in scores.values())
        for model in next(iter(scores.values()))
    ]
    paths = {
        name: None if path is None else str(path) for name, path in vars(args).items() if name in ("output", "picture")
    }
    text = "\n".join(
        [
            f"Pearson r on hidden spots, mean over genes and {args.repeats} repeats; genes: {table['genes'].iloc[0]}",
            f"  {'':<{width}}" + "".join(f"{split:>10}" for split in scores),
            *rows,
            *(path for path in paths.values() if path),
        ]
    )
    return {**paths, "repeats": args.repeats, "genes": str(table["genes"].iloc[0]), "pearson": scores}, text


def _demo(job: _Job) -> tuple[dict[str, Any], str]:
    folder, seed = job.args.output, job.args.seed or 0
    folder.mkdir(parents=True, exist_ok=True)
    with job.step("section"):
        adata = datasets.synthetic(seed=seed)
        logger.info("a synthetic section: %d spots, %d genes, and its picture", *adata.shape)
    with job.step("features"):
        pp.extract_features(adata, progress=job.progress)
    hidden = grids.hold_out(adata.obsm["spatial"], 0.5, seed=seed)
    with job.step("held out"):
        scores = _held_out(adata, hidden, (MODEL, "idw"), seed, job)
    with job.step("fit"):
        tl.fit(adata, MODEL, random_state=seed, device=job.args.device, progress=job.progress)
    with job.step("upsample"):
        dense = tl.upsample(adata, 3, progress=job.progress)
    _write(dense, folder / "dense.h5ad", job)
    _draw(adata, dense, DEMO_GENES, folder / "dense.png")
    paths = {"output": str(folder / "dense.h5ad"), "picture": str(folder / "dense.png")}
    rows = [f"  {name:<12}{r['measured']:>10.3f}{r['truth']:>12.3f}" for name, r in scores.items()]
    text = "\n".join(
        [
            f"Pearson r on {hidden.sum()} hidden spots, mean over {adata.n_vars} genes",
            f"  {'':<12}{'measured':>10}{'true rate':>12}",
            *rows,
            f"{paths['output']}: {dense.n_obs} points x {dense.n_vars} genes, from all {adata.n_obs} spots",
            f"{paths['picture']}: {', '.join(DEMO_GENES)}, measured and predicted",
        ]
    )
    sizes = {"spots": adata.n_obs, "hidden": int(hidden.sum()), "points": dense.n_obs, "genes": dense.n_vars}
    return {**paths, **sizes, "pearson": scores}, text


def _held_out(
    adata: "AnnData", hidden: Any, models: Sequence[str], seed: int, job: _Job
) -> dict[str, dict[str, float]]:
    """Mean Pearson r of each model on the hidden spots (n,), which it never sees."""
    scores = {}
    goals = {"measured": adata.X.toarray(), "truth": datasets.synthetic_truth(adata)}
    for name in models:
        tried = adata.copy()
        tl.fit(tried, name, train_on=~hidden, random_state=seed, device=job.args.device, progress=job.progress)
        tl.predict(tried)
        predicted = tried.layers[FIT][hidden]
        scores[name] = {
            goal: float(np.nanmean(metrics.pearson(values[hidden], predicted))) for goal, values in goals.items()
        }
    return scores


# --- steps ---------------------------------------------------------------------------------------------------------


def _read(job: _Job) -> "AnnData":
    """Read a section, with gene names made unique."""
    import h5py
    from anndata import read_h5ad

    path = job.args.section
    if not path.exists():
        raise FileNotFoundError(f"no file {path}.")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is not an h5ad file. Read it with scanpy or squidpy, and adata.write_h5ad(...).")
    with h5py.File(path) as file:
        if not {"obs", "var"} <= set(file):
            raise ValueError(
                f"{path} holds no AnnData (found: {', '.join(file) or 'nothing'}). Write it as h5ad first."
            )
    with job.step("read"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*names are not unique")  # told below, once
        adata = read_h5ad(path)
    logger.info("%s: %d spots x %d genes", path, *adata.shape)
    double = adata.var_names[adata.var_names.duplicated()]
    if len(double):
        adata.var_names_make_unique()
        warnings.warn(
            f"{len(double)} gene names repeat others (first: {double[0]!r}); they were made unique by a number.",
            stacklevel=2,
        )
    return adata


def _prepare(adata: "AnnData", job: _Job) -> list[str] | None:
    """Log-normalise raw counts and choose genes; return those asked for by name."""
    args = job.args
    genes = None if args.genes is None else _names(args.genes)
    _slide.genes_to_model(adata, genes)
    if args.layer not in (None, "X") or not _are_counts(adata.X):
        if genes is None and "highly_variable" not in adata.var:
            logger.info("no var['highly_variable']: all %d genes are modelled", adata.n_vars)
        return genes
    others = [name for name, layer in adata.layers.items() if name != "counts" and _log_normalised(layer)]
    if others and args.layer is None:
        raise ValueError(
            f"adata.X holds raw counts, but layers hold log-normalised expression ({', '.join(others)}). "
            f"Say which to learn from: --layer {others[0]}, or --layer X to normalise the counts."
        )
    counts = adata.X
    adata.layers.setdefault("counts", counts)
    adata.X = metrics.lognorm(counts)
    logger.info("X holds raw counts: scaled to 10 000 a spot over all %d genes, then log1p", adata.n_vars)
    if genes is None and "highly_variable" in adata.var:
        job.reuse(f"var['highly_variable'] of {args.section}")
    elif genes is None:
        adata.var["highly_variable"] = _choose_genes(adata, counts, args.library_key)
    return genes


def _counts_layer(adata: "AnnData", layer: str | None) -> str | None:
    """Name the layer with raw counts, unless the person named one with expression; X may hold them, too."""
    if layer not in (None, "X"):
        return None
    if _are_counts(adata.X):
        adata.layers["counts"] = adata.X
        logger.info("X holds raw counts")
    elif layer == "X" or "counts" not in adata.layers or not _are_counts(adata.layers["counts"]):
        logger.info("no raw counts: genes are scored as they are in the file, and no noise ceiling is given")
        return None
    logger.info("expression from the counts, %d genes chosen anew on each training half", N_GENES)
    return "counts"


def _are_counts(matrix: Any) -> bool:
    """Whether a matrix holds counts: whole numbers, none below 0, not all 0."""
    values = _values(matrix)
    return bool(values.size and values.min() >= 0 and values.max() > 0 and (values == np.rint(values)).all())


def _log_normalised(matrix: Any) -> bool:
    values = _values(matrix)
    return bool(values.size and np.isfinite(values).all() and values.min() >= 0 and not _are_counts(matrix))


def _values(matrix: Any) -> Any:
    if matrix is None:
        return np.empty(0)
    return matrix.data if sparse.issparse(matrix) else np.asarray(matrix)


def _choose_genes(adata: "AnnData", counts: Any, library_key: str | None) -> evaluation.Mask:
    """Mask (g,) of the genes worth modelling: seen often enough, then the most variable."""
    libraries = _slide.sections(adata, library_key)
    least = 0.0 if adata.n_obs > evaluation.MANY_SPOTS * len(libraries) else evaluation.LEAST_SEEN
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


def _extract(adata: "AnnData", job: _Job) -> None:
    args = job.args
    with job.step("features"):
        pp.extract_features(
            adata,
            args.encoder or "handcrafted",
            image=_image(args.image),
            library_key=args.library_key,
            patch_um=args.patch_um,
            mpp=args.mpp,
            pitch_um=args.pitch_um,
            weights=args.weights,
            device=args.device,
            key_added=FEATURES,
            progress=job.progress,
        )


def _describe(adata: "AnnData", job: _Job, models: Sequence[str]) -> None:
    """Extract features where one of the models reads them and they are not there."""
    if not any("features" in MODELS[model].inputs for model in models):
        return
    if FEATURES in adata.obsm and not job.asked(*FEATURE_OPTIONS):
        job.reuse(f"obsm[{FEATURES!r}] of {job.args.section}")
    else:
        _extract(adata, job)


def _learn(adata: "AnnData", job: _Job, genes: list[str] | None) -> None:
    """Fit, after the features where the model reads them and they are not there."""
    args, model = job.args, job.args.model or MODEL
    params = _params(model, args.params or [])
    reads = MODELS[model].inputs
    # the record of the features tells the scale to models that read pixels
    if "features" in reads or ("patches" in reads and job.asked("mpp", "pitch_um")):
        if FEATURES in adata.obsm and not job.asked(*FEATURE_OPTIONS):
            job.reuse(f"obsm[{FEATURES!r}] of {args.section}")
        else:
            _extract(adata, job)
    with job.step("fit"):
        tl.fit(
            adata,
            model,
            features_key=FEATURES,
            layer=None if args.layer == "X" else args.layer,
            genes=genes,
            library_key=args.library_key,
            image=_image(args.image),
            params=params,
            random_state=args.seed or 0,
            device=args.device,
            key_added=FIT,
            progress=job.progress,
        )


def _write(adata: "AnnData", path: Path, job: _Job) -> None:
    with job.step("write"), _whole_file(path) as partial:
        adata.write_h5ad(partial)


def _draw(adata: "AnnData", dense: "AnnData", show: Sequence[str], path: Path, **options: Any) -> None:
    import matplotlib as mpl

    mpl.use("Agg")  # a file is all that is wanted, and there may be no screen
    with _whole_file(path) as partial:
        pl.genes(adata, dense, list(show), show=False, save=partial, **options)


def _write_table(table: "DataFrame", path: Path) -> None:
    table.to_csv(path, index=False)


def _draw_table(table: "DataFrame", path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    pl.evaluation(table, show=False, save=path)


@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """Give a name to write to, and move what was written to ``path`` once it is whole."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# --- options -------------------------------------------------------------------------------------------------------


def _names(text: str) -> list[str]:
    """Genes from a file, one a line, or from a list with commas."""
    path = Path(text)
    if path.is_file():
        lines = (line.strip() for line in path.read_text().splitlines())
        names = [line for line in lines if line and not line.startswith("#")]
    elif path.suffix in (".txt", ".csv", ".tsv") or "/" in text:
        raise FileNotFoundError(f"no file {text} with genes, one a line.")
    else:
        names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"no gene in {text!r}: name them with commas between, or a file with one a line.")
    return names


def _image(given: list[str] | None) -> str | dict[str, str] | None:
    """One picture for all, or a picture for each section by its name."""
    if not given:
        return None
    pairs = [entry.partition("=") for entry in given]
    if all(equals for _, equals, _ in pairs) and not Path(given[0]).exists():
        return {name: path for name, _, path in pairs}
    if len(given) > 1:
        raise ValueError("several --image: give each as SECTION=FILE, with the section's name in --library-key.")
    return given[0]


def _params(model: str, given: Sequence[str]) -> dict[str, Any]:
    """Read settings of a model from ``epochs=20`` or ``epochs=20,members=2``; refuses values of another kind."""
    params: dict[str, Any] = {}
    for assignment in (each for text in given for each in re.split(r",(?=\w+=)", text)):
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"--params {assignment}: expected NAME=VALUE, as epochs=20.")
        try:
            params[name] = json.loads(value)
        except json.JSONDecodeError:
            params[name] = value
    defaults = {each.name: each.default for each in fields(MODELS[model].load())}  # type: ignore[arg-type]  # a dataclass
    for name, value in params.items():
        default = defaults.get(name)
        kinds = KINDS.get(type(default), object)
        if not isinstance(value, kinds):
            raise ValueError(f"--params {name}={value}: expected a value like {json.dumps(default)}.")
    return params


def _drawing(args: argparse.Namespace) -> list[str]:
    """Genes to draw; none where no picture is wanted."""
    if (args.picture is None) != (args.show is None):
        raise ValueError("--picture FILE.png and --show GENE,GENE go together.")
    return [] if args.show is None else _names(args.show)


def _refuse_unmodelled(show: Sequence[str], genes: Any) -> None:
    absent = [gene for gene in show if gene not in set(genes)]
    if absent:
        raise ValueError(f"--show {','.join(absent)}: not among the {len(genes)} genes modelled. Name it in --genes.")


def _check_output(path: Path | None, *suffixes: str) -> None:
    """Refuse a place that cannot be written to before the work, not after it."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into. Make it first.")
    if path.is_dir() or path.suffix.lower() not in suffixes:
        raise ValueError(f"cannot write {path}: the name of the file should end in {' or '.join(suffixes)}.")


# --- talking -------------------------------------------------------------------------------------------------------


@contextmanager
def _spoken(*, quiet: bool) -> Iterator[None]:
    """Log lines and warnings as single lines on stderr, for as long as a command runs."""
    handler, level = logging.StreamHandler(sys.stderr), logger.level
    handler.setFormatter(logging.Formatter("sthisto: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            for of_developers in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", of_developers)
            warnings.showwarning = _show_warning
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"sthisto: warning: {_as_typed(str(message))}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return _as_typed(str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error))


def _as_typed(text: str) -> str:
    """One line, with the options of the functions named as they are typed here."""
    names = "device|genes|image|layer|library_key|mpp|patch_um|pitch_um|weights"
    text = re.sub(rf"\b({names})=(?=[\s.,;:)]|$)", lambda found: f"--{found[1].replace('_', '-')}", text)
    return " ".join(text.split())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"sthisto: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sthisto",
        description="Dense spatial gene expression from histology.",
        epilog="Start with 'sthisto demo'. On your own section, 'sthisto upsample' does all the steps at once:\n"
        "  sthisto upsample SECTION.h5ad --image SECTION.jpg -o dense.h5ad",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sthisto {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="run the whole job on a synthetic section",
        description="Make a synthetic section, hide half of its spots, predict them, print how well that went beside "
        "inverse-distance weighting, then write the dense map of all spots and a picture of it.",
    )
    demo.set_defaults(run=_demo)
    demo.add_argument("-o", "--output", type=Path, default=Path(), metavar="DIR", help="where to write (default: here)")
    demo.add_argument("--seed", type=int, metavar="N", help="of the section and all that follows (default 0)")
    demo.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")
    for name, add, told in (
        ("features", _add_features, "describe the tissue around every spot"),
        ("fit", _add_fit, "learn expression from the tissue and the spots around"),
        ("upsample", _add_upsample, "predict expression on a dense grid, with all that is needed before"),
        ("evaluate", _add_evaluate, "hide spots, predict them, and score models beside each other"),
    ):
        command = commands.add_parser(name, help=told, formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_argument("section", type=Path, metavar="SECTION.h5ad", help="AnnData with obsm['spatial']")
        add(command)
    for command in commands.choices.values():
        talk = command.add_argument_group("talking")
        talk.add_argument("--json", action="store_true", help="print the summary as JSON")
        talk.add_argument("--quiet", action="store_true", help="no progress, only warnings and the result")
        talk.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def _add_features(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Cut a patch of the picture at every spot, describe it, and write the section with the\n"
        f"description in obsm['{FEATURES}']. The expression is left as it is."
    )
    command.set_defaults(run=_features)
    command.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.h5ad", help="section with features")
    _add_feature_options(command)


def _add_fit(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Fit a model and write the section that holds it (-o), the model alone (--save), or both.\n"
        "Image features are made where the model reads them and the section has none.\n"
        f"Raw counts are normalised (10 000 a spot, log1p) and the {N_GENES} most variable genes modelled."
    )
    command.set_defaults(run=_fit)
    command.add_argument("-o", "--output", type=Path, metavar="OUT.h5ad", help="section with the fitted model")
    command.add_argument("--save", type=Path, metavar="FILE.safetensors", help="the fitted model alone")
    _add_feature_options(command)
    _add_fit_options(command)


def _add_upsample(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Predict expression on a grid finer than the spots and write it as a section of its own.\n"
        "Features and a fitted model are used where the section has them, and made where not.\n"
        f"Raw counts are normalised (10 000 a spot, log1p) and the {N_GENES} most variable genes modelled."
    )
    command.epilog = "example:\n  sthisto upsample SECTION.h5ad --image SECTION.jpg -o dense.h5ad"
    command.set_defaults(run=_upsample)
    command.add_argument("-o", "--output", type=Path, required=True, metavar="DENSE.h5ad", help="the dense section")
    command.add_argument(
        "--grid",
        type=_positive,
        default=2,
        metavar="N",
        help="refine the array N times: N*N as many points (default 2)",
    )
    command.add_argument("--picture", type=Path, metavar="FILE.png", help="draw genes, measured beside predicted")
    command.add_argument("--show", metavar="GENE,GENE", help="genes to draw")
    _add_feature_options(command)
    _add_fit_options(command)


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Hide half of the spots, one by one and in blocks, fit models on the others, and score them on\n"
        "the hidden ones. With raw counts, in X or in layers['counts'], genes are chosen anew on each\n"
        "training half and the noise ceiling is given."
    )
    command.epilog = "example:\n  sthisto evaluate SECTION.h5ad --image SECTION.jpg -o scores.csv"
    command.set_defaults(run=_evaluate)
    command.add_argument("-o", "--output", type=Path, metavar="SCORES.csv", help="scores of every gene, one a line")
    command.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the models beside each other")
    command.add_argument(
        "--models",
        default=",".join(EVALUATED),
        metavar="NAME,NAME",
        help=f"of {', '.join(MODELS)} (default %(default)s)",
    )
    command.add_argument("--split", action="append", choices=("random", "block"), help="one of them (default: both)")
    command.add_argument("--fraction", type=float, default=0.5, metavar="SHARE", help="to hide (default 0.5)")
    command.add_argument("--repeats", type=_positive, default=3, metavar="N", help="of each split (default 3)")
    command.add_argument("--genes", metavar="GENES", help="genes to score: a file with one a line, or A,B,C")
    command.add_argument("--layer", metavar="NAME", help="layer with log-normalised expression")
    command.add_argument("--seed", type=int, metavar="N", help="of all chance (default 0)")
    _add_feature_options(command)


def _add_feature_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("picture and features")
    group.add_argument(
        "--image",
        action="append",
        metavar="FILE",
        help="picture that the coordinates refer to (default: the sharpest in uns['spatial']); several sections: "
        "--image NAME=FILE for each",
    )
    group.add_argument("--library-key", metavar="COLUMN", help="obs column that names the section of each spot")
    group.add_argument("--encoder", choices=sorted(ENCODERS), metavar="NAME", help=f"one of {', '.join(ENCODERS)}")
    group.add_argument("--weights", metavar="FILE", help="local weights of the encoder")
    group.add_argument("--patch-um", type=float, metavar="UM", help="side of the patch (default: the encoder's)")
    group.add_argument("--mpp", type=float, metavar="UM", help="micrometres per pixel (default: found out)")
    group.add_argument("--pitch-um", type=float, metavar="UM", help="distance of neighbouring spots, to derive --mpp")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")


def _add_fit_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("model")
    names = ", ".join(MODELS)
    group.add_argument("--model", choices=sorted(MODELS), metavar="NAME", help=f"{names} (default {MODEL})")
    group.add_argument("--params", action="append", metavar="NAME=VALUE", help="setting of the model, as epochs=20")
    group.add_argument("--genes", metavar="GENES", help="genes to model: a file with one a line, or A,B,C")
    group.add_argument("--layer", metavar="NAME", help="layer with log-normalised expression (default: X)")
    group.add_argument("--seed", type=int, metavar="N", help="of all chance (default 0)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1, 2, 3 ...")
    return number
