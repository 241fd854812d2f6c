"""Many sections by a sample sheet: fitted together, each predicted densely, computed again only where needed."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sthisto import __version__, _data, encoders, images, tl

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from anndata import AnnData

from sthisto.cli._files import read, write
from sthisto.cli._job import FEATURES, MODEL, SECTION, Job, logger, one_line
from sthisto.cli._sheet import FITTED, MEASURED, Row, Settings, changes, read_sheet, stamp
from sthisto.cli._steps import (
    FEATURE_OPTIONS,
    FIT_OPTIONS,
    are_counts,
    check_options,
    extract,
    fit,
    names_in,
    params_in,
    prepare,
)

RECORD = "batch"  # in uns["sthisto"]: the settings that a file was made with
MISTAKES = (KeyError, ValueError, OSError, ImportError)  # of a section; the others go on


@dataclass
class Batch:
    """One run over a sheet."""

    job: Job
    rows: list[Row]
    options: Settings
    failed: dict[str, str] = field(default_factory=dict)  # what was wrong, by section
    made: dict[str, int] = field(default_factory=dict)  # points, by section
    kept: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return Path(self.job.args.output)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.h5ad"

    @cached_property
    def encoder(self) -> encoders.Encoder:
        """Loaded once for all sections."""
        args = self.job.args
        return encoders.load(args.encoder or "handcrafted", weights=args.weights, device=args.device)

    def tried(self, row: Row, work: "Callable[[Row], AnnData]") -> "AnnData | None":
        """Do something for a section; a mistake in it is noted, and does not stop the others."""
        try:
            return work(row)
        except MISTAKES as error:
            self.failed[row.section] = one_line(error)
            logger.error("section %s failed: %s", row.section, self.failed[row.section])
            return None


def run_batch(job: Job) -> tuple[dict[str, Any], str]:
    args = job.args
    rows = read_sheet(args.sheet)
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"{args.output} is a file; -o names a folder.")
    check_options(job)
    batch = Batch(job, rows, options_of(job))
    for name in (FITTED, *(row.section for row in rows)):
        record_of(batch.path(name))  # other files are refused before the work
    args.output.mkdir(parents=True, exist_ok=True)
    reference = fit_sections(batch)
    of_maps = {"grid": args.grid, "interval": args.interval, "conserve": args.match_spot_means}
    settings = batch.options | of_maps | {"sections": record_of(batch.path(FITTED))["sections"]}
    for row in rows:
        if row.section not in batch.failed and needed(batch, row.section, settings | {"files": row.files()}):
            reference = reference or read(batch.path(FITTED), job)
            dense_map(batch, row, reference, settings)
    job.exit_code = 1 if batch.failed else 0
    return report(batch)


def options_of(job: Job) -> Settings:
    """All that results follow from, but for the files, with what is wrong in it refused."""
    args = job.args
    given: Settings = {name: getattr(args, name) for name in (*FEATURE_OPTIONS, *FIT_OPTIONS)}
    given["model"] = args.model or MODEL
    given["params"] = params_in(given["model"], args.params or [])
    given["genes"] = None if args.genes is None else names_in(args.genes)
    given["weights"] = None if args.weights is None else stamp(Path(args.weights))
    return json.loads(json.dumps({"version": __version__, **given}))  # type: ignore[no-any-return]  # as it is read back


def record_of(path: Path) -> Settings:
    """Read the settings that a file was made with, none where it is not there; refuses a file of another origin."""
    import h5py  # noqa: PLC0415  --help does without

    if not path.exists():
        return {}
    record = None
    if h5py.is_hdf5(path):
        with h5py.File(path) as file:
            record = file.get(f"uns/sthisto/{RECORD}")
            record = None if record is None else record.asstr()[()]
    if record is None:
        raise ValueError(f"{path} is there and was not made by sthisto batch: move it, or name another folder with -o.")
    return dict(json.loads(record))


def needed(batch: Batch, name: str, settings: Settings) -> bool:
    """Whether a file has to be made, with what was there before and why that will not do."""
    before = record_of(batch.path(name))
    differ = changes(before, settings) if before else []
    if before and not differ:
        batch.kept.append(name)
        logger.info("section %s: %s is there, made with the same settings", name, batch.path(name))
        return False
    if before:
        logger.info("section %s is made again, as %s changed", name, listed(differ))
    return True


def listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- the fit ---------------------------------------------------------------------------------------------------------


def fit_sections(batch: Batch) -> "AnnData | None":
    """Fit all measured sections together; ``None`` where the file that is there will do."""
    measured = [row for row in batch.rows if row.role == MEASURED]
    before = record_of(batch.path(FITTED))
    same = bool(before) and not changes({**before, "sections": {}}, batch.options)
    kept = before["sections"] if same else {}
    parts = {}
    for row in measured:
        if kept.get(row.section) != row.files():
            parts[row.section] = batch.tried(row, lambda row: measured_part(batch, row))
    good = {row.section: row.files() for row in measured if row.section not in batch.failed}
    if not good:
        raise ValueError(f"no measured section can be fitted: {'; '.join(batch.failed.values())}")
    if good == kept:
        batch.job.reuse(f"the fitted model in {batch.path(FITTED)}")
        return None
    for row in measured:
        if row.section in good and row.section not in parts:
            parts[row.section] = batch.tried(row, lambda row: measured_part(batch, row))
    adata = concatenate({name: part for name, part in parts.items() if part is not None})
    fit(adata, batch.job, prepare(adata, batch.job))
    return keep(batch, FITTED, adata, batch.options | {"sections": {name: good[name] for name in found(adata)}})


def measured_part(batch: Batch, row: Row) -> "AnnData":
    """Read and describe one section, with its own name in all places."""
    adata = read(row.table, batch.job)  # type: ignore[arg-type]  # measured ones have a table
    pictures = list(adata.uns.get("spatial", {}).values())
    if row.image is None and len(pictures) != 1:
        raise ValueError(f"the sheet names no image, and {row.table} holds {len(pictures)} in uns['spatial'].")
    adata.obs[SECTION] = row.section
    adata.uns = {"spatial": {row.section: pictures[0]}} if len(pictures) == 1 else {}
    adata.obsm = {"spatial": adata.obsm["spatial"]} if "spatial" in adata.obsm else {}
    extract(adata, batch.job, batch.encoder, image=picture_of(row), **row.scale())
    return adata


def concatenate(parts: "Mapping[str, AnnData]") -> "AnnData":
    """Concatenate described sections over the genes that all have."""
    from anndata import concat  # noqa: PLC0415  --help does without

    kinds = {name: are_counts(part.X) for name, part in parts.items()}
    if len(set(kinds.values())) > 1:
        raw = listed([name for name, counts in kinds.items() if counts])
        raise ValueError(
            f"X holds raw counts in section {raw} and none in the others: normalize all sections in the same way."
        )
    whole = concat(parts, label=SECTION, index_unique="-", merge="same", uns_merge="unique")
    if not whole.n_vars:
        raise ValueError(f"sections {listed(list(parts))} have no gene in common. Are the names of one kind?")
    return whole


def found(adata: "AnnData") -> list[str]:
    """Sections of a table, in their order."""
    return list(adata.obs[SECTION].astype(str).unique())


# --- dense maps ------------------------------------------------------------------------------------------------------


def dense_map(batch: Batch, row: Row, reference: "AnnData", settings: Settings) -> None:
    """Predict and write one section."""
    with batch.job.step(row.section):
        of_role = measured_map if row.role == MEASURED else stained_map
        dense = batch.tried(row, lambda row: of_role(batch, row, reference))
        if dense is None:
            return
        if batch.tried(row, lambda row: keep(batch, row.section, dense, settings | {"files": row.files()})) is not None:
            batch.made[row.section] = dense.n_obs


def measured_map(batch: Batch, row: Row, reference: "AnnData") -> "AnnData":
    part = reference[(reference.obs[SECTION] == row.section).to_numpy()].copy()
    return dense_section(batch, row, part)


def stained_map(batch: Batch, row: Row, reference: "AnnData") -> "AnnData":
    """Extract features of a section without expression, and predict."""
    section = spots_of(batch, row) if row.table else tissue_of(batch, row, reference)
    section.obs[SECTION] = row.section
    extract(section, batch.job, batch.encoder, image=picture_of(row), **row.scale())
    return dense_section(batch, row, section, reference=reference, library_key=SECTION)


def dense_section(batch: Batch, row: Row, section: "AnnData", **options: Any) -> "AnnData":
    args = batch.job.args
    return tl.upsample(
        section,
        args.grid,
        image=picture_of(row),
        encoder=batch.encoder,
        interval=args.interval,
        match_spot_means=args.match_spot_means,
        **options,
    )


def spots_of(batch: Batch, row: Row) -> "AnnData":
    """Spots of a stained section's table."""
    from anndata import AnnData  # noqa: PLC0415  --help does without

    adata = read(row.table, batch.job)  # type: ignore[arg-type]  # asked before
    return AnnData(obs=adata.obs[[]], obsm={"spatial": _data.coordinates(adata, np.arange(adata.n_obs))})


