"""Features of the tissue around any points: patches or tiles cut, described and put back in the order of the points."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from sthisto.encoders import Encoder, has_tokens
from sthisto.encoders._cache import FeatureCache, settings_of
from sthisto.encoders._dense import DenseTiles, Tiling
from sthisto.encoders._prefetch import ahead
from sthisto.images import Image, patch_batches


class Work(Protocol):
    """Something done step by step that can go on where it was broken off."""

    unit: str  # what is counted
    total: int

    def steps(self, features: NDArray[np.float32], first: int) -> Iterator[tuple[int, NDArray[np.intp]]]:
        """Work on ``features`` (n, d) from unit ``first`` on; after each batch yield units done and rows changed."""


def encode(
    image: Image,
    xy: NDArray[np.float64],  # (n, 2)
    side: float,
    encoder: Encoder,
    *,
    window: float | None = None,
    batch_size: int = 64,
    cache: Path | None = None,
    progress: bool = False,
) -> NDArray[np.float32]:
    """Features (n, d) of the tissue around the points.

    Parameters
    ----------
    image, xy
        The picture, and the points in its full-resolution pixels.
    side
        Side of what the encoder sees at once, full-resolution pixels.
    encoder
        Whose features; with ``window``, whose tokens.
    window
        ``None``: a patch is cut around every point. Else the picture is tiled once, and a point's features are the mean
        token of the square of this side around it, full-resolution pixels.
    batch_size
        Patches or tiles described at once.
    cache
        Folder that keeps what is finished; made where it is not there.
    progress
        Show a bar.

    Raises
    ------
    ValueError
        The encoder gives features of another shape than it says, where numpy would repeat a row or a column to fit;
        ``window`` and an encoder without tokens; a cache of other settings.
    """
    work: Work
    if window is None:
        dim, work = encoder.dim, Patches(image, xy, side, encoder, batch_size)
    else:
        if not has_tokens(encoder):
            raise ValueError(no_tokens(encoder))
        tiling = Tiling(side, window, encoder.input_size, encoder.stride)
        dim, work = encoder.token_dim, DenseTiles(image, xy, tiling, encoder, batch_size)
    features = np.zeros((len(xy), dim), dtype=np.float32)
    kept = None if cache is None else FeatureCache(cache, settings_of(image, xy, side, window, encoder))
    first = kept.restore(features) if kept else 0
    with tqdm(
        total=work.total, initial=first, desc=f"{encoder.name} features", unit=work.unit, disable=not progress
    ) as bar:
        for done, rows in work.steps(features, first):
            if kept:
                kept.keep(features, rows, done, last=done == work.total)
            bar.update(done - bar.n)
    return features


def no_tokens(encoder: Encoder) -> str:
    """Say why an encoder cannot give dense features, and what to do."""
    return (
        f"dense=True reads the tokens of an encoder's places (token_dim, stride, tokens(patches)), and encoder "
        f"{encoder.name!r} has none. Take dense=False, or a vision transformer such as 'kaiko-s16'."
    )


class Patches:
    """A patch cut around every point and described."""

    unit = "patch"

    def __init__(self, image: Image, xy: NDArray[np.float64], side: float, encoder: Encoder, batch_size: int) -> None:
        self.image, self.xy, self.side, self.encoder, self.batch_size = image, xy, side, encoder, batch_size
        self.total = len(xy)

    def steps(self, features: NDArray[np.float32], first: int) -> Iterator[tuple[int, NDArray[np.intp]]]:
        """Fill ``features`` (n, dim), batch by batch."""
        done = first
        batches = patch_batches(
            self.image, self.xy, self.side, self.encoder.input_size, batch_size=self.batch_size, first=first
        )
        for rows, patches in ahead(batches):
            features[rows] = self._described(patches)
            done += len(rows)
            yield done, rows

    def _described(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        described = np.asarray(self.encoder(patches))
        expected = (len(patches), self.encoder.dim)
        if described.shape != expected:
            raise ValueError(
                f"encoder {self.encoder.name!r} gave an array of shape {described.shape} for {len(patches)} patches; "
                f"expected {expected}."
            )
        return described
