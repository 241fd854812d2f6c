"""Where a picture shows tissue, for sections of which there is nothing but the picture."""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, label, uniform_filter

from sthisto.images._image import Image

DETAIL = 6  # pixels of the small picture per pitch: enough to say of a cell whether it is full
SMALL, LARGE = 200, 2000  # longer side of the small picture, pixels
GREY = 0.1  # (brightest - darkest color) / brightest, at most, of glass
LEAST_GLASS = 0.01  # share of a picture below which it shows none
STAINED = 0.85  # of the glass's darkest color: below it there is stain
BLACK = 40  # of the brightest color: the border of a scan
SPECK = 0.01  # share of all tissue below which a piece is dust


def tissue_points(image: Image, pitch: float) -> NDArray[np.float64]:
    """Lay a square grid of points over the tissue of a picture.

    A section that was only stained has no spots to refine, so its points come from the picture. Glass lets all colors
    through alike, however bright the lamp, and stain takes some of one away: what is grey tells how bright the glass
    is, and tissue is what is darker than that in at least one color. A picture without any grey is tissue throughout.
    Black is the border of a scan, pieces without color are shadows, and those below a hundredth of the tissue dust.

    Parameters
    ----------
    image
        The stained section.
    pitch
        Distance between neighboring points, full-resolution pixels.

    Returns
    -------
    (m, 2) full-resolution pixels, x then y, row by row: the sites of which half the cell or more is tissue.

    Raises
    ------
    ValueError
        ``pitch`` is not positive, the picture is no wider than it, or no tissue is found.

    Examples
    --------
    >>> from sthisto.images import open_image
    >>> pixels = np.full((80, 100, 3), 245, np.uint8)
    >>> pixels[20:60, 40:80] = [190, 120, 180]
    >>> tissue_points(open_image(pixels), 20.0).tolist()
    [[50.0, 30.0], [70.0, 30.0], [50.0, 50.0], [70.0, 50.0]]
    """
    height, width = image.shape
    if not (np.isfinite(pitch) and 0 < pitch <= min(height, width)):
        raise ValueError(
            f"pitch={pitch}: points lie some pixels apart, at most the {min(height, width):g} px there are."
        )
    small, scale = image.thumbnail(int(np.clip(max(height, width) * DETAIL / pitch, SMALL, LARGE)))
    share = uniform_filter(_tissue(small).astype(np.float32), max(1, round(pitch * scale)), mode="constant")
    rows, columns = np.indices((int(height // pitch), int(width // pitch))).reshape(2, -1)
    points = (np.column_stack([columns, rows]) + 0.5) * pitch
    x, y = np.minimum((points * scale).astype(np.intp), np.array(small.shape[1::-1]) - 1).T
    on_tissue = share[y, x] >= 0.5
    if not on_tissue.any():
        raise ValueError(
            f"no tissue in the picture {image.source or 'given'} of {width:g} x {height:g} px at points {pitch:.4g} px "
            "apart: is it the stained section, and brighter where there is none?"
        )
    return np.asarray(points[on_tissue], dtype=np.float64)


def _tissue(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Mask (h, w) of tissue in a small picture (h, w, 3)."""
    smooth = gaussian_filter(pixels.astype(np.float32), (1, 1, 0))
    darkest, brightest = smooth.min(axis=2), smooth.max(axis=2)
    scanned = brightest > BLACK
    chroma = (brightest - darkest) / np.maximum(brightest, 1)
    grey = scanned & (chroma <= GREY)
    glass = np.percentile(darkest[grey], 75) if grey.mean() >= LEAST_GLASS else np.inf
    tissue = scanned & (darkest < STAINED * glass)
    pieces, n = label(tissue)
    sizes = np.bincount(pieces.ravel(), minlength=n + 1)
    stained = np.bincount(pieces.ravel(), chroma.ravel()) > GREY * sizes
    kept = sizes >= SPECK * sizes[1:].sum()
    kept &= stained | ~stained[1:].any()  # shadows are grey; in a grey picture all is
    kept[0] = False
    return np.asarray(kept[pieces])
