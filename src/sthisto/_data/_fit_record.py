"""Fitted models as data: strings, numbers, arrays and one safetensors blob, which h5ad and zarr keep to the bit."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as from_safetensors
from safetensors.numpy import save as to_safetensors

from sthisto._data._store import GENE_TEST, UNS, records, write_record
from sthisto._files import whole_file
from sthisto._messages import listed

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted model as ``uns`` keeps it.

    Attributes
    ----------
    model, params, random_state
        What was fitted.
    genes
        (g,) names.
    sections
        (s,) names of the sections it was fitted on.
    library_key
        "" where there is one section without a column of its own.
    features_key, feature_settings
        "" where the model reads none; how they were made, as JSON, "" for features from elsewhere.
    layer
        "" for ``X``.
    pitch
        (s,) pixels, the unit of length in each section.
    spots, xy
        (n,) names of the training spots and (n, 2) where they were, pixels.
    image_paths, image_mpp
        (s,) images that patches were cut from, and their scales; (0,) where the model reads no pixels.
    arrays
        State of the model and of its uncertainty.
    history
        Training curves.
    """

    model: str
    params: dict[str, Any]
    genes: NDArray[np.str_]
    sections: NDArray[np.str_]
    library_key: str
    features_key: str
    feature_settings: str
    layer: str
    random_state: int
    pitch: NDArray[np.float64]
    spots: NDArray[np.str_]
    xy: NDArray[np.float64]
    image_paths: NDArray[np.str_]
    image_mpp: NDArray[np.float64]
    arrays: dict[str, NDArray[np.generic]]
    history: dict[str, NDArray[np.float64]]


def write_fit(adata: AnnData, key: str, fit: Fit) -> None:
    """Keep a fitted model in ``uns``; what was found out about the genes of an earlier fit of this name goes."""
    for column in (f"{key}_{name}" for name in GENE_TEST):
        if column in adata.var:
            del adata.var[column]
    write_record(adata, "fit", key, pack(fit))


def read_fit(adata: AnnData, key: str) -> Fit:
    """Take a fitted model out of ``uns``; refuses one that is damaged or newer."""
    fits = records(adata, "fit")
    if key not in fits:
        raise KeyError(
            f"no fitted model {key!r} in adata.uns['{UNS}']['fit'] (found: {listed(fits)}). "
            "Run sthisto.tl.fit(adata) first."
        )
    return unpack(fits[key])


