"""Features that other tools extracted: h5 files of TRIDENT or CLAM, and tables of a WSIData."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class PatchTable:
    """Features (m, d) of square patches: their centers (m, 2) and side, full-resolution pixels."""

    features: NDArray[np.float32]
    centers: NDArray[np.float64]
    side: float


def read_features(
    source: Any, xy: ArrayLike, *, key: str | None = None, max_distance: float | None = None
) -> NDArray[np.float32]:
    """Read the features of points from patches that another tool cut and encoded.

    Each point takes the features of the patch whose center is nearest. Points have to be in their patch: tables of
    another slide or another scale are refused.

    Parameters
    ----------
    source
        Path of an h5 file with ``features`` (m, d) and ``coords`` (m, 2), upper left corners in full-resolution pixels,
        as TRIDENT and CLAM write it; or a WSIData with a table of features and the shapes of its tiles.
    xy
        (n, 2) full-resolution pixels, x then y.
    key
        Name of the table in a WSIData that has several.
    max_distance
        Largest distance along x or y from a point to the center of its patch, pixels; half a patch where not given.

    Returns
    -------
    (n, d) float32, in the order of ``xy``.

    Raises
    ------
    KeyError
        No such table, or no datasets of these names.
    ValueError
        Points outside their patches; sizes that do not agree; features that are not finite; an unknown patch size.

    Examples
    --------
    >>> import tempfile, h5py
    >>> path = Path(tempfile.mkdtemp(), "features.h5")
    >>> with h5py.File(path, "w") as file:
    ...     file["features"] = [[1.0, 2.0], [3.0, 4.0]]
    ...     file["coords"] = [[0, 0], [64, 0]]
    ...     file["coords"].attrs["patch_size_level0"] = 64
    >>> read_features(path, [[100, 30]]).tolist()
    [[3.0, 4.0]]
    """
    table = _from_h5(Path(source)) if isinstance(source, str | PathLike) else _from_wsidata(source, key)
    points = np.asarray(xy, np.float64)
    if len(table.features) != len(table.centers) or not len(table.centers):
        raise ValueError(f"{len(table.features)} rows of features for {len(table.centers)} patches in {source!r}.")
    from scipy.spatial import KDTree  # noqa: PLC0415  names of encoders are known without it

    distances, rows = KDTree(table.centers).query(points, p=np.inf)
    limit = table.side / 2 if max_distance is None else max_distance
    outside = int((distances > limit).sum())
    if outside:
        raise ValueError(
            f"{outside} of {len(points)} points are more than {limit:.6g} px from the center of a patch, up to "
            f"{distances.max():.6g} px. Patches are {table.side:.6g} px wide and span {_span(table.centers)}, points "
            f"span {_span(points)}. Are both full-resolution pixels of the same image?"
        )
    features: NDArray[np.float32] = table.features[rows]
    if not np.isfinite(features).all():
        raise ValueError(f"{int((~np.isfinite(features)).any(axis=1).sum())} of {len(points)} rows are not finite.")
    return features


def _span(points: NDArray[np.float64]) -> str:
    (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
    return f"x {x0:.6g} to {x1:.6g}, y {y0:.6g} to {y1:.6g}"


def _from_h5(path: Path) -> PatchTable:
    import h5py  # noqa: PLC0415

    if not path.is_file():
        raise FileNotFoundError(f"no file of features at {path}.")
    with h5py.File(path, "r") as file:
        missing = sorted({"features", "coords"} - set(file))
        if missing:
            raise KeyError(f"{path} has no {' and no '.join(missing)} (found: {', '.join(sorted(file)) or 'nothing'}).")
        features, corners = np.asarray(file["features"], np.float32), np.asarray(file["coords"], np.float64)
        side = _patch_side(path, {**file.attrs, **file["coords"].attrs})
    features = features[0] if features.ndim == 3 and len(features) == 1 else features  # some hold a batch of one
    return PatchTable(features, corners + side / 2, side)


def _patch_side(path: Path, attributes: Mapping[str, Any]) -> float:
    """Side of a patch in full-resolution pixels, as TRIDENT or CLAM state it."""
    if "patch_size_level0" in attributes:
        return float(attributes["patch_size_level0"])
    if "patch_size" in attributes and "downsample" in attributes:
        return float(attributes["patch_size"]) * float(np.ravel(attributes["downsample"])[0])
    raise ValueError(
        f"{path}: the size of a patch is unknown, as coords has no attribute patch_size_level0, nor patch_size and "
        f"downsample (found: {', '.join(sorted(attributes)) or 'none'})."
    )


def _from_wsidata(source: Any, key: str | None) -> PatchTable:
    if not (hasattr(source, "tables") and hasattr(source, "shapes")):
        raise TypeError(f"features come from the path of an h5 file or from a WSIData; found {type(source).__name__}.")
    names = list(source.tables)
    if key is None and len(names) == 1:
        key = names[0]
    if key not in names:
        raise KeyError(f"key={key!r}: the tables of features are {', '.join(map(repr, names)) or 'none'}; name one.")
    table = source.tables[key]
    regions = list(map(str, table.obs["library_id"].unique()))
    if len(regions) != 1 or regions[0] not in source.shapes:
        raise KeyError(f"table {key!r} annotates {regions}, and the shapes are {list(source.shapes)}.")
    tiles = source.shapes[regions[0]]
    if "tile_id" in tiles:
        tiles = tiles.set_index("tile_id").loc[table.obs["tile_id"]]
    bounds = tiles.geometry.bounds.to_numpy(float)  # x0, y0, x1, y1
    features = table.X.toarray() if hasattr(table.X, "toarray") else np.asarray(table.X)
    side = float(np.median(bounds[:, 2] - bounds[:, 0]))
    return PatchTable(features.astype(np.float32), (bounds[:, :2] + bounds[:, 2:]) / 2, side)
