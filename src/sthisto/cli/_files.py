"""Files read and written, whole or not at all."""
# ruff: noqa: PLC0415  --help and mistakes in the options are answered without loading anndata or matplotlib

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from sthisto import _data
from sthisto._files import check_target, whole_file, whole_folder
from sthisto._messages import warn
from sthisto.cli._job import Job, logger

if TYPE_CHECKING:
    from anndata import AnnData

PICTURES = (".jpg", ".pdf", ".png", ".svg")
SECTIONS = (".h5ad", ".zarr")
LARGE = 1 << 20  # bytes


def read(path: Path, job: Job) -> "AnnData":
    """Read a section, with gene names made unique."""
    with job.step("read"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*names are not unique")  # reported below, once
        adata = _read_folder(path) if path.is_dir() else _read_h5ad(path)
    logger.info("%s: %d spots x %d genes", path, *adata.shape)
    double = adata.var_names[adata.var_names.duplicated()]
    if len(double):
        adata.var_names_make_unique()
        warn(f"{len(double)} gene names repeat others (first: {double[0]!r}); they were made unique by a number.")
    return adata


def _read_h5ad(path: Path) -> "AnnData":
    import h5py
    from anndata import read_h5ad

    if not path.exists():
        raise FileNotFoundError(f"no file or folder {path}.")
    if not path.is_file() or not h5py.is_hdf5(path):
        raise ValueError(f"{path} is not an h5ad file. Read it with scanpy or squidpy, and adata.write_h5ad(...).")
    with h5py.File(path) as file:
        found = set(file)
    if "matrix" in found:
        _data.read(path)  # says what else is needed
    if not {"obs", "var"} <= found:
        raise ValueError(f"{path} holds no AnnData (found: {', '.join(found) or 'nothing'}). Write it as h5ad first.")
    return read_h5ad(path)


def _read_folder(path: Path) -> "AnnData":
    """Read an AnnData in zarr, or an output folder of Space Ranger."""
    from anndata import read_zarr

    if not (path / "zarr.json").exists() and not (path / ".zgroup").exists():
        return _data.read(path)
    if not {"obs", "var"} <= {each.name for each in path.iterdir()}:
        raise ValueError(f"{path} holds no AnnData. A SpatialData is read in Python: spatialdata.read_zarr(...).")
    return read_zarr(path)


def write(adata: "AnnData", path: Path, job: Job) -> None:
    with job.step("write"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*autosharding")  # of AnnData, to its developers
        if path.suffix == ".zarr":
            import anndata

            with whole_folder(path, replace=True) as draft, anndata.settings.override(zarr_write_format=3):
                adata.write_zarr(draft)
        else:
            with whole_file(path) as draft:
                _write_h5ad(adata, draft)


def _write_h5ad(adata: "AnnData", path: Path) -> None:
    """Write as :meth:`AnnData.write_h5ad` does, which ends in a crash of HDF5 where the disk is full."""
    import h5py
    from anndata.io import write_elem

    adata.strings_to_categoricals()
    with _Disk(path) as disk:
        try:
            with h5py.File(disk, "w") as file:
                write_elem(file, "/", adata)
        finally:
            if disk.error is not None:
                raise disk.error


class _Disk(io.FileIO):
    """A file that keeps its first error and seems to go on, where HDF5 would fail again and again, down to its exit."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self.error: OSError | None = None
        self._lost: list[tuple[int, bytes]] = []  # after the error, what HDF5 may read back: all but large arrays

    def write(self, block: "memoryview | bytes") -> int:  # type: ignore[override]
        """Write all of a block."""
        start, whole = self.tell(), memoryview(block).cast("B")
        rest = whole
        try:
            while len(rest) and self.error is None:
                rest = rest[super().write(rest) or 0 :]
        except OSError as error:
            self.error = error
        if self.error is not None and len(whole) < LARGE:
            self._lost.append((start, bytes(whole)))
        return len(whole)

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        """Read what was written, zeros where nothing was."""
        start, view = self.tell(), memoryview(buffer).cast("B")
        n = super().readinto(view) or 0
        view[n:] = bytes(len(view) - n)
        for at, block in self._lost:
            low, high = max(at, start), min(at + len(block), start + len(view))
            if low < high:
                view[low - start : high - start] = block[low - at : high - at]
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Change the size of the file."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return self.tell()


def use_no_screen() -> None:
    """Have matplotlib draw into files: there may be no screen."""
    import matplotlib as mpl

    mpl.use("Agg")


def check_output(path: Path | None, job: Job, *suffixes: str) -> None:
    """Refuse a place that cannot be written to before the work, not after it."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes or (path.is_dir() and path.suffix.lower() != ".zarr"):
        raise ValueError(f"cannot write {path}: the name of the file should end in {' or '.join(suffixes)}.")
    check_target(path, inputs=job.inputs)
