"""HisToGene: a section as one sequence of a vision transformer (Pang et al. 2021, bioRxiv 2021.11.28.470212).

A patch x_i of 112 px (about 77 um) is flattened and joined with embeddings of the spot's position, and all spots of the
section are one sequence:

    h_i = W vec(x_i) + b + E_x[p_i] + E_y[p_i]
    h = h + MHA(LN(h)),  h = h + MLP(LN(h))    8 blocks, 16 heads of 64, MLP 2048, GELU, dropout 0.1
    y_i = mean + V LN(h_i) + c

by mean squared error and Adam, rate 1e-5, 100 epochs, a section a step.

Differences from the authors' code
- A prediction does not depend on which other points are predicted. There the sequence is whatever section is predicted,
  and four times as many points make another sequence. Here it is the training spots, whose embeddings are kept, and
  each point attends to them and to itself: nothing attends to points. A point on a fitted spot attends to that spot
  and to itself.
- The positions of a section that was not fitted are unknown to the model: its points take the mean position embedding,
  and attend to the fitted spots of all sections. The authors predict such a section as a sequence of its own.
- Positions are continuous, in units of the spots' pitch from the section's corner, and embeddings are interpolated
  between whole numbers; there they are whole rows and columns of the array, below 64.
- Gene means are taken per section, over the training spots.
- A tenth of the spots is held out, from the sequence too, to calibrate the uncertainty with.

Attention is never held as a matrix of all spots with all spots in training.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree
from torch import Tensor, nn
from torch.nn import functional

from sthisto._training import Curves, Schedule, in_batches, to_arrays, train
from sthisto.models._model import Count, Fraction, HeldOut, NonNegative, Positive, Section, Share, State
from sthisto.models._network import NetworkModel, patches_of, split_sections, without_features
from sthisto.models._standardize import STATE, SectionStandardizer, expression_of

LOGITS = 2**25  # attention of some points to all spots, held at once


class Attention(nn.Module):
    """Pre-norm attention of spots among themselves, and of points to spots and each to itself."""

    def __init__(self, width: int, heads: int, head_width: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.out = nn.Sequential(nn.Linear(heads * head_width, width), nn.Dropout(dropout))

    def forward(self, spots: Tensor) -> Tensor:
        """Spots (n, c) among themselves."""
        q, k, v = self._project(spots)
        joined = functional.scaled_dot_product_attention(q[None], k[None], v[None])[0]  # (heads, n, d)
        mixed: Tensor = self.out(joined.transpose(0, 1).flatten(1))
        return mixed

    def attend(self, points: Tensor, spots: Tensor) -> Tensor:
        """Points (m, c), each to the spots (n, c) and itself."""
        q, own_k, own_v = self._project(points)
        _, k, v = self._project(spots)
        logits = torch.cat([q @ k.transpose(1, 2), (q * own_k).sum(dim=-1, keepdim=True)], dim=-1)  # (heads, m, n + 1)
        share = (logits / q.shape[-1] ** 0.5).softmax(dim=-1)
        joined = share[..., :-1] @ v + share[..., -1:] * own_v
        mixed: Tensor = self.out(joined.transpose(0, 1).flatten(1))
        return mixed

    def _project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give queries, keys and values, (heads, n, d) each."""
        q, k, v = self.qkv(self.norm(tokens)).unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        return q, k, v


class Block(nn.Module):
    """One layer of the transformer."""

    def __init__(self, width: int, heads: int, head_width: int, mlp: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, head_width, dropout)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, mlp),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp, width),
            nn.Dropout(dropout),
        )

    def forward(self, spots: Tensor) -> Tensor:
        """Spots (n, c) of one section."""
        spots = spots + self.attention(spots)
        joined: Tensor = spots + self.mlp(spots)
        return joined

    def attend(self, points: Tensor, spots: Tensor) -> Tensor:
        """Points (m, c) that attend to the spots (n, c) which came into this block."""
        points = points + self.attention.attend(points, spots)
        joined: Tensor = points + self.mlp(points)
        return joined


class PositionEmbedding(nn.Module):
    """Embeddings of x and y, linear between whole numbers, constant beyond the first and the last."""

    def __init__(self, n_positions: int, width: int) -> None:
        super().__init__()
        self.x, self.y = (nn.Parameter(torch.randn(n_positions, width)) for _ in "xy")

    def forward(self, xy: Tensor) -> tuple[Tensor, Tensor]:
        """Two embeddings (n, c) of positions (n, 2)."""
        last = len(self.x) - 1
        xy = xy.clamp(0, last)
        below = xy.floor().long().clamp(max=last - 1)
        along = xy - below
        x, y = (
            torch.lerp(
                functional.embedding(below[:, axis], table),
                functional.embedding(below[:, axis] + 1, table),
                along[:, axis, None],
            )
            for axis, table in enumerate((self.x, self.y))
        )
        return x, y


