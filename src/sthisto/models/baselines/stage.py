"""STAGE: an autoencoder whose latent space is the plane of the tissue (Li et al. 2024, doi:10.1093/nar/gkae294).

It reads no image. The encoder E takes a spot's expression x to two numbers, which are held to the spot's coordinates c;
the decoder D takes them back. Once trained, D at any coordinates is the map:

    z = E(x),    loss = |D(z) - x|^2 + 0.1 |D(z) - x| + |z - c| + 0.1 SW(z, c),    prediction at c = D(c)

each term a mean over its entries. SW is the sliced Wasserstein distance: z and c seen along random directions of the
plane, sorted, and the distances of equal ranks averaged. E is genes-1000-500-50-10-2, D its mirror; Adam 1e-3, 2 000
epochs, all spots a step.

Choices where the description leaves one: leaky ReLU between layers and none after the last of E and D; coordinates run
from -1 to 1 along the section's longer side, the aspect kept; SW of order 1 along 50 directions, drawn anew every
epoch. Different from the authors: 15 % of the spots are held out, to learn how far predictions are off, and several
sections each have an autoencoder of their own, trained side by side (coordinates of two sections mean nothing to each
other).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from sthisto import _training
from sthisto.models._model import Section
from sthisto.models._standardize import expression_of, names_of, pack_names, unpack_names

WIDTHS = (1000, 500, 50, 10, 2)
CHUNK = 8192  # points predicted at once


class Autoencoder(nn.Module):
    """Expression to the plane and back."""

    def __init__(self, n_genes: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.encoder, self.decoder = _layers([n_genes, *widths]), _layers([*reversed(widths), n_genes])

    def forward(self, expression: Tensor) -> tuple[Tensor, Tensor]:
        """Latent (n, 2) and reconstruction (n, g) of expression (n, g)."""
        latent = self.encoder(expression)
        return latent, self.decoder(latent)


@dataclass(kw_only=True)
class Stage:
    """Autoencoder whose decoder draws the map from coordinates alone.

    ``widths`` are the layers of the encoder after the genes, the last of them the plane, hence 2; ``validation`` is the
    share of the spots held out.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> xy = rng.uniform(0, 8, (60, 2))
    >>> spots = Section(name="a", xy=xy, expression=rng.random((60, 3), dtype=np.float32))
    >>> model = Stage(epochs=2, widths=(8, 2))
    >>> held_back = model.fit([spots], random_state=0, device="cpu", progress=False)
    >>> model.predict(Section(name="a", xy=np.array([[1.5, 4], [2, 4]]))).shape
    (2, 3)
    """

    epochs: int = 2000
    learning_rate: float = 1e-3
    widths: Sequence[int] = WIDTHS
    n_directions: int = 50
    validation: float = 0.15
    history: dict[str, NDArray[np.float64]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.widths[-1] != 2:
            raise ValueError(f"widths are {tuple(self.widths)}: the last is the plane of the coordinates, hence 2")

    def fit(
        self, sections: Sequence[Section], *, random_state: int, device: str, progress: bool
    ) -> list[NDArray[np.float32]]:
        """Learn each section's map; return what is said of the spots held out, (n, g) a section, else NaN.

        Raises
        ------
        ValueError
            Two sections of one name, or one without expression.
        """
        self._device = _training.pick_device(device)
        expression = [expression_of(section) for section in sections]
        self._state: dict[str, NDArray[Any]] = {
            "section_names": pack_names(names_of(sections)),
            "low": np.array([section.xy.min(axis=0) for section in sections]),
            "high": np.array([section.xy.max(axis=0) for section in sections]),
            "n_genes": np.array([expression[0].shape[1]]),
        }
        self._build(random_state)
        halves = [_training.split(len(section), self.validation, random_state) for section in sections]
        places = [self._coordinates(section) for section in sections]
        self._train(places, expression, halves, random_state=random_state, progress=progress)
        self._state |= _training.to_arrays(self._networks)
        held_back = [np.full_like(each, np.nan) for each in expression]
        for s, (_, held_out) in enumerate(halves):
            held_back[s][held_out] = self._decode(s, places[s][held_out])
        return held_back

    def predict(self, points: Section) -> NDArray[np.float32]:
        """Expression (m, g) at the points.

        Raises
        ------
        ValueError
            The section of the points was not fitted.
        """
        return self._decode(self._index(points), self._coordinates(points))

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Weights of the networks, and the extent of each section."""
        return dict(self._state)

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Take up what :meth:`state` gave; the model has to have the params of the one that was fitted."""
        self._state, self._device = dict(state), torch.device("cpu")
        self._build(0)
        _training.from_arrays(self._networks, self._state)

    def _build(self, random_state: int) -> None:
        n_sections, n_genes = len(self._state["low"]), int(self._state["n_genes"][0])
        with _training.seeded(random_state):
            networks = nn.ModuleList(Autoencoder(n_genes, self.widths) for _ in range(n_sections))
        self._networks = networks.to(self._device)

    def _train(
        self,
        places: list[Tensor],
        expression: list[NDArray[np.float32]],
        halves: list[tuple[_training.Rows, _training.Rows]],
        *,
        random_state: int,
        progress: bool,
    ) -> None:
        truth = [torch.from_numpy(each).to(self._device) for each in expression]
        directions = _training.generator(random_state)

        def loss(rows: Tensor) -> Tensor:
            drawn = _directions(self.n_directions, directions).to(self._device)
            sections = [(self._networks[s], truth[s][halves[s][0]], places[s][halves[s][0]]) for s in rows.tolist()]
            return torch.stack([stage_loss(*section, drawn) for section in sections]).mean()

        def validation() -> float:
            off = [
                functional.mse_loss(self._map(s, places[s][held_out]), truth[s][held_out]).item()
                for s, (_, held_out) in enumerate(halves)
            ]
            return float(np.mean(off))

        self.history = _training.train(
            self._networks,
            loss,
            np.arange(len(places)),
            _training.Schedule(epochs=self.epochs, learning_rate=self.learning_rate),
            validation=validation,
            random_state=random_state,
            device=self._device,
            progress=progress,
            label="stage",
        )

    def _index(self, points: Section) -> int:
        names = unpack_names(self._state["section_names"])
        if points.name not in names:
            raise ValueError(
                f"stage reads coordinates alone, which mean nothing in a section that was not fitted: {points.name!r} "
                f"(fitted: {names}); use a model that reads the image, such as ridge or attention."
            )
        return names.index(points.name)

    def _coordinates(self, points: Section) -> Tensor:
        """Positions (m, 2), from -1 to 1 along the longer side of the fitted spots."""
        low, high = (self._state[key][self._index(points)] for key in ("low", "high"))
        half = (high - low).max() / 2 or 1.0
        return torch.from_numpy(((points.xy - (low + high) / 2) / half).astype(np.float32)).to(self._device)

    def _map(self, s: int, places: Tensor) -> Tensor:
        rebuilt: Tensor = self._networks.get_submodule(f"{s}.decoder")(places)
        return rebuilt

    def _decode(self, s: int, places: Tensor) -> NDArray[np.float32]:
        return _training.in_batches(self._networks, lambda rows: self._map(s, places[rows]), len(places), CHUNK)


def stage_loss(network: nn.Module, expression: Tensor, places: Tensor, directions: Tensor) -> Tensor:
    """Reconstruction of expression (n, g) and fit of its latent to the places (n, 2), weighed as in the paper."""
    latent, rebuilt = network(expression)
    reconstruction = functional.mse_loss(rebuilt, expression) + 0.1 * functional.l1_loss(rebuilt, expression)
    return reconstruction + functional.l1_loss(latent, places) + 0.1 * sliced_wasserstein(latent, places, directions)


def sliced_wasserstein(one: Tensor, other: Tensor, directions: Tensor) -> Tensor:
    """Mean over directions (k, 2) of the 1-Wasserstein distance between two clouds (n, 2) seen along them."""
    seen, wanted = ((cloud @ directions.T).sort(dim=0).values for cloud in (one, other))
    return (seen - wanted).abs().mean()


def _directions(n: int, order: torch.Generator) -> Tensor:
    """Random unit vectors (n, 2)."""
    angle = 2 * torch.pi * torch.rand(n, generator=order)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def _layers(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of these widths with leaky ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.LeakyReLU()]
    return nn.Sequential(*layers[:-1])
