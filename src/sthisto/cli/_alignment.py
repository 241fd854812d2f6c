"""Whether the spots of a section are registered to its image, and their correction."""

from typing import Any

from sthisto import pl, pp
from sthisto.cli._files import PICTURES, SECTIONS, check_output, read, use_no_screen, write
from sthisto.cli._job import Job
from sthisto.cli._steps import image_in, prepare

FIGURES = (
    *("statistic", "best_statistic", "p_value", "gain_p_value", "displacement", "displacement_um", "symmetry"),
    *("rotation", "scale", "shift_x", "shift_y", "resolution", "inside"),
)


def run_check_alignment(job: Job) -> tuple[dict[str, Any], str]:
    """Report the verdict of every section; exit code 1 where one is misaligned."""
    args = job.args
    check_output(args.picture, job, *PICTURES)
    adata = read(args.section, job)
    options = _options(job) | {"genes": prepare(adata, job)}
    with job.step("alignment"):
        report = pp.check_alignment(adata, **options)
    if args.picture is not None:
        use_no_screen()
        shown = {"image": options["image"], "library_key": args.library_key}
        pl.alignment(adata, report, **shown, save=args.picture, show=False)
    job.exit_code = int((report["verdict"] == "misaligned").any())
    sections = [
        {"section": row["section"], "verdict": row["verdict"], "evidence": row["evidence"]}
        | {name: row[name] for name in FIGURES}
        | {"matrix": row["matrix"].tolist()}
        for row in report.to_dict("records")
    ]
    return {"sections": sections}, "\n".join(f"{s['section']}: {s['verdict']}: {s['evidence']}" for s in sections)


def run_align(job: Job) -> tuple[dict[str, Any], str]:
    args = job.args
    check_output(args.output, job, *SECTIONS)
    adata = read(args.section, job)
    before = adata.obsm["spatial"].copy()
    options = _options(job) | {"genes": prepare(adata, job)}
    with job.step("alignment"):
        pp.align(adata, **options, refine=args.refine, force=args.force)
    write(adata, args.output, job)
    moved = int((before != adata.obsm["spatial"]).any(axis=1).sum())
    return {"output": str(args.output), "moved": moved}, f"{args.output}: {moved} of {adata.n_obs} spots moved"


def _options(job: Job) -> dict[str, Any]:
    args = job.args
    layer = None if args.layer == "X" else args.layer
    scale = {"mpp": args.mpp, "pitch_um": args.pitch_um}
    return {"image": image_in(args.image), "library_key": args.library_key, "layer": layer, **scale}
