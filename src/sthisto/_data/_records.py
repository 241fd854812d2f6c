"""What is known of sections, points and fits, as plain records."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from anndata import AnnData, ImplicitModificationWarning
from numpy.typing import NDArray

UNS = "sthisto"
SCHEMA = 1
LIBRARY = "section"  # the name of a section that nobody named
UNFITTED = "a section that was only stained"  # as models know the sections of another object


@dataclass(frozen=True)
class Fit:
    """A fitted model as ``uns`` keeps it."""

    model: str
    params: dict[str, Any]
    genes: NDArray[np.str_]  # (g,)
    libraries: NDArray[np.str_]  # (s,) sections it was fitted on
    library_key: str  # "" where there is one section without a column of its own
    features_key: str  # "" where the model reads none
    layer: str  # "" for X
    random_state: int
    pitch: NDArray[np.float64]  # (s,) pixels, the unit of length in each section
    spots: NDArray[np.str_]  # (n,) names of the spots it learnt from
    xy: NDArray[np.float64]  # (n, 2) where they were
    arrays: dict[str, NDArray[np.generic]]  # the model's state and its spread's
    history: dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Place:
    """Where the spots of one section are."""

    rows: NDArray[np.intp]  # (n,) of the AnnData
    xy: NDArray[np.float64]  # (n, 2) full-resolution pixels
    pitch: float  # pixels between neighboring spots of the whole section; NaN for a single spot
    kind: str  # of the array: "hexagonal", "square", "oblique", or "scattered" where there is none
    known: str  # what models call the section

    def keep(self, mask: NDArray[np.bool_]) -> "Place":
        """Only the spots that a mask (n_obs,) over all rows keeps; the pitch stays that of the whole section."""
        kept = mask[self.rows]
        return replace(self, rows=self.rows[kept], xy=self.xy[kept])


@dataclass(frozen=True)
class Points:
    """Points laid over one section; on a lattice, or scattered where the last two are None."""

    xy: NDArray[np.float64]  # (m, 2) full-resolution pixels
    pitch: float  # pixels between neighboring points
    site: NDArray[np.int64] | None = None  # (m, 2) on the lattice
    spot_site: NDArray[np.int64] | None = None  # (n, 2) of the section's spots on the same lattice


@dataclass(frozen=True)
class Description:
    """How the features of one section were made."""

    encoder: Mapping[str, Any]  # its name, where it comes from and perhaps its weights, as encoders.restore takes them
    patch_um: float
    mpp: float  # um per full-resolution pixel
    image: str  # path as it was given, "uns:hires", or "" for an array
    window_um: float | None = None  # side over which tokens are averaged; None: a patch for each point


def listed(names: Iterable[object], most: int = 8) -> str:
    names = [str(name) for name in names]
    return (
        ", ".join(repr(name) for name in names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
        or "nothing"
    )


def write(adata: AnnData, **slots: Mapping[str, Any]) -> None:
    """Set ``obsm``/``layers``/``var``/``obs`` entries; a view becomes an object of its own, as scanpy does it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        for slot, entries in slots.items():
            for key, value in entries.items():
                getattr(adata, slot)[key] = value


def check_key(key: str) -> str:
    """Keys with a slash would nest silently in h5ad and zarr."""
    if not isinstance(key, str) or not key or "/" in key:
        raise ValueError(f"key_added={key!r}: expected a non-empty name without '/'.")
    return key
