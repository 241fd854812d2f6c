"""HisToGene: a section as one sequence of a vision transformer (Pang et al. 2021, bioRxiv 2021.11.28.470212).

A patch x_i of 112 px (about 77 um) is flattened and joined with embeddings of the spot's place, and all spots of the
section are one sequence:

    h_i = W vec(x_i) + b + E_x[p_i] + E_y[p_i]
    h = h + MHA(LN(h)),  h = h + MLP(LN(h))    8 blocks, 16 heads of 64, MLP 2048, GELU, dropout 0.1
    y_i = mean + V LN(h_i) + c

by mean squared error and Adam, rate 1e-5, 100 epochs, a section a step.

Differences from the authors' code
- A prediction does not depend on which other points are asked for. There the sequence is whatever section is predicted,
  and four times as many points make another sequence. Here it is the spots that were learnt from, whose embeddings are
  kept, and each point attends to them and to itself: nothing attends to points. A point on a fitted spot attends to
  that spot and to itself.
- A section that was never fitted has no place that the model knows: its points take the mean embedding of place, and
  attend to the fitted spots of all sections. The authors predict such a section as a sequence of its own.
- Places are continuous, in units of the spots' pitch from the section's corner, and embeddings are interpolated between
  whole numbers; there they are whole rows and columns of the array, below 64.
- Gene means are taken per section, over the spots that are learnt from.
- A tenth of the spots is held back, from the sequence too, to learn the spread of new measurements from.

Attention is never held as a matrix of all spots with all spots while learning.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree
from torch import Tensor, nn
from torch.nn import functional

from sthisto._training import Schedule, from_arrays, in_batches, pick_device, seeded, to_arrays, train
from sthisto.models._model import Section
from sthisto.models._standardize import SectionStandardizer, expression_of
from sthisto.models.baselines.stnet import hold_back, part, patches_of

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

    def beside(self, points: Tensor, spots: Tensor) -> Tensor:
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

    def beside(self, points: Tensor, spots: Tensor) -> Tensor:
        """Points (m, c) beside the spots (n, c) that came into this block."""
        points = points + self.attention.beside(points, spots)
        joined: Tensor = points + self.mlp(points)
        return joined


class Place(nn.Module):
    """Embeddings of x and y, linear between whole numbers, constant beyond the first and the last."""

    def __init__(self, n_places: int, width: int) -> None:
        super().__init__()
        self.x, self.y = (nn.Parameter(torch.randn(n_places, width)) for _ in "xy")

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

    ``blocks`` and ``place`` are set by those that inherit, with :meth:`look`, :meth:`join` and :meth:`head`.
    """

    blocks: nn.ModuleList
    place: Place

    @abstractmethod
    def look(self, patches: Tensor) -> Tensor:
        """Describe patches (n, h, w, 3) uint8 as (n, c)."""

    @abstractmethod
    def join(self, look: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Tokens (n, c) of what is seen and where."""

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
        seen = self.layers(self.join(self.look(patches), *self.place(xy)))[-1]
        return self.head(seen, functional.embedding(neighbors, seen))

    def beside(self, points: Tensor, layers: Sequence[Tensor], neighbors: Tensor) -> Tensor:
        """Deviations (m, g) of points with tokens (m, c), given the spots' layers and neighbors (m, k) among them."""
        for block, spots in zip(self.blocks, layers, strict=False):  # the last layer has no block
            points = cast("Block", block).beside(points, spots)
        return self.head(points, layers[-1][neighbors])


class HisToGeneNetwork(SectionNetwork):
    """Patches flattened; place added."""

    def __init__(self, sizes: "HisToGene", n_genes: int, n_places: int) -> None:
        super().__init__()
        self.patch = nn.Linear(3 * sizes.input_size**2, sizes.width)
        self.place = Place(n_places, sizes.width)
        self.drop = nn.Dropout(sizes.dropout)
        self.blocks = blocks(sizes, sizes.width)
        self.out = nn.Sequential(nn.LayerNorm(sizes.width), nn.Linear(sizes.width, n_genes))

    def look(self, patches: Tensor) -> Tensor:
        """Describe patches by a linear map of their pixels."""
        described: Tensor = self.patch((patches / 255).flatten(1))
        return described

    def join(self, look: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Sum all three."""
        joined: Tensor = self.drop(look + x + y)
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
class SectionRegression(ABC):
    """What networks over whole sections share: spots in one sequence, points beside it."""

    patch_um: float = 77.0
    input_size: int = 112
    depth: int = 8
    heads: int = 16
    head_width: int = 64
    mlp: int = 2048
    dropout: float = 0.1
    epochs: int = 100
    learning_rate: float = 1e-5
    held_out: float = 0.1
    history: dict[str, NDArray[np.float64]] = dataclasses.field(default_factory=dict, init=False, repr=False)

    n_neighbors: ClassVar[int] = 0

    @abstractmethod
    def network(self, n_genes: int, n_places: int) -> SectionNetwork:
        """Make the network."""

    def fit(
        self, sections: Sequence[Section], *, random_state: int, device: str, progress: bool
    ) -> list[NDArray[np.float32]]:
        """Learn; return predictions of the spots held back, NaN for the others, (n, g) a section.

        Raises
        ------
        ValueError
            Two sections of one name, or one without patches or expression; a loss that diverges.
        """
        shown, hidden = hold_back(sections, self.held_out, random_state)
        learning = [part(section, rows) for section, rows in zip(sections, shown, strict=True)]
        centring = SectionStandardizer.of(learning, with_features=False)
        xy = [section.xy - section.xy.min(axis=0) for section in learning]
        with seeded(random_state):
            n_places = int(np.concatenate(xy).max()) + 2
            self._network = self.network(centring.gene_mean.shape[1], n_places)
        pixels = [torch.from_numpy(patches_of(section)) for section in learning]
        self.history = self._train(pixels, xy, centring.deviations(learning), random_state, device, progress=progress)
        self._state: dict[str, NDArray[Any]] = {
            **centring.state(),
            **to_arrays(self._network),
            "look": np.concatenate([self._looks(seen) for seen in pixels]),
            "xy": np.concatenate([section.xy for section in learning]),
            "section": np.repeat(np.arange(len(sections)), centring.n_spots),
        }
        held_back = []
        for section, rows in zip(sections, hidden, strict=True):
            predicted = np.full(expression_of(section).shape, np.nan, dtype=np.float32)
            predicted[rows] = self.predict(part(section, rows))
            held_back.append(predicted)
        return held_back

    def predict(self, points: Section) -> NDArray[np.float32]:
        """Expression (m, g) at the points, each beside the fitted spots of its section.

        Raises
        ------
        ValueError
            No patches.
        """
        centring = SectionStandardizer.restore(self._state)
        section = centring.index(points.name)
        layers = self._layers(section)
        neighbors = self._neighbors(points.xy, section)
        at_once = max(1, min(256, LOGITS // (self.heads * len(layers[0]))))

        def beside(rows: slice) -> Tensor:
            seen = torch.from_numpy(patches_of(points, np.arange(len(points))[rows])).to(self._device)
            tokens = self._network.join(self._network.look(seen), *self._places(points.xy[rows], section))
            return self._network.beside(tokens, layers, neighbors[rows])

        deviations = in_batches(self._network, beside, len(points), at_once)
        return (deviations + centring.mean_of(points.name)).astype(np.float32)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Gene means, weights, and what the network sees at the fitted spots and where they are."""
        return dict(self._state)

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Take up what :meth:`state` gave."""
        self._state = dict(state)
        n_genes = SectionStandardizer.restore(self._state).gene_mean.shape[1]
        with seeded(0):  # the first weights are replaced, the global state is not to notice
            self._network = self.network(n_genes, len(state["net.place.x"]))
        from_arrays(self._network, state)
        self._network.to(pick_device(None))

    @property
    def _device(self) -> torch.device:
        return self._network.place.x.device

    def _train(
        self,
        pixels: Sequence[Tensor],
        xy: Sequence[NDArray[np.float64]],
        deviations: NDArray[np.float64],
        random_state: int,
        device: str,
        *,
        progress: bool,
    ) -> dict[str, NDArray[np.float64]]:
        where = pick_device(device)
        ends = np.cumsum([len(each) for each in xy])
        target = [torch.from_numpy(each) for each in np.split(deviations.astype(np.float32), ends[:-1])]
        neighbors = [torch.from_numpy(nearest(each, each, self.n_neighbors)) for each in xy]

        def loss(rows: Tensor) -> Tensor:
            (at,) = rows.tolist()  # one section a step
            here = torch.from_numpy(xy[at].astype(np.float32))
            predicted = self._network(*(each.to(where) for each in (pixels[at], here, neighbors[at])))
            return functional.mse_loss(predicted, target[at].to(where))

        schedule = Schedule(epochs=self.epochs, learning_rate=self.learning_rate, batch_size=1)
        every = np.arange(len(xy))
        label = type(self).__name__
        return train(
            self._network,
            loss,
            every,
            schedule,
            random_state=random_state,
            device=where,
            progress=progress,
            label=label,
        )

    def _looks(self, pixels: Tensor) -> NDArray[np.float32]:
        return in_batches(
            self._network, lambda rows: self._network.look(pixels[rows].to(self._device)), len(pixels), 256
        )

    def _places(self, xy: NDArray[np.float64], section: int) -> tuple[Tensor, Tensor]:
        """Embeddings of place (m, c) in a section; in one that was not fitted, the mean over all fitted spots."""
        spots, own = self._state["xy"], self._state["section"]
        if section >= 0:
            here = xy - spots[own == section].min(axis=0)
            x, y = self._network.place(torch.from_numpy(here.astype(np.float32)).to(self._device))
            return x, y
        known = [self._places(spots[own == each], each) for each in np.unique(own)]
        x, y = (torch.cat(axis).mean(dim=0).expand(len(xy), -1) for axis in zip(*known, strict=True))
        return x, y

    def _layers(self, section: int) -> list[Tensor]:
        """Layers of the fitted spots of a section; for one that was not fitted, those of all sections in one row."""
        own = self._state["section"]
        if section < 0:
            every = [self._layers(each) for each in np.unique(own)]
            return [torch.cat(layer) for layer in zip(*every, strict=True)]
        look = torch.from_numpy(self._state["look"][own == section]).to(self._device)
        self._network.eval()
        with torch.no_grad():
            place = self._places(self._state["xy"][own == section], section)
            return self._network.layers(self._network.join(look, *place))

    def _neighbors(self, xy: NDArray[np.float64], section: int) -> Tensor:
        """Rows (m, k) of the nearest fitted spots of the section; none in one that was not fitted."""
        spots = self._state["xy"][self._state["section"] == section]
        return torch.from_numpy(nearest(xy, spots, self.n_neighbors)).to(self._device)


@dataclass(kw_only=True)
class HisToGene(SectionRegression):
    """A transformer over all spots of a section, from patches of ``patch_um`` um, ``input_size`` px, and their places.

    ``depth`` blocks of ``heads`` heads, each ``head_width`` wide, on tokens of ``width``; ``held_out`` is the share of
    spots that is not learnt from.

    Examples
    --------
    >>> HisToGene(depth=4).heads
    16
    """

    width: int = 1024

    def network(self, n_genes: int, n_places: int) -> SectionNetwork:
        """Make the network."""
        return HisToGeneNetwork(self, n_genes, n_places)


def nearest(points: NDArray[np.float64], spots: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Rows (m, k) of the spots nearest to each point; all where there are fewer, and none where k is 0."""
    k = min(k, len(spots))
    if not k:
        return np.empty((len(points), 0), dtype=np.int64)
    _, rows = KDTree(spots).query(points, k=range(1, k + 1))
    return np.asarray(rows, dtype=np.int64)
