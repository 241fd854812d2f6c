r"""HisToSGE: multi-head attention over the image features and positions of the spots around (arXiv 2407.20518).

A spot i has PILM features f_i (of the pathology image large model), mean color c_i and position p_i in spot pitches. A
feature map joins them to a token, one pre-norm transformer block lets it attend to its context N(i), and a head
predicts its genes:

    t_i = W_f f_i + W_c c_i + W_p s(p_i)                                                                  feature map
    h_i = t_i + W_o [softmax_j(q_i k_j^T / sqrt(64)) v_j]_heads,  q, k, v from LN(t),  j in N(i) and i    attention
    u_i = h_i + W_2 gelu(W_1 LN(h_i))
    y_i = gene means of the section + W_4 LN(relu(W_3 u_i))                                               gene heads

The context is the image features and positions of measured spots; expression never enters it. So the prediction of a
point does not depend on the other points, and held-out spots take part by their features.

``variant="paper"`` differs from the authors' code in this:

- RGB map: the text has it, the code does not. The mean color of the patch is read where a section brings its pixels
  (``Section.patches``), as ``tl.fit`` has it do unless ``rgb=False``. Where it does not, there is no color to read but
  what the features hold; of an encoder that gives color (the hand-crafted one: mean red, green and blue) W_f f
  contains W_c c, both being linear.
- Positions are continuous: s(p) are sines and cosines of p from the middle of the section, wavelengths from 4 to 512
  pitches, in place of integers through embeddings, by which points between spots share their neighbor's code.
- N(i) are the nearest spots, not the next ones in the table.
- It stops early on spots held out at random and keeps the best weights, instead of 1 000 epochs in any case.
- Features are standardized and gene means taken per section, so that several sections can be fitted together. The
  output is the deviation from the mean and may be negative, so there is no final ReLU.
- For a few hundred spots: tokens are 256 wide whatever the encoder, the last layer starts from zero, so that training
  starts from the gene means, and there are dropout, weight decay and small steps (AdamW 1e-4).

``variant="scripts"`` is what the authors' scripts do, known faults included: t_i = f_i + E_x[x] + E_y[y], as wide as
the features, with 512-row embeddings of whole positions; sequences of about 50 spots in table order, one a step; final
ReLU on expression itself; Adam 1e-3, no decay, all epochs. What differs still:

- Features are standardized per section; they come from whichever encoder, so from RGB, where the scripts feed BGR.
- Positions are whole spot pitches from the section's corner: models do not know the array's rows and columns.
- New points join the sequence of their nearest spot one by one, where the scripts cut sequences among new points.
- A fraction of the spots is held out of the loss (not of the sequences), to calibrate the uncertainty with.

In both, the points of a section that was not fitted have no position code and no context but themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree
from torch import Tensor, nn
from torch.nn import functional

from sthisto import _training
from sthisto._statistics import FeatureStatistics
from sthisto.models._model import (
    Count,
    Fraction,
    HeldOut,
    NonNegative,
    Patches,
    Positive,
    Section,
    Share,
    State,
)
from sthisto.models._network import NetworkModel
from sthisto.models._standardize import STATE, SectionStandardizer, expression_of, features_of

N_CODES = 512  # rows of the scripts' embeddings; one more, of zeros, stands for no position
WAVELENGTHS = 2.0 ** np.arange(2, 10)  # pitches
CHUNK = 512  # points predicted at once
SHELL = 24  # more spots than are equally far from a point of a lattice, so that ties at the edge of a context are found

Floats = NDArray[np.float32]


class Network(nn.Module):
    """Feature map, one attention block and the gene heads."""

    def __init__(
        self, n_features: int, n_genes: int, *, scripts: bool, width: int, heads: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.scripts, self.heads = scripts, heads
        width = n_features if scripts else width
        if scripts:
            self.position = nn.ModuleList(nn.Embedding(N_CODES + 1, width, padding_idx=N_CODES) for _ in "xy")
        else:
            self.features = nn.Linear(n_features, width)
            self.position = nn.ModuleList([nn.Linear(4 * len(WAVELENGTHS), width, bias=False)])
        inner = 64 * heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.dropout = nn.Dropout(dropout)
        last = nn.Linear(hidden, n_genes)
        self.head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.LayerNorm(hidden), last)
        if scripts:
            self.head.append(nn.ReLU())
        else:
            # It starts from the gene means: from random weights it takes longer to return there than to memorize a few
            # hundred spots.
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def tokens(self, features: Tensor, codes: Tensor) -> Tensor:
        """Join features (n, d) and position codes, (n, 2) int64 or (n, 32), to tokens (n, w)."""
        if self.scripts:
            x, y = self.position
            return features + x(codes[:, 0]) + y(codes[:, 1])  # type: ignore[no-any-return]
        return self.features(self.dropout(features)) + self.position[0](codes)  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor, spots: Tensor, context: Tensor, counts: Tensor) -> Tensor:
        """Expression (m, g) of tokens (m, w) that attend to themselves and to the rows ``context`` (m, k) of spots.

        ``spots`` (n, w) are tokens, too; of the context only those that ``counts`` (m, k) are attended to.
        """
        own, offered = self.before_attention(tokens), self.before_attention(spots)
        query = self.query(own).reshape(len(own), 1, self.heads, 64).transpose(1, 2)  # (m, heads, 1, 64)
        keys, values = (
            # embedding, not indexing: the gradient of the latter adds up in no fixed order on several threads
            torch.cat([project(own)[:, None], functional.embedding(context, project(offered))], dim=1)
            .reshape(len(own), 1 + context.shape[1], self.heads, 64)
            .transpose(1, 2)
            for project in (self.key, self.value)
        )  # (m, heads, 1 + k, 64)
        counts = functional.pad(counts, (1, 0), value=True)[:, None, None]  # (m, 1, 1, 1 + k)
        attended = functional.scaled_dot_product_attention(query, keys, values, attn_mask=counts).flatten(1)
        mixed = tokens + self.dropout(self.out(attended))
        mixed = mixed + self.dropout(self.mlp(self.before_mlp(mixed)))
        return self.head(mixed)  # type: ignore[no-any-return]


@dataclass(kw_only=True)
class HisToSGE(NetworkModel):
    """Attention over image features and positions of the measured spots around, from the paper or as in its scripts.

    Parameters
    ----------
    variant
        "paper" or "scripts".
    rgb
        Read the mean color of a patch of ``patch_um``, too; always False for "scripts".
    epochs
        Of the training.
    learning_rate
        ``None`` takes 1e-4, or the scripts' 1e-3.
    n_context
        Spots of a sequence, the point itself included.
    heads, hidden
        Attention heads of 64, and the width of the gene heads.
    width, dropout, weight_decay, batch_size, patience
        Of the paper's variant: width of the tokens, regularization, spots of a step, and epochs without improvement
        after which training stops (``None``: never).
    validation_fraction
        Fraction of the spots held out of training.
    patch_um
        Side of the patch in micrometers; a Visium spot by default.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> xy, features = rng.uniform(0, 8, (60, 2)), rng.normal(size=(60, 5)).astype(np.float32)
    >>> spots = Section(name="a", xy=xy, features=features, expression=features[:, :2] + 3)
    >>> model = HisToSGE(epochs=2)
    >>> held_out = model.fit([spots], device="cpu")
    >>> model.predict(Section(name="a", xy=xy[:4], features=features[:4])).shape
    (4, 2)
    """

    variant: Literal["paper", "scripts"] = "paper"
    rgb: bool = True
    epochs: Count = 1000
    learning_rate: NonNegative | None = None
    n_context: Count = 50
    heads: Count = 4
    hidden: Count = 2048
    width: Count = 256
    dropout: Share = 0.3
    weight_decay: NonNegative = 0.1
    batch_size: Count = 256
    patience: Count | None = 20
    validation_fraction: Fraction = 0.15
    patch_um: Positive = 55.0

    state_names = (*STATE, "colored", "xy", "section", "sequence", "origin", "features")
    input_size: ClassVar[int] = 16  # pixels of the patch, whose mean is all that is read

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rgb = self.rgb and not self._scripts
        if self.n_context < 2:
            raise ValueError(f"n_context is {self.n_context}: attention needs a spot besides the point, so 2 or more")

    def _fit(
        self, sections: Sequence[Section], *, random_state: int, device: str | None, progress: bool
    ) -> tuple[State, HeldOut]:
        sections = sections if self._scripts else _colored(sections)
        standardizer = SectionStandardizer.of(sections, with_features=True)
        section = np.repeat(np.arange(len(sections)), standardizer.n_spots)
        state: State = {
            **standardizer.state(),
            "colored": np.array([not self._scripts and sections[0].patches is not None], dtype=np.uint8),
            "xy": np.concatenate([each.xy for each in sections]),
            "section": section,
            "sequence": _sequences(standardizer.n_spots, self.n_context),
            "origin": np.array([(each.xy.min if self._scripts else each.xy.mean)(axis=0) for each in sections]),
            "features": np.concatenate([standardizer.standardized(each) for each in sections]).astype(np.float32),
        }
        expression = np.concatenate([expression_of(each) for each in sections])
        mean = np.zeros_like(expression) if self._scripts else standardizer.gene_mean[section].astype(np.float32)
        self._build(state, random_state, device)
        spots = self._tensors(state["xy"], section, state["features"], hide_self=True)
        rows = self._train(spots, expression - mean, random_state=random_state, progress=progress)
        held_out = np.full_like(expression, np.nan)
        held_out[rows] = mean[rows] + self._output([each[rows] for each in spots])
        by_section = np.split(held_out, np.cumsum(standardizer.n_spots)[:-1])
        return {**state, **_training.to_arrays(self._network)}, by_section

    def _predict(self, points: Section, state: State) -> NDArray[np.float32]:
        standardizer = SectionStandardizer.restore(state)
        if state["colored"][0]:
            if points.patches is None:
                raise ValueError(f"the model was fitted with the spots' pixels; section {points.name!r} has no patches")
            points = _colored([points], standardizer)[0]
        mean = 0 if self._scripts else standardizer.mean_of(points.name).astype(np.float32)
        predicted = np.empty((len(points), standardizer.gene_mean.shape[1]), dtype=np.float32)
        for rows, features in standardizer.chunks(points):
            section = np.full(len(features), standardizer.index(points.name))
            tensors = self._tensors(points.xy[rows], section, features.astype(np.float32))
            predicted[rows] = mean + self._output(tensors)
        return predicted

    @property
    def _scripts(self) -> bool:
        return self.variant == "scripts"

    def _make_network(self, state: State, *, restored: bool) -> nn.Module:
        n_features, n_genes = (state[name].shape[1] for name in ("features", "gene_mean"))
        dropout = 0.0 if self._scripts else self.dropout
        sizes = {"width": self.width, "heads": self.heads, "hidden": self.hidden}
        return Network(n_features, n_genes, scripts=self._scripts, dropout=dropout, **sizes)

    def _build(self, state: State, random_state: int, device: str | None, *, restored: bool = False) -> None:
        super()._build(state, random_state, device, restored=restored)
        codes = self._position_codes(state["xy"], state["section"])
        self._spots = [torch.from_numpy(each).to(self._device) for each in (state["features"], codes)]

    def _train(self, spots: list[Tensor], target: Floats, *, random_state: int, progress: bool) -> NDArray[np.intp]:
        """Train on all spots but a fraction, whose rows are returned."""
        training, held_out = _training.split(len(target), self.validation_fraction, random_state)
        truth = torch.from_numpy(target).to(self._device)
        sequence = torch.from_numpy(self.arrays["sequence"][training])

        def loss(rows: Tensor) -> Tensor:
            return functional.mse_loss(self._forward([each[rows] for each in spots]), truth[rows])

        def loss_of_sequences(rows: Tensor) -> Tensor:
            return loss(torch.from_numpy(training)[torch.isin(sequence, rows)])

        recipe: dict[str, Any] = {"optimizer": "adamw", "weight_decay": self.weight_decay, "patience": self.patience}
        schedule = _training.Schedule(
            epochs=self.epochs,
            learning_rate=self.learning_rate or (1e-3 if self._scripts else 1e-4),
            batch_size=1 if self._scripts else self.batch_size,
            **({} if self._scripts else recipe),
        )
        self.history = _training.train(
            self._network,
            loss_of_sequences if self._scripts else loss,
            np.unique(sequence) if self._scripts else training,
            schedule,
            validation=lambda: _training.mean_loss(loss, held_out, CHUNK),
            random_state=random_state,
            device=self._device,
            progress=progress,
            label="histosge",
        )
        return held_out

    def _tensors(
        self, xy: NDArray[np.float64], section: NDArray[np.intp], features: Floats, *, hide_self: bool = False
    ) -> list[Tensor]:
        """Features, position code, context of points and which of it counts, as the network takes them."""
        context = self._context(xy, section, hide_self=hide_self)
        return [
            torch.from_numpy(each).to(self._device) for each in (features, self._position_codes(xy, section), *context)
        ]

    def _forward(self, points: list[Tensor]) -> Tensor:
        """Output (m, g) of the network; only the spots that some point attends to become tokens."""
        features, codes, context, counts = points
        network = cast("Network", self._network)
        needed, context = torch.unique(context, return_inverse=True)
        offered = network.tokens(*(each[needed] for each in self._spots))
        output: Tensor = network(network.tokens(features, codes), offered, context, counts)
        return output

    def _output(self, points: list[Tensor]) -> Floats:
        return _training.in_batches(
            self._network, lambda rows: self._forward([each[rows] for each in points]), len(points[0]), CHUNK
        )

    def _position_codes(self, xy: NDArray[np.float64], section: NDArray[np.intp]) -> NDArray[Any]:
        """Position codes: sines and cosines (m, 32), or whole pitches (m, 2); none for an unfitted section."""
        fitted = (section >= 0)[:, None]
        away = xy - self.arrays["origin"][section]
        if self._scripts:
            return np.where(fitted, away.round().clip(0, N_CODES - 1), N_CODES).astype(np.int64)
        angle = 2 * np.pi * away[:, :, None] / WAVELENGTHS  # (m, 2, 8)
        codes = np.concatenate([np.sin(angle), np.cos(angle)], axis=2).reshape(len(xy), 4 * len(WAVELENGTHS))
        return np.where(fitted, codes, 0).astype(np.float32)

    def _context(
        self, xy: NDArray[np.float64], section: NDArray[np.intp], *, hide_self: bool = False
    ) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Rows (m, k) of the fitted spots that each point attends to, and which of them count.

        With ``hide_self`` the points are the fitted spots, in order: each is its own token and not part of its context.
        """
        fitted, sequence = self.arrays["section"], self.arrays["sequence"]
        width = 1 if self._scripts else self.n_context - 1 + hide_self
        context, counts = np.zeros((len(xy), width), dtype=np.intp), np.zeros((len(xy), width), dtype=bool)
        for s in range(len(self.arrays["origin"])):
            rows, own = np.flatnonzero(section == s), np.flatnonzero(fitted == s)
            distance, near = _nearest(self.arrays["xy"][own], xy[rows], width)
            counts[rows] = np.isfinite(distance)
            context[rows] = own[np.where(counts[rows], near, 0)]
        if self._scripts:
            length = np.bincount(sequence)
            joined = sequence[np.arange(len(xy)) if hide_self else context[:, 0]]
            members = np.arange(length.max())
            counts = counts & (members < length[joined, None])
            context = np.where(counts, (length.cumsum() - length)[joined, None] + members, 0)
        if hide_self:
            counts &= context != np.arange(len(xy))[:, None]
        return context, counts


