"""Values of genes, and what is known of how far to believe them."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from sthisto.pl._spots import Rows

FALSE_DISCOVERIES = 0.05
LOW_R = 0.1  # less than a hundredth of a gene's variance is foretold
SYMBOLS = ("symbol", "gene_symbol", "gene_symbols", "gene_name", "feature_name")


def gene_names(genes: str | Sequence[str], adata: AnnData) -> list[str]:
    """Return the genes asked for as a list; refuses none."""
    names = [genes] if isinstance(genes, str) else list(genes)
    if not names:
        raise ValueError(f"no gene to draw: pass genes= (there are {adata.n_vars}, as {list(adata.var_names[:5])}).")
    return names


def gene_values(adata: AnnData, rows: Rows, names: list[str], layer: str | None, called: str) -> NDArray[np.float32]:
    """(n, g) values of genes in a layer, or in ``X``; refuses genes that are not there or have none."""
    missing = [name for name in names if name not in adata.var_names]
    if missing:
        alike = [near for name in missing for near in get_close_matches(name, adata.var_names, n=3)]
        there = alike or adata.var_names[:5].tolist()
        raise KeyError(f"genes {missing} are not in {called}.var_names ({adata.n_vars} there, such as {there}).")
    if layer is not None and layer not in adata.layers:
        raise KeyError(f"no layer {layer!r} in {called}.layers (found: {sorted(adata.layers)}).")
    part = adata[rows, names]
    matrix = part.X if layer is None else part.layers[layer]
    values = np.asarray(matrix.toarray() if sparse.issparse(matrix) else matrix, np.float32)
    empty = [name for name, gene in zip(names, values.T, strict=True) if not np.isfinite(gene).any()]
    if empty:
        raise ValueError(f"genes {empty} have no values in {called}: the model does not have them. Fit with genes=.")
    return values


def gene_title(adata: AnnData, gene: str) -> str:
    """Name the gene by its symbol too where ``var`` has one beside an identifier."""
    for column in SYMBOLS:
        symbol = adata.var.at[gene, column] if column in adata.var else None
        if isinstance(symbol, str) and symbol != gene:  # NaN where an identifier has none
            return f"{symbol} ({gene})"
    return gene


def doubt(adata: AnnData, gene: str) -> str:
    """Say why a prediction of the gene is not to be believed, as ``fit`` found out; nothing where it did not ask."""
    r, q = (_number(adata, gene, column) for column in ("pcc_heldout", "qvalue_heldout"))
    if not (q >= FALSE_DISCOVERIES or r < LOW_R):  # NaN is neither
        return ""
    figures = [f"{name} {value:.2f}" for name, value in (("r", r), ("q", q)) if np.isfinite(value)]
    return f"not foretold on hidden spots: {', '.join(figures)}"


def _number(adata: AnnData, gene: str, column: str) -> float:
    value: Any = adata.var.at[gene, column] if column in adata.var else np.nan
    return float(value)