class SectionNetwork(nn.Module, ABC):
    """A section as one sequence: tokens, blocks and a head.

    Subclasses set ``blocks`` and ``position`` and implement :meth:`encode`, :meth:`join` and :meth:`head`.
    """

    blocks: nn.ModuleList
    position: PositionEmbedding

    @abstractmethod
    def encode(self, patches: Tensor) -> Tensor:
        """Encode patches (n, h, w, 3) uint8 as (n, c)."""

    @abstractmethod
    def join(self, encoded: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Tokens (n, c) of patches and positions."""

    @abstractmethod
    def head(self, tokens: Tensor, around: Tensor) -> Tensor:
        """Deviations (n, g) of tokens (n, c) that came out of the blocks, with their neighbors' (n, k, c)."""

    def layers(self, tokens: Tensor) -> list[Tensor]:
        """Give what comes into every block and out of the last, (n, c) each, of the tokens of one section."""
        layers = [tokens]
        for block in self.blocks:
            layers.append(block(layers[-1]))
        return layers

    def forward(self, patches: Tensor, xy: Tensor, neighbors: Tensor) -> Tensor:
        """Deviations (n, g) of the spots of one section; ``neighbors`` (n, k) are rows."""
        encoded = self.layers(self.join(self.encode(patches), *self.position(xy)))[-1]
        return self.head(encoded, functional.embedding(neighbors, encoded))

    def predict(self, points: Tensor, layers: Sequence[Tensor], neighbors: Tensor) -> Tensor:
        """Deviations (m, g) of points with tokens (m, c), given the spots' layers and neighbors (m, k) among them."""
        for block, spots in zip(self.blocks, layers, strict=False):  # the last layer has no block
            points = cast("Block", block).attend(points, spots)
        return self.head(points, layers[-1][neighbors])


class HisToGeneNetwork(SectionNetwork):
    """Patches flattened; positions added."""

    def __init__(self, sizes: "HisToGene", n_genes: int, n_positions: int) -> None:
        super().__init__()
        self.patch = nn.Linear(3 * sizes.input_size**2, sizes.width)
        self.position = PositionEmbedding(n_positions, sizes.width)
        self.drop = nn.Dropout(sizes.dropout)
        self.blocks = blocks(sizes, sizes.width)
        self.out = nn.Sequential(nn.LayerNorm(sizes.width), nn.Linear(sizes.width, n_genes))

    def encode(self, patches: Tensor) -> Tensor:
        """Encode patches by a linear map of their pixels."""
        encoded: Tensor = self.patch((patches / 255).flatten(1))
        return encoded

    def join(self, encoded: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Sum all three."""
        joined: Tensor = self.drop(encoded + x + y)
        return joined

    def head(self, tokens: Tensor, around: Tensor) -> Tensor:
        """Read the tokens alone."""
        deviations: Tensor = self.out(tokens)
        return deviations


def blocks(sizes: "SectionRegression", width: int) -> nn.ModuleList:
    """Make the transformer."""
    return nn.ModuleList(
        Block(width, sizes.heads, sizes.head_width, sizes.mlp, sizes.dropout) for _ in range(sizes.depth)
    )


@dataclass(kw_only=True)
class SectionRegression(NetworkModel):
    """What networks over whole sections have in common: spots in one sequence, points that attend to it."""

    patch_um: Positive = 77.0
    input_size: Count = 112
    depth: Count = 8
    heads: Count = 16
    head_width: Count = 64
    mlp: Count = 2048
    dropout: Share = 0.1
    epochs: Count = 100
    learning_rate: NonNegative = 1e-5
    validation_fraction: Fraction = 0.1

    state_names = (*STATE, "encoded", "xy", "section")
    n_neighbors: ClassVar[int] = 0

    @abstractmethod
    def network(self, n_genes: int, n_positions: int) -> SectionNetwork:
        """Make the network."""

    @property
    def _sequence(self) -> SectionNetwork:
        return cast("SectionNetwork", self._network)

    def _make_network(self, state: State, *, restored: bool) -> nn.Module:
        last = max((xy - xy.min(axis=0)).max() for xy in _by_section(state))
        return self.network(state["gene_mean"].shape[1], int(last) + 2)

    def _fit(
        self, sections: Sequence[Section], *, random_state: int, device: str | None, progress: bool
    ) -> tuple[State, HeldOut]:
        training, validation = split_sections(sections, self.validation_fraction, random_state)
        kept = [without_features(section, rows) for section, rows in zip(sections, training, strict=True)]
        standardizer = SectionStandardizer.of(kept, with_features=False)
        state: State = {
            **standardizer.state(),
            "xy": np.concatenate([section.xy for section in kept]),
            "section": np.repeat(np.arange(len(sections)), standardizer.n_spots),
        }
        self._build(state, random_state, device)
        pixels = [torch.from_numpy(patches_of(section)) for section in kept]
        deviations = standardizer.deviations(kept).astype(np.float32)
        self.history = self._train(pixels, deviations, random_state=random_state, progress=progress)
        self._arrays = state = {
            **state,
            **to_arrays(self._network),
            "encoded": np.concatenate([self._encode(each) for each in pixels]),
        }
        held_out = [np.full(expression_of(section).shape, np.nan, dtype=np.float32) for section in sections]
        for section, rows, predicted in zip(sections, validation, held_out, strict=True):
            predicted[rows] = self.predict(without_features(section, rows))
        return state, held_out

    def _predict(self, points: Section, state: State) -> NDArray[np.float32]:
        standardizer = SectionStandardizer.restore(state)
        section = standardizer.index(points.name)
        layers = self._layers(section)
        neighbors = self._neighbors(points.xy, section)
        at_once = max(1, min(256, LOGITS // (self.heads * len(layers[0]))))

        def deviations(rows: slice) -> Tensor:
            patches = torch.from_numpy(patches_of(points, np.arange(len(points))[rows])).to(self._device)
            tokens = self._sequence.join(self._sequence.encode(patches), *self._embeddings(points.xy[rows], section))
            return self._sequence.predict(tokens, layers, neighbors[rows])

        predicted = in_batches(self._network, deviations, len(points), at_once)
        return (predicted + standardizer.mean_of(points.name)).astype(np.float32)

    def _train(
        self, pixels: Sequence[Tensor], deviations: NDArray[np.float32], *, random_state: int, progress: bool
    ) -> Curves:
        xy = [each - each.min(axis=0) for each in _by_section(self.arrays)]
        target = [torch.from_numpy(each) for each in np.split(deviations, np.cumsum([len(each) for each in xy])[:-1])]
        neighbors = [torch.from_numpy(nearest(each, each, self.n_neighbors)) for each in xy]

        def loss(rows: Tensor) -> Tensor:
            (at,) = rows.tolist()  # one section a step
            here = torch.from_numpy(xy[at].astype(np.float32))
            predicted = self._network(*(each.to(self._device) for each in (pixels[at], here, neighbors[at])))
            return functional.mse_loss(predicted, target[at].to(self._device))

        return train(
            self._network,
            loss,
            np.arange(len(xy)),
            Schedule(epochs=self.epochs, learning_rate=self.learning_rate, batch_size=1),
            random_state=random_state,
            device=self._device,
            progress=progress,
            label=type(self).__name__,
        )

    def _encode(self, pixels: Tensor) -> NDArray[np.float32]:
        return in_batches(
            self._network, lambda rows: self._sequence.encode(pixels[rows].to(self._device)), len(pixels), 256
        )

    def _embeddings(self, xy: NDArray[np.float64], section: int) -> tuple[Tensor, Tensor]:
        """Position embeddings (m, c) in a section; in one that was not fitted, the mean over all fitted spots."""
        spots = _by_section(self.arrays)
        if section >= 0:
            here = xy - spots[section].min(axis=0)
            x, y = self._sequence.position(torch.from_numpy(here.astype(np.float32)).to(self._device))
            return x, y
        fitted = [self._embeddings(each, index) for index, each in enumerate(spots)]
        x, y = (torch.cat(axis).mean(dim=0).expand(len(xy), -1) for axis in zip(*fitted, strict=True))
        return x, y

    def _layers(self, section: int) -> list[Tensor]:
        """Layers of the fitted spots of a section; for one that was not fitted, those of all sections in one row."""
        own = self.arrays["section"]
        if section < 0:
            every = [self._layers(each) for each in np.unique(own)]
            return [torch.cat(layer) for layer in zip(*every, strict=True)]
        encoded = torch.from_numpy(self.arrays["encoded"][own == section]).to(self._device)
        self._network.eval()
        with torch.no_grad():
            position = self._embeddings(self.arrays["xy"][own == section], section)
            return self._sequence.layers(self._sequence.join(encoded, *position))

    def _neighbors(self, xy: NDArray[np.float64], section: int) -> Tensor:
        """Rows (m, k) of the nearest fitted spots of the section; none in one that was not fitted."""
        spots = self.arrays["xy"][self.arrays["section"] == section]
        return torch.from_numpy(nearest(xy, spots, self.n_neighbors)).to(self._device)


def _by_section(state: State) -> list[NDArray[np.float64]]:
    """Positions of the fitted spots of each section."""
    return [state["xy"][state["section"] == each] for each in np.unique(state["section"])]


@dataclass(kw_only=True)
class HisToGene(SectionRegression):
    """A transformer over all spots of a section, from patches and their positions.

    Parameters
    ----------
    patch_um, input_size
        Side of the patch in micrometers and in pixels.
    depth, heads, head_width, mlp, width
        Blocks, heads of each, width of a head, of the hidden layer and of the tokens.
    dropout, epochs, learning_rate
        Of the training.
    validation_fraction
        Fraction of the spots held out of training.

    Examples
    --------
    >>> HisToGene(depth=4).heads
    16
    """

    width: Count = 1024

    def network(self, n_genes: int, n_positions: int) -> SectionNetwork:
        """Make the network."""
        return HisToGeneNetwork(self, n_genes, n_positions)


def nearest(points: NDArray[np.float64], spots: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Rows (m, k) of the spots nearest to each point; all where there are fewer, and none where k is 0."""
    k = min(k, len(spots))
    if not k:
        return np.empty((len(points), 0), dtype=np.int64)
    _, rows = KDTree(spots).query(points, k=range(1, k + 1))
    return np.asarray(rows, dtype=np.int64)
