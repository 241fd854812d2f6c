"""STAGE: an autoencoder whose latent space is the plane of the tissue (Li et al. 2024, doi:10.1093/nar/gkae294).

It reads no image. The encoder E maps a spot's expression x to two numbers, which are held to the spot's coordinates c;
the decoder D maps them back. Once trained, D at any coordinates is the map:

    z = E(x),    loss = |D(z) - x|^2 + 0.1 |D(z) - x| + |z - c| + 0.1 SW(z, c),    prediction at c = D(c)

each term a mean over its entries. SW is the sliced Wasserstein distance: z and c projected on random directions of the
plane, sorted, and the distances of equal ranks averaged. E is genes-1000-500-50-10-2, D its mirror; Adam 1e-3, 2 000
epochs, all spots a step.

Choices where the description leaves one: leaky ReLU between layers and none after the last of E and D; coordinates run
from -1 to 1 along the section's longer side, the aspect kept; SW of order 1 along 50 directions, drawn for every epoch.
Different from the authors: 15 % of the spots are held out, to calibrate the uncertainty with, and several sections each
have an autoencoder of their own, trained together (coordinates of two sections are not comparable).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from sthisto import _training
from sthisto.models._model import Count, Fraction, HeldOut, NonNegative, Section, State
from sthisto.models._network import NetworkModel
from sthisto.models._standardize import expression_of, pack_names, unpack_names

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
class Stage(NetworkModel):
    """Autoencoder whose decoder predicts the map from coordinates alone.

    Parameters
    ----------
    epochs, learning_rate
        Of the training.
    widths
        Layers of the encoder after the genes; the last is the plane of the coordinates, hence 2.
    n_directions
        Random directions of the sliced Wasserstein distance.
    validation_fraction
        Fraction of the spots held out of training.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> xy = rng.uniform(0, 8, (60, 2))
    >>> spots = Section(name="a", xy=xy, expression=rng.random((60, 3), dtype=np.float32))
    >>> model = Stage(epochs=2, widths=(8, 2))
    >>> held_out = model.fit([spots], device="cpu")
    >>> model.predict(Section(name="a", xy=np.array([[1.5, 4], [2, 4]]))).shape
    (2, 3)
    """

    epochs: Count = 2000
    learning_rate: NonNegative = 1e-3
    widths: Sequence[Count] = WIDTHS
    n_directions: Count = 50
    validation_fraction: Fraction = 0.15

    state_names = ("section_names", "low", "high", "n_genes")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.widths[-1] != 2:
            raise ValueError(f"widths are {tuple(self.widths)}: the last is the plane of the coordinates, hence 2")

    def _fit(
        self, sections: Sequence[Section], *, random_state: int, device: str | None, progress: bool
    ) -> tuple[State, HeldOut]:
        expression = [expression_of(section) for section in sections]
        state: State = {
            "section_names": pack_names([section.name for section in sections]),
            "low": np.array([section.xy.min(axis=0) for section in sections]),
            "high": np.array([section.xy.max(axis=0) for section in sections]),
            "n_genes": np.array([expression[0].shape[1]]),
        }
        self._build(state, random_state, device)
        splits = [_training.split(len(section), self.validation_fraction, random_state) for section in sections]
        coordinates = [self._coordinates(section) for section in sections]
        self._train(coordinates, expression, splits, random_state=random_state, progress=progress)
        held_out = [np.full_like(each, np.nan) for each in expression]
        for s, (_, rows) in enumerate(splits):
            held_out[s][rows] = self._decode(s, coordinates[s][rows])
        return {**state, **_training.to_arrays(self._network)}, held_out

    def _predict(self, points: Section, state: State) -> NDArray[np.float32]:
        return self._decode(self._index(points), self._coordinates(points))

    def _make_network(self, state: State, *, restored: bool) -> nn.Module:
        n_genes = int(state["n_genes"][0])
        return nn.ModuleList(Autoencoder(n_genes, self.widths) for _ in range(len(state["low"])))

    def _train(
        self,
        coordinates: list[Tensor],
        expression: list[NDArray[np.float32]],
        splits: list[tuple[_training.Rows, _training.Rows]],
        *,
        random_state: int,
        progress: bool,
    ) -> None:
        truth = [torch.from_numpy(each).to(self._device) for each in expression]
        directions = _training.generator(random_state)

        def loss(rows: Tensor) -> Tensor:
            drawn = _directions(self.n_directions, directions).to(self._device)
            sections = [
                (self._network.get_submodule(f"{s}"), truth[s][splits[s][0]], coordinates[s][splits[s][0]])
                for s in rows.tolist()
            ]
            return torch.stack([stage_loss(*section, drawn) for section in sections]).mean()

        def validation() -> float:
            off = [
                functional.mse_loss(self._map(s, coordinates[s][held_out]), truth[s][held_out]).item()
                for s, (_, held_out) in enumerate(splits)
            ]
            return float(np.mean(off))

        self.history = _training.train(
            self._network,
            loss,
            np.arange(len(coordinates)),
            _training.Schedule(epochs=self.epochs, learning_rate=self.learning_rate),
            validation=validation,
            random_state=random_state,
            device=self._device,
            progress=progress,
            label="stage",
        )

    def _index(self, points: Section) -> int:
        names = unpack_names(self.arrays["section_names"])
        if points.name not in names:
            raise ValueError(
                f"stage reads coordinates alone, which do not compare in an unfitted section: {points.name!r} "
                f"(fitted: {names}); use a model that reads the image, such as ridge or attention."
            )
        return names.index(points.name)

    def _coordinates(self, points: Section) -> Tensor:
        """Positions (m, 2), from -1 to 1 along the longer side of the fitted spots."""
        low, high = (self.arrays[key][self._index(points)] for key in ("low", "high"))
        half = (high - low).max() / 2 or 1.0
        return torch.from_numpy(((points.xy - (low + high) / 2) / half).astype(np.float32)).to(self._device)

    def _map(self, s: int, coordinates: Tensor) -> Tensor:
        rebuilt: Tensor = self._network.get_submodule(f"{s}.decoder")(coordinates)
        return rebuilt

    def _decode(self, s: int, coordinates: Tensor) -> NDArray[np.float32]:
        return _training.in_batches(
            self._network, lambda rows: self._map(s, coordinates[rows]), len(coordinates), CHUNK
        )


def stage_loss(network: nn.Module, expression: Tensor, coordinates: Tensor, directions: Tensor) -> Tensor:
    """Reconstruction of expression (n, g) and fit of its latent to the coordinates (n, 2), weighted as in the paper."""
    latent, rebuilt = network(expression)
    reconstruction = functional.mse_loss(rebuilt, expression) + 0.1 * functional.l1_loss(rebuilt, expression)
    return (
        reconstruction
        + functional.l1_loss(latent, coordinates)
        + 0.1 * sliced_wasserstein(latent, coordinates, directions)
    )


def sliced_wasserstein(one: Tensor, other: Tensor, directions: Tensor) -> Tensor:
    """Mean over directions (k, 2) of the 1-Wasserstein distance between two clouds (n, 2) projected on them."""
    projected, expected = ((cloud @ directions.T).sort(dim=0).values for cloud in (one, other))
    return (projected - expected).abs().mean()


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
