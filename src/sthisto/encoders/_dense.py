"""Features at any number of points from one pass a tile: the tissue is tiled once, and the points read its tokens.

An encoder that looks at a field of 112 um gives a token every 8 um. At one pass a point, a map of points 8 um apart
looks at every place of the tissue 200 times; here each place is looked at about twice, however many points there are.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sthisto.encoders import TokenEncoder
from sthisto.encoders._prefetch import ahead
from sthisto.images import Image, patch_batches, visiting_order

logger = logging.getLogger("sthisto")

# A tile is glass where the mean of each color is at least 200 and its deviation below 4, of 255. On the sections that
# were looked at, glass deviates by 1 to 3 (grain and JPEG), a tile with any tissue by 10 to 60.
GLASS, GRAIN = 200.0, 4.0
GLASS_STEP = 8  # colors of glass that are told apart


@dataclass(frozen=True)
class Tiling:
    """How square tiles lie over a picture and how a point reads their tokens.

    The lattice begins at the picture's corner, so that the features of a point depend on the picture alone and not on
    which other points are asked for: spots and grids agree, and grids asked for in parts fit together.

    Neighboring tiles overlap. There, the weight of one falls as that of the other rises,
    and both add up to 1: a token at the rim of its tile, which sees less of its surroundings, counts least, and no
    border shows. All tiles have their tokens at the places of one lattice, as the step is a whole number of tokens.

    Parameters
    ----------
    side
        Of a tile, full-resolution pixels.
    window
        Side of the square around a point whose tokens are averaged, full-resolution pixels. Tokens that it cuts count
        by the part inside, so that features change continuously with the place.
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
        """Along a tile's side."""
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

    def centres(self, tiles: NDArray[np.intp]) -> NDArray[np.float64]:
        """Centres (m, 2), full-resolution pixels, of tiles (m, 2), counted along x and y from the picture's corner."""
        return np.asarray(tiles * (self.step * self.unit) + self.side / 2)

    def reads(self, xy: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
        """Tiles (m, 2) that points (n, 2) need, row by row; and which point reads which tile, two index arrays (k,)."""
        low, high = self._window(xy)
        first = np.floor_divide(np.floor(low) - self.tokens, self.step).astype(np.intp) + 1
        last = np.floor_divide(np.ceil(high) - 1, self.step).astype(np.intp)
        across, down = (last - first).max(axis=0, initial=0) + 1
        points, tiles = [], []
        for x, y in np.ndindex(across, down):
            tile = first + np.array([x, y])
            reading = np.flatnonzero((tile <= last).all(axis=1))
            points.append(reading)
            tiles.append(tile[reading])
        needed, which = np.unique(np.concatenate(tiles)[:, ::-1], axis=0, return_inverse=True)
        return needed[:, ::-1], np.concatenate(points), which.ravel()

    def weights(self, xy: NDArray[np.float64], tile: NDArray[np.intp]) -> NDArray[np.float32]:
        """Weights (n, tokens ** 2) by which points (n, 2) read the tokens of a tile; over all tiles they sum to 1."""
        low, high = (edge[:, :, None] for edge in self._window(xy))
        places = (tile * self.step)[:, None] + np.arange(self.tokens)  # (2, tokens)
        inside = np.clip(np.minimum(high, places + 1) - np.maximum(low, places), 0, None) / (high - low)
        x, y = np.moveaxis(inside * self.taper, 1, 0)
        both: NDArray[np.float64] = y[:, :, None] * x[:, None, :]
        return both.reshape(len(xy), -1).astype(np.float32)

    def _window(self, xy: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lower and upper edges (n, 2) of the points' windows, in tokens from the picture's corner."""
        reach = self.window / 2
        # Rounded, or an edge on a token's border would sometimes take in a tile beyond it.
        return np.round((xy - reach) / self.unit, 6), np.round((xy + reach) / self.unit, 6)


class DenseTiles:
    """The tiles that the points need, read one batch after the other into the sums of the points.

    No map of tokens is held: the tokens of a tile are computed, read by all points near it and dropped. The features
    so far are the only state, so that work that was broken off goes on from them.
    """

    unit = "tile"

    def __init__(
        self, image: Image, xy: NDArray[np.float64], tiling: Tiling, encoder: TokenEncoder, batch_size: int
    ) -> None:
        self.image, self.xy, self.tiling, self.encoder, self.batch_size = image, xy, tiling, encoder, batch_size
        tiles, points, which = tiling.reads(xy)
        order = visiting_order(image, tiling.centres(tiles), tiling.side, tiling.input_size)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        self.tiles = tiles
        self.total = len(tiles)
        self.glass = 0  # tiles of glass so far
        self._readers = points[np.argsort(rank[which], kind="stable")]  # of the tiles as they are visited
        self._ends = np.concatenate([[0], np.cumsum(np.bincount(rank[which], minlength=len(tiles)))])
        self._flat: dict[tuple[int, ...], NDArray[np.float32]] = {}

    def steps(self, features: NDArray[np.float32], first: int) -> Iterator[tuple[int, NDArray[np.intp]]]:
        """Add to ``features`` (n, token_dim) what all tiles after the ``first`` say.

        Yields
        ------
        done, rows
            Tiles read so far, and the rows of ``features`` that the last batch changed.
        """
        tiling, done = self.tiling, first
        batches = patch_batches(
            self.image,
            tiling.centres(self.tiles),
            tiling.side,
            tiling.input_size,
            batch_size=self.batch_size,
            first=first,
        )
        for tiles, patches in ahead(batches):
            begin = done
            for tile, tokens in zip(tiles, self._tokens(patches), strict=True):
                readers = self._readers[self._ends[done] : self._ends[done + 1]]
                features[readers] += tiling.weights(self.xy[readers], self.tiles[tile]) @ tokens
                done += 1
            yield done, np.unique(self._readers[self._ends[begin] : self._ends[done]])
        logger.info("dense features: %d tiles for %d points, %d of them glass", done - first, len(self.xy), self.glass)

    def _tokens(self, patches: NDArray[np.uint8]) -> Iterator[NDArray[np.float32]]:
        """Tokens (tokens ** 2, token_dim) of each tile; glass is not worth a pass, and one flat tile stands for all."""
        mean, deviation = patches.mean(axis=(1, 2)), patches.std(axis=(1, 2), dtype=np.float32)
        glass = (mean >= GLASS).all(axis=1) & (deviation < GRAIN).all(axis=1)
        self.glass += int(glass.sum())
        tissue = iter(self._checked(patches[~glass]) if not glass.all() else ())
        for color, is_glass in zip(mean, glass, strict=True):
            yield self._of_glass(color) if is_glass else next(tissue)

    def _of_glass(self, mean: NDArray[np.float64]) -> NDArray[np.float32]:
        color = np.minimum(GLASS_STEP * np.rint(mean / GLASS_STEP), 255).astype(np.uint8)
        key = tuple(color.tolist())
        if key not in self._flat:
            input_size = self.encoder.input_size
            self._flat[key] = self._checked(np.tile(color, (1, input_size, input_size, 1)))[0]
        return self._flat[key]

    def _checked(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Tokens (n, tokens ** 2, token_dim); ValueError where the encoder gives others than it says."""
        tokens = np.asarray(self.encoder.tokens(patches))
        expected = (len(patches), self.tiling.tokens, self.tiling.tokens, self.encoder.token_dim)
        if tokens.shape != expected:
            raise ValueError(
                f"encoder {self.encoder.name!r} gave tokens of shape {tokens.shape} for {len(patches)} patches; "
                f"expected {expected}."
            )
        return tokens.astype(np.float32, copy=False).reshape(len(patches), -1, self.encoder.token_dim)
