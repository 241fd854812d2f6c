"""The models by name, and the contract they share: plain arrays in, plain arrays out.

A model learns from one or several :class:`Section` and predicts expression at the points of a section. It knows
nothing of AnnData, keeps all it needs for prediction in :meth:`Model.state`, and is found by name in :data:`MODELS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Patches = Callable[[NDArray[np.intp]], NDArray[np.uint8]]  # rows (b,) -> patches (b, h, w, 3)


@dataclass(frozen=True, kw_only=True)
class Section:
    """One tissue section as models see it; rows are spots where ``expression`` is given, points where it is not."""

    name: str
    xy: NDArray[np.float64]  # (n, 2) in units of the spots' pitch: positions of several arrays compare
    features: NDArray[np.float32] | None = None  # (n, d) as the encoder gave them
    expression: NDArray[np.float32] | None = None  # (n, g) log-normalised
    patches: Patches | None = None
    pitch_um: float | None = None  # the unit of xy; None where it is not known

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


def reads_pixels(name: str, model: Model) -> bool:
    """Whether a built model takes patches: as the registry says, or by its own setting ``rgb``."""
    return "patches" in MODELS[name].inputs or bool(getattr(model, "rgb", False))


MODELS: dict[str, ModelSpec] = {
    "attention": ModelSpec(
        source="sthisto.models.attention:Attention",
        inputs=frozenset({"features", "xy"}),
        context="section",
        reference="this package; beyond HisToSGE, arXiv 2407.20518",
    ),
    "idw": ModelSpec(
        source="sthisto.models.idw:Idw",
        inputs=frozenset({"xy"}),
        context="section",
        reference="Shepard 1968, doi:10.1145/800186.810616",
    ),
    "ridge": ModelSpec(
        source="sthisto.models.ridge:Ridge",
        inputs=frozenset({"features"}),
        context="spot",
        reference="Jaume et al. 2024, arXiv:2406.16192",
    ),
    "gp": ModelSpec(
        source="sthisto.models.gp:Gp",
        inputs=frozenset({"features", "xy"}),
        context="section",
        reference="Rasmussen and Williams 2006, Gaussian Processes for Machine Learning",
    ),
    "stnet": ModelSpec(
        source="sthisto.models.baselines.stnet:StNet",
        inputs=frozenset({"patches"}),
        context="spot",
        reference="He et al. 2020, doi:10.1038/s41551-020-0578-x",
        iterative=True,
    ),
    "deepspace": ModelSpec(
        source="sthisto.models.baselines.deepspace:DeepSpace",
        inputs=frozenset({"patches"}),
        context="spot",
        reference="Monjo et al. 2022, doi:10.1038/s41598-022-07685-4",
        iterative=True,
    ),
    "histogene": ModelSpec(
        source="sthisto.models.baselines.histogene:HisToGene",
        inputs=frozenset({"patches", "xy"}),
        context="section",
        reference="Pang et al. 2021, doi:10.1101/2021.11.28.470212",
        iterative=True,
    ),
    "thitogene": ModelSpec(
        source="sthisto.models.baselines.thitogene:THItoGene",
        inputs=frozenset({"patches", "xy"}),
        context="section",
        reference="Jia et al. 2024, doi:10.1093/bib/bbad464",
        iterative=True,
    ),
    "histosge": ModelSpec(
        source="sthisto.models.histosge:HisToSGE",
        inputs=frozenset({"features", "xy"}),
        context="section",
        reference="HisToSGE, arXiv 2407.20518",
        iterative=True,
        memorises=False,
    ),
    "stage": ModelSpec(
        source="sthisto.models.baselines.stage:Stage",
        inputs=frozenset({"xy"}),
        context="section",
        reference="Li et al. 2024, doi:10.1093/nar/gkae294",
        iterative=True,
        memorises=False,
    ),
}
