"""The hand-crafted encoder: what a microscopist would measure, without a download and without a GPU.

A patch is looked at twice: its middle at full sampling, where nuclei show, and the whole at half of it, for context.
Every feature is unchanged, but for rounding, by quarter turns and mirror images of the patch.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d, maximum_filter, uniform_filter
from scipy.spatial import KDTree
from scipy.special import entr

from sthisto.encoders import EncoderSpec, check_patches

Number = TypeVar("Number", np.uint16, np.float32)
Maps = NDArray[np.float32]  # (..., 128, 128) one value a pixel
Columns = dict[str, NDArray[np.float32]]  # feature name -> (n,)

FIELD = 256  # pixels; 2 um each at the default extent
MIDDLE = slice(FIELD // 4, FIELD - FIELD // 4)
WINDOWS = (16, 32, 64, 128)  # sides of the centred windows, pixels of either view
BLOCK = 8  # patches worked on at once: few enough that a block's maps stay in the cache
NUCLEUS = 0.05  # optical density by which a nucleus stands out from its surroundings
LEVELS = 8  # grey levels of the co-occurrence

# Rows are the optical densities of pure haematoxylin and eosin in red, green and blue (Ruifrok & Johnston 2001).
HAEMATOXYLIN_EOSIN = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])


class HandcraftedEncoder:
    """Colour, stain, texture and nuclei of H&E at several scales, as :class:`sthisto.encoders.Encoder`.

    Pathology image models need a download, often a licence, and are slow without a GPU; this encoder runs anywhere
    and always gives the same bits. The features, with lengths for the default extent of 512 um:

    - optical density of red, green and blue: mean and deviation in centred windows of 32, 64, 128, 256 and 512 um;
    - haematoxylin, eosin and darkness: mean gradient in the same windows, detail (deviation between neighbouring
      blocks of 2 to 32 um in the middle and 4 to 64 um in the whole), and tilt (difference between opposite halves);
    - haematoxylin in the middle 256 um: shares of local binary patterns and co-occurrence statistics;
    - nuclei: dark spots of smoothed haematoxylin: density, prominence, area and spacing.

    Parameters
    ----------
    threads
        Blocks of patches described at the same time; all processors where not given. It never changes the result.

    References
    ----------
    Ruifrok & Johnston 2001 (stains), Haralick et al. 1973 (co-occurrence), Ojala et al. 2002 (local binary patterns).

    Examples
    --------
    >>> import numpy as np
    >>> encoder = HandcraftedEncoder()
    >>> white = np.full((2, encoder.field, encoder.field, 3), 255, np.uint8)
    >>> encoder(white).shape == (2, encoder.dim)
    True
    >>> encoder.names[:2]
    ('mean_red_32', 'mean_red_64')
    """

    name = "handcrafted"
    field = FIELD
    patch_um = 512.0

    def __init__(self, *, threads: int | None = None) -> None:
        self.threads = threads or os.cpu_count() or 1
        self.names: tuple[str, ...] = tuple(_describe(np.full((1, FIELD, FIELD, 3), 255, np.uint8)))
        self.dim = len(self.names)

    def __call__(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (n, dim) float32 of RGB ``patches`` (n, field, field, 3) uint8; ValueError for another shape."""
        check_patches(patches, FIELD)
        features = np.empty((len(patches), self.dim), np.float32)

        def fill(start: int) -> None:
            rows = slice(start, start + BLOCK)
            features[rows] = np.stack(list(_describe(patches[rows]).values()), axis=1)

        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(fill, range(0, len(patches), BLOCK)))
        return features


def build(
    name: str, spec: EncoderSpec, *, weights: str | None, device: str | None, threads: int | None = None
) -> HandcraftedEncoder:
    """Make the encoder for :func:`sthisto.encoders.load`; it runs on the CPU whatever the device."""
    if weights is not None:
        raise ValueError(f"encoder {name!r} is computed, not learnt, and has no weights (got weights={weights!r})")
    return HandcraftedEncoder(threads=threads)


