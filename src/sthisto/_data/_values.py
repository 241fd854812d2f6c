"""Expression, features, genes and masks as plain arrays."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from sthisto._data._records import listed


def expression(
    adata: AnnData, rows: NDArray[np.intp], genes: NDArray[np.str_], layer: str | None
) -> NDArray[np.float32]:
    """Log-normalised expression (n, g) of rows and genes; refuses raw counts, NaN and negative values."""
    if layer is not None and layer not in adata.layers:
        raise KeyError(f"no layer {layer!r} in adata (found: {listed(adata.layers)}). layer=None reads adata.X.")
    matrix = adata.X if layer is None else adata.layers[layer]
    where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    if matrix is None:
        raise ValueError("adata.X is empty. Pass layer= with the layer that holds log-normalised expression.")
    values = _dense(matrix, rows, adata.var_names.get_indexer(genes))
    if not np.isfinite(values).all():
        spots, cells = int((~np.isfinite(values)).any(axis=1).sum()), int((~np.isfinite(values)).sum())
        raise ValueError(
            f"{where} has {cells} NaN or infinite values in {spots} training spots. Mend or drop them; where sections "
            'lack genes of each other, ad.concat(..., join="inner") keeps those that all have.'
        )
    if values.min(initial=0) < 0:
        raise ValueError(
            f"{where} has negative values (lowest {values.min():.3g}), as after sc.pp.scale. Models here work on "
            "log-normalised expression; pass layer= with a layer that holds it."
        )
    if values.max(initial=0) > 1 and np.array_equal(values, np.rint(values)):
        raise ValueError(
            f"{where} looks like raw counts (whole numbers up to {values.max():.0f}). Normalise first: "
            "sc.pp.normalize_total(adata, target_sum=1e4); sc.pp.log1p(adata)."
        )
    return values


def features(adata: AnnData, key: str, rows: NDArray[np.intp]) -> NDArray[np.float32]:
    """Image features (n, d) of the rows."""
    if key not in adata.obsm:
        raise KeyError(
            f"no image features {key!r} in adata.obsm (found: {listed(adata.obsm)}). "
            "Run sthisto.pp.extract_features(adata) first, or pass features_key=."
        )
    found = adata.obsm[key]
    values = np.asarray(found.todense() if sparse.issparse(found) else found)[rows].astype(np.float32)
    return finite_features(values, len(rows), f"adata.obsm[{key!r}]")


def finite_features(values: NDArray[np.float32], n: int, where: str) -> NDArray[np.float32]:
    """Refuse features (n, d) of another length or with NaN."""
    if values.ndim != 2 or len(values) != n:
        raise ValueError(f"{where} has shape {values.shape}; expected ({n}, d), one row a point.")
    if not np.isfinite(values).all():
        wrong = int((~np.isfinite(values)).any(axis=1).sum())
        raise ValueError(f"{where} has NaN or infinite values in {wrong} of {n} rows. Extract the features anew.")
    return values


def genes_to_model(adata: AnnData, genes: Iterable[str] | None) -> NDArray[np.str_]:
    """Names of the genes to model: those asked for, else the highly variable ones, else all."""
    if genes is None:
        marked = "highly_variable" in adata.var
        chosen = adata.var_names[_booleans(adata.var, "highly_variable", "var")] if marked else adata.var_names
    else:
        chosen = pd.Index([genes] if isinstance(genes, str) else list(genes))
    if not adata.var_names.is_unique:
        raise ValueError("adata.var_names are not unique. Call adata.var_names_make_unique() first.")
    missing = [str(gene) for gene in chosen if gene not in adata.var_names]
    if missing:
        raise KeyError(
            f"{len(missing)} of {len(chosen)} genes are not in adata.var_names: {listed(missing)} "
            f"(there: {listed(adata.var_names)})."
        )
    if not len(chosen):
        why = "genes= is empty" if genes is not None else "var['highly_variable'] marks none; pass genes="
        raise ValueError(f"no gene to model: {why}.")
    return np.asarray(chosen.drop_duplicates(), dtype=str)


def training_rows(adata: AnnData, train_on: str | NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """Mask (n_obs,) of the rows that may be learnt from."""
    if train_on is None:
        return np.ones(adata.n_obs, dtype=bool)
    if isinstance(train_on, str):
        if train_on not in adata.obs:
            raise KeyError(f"no column {train_on!r} in adata.obs (found: {listed(adata.obs.columns)}).")
        return _booleans(adata.obs, train_on, "obs")
    mask = np.asarray(train_on)
    if mask.dtype != bool or mask.shape != (adata.n_obs,):
        raise ValueError(
            f"train_on is {mask.dtype} of shape {mask.shape}; expected the name of a boolean obs column, or a boolean "
            f"mask of {adata.n_obs} rows, True where the spot may be learnt from."
        )
    return mask


def _booleans(table: pd.DataFrame, name: str, slot: str) -> NDArray[np.bool_]:
    """Take a column as a mask; NaN and text would count as True."""
    column = table[name].infer_objects()
    if column.isna().any() or not pd.api.types.is_bool_dtype(column):
        raise ValueError(
            f"adata.{slot}[{name!r}] is {column.dtype} with {int(column.isna().sum())} missing values; expected True "
            "or False in every row."
        )
    return column.to_numpy(dtype=bool)


def _dense(matrix: Any, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> NDArray[np.float32]:
    """Rows and columns of any matrix AnnData holds: dense, CSR, CSC, or on disk."""
    if isinstance(matrix, sparse.csc_matrix | sparse.csc_array):
        part = matrix[:, columns][rows]
    else:
        every = len(rows) == matrix.shape[0]
        part = matrix[:] if every else matrix[rows]  # on-disk matrices take sorted rows, then columns in memory
        part = part[:, columns]
    return np.asarray(part.toarray() if sparse.issparse(part) else part, dtype=np.float32)
