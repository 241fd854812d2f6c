"""Where spatial domains live in AnnData."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData, ImplicitModificationWarning
from numpy.typing import NDArray

from sthisto._data._records import UNS, write


def measured_somewhere(adata: AnnData, genes: NDArray[np.str_], layer: str | None) -> NDArray[np.str_]:
    """Leave out genes without a single value, as those that a fit does not model are in its layer.

    Raises
    ------
    ValueError
        No gene is left.
    """
    matrix = adata.X if layer is None else adata.layers.get(layer)
    if not isinstance(matrix, np.ndarray) or not np.issubdtype(matrix.dtype, np.floating) or not adata.n_obs:
        return genes
    empty = np.isnan(matrix[0])
    empty[empty] = np.isnan(matrix[:, empty]).all(axis=0)
    kept: NDArray[np.str_] = genes[~empty[adata.var_names.get_indexer(genes)]]
    if not len(kept):
        where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
        raise ValueError(f"{where} is NaN throughout for all {len(genes)} genes; pass genes= that it has values of.")
    return kept


def write_domains(
    adata: AnnData,
    key: str,
    *,
    domains: "pd.Categorical[Any]",
    embedding: Mapping[str, NDArray[np.float32]],
    record: Mapping[str, Any],
    networks: Mapping[str, pd.DataFrame],
) -> None:
    """Put domains into ``obs``, embeddings into ``obsm``, settings and neighbors into ``uns``."""
    write(adata, obs={key: domains}, obsm=embedding)
    own = dict(adata.uns.get(UNS, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        adata.uns[UNS] = {**own, "domains": {**own.get("domains", {}), key: dict(record)}}
        for name, table in networks.items():
            adata.uns[name] = table
        adata.uns.pop(f"{key}_colors", None)  # scanpy's, of other domains that had the name


def network(adata: AnnData, pairs: NDArray[np.int64]) -> pd.DataFrame:
    """Pairs (e, 2) of rows as a table of both directions, in the form that STAGATE's authors keep it."""
    both = np.concatenate([pairs, pairs[:, ::-1]])
    both = both[np.lexsort((both[:, 1], both[:, 0]))]
    xy, names = np.asarray(adata.obsm["spatial"])[:, :2], adata.obs_names.to_numpy().astype(str)
    return pd.DataFrame(
        {
            "Cell1": names[both[:, 0]].astype(object),
            "Cell2": names[both[:, 1]].astype(object),
            "Distance": np.linalg.norm(xy[both[:, 0]] - xy[both[:, 1]], axis=1),
        },
        index=pd.Index(np.arange(len(both)).astype(str)),
    )
