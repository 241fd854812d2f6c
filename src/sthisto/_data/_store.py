"""Keys of AnnData: what is read and written under which name, with one function for each."""

import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData, ImplicitModificationWarning
from numpy.typing import NDArray
from scipy import sparse

from sthisto._messages import listed, near

UNS = "sthisto"
COORDINATES = "spatial"
IN_TISSUE = "in_tissue"
ARRAY = ["array_row", "array_col"]
HIGHLY_VARIABLE = "highly_variable"
GENE_TEST = ("pearson", "pearson_std", "pvalue", "qvalue")  # columns of var, after the fit's key
LARGEST_LOG = 15.0  # log1p of counts per ten thousand ends at 9.2, per million at 13.8
ENOUGH = 100  # positive values, to call them multiples of one

logger = logging.getLogger("sthisto")


def write(adata: AnnData, **slots: Mapping[str, Any]) -> None:
    """Set ``obsm``/``layers``/``var``/``obs`` entries; a view becomes an object of its own, as scanpy does it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        for slot, entries in slots.items():
            for key, value in entries.items():
                getattr(adata, slot)[key] = value


def records(adata: AnnData, kind: str) -> dict[str, Any]:
    """Records of one kind ("features", "fit", "domains") in ``uns``, by their keys."""
    found: dict[str, Any] = adata.uns.get(UNS, {}).get(kind, {})
    return found


def write_record(adata: AnnData, kind: str, key: str, record: Mapping[str, Any]) -> None:
    """Set one record in ``uns``."""
    own = dict(adata.uns.get(UNS, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        adata.uns[UNS] = {**own, kind: {**own.get(kind, {}), key: dict(record)}}


def check_key(key: str) -> str:
    """Refuse keys that h5ad and zarr would nest."""
    if not isinstance(key, str) or not key or "/" in key:
        raise ValueError(f"key_added={key!r}: expected a non-empty name without '/'.")
    return key


# --- expression ------------------------------------------------------------------------------------------------------


def refuse_lazy(adata: AnnData) -> None:
    """Refuse an object of which tables are not in memory, as ``anndata.experimental.read_lazy`` gives it."""
    if not isinstance(adata.obs, pd.DataFrame):
        raise ValueError("adata was read lazily and its tables are not in memory. Load it: adata = adata.to_memory().")


def gene_names(adata: AnnData) -> NDArray[np.str_]:
    """``var_names`` as text, which they need not be.

    Raises
    ------
    ValueError
        Names that are missing or not unique.
    """
    refuse_lazy(adata)
    missing = adata.var_names.isna()
    if missing.any():
        raise ValueError(
            f"{int(missing.sum())} of adata.var_names are missing (NaN), as after var.reset_index(). Name the genes: "
            "adata.var_names = adata.var['gene_name'].astype(str), or the column that holds their names."
        )
    names = adata.var_names.astype(str)
    if not names.is_unique:
        raise ValueError(
            f"adata.var_names are not unique ({names[names.duplicated()][0]!r} occurs more than once). Call "
            "adata.var_names_make_unique() first."
        )
    return np.asarray(names, dtype=str)


def gene_columns(adata: AnnData, genes: NDArray[np.str_]) -> NDArray[np.intp]:
    """Columns (g,) of the genes of a fit."""
    columns: NDArray[np.intp] = pd.Index(gene_names(adata)).get_indexer(pd.Index(genes))
    if (columns < 0).any():
        raise ValueError(
            f"the model was fitted on other genes: {int((columns < 0).sum())} of its {len(genes)} are not in "
            f"adata.var_names (first: {str(genes[columns < 0][0])!r}). Fit again, or use the object it was fitted on."
        )
    return columns


def genes_to_model(adata: AnnData, genes: Iterable[str] | None) -> NDArray[np.str_]:
    """Names of the genes to model: those asked for, else the highly variable ones, else all."""
    names = gene_names(adata)
    if genes is None:
        marked = HIGHLY_VARIABLE in adata.var
        chosen = names[_mask_column(adata.var, HIGHLY_VARIABLE, "var")] if marked else names
    else:
        chosen = np.array([str(gene) for gene in ([genes] if isinstance(genes, str) else genes)], dtype=str)
    missing = chosen[~np.isin(chosen, names)]
    if len(missing):
        raise KeyError(
            f"{len(missing)} of {len(chosen)} genes are not in adata.var_names: {listed(missing)} "
            f"({near(missing[0], names)})."
        )
    if not len(chosen):
        why = "genes= is empty" if genes is not None else f"var[{HIGHLY_VARIABLE!r}] marks none; pass genes="
        raise ValueError(f"no gene to model: {why}.")
    return np.asarray(pd.unique(chosen), dtype=str)


def marks_genes(adata: AnnData) -> bool:
    """Whether ``var`` marks highly variable genes."""
    return HIGHLY_VARIABLE in adata.var


def sparse_values(adata: AnnData, rows: NDArray[np.intp], layer: str | None) -> Any:
    """All genes of rows as CSR (n, n_vars), unchecked: to choose genes by."""
    return sparse.csr_matrix(_matrix(adata, layer)[rows])


def genes_with_values(adata: AnnData, genes: NDArray[np.str_], layer: str | None) -> NDArray[np.str_]:
    """Leave out genes without a single value, as those that a fit does not model are in its layer.

    Raises
    ------
    ValueError
        No gene is left.
    """
    matrix = _matrix(adata, layer)
    if not isinstance(matrix, np.ndarray) or not np.issubdtype(matrix.dtype, np.floating) or not adata.n_obs:
        return genes
    empty = np.isnan(matrix[0])
    empty[empty] = np.isnan(matrix[:, empty]).all(axis=0)
    kept: NDArray[np.str_] = genes[~empty[gene_columns(adata, genes)]]
    if not len(kept):
        raise ValueError(f"{_where(layer)} is NaN throughout for all {len(genes)} genes; pass genes= with values.")
    return kept


def expression(
    adata: AnnData, rows: NDArray[np.intp], genes: NDArray[np.str_], layer: str | None
) -> NDArray[np.float32]:
    """Log-normalized expression (n, g) of rows and genes; refuses counts, NaN and negative values."""
    matrix, where = _matrix(adata, layer), _where(layer)
    if matrix is None:
        raise ValueError("adata.X is empty. Pass layer= with the layer that holds log-normalized expression.")
    values = _dense(matrix, rows, gene_columns(adata, genes), where)
    wrong = ~np.isfinite(values)
    if wrong.any():
        raise ValueError(
            f"{where} has {int(wrong.sum())} NaN or infinite values in {int(wrong.any(axis=1).sum())} training spots. "
            'Correct or drop them; where sections lack genes of each other, ad.concat(..., join="inner") keeps those '
            "that all have."
        )
    if values.min(initial=0) < 0:
        raise ValueError(
            f"{where} has negative values (lowest {values.min():.3g}), as after sc.pp.scale. Models here work on "
            "log-normalized expression; pass layer= with a layer that holds it."
        )
    kind = not_logarithmic(values)
    if kind:
        raise ValueError(
            f"{where} {kind}. Normalize first: sc.pp.normalize_total(adata, target_sum=1e4); sc.pp.log1p(adata)."
        )
    return values


def predictions_of(adata: AnnData, key: str | None, rows: NDArray[np.intp]) -> pd.DataFrame:
    """Expression that another tool predicted, rows by genes, from a layer, ``obsm`` or (None) ``X``.

    Raises
    ------
    KeyError
        Neither has that name.
    ValueError
        An array whose columns have no gene names.
    """
    if key is None or key in adata.layers:
        every = gene_names(adata)
        values = _dense(_matrix(adata, key), rows, np.arange(len(every)), _where(key))
        return pd.DataFrame(values, columns=every)
    if key not in adata.obsm:
        found = listed([*layer_names(adata), *adata.obsm])
        raise KeyError(f"no layer or obsm {key!r} in adata for the prior (found: {found}).")
    table = adata.obsm[key]
    if isinstance(table, pd.DataFrame):
        return table.iloc[rows]
    names, values = gene_names(adata), np.asarray(table)
    if values.ndim != 2 or values.shape[1] != len(names):
        raise ValueError(
            f"obsm[{key!r}] of shape {values.shape} names no genes: keep it as a DataFrame with genes as columns, or "
            f"as an array with the {len(names)} columns of adata.var_names."
        )
    return pd.DataFrame(values[rows], columns=names)


def not_logarithmic(values: NDArray[np.float32]) -> str:
    """Why values cannot be log-normalized expression, "" where they can.

    Counts are whole numbers. Counts that were corrected or scaled but not logarithmized go far above any logarithm,
    or, in shallow data, are multiples of a common fraction.
    """
    largest = float(values.max(initial=0))
    if largest > 1 and np.array_equal(values, np.rint(values)):
        return f"seems to hold raw counts (whole numbers up to {largest:.0f})"
    if largest > LARGEST_LOG:
        return f"goes up to {largest:.4g}, which no log-normalized expression does: the logarithm was not taken"
    positive = np.asarray(values[values > 0], dtype=np.float64)
    if largest > 1 and len(positive) >= ENOUGH:
        smallest = positive.min()
        steps = positive[:: -(-len(positive) // 100_000)] / smallest
        rounding = min(0.1, 1e-3 * steps.max() ** 0.5)  # any number is within .5 of a whole one
        if smallest < 1 and np.abs(steps - np.rint(steps)).max() < rounding and steps.max() >= 3:
            return f"holds multiples of {smallest:.3g}, as counts that were scaled but not logarithmized"
    return ""


def layer_names(adata: AnnData) -> list[str]:
    """Names of the layers; anndata 0.13 lists ``X`` among them as None."""
    return [str(name) for name in adata.layers if name is not None]


def _matrix(adata: AnnData, layer: str | None) -> Any:
    if layer is not None and layer not in layer_names(adata):
        raise KeyError(f"no layer {layer!r} in adata (found: {listed(layer_names(adata))}). layer=None reads adata.X.")
    return adata.X if layer is None else adata.layers[layer]


def _where(layer: str | None) -> str:
    return "adata.X" if layer is None else f"adata.layers[{layer!r}]"


def _dense(matrix: Any, rows: NDArray[np.intp], columns: NDArray[np.intp], where: str) -> NDArray[np.float32]:
    """Rows and columns of any matrix AnnData holds: dense, CSR, CSC, dask, or on disk."""
    if isinstance(matrix, sparse.csc_matrix | sparse.csc_array):
        part = matrix[:, columns][rows]
    else:
        every = len(rows) == matrix.shape[0]
        try:
            part = matrix[:] if every else matrix[rows]  # on-disk matrices take sorted rows, then columns in memory
        except (TypeError, NotImplementedError, ValueError) as error:
            raise ValueError(
                f"{where} is not in memory and cannot be read by rows ({type(matrix).__name__}: {error}). Load it: "
                "adata = adata.to_memory()."
            ) from error
        part = part.compute() if hasattr(part, "compute") else part
        part = part[:, columns]
    values = part.toarray() if sparse.issparse(part) else np.asarray(part)
    if np.iscomplexobj(values) or not (np.issubdtype(values.dtype, np.number) or values.dtype == bool):
        raise ValueError(f"{where} is {values.dtype}; expected real numbers.")
    return np.asarray(values, dtype=np.float32)


# --- spots and features ----------------------------------------------------------------------------------------------


def features(adata: AnnData, key: str, rows: NDArray[np.intp]) -> NDArray[np.float32]:
    """Image features (n, d) of the rows."""
    if key not in adata.obsm:
        raise KeyError(
            f"no image features {key!r} in adata.obsm (found: {listed(adata.obsm)}). "
            "Run sthisto.pp.extract_features(adata) first, or pass features_key=."
        )
    stored = adata.obsm[key]
    values = np.asarray(stored.todense() if sparse.issparse(stored) else stored)[rows].astype(np.float32)
    return finite_features(values, len(rows), f"adata.obsm[{key!r}]")


def finite_features(values: NDArray[np.float32], n: int, where: str) -> NDArray[np.float32]:
    """Refuse features (n, d) of another length or with NaN."""
    if values.ndim != 2 or len(values) != n:
        raise ValueError(f"{where} has shape {values.shape}; expected ({n}, d), one row a point.")
    if not np.isfinite(values).all():
        wrong = int((~np.isfinite(values)).any(axis=1).sum())
        raise ValueError(f"{where} has NaN or infinite values in {wrong} of {n} rows. Extract the features again.")
    return values


def coordinates(adata: AnnData, rows: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the spot centers (n, 2) of the rows: full-resolution pixels, x then y."""
    if COORDINATES not in adata.obsm:
        raise KeyError(
            f"no spot coordinates: adata.obsm['spatial'] is missing (found: {listed(adata.obsm)}). It holds the "
            "spots' centers (n, 2) in full-resolution pixels, x then y, as squidpy.read.visium writes it."
        )
    whole = np.asarray(adata.obsm[COORDINATES])
    if whole.ndim != 2 or whole.shape[1] < 2 or whole.shape[1] > 3:
        raise ValueError(f"adata.obsm['spatial'] has shape {whole.shape}; expected (n, 2), x then y.")
    if not np.issubdtype(whole.dtype, np.number):
        raise ValueError(
            f"adata.obsm['spatial'] is {whole.dtype}, not numbers. Convert it: adata.obsm['spatial'] = "
            "adata.obsm['spatial'].astype(float)."
        )
    part = whole[rows].astype(np.float64)
    if part.shape[1] == 3 and np.ptp(part[:, 2]) > 0:
        raise ValueError(
            "adata.obsm['spatial'] has a third column that varies: a stack of sections, or no coordinates. Pass the "
            "sections by library_key= with two columns, x and y, each: adata.obsm['spatial'][:, :2]."
        )
    xy = part[:, :2]
    if not np.isfinite(xy).all():
        wrong = int((~np.isfinite(xy)).any(axis=1).sum())
        raise ValueError(f"{wrong} of {len(xy)} spots have NaN or infinite coordinates. Drop them: adata[...].copy().")
    repeated = len(xy) - len(np.unique(xy, axis=0))
    if repeated:
        raise ValueError(
            f"{repeated} of {len(xy)} spots share their coordinates with another spot. If adata holds several "
            "sections, pass library_key= with the obs column that names them; if spots were read twice, drop one of "
            "each pair."
        )
    return xy


