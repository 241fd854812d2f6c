"""How far a new measurement may lie from a prediction, learnt from predictions that were held back.

A model's own likelihood tells of its assumptions; what it missed on spots that it had not seen tells of its errors.
:class:`Spread` has the standard deviation by gene and level, :class:`Reach` how that grows away from measured spots and
on unusual tissue, :class:`Outcomes` the whole distribution, which is not normal: most counts are 0.
:class:`Calibration` is the three together, :class:`Familiar` says how unusual a tissue looks. Plain arrays throughout.
:class:`Followed` tells which genes the look of the tissue foretells better than patterns as smooth as theirs.
"""

from sthisto.uncertainty._calibration import Calibration, HeldBack, Looked, check_level
from sthisto.uncertainty._familiar import Familiar
from sthisto.uncertainty._followed import Followed, p_values
from sthisto.uncertainty._outcomes import Outcomes
from sthisto.uncertainty._reach import Reach
from sthisto.uncertainty._spread import Spread

__all__ = [
    "Calibration",
    "Familiar",
    "Followed",
    "HeldBack",
    "Looked",
    "Outcomes",
    "Reach",
    "Spread",
    "check_level",
    "p_values",
]
