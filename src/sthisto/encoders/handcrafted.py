"""The hand-crafted encoder: color, stain, texture and nuclei of H&E, without a download and without a GPU.

Two views of a patch are used: its middle at full sampling, where nuclei are resolved, and the whole at half of it, for
context. Every feature is invariant, up to rounding, under rotations by 90 degrees and reflections of the patch.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter
from scipy.spatial.distance import cdist

from sthisto.encoders._protocols import BATCH_SIZE, check_patches, checked_count
from sthisto.encoders._registry import EncoderSpec

Number = TypeVar("Number", np.uint16, np.float32)
Maps = NDArray[np.float32]  # (..., 128, 128) one value per pixel
Columns = dict[str, NDArray[np.float32]]  # feature name -> (n,)

INPUT_SIZE = 256  # pixels; 2 um each at the default extent
MIDDLE = slice(INPUT_SIZE // 4, INPUT_SIZE - INPUT_SIZE // 4)
WINDOWS = (16, 32, 64, 128)  # sides of the centered windows, pixels of either view
BLOCK = 8  # patches computed at once: enough for numpy, few enough for the processor's cache
NUCLEUS = 0.05  # optical density by which a nucleus stands out from its surroundings
BINOMIAL = 8  # steps of the smoothing filter: less, and a nucleus has several darkest pixels
LEVELS = 8  # gray levels of the co-occurrence

# The maps of a view, in order.
CHANNELS: tuple[str, ...] = ("red", "green", "blue", "chroma", "haematoxylin", "eosin", "darkness")
_VIEW = (len(CHANNELS), BLOCK, INPUT_SIZE // 2, INPUT_SIZE // 2)
COLORS, STAINS, TEXTURED = slice(3), slice(4, 6), slice(4, 7)
NUCLEAR = 4  # haematoxylin

# Rows are the optical densities of pure haematoxylin and eosin in red, green and blue (Ruifrok & Johnston 2001).
HAEMATOXYLIN_EOSIN = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
_PURE = HAEMATOXYLIN_EOSIN / np.linalg.norm(HAEMATOXYLIN_EOSIN, axis=1, keepdims=True)
_RESIDUAL = np.cross(*_PURE)
UNMIX = np.linalg.inv([*_PURE, _RESIDUAL / np.linalg.norm(_RESIDUAL)]).T[:2].astype(np.float32)  # (2, 3): stain, color
DENSITY = -np.log10((np.arange(4 * 255 + 1) / 4 + 1) / 256).astype(np.float32)  # by four times the value


class HandcraftedEncoder:
    """Color, stain, texture and nuclei of H&E at several scales, as :class:`sthisto.encoders.Encoder`.

    Pathology image models need a download, often a license, and are slow without a GPU; this encoder runs anywhere
    and always gives the same bits. The features, with lengths for the default extent of 512 um:

    - optical density in centered windows of 32, 64, 128, 256 and 512 um: mean and deviation of red, green and blue,
      mean of haematoxylin, eosin and chroma (the range over the colors);
    - haematoxylin, eosin and darkness: mean gradient in the same windows, multiscale contrast (deviation between
      neighboring blocks of 2 to 32 um in the middle and 4 to 64 um in the whole), and asymmetry (difference between
      opposite halves);
    - haematoxylin in the middle 256 um: shares of local binary patterns and correlation of co-occurring levels;
    - nuclei, the dark spots of smoothed haematoxylin: density, area and spacing.

    Parameters
    ----------
    threads
        Blocks of patches encoded at the same time; all processors where not given. It never changes the result.
    batch_size
        Patches that verbs cut and encode at once.

    Attributes
    ----------
    names
        Name of each feature.
    dim, input_size, patch_um
        As in :class:`sthisto.encoders.Encoder`: 102 features of 256 pixels, 512 um.

    References
    ----------
    Ruifrok & Johnston 2001 (stains), Haralick et al. 1973 (co-occurrence), Ojala et al. 2002 (local binary patterns).

    Examples
    --------
    >>> import numpy as np
    >>> encoder = HandcraftedEncoder()
    >>> white = np.full((2, encoder.input_size, encoder.input_size, 3), 255, np.uint8)
    >>> encoder(white).shape == (2, encoder.dim)
    True
    >>> encoder.names[:2]
    ('mean_red_32', 'mean_red_64')
    """

    name = "handcrafted"
    input_size = INPUT_SIZE
    patch_um = 512.0

    def __init__(self, *, threads: int | None = None, batch_size: int = BATCH_SIZE) -> None:
        self.threads = (os.cpu_count() or 1) if threads is None else checked_count("threads", threads)
        self.batch_size = batch_size
        self.names: tuple[str, ...] = tuple(
            _features(np.full((1, INPUT_SIZE, INPUT_SIZE, 3), 255, np.uint8), np.empty((2, *_VIEW), np.float32))
        )
        self.dim = len(self.names)

    def __call__(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (n, dim) float32 of RGB ``patches`` (n, input_size, input_size, 3) uint8."""
        check_patches(patches, INPUT_SIZE)
        features = np.empty((len(patches), self.dim), np.float32)

        def fill(first: int) -> None:
            views = np.empty((2, *_VIEW), np.float32)  # reused, as new memory costs as much as the arithmetic
            for start in range(first * BLOCK, len(patches), self.threads * BLOCK):
                rows = slice(start, start + BLOCK)
                features[rows] = np.stack(list(_features(patches[rows], views).values()), axis=1)

        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(fill, range(self.threads)))
        return features


