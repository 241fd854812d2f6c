"""Dense spatial gene expression from histology, for AnnData and Scanpy.

``pp`` extracts image features, ``tl`` fits and predicts, ``pl`` draws. The pure parts (``grids``, ``images``,
``encoders``, ``models``, ``metrics``) are public for those who build on them. Importing the package is cheap:
torch, timm, scanpy and matplotlib are loaded by the functions that need them.
"""

import logging

from sthisto import datasets, domains, encoders, evaluation, grids, images, metrics, models, pl, pp, tl, uncertainty
from sthisto._data import SpatialDataView

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
    "tl",
    "uncertainty",
]

logging.getLogger("sthisto").addHandler(logging.NullHandler())
