"""STMask: a masked graph autoencoder with two channels, one that guesses spots and one that guesses links.

The feature channel hides the features of some spots behind a learned token and has a graph convolution predict them
from the spots around; the hidden spots' codes are hidden again before they are decoded, so that only neighbors are
informative. The link channel drops some links of the graph and has the codes of its own graph convolutions
distinguish dropped links from pairs that never were. What the spots come down to are the codes of both channels side
by side, less noise: their leading components.

    A  = D^-1/2 (links + I) D^-1/2
    Z  = A ELU(A X W1) W2                                          (n, 256)
    features: L1 = mean over hidden spots of (1 - cos(x_i, y_i))^alpha,  Y = A remask(Z) V
    links:    L2 = cross-entropy of sigmoid(z_i . z_j / sqrt(256)), dropped links against as many other pairs
    L1 + 1.3 L2

Min, Fang, Chen and Zhang 2024, "Dimensionality reduction and denoising of spatial transcriptomics data using
dual-channel masked graph autoencoder" (STMask). The masks, losses, sizes and weights are theirs.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sthisto._training import Schedule, pick_device, seeded, train
from sthisto.domains._components import components
from sthisto.domains._graph import Graph, Pairs, nearest_pairs


@dataclass(kw_only=True)
class StMask:
    """Embedding by masked graph autoencoders; the fields are the user's ``params``.

    Examples
    --------
    >>> xy = np.stack(np.meshgrid(np.arange(6.0), np.arange(6.0)), axis=-1).reshape(-1, 2)
    >>> expression = np.random.default_rng(0).random((36, 20), dtype=np.float32)
    >>> method = StMask(epochs=5, hidden=16, latent=8, dim=4)
    >>> method.embed(expression, xy, np.zeros(36, dtype=int), random_state=0, progress=False).shape
    (36, 4)
    """

    epochs: int = 500
    learning_rate: float = 1e-3
    components: int = 200  # leading components of the expression that a spot's features are
    neighbors: int = 12
    hidden: int = 512
    latent: int = 256
    dim: int = 30
    masked: float = 0.2  # share of the spots whose features are hidden at a step
    dropped: float = 0.2  # share of the links
    alpha: float = 2.0  # how much more a bad guess of a spot counts than a fair one
    link_weight: float = 1.3
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
        """Train on the spots and return the codes of both channels, (n, dim)."""
        where = pick_device(device)
        features = torch.from_numpy(components(expression, self.components, random_state)).to(where)
        pairs = self.links(xy, section)
        graph = Graph.of(pairs, len(xy), device=where)
        with seeded(random_state):
            network = Network(features.shape[1], self.hidden, self.latent)
        self.history = train(
            network,
            lambda _: self._loss(network, features, graph, pairs),
            np.arange(1),  # every step sees all spots
            Schedule(epochs=self.epochs, learning_rate=self.learning_rate),
            random_state=random_state,
            device=where,
            progress=progress,
            label="stmask",
        )
        with torch.no_grad():
            codes = network.codes(features, graph).cpu().numpy()
        return components(codes, self.dim, random_state)

    def links(self, xy: NDArray[np.float64], section: NDArray[np.intp]) -> Pairs:
        """Pairs of spots that are neighbors."""
        return nearest_pairs(xy, section, self.neighbors)

    def _loss(self, network: "Network", features: Tensor, graph: Graph, pairs: Pairs) -> Tensor:
        """Loss of one step, with masks drawn again."""
        n = len(features)
        hidden = some(n, self.masked).to(features.device)
        error = scaled_cosine_error(features, network.guess(features, hidden, graph), self.alpha)
        of_spots = (error * hidden).sum() / hidden.sum()
        dropped = some(len(pairs), self.dropped)
        keep = torch.cat([~dropped, torch.tensor([True])]).to(features.device)[graph.pair]  # loops stay
        links = Graph.of(pairs[dropped.numpy()], n, loops=False, device=features.device)
        others = Graph.of(unlinked(pairs, n, int(dropped.sum())), n, loops=False, device=features.device)
        return of_spots + self.link_weight * network.link_error(features, graph, keep, links, others)


def some(n: int, share: float) -> Tensor:
    """Mask (n,) of a random share, one at least."""
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[torch.randperm(n)[: max(1, round(share * n))]] = True
    return chosen


def unlinked(pairs: Pairs, n: int, wanted: int) -> Pairs:
    """Random pairs of different spots that are no links, about as many as wanted."""
    drawn = np.sort(torch.randint(n, (wanted, 2)).numpy(), axis=1)
    real = np.isin(drawn[:, 0] * n + drawn[:, 1], pairs[:, 0] * n + pairs[:, 1])
    chosen: Pairs = drawn[~real & (drawn[:, 0] != drawn[:, 1])]
    return chosen


def scaled_cosine_error(truth: Tensor, guess: Tensor, alpha: float) -> Tensor:
    """Error (n,) of each row: one less the cosine of the angle, to the power alpha."""
    return (1 - nn.functional.cosine_similarity(truth, guess)).pow(alpha)


class Channel(nn.Module):
    """Two graph convolutions."""

    def __init__(self, features: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, hidden), nn.Linear(hidden, latent)
        for layer in (self.first, self.second):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor, graph: Graph, weights: Tensor) -> Tensor:
        """Codes (n, latent) of features (n, d)."""
        hidden = nn.functional.elu(self.first(graph.propagate(weights, features)))
        return graph.propagate(weights, self.second(hidden))


class Network(nn.Module):
    """Both channels, the token that hides features, and the way back from codes to features."""

    def __init__(self, features: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(features))
        self.spots = Channel(features, hidden, latent)
        self.links = Channel(features, hidden, latent)
        self.back = nn.Linear(latent, features)

    def codes(self, features: Tensor, graph: Graph) -> Tensor:
        """Codes (n, 2 latent) of both channels, nothing hidden."""
        weights = graph.normalised()
        return torch.cat([channel(features, graph, weights) for channel in (self.spots, self.links)], dim=1)

    def guess(self, features: Tensor, hidden: Tensor, graph: Graph) -> Tensor:
        """Features (n, d) as the decoder predicts them; it is given nothing of the hidden spots (n,)."""
        weights = graph.normalised()
        codes = self.spots(torch.where(hidden[:, None], self.token, features), graph, weights)
        return graph.propagate(weights, self.back(codes.masked_fill(hidden[:, None], 0)))

    def link_error(self, features: Tensor, graph: Graph, keep: Tensor, links: Graph, others: Graph) -> Tensor:
        """Cross-entropy of links against other pairs by the codes over the edges (e,) that are kept."""
        codes = self.links(features, graph, graph.normalised(keep)) / self.back.in_features**0.25
        return -(
            nn.functional.logsigmoid(links.products(codes)).mean()
            + nn.functional.logsigmoid(-others.products(codes)).mean()
        )
