"""Folders of Space Ranger, of every version, as AnnData."""

import json
import logging
import warnings
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData

from sthisto._messages import listed
from sthisto.images import open_image

logger = logging.getLogger("sthisto")

BIN_UM = 16  # of Visium HD, where the caller names none: the fastest, and close to a spot of 55 um in depth
MATRIX = "filtered_feature_bc_matrix"
POSITIONS = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
COLUMNS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
SCALES = "scalefactors_json.json"
SIZES = ("hires", "lowres")
NEEDED = (
    f"{MATRIX}.h5 (or the folder {MATRIX} with matrix.mtx.gz), spatial/tissue_positions.csv (tissue_positions_list.csv "
    f"before version 2, .parquet of Visium HD), spatial/{SCALES} and spatial/tissue_hires_image.png"
)


def read(
    folder: str | PathLike[str],
    *,
    image: str | PathLike[str] | None = None,
    bin_um: int | None = None,
    library_id: str | None = None,
) -> AnnData:
    """Read the output folder of Space Ranger: Visium of versions 1 to 4, CytAssist, and Visium HD.

    The result is that of ``squidpy.read.visium``, which stops where a run has no ``hires`` picture, counts in
    Matrix Market form, or positions in parquet.

    Parameters
    ----------
    folder
        The folder ``outs``, or the one that it is in; of Visium HD also one of its ``binned_outputs``.
    image
        Image at full resolution that was given to Space Ranger, which no output folder contains. Its path is noted and
        :func:`sthisto.pp.extract_features` takes it; without, there is the ``hires`` picture of 2 000 px.
    bin_um
        Side of the bins of Visium HD: 2, 8 or 16. ``None`` takes 16 where it is there, else the coarsest.
    library_id
        Name of the section; ``None`` takes that of the run.

    Returns
    -------
    ``X``
        (n, g) CSR float32, counts of genes (not of antibodies)
    ``obs``
        ``in_tissue``, ``array_row``, ``array_col``
    ``var``
        ``gene_ids`` and what else the matrix has; the index has symbols, made unique
    ``obsm["spatial"]``
        (n, 2) pixels of the full-resolution image, x then y
    ``uns["spatial"][library_id]``
        the pictures that are there, scale factors, and ``metadata``

    Raises
    ------
    FileNotFoundError
        No such folder, or files of it are not there; the message names them.
    ValueError
        A feature-barcode matrix alone; bins of another size than are there; positions of another section.

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.read("outs", image="tissue.tif")  # doctest: +SKIP
    """
    root = _root(Path(folder), bin_um)
    places = (root / "spatial", root)  # loose files, too, as they are shared in repositories
    positions = _first(places, POSITIONS, root)
    scales = json.loads(_first(places, (SCALES,), root).read_text())
    adata, metadata = _counts(root)
    _place(adata, positions)
    name = library_id or metadata.pop("library_id", None) or _name(root)
    if image is not None:
        if not Path(image).is_file():
            raise FileNotFoundError(f"no image {image}.")
        metadata["source_image_path"] = str(Path(image).absolute())
    images = {size: _picture(path) for size, path in _pictures(places)}
    if not images:
        logger.info("%s has no pictures: pass image= with the one that was given to Space Ranger", root)
    adata.uns["spatial"] = {name: {"images": images, "scalefactors": scales, "metadata": metadata}}
    adata.var_names_make_unique()
    return adata


def _root(folder: Path, bin_um: int | None) -> Path:
    """Folder that holds the matrix and ``spatial``."""
    if folder.is_file():
        raise ValueError(_alone(folder))
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}.")
    folder = folder / "outs" if (folder / "outs").is_dir() else folder
    bins = folder / "binned_outputs"
    if not bins.is_dir():
        return folder
    sizes = {int(each.name[7:10]): each for each in sorted(bins.glob("square_[0-9][0-9][0-9]um"))}
    if not sizes or (bin_um is not None and bin_um not in sizes):
        asked = "" if bin_um is None else f" of {bin_um} um"
        raise ValueError(f"{bins} has no bins{asked} (found: {listed(sizes)}).")
    chosen = bin_um or (BIN_UM if BIN_UM in sizes else max(sizes))
    logger.info("Visium HD: bins of %d um (there are %s)", chosen, listed(sizes))
    return sizes[chosen]


