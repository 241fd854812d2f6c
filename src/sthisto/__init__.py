"""Dense spatial gene expression from histology, for AnnData and Scanpy.

``pp`` describes the tissue, ``tl`` learns and predicts, ``pl`` draws. The pure parts (``grids``, ``images``,
``encoders``, ``models``, ``metrics``) are public for those who build on them. Importing the package is cheap:
torch, timm, scanpy and matplotlib are loaded by the functions that need them.
"""

import logging

from sthisto import datasets, encoders, evaluation, grids, images, metrics, models, pl, pp, tl

__version__ = "0.1.0"
__all__ = ["datasets", "encoders", "evaluation", "grids", "images", "metrics", "models", "pl", "pp", "tl"]

logging.getLogger("sthisto").addHandler(logging.NullHandler())