def _nearest(
    spots: NDArray[np.float64], points: NDArray[np.float64], k: int
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Distances (m, k) and rows (m, k) of the nearest spots; infinite distance where there are fewer.

    On a lattice many spots are equally far away. The first in the table are taken, so that rounding does not decide: a
    point on a spot should attend to the same spots as that spot.
    """
    distance, near = KDTree(spots).query(points, k=range(1, k + SHELL + 1))
    order = np.lexsort((near, distance.round(4)))[:, :k]
    return np.take_along_axis(distance, order, axis=1), np.take_along_axis(near, order, axis=1)


def _sequences(n_spots: NDArray[np.int64], length: int) -> NDArray[np.intp]:
    """Cut the sections in table order into sequences of about ``length`` spots; give the number (n,) of each spot's."""
    parts = np.maximum(1, np.round(n_spots / length)).astype(int)
    first = np.cumsum(parts) - parts
    cuts = [start + np.arange(n) * k // n for start, n, k in zip(first, n_spots, parts, strict=True)]
    return np.concatenate(cuts).astype(np.intp)


def _colored(sections: Sequence[Section], fitted: SectionStandardizer | None = None) -> list[Section]:
    """Append the mean color of each patch to the features, where sections bring their pixels.

    Colors of a section that was not fitted are standardized by the mean statistics of the fitted ones: its own spots'
    colors are not known.
    """
    with_pixels = [section.name for section in sections if section.patches is not None]
    if with_pixels and len(with_pixels) < len(sections):
        raise ValueError(f"of {len(sections)} sections only {with_pixels} bring pixels (patches); give all or none")
    return [
        section
        if section.patches is None
        else replace(
            section,
            features=_with_colors(section, section.patches),
            feature_statistics=_color_statistics(section.feature_statistics, fitted),
        )
        for section in sections
    ]


def _color_statistics(given: FeatureStatistics | None, fitted: SectionStandardizer | None) -> FeatureStatistics | None:
    if given is None or fitted is None:
        return None
    mean, inverse_std = (table[:, -3:].mean(axis=0) for table in (fitted.feature_mean, fitted.feature_scale))
    return FeatureStatistics(np.append(given.mean, mean), np.append(given.inverse_std, inverse_std))


def _with_colors(section: Section, patches: Patches) -> Floats:
    """Features (n, d + 3), mean red, green and blue of the patches last."""
    colors = np.empty((len(section), 3), dtype=np.float32)
    for start in range(0, len(section), CHUNK):
        rows = np.arange(len(section))[start : start + CHUNK]
        colors[rows] = patches(rows).mean(axis=(1, 2))
    return np.concatenate([features_of(section), colors], axis=1)