def plain_params(params: Mapping[str, Any] | None) -> dict[str, Any]:
    """Give settings as JSON keeps them, so that a model is the same before and after a round trip."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(params or {}), default=_plain))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"params={params!r}: settings are numbers, strings, None or lists of them ({error})."
        ) from error
    return plain


def pack(fit: Fit) -> dict[str, Any]:
    """Turn a fit into what h5ad and zarr keep: strings, numbers, arrays and one safetensors blob."""
    blob = _blob(fit.arrays)
    record = {name: value for name, value in vars(fit).items() if name != "arrays"}
    record["params"] = json.dumps(fit.params)  # a dict of None and mixed lists would not come back as it was
    return {"schema": SCHEMA, "sha256": _digest(fit, blob), **record, "state": np.frombuffer(blob, dtype=np.uint8)}


def unpack(record: Mapping[str, Any]) -> Fit:
    """Undo :func:`pack`.

    Raises
    ------
    ValueError
        Anything in it is missing, changed, or of a newer schema.
    """
    fit = _fit(record)
    if "state" not in record:
        raise ValueError("the fitted model is damaged: its state is missing. Fit again.")
    return _checked(fit, np.asarray(record["state"]).astype(np.uint8).tobytes(), record)


def save_fit(fit: Fit, path: str | PathLike[str]) -> None:
    """One safetensors file, see :func:`fit_to_bytes`."""
    with whole_file(Path(path)) as draft:
        draft.write_bytes(fit_to_bytes(fit))


def fit_to_bytes(fit: Fit) -> bytes:
    """The arrays as safetensors, and everything else as JSON in its metadata."""
    rest = {"schema": SCHEMA, "sha256": _digest(fit, _blob(fit.arrays)), **_rest(fit), "params": json.dumps(fit.params)}
    return _blob(fit.arrays, {UNS: json.dumps(rest, default=_plain)})


def load_fit(path: str | PathLike[str]) -> Fit:
    """Undo :func:`save_fit`."""
    return fit_from_bytes(Path(path).read_bytes(), str(path))


def fit_from_bytes(whole: bytes, where: str = "the prior") -> Fit:
    """Undo :func:`fit_to_bytes`."""
    try:
        arrays = from_safetensors(whole)
        header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
        record = json.loads(header["__metadata__"][UNS])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{where} holds no whole model that sthisto.tl.save wrote: {error!r}.") from error
    return _checked(_fit(record), _blob(arrays), record)


def no_spots(genes: NDArray[np.str_]) -> AnnData:
    """Make an AnnData of genes alone."""
    return AnnData(X=np.empty((0, len(genes)), dtype=np.float32), var=pd.DataFrame(index=pd.Index(genes)))


def _blob(arrays: Mapping[str, NDArray[np.generic]], metadata: dict[str, str] | None = None) -> bytes:
    return to_safetensors({name: np.asarray(array, order="C") for name, array in arrays.items()}, metadata)


def _rest(fit: Fit) -> dict[str, Any]:
    """Everything but the arrays, a shallow copy."""
    return {name: value for name, value in vars(fit).items() if name != "arrays"}


def _plain(value: Any) -> Any:
    """Turn numpy's arrays and numbers into what JSON has."""
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"{type(value).__name__} is no setting")
    return value.tolist()


def _digest(fit: Fit, blob: bytes) -> str:
    """Checksum over all of a fit, the same whichever file it went through."""
    rest = json.dumps(_rest(fit), default=_plain, sort_keys=True)
    return hashlib.sha256(rest.encode() + blob).hexdigest()


def _checked(fit: Fit, blob: bytes, record: Mapping[str, Any]) -> Fit:
    if _digest(fit, blob) != record.get("sha256"):
        raise ValueError("the fitted model is damaged: it does not match its checksum. Fit again.")
    return replace(fit, arrays=from_safetensors(blob))


def _fit(record: Mapping[str, Any]) -> Fit:
    """Take up everything but the arrays."""
    missing = sorted({"schema", *(entry.name for entry in fields(Fit))} - {"arrays"} - set(record))
    if "schema" in record and int(record["schema"]) > SCHEMA:
        raise ValueError(
            f"the fitted model has schema {record['schema']}, this sthisto reads up to {SCHEMA}: upgrade sthisto."
        )
    if missing:
        raise ValueError(f"the fitted model is damaged: {listed(missing)} missing. Fit again.")
    try:
        return _typed(record)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"the fitted model is damaged: {error}. Fit again.") from error


def _typed(record: Mapping[str, Any]) -> Fit:
    """Types as they were, whatever the file made of them."""
    return Fit(
        model=str(record["model"]),
        params=json.loads(record["params"]),
        genes=_texts(record["genes"]),
        sections=_texts(record["sections"]),
        library_key=str(record["library_key"]),
        features_key=str(record["features_key"]),
        feature_settings=str(record["feature_settings"]),
        layer=str(record["layer"]),
        random_state=int(record["random_state"]),
        pitch=np.asarray(record["pitch"], dtype=np.float64),
        spots=_texts(record["spots"]),
        xy=np.asarray(record["xy"], dtype=np.float64),
        image_paths=_texts(record["image_paths"]),
        image_mpp=np.asarray(record["image_mpp"], dtype=np.float64),
        arrays={},
        history={name: np.asarray(curve, dtype=np.float64) for name, curve in record["history"].items()},
    )


def _texts(values: Iterable[object]) -> NDArray[np.str_]:
    """Strings of a fixed width; zarr hands out numpy's new ones, which do not convert."""
    return np.array([str(value) for value in values], dtype=str)
