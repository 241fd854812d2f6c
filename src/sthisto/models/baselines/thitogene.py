"""THItoGene: dynamic convolution, capsules, a transformer and a graph of spots (Jia et al. 2024, Brief. Bioinform.).

A patch of 112 px (about 77 um) goes through

1. omni-dimensional dynamic convolution (Li et al. 2022, ICLR), 3 to 16 channels, kernel and stride 4: four kernels,
   mixed and scaled for each patch by attentions of its mean color m, over kernels, filters, channels and positions:

       W(m) = sum_i a_i(m) f(m) c(m) s(m) W_i,    a: softmax, the others: sigmoid

2. an Efficient-CapsNet (Mazzia et al. 2021, Sci. Rep.): convolutions, 16 primary capsules of 8, and 20 capsules of 64
   by self-attention routing. With the votes u_ij of primary capsule i for capsule j,

       c_ij = softmax_j(sum_k u_ij . u_kj / sqrt(64)),    v_j = squash(sum_i (c_ij + b_ij) u_ij)
       squash(s) = (1 - exp(-|s|)) s / |s|

3. the capsules, joined with embeddings of x and y (64 each), are a token of a transformer over the section: 4 blocks,
   16 heads of 64, MLP 2048
4. graph attention (Velickovic et al. 2018, ICLR) of 8 heads of 64 over the nearest spots N and the spot itself:

       a_ij = softmax_j(LeakyReLU(p . W h_i + q . W h_j)),  j in N(i) and i,    g_i = ELU(sum_j a_ij W h_j)

5. LayerNorm and a linear layer to the genes

by mean squared error and Adam, rate 1e-5, 300 epochs, a section a step.

Differences from the authors' code
- Those of HisToGene: points attend to the fitted spots, whose encodings are kept, and nothing depends on which other
  points are predicted; continuous positions; gene means; a tenth held out. In the graph, too, a point attends to its 5
  nearest fitted spots and itself, and nothing attends to points; one in a section that was not fitted attends to itself
  alone. A spot is the first of its own 5, in training as in prediction: the map is continuous, and four others are
  left.
- Convolutions are followed by group normalisation, not batch normalisation: a patch does not depend on the batch.
- The convolutions before the capsules are two (32 and 128 channels); the paper leaves them open.
- The attentions of the dynamic convolution have no temperature.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sthisto.models._model import Count
from sthisto.models.baselines.histogene import PositionEmbedding, SectionNetwork, SectionRegression, blocks


class DynamicConvolution(nn.Module):
    """Omni-dimensional dynamic convolution, without padding; the stride is the kernel's side."""

    def __init__(self, n_in: int, n_out: int, side: int, n_kernels: int = 4, squeezed: int = 16) -> None:
        super().__init__()
        self.side = side
        self.kernels = nn.Parameter(torch.randn(n_kernels, n_out, n_in, side**2) * (2 / (n_in * side**2)) ** 0.5)
        self.squeeze = nn.Sequential(nn.Linear(n_in, squeezed), nn.ReLU())
        self.of_kernel = nn.Linear(squeezed, n_kernels)
        self.of_filter = nn.Linear(squeezed, n_out)
        self.of_channel = nn.Linear(squeezed, n_in)
        self.of_position = nn.Linear(squeezed, side**2)

    def kernel(self, images: Tensor) -> Tensor:
        """Mix the kernels for each image (b, n_in, h, w): (b, n_out, n_in, side * side)."""
        mean = self.squeeze(images.mean(dim=(2, 3)))
        mixed: Tensor = torch.einsum("bk,koip->boip", self.of_kernel(mean).softmax(dim=1), self.kernels)
        filters, channels, positions = (
            attention(mean).sigmoid() for attention in (self.of_filter, self.of_channel, self.of_position)
        )
        scaled: Tensor = mixed * filters[:, :, None, None] * channels[:, None, :, None] * positions[:, None, None, :]
        return scaled

    def forward(self, images: Tensor) -> Tensor:
        """Images (b, n_in, h, w) to (b, n_out, h / side, w / side)."""
        windows = functional.unfold(images, self.side, stride=self.side)  # (b, n_in * side * side, l)
        convolved = self.kernel(images).flatten(2) @ windows  # (b, n_out, l)
        return convolved.reshape(*convolved.shape[:2], images.shape[2] // self.side, -1)


class Capsules(nn.Module):
    """Self-attention routing from primary capsules to capsules."""

    def __init__(self, n_in: int, width_in: int, n_out: int, width_out: int) -> None:
        super().__init__()
        self.votes = nn.Parameter(torch.randn(n_in, n_out, width_in, width_out) * width_in**-0.5)
        self.prior = nn.Parameter(torch.zeros(n_in, n_out))

    def forward(self, primary: Tensor) -> Tensor:
        """Primary capsules (b, i, p) to capsules (b, j, q)."""
        votes = torch.einsum("bip,ijpq->bijq", primary, self.votes)
        # The sum over k is taken first: the agreement of each vote with all others, without all pairs.
        agreement = (votes * votes.sum(dim=1, keepdim=True)).sum(dim=-1) / votes.shape[-1] ** 0.5  # (b, i, j)
        coupling = agreement.softmax(dim=2) + self.prior
        return squash((coupling[..., None] * votes).sum(dim=1))


def squash(capsules: Tensor) -> Tensor:
    """Capsules (..., q) of the same direction, with lengths below 1."""
    length = torch.linalg.vector_norm(capsules, dim=-1, keepdim=True)
    shorter: Tensor = (1 - torch.exp(-length)) * capsules / length.clamp(min=1e-12)
    return shorter


class GraphAttention(nn.Module):
    """Attention of each node to its neighbors and itself, heads side by side."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.weight = nn.Linear(width, heads * head_width, bias=False)
        self.own, self.other = (nn.Parameter(torch.randn(heads, head_width) * head_width**-0.5) for _ in range(2))

    def forward(self, nodes: Tensor, around: Tensor) -> Tensor:
        """Nodes (n, c) and their neighbors (n, k, c) to (n, heads * head width)."""
        attended = self.weight(torch.cat([nodes[:, None], around], dim=1)).unflatten(
            2, (self.heads, -1)
        )  # (n, 1 + k, h, d)
        logits = (attended[:, :1] * self.own).sum(dim=-1) + (attended * self.other).sum(dim=-1)  # (n, 1 + k, h)
        share = functional.leaky_relu(logits, 0.2).softmax(dim=1)
        return functional.elu((share[..., None] * attended).sum(dim=1).flatten(1))


class THItoGeneNetwork(SectionNetwork):
    """All five steps."""

    def __init__(self, sizes: "THItoGene", n_genes: int, n_positions: int) -> None:
        super().__init__()
        width = (sizes.capsules + 2) * sizes.capsule_width
        side = (sizes.input_size // 4 - 1) // 2 - 2  # what the convolutions leave of the patch
        if side < 1:
            raise ValueError(f"input_size is {sizes.input_size} px; the convolutions of thitogene need 28 or more")
        self.convolutions = nn.Sequential(
            DynamicConvolution(3, 16, 4),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, bias=False),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
            nn.Conv2d(32, 128, 3, bias=False),
            nn.GroupNorm(8, 128),
            nn.ReLU(),
            nn.Conv2d(128, 128, side, groups=128),
            nn.Flatten(),
            nn.Unflatten(1, (16, 8)),
        )
        self.route = Capsules(16, 8, sizes.capsules, sizes.capsule_width)
        self.position = PositionEmbedding(n_positions, sizes.capsule_width)
        self.blocks = blocks(sizes, width)
        self.graph = GraphAttention(width, sizes.graph_heads, sizes.capsule_width)
        graph_width = sizes.graph_heads * sizes.capsule_width
        self.out = nn.Sequential(nn.LayerNorm(graph_width), nn.Linear(graph_width, n_genes))

    def encode(self, patches: Tensor) -> Tensor:
        """Encode patches by their capsules."""
        capsules: Tensor = self.route(squash(self.convolutions((patches / 255).permute(0, 3, 1, 2))))
        return capsules.flatten(1)

    def join(self, encoded: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Concatenate all three."""
        return torch.cat([encoded, x, y], dim=1)

    def head(self, tokens: Tensor, around: Tensor) -> Tensor:
        """Read the tokens and their neighbors."""
        deviations: Tensor = self.out(self.graph(tokens, around))
        return deviations


@dataclass(kw_only=True)
class THItoGene(SectionRegression):
    """Capsules, a transformer over all spots of a section and a graph.

    Parameters
    ----------
    patch_um, input_size, depth, heads, head_width, mlp, dropout, epochs, learning_rate, validation_fraction
        As of :class:`~sthisto.models.baselines.histogene.HisToGene`.
    capsules, capsule_width
        Capsules that encode a patch, and their width.
    graph_heads
        Heads of the graph attention, each as wide as a capsule.

    Examples
    --------
    >>> THItoGene().epochs
    300
    """

    capsules: Count = 20
    capsule_width: Count = 64
    depth: Count = 4
    graph_heads: Count = 8
    epochs: Count = 300

    n_neighbors: ClassVar[int] = 5  # 4, and the spot itself

    def network(self, n_genes: int, n_positions: int) -> SectionNetwork:
        """Make the network."""
        return THItoGeneNetwork(self, n_genes, n_positions)
