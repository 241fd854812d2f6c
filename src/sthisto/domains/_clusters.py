"""Clusters in an embedding: a Gaussian mixture of one shape, k-means, or communities of the neighbor graph."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture

if TYPE_CHECKING:
    from anndata import AnnData

    from sthisto.domains import Clusters

STARTS = 10
NEIGHBOURS = 15  # of the graph that communities are sought in, scanpy's default
TRIALS = 20  # resolutions tried for a number of communities


def cluster(
    embedding: NDArray[np.float32], how: "Clusters", n_domains: int | None, *, resolution: float, random_state: int
) -> NDArray[np.intp]:
    """Numbers (n,) of the clusters that an embedding (n, d) falls into; without ``n_domains`` always communities."""
    if n_domains is None or how == "leiden":
        return leiden(embedding, n_domains, resolution=resolution, random_state=random_state)
    return (mixture if how == "mixture" else kmeans)(embedding, n_domains, random_state=random_state)


def mixture(embedding: NDArray[np.float32], n_domains: int, *, random_state: int) -> NDArray[np.intp]:
    """Fit Gaussians that share one covariance, the best of several starts: the nearest here to mclust's "EEE"."""
    fitted = GaussianMixture(n_domains, covariance_type="tied", n_init=STARTS, max_iter=1000, random_state=random_state)
    found: NDArray[np.intp] = fitted.fit_predict(embedding.astype(np.float64))
    return found


def kmeans(embedding: NDArray[np.float32], n_domains: int, *, random_state: int) -> NDArray[np.intp]:
    """Find groups around centres, the best of several starts."""
    found: NDArray[np.intp] = KMeans(n_domains, n_init=STARTS, random_state=random_state).fit_predict(embedding)
    return found


def leiden(
    embedding: NDArray[np.float32], n_domains: int | None, *, resolution: float, random_state: int
) -> NDArray[np.intp]:
    """Find communities of the neighbor graph, by scanpy; for a number of them, the resolution is sought that gives it.

    Raises
    ------
    ValueError
        Too few spots for the graph, or no resolution that gives the number.
    """
    import scanpy as sc  # noqa: PLC0415  importing sthisto must not load scanpy

    if len(embedding) <= NEIGHBOURS:
        raise ValueError(f"{len(embedding)} spots are too few for leiden, which links each to {NEIGHBOURS} others.")
    graph = sc.AnnData(embedding)
    sc.pp.neighbors(graph, n_neighbors=NEIGHBOURS, use_rep="X", random_state=random_state)
    if n_domains is None:
        return _communities(graph, resolution, random_state)
    low, high, reached = 0.0, max(4 * resolution, 4.0), {}
    for _ in range(TRIALS):
        trial = (low + high) / 2
        found = _communities(graph, trial, random_state)
        reached[trial] = len(np.unique(found))
        if reached[trial] == n_domains:
            return found
        low, high = (trial, high) if reached[trial] < n_domains else (low, trial)
    counts = ", ".join(str(count) for count in sorted(set(reached.values())))
    raise ValueError(
        f"no resolution up to {max(reached):.3g} gave {n_domains} communities (found: {counts}). Ask for another "
        "number, or pass resolution= without n_domains."
    )


def _communities(graph: "AnnData", resolution: float, random_state: int) -> NDArray[np.intp]:
    import scanpy as sc  # noqa: PLC0415

    sc.tl.leiden(
        graph,
        resolution=resolution,
        flavor="igraph",
        n_iterations=-1,
        directed=False,
        random_state=random_state,
        key_added="c",
    )
    found: NDArray[np.intp] = graph.obs["c"].astype(int).to_numpy()
    return found
