"""Images of tissue: files and arrays of any kind, read lazily, at a stated scale, always as RGB.

Coordinates are (x, y) in full-resolution pixels and continuous: pixel i covers [i, i + 1), its center is i + 0.5. Space
Ranger and similar software give pixel indices instead; that difference of half a pixel is negligible and left alone.

Every read gives (h, w, 3) uint8 RGB by one rule:

- boolean x 255; integers of 8 or 16 bits x 255 / their white level, rounded; floats x 255, rounded, and refused outside
  [0, 1]; other types are refused;
- the white level is 255 or 65535, or less where the file states fewer significant bits; where 16 bits hold values of 8,
  10, 12 or 14 bits only, it is the largest of these, and the log reports it;
- (h, w) and (h, w, 1) are gray, repeated three times; (h, w, 2) is gray and alpha, (h, w, 3) RGB, (h, w, 4) RGBA; a
  further sample of a TIFF counts as alpha if the file declares it;
- (1 or 3 or 4, h, w) is channels first, when the last axis is not 1 to 4 long; xarray names its axes;
- alpha is composited over white, and beyond the border all is white: the background of stained tissue is.
"""

from sthisto.images._image import Image
from sthisto.images._nuclei import Nuclei, find_nuclei
from sthisto.images._open import open_image
from sthisto.images._patches import patch_batches, sample_patches, visiting_order
from sthisto.images._tissue import check_scale, check_tissue, is_blank, tissue_points, tissue_share

__all__ = [
    "Image",
    "Nuclei",
    "check_scale",
    "check_tissue",
    "find_nuclei",
    "is_blank",
    "open_image",
    "patch_batches",
    "sample_patches",
    "tissue_points",
    "tissue_share",
    "visiting_order",
]