def _describe(patches: NDArray[np.uint8]) -> Columns:
    """All features of a few patches (n, 256, 256, 3), by name.

    Sums run in an order that depends on no other patch, so that a patch gives the same bits in any batch: hence the
    sums by halving instead of numpy's, and no matrix product.
    """
    pixels = np.moveaxis(patches, 3, 0).astype(np.uint16)  # (3, n, 256, 256)
    middle = stains(pixels[:, :, MIDDLE, MIDDLE] * 4)
    whole = stains(halve(pixels))
    nuclear = middle[3]
    return {
        **_colour(middle, whole),
        **_edges(middle, whole),
        **_detail(middle, "middle"),
        **_detail(whole, "whole"),
        **_tilt(whole),
        **_patterns(nuclear),
        **_cooccurrence(nuclear),
        **_nuclei(nuclear),
    }


def stains(fours: NDArray[np.uint16]) -> Maps:
    """Optical density (6, n, h, w) of red, green, blue, haematoxylin, eosin and their mean darkness.

    ``fours`` (3, n, h, w) are RGB values times four (sums over 2 x 2 pixels): integers, so that a table replaces the
    logarithm, the dearest step otherwise. White has density 0, black 2.41. The residual of the unmixing is at right
    angles to both stains.
    """
    vectors = HAEMATOXYLIN_EOSIN / np.linalg.norm(HAEMATOXYLIN_EOSIN, axis=1, keepdims=True)
    residual = np.cross(*vectors)
    unmix = np.linalg.inv([*vectors, residual / np.linalg.norm(residual)]).astype(np.float32)
    table = -np.log10((np.arange(4 * 255 + 1) / 4 + 1) / 256).astype(np.float32)
    red, green, blue = table[fours]
    haematoxylin, eosin = (red * unmix[0, k] + green * unmix[1, k] + blue * unmix[2, k] for k in (0, 1))
    return np.stack([red, green, blue, haematoxylin, eosin, (red + green + blue) / np.float32(3)])


def halve(maps: NDArray[Number]) -> NDArray[Number]:
    """Add up blocks of 2 x 2 pixels: (..., h, w) to (..., h / 2, w / 2)."""
    rows = maps[..., 0::2, :] + maps[..., 1::2, :]
    halved: NDArray[Number] = rows[..., 0::2] + rows[..., 1::2]
    return halved


