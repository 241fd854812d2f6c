"""The commands on a section of one's own."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sthisto import _data, evaluation, pp, tl
from sthisto.models import MODELS

if TYPE_CHECKING:
    from pandas import DataFrame

from sthisto._files import whole_file
from sthisto.cli._files import PICTURES, check_output, draw, draw_table, read, write, write_table
from sthisto.cli._job import FEATURES, FIT, Job, logger
from sthisto.cli._steps import (
    FEATURE_OPTIONS,
    FIT_OPTIONS,
    N_GENES,
    check_interval,
    counts_layer,
    describe,
    extract,
    image_in,
    learn,
    names_in,
    prepare,
)


def run_check(job: Job) -> tuple[dict[str, Any], str]:
    """Report everything known of a section; exit code 1 where facts contradict each other."""
    args, adata = job.args, read(job.args.section, job)
    image = image_in(args.image)
    with job.step("check"):
        report = pp.check(adata, image=image, library_key=args.library_key)
    if args.picture is not None:
        from sthisto import pl  # noqa: PLC0415  it loads matplotlib

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
    check_output(job.args.output, ".h5ad")
    adata = read(job.args.section, job)
    extract(adata, job)
    write(adata, job.args.output, job)
    n, d = adata.obsm[FEATURES].shape
    return {"output": str(job.args.output), "spots": n, "features": d}, f"{job.args.output}: {n} spots x {d} features"


def run_fit(job: Job) -> tuple[dict[str, Any], str]:
    args = job.args
    if args.output is None and args.save is None:
        raise ValueError("nowhere to write to: name a section to write with -o, a model with --save, or both.")
    for path, suffix in ((args.output, ".h5ad"), (args.save, ".safetensors")):
        check_output(path, suffix)
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
    show = _drawing(args)
    check_output(args.output, ".h5ad")
    check_output(args.picture, *PICTURES)
    check_interval(args.interval)
    adata = read(args.section, job)
    if show:
        _data.genes_to_model(adata, show)  # a misspelt gene is refused before the work
    fits = adata.uns.get("sthisto", {}).get("fit", {})
    changed = job.asked(*FIT_OPTIONS, *FEATURE_OPTIONS)
    if FIT in fits and not changed:
        job.reuse(f"the fitted model in {args.section}")
        _refuse_unmodelled(show, _data.read_fit(adata, FIT).genes)
    else:
        if FIT in fits:
            logger.info("fitting again, as %s is given", ", ".join(changed))
        genes = prepare(adata, job)
        _refuse_unmodelled(show, _data.genes_to_model(adata, genes))
        learn(adata, job, genes)
    fit = _data.read_fit(adata, FIT)
    if show and len(fit.sections) > 1:
        raise ValueError(f"--picture draws one section, and {args.section} holds {len(fit.sections)}. Leave it out.")
    with job.step("upsample"):
        dense = tl.upsample(
            adata,
            args.grid,
            image=image_in(args.image),
            interval=args.interval,
            match_spot_means=args.match_spot_means,
        )
    write(dense, args.output, job)
    if show:
        draw(adata, dense, show, args.picture, layer=fit.layer or None, library_key=fit.library_key or None)
    paths = {"output": str(args.output), "picture": str(args.picture) if show else None}
    sizes = {"model": fit.model, "spots": adata.n_obs, "points": dense.n_obs, "genes": dense.n_vars}
    text = f"{args.output}: {dense.n_obs} points x {dense.n_vars} genes, from {adata.n_obs} spots"
    return {**paths, **sizes, "reused": job.reused}, text + (f"\n{args.picture}: {', '.join(show)}" if show else "")


def run_evaluate(job: Job) -> tuple[dict[str, Any], str]:
    args = job.args
    check_output(args.output, ".csv")
    check_output(args.picture, *PICTURES)
    adata = read(args.section, job)
    models = names_in(args.models)
    unknown = sorted(set(models) - set(MODELS))
    if unknown:
        raise ValueError(f"--models {','.join(unknown)}: there are {', '.join(MODELS)}.")
    counts = counts_layer(adata, args.layer)
    describe(adata, job, models)
    with job.step("evaluate"):
        table = tl.evaluate(
            adata,
            models,
            split=[
                replace(evaluation.SPLITS[each], fraction=args.fraction) for each in args.split or evaluation.SPLITS
            ],
            n_repeats=args.repeats,
            counts_layer=counts,
            features_key=FEATURES,
            layer=None if counts or args.layer == "X" else args.layer,
            genes=names_in(args.genes) if args.genes is not None else N_GENES if counts else None,
            library_key=args.library_key,
            image=image_in(args.image),
            random_state=args.seed or 0,
        )
    for path, make in ((args.output, write_table), (args.picture, draw_table)):
        if path is not None:
            with job.step(f"write {path.name}"), whole_file(path) as partial:
                make(table, partial)
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


def _drawing(args: argparse.Namespace) -> list[str]:
    """Genes to draw; none where no picture is wanted."""
    if (args.picture is None) != (args.show is None):
        raise ValueError("--picture FILE.png and --show GENE,GENE go together.")
    return [] if args.show is None else names_in(args.show)


def _refuse_unmodelled(show: Sequence[str], genes: Any) -> None:
    absent = [gene for gene in show if gene not in set(genes)]
    if absent:
        raise ValueError(f"--show {','.join(absent)}: not among the {len(genes)} genes modelled. Name it in --genes.")
