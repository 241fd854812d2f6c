"""From a path or an array to an :class:`Image`."""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sthisto.images._image import Image, level_size
from sthisto.images._slides import FORMATS, open_slide, open_tiff, refuse_large

logger = logging.getLogger("sthisto")

Opened = tuple[list[Any], dict[str, Any]]  # levels, and what the file states: mpp of the first, white, alpha
_MICROMETERS = {"nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6}
WHITE_LEVELS = (255, 1023, 4095, 16383)  # of 8, 10, 12 and 14 bits in 16


def open_image(source: Any, *, scale: float = 1.0, mpp: float | None = None, max_pixels: int = 2**30) -> Image:
    """Open an image of tissue, lazily where its format allows.

    Images come as files of many formats and as arrays of many libraries; the rest of the package sees one type. TIFF
    and zarr are read in parts when pixels are needed (their file stays open as long as a level is in use), JPEG and
    PNG can only be read whole. EXIF orientation is ignored: spots refer to the pixels as they are stored.

    Parameters
    ----------
    source
        Path of a JPEG, a PNG, a TIFF (also BigTIFF, OME-TIFF, SVS; striped, tiled or pyramidal), a slide that OpenSlide
        reads (the extra ``slides``: MIRAX, Hamamatsu, Leica, Ventana, DICOM and others) or a zarr folder (an array or
        an OME-Zarr image); a numpy, zarr or dask array or torch tensor; an xarray ``DataArray`` or multiscale
        ``DataTree``; a squidpy ``ImageContainer`` of one image; a list of arrays, finest level first; an
        :class:`Image`, which is returned as it is.
    scale
        Pixels of ``source`` per full-resolution pixel: ``tissue_hires_scalef`` for a hires image.
    mpp
        Micrometers per full-resolution pixel. ``None`` takes it from the file: physical pixel sizes of OME, Aperio's
        "MPP", resolution tags of a TIFF between 0.05 and 20 um (72 dpi means nothing). A file states the size of its
        own pixels, which ``scale`` converts to full-resolution pixels.
    max_pixels
        Images with more pixels are refused where they have to be decoded whole, as small files can hold huge images.

    Returns
    -------
    The image.

    Raises
    ------
    FileNotFoundError
        Nothing at the path.
    ValueError
        No image, a damaged one, or one of a format that is not read; more than ``max_pixels``; ``scale`` or ``mpp`` not
        positive.
    TypeError
        Neither a path nor an array.
    ImportError
        The format needs the extra ``slides``.

    Examples
    --------
    >>> import numpy as np
    >>> image = open_image(np.zeros((600, 500, 3), np.uint8), scale=0.1, mpp=0.5)
    >>> image.shape, image.mpp
    ((6000.0, 5000.0), 0.5)
    """
    if isinstance(source, Image):
        if scale != 1:
            raise ValueError(f"An Image has its scale already; scale={scale} would contradict it.")
        return source if mpp is None else replace(source, mpp=mpp)
    is_path = isinstance(source, str | os.PathLike)
    levels, stated = _open_path(Path(source), max_pixels) if is_path else _from_arrays(source)
    scale *= stated.pop("scale", 1.0)
    sizes = [level_size(level) for level in levels]
    stretched = hasattr(source, "children")  # levels of an xarray tree, as spatialdata makes them
    scales = tuple(scale / _shrinkage(sizes[0], size, stretched=stretched) for size in sizes)
    own_mpp = stated.pop("mpp", None)
    if mpp is None and own_mpp is not None:
        mpp = own_mpp * scale
    image = Image(tuple(levels), scales, mpp, os.fspath(source) if is_path else "", **stated)
    return image if image.white else replace(image, white=_white_level(image))


def _white_level(image: Image) -> int | None:
    """White of 16-bit pixels whose values have fewer bits, by samples of the coarsest level; ``None`` otherwise."""
    stored, level = image.levels[-1], len(image.levels) - 1
    if np.dtype(stored.dtype).newbyteorder("=") != np.uint16:
        return None
    height, width = level_size(stored)
    corners = product(range(0, height, max(512, height // 8)), range(0, width, max(512, width // 8)))
    blocks = (image.stored(level, y, min(y + 512, height), x, min(x + 512, width)) for y, x in corners)
    highest = max(int(block.max()) for block in blocks)
    white = next((level for level in WHITE_LEVELS if highest <= level), None)
    if not highest or white is None:
        return None
    logger.warning(
        "%s: 16-bit pixels with values up to %d; %d is taken for white. Pass 8-bit pixels if that is wrong.",
        image.source or "the image",
        highest,
        white,
    )
    return white


def _shrinkage(finest: tuple[int, int], size: tuple[int, int], *, stretched: bool) -> float:
    """Pixels of the finest level per pixel of this one.

    Pyramids of scanners drop what does not fill a pixel: the ratio is a whole number, where rounding of the size
    explains the rest. Levels that were ``stretched`` show all of the finest, whatever their size.
    """
    ratios = [full / part for full, part in zip(finest, size, strict=True)]
    whole = max(1, round(ratios[0]))
    if not stretched and all(abs(full / whole - part) <= 1 for full, part in zip(finest, size, strict=True)):
        return whole
    mean = float(np.mean(ratios))
    if any(abs(full / mean - part) > 1 + 0.02 * part for full, part in zip(finest, size, strict=True)):
        raise ValueError(f"Levels have to show the same; (height, width) {finest} and {size} differ in proportion.")
    return mean


def _open_path(path: Path, max_pixels: int) -> Opened:
    """Choose the reader by the first bytes of the file; by its name for the formats of scanners."""
    if not path.exists():
        raise FileNotFoundError(f"No image at {path}; {_listing(path.parent)}.")
    if path.is_dir():
        return _open_zarr(path)
    if not path.is_file():
        raise ValueError(f"{path} is neither a file nor a folder (a pipe or device?). Pass a file.")
    if path.suffix.lower() in FORMATS:
        return open_slide(path)
    with path.open("rb") as file:
        start = file.read(8)
    if start[:2] in {b"II", b"MM"}:
        return open_tiff(path, max_pixels)
    if start[:3] == b"\xff\xd8\xff":
        return [_read_jpeg(path, max_pixels)], {}
    if start == b"\x89PNG\r\n\x1a\n":
        return [_read_png(path, max_pixels)], {}
    raise ValueError(f"{path} starts with {start!r}: no TIFF, JPEG, PNG or zarr folder. Convert it to one of them.")


def _listing(folder: Path) -> str:
    """List what a folder holds, in a few words."""
    if not folder.is_dir():
        return f"there is no folder {folder} either"
    names = sorted(entry.name for entry in folder.iterdir())
    return f"{folder} holds {', '.join(names[:8]) or 'nothing'}{', ...' if len(names) > 8 else ''}"


def _read_jpeg(path: Path, max_pixels: int) -> NDArray[Any]:
    """Decode without Pillow, which needs three times the memory."""
    import imagecodecs  # noqa: PLC0415

    data = path.read_bytes()
    # The decoder fills missing pixels with gray silently. Coded pixels contain no markers, so a whole file has an end
    # marker after its last start of scan.
    if data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise ValueError(f"{path} is truncated: the JPEG has no end. Copy or export the file again.")
    frame = re.search(rb"\xff[\xc0-\xc3][\s\S]{3}([\s\S]{4})", data)  # height and width in the start of frame
    if frame:
        refuse_large(path, int.from_bytes(frame[1][:2]), int.from_bytes(frame[1][2:]), max_pixels)
    try:
        pixels: NDArray[Any] = imagecodecs.jpeg8_decode(data)
    except imagecodecs.Jpeg8Error as error:
        raise ValueError(f"{path} could not be read as a JPEG: {error}. Copy or export the file again.") from error
    if pixels.ndim == 3 and pixels.shape[2] == 4:  # CMYK
        from PIL.JpegImagePlugin import JpegImageFile  # noqa: PLC0415

        with JpegImageFile(path) as cmyk:
            return np.asarray(cmyk.convert("RGB"))
    return pixels


def _read_png(path: Path, max_pixels: int) -> NDArray[Any]:
    """Decode at the file's depth, which Pillow does not for 16-bit color."""
    import imagecodecs  # noqa: PLC0415

    data = path.read_bytes()
    refuse_large(path, int.from_bytes(data[20:24]), int.from_bytes(data[16:20]), max_pixels)
    try:
        pixels: NDArray[Any] = imagecodecs.png_decode(data)
    except imagecodecs.PngError as error:
        raise ValueError(f"{path} could not be read as a PNG: {error}. Copy or export the file again.") from error
    return pixels


def _open_zarr(path: Path) -> Opened:
    """Open a zarr array, or the levels of an OME-Zarr image (multiscales of versions 0.1 to 0.5)."""
    import zarr  # noqa: PLC0415

    try:
        node = zarr.open(path, mode="r")
    except FileNotFoundError as error:
        raise ValueError(f"{path} is a folder but no zarr array or group; {_listing(path)}.") from error
    if isinstance(node, zarr.Array):
        return [node], {}
    attributes: Any = node.attrs.get("ome", node.attrs)
    if "multiscales" not in attributes:
        held = sorted(node.keys())
        raise ValueError(f"{path} is a zarr group and no OME-Zarr image. Give the path of the image in it, of {held}.")
    image = attributes["multiscales"][0]
    axes = [{"name": axis} if isinstance(axis, str) else axis for axis in image.get("axes", "tczyx")]
    levels = [_plane(node[dataset["path"]], [axis["name"] for axis in axes]) for dataset in image["datasets"]]
    return levels, {"mpp": _ome_zarr_mpp(image, axes)}


def _plane(array: Any, axes: list[str]) -> Any:
    """Drop axes such as time and depth from a zarr array, which have to have one entry."""
    import dask.array  # noqa: PLC0415

    extra = {name: size for name, size in zip(axes, array.shape, strict=True) if name not in {"c", "y", "x"}}
    if any(size > 1 for size in extra.values()):
        raise ValueError(f"One plane is wanted; found axes {axes} of shape {array.shape}. Pass one plane as an array.")
    if not extra:
        return array
    lazy = dask.array.from_array(array, chunks=array.chunks)  # type: ignore[no-untyped-call]
    return lazy[tuple(0 if name in extra else slice(None) for name in axes)]


def _ome_zarr_mpp(image: Mapping[str, Any], axes: list[dict[str, str]]) -> float | None:
    """Micrometers per pixel of the first level along x, where the unit is stated."""
    x = [axis["name"] for axis in axes].index("x")
    unit = _MICROMETERS.get(axes[x].get("unit", ""))
    steps = [*image["datasets"][0].get("coordinateTransformations", []), *image.get("coordinateTransformations", [])]
    scales = [step["scale"][x] for step in steps if step["type"] == "scale"]
    return float(np.prod(scales) * unit) if unit and scales else None


def _from_arrays(source: Any) -> Opened:
    """Levels of an array, a list of arrays, an xarray tree or an ImageContainer, which states its scale."""
    if hasattr(getattr(source, "data", None), "data_vars"):  # squidpy
        return [_from_array(source.data)], {"scale": float(source.data.attrs.get("scale", 1.0))}
    children = getattr(source, "children", None)
    parts = source if isinstance(source, list | tuple) else list(children.values()) if children else [source]
    return [_from_array(part) for part in parts], {}


def _from_array(array: Any) -> Any:
    """Check that an array has a shape, a type and slices; of xarray, known by its attributes, take the data."""
    if hasattr(array, "data_vars"):
        names = list(array.data_vars)
        if len(names) != 1:
            raise ValueError(f"A level has to hold one image; found {names}. Pass one of them, source[name].")
        array = array[names[0]]
    if hasattr(array, "detach") and hasattr(array, "numpy"):  # torch
        return array.detach().cpu().numpy()
    if hasattr(array, "dims") and hasattr(array, "isel"):
        array = array.rename({name: "c" for name in array.dims if str(name).startswith("channel")})
        extra = {name: size for name, size in array.sizes.items() if name not in {"c", "y", "x"}}
        if any(size > 1 for size in extra.values()) or not {"y", "x"} <= set(array.dims):
            found = dict(array.sizes)
            raise ValueError(f"Dimensions y, x and, for color, c are wanted; found {found}. Select a plane or rename.")
        return array.isel(dict.fromkeys(extra, 0)).transpose("y", "x", "c", missing_dims="ignore").data
    if not all(hasattr(array, name) for name in ("shape", "dtype", "__getitem__")):
        raise TypeError(f"An image is a path, an array or a list of arrays; found {type(array).__name__}.")
    return array