def tissue_of(batch: Batch, row: Row, reference: "AnnData") -> "AnnData":
    """Spots over the tissue of an image, as far from each other as those of the measured sections."""
    import pandas as pd  # noqa: PLC0415  --help does without
    from anndata import AnnData  # noqa: PLC0415

    picture = images.open_image(row.image, mpp=row.mpp or batch.job.args.mpp)
    if picture.mpp is None:
        raise ValueError(
            f"the scale of {row.image} is unknown, so no grid can be placed on its tissue: pass mpp= (micrometers per "
            "pixel), here or in a column of the sheet, or name a table with the positions of spots."
        )
    measured = next(iter(_data.add_metadata(reference, _data.read_sections(reference, SECTION), FEATURES).values()))
    pitch_um = row.pitch_um or batch.job.args.pitch_um or measured.pitch * _data.need_metadata(measured, FEATURES).mpp
    xy = images.tissue_points(picture, pitch_um / picture.mpp)
    return AnnData(obs=pd.DataFrame(index=pd.RangeIndex(len(xy)).astype(str)), obsm={"spatial": xy})


def picture_of(row: Row) -> str | None:
    return None if row.image is None else str(row.image)


def keep(batch: Batch, name: str, adata: "AnnData", settings: Settings) -> "AnnData":
    """Write a file with what it was made with."""
    own = dict(adata.uns.get("sthisto", {}))
    adata.uns["sthisto"] = {**own, RECORD: json.dumps(settings)}
    write(adata, batch.path(name), batch.job)
    return adata


def report(batch: Batch) -> tuple[dict[str, Any], str]:
    """Summary as data, and as text: one line a section."""
    lines = []
    for row in batch.rows:
        path = batch.path(row.section)
        state = f"{batch.made[row.section]} points" if row.section in batch.made else "as it was"
        failed = batch.failed.get(row.section)
        lines.append(f"{path}: {state}" if failed is None else f"{row.section}: failed: {failed}")
    summary = {"output": str(batch.folder), "made": batch.made, "kept": batch.kept, "failed": batch.failed}
    return {**summary, "reused": batch.job.reused}, "\n".join(lines)
