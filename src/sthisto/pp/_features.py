"""Image features of the patch around every spot."""

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sthisto import _data
from sthisto._data import FeatureMetadata
from sthisto.encoders import Encoder, has_tokens, load, read_features, record
from sthisto.encoders._encode import encode, no_tokens
from sthisto.images import Image

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


@_data.accepts_spatialdata(image="image", library_key="library_key")
def extract_features(
    adata: "AnnData | SpatialData",
    encoder: str | Encoder = "handcrafted",
    *,
    image: Any = None,
    library_key: str | None = None,
    patch_um: float | None = None,
    dense: bool = False,
    window_um: float | None = None,
    mpp: float | None = None,
    pitch_um: float | None = None,
    keep_weights: bool = False,
    cache: str | PathLike[str] | None = None,
    key_added: str = "X_histo",
) -> None:
    """Extract image features around every spot.

    A square patch is cut at every spot, resampled to the encoder's input size and encoded. The patch is measured in
    micrometers, so that sections scanned at different scales compare. Everything that is known of the scale (``mpp``,
    ``pitch_um``, scale factors, the image file, the array's pitch) is compared, contradictions are refused with all
    figures, and so are spots outside the image.

    ``dense=True`` tiles the tissue once instead, with patches that overlap, and averages at each spot the encoder's
    tokens around it. :func:`sthisto.tl.upsample` then does the same for its points, at one pass of the encoder a tile
    and not one a point: for maps finer than the patch ten to a hundred times fewer passes.

    Parameters
    ----------
    adata
        Section with the spots' centers in ``obsm["spatial"]``, (n, 2) full-resolution pixels, x then y.
    encoder
        Name in :data:`sthisto.encoders.ENCODERS`, or what :func:`sthisto.encoders.load` returned, whose options are
        the weights, the device and the batch size; any object that satisfies :class:`sthisto.encoders.Encoder`.
    image
        Picture that the coordinates refer to: a path, an array, ``"hires"`` or ``"lowres"`` of ``uns["spatial"]``, or
        ``{section: image}`` for several sections. ``None`` takes the sharpest image in ``uns["spatial"]``.
    library_key
        Column of ``obs`` that names the section of each spot, where there are several.
    patch_um
        Side of the patch in um; ``None`` takes the field that the encoder was made for, 112 um for most. The crop of
        HisToSGE's scripts, 50 full-resolution pixels, is ``patch_um=50 * mpp``.
    dense
        Read tokens of tiles of ``patch_um``, blended where tiles overlap; for encoders with tokens. The features of a
        spot depend on its place alone, and not on which other spots there are.
    window_um
        Side of the square around a spot whose tokens are averaged, with ``dense=True``; ``None`` takes half of
        ``patch_um``, which is about a Visium spot: a token knows the field around it, and expression was measured in
        the spot. With ``patch_um`` it is what a patch's mean token sees; ever smaller ones end in the token at the
        spot's center.
    mpp
        Micrometres per full-resolution pixel; ``None`` derives it.
    pitch_um
        Distance between neighboring spots in um, to derive ``mpp`` from where the image file has none. ``None``
        takes 100 for hexagonal arrays (Visium) and 200 for square ones, the latter with a warning.
    keep_weights
        Put the encoder's weights into ``uns``, so that the object alone reproduces its features, also without network:
        :func:`sthisto.tl.upsample` loads the encoder from there, as :func:`sthisto.encoders.restore` does. They take 4
        bytes each (UNI: 1.2 GB). Where the license forbids passing them on, a warning names it.
    cache
        Folder (zarr, made where it is not there) that keeps what is finished: the same call after a kill goes on from
        there and gives the same array to the bit, and after the end it only reads. What was made with another encoder,
        image, scale or other spots is refused; an image on disk is known by its size, date and some of its pixels.
    key_added
        Name of the result in ``obsm``.

    Returns
    -------
    Nothing. Writes

    ``obsm[key_added]`` : (n, d) float32, one row a spot
    ``uns["sthisto"]["features"][key_added]`` : encoder, patch size, scale and image of each section; ``dense`` and
    its ``window_um``; of a network, in ``provenance``, where its weights come from (repository, commit, file, SHA-256,
    license), its input, pooling and precision; ``weights`` and ``weights_sha256`` where they are kept
    ``uns["spatial"][library]`` : a ``hires`` picture of at most 2 000 px with its scale, where the section had none

    Raises
    ------
    KeyError
        No spot coordinates, no image, no column ``library_key``, or no encoder of that name.
    ValueError
        Spots outside the image; coordinates that are repeated, not finite, (row, column) or of several sections at
        once; a scale that is unknown or contradicted by the array's pitch; a file that is no whole image; a patch
        larger than the image; an encoder that breaks its contract; ``dense`` with an encoder without tokens; a cache
        of other settings; weights of another architecture, or that cannot be kept; no such device.
    PermissionError
        The weights are gated, and the Hub does not give them.
    OSError
        The image file cannot be found or read, or the weights cannot be had.

    Examples
    --------
    >>> import sthisto
    >>> adata = sthisto.datasets.synthetic()
    >>> sthisto.pp.extract_features(adata)
    >>> adata.obsm["X_histo"].shape[0] == adata.n_obs
    True
    """
    _data.check_key(key_added)
    loaded = load(encoder)
    side_um = loaded.patch_um if patch_um is None else patch_um
    if not (np.isfinite(side_um) and side_um > 0):
        raise ValueError(f"patch_um={patch_um}: the side of the patch in um is positive.")
    dim, window_um = _dense_settings(loaded, side_um, window_um) if dense else (loaded.dim, window_um)
    if window_um is not None and not dense:
        raise ValueError(f"window_um={window_um:g} is for dense=True; a patch is encoded as a whole.")
    made = record(loaded, keep_weights=keep_weights)  # first, as it may refuse
    features = np.empty((adata.n_obs, dim), dtype=np.float32)
    described = []
    for number, section in enumerate(_data.read_sections(adata, library_key).values()):
        opened = _data.open_section_image(adata, section, image, mpp=mpp, pitch_um=pitch_um)
        _refuse_larger(side_um, opened.mpp, opened.image)
        features[section.rows] = encode(
            opened.image,
            section.xy,
            side_um / opened.mpp,
            loaded,
            window=None if window_um is None else window_um / opened.mpp,
            cache=None if cache is None else Path(cache, str(number)),
        )
        metadata = FeatureMetadata(made, float(side_um), opened.mpp, opened.path, window_um)
        described.append(replace(section, image=opened, metadata=metadata))
    settings = made | {"patch_um": float(side_um), "dense": dense}
    if window_um is not None:
        settings["window_um"] = float(window_um)
    _data.write_features(adata, key_added, features, settings, described)


