"""STAGATE: an autoencoder whose layers attend to the neighboring spots.

A spot's expression is read together with its neighbors', each as much as attention gives it, squeezed to a few numbers
and spread out again along the same attention. What neighbors agree on survives, what one spot has alone does not.

    P  = X W1                                                    (n, 512)
    C  = softmax over the neighbors j of i of sigmoid(a_s P_i + a_r P_j)
    H1 = ELU(C P),  Z = H1 W2                                    (n, 512), (n, 30)
    H3 = ELU(C Z W2'),  Y = H3 W1'                               (n, 512), (n, genes)

Two identities make it fast. The squared error needs neither Y nor a pass over all genes beyond P, since
``|X - H3 W1'|^2 = |X|^2 - 2 <P, H3> + <H3'H3, W1'W1>``; and where X is of low rank, as what a model predicts is, P
comes from its factors. The first is exact. The second leaves out a share ``low_rank`` of the variance at the most.

Dong and Zhang 2022, Nature Communications 13, 1739, doi:10.1038/s41467-022-29439-6: the network is their Methods'. In
``C Z W2'`` the neighbors are summed before they are spread to 512 numbers, which is the same and cheaper.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.extmath import randomized_svd
from torch import Tensor, nn

from sthisto._training import Schedule, pick_device, seeded, train
from sthisto.domains._graph import Graph, Pairs, pairs_within, take

RANK = 64  # factors that an input of low rank may have


@dataclass(kw_only=True)
class Stagate:
    """Embedding by a graph attention autoencoder; the fields are the user's ``params``.

    Examples
    --------
    >>> xy = np.stack(np.meshgrid(np.arange(6.0), np.arange(6.0)), axis=-1).reshape(-1, 2)
    >>> expression = np.random.default_rng(0).random((36, 20), dtype=np.float32)
    >>> method = Stagate(epochs=5, hidden=16, dim=4)
    >>> method.embed(expression, xy, np.zeros(36, dtype=int), random_state=0, progress=False).shape
    (36, 4)
    """

    epochs: int = 1000
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    clip: float = 5.0  # of the gradient's norm
    hidden: int = 512
    dim: int = 30
    radius: float = 1.5  # of a neighborhood, in pitches: the six or eight spots around
    low_rank: float = 1e-4  # share of the variance that a faster input of low rank may lack; 0 never takes one
    history: dict[str, NDArray[np.float64]] = field(default_factory=dict, init=False, repr=False)

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
        """Train on the spots and return what their neighborhoods come down to, (n, dim)."""
        where = pick_device(device)
        graph = Graph.of(self.links(xy, section), len(xy), device=where)
        source = Input.of(expression, self.low_rank, random_state, where)
        with seeded(random_state):
            network = Network(expression.shape[1], self.hidden, self.dim)
        schedule = Schedule(
            epochs=self.epochs, learning_rate=self.learning_rate, weight_decay=self.weight_decay, clip=self.clip
        )
        self.history = train(
            network,
            lambda _: network.loss(source, graph),
            np.arange(1),  # every step sees all spots
            schedule,
            random_state=random_state,
            device=where,
            progress=progress,
            label="stagate",
        )
        with torch.no_grad():
            embedding: NDArray[np.float32] = network.encode(source, graph)[2].cpu().numpy()
        return embedding

    def links(self, xy: NDArray[np.float64], section: NDArray[np.intp]) -> Pairs:
        """Pairs of spots that are neighbors."""
        return pairs_within(xy, section, self.radius)


@dataclass(frozen=True, eq=False)
class Input:
    """Expression (n, g) as the network reads it: itself, or the product of its factors."""

    scores: Tensor  # (n, g), or (n, r)
    loadings: Tensor | None  # (r, g)
    squares: float  # sum of all squares

    @classmethod
    def of(cls, expression: NDArray[np.float32], low_rank: float, random_state: int, device: torch.device) -> "Input":
        """Take the factors where they lack no more than a share ``low_rank`` of the genes' variance."""
        factors = _factors(expression, low_rank, random_state)
        scores, loadings = factors or (expression, None)
        return cls(
            torch.from_numpy(scores).to(device),
            None if loadings is None else torch.from_numpy(loadings).to(device),
            float(np.square(expression, dtype=np.float64).sum()),
        )

    def project(self, weights: Tensor) -> Tensor:
        """Expression times weights (g, d)."""
        return self.scores @ (weights if self.loadings is None else self.loadings @ weights)

    @property
    def size(self) -> int:
        """How many values the expression has."""
        return len(self.scores) * (self.scores if self.loadings is None else self.loadings).shape[1]


def _factors(
    expression: NDArray[np.float32], low_rank: float, random_state: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Scores (n, 1 + r) and loadings (1 + r, g) of an expression of low rank about its mean."""
    if low_rank <= 0 or min(expression.shape) <= 4 * RANK:  # nothing to win
        return None
    mean = expression.mean(axis=0, keepdims=True)
    centred = expression - mean
    left, values, loadings = randomized_svd(centred, RANK, n_iter=4, random_state=random_state)
    lacking = np.square(centred, dtype=np.float64).sum() - np.square(values, dtype=np.float64).sum()
    if lacking > low_rank * np.square(centred, dtype=np.float64).sum():
        return None
    scores = np.concatenate([np.ones((len(left), 1)), left * values], axis=1)
    return scores.astype(np.float32), np.concatenate([mean, loadings]).astype(np.float32)


class Network(nn.Module):
    """The weights, shared by the way down and the way up."""

    def __init__(self, genes: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(genes, hidden))
        self.squeeze = nn.Parameter(torch.empty(hidden, dim))
        self.sender = nn.Parameter(torch.empty(hidden, 1))
        self.receiver = nn.Parameter(torch.empty(hidden, 1))
        for weight in self.parameters():
            nn.init.xavier_normal_(weight, gain=2**0.5)

    def attention(self, projected: Tensor, graph: Graph) -> Tensor:
        """Weights (e,) of the neighbors, which sum to one for every spot."""
        sender, receiver = (projected @ self.sender)[:, 0], (projected @ self.receiver)[:, 0]
        return graph.softmax(torch.sigmoid(take(sender, graph.rows) + take(receiver, graph.columns)))

    def encode(self, source: Input, graph: Graph) -> tuple[Tensor, Tensor, Tensor]:
        """Projected expression (n, hidden), attention (e,) and embedding (n, dim)."""
        projected = source.project(self.down)
        attention = self.attention(projected, graph)
        hidden = nn.functional.elu(graph.propagate(attention, projected))
        return projected, attention, hidden @ self.squeeze

    def unfold(self, embedding: Tensor, attention: Tensor, graph: Graph) -> Tensor:
        """Hidden layer (n, hidden) of the decoder; times ``down`` transposed it is the reconstruction."""
        return nn.functional.elu(graph.propagate(attention, embedding) @ self.squeeze.T)

    def loss(self, source: Input, graph: Graph) -> Tensor:
        """Mean squared error of the reconstruction."""
        projected, attention, embedding = self.encode(source, graph)
        unfolded = self.unfold(embedding, attention, graph)
        products = (gram(self.down) * gram(unfolded)).sum()
        return (source.squares - 2 * (projected * unfolded).sum() + products) / source.size


def gram(x: Tensor) -> Tensor:
    """Scalar products (d, d) of the columns of x (n, d)."""
    products: Tensor = _Gram.apply(x)
    return products


class _Gram(torch.autograd.Function):
    """Its gradient is one product of matrices, where the rule for products would make two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.T @ x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gradient: Tensor = x @ (grad + grad.T)
        return gradient
