"""Files read and written, whole or not at all."""
# ruff: noqa: PLC0415  --help and mistakes in the options are answered without loading scanpy or matplotlib

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sthisto import pl
from sthisto._files import whole_file

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame

from sthisto._messages import warn
from sthisto.cli._job import Job, logger

PICTURES = (".jpg", ".pdf", ".png", ".svg")


def read(path: Path, job: Job) -> "AnnData":
    """Read a section, with gene names made unique."""
    import h5py
    from anndata import read_h5ad

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
        warnings.filterwarnings("ignore", message=".*names are not unique")  # reported below, once
        adata = read_h5ad(path)
    logger.info("%s: %d spots x %d genes", path, *adata.shape)
    double = adata.var_names[adata.var_names.duplicated()]
    if len(double):
        adata.var_names_make_unique()
        warn(f"{len(double)} gene names repeat others (first: {double[0]!r}); they were made unique by a number.")
    return adata


def write(adata: "AnnData", path: Path, job: Job) -> None:
    with job.step("write"), whole_file(path) as partial:
        adata.write_h5ad(partial)


def draw(adata: "AnnData", dense: "AnnData", show: Sequence[str], path: Path, **options: Any) -> None:
    import matplotlib as mpl

    mpl.use("Agg")  # a file is all that is wanted, and there may be no screen
    with whole_file(path) as partial:
        pl.genes(adata, list(show), dense=dense, show=False, save=partial, **options)


def write_table(table: "DataFrame", path: Path) -> None:
    table.to_csv(path, index=False)


def draw_table(table: "DataFrame", path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    pl.evaluation(table, show=False, save=path)


def check_output(path: Path | None, *suffixes: str) -> None:
    """Refuse a place that cannot be written to before the work, not after it."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into. Make it first.")
    if path.is_dir() or path.suffix.lower() not in suffixes:
        raise ValueError(f"cannot write {path}: the name of the file should end in {' or '.join(suffixes)}.")
