"""Image features around any points: patches or tiles are cut, encoded and put in the order of the points.

Dense features come from one pass per tile. An encoder of 112 um patches gives a token every 8 um; at one pass per
point, a map of points 8 um apart would encode every part of the tissue 200 times, here each is encoded about twice,
whatever the number of points.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from sthisto.encoders._cache import FeatureCache, cache_settings
from sthisto.encoders._protocols import BATCH_SIZE, Encoder, TokenEncoder, checked_count, has_tokens
from sthisto.images import Image, patch_batches, visiting_order

logger = logging.getLogger("sthisto")

T = TypeVar("T")

# A tile is background where the mean of each color is at least 200 and its standard deviation below 4, of 255. On the
# sections examined, background deviates by 1 to 3 (noise and JPEG), a tile with any tissue by 10 to 60.
BACKGROUND, NOISE = 200.0, 4.0
BACKGROUND_STEP = 8  # background colors are rounded to multiples of this, and each is encoded once


def encode(
    image: Image,
    xy: NDArray[np.float64],  # (n, 2)
    side: float,
    encoder: Encoder,
    *,
    window: float | None = None,
    batch_size: int | None = None,
    cache: Path | None = None,
) -> NDArray[np.float32]:
    """Image features (n, d) around points; tqdm's ``TQDM_DISABLE`` turns the progress bar off.

    Parameters
    ----------
    image, xy
        The image, and the points in its full-resolution pixels.
    side
        Side of a patch or tile, full-resolution pixels.
    encoder
        Whose features; with ``window``, whose tokens.
    window
        ``None``: a patch is cut around every point. Else the image is tiled once, and a point's features are the mean
        token of the square of this side around it, full-resolution pixels.
    batch_size
        Patches or tiles encoded at once; the encoder's own where not given.
    cache
        Folder that keeps what is finished; made where it does not exist.

    Raises
    ------
    ValueError
        The encoder's features have another shape than it declares; ``window`` and an encoder without tokens; a cache
        of other settings.
    """
    batch_size = checked_count(
        "batch_size", getattr(encoder, "batch_size", BATCH_SIZE) if batch_size is None else batch_size
    )
    job: Job
    if window is None:
        dim, job = encoder.dim, Patches(image, xy, side, encoder, batch_size)
    else:
        if not has_tokens(encoder):
            raise ValueError(no_tokens(encoder))
        tiling = Tiling(side, window, encoder.input_size, encoder.stride)
        dim, job = encoder.token_dim, DenseTiles(image, xy, tiling, encoder, batch_size)
    features = np.zeros((len(xy), dim), dtype=np.float32)
    kept = None if cache is None else FeatureCache(cache, cache_settings(image, xy, side, window, encoder))
    first = kept.restore(features) if kept else 0
    with tqdm(total=job.total, initial=first, desc=f"{encoder.name} features", unit=job.unit) as bar:
        for done, rows in job.steps(features, first):
            if kept:
                kept.keep(features, rows, done, last=done == job.total)
            bar.update(done - bar.n)
    return features


def no_tokens(encoder: Encoder) -> str:
    """Message for an encoder that cannot give dense features."""
    return (
        f"dense=True needs an encoder with tokens (token_dim, stride, tokens(patches)), and {encoder.name!r} has none. "
        "Set dense=False, or use a vision transformer such as 'kaiko-s16'."
    )


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """Make the next item in a thread while the caller works on the last; their order is kept."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


class Job(Protocol):
    """Work done step by step that can be resumed."""

    unit: str  # what is counted
    total: int

    def steps(self, features: NDArray[np.float32], first: int) -> Iterator[tuple[int, NDArray[np.intp]]]:
        """Work on ``features`` (n, d) from unit ``first`` on; yield units done and rows changed after each batch."""


class Patches:
    """A patch cut around every point and encoded."""

    unit = "patch"

    def __init__(self, image: Image, xy: NDArray[np.float64], side: float, encoder: Encoder, batch_size: int) -> None:
        self.image, self.xy, self.side, self.encoder, self.batch_size = image, xy, side, encoder, batch_size
        self.total = len(xy)

    def steps(self, features: NDArray[np.float32], first: int) -> Iterator[tuple[int, NDArray[np.intp]]]:
        """Fill ``features`` (n, dim), batch by batch."""
        size, done = self.encoder.input_size, first
        batches = patch_batches(self.image, self.xy, self.side, size, batch_size=self.batch_size, first=first)
        for rows, patches in prefetch(batches):
            features[rows] = _checked(self.encoder(patches), (len(patches), self.encoder.dim), self.encoder, "features")
            done += len(rows)
            yield done, rows


