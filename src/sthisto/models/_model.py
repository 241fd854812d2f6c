"""What a section is to models, and what a model is to the rest of the package."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sthisto.uncertainty import FeatureStatistics

Patches = Callable[[NDArray[np.intp]], NDArray[np.uint8]]  # rows (b,) -> patches (b, h, w, 3)


@dataclass(frozen=True, kw_only=True)
class Section:
    """One tissue section as models see it; rows are spots where ``expression`` is given, points where it is not.

    Attributes
    ----------
    name
        Tells sections of one fit from each other; a section is *fitted* if ``fit`` was given one of its name.
    xy
        Positions (n, 2) in units of the pitch, the distance between neighboring spots.
    features
        Image features (n, d) as the encoder gave them.
    expression
        Log-normalized expression (n, g).
    patches
        Gives the patches (b, h, w, 3) uint8 around rows (b,).
    pitch_um
        The unit of ``xy`` in micrometers; ``None`` where it is not known.
    feature_statistics
        Mean and standard deviation of the features of the section's own spots. Points of a section that was not fitted
        are standardized with them, whichever points are predicted; ``None`` takes the rows for the whole section.
    """

    name: str
    xy: NDArray[np.float64]
    features: NDArray[np.float32] | None = None
    expression: NDArray[np.float32] | None = None
    patches: Patches | None = None
    pitch_um: float | None = None
    feature_statistics: FeatureStatistics | None = None

    def __len__(self) -> int:
        return len(self.xy)

    def keep(self, rows: NDArray[np.intp]) -> "Section":
        """Only some of the rows, with all that is known of them."""
        patches = self.patches
        return replace(
            self,
            xy=self.xy[rows],
            features=None if self.features is None else self.features[rows],
            expression=None if self.expression is None else self.expression[rows],
            patches=None if patches is None else lambda wanted: patches(rows[wanted]),
        )


class Model(Protocol):
    """A way from image features, pixels and positions to expression.

    Laws, tested for every entry of :data:`MODELS`: permuting the points permutes the prediction; a second ``fit`` with
    the same seed gives the same bits on a CPU; ``restore(state())`` predicts the same bits; nothing but the sections
    handed to ``fit`` reaches a prediction.
    """

    history: dict[str, NDArray[np.float64]]  # curves over epochs; empty where nothing iterates

    def fit(
        self, sections: Sequence[Section], *, random_state: int, device: str, progress: bool
    ) -> list[NDArray[np.float32]]:
        """Learn; return for each section (n, g) what the model says of each spot without having seen it.

        Rows that the model cannot hold back are NaN. The spread of a new measurement is learnt from these.
        """

    def predict(self, points: Section) -> NDArray[np.float32]:
        """Expression (m, g) at the points; ``points.name`` says which of the fitted sections they belong to."""

    def state(self) -> dict[str, NDArray[np.generic]]:
        """All that prediction needs, as named numeric arrays."""

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Take up what :meth:`state` gave."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What the registry says of a model without importing it."""

    source: str  # "module:Class"; the class is a dataclass whose fields are the user's params
    inputs: frozenset[Literal["features", "patches", "xy"]]
    context: Literal["spot", "window", "section"]  # what one prediction looks at
    reference: str
    iterative: bool = False  # takes params={"epochs": n}
    min_spots: int = 20  # below this, fit refuses
    memorises: bool = True  # where it is iterative: can repeat twenty spots that it learns from

    def load(self) -> type[Model]:
        """Import and return the model's class."""
        module, name = self.source.split(":")
        model: type[Model] = getattr(import_module(module), name)
        return model