def _alone(path: Path) -> str:
    """What to do about a file where a folder is expected."""
    if not h5py.is_hdf5(path):
        return f"{path} is a file: pass the output folder of Space Ranger (outs), which has {NEEDED}."
    with h5py.File(path) as file:
        if "matrix" not in file:
            return f"{path} is no folder of Space Ranger. An h5ad file is read by anndata.read_h5ad."
    around = (path.parent / "spatial").is_dir()
    advice = f"It is in one: pass {path.parent}." if around else f"Needed are {NEEDED}, in one folder: pass that."
    return f"{path} is a feature-barcode matrix alone, without the positions of the spots. {advice}"


def _counts(root: Path) -> tuple[AnnData, dict[str, Any]]:
    """Counts of genes, and what the run says of itself."""
    import scanpy as sc  # noqa: PLC0415

    files = sorted(root.glob(f"*{MATRIX}.h5"))
    if len(files) > 1:
        raise ValueError(f"{root} has several matrices ({listed(each.name for each in files)}): leave one.")
    if not files and not (root / MATRIX).is_dir():
        raise FileNotFoundError(_missing(root, f"no {MATRIX}.h5 and no folder {MATRIX}"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Variable names are not unique")  # they are made so
        adata = sc.read_10x_h5(files[0]) if files else sc.read_10x_mtx(root / MATRIX)
    metadata = _run(files[0]) if files else {}
    adata.X = adata.X.astype(np.float32)
    return adata, metadata


def _run(path: Path) -> dict[str, Any]:
    with h5py.File(path) as file:
        attributes = dict(file.attrs)
    keys = {"chemistry_description": "chemistry_description", "software_version": "software_version"}
    keys["library_id"] = "library_ids"
    values = {name: np.ravel(attributes.get(key, ())) for name, key in keys.items()}
    return {name: _text(several[0]) for name, several in values.items() if len(several)}


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _place(adata: AnnData, path: Path) -> None:
    """Add positions to the spots of a matrix."""
    table = pd.read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)} (found: {listed(table.columns)}).")
    table = table.set_index(table["barcode"].astype(str)).reindex(adata.obs_names)
    lost = int(table["in_tissue"].isna().sum())
    if lost:
        raise ValueError(f"{lost} of {adata.n_obs} spots of the matrix have no position in {path}: another section's?")
    for column in COLUMNS[1:4]:
        adata.obs[column] = table[column].to_numpy().astype(np.int64)
    adata.obsm["spatial"] = table[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(np.float64)


def _read_csv(path: Path) -> pd.DataFrame:
    """Positions with a line of names, or without as before Space Ranger 2."""
    with path.open() as file:
        named = file.readline().split(",")[0].strip().lower() == "barcode"
    return pd.read_csv(path) if named else pd.read_csv(path, header=None, names=list(COLUMNS))


def _first(places: Iterable[Path], names: Iterable[str], root: Path) -> Path:
    names = list(names)
    for path in (place / name for place in places for name in names):
        if path.is_file():
            return path
    raise FileNotFoundError(_missing(root, f"no spatial/{' or '.join(names)}"))


def _pictures(places: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    for size in SIZES:
        for path in (place / f"tissue_{size}_image.png" for place in places):
            if path.is_file():
                yield size, path
                break


def _picture(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(open_image(path).levels[0])


def _name(root: Path) -> str:
    """Name of a run by its folder."""
    names = [name for name in (root.absolute().name, *(each.name for each in root.absolute().parents)) if name]
    return next((name for name in names if name not in ("outs", "binned_outputs") and "square_" not in name), "section")


def _missing(root: Path, what: str) -> str:
    there = listed(sorted(each.name for each in root.iterdir()))
    return f"{root} is no output folder of Space Ranger: {what} (found: {there}). Needed are {NEEDED}."
