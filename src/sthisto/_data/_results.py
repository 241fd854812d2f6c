"""Predictions, domains and maps, written back in one step or as an object of their own."""

import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData, ImplicitModificationWarning
from numpy.typing import NDArray

from sthisto import grids
from sthisto._data._cells import Cells
from sthisto._data._fit_record import Fit
from sthisto._data._scale import known_mpp
from sthisto._data._section import SectionData, spatial_entries
from sthisto._data._store import ARRAY, COORDINATES, gene_columns, gene_names, records, write, write_record

HEAVY = "weights"  # of a feature record, which the fitted object has once


@dataclass(frozen=True)
class GridPoints:
    """Points on one section to predict at; of a lattice, or scattered where the last two are None.

    Attributes
    ----------
    xy
        (m, 2) full-resolution pixels.
    pitch
        Pixels between neighboring points.
    index, spot_index
        (m, 2) and (n, 2) integers of the points and of the section's spots on the lattice.
    on_spot
        (n,) spots that are within a hundredth of a pitch of a site of the lattice.
    cells
        What the points are, where they are cells.
    """

    xy: NDArray[np.float64]
    pitch: float
    index: NDArray[np.int64] | None = None
    spot_index: NDArray[np.int64] | None = None
    on_spot: NDArray[np.bool_] | None = None
    cells: Cells | None = None


def write_prediction(
    adata: AnnData,
    key: str,
    fit: Fit,
    layers: Mapping[str, NDArray[np.float32]],
    extrapolated: NDArray[np.bool_],
) -> None:
    """Put predictions (n, g) into layers over all genes, "" the mean, NaN where a gene is not modelled."""
    columns, whole = gene_columns(adata, fit.genes), {}
    for name, values in layers.items():
        layer = np.full(adata.shape, np.nan, dtype=np.float32)
        layer[:, columns] = values
        whole[f"{key}_{name}" if name else key] = layer
    modelled = np.isin(np.arange(adata.n_vars), columns)
    write(adata, layers=whole, var={f"{key}_modelled": modelled}, obs={f"{key}_extrapolated": extrapolated})


def write_gene_test(
    adata: AnnData, key: str, genes: NDArray[np.str_], columns: Mapping[str, NDArray[np.float64]]
) -> None:
    """Put figures (g,) of the genes into ``var`` under the fit's key, NaN for genes that are not modelled."""
    names = gene_names(adata)
    write(
        adata,
        var={f"{key}_{name}": pd.Series(value, genes).reindex(names).to_numpy() for name, value in columns.items()},
    )


def write_domains(
    adata: AnnData,
    key: str,
    *,
    domains: "pd.Categorical[Any]",
    embedding: Mapping[str, NDArray[np.float32]],
    record: Mapping[str, Any],
    networks: Mapping[str, NDArray[np.int64]],
) -> None:
    """Put domains into ``obs``, embeddings into ``obsm``, settings and pairs (e, 2) of neighbors into ``uns``."""
    write(adata, obs={key: domains}, obsm=embedding)
    write_record(adata, "domains", key, record)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        for name, pairs in networks.items():
            adata.uns[name] = _network(adata, pairs)
        adata.uns.pop(f"{key}_colors", None)  # scanpy's, of other domains that had the name


def _network(adata: AnnData, pairs: NDArray[np.int64]) -> pd.DataFrame:
    """Pairs (e, 2) of rows as a table of both directions, in the form that STAGATE's authors keep it."""
    both = np.concatenate([pairs, pairs[:, ::-1]])
    both = both[np.lexsort((both[:, 1], both[:, 0]))]
    xy, names = np.asarray(adata.obsm[COORDINATES])[:, :2], adata.obs_names.to_numpy().astype(str)
    return pd.DataFrame(
        {
            "Cell1": names[both[:, 0]].astype(object),
            "Cell2": names[both[:, 1]].astype(object),
            "Distance": np.linalg.norm(xy[both[:, 0]] - xy[both[:, 1]], axis=1),
        },
        index=pd.Index(np.arange(len(both)).astype(str)),
    )


def points_obs(
    adata: AnnData,
    sections: Mapping[str, SectionData],
    points: Mapping[str, GridPoints],
    *,
    library_key: str,
    measured: NDArray[np.str_],
) -> pd.DataFrame:
    """Names, lattice positions and nearest spots of the points; ``measured`` names the training spots."""
    parts = [_points_obs(adata, sections[name], each, library_key, measured) for name, each in points.items()]
    texts = [name for name in ("nearest_spot", library_key) if name]
    return pd.concat(parts).astype(dict.fromkeys(texts, "category"))


def _points_obs(
    adata: AnnData, section: SectionData, points: GridPoints, library_key: str, measured: NDArray[np.str_]
) -> pd.DataFrame:
    distance, spot = (each[:, 0] for each in grids.nearest(points.xy, section.xy))
    names = adata.obs_names[section.rows].to_numpy().astype(str)
    trained = np.isin(names, measured)
    obs = pd.DataFrame(index=np.arange(len(spot)).astype(str)) if points.cells is None else points.cells.obs.copy()
    if points.index is not None and points.spot_index is not None and points.on_spot is not None:
        obs[ARRAY[0]], obs[ARRAY[1]] = (points.index - points.index.min(axis=0)).T
        obs.index = pd.Index([f"{row}x{col}" for row, col in obs[ARRAY].to_numpy()])
        obs["measured"] = _among(points.index, points.spot_index[trained & points.on_spot])
    else:
        obs["measured"] = (distance == 0) & trained[spot]
    obs["nearest_spot"] = names[spot]
    obs["distance_um"] = distance * known_mpp(adata, section)
    if library_key:
        obs.index = section.name + "_" + obs.index
        obs[library_key] = section.name
    return obs


def new_object(
    like: AnnData,
    genes: NDArray[np.str_],
    layers: Mapping[str, NDArray[np.float32]],
    obs: pd.DataFrame,
    xy: NDArray[np.float64],
    *,
    var: pd.DataFrame | None = None,
    diameters: Mapping[str, float] | None = None,
) -> AnnData:
    """Make an AnnData of predictions, "" the mean, that plots, clusters and concatenates like a measured one."""
    known = like.var if var is None else var
    own = known.set_axis(known.index.astype(str)).drop(columns=[c for c in known if str(c).endswith("_modelled")])
    table = own.reindex(genes) if pd.Index(genes).isin(own.index).all() else pd.DataFrame(index=pd.Index(genes))
    others = {name: values for name, values in layers.items() if name}
    result = AnnData(X=layers[""], obs=obs, var=table, obsm={COORDINATES: np.array(xy, np.float64)}, layers=others)
    entries = spatial_entries(like)
    kept = {name: deepcopy(dict(entries[name])) for name in entries if diameters is None or name in diameters}
    for name, entry in kept.items():
        if diameters is not None:
            entry["scalefactors"] = {**entry.get("scalefactors", {}), "spot_diameter_fullres": diameters[name]}
    if kept:
        result.uns[COORDINATES] = kept
    for key, record in records(like, "features").items():  # the scale, for scale bars
        write_record(result, "features", key, deepcopy({part: record[part] for part in record if part != HEAVY}))
    return result


def empty_object(genes: NDArray[np.str_]) -> AnnData:
    """Make an AnnData of genes alone."""
    return AnnData(X=np.empty((0, len(genes)), dtype=np.float32), var=pd.DataFrame(index=pd.Index(genes)))


def _among(sites: NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows (m, 2) occur among the chosen ones."""
    return np.asarray(pd.MultiIndex.from_arrays(list(sites.T)).isin(pd.MultiIndex.from_arrays(list(chosen.T))))
