"""Registration of spots to a stained image, checked and corrected from the data: plain arrays in, plain arrays out.

Image features predict the expression of spots in blocks that were held out only if the image is registered to the
spots. :class:`HeldOutRidge` is that statistic for any positions of the spots, on features that a :class:`FeatureRaster`
holds for the whole image; :func:`check` searches the similarity transformation that raises it most, and tests whether
it raises it by more than chance.
"""

from sthisto.alignment._check import VERDICTS, Alignment, check
from sthisto.alignment._raster import FeatureRaster
from sthisto.alignment._statistic import HeldOutRidge, expression_factors
from sthisto.alignment._transform import SYMMETRIES, Similarity
from sthisto.alignment._warp import Warp, fit_warp

__all__ = [
    "SYMMETRIES",
    "VERDICTS",
    "Alignment",
    "FeatureRaster",
    "HeldOutRidge",
    "Similarity",
    "Warp",
    "check",
    "expression_factors",
    "fit_warp",
]
