"""Whether points and picture speak of the same pixels."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sthisto.images._image import Image
from sthisto.images._patches import as_points, sample_patches

_MARGIN = 0.01  # of the image's side: spots at the rim of a capture area may lie a little off the scan
_POINTS = 500  # as many points tell tissue from glass


def check_scale(image: Image, xy: ArrayLike) -> None:
    """Refuse points that cannot belong to the picture, and say what the likely mistake is.

    Coordinates of one image used on another, or with rows and columns exchanged, are the commonest failure of spatial
    tools, and a silent one: patches of glass still have features. Points up to 1 % of the image's side outside pass.
    Where the exchanged coordinates fit as well, tissue decides, and only if it is beyond doubt: more than 0.9 of the
    exchanged points on tissue (neither bright as glass nor black) against less than 0.5 of the points as given.

    Parameters
    ----------
    image
        The picture, or a thumbnail of it opened with its scale, which says the same at once.
    xy
        (n, 2) full-resolution pixels, x then y.

    Raises
    ------
    ValueError
        ``xy`` is not (n, 2) finite numbers; points lie outside the picture; points are (row, column).

    Examples
    --------
    >>> import numpy as np
    >>> hires = Image((np.zeros((200, 100, 3), np.uint8),), (1.0,), None, "")
    >>> check_scale(hires, [[50, 150], [90, 199]])
    >>> check_scale(hires, [[500, 1500], [900, 1990]])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: 2 of 2 points lie outside the image, which is 100 wide and 200 high ... at most 0.101.
    """
    points = as_points(xy)
    height, width = image.shape
    size = np.array([width, height])
    outside = int((~_fits(points, size)).sum())
    if outside:
        raise ValueError(_complaint(image, points, size, outside))
    if len(points) and _fits(points[:, ::-1], size).all():
        given, exchanged = _on_tissue(image, points)
        if given < 0.5 and exchanged > 0.9:
            msg = (
                f"{given:.0%} of the points lie on tissue, but {exchanged:.0%} with the two coordinates exchanged: xy "
                "looks like (row, column). Pass x first, xy[:, ::-1]."
            )
            raise ValueError(msg)


def _fits(points: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.bool_]:
    inside = (points >= -_MARGIN * size) & (points <= (1 + _MARGIN) * size)
    return np.logical_and(inside[:, 0], inside[:, 1])


def _complaint(image: Image, points: NDArray[np.float64], size: NDArray[np.float64], outside: int) -> str:
    """Say what is wrong in numbers, and the likeliest cause."""
    (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
    found = (
        f"{outside} of {len(points)} points lie outside the image, which is {size[0]:.6g} wide and {size[1]:.6g} high "
        f"in full-resolution pixels, at scale {image.scales[0]:.6g}: x is {x0:.6g} to {x1:.6g}, "
        f"y is {y0:.6g} to {y1:.6g}. "
    )
    if _fits(points[:, ::-1], size).all():
        return found + "It looks like (row, column): pass x first, xy[:, ::-1]."
    shrink = min(size / points.max(axis=0).clip(1e-9))
    if outside > len(points) / 2 and _fits(points * shrink, size).all():
        return found + (
            f"Multiplied by {shrink:.3g} or less they fit: it looks like a smaller copy of the image that the points "
            f"refer to, such as a hires image. Open it with scale=, its pixels per full-resolution pixel (for a hires "
            f"image tissue_hires_scalef), at most {shrink * image.scales[0]:.3g}."
        )
    return found + "Are they pixels of this image at full resolution, and was the image cropped?"


def _on_tissue(image: Image, points: NDArray[np.float64]) -> tuple[float, float]:
    """Share of points on tissue as given, and with x and y exchanged."""
    some = points[:: -(-len(points) // _POINTS)]
    side = max(image.shape) / 200
    colors = sample_patches(image, np.concatenate([some, some[:, ::-1]]), side, 1)[:, 0, 0]  # (2 n, 3), a mean each
    tissue = (colors.min(axis=1) < 200) & (colors.max(axis=1) > 40)
    return float(tissue[: len(some)].mean()), float(tissue[len(some) :].mean())
