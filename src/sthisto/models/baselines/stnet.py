"""ST-Net: expression from the patch around a spot, by a convolutional network (He et al. 2020, Nat. Biomed. Eng.).

A DenseNet121 trained on ImageNet encodes the patch x of about 150 um (224 px at the scale of the slide), and one linear
layer, which starts at zero weight and at the gene means, predicts the genes:

    y(x) = mean + W d(x) + b,    W = b = 0 at first,    loss = sum over genes (y - measured)^2, mean over spots

by SGD with momentum 0.9, learning rate 1e-6, 50 epochs of batches of 32 patches, each flipped and rotated at random.
The prediction is the mean over the 8 symmetries of the square.

Differences from the authors' code
- Gene means are taken per section (with one section that is the same as a bias that starts there), over the training
  spots; they are no weights.
- The window is in micrometers, so that sections scanned at different scales compare; the authors cut 224 px.
- A tenth of the spots is held out of training, to calibrate the uncertainty with. Nothing stops early.
- The target is what the user passes (log-normalized expression); the authors predict the log of 250 genes' counts.
- The rate of 1e-6 was made for 30 000 spots. On a section of a few hundred it hardly leaves the gene means: raise it.

All training patches are held in memory, 0.15 MB a spot at 224 px.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sthisto._messages import warn
from sthisto._training import Curves, Rows, Schedule, in_batches, mean_loss, to_arrays, train
from sthisto.models._model import Count, Fraction, HeldOut, NonNegative, Positive, Section, State
from sthisto.models._network import NetworkModel, patches_of, split_sections, without_features
from sthisto.models._standardize import STATE, SectionStandardizer, expression_of

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
class PatchRegression(NetworkModel):
    """What networks from one patch to expression share: they read the patch alone, no positions, no neighbors."""

    backbone: str
    patch_um: Positive
    input_size: Count
    epochs: Count
    batch_size: Count
    learning_rate: NonNegative
    weights: str | None = None
    validation_fraction: Fraction = 0.1

    state_names = STATE
    dropout: ClassVar[float] = 0.0
    views: ClassVar[int] = 1  # symmetries that a prediction is averaged over

    @abstractmethod
    def schedule(self) -> Schedule:
        """How the network is trained."""

    @abstractmethod
    def error(self, predicted: Tensor, measured: Tensor) -> Tensor:
        """Loss of deviations from the gene means (b, g)."""

    def _fit(
        self, sections: Sequence[Section], *, random_state: int, device: str | None, progress: bool
    ) -> tuple[State, HeldOut]:
        if self.weights is None:
            warn(
                f"{type(self).__name__} starts from random weights: a section has too few spots to train an image "
                "network on, so it will be less accurate than from pretrained ones. Pass params="
                "{'weights': 'imagenet'}, which downloads them, or a local file."
            )
        training, validation = split_sections(sections, self.validation_fraction, random_state)
        kept = [without_features(section, rows) for section, rows in zip(sections, training, strict=True)]
        standardizer = SectionStandardizer.of(kept, with_features=False)
        self._build(standardizer.state(), random_state, device)
        self.history = self._train(sections, validation, standardizer, random_state=random_state, progress=progress)
        held_out = [np.full(expression_of(section).shape, np.nan, dtype=np.float32) for section in sections]
        for section, rows, predicted in zip(sections, validation, held_out, strict=True):
            predicted[rows] = self.predict(without_features(section, rows))
        return {**self.arrays, **to_arrays(self._network)}, held_out

    def _predict(self, points: Section, state: State) -> NDArray[np.float32]:
        deviations = in_batches(
            self._network, lambda rows: self._deviations(points, rows), len(points), self.batch_size
        )
        return (deviations + SectionStandardizer.restore(state).mean_of(points.name)).astype(np.float32)

    def _make_network(self, state: State, *, restored: bool) -> nn.Module:
        weights = None if restored else self.weights
        return PatchNetwork(self.backbone, state["gene_mean"].shape[1], dropout=self.dropout, weights=weights)

    def _train(
        self,
        sections: Sequence[Section],
        held_out: Sequence[Rows],
        standardizer: SectionStandardizer,
        *,
        random_state: int,
        progress: bool,
    ) -> Curves:
        pixels = torch.from_numpy(np.concatenate([patches_of(section) for section in sections]))  # (n, h, w, 3)
        target = torch.from_numpy(standardizer.deviations(sections).astype(np.float32))
        starts = np.cumsum([0, *map(len, sections)])
        validation = np.concatenate([start + rows for start, rows in zip(starts, held_out, strict=False)])

        def loss(rows: Tensor, *, augmented: bool = True) -> Tensor:
            patches = rotated(pixels[rows], torch.randint(SYMMETRIES, (len(rows),))) if augmented else pixels[rows]
            return self.error(self._network(patches.to(self._device)), target[rows].to(self._device))

        return train(
            self._network,
            loss,
            np.setdiff1d(np.arange(len(target)), validation),
            self.schedule(),
            validation=lambda: mean_loss(lambda rows: loss(rows, augmented=False), validation, self.batch_size),
            random_state=random_state,
            device=self._device,
            progress=progress,
            label=type(self).__name__,
        )

    def _deviations(self, points: Section, rows: slice) -> Tensor:
        """Deviations (b, g) of some of the points, averaged over the views."""
        patches = torch.from_numpy(patches_of(points, np.arange(len(points))[rows])).to(self._device)
        views = [self._network(rotated(patches, torch.full((len(patches),), view))) for view in range(self.views)]
        return torch.stack(views).mean(dim=0)


@dataclass(kw_only=True)
class StNet(PatchRegression):
    """Linear map from a network's encoding of a patch to every gene.

    Parameters
    ----------
    backbone
        Any network of timm.
    patch_um, input_size
        Side of the patch in micrometers and in pixels.
    epochs, batch_size, learning_rate
        Of the training.
    weights
        First weights of the backbone: ``None`` draws them, "imagenet" takes timm's from the Hub, else the path of a
        safetensors or pth file.
    validation_fraction
        Fraction of the spots held out of training.

    Examples
    --------
    >>> from sthisto.models import MODELS
    >>> StNet(weights="imagenet", epochs=5).input_size
    224
    """

    backbone: str = "densenet121"
    patch_um: Positive = 150.0
    input_size: Count = 224
    epochs: Count = 50
    batch_size: Count = 32
    learning_rate: NonNegative = 1e-6

    views: ClassVar[int] = SYMMETRIES

    def schedule(self) -> Schedule:
        """SGD with momentum, to the end."""
        return Schedule(
            epochs=self.epochs, learning_rate=self.learning_rate, batch_size=self.batch_size, optimizer="sgd"
        )

    def error(self, predicted: Tensor, measured: Tensor) -> Tensor:
        """Squared error, summed over genes."""
        return ((predicted - measured) ** 2).sum(dim=1).mean()


def rotated(patches: Tensor, which: Tensor) -> Tensor:
    """Patches (b, h, w, 3), each in one of the 8 symmetries (b,) of the square; 0 leaves it as it is."""
    result = torch.empty_like(patches)
    for symmetry in set(which.tolist()):
        rows = which == symmetry
        quarter = torch.rot90(patches[rows], symmetry % 4, (1, 2))
        result[rows] = quarter.flip(2) if symmetry >= 4 else quarter
    return result
