"""Finished features kept on disk, so that a run that was killed is resumed.

A cache is a zarr group of numbered parts. A part is written under another name and renamed once it is whole, so that
the parts are whole and in order whenever a run is killed. A part holds rows of the features and how much work was done
when they had these values; rows that are added to several times (dense features) occur in several parts, and the last
one counts. Values are kept exactly, so that a resumed run gives the same bits.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sthisto._files import whole_folder
from sthisto.encoders._protocols import Encoder, has_tokens, has_weights
from sthisto.images import Image

FORMAT = 2
EVERY = 2.0  # seconds of work that may be lost
_MARK = "sthisto_features"
_SAMPLES, _SAMPLE = 5, 64  # squares along each side, and their pixels, by which an image on disk is identified
_TOLERANCE = 0.01  # of the root mean square: rounding of an encoder's output; other weights differ by far more


class FeatureCache:
    """Finished rows of one array of features.

    Parameters
    ----------
    folder
        Where they are kept; made where it does not exist.
    settings
        All that the features depend on, as JSON values.

    Raises
    ------
    ValueError
        The folder holds something else, or features made with other settings, which the message names.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._parts = 0
        self._changed: list[NDArray[np.intp]] = []
        self._last = time.monotonic()
        _group(folder.parent, {})
        changed = _differences(_group(folder, settings), settings)
        if changed:
            raise ValueError(
                f"{folder} holds features made with other settings: {'; '.join(changed)}. Give cache= another path, or "
                "delete this one."
            )

    def restore(self, features: NDArray[np.float32]) -> int:
        """Copy what was kept into ``features`` (n, d), and return how much of the work was done."""
        import zarr  # noqa: PLC0415

        done = 0
        for number in count():
            part = self.folder / f"{number:06d}"
            if not part.exists():
                break
            group = zarr.open_group(part, mode="r")
            rows, values = np.asarray(group["rows"]), np.asarray(group["features"])
            attributes: dict[str, Any] = dict(group.attrs)
            done = int(attributes["done"])
            if attributes["sha256"] != _digest(rows, values, np.array(done)):
                raise ValueError(f"the cache is damaged: {part} does not match its checksum. Delete {self.folder}.")
            features[rows] = values
            self._parts = number + 1
        return done

    def keep(self, features: NDArray[np.float32], rows: NDArray[np.intp], done: int, *, last: bool) -> None:
        """Take note of the ``rows`` that have changed; write them when it is time, and when they are the last."""
        self._changed.append(rows)
        if last or time.monotonic() - self._last >= EVERY:
            changed = np.unique(np.concatenate(self._changed))
            self._write(changed, features[changed], done)
            self._changed = []
            self._last = time.monotonic()

    def _write(self, rows: NDArray[np.intp], values: NDArray[np.float32], done: int) -> None:
        import zarr  # noqa: PLC0415

        with whole_folder(self.folder / f"{self._parts:06d}") as draft:
            group = zarr.create_group(draft, attributes={"done": done, "sha256": _digest(rows, values, np.array(done))})
            group.create_array("rows", data=rows, chunks=rows.shape)
            group.create_array("features", data=values, chunks=values.shape)
        self._parts += 1


def _group(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make a group of a cache with these settings, or read those of the existing one."""
    import zarr  # noqa: PLC0415

    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as draft:
            zarr.create_group(draft, attributes={_MARK: FORMAT, **settings})
        return dict(settings)
    try:
        held: dict[str, Any] = dict(zarr.open_group(folder, mode="r").attrs)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no cache of features. Give cache= a path of its own.") from error
    if held.pop(_MARK, None) != FORMAT:
        raise ValueError(f"{folder} is no cache of features of this version. Give cache= a path of its own.")
    return held


def _differences(held: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Old and new value of each setting that differs."""
    return [
        f"{name} (was {_shown(held.get(name))}, is {_shown(settings.get(name))})"
        for name in sorted({*held, *settings})
        if not _same(name, held.get(name), settings.get(name))
    ]


def cache_settings(
    image: Image, xy: NDArray[np.float64], side: float, window: float | None, encoder: Encoder
) -> dict[str, Any]:
    """All that features depend on, as JSON values.

    The encoder is identified by its provenance and by its output for one patch, as objects of one's own may have no
    provenance. The batch size is left out: a run that ran out of memory is resumed with a smaller one.
    """
    provenance = encoder.provenance if has_weights(encoder) else {}
    return {
        **{f"encoder.{name}": json.loads(json.dumps(value, default=_plain)) for name, value in provenance.items()},
        "encoder": encoder.name,
        "encoder.output": _output(encoder, dense=window is not None),
        "input_size": int(encoder.input_size),
        "side": float(side),
        "window": window,
        "points": f"{len(xy)}, sha256 {_digest(xy)}",
        **{f"image.{name}": value for name, value in _image_identity(image).items()},
    }


def _output(encoder: Encoder, *, dense: bool) -> list[float]:
    """Return some of the features of a patch of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (1, encoder.input_size, encoder.input_size, 3), np.uint8)
    features = encoder.tokens(noise) if dense and has_tokens(encoder) else encoder(noise)
    return [float(value) for value in np.ravel(features)[:64]]


def _image_identity(image: Image) -> dict[str, Any]:
    """Identify an image by size, date and some pixels of a file, or by all pixels of an array in memory."""
    identity: dict[str, Any] = {"shape": [float(side) for side in image.shape], "scales": list(image.scales)}
    path = Path(image.source) if image.source else None
    if path is not None and path.is_file():
        identity |= {"bytes": path.stat().st_size, "modified": path.stat().st_mtime_ns}
        return identity | {"pixels": _some_pixels(image)}
    if all(isinstance(level, np.ndarray) and not isinstance(level, np.memmap) for level in image.levels):
        return identity | {"pixels": _digest(*image.levels)}
    return identity | {"pixels": _some_pixels(image)}


def _some_pixels(image: Image) -> str:
    """Digest of squares spread over the finest level; all of it would take minutes on a slide."""
    height, width = (round(side * image.scales[0]) for side in image.shape)
    centers = (np.arange(_SAMPLES) + 0.5) / _SAMPLES
    corners = [(int(y * height) - _SAMPLE // 2, int(x * width) - _SAMPLE // 2) for y in centers for x in centers]
    return _digest(*(image.read(0, y, y + _SAMPLE, x, x + _SAMPLE) for y, x in corners))


def _digest(*arrays: NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Convert numpy's numbers and arrays to JSON values; long arrays to their digest."""
    if not isinstance(value, np.ndarray | np.generic):
        return repr(value)
    return value.tolist() if np.size(value) <= 64 else f"sha256 {_digest(np.asarray(value))}"


def _same(name: str, held: Any, given: Any) -> bool:
    if name != "encoder.output" or not (isinstance(held, list) and isinstance(given, list)):
        return bool(held == given)
    if len(held) != len(given):
        return False
    difference = np.subtract(held, given)
    return bool(np.abs(difference).max(initial=0) <= _TOLERANCE * np.sqrt(np.mean(np.square(given))))


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]} ..."
