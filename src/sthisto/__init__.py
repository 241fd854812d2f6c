"""Dense spatial gene expression from histology, for AnnData and Scanpy.

``read`` reads a folder of Space Ranger, ``pp`` extracts image features, ``tl`` fits and predicts, ``pl`` draws. The
pure parts (``grids``, ``images``, ``encoders``, ``models``, ``metrics``) are public for those who build on them.
Importing the package is cheap: modules are loaded when they are first used, and torch, timm, scanpy and matplotlib by
the functions that need them.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sthisto import datasets, domains, encoders, evaluation, grids, images, metrics, models, pl, pp, tl, uncertainty
    from sthisto._data import SpatialDataView, read

__version__ = "0.1.0"
__all__ = [
    "SpatialDataView",
    "datasets",
    "domains",
    "encoders",
    "evaluation",
    "grids",
    "images",
    "metrics",
    "models",
    "pl",
    "pp",
    "read",
    "tl",
    "uncertainty",
]

logging.getLogger("sthisto").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Load a module, or a name of one, at its first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("SpatialDataView", "read"):
        return getattr(import_module("sthisto._data"), name)
    return import_module(f"sthisto.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
