"""Predictive uncertainty, calibrated on held-out predictions, and a test of which genes can be predicted.

A model's own likelihood reflects its assumptions; its residuals on held-out spots are its errors. :class:`Calibration`
combines three parts: :class:`MeanVarianceTrend`, the standard deviation by gene and level; :class:`DistanceInflation`,
its growth away from measured spots and on novel tissue; and :class:`PredictiveDistribution`, which is zero-inflated, as
most counts are 0. :class:`NoveltyDetector` scores how far image features are from those of the training spots.
:class:`SurrogateTest` compares genes with random patterns of the same spatial autocorrelation. All take plain arrays.
"""

from sthisto.uncertainty._calibration import Calibration, Covariates, HeldOutPredictions, check_level
from sthisto.uncertainty._distribution import PredictiveDistribution
from sthisto.uncertainty._novelty import NoveltyDetector
from sthisto.uncertainty._surrogates import SurrogateTest, p_values, spectral_surrogates
from sthisto.uncertainty._variance import DistanceInflation, MeanVarianceTrend

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
    "spectral_surrogates",
]
