"""Describe the tissue: image features of the patch around every spot."""

from typing import TYPE_CHECKING, Any

import numpy as np

from sthisto import _slide
from sthisto.encoders import Encoder, load
from sthisto.encoders._encode import encode
from sthisto.images import check_scale

if TYPE_CHECKING:
    from anndata import AnnData


def extract_features(
    adata: "AnnData",
    encoder: str | Encoder = "handcrafted",
    *,
    image: Any = None,
    library_key: str | None = None,
    patch_um: float | None = None,
    mpp: float | None = None,
    pitch_um: float | None = None,
    weights: str | None = None,
    device: str | None = None,
    batch_size: int = 64,
    key_added: str = "X_histo",
    progress: bool = True,
) -> None:
    """Describe the tissue around each spot by image features.

    A square patch is cut at every spot, resampled to the encoder's input and described. The patch is measured in
    micrometres, so that sections scanned at different scales compare; the scale comes from ``mpp``, else from the
    image file, else from the array's pitch, and spots outside the image are refused with figures.

    Parameters
    ----------
    adata
        Section with the spots' centres in ``obsm["spatial"]``, (n, 2) full-resolution pixels, x then y.
    encoder
        Name in :data:`sthisto.encoders.ENCODERS`, or any object that satisfies :class:`sthisto.encoders.Encoder`.
    image
        Picture that the coordinates refer to: a path, an array, ``"hires"`` or ``"lowres"`` of ``uns["spatial"]``, or
        ``{library: picture}`` for several sections. ``None`` takes the sharpest picture in ``uns["spatial"]``.
    library_key
        Column of ``obs`` that names the section of each spot, where there are several.
    patch_um
        Side of the patch in um; ``None`` takes the field that the encoder was made for.
    mpp
        Micrometres per full-resolution pixel; ``None`` derives it.
    pitch_um
        Distance between neighbouring spots in um, to derive ``mpp`` from where the image does not say it. ``None``
        takes 100 for hexagonal arrays (Visium) and 200 for square ones, the latter with a warning.
    weights
        Local file with the encoder's weights, where it has weights. Other options belong to
        :func:`sthisto.encoders.load`, whose result is passed as ``encoder``.
    device
        Where a learnt encoder runs, as torch names it; ``None`` chooses.
    batch_size
        Patches described at once.
    key_added
        Name of the result in ``obsm``.
    progress
        Show a progress bar.

    Returns
    -------
    Nothing. Writes

    ``obsm[key_added]`` : (n, d) float32, one row a spot
    ``uns["sthisto"]["features"][key_added]`` : encoder, patch size, scale and image of each section
    ``uns["spatial"][library]`` : a ``hires`` picture of at most 2 000 px with its scale, where the section had none

    Raises
    ------
    KeyError
        No spot coordinates, no image, no column ``library_key``, or no encoder of that name.
    ValueError
        Spots outside the image; coordinates that are repeated, not finite, (row, column) or of several sections at
        once; a scale that is unknown or contradicted by the array's pitch; a file that is no whole image; an
        encoder that breaks its contract.
    OSError
        The image file cannot be found or read.

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic()
    >>> sthisto.pp.extract_features(adata, progress=False)
    >>> adata.obsm["X_histo"].shape[0] == adata.n_obs
    True
    """
    _slide.check_key(key_added)
    describe = load(encoder, weights=weights, device=device)
    side_um = describe.patch_um if patch_um is None else patch_um
    if not side_um > 0:
        raise ValueError(f"patch_um={patch_um}: the side of the patch in um is positive.")
    features = np.empty((adata.n_obs, describe.dim), dtype=np.float32)
    pictures: dict[str, dict[str, Any]] = {}
    scales: list[float] = []
    paths: list[str] = []
    for library, place in _slide.places(adata, library_key).items():
        picture, path = _slide.find_image(adata, library, image, mpp)
        check_scale(picture, place.xy)
        um = _slide.scale(place, picture, mpp, pitch_um)
        features[place.rows] = encode(
            picture, place.xy, side_um / um, describe, batch_size=batch_size, progress=progress
        )
        pictures[library] = _slide.small_picture(adata, library, picture, place.pitch)
        scales.append(um)
        paths.append(path)
    record = {
        "encoder": describe.name,
        "patch_um": float(side_um),
        "libraries": np.array(list(pictures), dtype=str),
        "mpp": np.array(scales),
        "image": np.array(paths, dtype=str),
    }
    _slide.write_features(adata, key_added, features, record, pictures)
