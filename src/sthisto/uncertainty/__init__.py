"""How far a new measurement may lie from a prediction, learnt from predictions that were held back."""

from sthisto.uncertainty._spread import Spread

__all__ = ["Spread"]