def tissue_rows(adata: AnnData) -> NDArray[np.bool_]:
    """Mask (n_obs,) of the spots in tissue, by ``obs["in_tissue"]``; all where there is no such column."""
    if IN_TISSUE not in adata.obs:
        return np.ones(adata.n_obs, dtype=bool)
    return _mask_column(adata.obs, IN_TISSUE, "obs")


def training_rows(adata: AnnData, train_on: "str | pd.Series[Any] | NDArray[np.bool_] | None") -> NDArray[np.bool_]:
    """Mask (n_obs,) of the rows to fit on: those asked for, and in tissue."""
    tissue = tissue_rows(adata)
    if not tissue.all():
        logger.info("%d of %d spots have in_tissue 0 and are left out", (~tissue).sum(), adata.n_obs)
    if train_on is None:
        return tissue
    if isinstance(train_on, str):
        if train_on not in adata.obs:
            raise KeyError(f"no column {train_on!r} in adata.obs (found: {listed(adata.obs.columns)}).")
        return _mask_column(adata.obs, train_on, "obs") & tissue
    if isinstance(train_on, pd.Series):
        return _aligned(adata, train_on) & tissue
    mask = np.asarray(train_on)
    if mask.shape != (adata.n_obs,) or not _is_mask(mask):
        raise ValueError(
            f"train_on is {mask.dtype} of shape {mask.shape}; expected the name of a boolean obs column, or a boolean "
            f"mask of {adata.n_obs} rows, True where the spot may be used for training."
        )
    return mask.astype(bool) & tissue


