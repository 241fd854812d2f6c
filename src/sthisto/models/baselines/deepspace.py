"""DeepSpaCE: expression from the patch around a spot, by a VGG16 (Monjo et al. 2022, Scientific Reports).

The patch x is 2.5 times as wide as the spot (137.5 um on Visium), resampled to 224 px. The last layer of a VGG16
trained on ImageNet is replaced by one for the genes:

    y(x) = mean + W v(x) + b,    loss = smooth L1 of (y - measured), mean over spots and genes

by Adam, rate and weight decay 1e-4, batches of 128; training stops when the validation loss has not fallen for 5
epochs, and the best weights are kept.

Differences from the authors' code
- Gene means are taken per section, over the training spots, and W and b start at zero, as in ST-Net.
- Patches are flipped and rotated at random in training; the paper's color changes are left out.
- The tenth of the spots that determines when to stop is drawn within each section; the authors hold out sections.
- No semi-supervised rounds on patches between the spots, and no filter of patches by their brightness.

A VGG16 has 134 million weights: its state is 0.5 GB in ``uns``.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from sthisto._training import Schedule
from sthisto.models._model import Count, NonNegative, Positive
from sthisto.models.baselines.stnet import PatchRegression


@dataclass(kw_only=True)
class DeepSpace(PatchRegression):
    """Linear map from a VGG16's encoding of a patch to every gene, trained until the validation loss stops falling.

    Parameters
    ----------
    backbone, patch_um, input_size, epochs, batch_size, learning_rate, weights, validation_fraction
        As of :class:`~sthisto.models.baselines.stnet.StNet`.
    weight_decay
        Of the optimizer.
    patience
        Epochs without a lower validation loss after which training stops; ``None`` never stops early.

    Examples
    --------
    >>> DeepSpace(patch_um=250.0).batch_size  # 2.5 times the spots of the first arrays, 100 um wide
    128
    """

    backbone: str = "vgg16"
    patch_um: Positive = 137.5
    input_size: Count = 224
    epochs: Count = 100
    batch_size: Count = 128
    learning_rate: NonNegative = 1e-4
    weight_decay: NonNegative = 1e-4
    patience: Count | None = 5

    dropout: ClassVar[float] = 0.5  # between the layers of VGG's classifier

    def schedule(self) -> Schedule:
        """Adam, stopped early."""
        return Schedule(
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            patience=self.patience,
        )

    def error(self, predicted: Tensor, measured: Tensor) -> Tensor:
        """Smooth L1, mean over genes."""
        return nn.functional.smooth_l1_loss(predicted, measured)
