"""The picture of a section, and its scale."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE_PX = 2000  # Space Ranger's own; a panel shows no more
UNDER, BESIDE = 0.35, 1.0  # how strong a picture is under colors that are to be read, and alone

Picture: TypeAlias = tuple[NDArray[Any], tuple[float, float, float, float]]  # pixels, extent in full-resolution pixels


def scalefactors(adata: AnnData, library: str) -> dict[str, Any]:
    factors: dict[str, Any] = adata.uns.get("spatial", {}).get(library, {}).get("scalefactors", {})
    return factors


def mpp_of(adata: AnnData, library: str) -> float | None:
    """Micrometres per full-resolution pixel, where known."""
    said = scalefactors(adata, library).get("microns_per_pixel")
    for record in adata.uns.get("sthisto", {}).get("features", {}).values():
        if said is None:
            said = dict(zip(record["libraries"], record["mpp"], strict=True)).get(library)
    return None if said is None else float(said)


def picture_of(adata: AnnData, library: str) -> Picture | None:
    """Return the picture and its extent in full-resolution pixels, or nothing where there is none but blank ones."""
    images, factors = adata.uns.get("spatial", {}).get(library, {}).get("images", {}), scalefactors(adata, library)
    for name in ("hires", "lowres"):
        pixels, factor = np.asarray(images.get(name, 0)), factors.get(f"tissue_{name}_scalef")
        if factor is not None and pixels.min() < pixels.max():
            step = -(-max(pixels.shape[:2]) // PICTURE_PX)
            pixels = pixels[::step, ::step]
            height, width = np.multiply(pixels.shape[:2], step / factor)
            return pixels, (0, width, height, 0)
    return None


def pictures_of(adata: AnnData, libraries: Iterable[str]) -> dict[str, Picture]:
    """Pictures of the sections that have one."""
    found = {library: picture_of(adata, library) for library in libraries}
    return {library: picture for library, picture in found.items() if picture is not None}


def draw_picture(ax: "Axes", picture: Picture | None, strength: float) -> None:
    """Draw a picture in full-resolution pixels and leave the limits of the axes as they are."""
    if picture is None:
        return
    limits = ax.get_xlim(), ax.get_ylim()
    ax.imshow(picture[0], extent=picture[1], alpha=strength, cmap="gray")
    ax.set(xlim=limits[0], ylim=limits[1])
