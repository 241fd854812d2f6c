"""Sections to try things on.

:func:`synthetic` makes, offline, sections whose picture and expression come from one known tissue, so that the true
expression is known between the spots too (:func:`synthetic_truth`). The tests and the tutorials run on it.

:func:`dlpfc`, :func:`mouse_brain`, :func:`breast_cancer` and :func:`breast_dcis` download the public Visium sections of
the HisToSGE paper once and keep them in a folder, from which they are read offline afterwards; :func:`olfactory_bulb`
has two small serial sections.
"""

from sthisto.datasets._public import breast_cancer, breast_dcis, dlpfc, mouse_brain, olfactory_bulb
from sthisto.datasets._synthetic import synthetic, synthetic_truth

__all__ = ["breast_cancer", "breast_dcis", "dlpfc", "mouse_brain", "olfactory_bulb", "synthetic", "synthetic_truth"]
