"""Features of the tissue around any points: patches cut, described and put back in the order of the points."""

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from sthisto.encoders import Encoder
from sthisto.images import Image, patch_batches


def encode(
    image: Image,
    xy: NDArray[np.float64],  # (n, 2)
    side: float,
    encoder: Encoder,
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> NDArray[np.float32]:
    """Features (n, d) of square patches of ``side`` full-resolution pixels around the points."""
    features = np.empty((len(xy), encoder.dim), dtype=np.float32)
    with tqdm(total=len(xy), desc=f"{encoder.name} features", unit="patch", disable=not progress) as bar:
        for rows, patches in patch_batches(image, xy, side, encoder.field, batch_size=batch_size):
            features[rows] = encoder(patches)
            bar.update(len(rows))
    return features