def _aligned(adata: AnnData, mask: "pd.Series[Any]") -> NDArray[np.bool_]:
    """A mask given as a Series, by the names of the spots."""
    if set(mask.index.astype(str)) != set(adata.obs_names.astype(str)) or not mask.index.is_unique:
        raise ValueError(
            "train_on is a pandas Series whose index differs from adata.obs_names. Reindex it to them, or pass "
            "train_on.to_numpy() if its rows are in the order of adata."
        )
    named = mask.set_axis(mask.index.astype(str))
    return _mask_column(pd.DataFrame({"train_on": named.loc[adata.obs_names.astype(str)]}), "train_on", "obs")


def _is_mask(values: NDArray[Any]) -> bool:
    return values.dtype == bool or (np.issubdtype(values.dtype, np.number) and set(np.unique(values)) <= {0, 1})


def _mask_column(table: pd.DataFrame, name: str, slot: str) -> NDArray[np.bool_]:
    """Take a column of True and False, or of 1 and 0, as a mask; NaN and text would count as True."""
    column = table[name]
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(column.cat.categories.dtype)
    column = column.infer_objects()
    if column.isna().any() or not _is_mask(column.to_numpy()):
        raise ValueError(
            f"adata.{slot}[{name!r}] is {column.dtype} with {int(column.isna().sum())} missing values; expected True "
            f"or False (or 1 and 0) in every row: adata.{slot}[{name!r}] = adata.{slot}[{name!r}] == ... makes it so."
        )
    return column.to_numpy(dtype=bool)