@dataclass(frozen=True)
class Tiling:
    """Square tiles over an image, and the weights of their tokens at a point.

    The lattice of tiles begins at the image's corner, so that the features of a point depend on the image alone and not
    on which other points are asked for: spots and grids agree, and parts of a grid fit together.

    Neighboring tiles overlap. There the weight of one falls as that of the other rises, and both add up to 1: a token
    at the edge of its tile, which sees less of its surroundings, counts least, and no border shows. The step is a whole
    number of tokens, so that the tokens of all tiles share one lattice.

    Parameters
    ----------
    side
        Of a tile, full-resolution pixels.
    window
        Side of the square around a point whose tokens are averaged, full-resolution pixels. Tokens that it cuts count
        by the part inside, so that features change continuously with position.
    input_size, stride
        Of the encoder: pixels of a tile, and between its tokens.
    share
        Of a tile's side that its neighbor covers too, at most a half.
    """

    side: float
    window: float
    input_size: int
    stride: int
    share: float = 0.25

    @property
    def tokens(self) -> int:
        """Number along a tile's side."""
        return self.input_size // self.stride

    @property
    def overlap(self) -> int:
        """Tokens that neighboring tiles share."""
        return round(self.tokens * self.share)

    @property
    def step(self) -> int:
        """Tokens from one tile to the next."""
        return self.tokens - self.overlap

    @property
    def unit(self) -> float:
        """Side of a token, full-resolution pixels."""
        return self.side * self.stride / self.input_size

    @cached_property
    def taper(self) -> NDArray[np.float64]:
        """Weight (tokens,) of a tile's tokens along one side; those of neighboring tiles add up to 1."""
        rise = (np.arange(self.overlap) + 0.5) / max(self.overlap, 1)
        return np.concatenate([rise, np.ones(self.tokens - 2 * self.overlap), rise[::-1]])

    def centers(self, tiles: NDArray[np.intp]) -> NDArray[np.float64]:
        """Centers (m, 2), full-resolution pixels, of tiles (m, 2), counted along x and y from the image's corner."""
        return np.asarray(tiles * (self.step * self.unit) + self.side / 2)

    def reads(self, xy: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
        """Tiles (m, 2) that points (n, 2) need, row by row, and the pairs of point and tile, two index arrays (k,)."""
        low, high = self._window(xy)
        first = np.floor_divide(np.floor(low) - self.tokens, self.step).astype(np.intp) + 1
        last = np.floor_divide(np.ceil(high) - 1, self.step).astype(np.intp)
        across, down = (last - first).max(axis=0, initial=0) + 1
        points, tiles = [], []
        for x, y in np.ndindex(across, down):
            tile = first + np.array([x, y])
            readers = np.flatnonzero((tile <= last).all(axis=1))
            points.append(readers)
            tiles.append(tile[readers])
        distinct, which = np.unique(np.concatenate(tiles)[:, ::-1], axis=0, return_inverse=True)
        return distinct[:, ::-1], np.concatenate(points), which.ravel()

    def weights(self, xy: NDArray[np.float64], tile: NDArray[np.intp]) -> NDArray[np.float32]:
        """Weights (n, tokens ** 2) of a tile's tokens for points (n, 2); over all tiles they sum to 1."""
        low, high = (edge[:, :, None] for edge in self._window(xy))
        positions = (tile * self.step)[:, None] + np.arange(self.tokens)  # (2, tokens)
        inside = np.clip(np.minimum(high, positions + 1) - np.maximum(low, positions), 0, None) / (high - low)
        x, y = np.moveaxis(inside * self.taper, 1, 0)
        both: NDArray[np.float64] = y[:, :, None] * x[:, None, :]
        return both.reshape(len(xy), -1).astype(np.float32)

    def _window(self, xy: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lower and upper edges (n, 2) of the points' windows, in tokens from the image's corner."""
        half = self.window / 2
        # Rounded, or an edge on a token's border would sometimes include the tile beyond it.
        return np.round((xy - half) / self.unit, 6), np.round((xy + half) / self.unit, 6)


class DenseTiles:
    """The tiles that the points need, added to the features of the points one batch after the other.

    The tokens of a tile are computed, added to all points near it and dropped. The features so far are the only state,
    so that an interrupted job resumes from them.
    """

    unit = "tile"

    def __init__(
        self, image: Image, xy: NDArray[np.float64], tiling: Tiling, encoder: TokenEncoder, batch_size: int
    ) -> None:
        self.image, self.xy, self.tiling, self.encoder, self.batch_size = image, xy, tiling, encoder, batch_size
        tiles, points, which = tiling.reads(xy)
        order = visiting_order(image, tiling.centers(tiles), tiling.side, tiling.input_size)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        self.tiles = tiles
        self.total = len(tiles)
        self.n_background = 0  # tiles of background so far
        self._readers = points[np.argsort(rank[which], kind="stable")]  # of the tiles in the order of the visit
        self._ends = np.concatenate([[0], np.cumsum(np.bincount(rank[which], minlength=len(tiles)))])
        self._flat: dict[tuple[int, ...], NDArray[np.float32]] = {}

    def steps(self, features: NDArray[np.float32], first: int) -> Iterator[tuple[int, NDArray[np.intp]]]:
        """Add to ``features`` (n, token_dim) the tokens of all tiles after the ``first``.

        Yields
        ------
        done, rows
            Tiles done so far, and the rows of ``features`` that the last batch changed.
        """
        tiling, done = self.tiling, first
        centers, size = tiling.centers(self.tiles), tiling.input_size
        batches = patch_batches(self.image, centers, tiling.side, size, batch_size=self.batch_size, first=first)
        for tiles, patches in prefetch(batches):
            begin = done
            for tile, tokens in zip(tiles, self._tokens(patches), strict=True):
                readers = self._readers[self._ends[done] : self._ends[done + 1]]
                features[readers] += tiling.weights(self.xy[readers], self.tiles[tile]) @ tokens
                done += 1
            yield done, np.unique(self._readers[self._ends[begin] : self._ends[done]])
        logger.info(
            "dense features: %d tiles for %d points, %d of them background",
            done - first,
            len(self.xy),
            self.n_background,
        )

    def _tokens(self, patches: NDArray[np.uint8]) -> Iterator[NDArray[np.float32]]:
        """Tokens (tokens ** 2, token_dim) of each tile; background of one color is encoded once."""
        mean, deviation = patches.mean(axis=(1, 2)), patches.std(axis=(1, 2), dtype=np.float32)
        background = (mean >= BACKGROUND).all(axis=1) & (deviation < NOISE).all(axis=1)
        self.n_background += int(background.sum())
        tissue = iter(self._encoded(patches[~background]) if not background.all() else ())
        for color, is_background in zip(mean, background, strict=True):
            yield self._of_background(color) if is_background else next(tissue)

    def _of_background(self, mean: NDArray[np.float64]) -> NDArray[np.float32]:
        color = np.minimum(BACKGROUND_STEP * np.rint(mean / BACKGROUND_STEP), 255).astype(np.uint8)
        key = tuple(color.tolist())
        if key not in self._flat:
            input_size = self.encoder.input_size
            self._flat[key] = self._encoded(np.tile(color, (1, input_size, input_size, 1)))[0]
        return self._flat[key]

    def _encoded(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Tokens (n, tokens ** 2, token_dim)."""
        shape = (len(patches), self.tiling.tokens, self.tiling.tokens, self.encoder.token_dim)
        tokens = _checked(self.encoder.tokens(patches), shape, self.encoder, "tokens")
        return tokens.astype(np.float32, copy=False).reshape(len(patches), -1, self.encoder.token_dim)


def _checked(values: object, shape: tuple[int, ...], encoder: Encoder, what: str) -> NDArray[np.float32]:
    """Check the shape of an encoder's output: numpy would repeat a row or a column to fit."""
    array = np.asarray(values)
    if array.shape != shape:
        raise ValueError(
            f"encoder {encoder.name!r} gave {what} of shape {array.shape} for {shape[0]} patches; expected {shape}."
        )
    return array
