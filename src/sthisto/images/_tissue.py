"""Where an image shows tissue, and whether points can belong to it."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter, label, uniform_filter

from sthisto.images._image import Image
from sthisto.images._patches import as_points

DETAIL = 6  # pixels of the thumbnail per pitch: enough to decide whether a grid cell is full
SMALL, LARGE = 200, 2000  # longer side of the thumbnail, pixels
GRAY = 0.1  # (brightest - darkest color) / brightest, at most, of background
MIN_BACKGROUND = 0.01  # share of an image below which it shows none
STAINED = 0.85  # of the background's darkest color: below it there is stain
BLACK = 40  # of the brightest color: the border of a scan
COLORLESS = 20  # gray levels between the colors of a pixel, at most, of a gray image
SPECK = 0.01  # share of all tissue below which a piece is dust
MARGIN = 0.01  # of the image's side: spots at the border of a capture area may be a little outside the scan
NOISE = 8  # of 255: range of the colors of an image without content


def tissue_points(image: Image, pitch: float) -> NDArray[np.float64]:
    """Square grid of points on the tissue of an image.

    A section that was only stained has no spots to refine, so its points come from the image. Background transmits all
    colors equally, however bright the lamp, and stain absorbs some of them: the gray pixels give the brightness of the
    background, and tissue is darker than that in at least one color. An image without gray is tissue throughout. Black
    is the border of a scan, pieces without color are shadows, and those below a hundredth of the tissue dust.

    Parameters
    ----------
    image
        The stained section.
    pitch
        Distance between neighboring points, full-resolution pixels.

    Returns
    -------
    (m, 2) full-resolution pixels, x then y, row by row: the grid points whose cell is tissue by half or more.

    Raises
    ------
    ValueError
        ``pitch`` is not positive or larger than the image, or no tissue is found.

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
            f"pitch={pitch}: points are a positive distance apart, at most the {min(height, width):g} px of the image."
        )
    small, scale = image.thumbnail(int(np.clip(max(height, width) * DETAIL / pitch, SMALL, LARGE)))
    share = uniform_filter(_tissue_mask(small).astype(np.float32), max(1, round(pitch * scale)), mode="constant")
    rows, columns = np.indices((int(height // pitch), int(width // pitch))).reshape(2, -1)
    points = (np.column_stack([columns, rows]) + 0.5) * pitch
    x, y = np.minimum((points * scale).astype(np.intp), np.array(small.shape[1::-1]) - 1).T
    full = share[y, x] >= 0.5
    if not full.any():
        raise ValueError(
            f"no tissue in the image {image.source or 'given'} of {width:g} x {height:g} px at points every "
            f"{pitch:.4g} px. Is it the stained section, on a bright background?"
        )
    return np.asarray(points[full], dtype=np.float64)


def _tissue_mask(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Mask (h, w) of tissue in a thumbnail (h, w, 3)."""
    smooth = gaussian_filter(pixels.astype(np.float32), (1, 1, 0))
    darkest, brightest = smooth.min(axis=2), smooth.max(axis=2)
    scanned = brightest > BLACK
    chroma = (brightest - darkest) / np.maximum(brightest, 1)
    gray = scanned & (chroma <= GRAY)
    background = np.percentile(darkest[gray], 75) if gray.mean() >= MIN_BACKGROUND else np.inf
    tissue = scanned & (darkest < STAINED * background)
    pieces, n = label(tissue)
    sizes = np.bincount(pieces.ravel(), minlength=n + 1)
    stained = np.bincount(pieces.ravel(), chroma.ravel()) > GRAY * sizes
    kept = sizes >= SPECK * sizes[1:].sum()
    kept &= stained | ~stained[1:].any()  # shadows are gray; in a gray image all is
    kept[0] = False
    return np.asarray(kept[pieces])


def is_blank(image: Image) -> bool:
    """Whether an image shows nothing: one color throughout, up to noise.

    Examples
    --------
    >>> from sthisto.images import open_image
    >>> is_blank(open_image(np.full((80, 100, 3), 255, np.uint8)))
    True
    """
    small, _ = image.overview
    return bool(np.ptp(small, axis=(0, 1)).max() <= NOISE)  # channel by channel: opaque black has two values


def tissue_share(image: Image, xy: ArrayLike) -> float:
    """Share of points on tissue, by the mask that :func:`tissue_points` uses.

    Parameters
    ----------
    image
        The stained section.
    xy
        (n, 2) full-resolution pixels, x then y.

    Returns
    -------
    Number from 0 to 1, NaN without points; points outside the image are not on tissue.

    Examples
    --------
    >>> from sthisto.images import open_image
    >>> pixels = np.full((80, 100, 3), 245, np.uint8)
    >>> pixels[20:60, 40:80] = [190, 120, 180]
    >>> tissue_share(open_image(pixels), [[60, 40], [10, 10]])
    0.5
    """
    small, scale = image.overview
    return _share(_tissue_mask(small), scale, as_points(xy))


def check_tissue(image: Image, xy: ArrayLike, mpp: float | None = None) -> str:
    """Find signs that points belong to another place of the image: few on tissue, and more after a usual mistake.

    Parameters
    ----------
    image
        The stained section.
    xy
        (n, 2) full-resolution pixels, x then y.
    mpp
        Micrometers per full-resolution pixel, to recognize coordinates in micrometers.

    Returns
    -------
    What is wrong, for a warning or a report; empty where nothing is.

    Examples
    --------
    >>> from sthisto.images import open_image
    >>> pixels = np.full((80, 100, 3), 245, np.uint8)
    >>> pixels[10:30, 20:80] = [190, 120, 180]
    >>> check_tissue(open_image(pixels), [[30, 60], [50, 65], [70, 60]])  # y counted from the bottom
    '0% of the points are on tissue, but 100% with y counted from the bottom. Correct the coordinates.'
    """
    points, (small, scale) = as_points(xy), image.overview
    if np.ptp(small, axis=2).max() <= COLORLESS:  # tissue is recognized by its color
        return ""
    mask = _tissue_mask(small)
    share = _share(mask, scale, points)
    height, width = image.shape
    mistakes = {
        "y counted from the bottom": points * [1, -1] + [0, height],
        "x counted from the right": points * [-1, 1] + [width, 0],
        "coordinates in micrometers turned into pixels": points / (mpp or np.inf),
    }
    corrected = {mistake: _share(mask, scale, moved) for mistake, moved in mistakes.items()}
    best = max(corrected, key=corrected.__getitem__)
    if corrected[best] > 0.9 and corrected[best] > share + 0.2:
        return (
            f"{share:.0%} of the points are on tissue, but {corrected[best]:.0%} with {best}. Correct the coordinates."
        )
    if share < min(0.5, mask.mean()):  # fewer than of points at random
        return (
            f"{share:.0%} of the points are on tissue, which covers {mask.mean():.0%} of the image. Is it the image of "
            "this section, and are the coordinates its full-resolution pixels?"
        )
    return ""


def _share(mask: NDArray[np.bool_], scale: float, points: NDArray[np.float64]) -> float:
    """Share of points inside a mask."""
    padded = np.pad(mask, 1)
    x, y = np.clip(np.floor(points * scale).astype(np.intp) + 1, 0, np.array(padded.shape[::-1]) - 1).T
    return float(padded[y, x].mean()) if len(points) else float("nan")


def check_scale(image: Image, xy: ArrayLike) -> None:
    """Refuse points that cannot belong to the image, with the likely mistake.

    Coordinates of one image used on another, or with rows and columns exchanged, are a common failure of spatial tools,
    and a silent one: patches of background still have features. Points up to 1 % of the image's side outside pass.
    Where the exchanged coordinates fit as well, tissue decides if it is clear: more than 0.9 of the exchanged points on
    tissue (neither bright nor black) and less than 0.5 of the points as given.

    Parameters
    ----------
    image
        The image, or a thumbnail of it opened with its scale, which gives the same answer sooner.
    xy
        (n, 2) full-resolution pixels, x then y.

    Raises
    ------
    ValueError
        ``xy`` is not (n, 2) finite numbers; points outside the image; points are (row, column).

    Examples
    --------
    >>> import numpy as np
    >>> hires = Image((np.zeros((200, 100, 3), np.uint8),), (1.0,), None, "")
    >>> check_scale(hires, [[50, 150], [90, 199]])
    >>> check_scale(hires, [[500, 1500], [900, 1990]])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: 2 of 2 points are outside the image, which is 100 wide and 200 high ... at most 0.101.
    """
    points = as_points(xy)
    height, width = image.shape
    size = np.array([width, height])
    outside = int((~_fits(points, size)).sum())
    if outside:
        raise ValueError(_scale_message(image, points, size, outside))
    if len(points) and _fits(points[:, ::-1], size).all():
        given, exchanged = _on_tissue(image, points)
        if given < 0.5 and exchanged > 0.9:
            msg = (
                f"{given:.0%} of the points are on tissue, but {exchanged:.0%} with the two coordinates exchanged: xy "
                "seems to be (row, column). Pass x first, xy[:, ::-1]."
            )
            raise ValueError(msg)


def _fits(points: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.bool_]:
    inside = (points >= -MARGIN * size) & (points <= (1 + MARGIN) * size)
    return np.logical_and(inside[:, 0], inside[:, 1])


def _scale_message(image: Image, points: NDArray[np.float64], size: NDArray[np.float64], outside: int) -> str:
    """State what is wrong, in numbers, and the likeliest cause."""
    (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
    found = (
        f"{outside} of {len(points)} points are outside the image, which is {size[0]:.6g} wide and {size[1]:.6g} high "
        f"in full-resolution pixels, at scale {image.scales[0]:.6g}: x is {x0:.6g} to {x1:.6g}, "
        f"y is {y0:.6g} to {y1:.6g}. "
    )
    if _fits(points[:, ::-1], size).all():
        return found + "They seem to be (row, column): pass x first, xy[:, ::-1]."
    shrink = min(size / points.max(axis=0).clip(1e-9))
    if outside > len(points) / 2 and _fits(points * shrink, size).all():
        return found + (
            f"Multiplied by {shrink:.3g} or less they fit: this seems to be a smaller copy of the image that the "
            f"points refer to, such as a hires image. Open it with scale=, its pixels per full-resolution pixel (for a "
            f"hires image tissue_hires_scalef), at most {shrink * image.scales[0]:.3g}."
        )
    return found + "Are they pixels of this image at full resolution, and was the image cropped?"


def _on_tissue(image: Image, points: NDArray[np.float64]) -> tuple[float, float]:
    """Share of points on tissue, as given and with x and y exchanged."""
    small, scale = image.overview
    colors = uniform_filter(small.astype(np.float32), (3, 3, 0))
    stained = (colors.min(axis=2) < 200) & (colors.max(axis=2) > 40)  # neither bright nor black
    return _share(stained, scale, points), _share(stained, scale, points[:, ::-1])
