"""Neighborhoods of spots as sparse lists, and how values travel along them.

Nothing here is n x n: a graph is the list of its edges, sorted by row, and all that is computed on it costs as much as
there are edges. Graphs are symmetric, so the transpose that a gradient needs is the same list with the weights of the
mirrored edges. Sums run in the order of the list, which makes them the same to the bit on a CPU whatever the threads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

Pairs: TypeAlias = NDArray[np.int64]  # (e, 2) rows of spots that are neighbors, each pair once, the lower row first


@dataclass(frozen=True, eq=False)
class Graph:
    """Edges (e,) of n spots, sorted by row, then column, and with every edge its mirror."""

    starts: Tensor  # (n + 1,) int64, where the edges of each row begin
    rows: Tensor  # (e,) int64
    columns: Tensor  # (e,) int64
    mirror: Tensor  # (e,) int64, at the edge (i, j) the place of the edge (j, i)
    pair: Tensor  # (e,) int64, the row of the edge among the pairs that it was made of; a loop's is the one after

    @classmethod
    def of(cls, pairs: Pairs, n: int, *, loops: bool = True, device: torch.device | None = None) -> Self:
        """Take both directions of every pair, and with ``loops`` a link of each spot to itself."""
        itself = np.arange(n if loops else 0)
        rows = np.concatenate([pairs[:, 0], pairs[:, 1], itself])
        columns = np.concatenate([pairs[:, 1], pairs[:, 0], itself])
        pair = np.concatenate([np.arange(len(pairs)), np.arange(len(pairs)), np.full(len(itself), len(pairs))])
        order = np.lexsort((pair, columns, rows))
        rows, columns, pair = rows[order], columns[order], pair[order]
        mirror = np.empty_like(rows)
        mirror[np.lexsort((pair, rows, columns))] = np.arange(len(rows))
        starts = np.searchsorted(rows, np.arange(n + 1))
        return cls(*(torch.from_numpy(each).to(device) for each in (starts, rows, columns, mirror, pair)))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def propagate(self, weights: Tensor, x: Tensor) -> Tensor:
        """Sum over the neighbors j of each spot i of weights (e,) at (i, j) times x (n, d) at j: (n, d)."""
        summed: Tensor = _Propagate.apply(self, weights, x)
        return summed

    def sum(self, values: Tensor) -> Tensor:
        """Sum of the values (e,) of each row's edges: (n,)."""
        return self.propagate(values, values.new_ones(len(self), 1))[:, 0]

    def softmax(self, scores: Tensor) -> Tensor:
        """Softmax of the scores (e,) over each row's edges; scores are small numbers, as a sigmoid gives them."""
        weights = scores.exp()
        return weights / take(self.sum(weights), self.rows)

    def normalised(self, keep: Tensor | None = None) -> Tensor:
        """Weights (e,) of a graph convolution, 1 / sqrt(degree of row x degree of column), of the edges kept."""
        weights = torch.ones_like(self.rows, dtype=torch.float32) if keep is None else keep.float()
        scale = self.sum(weights).rsqrt()
        return weights * scale[self.rows] * scale[self.columns]

    def products(self, x: Tensor) -> Tensor:
        """Scalar products (e,) of the rows of x (n, d) at both ends of every edge."""
        products: Tensor = _Products.apply(self, x)
        return products


class _Propagate(torch.autograd.Function):
    """Weighted sums over neighbors, with gradients that add up in one order."""

    @staticmethod
    def forward(ctx: Any, graph: Graph, weights: Tensor, x: Tensor) -> Tensor:
        ctx.graph = graph
        ctx.save_for_backward(weights, x)
        return _bags(graph, weights, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        graph, (weights, x), grad = ctx.graph, ctx.saved_tensors, grad.contiguous()
        of_weights = of_x = None
        if ctx.needs_input_grad[1]:
            # The products of edges' ends, without a row of x for every edge: torch has them as this gradient.
            with torch.enable_grad():
                varied = weights.detach().requires_grad_()
                (of_weights,) = torch.autograd.grad(_bags(graph, varied, x.detach()), varied, grad)
        if ctx.needs_input_grad[2]:
            of_x = _bags(graph, weights.detach()[graph.mirror], grad)
        return None, of_weights, of_x


class _Products(torch.autograd.Function):
    """Scalar products over edges; their gradient is a weighted sum over neighbors."""

    @staticmethod
    def forward(ctx: Any, graph: Graph, x: Tensor) -> Tensor:
        ctx.graph = graph
        ctx.save_for_backward(x)
        return torch.einsum("ed,ed->e", x[graph.rows], x[graph.columns])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        graph, (x,) = ctx.graph, ctx.saved_tensors
        return None, _bags(graph, grad + grad[graph.mirror], x)


def _bags(graph: Graph, weights: Tensor, x: Tensor) -> Tensor:
    return torch.nn.functional.embedding_bag(
        graph.columns, x, graph.starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def take(values: Tensor, at: Tensor) -> Tensor:
    """Take the values (n,) at the ends (e,) of edges; other than with an index, the gradient adds up in one order."""
    return values.index_select(0, at)


def pairs_within(xy: NDArray[np.float64], section: NDArray[np.intp], radius: float) -> Pairs:
    """Pairs of spots of one section that are no further than a radius apart."""
    return _by_section(section, lambda rows: cKDTree(xy[rows]).query_pairs(radius, output_type="ndarray"))


def nearest_pairs(xy: NDArray[np.float64], section: NDArray[np.intp], k: int) -> Pairs:
    """Pairs of spots of one section of which one is among the k nearest of the other."""

    def pairs(rows: NDArray[np.intp]) -> Pairs:
        near = min(k + 1, len(rows))
        found = cKDTree(xy[rows]).query(xy[rows], near)[1].reshape(len(rows), near)
        ends = np.stack([np.repeat(np.arange(len(rows)), near), found.ravel()], axis=1)
        apart: Pairs = ends[ends[:, 0] != ends[:, 1]]
        return apart

    return _by_section(section, pairs)


def _by_section(section: NDArray[np.intp], pairs: Callable[[NDArray[np.intp]], NDArray[Any]]) -> Pairs:
    """Join the pairs of all sections, each pair once, in order."""
    groups = [np.flatnonzero(section == name) for name in np.unique(section)]
    joined = np.concatenate([rows[pairs(rows)].reshape(-1, 2) for rows in groups]).astype(np.int64)
    unique: Pairs = np.unique(np.sort(joined, axis=1), axis=0)
    return unique