def build(name: str, spec: EncoderSpec, **options: Any) -> HandcraftedEncoder:
    """Make the encoder for :func:`sthisto.encoders.load`; it runs on the CPU whatever the device."""
    if "weights" in options:
        raise ValueError(f"encoder {name!r} is computed and has no weights; found weights={options['weights']!r}.")
    unknown = sorted(set(options) - {"threads", "batch_size", "device"})
    if unknown:
        raise TypeError(f"encoder {name!r} takes threads and batch_size; found {', '.join(unknown)}.")
    return HandcraftedEncoder(**{key: value for key, value in options.items() if key != "device"})


def _features(patches: NDArray[np.uint8], views: Maps) -> Columns:
    """All features of up to ``BLOCK`` patches (n, 256, 256, 3), by name; their maps are written to ``views``."""
    # The order of every sum depends on no other patch, so that a patch gives the same bits in any batch: hence sums by
    # halving, along contiguous rows or of whole numbers, and no matrix product.
    rows = np.add(patches[:, 0::2], patches[:, 1::2], dtype=np.uint16)
    middle, whole = views[:, :, : len(patches)]
    stains(np.stack([rows[:, :, 0::2, c] + rows[:, :, 1::2, c] for c in range(3)]), whole)
    stains(np.stack([patches[:, MIDDLE, MIDDLE, c] for c in range(3)]) * np.uint16(4), middle)
    nuclear = middle[NUCLEAR]
    return {
        **_color(middle, whole),
        **_gradient(middle, whole),
        **_contrast(middle, "middle"),
        **_contrast(whole, "whole"),
        **_asymmetry(whole),
        **_patterns(nuclear),
        **_cooccurrence(nuclear),
        **_nuclei(nuclear),
    }


def stains(fours: NDArray[np.uint16], density: Maps) -> None:
    """Write optical density (7, n, h, w) of :data:`CHANNELS`: chroma is its range over the colors, darkness its mean.

    ``fours`` (3, n, h, w) are RGB values times four (sums over 2 x 2 pixels): integers, so that a table replaces the
    logarithm. White has density 0, black 2.41. The residual of the unmixing is orthogonal to both stains.
    """
    for channel in range(3):
        np.take(DENSITY, fours[channel], out=density[channel], mode="clip")  # "raise" would copy
    red, green, blue, chroma, _, _, darkness = density
    buffer = np.empty_like(red)
    np.maximum(red, green, out=chroma)
    np.maximum(chroma, blue, out=chroma)
    np.minimum(red, green, out=buffer)
    chroma -= np.minimum(buffer, blue, out=buffer)
    for stain, weights in zip(density[STAINS], UNMIX, strict=True):
        np.multiply(red, weights[0], out=stain)
        np.add(stain, np.multiply(green, weights[1], out=buffer), out=stain)
        np.add(stain, np.multiply(blue, weights[2], out=buffer), out=stain)
    np.add(red, green, out=darkness)
    darkness += blue
    darkness *= np.float32(1 / 3)


def block_sums(maps: NDArray[Number], side: int) -> NDArray[Number]:
    """Sum over blocks of ``side`` x ``side`` pixels: (..., h, w) to (..., h / side, w / side)."""
    rows = maps[..., 0::side, :] + maps[..., 1::side, :]
    for k in range(2, side):
        rows += maps[..., k::side, :]
    sums: NDArray[Number] = rows[..., 0::side] + rows[..., 1::side]
    for k in range(2, side):
        sums += rows[..., k::side]
    return sums


