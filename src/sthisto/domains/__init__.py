"""Spatial domains: methods by name, from expression and positions to an embedding, and from there to labels.

A method turns the expression and the positions of spots into an embedding; clusters are found in it by what its
authors used, or the nearest there is. It knows nothing of AnnData and is found by name in :data:`METHODS`, which can be
read without importing what it names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sthisto.domains._labels import agreement, by_size, carry

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["METHODS", "Method", "MethodSpec", "agreement", "build", "carry", "cluster", "table_free_order"]

Clusters = Literal["mixture", "kmeans", "leiden"]


class Method(Protocol):
    """A way from expression and positions to an embedding; a dataclass whose fields are the user's ``params``.

    Laws, tested for every entry of :data:`METHODS`: the same seed gives the same bits on a CPU; spots of different
    sections are never neighbors; memory grows with the number of spots, not with its square.
    """

    history: dict[str, NDArray[np.float64]]  # curves over epochs; empty where nothing iterates

    def embed(
        self,
        expression: NDArray[np.float32],
        xy: NDArray[np.float64],
        section: NDArray[np.intp],
        *,
        random_state: int,
        device: str = "",
        progress: bool = True,
    ) -> NDArray[np.float32]:
        """Embedding (n, d) of spots: expression (n, g), positions (n, 2) in pitches, number of the section (n,)."""

    def links(self, xy: NDArray[np.float64], section: NDArray[np.intp]) -> NDArray[np.int64]:
        """Pairs (e, 2) of spots that the method takes for neighbors, each once."""


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """A method's record in the registry without importing it."""

    source: str  # "module:Class"
    clusters: Clusters  # how a given number of domains is found in its embedding
    embedding: str  # name in obsm; "" where it is but components of the expression
    reference: str
    network: str = ""  # name in uns for its links, where its authors keep them there
    spatial: bool = True  # uses positions
    iterative: bool = True  # takes params={"epochs": n}

    def load(self) -> type[Method]:
        """Import and return the method's class."""
        module, name = self.source.split(":")
        method: type[Method] = getattr(import_module(module), name)
        return method


METHODS: dict[str, MethodSpec] = {
    "stagate": MethodSpec(
        source="sthisto.domains.stagate:Stagate",
        clusters="mixture",
        embedding="X_stagate",
        reference="Dong and Zhang 2022, doi:10.1038/s41467-022-29439-6",
        network="Spatial_Net",
    ),
    "stmask": MethodSpec(
        source="sthisto.domains.stmask:StMask",
        clusters="kmeans",
        embedding="X_stmask",
        reference="Min, Fang, Chen and Zhang 2024, STMask",
    ),
    "kmeans": MethodSpec(
        source="sthisto.domains._components:Components",
        clusters="kmeans",
        embedding="",
        reference="MacQueen 1967",
        spatial=False,
        iterative=False,
    ),
    "leiden": MethodSpec(
        source="sthisto.domains._components:Components",
        clusters="leiden",
        embedding="",
        reference="Traag, Waltman and van Eck 2019, doi:10.1038/s41598-019-41695-z",
        spatial=False,
        iterative=False,
    ),
}


def build(method: str, params: Mapping[str, Any]) -> Method:
    """Make a method from its name and settings.

    Raises
    ------
    KeyError
        No method of that name.
    ValueError
        A setting that the method does not have.
    """
    if method not in METHODS:
        raise KeyError(f"no method {method!r} to find domains with (there are: {', '.join(sorted(METHODS))}).")
    kind = METHODS[method].load()
    known = [name for name in kind.__dataclass_fields__ if name != "history"]  # type: ignore[attr-defined]
    wrong = sorted(set(params) - set(known))
    if wrong:
        raise ValueError(f"{method!r} has no setting {', '.join(map(repr, wrong))} (there are: {', '.join(known)}).")
    return kind(**params)


def cluster(
    embedding: NDArray[np.float32], how: Clusters, n_domains: int | None, *, resolution: float = 1.0, random_state: int
) -> "pd.Categorical[str]":
    """Find clusters in an embedding (n, d), named "0", "1", ... from the largest to the smallest.

    Without a number of domains they are leiden communities of the given resolution.
    """
    search = import_module("sthisto.domains._clusters").cluster
    return by_size(search(embedding, how, n_domains, resolution=resolution, random_state=random_state))


def table_free_order(xy: NDArray[np.float64], section: NDArray[np.intp]) -> NDArray[np.intp]:
    """Rows (n,) ordered by section and place, whatever the order of the table.

    Sums of floating point numbers, starts of clusters and ties among neighbors depend on the order of the spots, and a
    thousand epochs make much of little. In this order a shuffled table gives the same domains to the bit.
    """
    order: NDArray[np.intp] = np.lexsort((xy[:, 0], xy[:, 1], section))
    return order
