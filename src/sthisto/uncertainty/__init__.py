"""How far a new measurement may lie from a prediction, learnt from predictions that were held back.

A model's own likelihood tells of its assumptions; what it missed on spots that it had not seen tells of its errors.
:class:`MeanVarianceTrend` has the standard deviation by gene and level, :class:`DistanceInflation` how that grows
away from measured spots and
on unusual tissue, :class:`PredictiveDistribution` the whole distribution, which is not normal: most counts are
0.
:class:`Calibration` is the three together, :class:`NoveltyDetector` says how unusual a tissue looks. Plain arrays throughout.
:class:`SurrogateTest` tells which genes the look of the tissue foretells better than patterns as smooth as theirs.
"""

from sthisto.uncertainty._calibration import Calibration, Covariates, HeldOutPredictions, check_level
from sthisto.uncertainty._distance import DistanceInflation
from sthisto.uncertainty._distribution import PredictiveDistribution
from sthisto.uncertainty._novelty import NoveltyDetector
from sthisto.uncertainty._surrogates import SurrogateTest, p_values
from sthisto.uncertainty._trend import MeanVarianceTrend

__all__ = [
    "Calibration",
    "Covariates",
    "DistanceInflation",
    "HeldOutPredictions",
    "MeanVarianceTrend",
    "NoveltyDetector",
    "PredictiveDistribution",
    "SurrogateTest",
    "check_level",
    "p_values",
]
