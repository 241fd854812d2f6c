"""Images of tissue: files and arrays of any kind, read lazily, at a stated scale, always as RGB.

Coordinates are (x, y) in full-resolution pixels and continuous: pixel i covers [i, i + 1), its center is i + 0.5. Space
Ranger and similar software give pixel indices instead; that difference of half a pixel is negligible and left alone.

Every read gives (h, w, 3) uint8 RGB by one rule that does not depend on the values:

- boolean x 255; uint16 / 257, rounded; floats x 255, rounded, and refused outside [0, 1]; other types are refused;
- (h, w) and (h, w, 1) are gray, repeated three times; (h, w, 2) is gray and alpha, (h, w, 3) RGB, (h, w, 4) RGBA;
- (1 or 3 or 4, h, w) is channels first, when the last axis is not 1 to 4 long; xarray names its axes;
- alpha (straight, not premultiplied) is composited over white, and beyond the border all is white: the background of
  stained tissue is.
"""

from sthisto.images._image import Image
from sthisto.images._open import open_image
from sthisto.images._patches import patch_batches, sample_patches, visiting_order
from sthisto.images._tissue import check_scale, tissue_points

__all__ = ["Image", "check_scale", "open_image", "patch_batches", "sample_patches", "tissue_points", "visiting_order"]
