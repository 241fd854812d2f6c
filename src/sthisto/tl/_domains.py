"""Find spatial domains."""

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sthisto import _data, domains
from sthisto.domains import METHODS

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


@_data.accepts_spatialdata(library_key="library_key")
def spatial_domains(
    adata: "AnnData | SpatialData",
    method: str = "stagate",
    n_domains: int | None = None,
    *,
    layer: str | None = None,
    genes: Iterable[str] | None = None,
    use_rep: str | None = None,
    library_key: str | None = None,
    resolution: float = 1.0,
    params: Mapping[str, Any] | None = None,
    random_state: int = 0,
    device: str | None = None,
    key_added: str = "spatial_domain",
) -> None:
    """Divide the tissue into domains of similar expression.

    One spot has too few counts to be assigned by its expression alone. ``stagate`` and ``stmask`` learn an embedding
    of each spot with its neighbors and cluster that; ``kmeans`` and ``leiden`` cluster the spots one by one. All work
    on measured expression, on predictions (``layer="sthisto"``) and on dense maps from :func:`upsample`. Labels do
    not depend on the order of the rows.

    Parameters
    ----------
    adata
        Section with log-normalised expression and spot centres in ``obsm["spatial"]``, measured or predicted.
    method
        Name in :data:`sthisto.domains.METHODS`.
    n_domains
        Number of domains. ``None`` lets leiden communities of the embedding decide; k-means needs a number.
    layer
        Layer with log-normalised expression, ``"sthisto"`` for the prediction; ``None`` reads ``X``.
    genes
        Genes to use; ``None`` takes ``var["highly_variable"]`` where present, else all, without those that are NaN
        throughout because the fit does not model them.
    use_rep
        Representation (n, d) in ``obsm`` to use instead of expression. ``kmeans`` and ``leiden`` cluster it as it is.
    library_key
        Column of ``obs`` that names the section of each spot. Spots of different sections are never neighbors.
    resolution
        Of leiden communities where no number is given.
    params
        Settings of the method, such as ``{"epochs": n}``.
    random_state
        Seed; the same seed gives the same bits on a CPU.
    device
        Where networks train, as torch names it; ``None`` takes a GPU where there is one.
    key_added
        Column of ``obs`` to write.

    Returns
    -------
    Nothing. Writes

    ``obs[key_added]`` : categorical, "0" the largest domain

    ``obsm["X_stagate"]``, ``obsm["X_stmask"]`` : (n, 30) float32, the embedding of these methods

    ``uns["sthisto"]["domains"][key_added]`` : the settings

    ``uns["Spatial_Net"]`` : with ``stagate``, its neighbors as the authors' package keeps them: ``Cell1``, ``Cell2``,
    ``Distance``, in the unit of ``obsm["spatial"]``

    Raises
    ------
    KeyError
        Unknown method, layer, gene, column or representation; no coordinates.
    TypeError
        ``params`` that no file could keep.
    ValueError
        More domains than spots, k-means without a number, unknown params, several sections without ``library_key``,
        raw counts, values that are NaN or negative, a device that is not there.

    References
    ----------
    STAGATE: Dong and Zhang 2022, doi:10.1038/s41467-022-29439-6. STMask: Min, Fang, Chen and Zhang 2024. The modules in
    ``sthisto.domains`` give their equations. Clusters in STAGATE's embedding are those of Gaussians with one
    covariance, as mclust's "EEE" has them.

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic()
    >>> sthisto.tl.spatial_domains(adata, "stagate", 3, params={"epochs": 20})
    >>> adata.obs["spatial_domain"].cat.categories.tolist()
    ['0', '1', '2']
    """
    _data.check_key(key_added)
    random_state = int(random_state)  # numpy's integers, too
    settings = _data.plain_params(params)
    built = domains.build(method, settings)
    spec = METHODS[method]
    _refuse_number(n_domains, adata.n_obs, method)
    sections = _data.read_sections(adata, library_key)
    values, n_genes = _values(adata, layer, genes, use_rep)
    xy, section = _positions(sections, adata.n_obs)
    rows = domains.table_free_order(xy, section)
    if use_rep is not None and not spec.spatial:
        embedding = values[rows]
    else:
        embedding = built.embed(
            values[rows], xy[rows], section[rows], random_state=random_state, device=device or "", progress=True
        )
    labels = domains.cluster(embedding, spec.clusters, n_domains, resolution=resolution, random_state=random_state)
    back = np.argsort(rows)
    _data.write_domains(
        adata,
        key_added,
        domains=labels[back],
        embedding={spec.embedding: embedding[back]} if spec.embedding else {},
        record={
            "method": method,
            "n_domains": len(labels.categories),
            "clusters": "leiden" if n_domains is None else spec.clusters,
            "resolution": float(resolution),
            "layer": layer or "",
            "use_rep": use_rep or "",
            "n_genes": n_genes,
            "library_key": library_key or "",
            "random_state": int(random_state),
            "params": json.dumps(settings),
            **{f"last_{name}_loss": float(curve[-1]) for name, curve in built.history.items()},
        },
        networks={spec.network: built.links(xy, section)} if spec.network else {},
    )


def _refuse_number(n_domains: int | None, n_spots: int, method: str) -> None:
    if n_domains is None:
        if method == "kmeans":
            raise ValueError("method 'kmeans' needs the number of domains: pass n_domains=.")
        return
    if isinstance(n_domains, bool) or not isinstance(n_domains, int | np.integer) or n_domains < 1:
        raise ValueError(f"n_domains={n_domains!r}: expected a whole number of 1 or more, or None.")
    if n_domains > n_spots:
        raise ValueError(f"{n_domains} domains were asked for, but there are {n_spots} spots.")


def _values(
    adata: "AnnData", layer: str | None, genes: Iterable[str] | None, use_rep: str | None
) -> tuple[NDArray[np.float32], int]:
    """Read the input (n, d) of the method, and from how many genes it is."""
    rows = np.arange(adata.n_obs)
    if use_rep is not None:
        if layer is not None or genes is not None:
            raise ValueError(f"use_rep={use_rep!r} takes the place of expression: leave out layer= and genes=.")
        return _data.features(adata, use_rep, rows), 0
    chosen = _data.genes_to_model(adata, genes)
    if genes is None:
        chosen = _data.genes_with_values(adata, chosen, layer)
    return _data.expression(adata, rows, chosen, layer), len(chosen)


def _positions(sections: Mapping[str, _data.SectionData], n: int) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Positions (n, 2) in pitches and numbers (n,) of the sections, counted in the order of their names."""
    xy, section = np.empty((n, 2)), np.empty(n, dtype=np.intp)
    for number, name in enumerate(sorted(sections)):
        each = sections[name]
        pitch = each.pitch if np.isfinite(each.pitch) else 1.0
        # The last bit of the pitch depends on the order of the rows, and on it which of equally near spots are linked.
        xy[each.rows] = np.round(each.xy / pitch, 6)
        section[each.rows] = number
    return xy, section