def window_means(maps: Maps, sides: tuple[int, ...]) -> NDArray[np.float32]:
    """Means (..., len(sides)) over centred windows whose sides are powers of two of at least 16 pixels."""
    blocks = halve(halve(halve(maps)))
    centre = blocks.shape[-1] // 2
    means = []
    for side in sides:
        reach = slice(centre - side // 16, centre + side // 16)
        total = blocks[..., reach, reach]
        while total.shape[-1] > 1:
            total = halve(total)
        means.append(total[..., 0, 0] / np.float32(side**2))
    return np.stack(means, axis=-1)


def gradient(maps: Maps) -> Maps:
    """Length of the central-difference gradient per pixel; 0 along the border."""
    steps = np.zeros_like(maps)
    across = maps[..., 1:-1, 2:] - maps[..., 1:-1, :-2]
    down = maps[..., 2:, 1:-1] - maps[..., :-2, 1:-1]
    steps[..., 1:-1, 1:-1] = np.sqrt(across * across + down * down) / np.float32(2)
    return steps


def _colour(middle: Maps, whole: Maps) -> Columns:
    """Mean and deviation of the optical density of red, green and blue in windows."""
    mean, square = (_in_windows(middle[:3] ** power, whole[:3] ** power) for power in (1, 2))
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    colours = ("red", "green", "blue")
    return {**_named("mean", colours, mean), **_named("deviation", colours, deviation)}


def _edges(middle: Maps, whole: Maps) -> Columns:
    """Mean gradient of haematoxylin, eosin and darkness in windows."""
    means = _in_windows(gradient(middle[3:]), gradient(whole[3:]))
    return _named("gradient", ("haematoxylin", "eosin", "darkness"), means)


def _in_windows(middle: Maps, whole: Maps) -> NDArray[np.float32]:
    """Window means (c, n, 5) of both views."""
    return np.concatenate([window_means(middle, WINDOWS), window_means(whole, WINDOWS[-1:])], axis=-1)


def _named(what: str, channels: tuple[str, ...], values: NDArray[np.float32]) -> Columns:
    """Columns from values (c, n, 5), named by channel and by the window's side in um at the default extent."""
    sides = (32, 64, 128, 256, 512)
    return {
        f"{what}_{channel}_{side}": values[c, :, k]
        for c, channel in enumerate(channels)
        for k, side in enumerate(sides)
    }


def _detail(view: Maps, where: str) -> Columns:
    """Deviation between neighbouring blocks, scale by scale: the variance that each halving of the map removes."""
    level = view[3:]
    power = window_means(level * level, WINDOWS[-1:])[..., 0]
    columns: Columns = {}
    for scale in range(5):
        level = halve(level) / np.float32(4)
        square = level * level
        while square.shape[-1] > 1:
            square = halve(square) / np.float32(4)
        left = square[..., 0, 0]
        lost = np.sqrt(np.maximum(power - left, 0))
        power = left
        for c, channel in enumerate(("haematoxylin", "eosin", "darkness")):
            columns[f"detail_{channel}_{where}_{2**scale}"] = lost[c]
    return columns


def _tilt(whole: Maps) -> Columns:
    """How much opposite halves of the patch differ, whichever way: borders between tissues pass nearby."""
    quarters = whole[3:]
    while quarters.shape[-1] > 2:
        quarters = halve(quarters) / np.float32(4)
    top, bottom = quarters[..., 0, :].sum(-1), quarters[..., 1, :].sum(-1)
    left, right = quarters[..., 0].sum(-1), quarters[..., 1].sum(-1)
    tilt = np.sqrt(np.hypot(top - bottom, left - right) / np.float32(2))  # the root: few patches hold a border
    return {f"tilt_{channel}": tilt[c] for c, channel in enumerate(("haematoxylin", "eosin", "darkness"))}


def binary_patterns(maps: Maps, radius: int, tolerance: float) -> NDArray[np.uint8]:
    """Rotation-invariant uniform local binary patterns of maps (n, h, w), border of ``radius`` pixels left out.

    0 to 8: so many of the 8 neighbours, in one run, exceed the pixel by ``tolerance``; 9: in several runs.
    """
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    runs = (bits != np.roll(bits, 1, axis=1)).sum(1)
    table = np.where(runs <= 2, bits.sum(1), 9).astype(np.uint8)
    height, width = maps.shape[1] - 2 * radius, maps.shape[2] - 2 * radius
    bound = maps[:, radius : radius + height, radius : radius + width] + np.float32(tolerance)
    code = np.zeros(bound.shape, np.uint8)
    clockwise = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))
    for bit, (row, column) in enumerate(clockwise):
        y, x = row * radius, column * radius
        code |= (maps[:, y : y + height, x : x + width] >= bound).view(np.uint8) << np.uint8(bit)
    return np.asarray(table[code])


def _patterns(nuclear: Maps) -> Columns:
    """Shares of the kinds of local binary pattern; roots, as shares are compared by the Hellinger distance."""
    codes = binary_patterns(nuclear, radius=2, tolerance=0.01)
    share = _histogram(codes, 10) / codes[0].size
    kinds = {"peak": [0], "corner": [1, 2, 6, 7], "edge": [3, 4, 5], "pit": [8], "rough": [9]}
    return {f"pattern_{kind}": np.sqrt(share[:, columns].sum(1)).astype(np.float32) for kind, columns in kinds.items()}


def _histogram(values: NDArray[np.integer], bins: int) -> NDArray[np.intp]:
    """Count the values (n, h, w), all below ``bins``, of each patch: (n, bins)."""
    patch = np.arange(len(values))[:, None, None] * bins
    return np.bincount((values + patch).ravel(), minlength=len(values) * bins).reshape(len(values), bins)


