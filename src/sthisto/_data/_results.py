"""Predictions put back: layers over the spots, or a new AnnData."""

from collections.abc import Mapping
from copy import deepcopy

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from sthisto import grids
from sthisto._data._pictures import description
from sthisto._data._records import UNS, Fit, Place, Points, write


def gene_columns(adata: AnnData, genes: NDArray[np.str_]) -> NDArray[np.intp]:
    """Columns (g,) of the fitted genes."""
    columns: NDArray[np.intp] = adata.var_names.get_indexer(genes)
    if (columns < 0).any():
        raise ValueError(
            f"the model was fitted on other genes: {int((columns < 0).sum())} of its {len(genes)} are not in "
            f"adata.var_names (first: {str(genes[columns < 0][0])!r}). Fit again, or use the object it was fitted on."
        )
    return columns


def write_prediction(  # noqa: PLR0917  the parts of a prediction
    adata: AnnData,
    key: str,
    genes: NDArray[np.str_],
    mean: NDArray[np.float32],
    beside: Mapping[str, NDArray[np.float32]],
    extrapolated: NDArray[np.bool_],
) -> None:
    """Put prediction and what stands beside it (n, g) into layers over all genes, NaN where a gene is not modelled."""
    columns = gene_columns(adata, genes)
    layers = {}
    for name, values in ((key, mean), *((f"{key}_{name}", values) for name, values in beside.items())):
        layers[name] = np.full(adata.shape, np.nan, dtype=np.float32)
        layers[name][:, columns] = values
    write(
        adata,
        layers=layers,
        var={f"{key}_modelled": adata.var_names.isin(genes)},
        obs={f"{key}_extrapolated": extrapolated},
    )


def write_judgement(adata: AnnData, genes: NDArray[np.str_], columns: Mapping[str, NDArray[np.float64]]) -> None:
    """Put figures (g,) of the genes into ``var``, NaN for the others."""
    write(adata, var={name: pd.Series(value, genes).reindex(adata.var_names) for name, value in columns.items()})


def points_obs(adata: AnnData, fit: Fit, places: Mapping[str, Place], laid: Mapping[str, Points]) -> pd.DataFrame:
    """Name the points of all sections, and tell their sites and the spot nearest to each."""
    obs = pd.concat([_points_obs(adata, fit, name, places[name], points) for name, points in laid.items()])
    texts = [name for name in ("nearest_spot", fit.library_key) if name]
    return obs.astype(dict.fromkeys(texts, "category"))


def _points_obs(adata: AnnData, fit: Fit, library: str, place: Place, points: Points) -> pd.DataFrame:
    distance, spot = (each[:, 0] for each in grids.nearest(points.xy, place.xy))
    names = adata.obs_names[place.rows].to_numpy().astype(str)
    trained = np.isin(names, fit.spots)
    obs = pd.DataFrame(index=np.arange(len(spot)).astype(str))
    if points.site is not None and points.spot_site is not None:
        obs["array_row"], obs["array_col"] = (points.site - points.site.min(axis=0)).T
        obs.index = pd.Index([f"{row}x{col}" for row, col in obs.to_numpy()])
        obs["measured"] = _among(points.site, points.spot_site[trained])
    else:
        obs["measured"] = (distance == 0) & trained[spot]
    obs["nearest_spot"] = names[spot]
    obs["distance_um"] = distance * _mpp(adata, fit, library)
    if fit.library_key:
        obs.index = library + "_" + obs.index
        obs[fit.library_key] = library
    return obs


def new_slide(  # noqa: PLR0917  the parts of an AnnData
    like: AnnData,
    genes: NDArray[np.str_],
    mean: NDArray[np.float32],
    layers: Mapping[str, NDArray[np.float32]],
    obs: pd.DataFrame,
    xy: NDArray[np.float64],
    diameters: Mapping[str, float] | None = None,
) -> AnnData:
    """Make an AnnData of predictions that plots, clusters and concatenates like a measured one."""
    own = like.var.drop(columns=[name for name in like.var if str(name).endswith("_modelled")])
    var = own.reindex(genes) if pd.Index(genes).isin(like.var_names).all() else pd.DataFrame(index=pd.Index(genes))
    made = AnnData(X=mean, obs=obs, var=var, obsm={"spatial": np.asarray(xy)}, layers=dict(layers))
    spatial = like.uns.get("spatial", {})
    kept = {name: deepcopy(spatial[name]) for name in spatial if diameters is None or name in diameters}
    for library, entry in kept.items():
        if diameters is not None:
            entry["scalefactors"] = {**entry.get("scalefactors", {}), "spot_diameter_fullres": diameters[library]}
    if kept:
        made.uns["spatial"] = kept
    described = like.uns.get(UNS, {}).get("features")
    if described:
        # The scale, for scale bars; of the encoder's weights, which are large, the fitted object has enough.
        light = {key: {part: record[part] for part in record if part != "weights"} for key, record in described.items()}
        made.uns[UNS] = {"features": deepcopy(light)}
    return made


def spot_diameter(adata: AnnData, library: str, pitch: float) -> float:
    """Diameter of the spots in pixels as ``uns`` says, else that of Visium's: 55 um of 100."""
    factors = adata.uns.get("spatial", {}).get(library, {}).get("scalefactors", {})
    return float(factors.get("spot_diameter_fullres", 0.55 * pitch))


def _among(sites: NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows (m, 2) occur among the chosen ones."""
    return np.asarray(pd.MultiIndex.from_arrays(list(sites.T)).isin(pd.MultiIndex.from_arrays(list(chosen.T))))


def _mpp(adata: AnnData, fit: Fit, library: str) -> float:
    """Scale that the features were taken at; NaN where sthisto did not take them."""
    made = adata.uns.get(UNS, {}).get("features", {})
    for key in [fit.features_key] if fit.features_key else made:
        if key in made and library in list(made[key]["libraries"]):
            return description(adata, key, library, alone=not fit.library_key).mpp
    return float("nan")
