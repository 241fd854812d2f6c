"""ST-Net: expression from the patch around a spot, by a convolutional network (He et al. 2020, Nat. Biomed. Eng.).

A DenseNet121 made for ImageNet describes the patch x of about 150 um (224 px at the scale of the slide), and one linear
layer, which starts at zero weight and at the gene means, tells the genes:

    y(x) = mean + W d(x) + b,    W = b = 0 at first,    loss = sum over genes (y - measured)^2, mean over spots

by SGD with momentum 0.9, learning rate 1e-6, 50 epochs of batches of 32 patches, each flipped and turned at random. The
prediction is the mean over the 8 symmetries of the square.

Differences from the authors' code
- Gene means are taken per section (with one section that is the same as a bias that starts there), over the spots that
  are learnt from; they are no weights.
- The window is in micrometres, so that sections scanned at different scales compare; the authors cut 224 px.
- A tenth of the spots is held back from training, to learn the spread of new measurements from. Nothing stops early.
- The target is what the user passes (log-normalised expression); the authors predict the log of 250 genes' counts.
- The rate of 1e-6 was made for 30 000 spots. On a section of a few hundred it hardly leaves the gene means: raise it.

What patches a network learns from is held in memory, 0.15 MB a spot at 224 px.
"""

import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sthisto._training import (
    Rows,
    Schedule,
    from_arrays,
    in_batches,
    mean_loss,
    pick_device,
    seeded,
    split,
    to_arrays,
    train,
)
from sthisto.models._model import Section
from sthisto.models._standardize import SectionStandardizer, expression_of

SYMMETRIES = 8  # of the square: four quarter turns, each also mirrored


