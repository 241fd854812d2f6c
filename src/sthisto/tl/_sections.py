"""Sections and models as the verbs put them together."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sthisto import _data, models
from sthisto.images import Image, check_scale, sample_patches
from sthisto.models import Model, Patches, Section
from sthisto.models._standardize import pack_names, unpack_names

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class Pixels:
    """Where models that read pixels find those of one section."""

    picture: Image
    mpp: float  # um per full-resolution pixel
    path: str  # as it was given, "uns:hires", or "" for an array

    @classmethod
    def find(cls, adata: "AnnData", name: str, place: _data.Place, image: Any, features_key: str) -> "Pixels":
        """Open a section's picture: the one given, else that of its features, else the sharpest in uns."""
        try:
            made = _data.description(adata, features_key, name, alone=False)
        except KeyError:  # no features, or from elsewhere
            made = None
        if image is None and made is not None and made.image:
            picture, path = _data.recorded_image(adata, name, made.image), made.image
        elif image is None and made is not None:
            raise KeyError(f"the picture of section {name!r} was an array, which is not kept: pass it again as image=.")
        else:
            picture, path = _data.find_image(adata, name, image)
        check_scale(picture, place.xy)
        return cls(picture, _data.scale(place, picture, None, None) if made is None else made.mpp, path)

    @classmethod
    def again(  # noqa: PLR0917  private
        cls, adata: "AnnData", found: _data.Fit, name: str, place: _data.Place, image: Any, features_key: str
    ) -> "Pixels | None":
        """Open the picture that a section was fitted on, or that of one that was not."""
        if "picture_paths" not in found.arrays:  # the model read no pixels
            return None
        known = list(found.libraries)
        if place.known not in known:
            whole = place if place.kind else _data.places(adata, found.library_key or None)[name]
            return cls.find(adata, name, whole, image, features_key)
        path = unpack_names(found.arrays["picture_paths"])[known.index(place.known)]
        mpp = float(found.arrays["picture_mpp"][known.index(place.known)])
        if image is None and not path:
            raise KeyError(f"the picture of section {name!r} was an array, which is not kept: pass it again as image=.")
        if image is None:
            picture = _data.recorded_image(adata, name, path)
        else:
            picture, _ = _data.find_image(adata, name, image)
        check_scale(picture, place.xy)
        return cls(picture, mpp, path)

    @staticmethod
    def state(pixels: "list[Pixels | None]") -> dict[str, NDArray[np.generic]]:
        """Paths and scales of the fitted sections; nothing for models that read no pixels."""
        there = [each for each in pixels if each is not None]
        paths, mpp = pack_names([each.path for each in there]), np.array([each.mpp for each in there])
        return {"picture_paths": paths, "picture_mpp": mpp} if there else {}

    def around(self, xy: NDArray[np.float64], model: Any) -> Patches:
        """Patches of the model's size around rows of xy (n, 2)."""
        return lambda rows: sample_patches(self.picture, xy[rows], model.patch_um / self.mpp, model.input_size)


def section_of(adata: "AnnData", place: _data.Place, features_key: str, patches: Patches | None = None) -> Section:
    """One section's spots as models see them, without expression."""
    look = _data.features(adata, features_key, place.rows) if features_key else None
    pitch = _pitch_um(adata, place, features_key)
    return Section(name=place.known, xy=place.xy / place.pitch, features=look, patches=patches, pitch_um=pitch)


def _pitch_um(adata: "AnnData", place: _data.Place, features_key: str) -> float | None:
    """Give the unit of a section's positions, where it is known at which scale its features were taken."""
    try:
        return place.pitch * _data.description(adata, features_key, place.known, alone=False).mpp
    except KeyError:  # features from elsewhere
        return None


def restore(found: _data.Fit) -> Model:
    return models.restore(found.model, found.params, found.arrays)
