r"""HisToSGE: multi-head attention over the look and the place of the spots around (arXiv 2407.20518).

A spot i has PILM features f_i (what the pathology image large model sees), mean color c_i and position p_i in spot
pitches. A feature map joins them to a token, one pre-norm transformer block lets it attend to its context N(i), and a
head gives its genes:

    t_i = W_f f_i + W_c c_i + W_p s(p_i)                                                                  feature map
    h_i = t_i + W_o [softmax_j(q_i k_j^T / sqrt(64)) v_j]_heads,  q, k, v from LN(t),  j in N(i) and i    attention
    u_i = h_i + W_2 gelu(W_1 LN(h_i))
    y_i = gene means of the section + W_4 LN(relu(W_3 u_i))                                               gene heads

The context is what was measured, by its look and place; expression never enters it. So a point is predicted alike
whichever other points are asked for, and spots that are held back take part by their look.

``variant="paper"`` differs from the authors' code in this:

- RGB map: the text has it, the code does not. The mean color of the patch is read where a section brings its pixels
  (``Section.patches``), as ``tl.fit`` has it do unless ``rgb=False``. Where it does not, there is no color to read but
  what the features hold; of an encoder that gives color (the hand-crafted one: mean red, green and blue) W_f f
  contains W_c c, both being linear.
- Positions are continuous: s(p) are sines and cosines of p from the middle of the section, wavelengths from 4 to 512
  pitches, in place of integers through embeddings, by which points between spots share their neighbor's code.
- N(i) are the nearest spots, not those beside it in the table.
- It stops early on spots held out at random and keeps the best weights, instead of 1 000 epochs come what may.
- Features are standardised and gene means taken per section, so that several sections can be learnt together. The
  output is the deviation from the mean and may be negative, so there is no final ReLU.
- For a few hundred spots: tokens are 256 wide whatever the encoder, the last layer starts from zero, so that training
  starts from the gene means, and there are dropout, weight decay and small steps (AdamW 1e-4).

``variant="scripts"`` is what the authors' scripts do, known faults included: t_i = f_i + E_x[x] + E_y[y], as wide as
the features, with 512-row embeddings of whole positions; sequences of about 50 spots in table order, one a step; final
ReLU on expression itself; Adam 1e-3, no decay, all epochs. What differs still:

- Features are standardised per section; they come from whichever encoder, so from RGB, where the scripts feed BGR.
- Positions are whole spot pitches from the section's corner: models do not know the array's rows and columns.
- New points join the sequence of their nearest spot one by one, where the scripts cut sequences among new points.
- A share of the spots is held out of the loss (not of the sequences), to learn how far predictions are off.

In both, the points of a section that was not fitted have no position code and no context but themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree
from torch import Tensor, nn
from torch.nn import functional

from sthisto import _training
from sthisto.models._model import Patches, Section
from sthisto.models._standardize import SectionStandardizer, expression_of, features_of
from sthisto.uncertainty import FeatureStatistics

N_CODES = 512  # rows of the scripts' embeddings; one more, of zeros, stands for no position
WAVELENGTHS = 2.0 ** np.arange(2, 10)  # pitches
CHUNK = 512  # points predicted at once
SHELL = 24  # more spots than lie equally far from a point of a lattice, so that ties at the edge of a context are seen

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
            self.place = nn.ModuleList(nn.Embedding(N_CODES + 1, width, padding_idx=N_CODES) for _ in "xy")
        else:
            self.look = nn.Linear(n_features, width)
            self.place = nn.ModuleList([nn.Linear(4 * len(WAVELENGTHS), width, bias=False)])
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
            # It begins with the gene means: from random weights it takes longer to get back there than to learn a few
            # hundred spots by heart.
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def tokens(self, look: Tensor, place: Tensor) -> Tensor:
        """Join features (n, d) and position codes, (n, 2) int64 or (n, 32), to tokens (n, w)."""
        if self.scripts:
            x, y = self.place
            return look + x(place[:, 0]) + y(place[:, 1])  # type: ignore[no-any-return]
        return self.look(self.dropout(look)) + self.place[0](place)  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor, spots: Tensor, context: Tensor, counts: Tensor) -> Tensor:
        """Expression (m, g) of tokens (m, w) that attend to themselves and to the rows ``context`` (m, k) of spots.

        ``spots`` (n, w) are tokens, too; of the context only those that ``counts`` (m, k) are attended to.
        """
        own, offered = self.before_attention(tokens), self.before_attention(spots)
        query = self.query(own).reshape(len(own), 1, self.heads, 64).transpose(1, 2)  # (m, heads, 1, 64)
        keys, values = (
            # embedding, not indexing: the gradient of the latter adds up in no fixed order on several threads
            torch.cat([give(own)[:, None], functional.embedding(context, give(offered))], dim=1)
            .reshape(len(own), 1 + context.shape[1], self.heads, 64)
            .transpose(1, 2)
            for give in (self.key, self.value)
        )  # (m, heads, 1 + k, 64)
        counts = functional.pad(counts, (1, 0), value=True)[:, None, None]  # (m, 1, 1, 1 + k)
        attended = functional.scaled_dot_product_attention(query, keys, values, attn_mask=counts).flatten(1)
        mixed = tokens + self.dropout(self.out(attended))
        mixed = mixed + self.dropout(self.mlp(self.before_mlp(mixed)))
        return self.head(mixed)  # type: ignore[no-any-return]


@dataclass(kw_only=True)
class HisToSGE:
    """Attention over the look and place of the measured spots around, from the paper or as in its scripts.

    ``n_context`` spots, the point itself included, make a sequence; ``heads`` of 64 attend. ``validation`` is the share
    of spots held out; ``learning_rate=None`` takes 1e-4, or the scripts' 1e-3. The paper's variant alone has ``rgb``,
    the mean color of a patch of ``patch_um`` beside the features (another variant sets it to False), ``width``,
    ``dropout``, ``weight_decay``, ``batch_size`` and ``patience``, the epochs without improvement before it stops
    (``None``: never).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> xy, look = rng.uniform(0, 8, (60, 2)), rng.normal(size=(60, 5)).astype(np.float32)
    >>> spots = Section(name="a", xy=xy, features=look, expression=look[:, :2] + 3)
    >>> model = HisToSGE(epochs=2)
    >>> held_back = model.fit([spots], random_state=0, device="cpu", progress=False)
    >>> model.predict(Section(name="a", xy=xy[:4], features=look[:4])).shape
    (4, 2)
    """

    variant: Literal["paper", "scripts"] = "paper"
    rgb: bool = True
    epochs: int = 1000
    learning_rate: float | None = None
    n_context: int = 50
    heads: int = 4
    hidden: int = 2048
    width: int = 256
    dropout: float = 0.3
    weight_decay: float = 0.1
    batch_size: int = 256
    patience: int | None = 20
    validation: float = 0.15
    patch_um: float = 55.0  # a Visium spot
    history: dict[str, NDArray[np.float64]] = field(default_factory=dict, init=False, repr=False)
    input_size: ClassVar[int] = 16  # pixels of the patch, whose mean is all that is read

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "scripts"):
            raise ValueError(f"variant is {self.variant!r}; there are 'paper' and 'scripts'")
        self.rgb = self.rgb and not self._scripts
        if self.n_context < 2:
            raise ValueError(f"n_context is {self.n_context}: attention needs a spot beside the point, so 2 or more")

    def fit(
        self, sections: Sequence[Section], *, random_state: int, device: str, progress: bool
    ) -> list[NDArray[np.float32]]:
        """Learn from all sections together; return what is said of the spots held out, (n, g) a section, else NaN.

        Raises
        ------
        ValueError
            Two sections of one name, one without features or expression, or some with pixels and others without.
        """
        chosen = _training.pick_device(device)
        sections = sections if self._scripts else _colored(sections)
        centring = SectionStandardizer.of(sections, with_features=True)
        section = np.repeat(np.arange(len(sections)), centring.n_spots)
        self._state: dict[str, NDArray[Any]] = {
            **centring.state(),
            "colored": np.array([not self._scripts and sections[0].patches is not None], dtype=np.uint8),
            "xy": np.concatenate([each.xy for each in sections]),
            "section": section,
            "sequence": _sequences(centring.n_spots, self.n_context),
            "origin": np.array([(each.xy.min if self._scripts else each.xy.mean)(axis=0) for each in sections]),
            "look": np.concatenate([centring.standardised(each) for each in sections]).astype(np.float32),
        }
        expression = np.concatenate([expression_of(each) for each in sections])
        base = np.zeros_like(expression) if self._scripts else centring.gene_mean[section].astype(np.float32)
        self._build(random_state, chosen)
        spots = self._tensors(self._state["xy"], section, self._state["look"], hide_self=True)
        held_out = self._train(spots, expression - base, random_state=random_state, progress=progress)
        self._state |= _training.to_arrays(self._network)
        held_back = np.full_like(expression, np.nan)
        held_back[held_out] = base[held_out] + self._output([each[held_out] for each in spots])
        return np.split(held_back, np.cumsum(centring.n_spots)[:-1])

    def predict(self, points: Section) -> NDArray[np.float32]:
        """Expression (m, g) at the points; of a section that was not fitted, from the look alone.

        Raises
        ------
        ValueError
            No features, or another number of them than in ``fit``; no pixels where ``fit`` had them.
        """
        centring = SectionStandardizer.restore(self._state)
        if self._state["colored"][0]:
            if points.patches is None:
                raise ValueError(f"the model was fitted with the spots' pixels; section {points.name!r} has no patches")
            points = _colored([points], centring)[0]
        base = 0 if self._scripts else centring.mean_of(points.name).astype(np.float32)
        predicted = np.empty((len(points), centring.gene_mean.shape[1]), dtype=np.float32)
        for rows, look in centring.chunks(points):
            section = np.full(len(look), centring.index(points.name))
            predicted[rows] = base + self._output(self._tensors(points.xy[rows], section, look.astype(np.float32)))
        return predicted

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Weights of the network, and the look and place of the spots that are attended to."""
        return dict(self._state)

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Take up what :meth:`state` gave; the model has to have the params of the one that was fitted."""
        self._state = dict(state)
        self._build(0, torch.device("cpu"))
        _training.from_arrays(self._network, self._state)

    @property
    def _scripts(self) -> bool:
        return self.variant == "scripts"

    def _build(self, random_state: int, device: torch.device) -> None:
        """Make the network for the sizes in the state, with its first weights, and keep the spots on the device."""
        n_features, n_genes = (self._state[key].shape[1] for key in ("look", "gene_mean"))
        sizes = {"width": self.width, "heads": self.heads, "hidden": self.hidden}
        with _training.seeded(random_state):
            network = Network(
                n_features, n_genes, scripts=self._scripts, dropout=0.0 if self._scripts else self.dropout, **sizes
            )
        place = self._place(self._state["xy"], self._state["section"])
        self._device, self._network = device, network.to(device)
        self._spots = [torch.from_numpy(each).to(device) for each in (self._state["look"], place)]

    def _train(self, spots: list[Tensor], target: Floats, *, random_state: int, progress: bool) -> NDArray[np.intp]:
        """Train on all spots but a share, whose rows it gives."""
        learnt, held_out = _training.split(len(target), self.validation, random_state)
        truth = torch.from_numpy(target).to(self._device)
        sequence = torch.from_numpy(self._state["sequence"][learnt])

        def loss(rows: Tensor) -> Tensor:
            return functional.mse_loss(self._forward([each[rows] for each in spots]), truth[rows])

        def loss_of_sequences(rows: Tensor) -> Tensor:
            return loss(torch.from_numpy(learnt)[torch.isin(sequence, rows)])

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
            np.unique(sequence) if self._scripts else learnt,
            schedule,
            validation=lambda: _training.mean_loss(loss, held_out, CHUNK),
            random_state=random_state,
            device=self._device,
            progress=progress,
            label="histosge",
        )
        return held_out

    def _tensors(
        self, xy: NDArray[np.float64], section: NDArray[np.intp], look: Floats, *, hide_self: bool = False
    ) -> list[Tensor]:
        """Look, position code, context of points and which of it counts, as the network takes them."""
        context = self._context(xy, section, hide_self=hide_self)
        return [torch.from_numpy(each).to(self._device) for each in (look, self._place(xy, section), *context)]

    def _forward(self, points: list[Tensor]) -> Tensor:
        """Output (m, g) of the network; only the spots that some point attends to become tokens."""
        look, place, context, counts = points
        needed, context = torch.unique(context, return_inverse=True)
        offered = self._network.tokens(*(each[needed] for each in self._spots))
        output: Tensor = self._network(self._network.tokens(look, place), offered, context, counts)
        return output

    def _output(self, points: list[Tensor]) -> Floats:
        return _training.in_batches(
            self._network, lambda rows: self._forward([each[rows] for each in points]), len(points[0]), CHUNK
        )

    def _place(self, xy: NDArray[np.float64], section: NDArray[np.intp]) -> NDArray[Any]:
        """Position codes: sines and cosines (m, 32), or whole pitches (m, 2); none for a section never fitted."""
        fitted = (section >= 0)[:, None]
        away = xy - self._state["origin"][section]
        if self._scripts:
            return np.where(fitted, away.round().clip(0, N_CODES - 1), N_CODES).astype(np.int64)
        angle = 2 * np.pi * away[:, :, None] / WAVELENGTHS  # (m, 2, 8)
        codes = np.concatenate([np.sin(angle), np.cos(angle)], axis=2).reshape(len(xy), 4 * len(WAVELENGTHS))
        return np.where(fitted, codes, 0).astype(np.float32)

    def _context(
        self, xy: NDArray[np.float64], section: NDArray[np.intp], *, hide_self: bool = False
    ) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Rows (m, k) of the fitted spots that each point attends to, and which of them count.

        With ``hide_self`` the points are the fitted spots, in order: each is its own token, not its context, too.
        """
        fitted, sequence = self._state["section"], self._state["sequence"]
        width = 1 if self._scripts else self.n_context - 1 + hide_self
        context, counts = np.zeros((len(xy), width), dtype=np.intp), np.zeros((len(xy), width), dtype=bool)
        for s in range(len(self._state["origin"])):
            rows, own = np.flatnonzero(section == s), np.flatnonzero(fitted == s)
            distance, near = _nearest(self._state["xy"][own], xy[rows], width)
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

    On a lattice many spots are equally far away. The first in the table are taken, lest rounding decide: a point and
    the spot that it lies on should attend to the same spots.
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