def _dense_settings(encoder: Encoder, side_um: float, window_um: float | None) -> tuple[int, float]:
    """Features of a token, and the side of the window in um."""
    if not has_tokens(encoder):
        raise ValueError(no_tokens(encoder))
    window_um = side_um / 2 if window_um is None else window_um
    if not (np.isfinite(window_um) and window_um > 0):
        raise ValueError(f"window_um={window_um}: the side of the window in um is positive.")
    return encoder.token_dim, window_um


def _refuse_larger(side_um: float, um: float, image: Image) -> None:
    """Refuse patches that the whole image would not fill: mostly a wrong scale."""
    height, width = image.shape
    if side_um / um > max(height, width):
        raise ValueError(
            f"a patch of {side_um:g} um is {side_um / um:.0f} px at {um:.4g} um/px, but the image is only {width:.6g} "
            f"wide and {height:.6g} high. Correct mpp= (or pitch_um=), or take a smaller patch_um=."
        )


def import_features(
    adata: "AnnData",
    source: Any,
    *,
    key: str | None = None,
    library_key: str | None = None,
    max_distance: float | None = None,
    key_added: str = "X_histo",
) -> None:
    """Import image features that another tool extracted: TRIDENT, CLAM or LazySlide.

    Each spot takes the features of the patch around it. Tables of another slide or scale are refused. As how they were
    made is not recorded, a dense map needs features of its points, too: ``sthisto.tl.upsample(..., features=)``.

    Parameters
    ----------
    adata
        Section with spot centers in ``obsm["spatial"]``: (n, 2) full-resolution pixels, x then y.
    source
        Path of an h5 file with ``features`` and ``coords``, or a WSIData, or ``{section: source}`` for several.
    key
        Name of the table in a WSIData that has several.
    library_key
        Column of ``obs`` that names the section of each spot, where there are several.
    max_distance
        Largest distance along x or y from a spot to the center of its patch, pixels; half a patch where not given.
    key_added
        Name of the result in ``obsm``.

    Returns
    -------
    Nothing. Writes

    ``obsm[key_added]`` : (n, d) float32, one row per spot

    Raises
    ------
    KeyError
        No spot coordinates, no source for a section, no such table.
    ValueError
        Spots outside their patches; sections with different numbers of features.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import h5py, sthisto
    >>> adata = sthisto.datasets.synthetic()
    >>> path = pathlib.Path(tempfile.mkdtemp(), "features.h5")
    >>> with h5py.File(path, "w") as file:
    ...     file["features"] = np.ones((adata.n_obs, 8))
    ...     file["coords"] = adata.obsm["spatial"] - 32
    ...     file["coords"].attrs["patch_size_level0"] = 64
    >>> sthisto.pp.import_features(adata, path, key_added="X_uni")
    >>> adata.obsm["X_uni"].shape == (adata.n_obs, 8)
    True
    """
    _data.check_key(key_added)
    sections = _data.read_sections(adata, library_key)
    sources = source if isinstance(source, dict) else dict.fromkeys(sections, source)
    if set(sections) - set(sources) or (len(sections) > 1 and not isinstance(source, dict)):
        raise KeyError(f"source has to be a dict with one source for each of the sections {', '.join(sections)}.")
    parts = {
        name: read_features(sources[name], section.xy, key=key, max_distance=max_distance)
        for name, section in sections.items()
    }
    widths = {name: part.shape[1] for name, part in parts.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"sections have different numbers of features: {widths}. Import those of one encoder.")
    features = np.empty((adata.n_obs, *set(widths.values())), np.float32)
    for name, section in sections.items():
        features[section.rows] = parts[name]
    _data.write(adata, obsm={key_added: features})