def cooccurrence(levels: NDArray[np.uint8], distance: int) -> NDArray[np.float64]:
    """Symmetric co-occurrence (n, 8, 8) of levels (n, h, w) at a distance across and down; each sums to 1."""
    across = levels[:, :, :-distance] * LEVELS + levels[:, :, distance:]
    down = levels[:, :-distance] * LEVELS + levels[:, distance:]
    pairs = (_histogram(across, LEVELS**2) + _histogram(down, LEVELS**2)).reshape(-1, LEVELS, LEVELS)
    pairs = pairs + pairs.transpose(0, 2, 1)
    total: NDArray[np.intp] = pairs.sum((1, 2), keepdims=True)
    return pairs / total


def _cooccurrence(nuclear: Maps) -> Columns:
    """Homogeneity, correlation and entropy of co-occurring haematoxylin levels, near and far."""
    # Levels are equal steps of the root: most tissue is faint, and strong stain needs less resolution.
    levels = np.minimum(np.sqrt(np.clip(nuclear, 0, 1)) * LEVELS, LEVELS - 1).astype(np.uint8)
    grade = np.arange(LEVELS)
    apart = grade[:, None] - grade
    columns: Columns = {}
    for distance in (2, 8):
        pairs = cooccurrence(levels, distance)
        marginal = pairs.sum(2)
        mean = (marginal * grade).sum(1)
        variance = (marginal * grade**2).sum(1) - mean**2
        covariance = (pairs * np.multiply.outer(grade, grade)).sum((1, 2)) - mean**2
        values = {
            "homogeneity": (pairs / (1 + apart**2)).sum((1, 2)),
            "correlation": covariance / (variance + 0.05),  # 0 where there is nothing to correlate
            "entropy": entr(pairs).sum((1, 2)),
        }
        columns |= {f"{what}_{distance}": value.astype(np.float32) for what, value in values.items()}
    return columns


def nuclei(haematoxylin: Maps) -> tuple[NDArray[np.bool_], Maps]:
    """Centres of nuclei (n, h, w), and how far the smoothed stain is above the mean of the 25 pixels around.

    A centre is the darkest pixel of the 5 x 5 around it. At 2 um a pixel that separates nuclei 5 um apart.
    """
    smooth = haematoxylin
    for axis in (1, 2):
        smooth = correlate1d(smooth, (0.0625, 0.25, 0.375, 0.25, 0.0625), axis=axis, mode="nearest")
    above = smooth - uniform_filter(smooth, 25, axes=(1, 2), mode="nearest")
    centres = (smooth == maximum_filter(smooth, 5, axes=(1, 2), mode="nearest")) & (above > NUCLEUS)
    return centres, above


def _nuclei(nuclear: Maps) -> Columns:
    """Density and prominence of nuclei in the middle 128 and 256 um, their area and their spacing in 256 um."""
    centres, above = nuclei(nuclear)
    sides = WINDOWS[-2:]
    density = window_means(centres.astype(np.float32), sides)
    prominence = window_means(np.where(centres, above, np.float32(0)), sides) / (density + np.float32(1e-4))
    area = window_means((above > NUCLEUS).astype(np.float32), sides[-1:])[:, 0]
    columns = {"nuclei_area": area, "nuclei_spacing": np.array([_spacing(c) for c in centres], np.float32)}
    for k, side in enumerate((128, 256)):
        columns[f"nuclei_density_{side}"] = np.sqrt(density[:, k])  # the root evens out the scatter of counts
        columns[f"nuclei_prominence_{side}"] = prominence[:, k]
    return columns


def _spacing(centres: NDArray[np.bool_]) -> float:
    """Log of the mean distance in pixels from a nucleus to the nearest other; that of the window where it has none."""
    places = np.argwhere(centres)
    if len(places) < 2:
        return float(np.log(len(centres)))
    return float(np.log(KDTree(places).query(places, k=2)[0][:, 1].mean()))
