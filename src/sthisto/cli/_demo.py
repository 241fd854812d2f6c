"""The whole job on a synthetic section."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sthisto import datasets, grids, metrics, pp, tl

if TYPE_CHECKING:
    from anndata import AnnData

from sthisto.cli._files import draw, write
from sthisto.cli._job import FIT, MODEL, Job, logger
from sthisto.cli._steps import on_device

DEMO_GENES = ("region_00", "fine_01", "density_02")  # one of each kind that the image predicts


def run_demo(job: Job) -> tuple[dict[str, Any], str]:
    folder, random_state = job.args.output, job.args.seed or 0
    folder.mkdir(parents=True, exist_ok=True)
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
    draw(adata, dense, DEMO_GENES, folder / "dense.png")
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
