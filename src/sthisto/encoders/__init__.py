"""Image encoders: patches of tissue in, one row of features per patch out.

An encoder is loaded by its name in :data:`ENCODERS`, or is any object that satisfies :class:`Encoder`.
"""

import hashlib
import sys
from collections.abc import Mapping
from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sthisto._messages import warn
from sthisto.encoders._protocols import (
    Encoder,
    PretrainedEncoder,
    TokenEncoder,
    check_patches,
    checked_count,
    has_tokens,
    has_weights,
    missing_parts,
)
from sthisto.encoders._registry import ENCODERS, EncoderSpec, Pooling, is_redistributable
from sthisto.encoders._tables import read_features

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

__all__ = [
    "ENCODERS",
    "Encoder",
    "EncoderSpec",
    "PretrainedEncoder",
    "TokenEncoder",
    "check_patches",
    "has_tokens",
    "has_weights",
    "load",
    "read_features",
    "record",
    "restore",
    "table",
]


def load(
    encoder: "str | Encoder | nn.Module",
    *,
    weights: str | PathLike[str] | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    revision: str | None = None,
    pooling: Pooling | None = None,
    precision: Literal["float32", "bfloat16"] | None = None,
    compile: bool = False,
    **options: Any,
) -> Encoder:
    """Load an encoder by name, wrap a network as an encoder, or check an encoder object.

    Weights, device and batch size belong to the encoder, so that the verbs that use it need no argument for them.

    Parameters
    ----------
    encoder
        Name in :data:`ENCODERS`; any other network that timm has on the Hub, by its name there; ``"hf-hub:owner/name"``
        for a repository in the form of timm or transformers; an image model of the package ``lazyslide_models``, by its
        name there or ``"lazyslide:name"``; a ``torch.nn.Module`` that takes colors (n, 3, h, w); or an object that
        satisfies :class:`Encoder`, which is returned as it is.
    weights
        Local file with the weights (safetensors, or a file of ``torch.save``), or a folder in the Hub's layout. The
        Hub and its cache where not given.
    device
        Where a network runs, as torch names it; ``None`` takes a GPU where there is one. Encoders without weights run
        on the CPU.
    batch_size
        Patches encoded at once; 64 where not given.
    revision
        Branch, tag or commit on the Hub.
    pooling
        Features of a patch: its ``"class"`` token, the ``"mean"`` of its other tokens, ``"both"`` concatenated, or
        ``"native"``, the network's own pooling. ``None`` takes what the encoder was published with.
    precision
        ``"bfloat16"`` or ``"float32"``. ``None`` takes bfloat16 on GPUs that compute in it, else float32.
    compile
        Compile the network (``torch.compile``): slower at first, then faster.
    options
        Settings of one encoder: ``threads`` of the hand-crafted one; ``input_size`` (pixels; required unless timm made
        the network), ``patch_um``, ``mean``, ``std`` (of colors from 0 to 1, ImageNet's where not given) and ``name``
        of a ``torch.nn.Module``, of which a copy is taken.

    Returns
    -------
    The encoder, called with patches (n, input_size, input_size, 3) uint8 RGB, which gives features (n, dim) float32.
    Networks with tokens are :class:`TokenEncoder`, those with weights :class:`PretrainedEncoder`.

    Raises
    ------
    KeyError
        No encoder has this name.
    TypeError
        The object lacks part of the contract, or the encoder does not take one of the options.
    ValueError
        Weights for an encoder without any, or of another architecture; settings given with an encoder object, which
        has them already; no such device, pooling or precision; a batch size below 1; a damaged file.
    PermissionError
        The weights are gated and the Hub does not give them; the message names the page where to ask for access.
    FileNotFoundError
        No such file, repository or revision; offline, and nothing in the cache.
    ConnectionError
        The Hub does not answer, or the download was cut.
    ImportError
        timm or transformers is needed and not installed.

    Examples
    --------
    >>> import sthisto.encoders
    >>> encoder = sthisto.encoders.load("handcrafted")
    >>> encoder.input_size, encoder.patch_um
    (256, 512.0)
    """
    settings = {
        "weights": weights,
        "device": device,
        "batch_size": None if batch_size is None else checked_count("batch_size", batch_size),
        "revision": revision,
        "pooling": pooling,
        "precision": precision,
        "compile": compile or None,
        **options,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    if isinstance(encoder, str):
        return ENCODERS[encoder].load(encoder, **given) if encoder in ENCODERS else _call("from_name", encoder, **given)
    if _is_module(encoder):
        if weights is not None:
            raise ValueError("weights= is given with a torch.nn.Module: load the weights into the module.")
        return _call("from_module", encoder, **given)
    if given:
        raise ValueError(f"{', '.join(sorted(given))} given with an encoder object: set them when the object is made.")
    missing = missing_parts(encoder)
    if missing:
        raise TypeError(
            f"{encoder!r} is no encoder; wrong or absent: {', '.join(missing)}. Pass an instance with name, dim, "
            f"input_size, patch_um and __call__(patches), or a name ({', '.join(sorted(ENCODERS))})."
        )
    return encoder  # type: ignore[return-value]  # checked just above


def record(encoder: Encoder, *, keep_weights: bool = False) -> dict[str, Any]:
    """Metadata of an encoder for ``uns``: its name, the source of its weights, and on request the weights.

    With the weights the object alone reproduces its features, without network: :func:`restore`.

    Parameters
    ----------
    encoder
        From :func:`load`.
    keep_weights
        Whether to include the weights, 4 bytes each. Their license may forbid sharing the object: then a warning
        names it.

    Returns
    -------
    ``encoder``, its name, and for one with weights ``provenance``, a dict of strings, numbers and arrays. With
    ``keep_weights``: ``weights`` (b,) uint8, a safetensors file, and its ``weights_sha256``. h5ad and zarr keep all.

    Raises
    ------
    ValueError
        The weights cannot be kept, as the network could not be built from them.

    Examples
    --------
    >>> record(load("handcrafted"))
    {'encoder': 'handcrafted'}
    """
    if not has_weights(encoder):
        if keep_weights and encoder.name not in ENCODERS:
            raise ValueError(f"keep_weights=True: encoder {encoder.name!r} exports no weights (weights_bytes).")
        return {"encoder": encoder.name}
    provenance = dict(encoder.provenance)
    if not keep_weights:
        return {"encoder": encoder.name, "provenance": provenance}
    if provenance.get("builder") not in {"timm", "transformers"}:
        raise ValueError(
            f"keep_weights=True: the network {encoder.name!r} is a module of your own, which its weights alone do not "
            "rebuild. Save the module separately, and pass it as encoder=."
        )
    if not is_redistributable(str(provenance["license"]), gated=bool(provenance["gated"])):
        warn(
            f"the object now holds the weights of {encoder.name!r}, under {provenance['license']}"
            f"{', gated' if provenance['gated'] else ''}: do not share it where that forbids it."
        )
    weights = encoder.weights_bytes()
    return {
        "encoder": encoder.name,
        "provenance": provenance,
        "weights": np.frombuffer(weights, np.uint8),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }


def restore(metadata: Mapping[str, Any], *, device: str | None = None, batch_size: int | None = None) -> Encoder:
    """Rebuild an encoder from :func:`record`: from the weights it holds, else from their source, if unchanged.

    Parameters
    ----------
    metadata
        From :func:`record`, or ``uns["sthisto"]["features"][key]``, also from a file.
    device, batch_size
        As in :func:`load`.

    Returns
    -------
    The encoder, with its pooling and precision; on the same kind of device it gives the same bits. It is not compiled.

    Raises
    ------
    KeyError
        The encoder was an object of the user's, or a ``torch.nn.Module``.
    ValueError
        The weights are damaged or have changed.
    OSError
        The weights are not kept, and their source does not have them; as in :func:`load`.

    Examples
    --------
    >>> restore(record(load("handcrafted"))).name
    'handcrafted'
    """
    name, provenance = str(metadata["encoder"]), metadata.get("provenance", {})
    if provenance.get("builder") in {"timm", "transformers"}:
        weights = np.asarray(metadata["weights"], np.uint8).tobytes() if "weights" in metadata else None
        sha256 = str(metadata.get("weights_sha256", ""))
        size = {} if batch_size is None else {"batch_size": checked_count("batch_size", batch_size)}
        return _call("from_record", provenance, weights, sha256, device=device, **size)
    if provenance or not (name in ENCODERS or name.startswith("lazyslide:")):
        raise KeyError(
            f"encoder {name!r} was an object and cannot be loaded by name (names are {', '.join(sorted(ENCODERS))}): "
            "pass the object as encoder=."
        )
    return load(name, device=device, batch_size=batch_size)


def table() -> "pd.DataFrame":
    """Compare the encoders of the registry: score, size and license.

    Returns
    -------
    One row per encoder, sorted by ``hest``, the score on HEST-Bench (mean Pearson r over nine tasks, NaN if unknown);
    ``commercial`` and ``gated`` are described in :class:`EncoderSpec`, ``parameters`` are in millions.

    Examples
    --------
    >>> best = table().query("commercial == True and not gated")
    >>> best.index[0]
    'h-optimus-0'
    """
    import pandas as pd  # noqa: PLC0415

    columns = ["hest", "dim", "parameters", "license", "commercial", "gated", "input_size", "patch_um", "weights"]
    rows = [[getattr(spec, column) for column in columns] for spec in ENCODERS.values()]
    frame = pd.DataFrame(rows, index=pd.Index(ENCODERS, name="encoder"), columns=columns)
    return frame.astype({"hest": float, "parameters": float}).sort_values("hest", ascending=False, kind="stable")


def _call(function: str, *arguments: Any, **options: Any) -> Encoder:
    """Call a builder of networks; torch is imported first here."""
    encoder: Encoder = getattr(import_module("sthisto.encoders._sources"), function)(*arguments, **options)
    return encoder


def _is_module(encoder: object) -> bool:
    """Whether this is a network that is not itself an encoder; torch is loaded if it is."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(encoder, torch.nn.Module) and bool(missing_parts(encoder))
