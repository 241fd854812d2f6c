"""The commands on one section: the user's, and the synthetic one of the demo."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sthisto import _data, datasets, evaluation, grids, metrics, pl, pp, tl
from sthisto._files import whole_file
from sthisto._messages import near
from sthisto.models import MODELS

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame

from sthisto.cli._files import PICTURES, SECTIONS, check_output, read, use_no_screen, write
from sthisto.cli._job import FEATURES, FIT, MODEL, N_GENES, Job, logger
from sthisto.cli._steps import (
    FEATURE_OPTIONS,
    FIT_OPTIONS,
    check_expression,
    check_options,
    counts_layer,
    describe,
    extract,
    image_in,
    learn,
    names_in,
    on_device,
    prepare,
)

DEMO_GENES = ("region_00", "fine_01", "density_02")  # one of each kind that the image predicts
N_SHOWN = 4  # genes of a picture where none are named


def run_check(job: Job) -> tuple[dict[str, Any], str]:
    """Report everything known of a section; exit code 1 where facts contradict each other."""
    args = job.args
    check_output(args.picture, job, *PICTURES)
    adata, image = read(args.section, job), image_in(args.image)
    with job.step("check"):
        report = pp.check(adata, image=image, library_key=args.library_key)
    if args.picture is not None:
        use_no_screen()
        pl.spots(adata, image=image, library_key=args.library_key, save=args.picture, show=False)
    job.exit_code = int((report["status"] == "contradictory").any())
    checks = report.to_dict("records")
    lines = []
    for each in checks:
        subject = " ".join(filter(None, (each["section"], each["check"])))
        lines.append(f"{each['status']:13s} {subject}: {each['value']}")
        lines += [f"{'':14s}{each['advice']}"] if each["advice"] else []
    return {"checks": checks}, "\n".join(lines)


def run_features(job: Job) -> tuple[dict[str, Any], str]:
    check_output(job.args.output, job, *SECTIONS)
    check_options(job)
    adata = read(job.args.section, job)
    extract(adata, job)
    write(adata, job.args.output, job)
    n, d = adata.obsm[FEATURES].shape
    return {"output": str(job.args.output), "spots": n, "features": d}, f"{job.args.output}: {n} spots x {d} features"


def run_fit(job: Job) -> tuple[dict[str, Any], str]:
    args = job.args
    if args.output is None and args.save is None:
        raise ValueError("nowhere to write to: name a section to write with -o, a model with --save, or both.")
    check_output(args.output, job, *SECTIONS)
    check_output(args.save, job, ".safetensors")
    check_options(job)
    adata = read(args.section, job)
    learn(adata, job, prepare(adata, job))
    written = [str(path) for path in (args.output, args.save) if path is not None]
    if args.output is not None:
        write(adata, args.output, job)
    if args.save is not None:
        tl.save(adata, args.save, key=FIT)
    fit = _data.read_fit(adata, FIT)
    summary = {"output": written, "model": fit.model, "spots": len(fit.spots), "genes": len(fit.genes)}
    text = f"{' and '.join(written)}: {fit.model}, fitted to {len(fit.genes)} genes on {len(fit.spots)} spots"
    return {**summary, "reused": job.reused}, text


def run_upsample(job: Job) -> tuple[dict[str, Any], str]:
    args = job.args
    if args.show is not None and args.picture is None:
        raise ValueError("--show names genes to draw: name the file with --picture FILE.png.")
    show = [] if args.show is None else names_in(args.show)
    check_output(args.output, job, *SECTIONS)
    check_output(args.picture, job, *PICTURES)
    check_options(job)
    adata = read(args.section, job)
    fit = _fitted(adata, job, show)
    with job.step("upsample"):
        dense = tl.upsample(
            adata,
            args.grid,
            image=image_in(args.image),
            interval=args.interval,
            match_spot_means=args.match_spot_means,
        )
    write(dense, args.output, job)
    if args.picture is not None:
        show = show or _most_variable(dense)
        where: dict[str, Any] = {"layer": fit.layer or None, "library_key": fit.library_key or None}
        use_no_screen()
        pl.genes(adata, show, dense=dense, show=False, save=args.picture, **where)
    paths = {"output": str(args.output), "picture": str(args.picture) if show else None}
    sizes = {"model": fit.model, "spots": adata.n_obs, "points": dense.n_obs, "genes": dense.n_vars}
    text = f"{args.output}: {dense.n_obs} points x {dense.n_vars} genes, from {adata.n_obs} spots"
    return {**paths, **sizes, "reused": job.reused}, text + (f"\n{args.picture}: {', '.join(show)}" if show else "")


def _fitted(adata: "AnnData", job: Job, show: list[str]) -> _data.Fit:
    """Reuse the fit of a section where no option asks for another, else fit; checks first what is to be drawn."""
    args = job.args
    if show:
        _data.genes_to_model(adata, show)  # a misspelt gene is refused before the work
    there = FIT in adata.uns.get("sthisto", {}).get("fit", {})
    changed = job.asked(*FIT_OPTIONS, *FEATURE_OPTIONS)
    if there and not changed:
        fit = _data.read_fit(adata, FIT)
        _refuse_drawing(job, show, fit.genes, len(fit.sections))
        job.reuse(f"the fitted model in {args.section}")
        return fit
    if there:
        logger.info("fitting again, as %s is given", ", ".join(changed))
    genes = prepare(adata, job)
    n_sections = len(_data.section_rows(adata, args.library_key))
    _refuse_drawing(job, show, _data.genes_to_model(adata, genes), n_sections)
    learn(adata, job, genes)
    return _data.read_fit(adata, FIT)


def run_evaluate(job: Job) -> tuple[dict[str, Any], str]:
    args = job.args
    check_output(args.output, job, ".csv")
    check_output(args.picture, job, *PICTURES)
    check_options(job)
    models = names_in(args.models)
    unknown = [model for model in models if model not in MODELS]
    if unknown:
        raise ValueError(f"--models {','.join(unknown)}: {near(unknown[0], MODELS)}")
    splits = [replace(evaluation.SPLITS[name], fraction=args.fraction) for name in args.split or evaluation.SPLITS]
    adata = read(args.section, job)
    genes = None if args.genes is None else names_in(args.genes)
    counts = counts_layer(adata, args.layer)
    if counts is None:
        check_expression(adata, job, genes)
    elif genes is not None:
        _data.genes_to_model(adata, genes)
    describe(adata, job, models)
    with job.step("evaluate"):
        table = tl.evaluate(
            adata,
            {model: on_device(args.device) for model in models},
            split=splits,
            n_repeats=args.repeats,
            counts_layer=counts,
            features_key=FEATURES,
            layer=None if counts or args.layer == "X" else args.layer,
            genes=N_GENES if genes is None and counts else genes,
            library_key=args.library_key,
            image=image_in(args.image),
            random_state=args.seed or 0,
        )
    if args.output is not None:
        with whole_file(args.output) as draft:
            table.to_csv(draft, index=False)
    if args.picture is not None:
        use_no_screen()
        pl.evaluation(table, show=False, save=args.picture)
    return _score_lines(table, args)


def _score_lines(table: "DataFrame", args: argparse.Namespace) -> tuple[dict[str, Any], str]:
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


def _most_variable(dense: "AnnData") -> list[str]:
    """Genes to draw where none are named."""
    order = np.argsort(-dense.X.var(axis=0), kind="stable")[:N_SHOWN]
    names = [str(name) for name in dense.var_names[order]]
    logger.info("drawing %s, of which the map varies most; --show names others", ", ".join(names))
    return names


def _refuse_drawing(job: Job, show: Sequence[str], genes: Any, n_sections: int) -> None:
    if job.args.picture is not None and n_sections > 1:
        raise ValueError(f"--picture draws one section, and {job.source} holds {n_sections}. Leave it out.")
    known = set(genes)
    absent = [gene for gene in show if gene not in known]
    if absent:
        raise ValueError(
            f"--show {','.join(absent)}: not among the {len(genes)} genes modelled ({near(absent[0], genes)}). Name it "
            "in --genes."
        )


# --- the whole job on a synthetic section ----------------------------------------------------------------------------


def run_demo(job: Job) -> tuple[dict[str, Any], str]:
    folder, random_state = job.args.output, job.args.seed or 0
    folder.mkdir(parents=True, exist_ok=True)
    check_output(folder / "dense.h5ad", job, *SECTIONS)
    check_output(folder / "dense.png", job, *PICTURES)
    check_options(job)
    with job.step("section"):
        adata = datasets.synthetic(random_state=random_state)
        logger.info("a synthetic section: %d spots, %d genes, and its picture", *adata.shape)
    with job.step("features"):
        pp.extract_features(adata)
    hidden = grids.hold_out(adata.obsm["spatial"], 0.5, random_state=random_state)
    with job.step("held out"):
        scores = _held_out(adata, hidden, (MODEL, "idw"), random_state, job)
    with job.step("fit"):
        tl.fit(adata, MODEL, random_state=random_state, params=on_device(job.args.device))
    with job.step("upsample"):
        dense = tl.upsample(adata, 3)
    write(dense, folder / "dense.h5ad", job)
    use_no_screen()
    pl.genes(adata, DEMO_GENES, dense=dense, show=False, save=folder / "dense.png")
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
    adata: "AnnData", hidden: Any, models: Sequence[str], random_state: int, job: Job
) -> dict[str, dict[str, float]]:
    """Mean Pearson r of each model on the hidden spots (n,), which it never sees."""
    scores = {}
    goals = {"measured": adata.X.toarray(), "truth": datasets.synthetic_truth(adata)}
    for name in models:
        tried = adata.copy()
        tl.fit(tried, name, train_on=~hidden, random_state=random_state, params=on_device(job.args.device))
        tl.predict(tried)
        predicted = tried.layers[FIT][hidden]
        scores[name] = {
            goal: float(np.nanmean(metrics.pearson(values[hidden], predicted))) for goal, values in goals.items()
        }
    return scores
