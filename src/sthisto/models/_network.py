"""What models that train a network share: weights as part of the state, the device, held-out spots, patches."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sthisto import _training
from sthisto._training import Rows
from sthisto.models._model import Model, Section, State


@dataclass(kw_only=True)
class NetworkModel(Model):
    """A model whose state holds the weights of a network, on the device that ``fit`` or ``restore`` was given."""

    _network: nn.Module = field(init=False, repr=False, compare=False)
    _device: torch.device = field(init=False, repr=False, compare=False)

    @abstractmethod
    def _make_network(self, state: State, *, restored: bool) -> nn.Module:
        """Make the network for the sizes in the state; weights of a restored one are replaced."""

    def _build(self, state: State, random_state: int, device: str | None, *, restored: bool = False) -> None:
        """Keep the state, and the network with its first weights on the device."""
        self._arrays, self._device = state, _training.pick_device(device)
        with _training.seeded(random_state):
            self._network = self._make_network(state, restored=restored)
        self._network.to(self._device)

    def _restored(self, state: State, device: str | None) -> None:
        self._build(state, 0, device, restored=True)
        _training.from_arrays(self._network, state)


def patches_of(section: Section, rows: Rows | None = None) -> NDArray[np.uint8]:
    """Patches (b, h, w, 3) of some or all of the rows, or an error if they are missing."""
    if section.patches is None:
        raise ValueError(f"section {section.name!r} has no picture to cut patches from; pass image=")
    return section.patches(np.arange(len(section)) if rows is None else rows)


def without_features(section: Section, rows: Rows) -> Section:
    """Keep some of a section's spots, without features."""
    return replace(section, features=None).keep(rows)


def split_sections(sections: Sequence[Section], fraction: float, random_state: int) -> tuple[list[Rows], list[Rows]]:
    """Rows of each section to train on, and a random fraction to validate on."""
    training, validation = zip(*(_training.split(len(each), fraction, random_state) for each in sections), strict=True)
    return list(training), list(validation)