class PatchNetwork(nn.Module):
    """A timm backbone on patches as they come, and a linear head that starts at zero."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: str, n_genes: int, *, dropout: float = 0.0, weights: str | None = None) -> None:
        super().__init__()
        self.backbone = load_backbone(backbone, weights, dropout=dropout)
        self.head = nn.Linear(self.backbone.head_hidden_size, n_genes)  # type: ignore[arg-type]  # timm's int
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        colors = self.backbone.pretrained_cfg
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(colors[name]), persistent=False)  # type: ignore[index]

    def forward(self, patches: Tensor) -> Tensor:
        """Deviations from the gene means (b, g) of patches (b, h, w, 3) uint8."""
        colors = (patches / 255 - self.mean) / self.std
        described: Tensor = self.head(self.backbone(colors.permute(0, 3, 1, 2)))
        return described


def load_backbone(name: str, weights: str | None, *, dropout: float = 0.0) -> nn.Module:
    """Make a timm network without its classifier, with first weights drawn, from the Hub, or from a local file.

    Raises
    ------
    ImportError
        timm cannot be loaded.
    FileNotFoundError
        ``weights`` is neither "imagenet" nor a file.
    ValueError
        The file is of another network.
    """
    try:
        import timm  # noqa: PLC0415  heavy
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another build than torch
        raise ImportError(
            f"the network {name!r} needs timm, which does not load here ({error}). Install timm, and torch and "
            "torchvision of the same build: pip install --upgrade timm torch torchvision"
        ) from error
    network: nn.Module = timm.create_model(name, pretrained=weights == "imagenet", num_classes=0, drop_rate=dropout)
    if weights not in (None, "imagenet"):
        _load_file(network, name, Path(str(weights)))
    return network


def _load_file(network: nn.Module, name: str, path: Path) -> None:
    """Take the weights of a safetensors or pth file; a classifier in it is left out."""
    from timm.models import load_state_dict  # noqa: PLC0415  heavy

    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(path)!r} with weights of {name!r}: weights= takes None, 'imagenet', or a safetensors or pth "
            "file."
        )
    found = load_state_dict(str(path), weights_only=True)
    classifier = network.pretrained_cfg["classifier"]  # type: ignore[index]  # timm's dict
    found = {key: value for key, value in found.items() if not key.startswith(f"{classifier}.")}
    expected = network.state_dict()
    odd = sorted(
        set(found) ^ set(expected)
        | {key for key in set(found) & set(expected) if found[key].shape != expected[key].shape}
    )
    if odd:
        raise ValueError(
            f"{str(path)!r} holds no weights of timm's {name!r}: {len(odd)} of {len(expected)} arrays are missing, "
            f"unknown or of another shape (first: {odd[0]!r})."
        )
    network.load_state_dict(found)


@dataclass(kw_only=True)
class PatchRegression(ABC):
    """What networks from one patch to expression share: they see the patch alone, not the place and no neighbors."""

    backbone: str
    patch_um: float
    input_size: int
    epochs: int
    batch_size: int
    learning_rate: float
    weights: str | None = None
    held_out: float = 0.1
    history: dict[str, NDArray[np.float64]] = dataclasses.field(default_factory=dict, init=False, repr=False)

    dropout: ClassVar[float] = 0.0
    views: ClassVar[int] = 1  # symmetries that a prediction is averaged over

    def fit(
        self, sections: Sequence[Section], *, random_state: int, device: str, progress: bool
    ) -> list[NDArray[np.float32]]:
        """Learn; return predictions of the spots held back, NaN for the others, (n, g) a section.

        Raises
        ------
        ValueError
            Two sections of one name, or one without patches or expression; a loss that diverges.
        """
        if self.weights is None:
            warnings.warn(
                f"{type(self).__name__} starts from random weights: a section has too few spots to learn to see from, "
                'so it will be less accurate than from pretrained ones. Pass params={"weights": "imagenet"}, '
                "which downloads them, or a local file.",
                stacklevel=3,
            )
        where = pick_device(device)
        shown, hidden = hold_back(sections, self.held_out, random_state)
        learning = [part(section, rows) for section, rows in zip(sections, shown, strict=True)]
        centring = SectionStandardizer.of(learning, with_features=False)
        with seeded(random_state):
            self._network = PatchNetwork(
                self.backbone, centring.gene_mean.shape[1], dropout=self.dropout, weights=self.weights
            )
        self.history = self._train(
            sections, hidden, centring, random_state=random_state, device=where, progress=progress
        )
        self._state = {**centring.state(), **to_arrays(self._network)}
        return [self.hold(section, rows) for section, rows in zip(sections, hidden, strict=True)]

    def predict(self, points: Section) -> NDArray[np.float32]:
        """Expression (m, g) at the points.

        Raises
        ------
        ValueError
            No patches.
        """
        deviations = in_batches(self._network, lambda rows: self._look(points, rows), len(points), self.batch_size)
        return (deviations + SectionStandardizer.restore(self._state).mean_of(points.name)).astype(np.float32)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Gene means of the sections and the network's weights, float32."""
        return dict(self._state)

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Take up what :meth:`state` gave."""
        self._state = dict(state)
        n_genes = SectionStandardizer.restore(self._state).gene_mean.shape[1]
        with seeded(0):  # the first weights are replaced, the global state is not to notice
            self._network = PatchNetwork(self.backbone, n_genes, dropout=self.dropout)
        from_arrays(self._network, state)
        self._network.to(pick_device(None))

    def hold(self, section: Section, rows: Rows) -> NDArray[np.float32]:
        """Predictions of the rows, (n, g), NaN elsewhere."""
        predicted = np.full(expression_of(section).shape, np.nan, dtype=np.float32)
        predicted[rows] = self.predict(part(section, rows))
        return predicted

    @abstractmethod
    def schedule(self) -> Schedule:
        """How the network is trained."""

    @abstractmethod
    def error(self, predicted: Tensor, measured: Tensor) -> Tensor:
        """Loss of deviations from the gene means (b, g)."""

    def _train(
        self,
        sections: Sequence[Section],
        hidden: Sequence[Rows],
        centring: SectionStandardizer,
        *,
        random_state: int,
        device: torch.device,
        progress: bool,
    ) -> dict[str, NDArray[np.float64]]:
        pixels = torch.from_numpy(np.concatenate([patches_of(section) for section in sections]))  # (n, h, w, 3)
        target = torch.from_numpy(centring.deviations(sections).astype(np.float32))
        starts = np.cumsum([0, *map(len, sections)])
        validation = np.concatenate([start + rows for start, rows in zip(starts, hidden, strict=False)])

        def loss(rows: Tensor, *, turning: bool = True) -> Tensor:
            seen = turned(pixels[rows], torch.randint(SYMMETRIES, (len(rows),))) if turning else pixels[rows]
            return self.error(self._network(seen.to(device)), target[rows].to(device))

        return train(
            self._network,
            loss,
            np.setdiff1d(np.arange(len(target)), validation),
            self.schedule(),
            validation=lambda: mean_loss(lambda rows: loss(rows, turning=False), validation, self.batch_size),
            random_state=random_state,
            device=device,
            progress=progress,
            label=type(self).__name__,
        )

    def _look(self, points: Section, rows: slice) -> Tensor:
        """Deviations (b, g) of some of the points, averaged over the views."""
        seen = torch.from_numpy(patches_of(points, np.arange(len(points))[rows])).to(self._network.head.weight.device)
        views = [self._network(turned(seen, torch.full((len(seen),), view))) for view in range(self.views)]
        return torch.stack(views).mean(dim=0)


@dataclass(kw_only=True)
class StNet(PatchRegression):
    """Linear map from what a network sees in the patch of ``patch_um`` um, ``input_size`` px, to every gene.

    ``weights`` of the ``backbone``, any network of timm: None draws them, "imagenet" takes timm's from the Hub, else
    the name of a safetensors or pth file. ``held_out`` is the share of spots that is not learnt from.

    Examples
    --------
    >>> from sthisto.models import MODELS
    >>> StNet(weights="imagenet", epochs=5).input_size
    224
    """

    backbone: str = "densenet121"
    patch_um: float = 150.0
    input_size: int = 224
    epochs: int = 50
    batch_size: int = 32
    learning_rate: float = 1e-6

    views: ClassVar[int] = SYMMETRIES

    def schedule(self) -> Schedule:
        """SGD with momentum, to the end."""
        return Schedule(
            epochs=self.epochs, learning_rate=self.learning_rate, batch_size=self.batch_size, optimizer="sgd"
        )

    def error(self, predicted: Tensor, measured: Tensor) -> Tensor:
        """Squared error, summed over genes."""
        return ((predicted - measured) ** 2).sum(dim=1).mean()


def turned(patches: Tensor, which: Tensor) -> Tensor:
    """Patches (b, h, w, 3), each in one of the 8 symmetries (b,) of the square; 0 leaves it as it is."""
    result = torch.empty_like(patches)
    for symmetry in set(which.tolist()):
        rows = which == symmetry
        turn = torch.rot90(patches[rows], symmetry % 4, (1, 2))
        result[rows] = turn.flip(2) if symmetry >= 4 else turn
    return result


def patches_of(section: Section, rows: NDArray[np.intp] | None = None) -> NDArray[np.uint8]:
    """Patches (b, h, w, 3) of some or all of the rows, or an error that says they are missing."""
    if section.patches is None:
        raise ValueError(f"section {section.name!r} has no picture to cut patches from; pass image=")
    return section.patches(np.arange(len(section)) if rows is None else rows)


def part(section: Section, rows: Rows) -> Section:
    """Take some of a section's spots, without features."""
    return replace(
        section,
        xy=section.xy[rows],
        features=None,
        expression=None if section.expression is None else section.expression[rows],
        patches=lambda chosen: patches_of(section, rows[chosen]),
    )


def hold_back(sections: Sequence[Section], share: float, random_state: int) -> tuple[list[Rows], list[Rows]]:
    """Rows of each section to learn from, and a random share that is held back."""
    shown, hidden = zip(*(split(len(section), share, random_state) for section in sections), strict=True)
    return list(shown), list(hidden)
