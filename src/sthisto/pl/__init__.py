"""Plots: measured and predicted expression over the tissue, its uncertainty, scores of models, and training curves.

As in scanpy, every function returns ``None`` where the figure was shown, else the axes, or the figure with
``return_fig=True``. Positions are full-resolution pixels with y downwards, as in the image, and spots have their true
size.
"""

from sthisto.pl._alignment import alignment
from sthisto.pl._domains import domains
from sthisto.pl._features import features
from sthisto.pl._genes import genes, uncertainty
from sthisto.pl._scores import evaluation, history
from sthisto.pl._section import spots

__all__ = ["alignment", "domains", "evaluation", "features", "genes", "history", "spots", "uncertainty"]