def window_means(maps: Maps, sides: tuple[int, ...]) -> NDArray[np.float32]:
    """Means (..., len(sides)) over centered windows whose sides are powers of two of at least 16 pixels."""
    blocks = block_sums(maps, 8)
    center = blocks.shape[-1] // 2
    means = []
    for side in sides:
        window = slice(center - side // 16, center + side // 16)
        total = blocks[..., window, window]
        while total.shape[-1] > 1:
            total = block_sums(total, 2)
        means.append(total[..., 0, 0] / np.float32(side**2))
    return np.stack(means, axis=-1)


def gradient_magnitude(maps: Maps) -> Maps:
    """Twice the length of the gradient, by central differences; 0 along the border."""
    across = maps[..., 1:-1, 2:] - maps[..., 1:-1, :-2]
    down = maps[..., 2:, 1:-1] - maps[..., :-2, 1:-1]
    across *= across
    down *= down
    across += down
    length = np.zeros_like(maps)
    np.sqrt(across, out=length[..., 1:-1, 1:-1])
    return length


def _color(middle: Maps, whole: Maps) -> Columns:
    """Mean optical densities in windows, and the deviation of those of the colors."""
    mean = _in_windows(middle[:4], whole[:4])
    red, green, blue, _ = mean
    stained = np.stack([red * r + green * g + blue * b for r, g, b in UNMIX])
    square = _in_windows(np.square(middle[COLORS]), np.square(whole[COLORS]))
    deviation = np.sqrt(np.maximum(square - mean[COLORS] ** 2, 0))
    return {
        **_named("mean", CHANNELS[:6], np.concatenate([mean, stained])),
        **_named("deviation", CHANNELS[COLORS], deviation),
    }


def _gradient(middle: Maps, whole: Maps) -> Columns:
    """Mean gradient of haematoxylin, eosin and darkness in windows."""
    twice = _in_windows(gradient_magnitude(middle[TEXTURED]), gradient_magnitude(whole[TEXTURED]))
    return _named("gradient", CHANNELS[TEXTURED], twice / np.float32(2))


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


def _contrast(view: Maps, where: str) -> Columns:
    """Multiscale contrast: root of the variance that is lost when blocks become twice as large."""
    level = view[TEXTURED]
    power = window_means(np.square(level), WINDOWS[-1:])[..., 0]
    columns: Columns = {}
    for scale in range(5):
        level = coarsen(level, scale)
        flat = level.reshape(-1, level.shape[-1] ** 2)
        coarse = np.einsum("ki,ki->k", flat, flat).reshape(power.shape) / np.float32(flat.shape[1])
        contrast = np.sqrt(np.maximum(power - coarse, 0))
        power = coarse
        for c, channel in enumerate(CHANNELS[TEXTURED]):
            columns[f"contrast_{channel}_{where}_{2**scale}"] = contrast[c]
    return columns


def coarsen(means: Maps, scale: int) -> Maps:
    """Means of blocks of ``2 ** (scale + 1)`` pixels from those half as large.

    Blocks of 8 pixels and more overlap, at a distance of 4 pixels: few large blocks that do not overlap would leave
    their borders in a dense map.
    """
    if scale < 2:
        return block_sums(means, 2) / np.float32(4)
    shift = 2 ** (scale - 2)
    means = means[..., :-shift, :] + means[..., shift:, :]
    return (means[..., :-shift] + means[..., shift:]) / np.float32(4)


def _asymmetry(whole: Maps) -> Columns:
    """Difference between opposite halves of the patch, in any direction: large near borders between tissues."""
    quarters = whole[TEXTURED]
    while quarters.shape[-1] > 2:
        quarters = block_sums(quarters, 2) / np.float32(4)
    top, bottom = quarters[..., 0, :].sum(-1), quarters[..., 1, :].sum(-1)
    left, right = quarters[..., 0].sum(-1), quarters[..., 1].sum(-1)
    asymmetry = np.sqrt(np.hypot(top - bottom, left - right) / np.float32(2))  # the root: few patches hold a border
    return {f"asymmetry_{channel}": asymmetry[c] for c, channel in enumerate(CHANNELS[TEXTURED])}


def binary_patterns(maps: Maps, radius: int, tolerance: float) -> NDArray[np.uint8]:
    """Rotation-invariant uniform local binary patterns of maps (n, h, w), border of ``radius`` pixels left out.

    0 to 8: number of the 8 neighbors that exceed the pixel by ``tolerance``, in one run; 9: in several runs.
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
    """Shares of the kinds of local binary patterns; roots, as in the Hellinger distance."""
    codes = binary_patterns(nuclear, radius=2, tolerance=0.01)
    share = np.stack([np.bincount(code.ravel(), minlength=10) for code in codes]) / codes[0].size
    kinds = {"peak": [0], "corner": [1, 2, 6, 7], "edge": [3, 4, 5]}
    return {f"pattern_{kind}": np.sqrt(share[:, columns].sum(1)).astype(np.float32) for kind, columns in kinds.items()}


def _cooccurrence(nuclear: Maps) -> Columns:
    """Correlation of co-occurring haematoxylin levels at 2 and 8 pixels."""
    # Levels are equal steps of the root: most tissue is faint, and strong stain needs less resolution.
    levels = np.sqrt(np.clip(nuclear, 0, 1))
    levels *= LEVELS
    np.minimum(np.floor(levels, out=levels), LEVELS - 1, out=levels)
    return {f"cooccurrence_{distance}": correlation(levels, distance) for distance in (2, 8)}


def correlation(levels: Maps, distance: int) -> NDArray[np.float32]:
    """Correlation (n,) of co-occurring levels (n, h, w), whole numbers from 0 to 7, at a distance across and down."""
    height, width = (np.arange(side) for side in levels.shape[1:])
    partners = [1.0 * (index >= distance) + (index < len(index) - distance) for index in (height, width)]
    times = np.add.outer(*partners).astype(np.float32)  # (h, w): number of pairs in which a pixel is the first
    total = times.sum(dtype=float)
    mean = np.einsum("nij,ij->n", levels, times) / total
    variance = np.einsum("nij,ij->n", np.square(levels), times) / total - mean**2
    across = np.einsum("nij,nij->n", levels[:, :, :-distance], levels[:, :, distance:])
    down = np.einsum("nij,nij->n", levels[:, :-distance], levels[:, distance:])
    covariance = 2 * (across + down) / total - mean**2
    # The constant makes it 0 where the levels do not vary.
    return np.asarray(covariance / (variance + 0.05), np.float32)


def nuclei(haematoxylin: Maps) -> tuple[NDArray[np.bool_], Maps]:
    """Centers of nuclei (n, h, w), and the smoothed stain above its mean over 25 x 25 pixels.

    A center is the darkest pixel of the 5 x 5 around it, and exceeds the mean by more than :data:`NUCLEUS`.
    """
    # Written out, as ndimage's correlate1d and maximum_filter take several times as long.
    smooth = np.pad(
        haematoxylin * np.float32(1 / 2 ** (2 * BINOMIAL)), [(0, 0), *[(BINOMIAL // 2, BINOMIAL // 2)] * 2], mode="edge"
    )
    for _ in range(BINOMIAL):
        smooth = smooth[:, :-1] + smooth[:, 1:]
    for _ in range(BINOMIAL):
        smooth = smooth[:, :, :-1] + smooth[:, :, 1:]
    above = smooth - uniform_filter(smooth, 25, axes=(1, 2), mode="nearest")
    peak = np.pad(smooth, ((0, 0), (2, 2), (2, 2)), mode="edge")
    for shift in (1, 2, 1):  # the greatest of 2, of 4, of 5
        peak = np.maximum(peak[:, :-shift], peak[:, shift:])
    for shift in (1, 2, 1):
        peak = np.maximum(peak[:, :, :-shift], peak[:, :, shift:])
    centers = (smooth == peak) & (above > NUCLEUS)
    return centers, above


def _nuclei(nuclear: Maps) -> Columns:
    """Density of nuclei in the middle 128 and 256 um, their area and their spacing in 256 um."""
    centers, above = nuclei(nuclear)
    density = np.sqrt(
        window_means(centers.astype(np.float32), WINDOWS[-2:])
    )  # the root stabilizes the variance of counts
    return {
        "nuclei_density_128": density[:, 0],
        "nuclei_density_256": density[:, 1],
        "nuclei_area": window_means((above > NUCLEUS).astype(np.float32), WINDOWS[-1:])[:, 0],
        "nuclei_spacing": np.array([_spacing(mask) for mask in centers], np.float32),
    }


def _spacing(centers: NDArray[np.bool_]) -> float:
    """Log of the mean distance to the nearest other nucleus, pixels; of the window's side where there is none."""
    positions = np.column_stack(np.divmod(np.flatnonzero(centers), centers.shape[1])).astype(float)
    if len(positions) < 2:
        return float(np.log(len(centers)))
    distances = cdist(positions, positions)
    np.fill_diagonal(distances, np.inf)
    return float(np.log(distances.min(0).mean()))
