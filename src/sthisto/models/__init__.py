"""The models by name, and the contract they share: plain arrays in, plain arrays out.

A model learns from one or several :class:`Section` and predicts expression at the points of a section. It knows
nothing of AnnData, keeps all it needs for prediction in :meth:`Model.state`, and is found by name in :data:`MODELS`.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sthisto._statistics import FeatureStatistics
from sthisto.models._model import Model, ModelSpec, Patches, Section
from sthisto.models._prior import WithPrior

__all__ = [
    "MODELS",
    "FeatureStatistics",
    "Model",
    "ModelSpec",
    "Patches",
    "Section",
    "WithPrior",
    "build",
    "reads_pixels",
    "restore",
]


def build(name: str, params: Mapping[str, Any] | None = None, *, with_prior: bool = False) -> Model:
    """Make a model of the registry with its settings; ``with_prior`` one that starts from the sections' prior.

    Raises
    ------
    KeyError
        No model of that name.
    ValueError
        Unknown params, or values out of range.

    Examples
    --------
    >>> build("idw", {"n_neighbors": 8})
    Idw(n_neighbors=8, power=2.0)
    """
    if name not in MODELS:
        raise KeyError(f"no model {name!r} (there are: {', '.join(sorted(MODELS))}).")
    kind = MODELS[name].load()
    known = [each.name for each in fields(kind) if each.init]
    unknown = sorted(set(params or {}) - set(known))
    if unknown:
        raise ValueError(f"model {name!r} has no params {', '.join(unknown)} (it has: {', '.join(known)}).")
    model = kind(**(params or {}))
    return WithPrior(base=model) if with_prior else model


def restore(name: str, params: Mapping[str, Any] | None, arrays: Mapping[str, NDArray[np.generic]]) -> Model:
    """Make a model that predicts as the one whose :meth:`Model.state` the arrays are; other arrays are ignored."""
    model = build(name, params, with_prior=any(each in arrays for each in WithPrior.state_names))
    model.restore(arrays)
    return model


def reads_pixels(name: str, model: Model) -> bool:
    """Whether a built model takes patches: by the registry, or by its own setting ``rgb``."""
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
        can_overfit=False,
    ),
    "stage": ModelSpec(
        source="sthisto.models.baselines.stage:Stage",
        inputs=frozenset({"xy"}),
        context="section",
        reference="Li et al. 2024, doi:10.1093/nar/gkae294",
        iterative=True,
        can_overfit=False,
    ),
}
