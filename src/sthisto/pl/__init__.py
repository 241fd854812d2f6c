"""Pictures: what was measured beside what is predicted, how far to trust it, and how the training went.

Every function returns what scanpy's do: nothing where the picture was shown, else its axes, or the figure with
``return_fig=True``. Positions are full-resolution pixels with y downwards, as in the image; sizes are true sizes.
"""

from sthisto.pl._domains import domains
from sthisto.pl._evaluation import evaluation
from sthisto.pl._features import features
from sthisto.pl._genes import genes
from sthisto.pl._history import history
from sthisto.pl._uncertainty import uncertainty

__all__ = ["domains", "evaluation", "features", "genes", "history", "uncertainty"]
