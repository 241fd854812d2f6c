"""Features of the tissue around any points: patches cut, described and put back in the order of the points."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from sthisto.encoders import Encoder
from sthisto.images import Image, patch_batches

T = TypeVar("T")


def encode(
    image: Image,
    xy: NDArray[np.float64],  # (n, 2)
    side: float,
    encoder: Encoder,
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> NDArray[np.float32]:
    """Features (n, d) of square patches of ``side`` full-resolution pixels around the points.

    Raises
    ------
    ValueError
        The encoder gives features of another shape than it says; numpy would repeat a row or a column to fit.
    """
    features = np.empty((len(xy), encoder.dim), dtype=np.float32)
    with tqdm(total=len(xy), desc=f"{encoder.name} features", unit="patch", disable=not progress) as bar:
        for rows, patches in _ahead(patch_batches(image, xy, side, encoder.field, batch_size=batch_size)):
            described = np.asarray(encoder(patches))
            if described.shape != (len(rows), encoder.dim):
                raise ValueError(
                    f"encoder {encoder.name!r} gave an array of shape {described.shape} for {len(rows)} patches; "
                    f"expected ({len(rows)}, {encoder.dim})."
                )
            features[rows] = described
            bar.update(len(rows))
    return features


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Make the next item in a thread while the caller works on the last; their order is kept."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
