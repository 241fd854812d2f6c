"""The encoders by name, and the contract they share: patches of tissue in, one row of features a patch out.

An encoder is found by name in :data:`ENCODERS`, or is any object that satisfies :class:`Encoder`.
"""

import hashlib
import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from sthisto.encoders._registry import ENCODERS, EncoderSpec, Pooling, may_be_passed_on

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "ENCODERS",
    "Encoder",
    "EncoderSpec",
    "LearntEncoder",
    "TokenEncoder",
    "check_patches",
    "has_tokens",
    "has_weights",
    "load",
    "record",
    "restore",
]


class Encoder(Protocol):
    """Patches to features. Cutting and resampling are the caller's; color normalisation is the encoder's.

    Laws, tested for every entry of :data:`ENCODERS` that needs no download: a row depends on its own patch alone,
    whatever the size and the order of the batch; the same patch gives the same bits; all features are finite; no
    global random state is read or set.
    """

    name: str
    dim: int  # features of a patch
    input_size: int  # side of the input patch, pixels
    patch_um: float  # side of the tissue it looks at by default, um

    def __call__(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (n, dim) of RGB patches (n, input_size, input_size, 3)."""


class TokenEncoder(Encoder, Protocol):
    """An encoder that also describes the places of a patch, so that one pass gives features at many points.

    A token stands for ``stride`` x ``stride`` pixels and knows what is around them.
    """

    token_dim: int  # features of a token
    stride: int  # pixels between neighboring tokens

    def tokens(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (n, t, t, token_dim) of the places of patches (n, input_size, input_size, 3), t = input_size //
        stride.

        In reading order (rows, then columns), class and register tokens left out, after the network's last norm:
        their mean over the places is what pooling="mean" gives for the patch.
        """


class LearntEncoder(Encoder, Protocol):
    """An encoder with weights, which says where they come from and can hand them over."""

    provenance: dict[str, Any]  # strings, numbers and arrays: all that is needed to build it again, and its license

    def weights_bytes(self) -> bytes:
        """All weights and buffers, as the bytes of a safetensors file."""


def has_tokens(encoder: Encoder) -> TypeGuard[TokenEncoder]:
    """Tell whether the encoder describes the places of a patch, as :class:`TokenEncoder` has it.

    Examples
    --------
    >>> has_tokens(load("handcrafted"))
    False
    """
    sizes = [getattr(encoder, name, None) for name in ("token_dim", "stride")]
    return all(isinstance(size, int | np.integer) for size in sizes) and callable(getattr(encoder, "tokens", None))


def has_weights(encoder: Encoder) -> TypeGuard[LearntEncoder]:
    """Tell whether the encoder knows where its weights come from, as :class:`LearntEncoder` has it."""
    return isinstance(getattr(encoder, "provenance", None), dict) and callable(getattr(encoder, "weights_bytes", None))


def load(
    encoder: "str | Encoder | nn.Module",
    *,
    weights: str | PathLike[str] | None = None,
    device: str | None = None,
    revision: str | None = None,
    pooling: Pooling | None = None,
    precision: Literal["float32", "bfloat16"] | None = None,
    compile: bool = False,
    **options: Any,
) -> Encoder:
    """Give the encoder of a name, a network as an encoder, or an encoder object itself once it keeps the contract.

    One door for all, so that a backbone of one's own needs no registration.

    Parameters
    ----------
    encoder
        Name in :data:`ENCODERS`; any other network that timm has on the Hub, by its name there; ``"hf-hub:owner/name"``
        for a repository in the form of timm or transformers; a ``torch.nn.Module`` that takes colors (n, 3, h, w); or
        an object that satisfies :class:`Encoder`.
    weights
        Local file with the weights (safetensors, or what torch saves), or a folder as the Hub has it; the Hub and its
        cache where not given.
    device
        Where a network runs, as torch names it; ``None`` takes a GPU where there is one. Encoders without weights run
        on the CPU.
    revision
        Branch, tag or commit on the Hub.
    pooling
        Features of a patch from the tokens of its places: ``"class"`` token, ``"mean"`` of the places, ``"both"`` side
        by side, or ``"own"``, as the network itself does it. ``None`` takes what the encoder was published with.
    precision
        ``"bfloat16"`` or ``"float32"``. ``None`` takes bfloat16 on GPUs that compute in it, else float32.
    compile
        Compile the network (``torch.compile``): slower at first, then faster.

    options
        What the one encoder takes besides: ``threads`` of the hand-crafted one; ``input_size`` (pixels; needed unless timm
        made it), ``patch_um``, ``mean``, ``std`` (of colors from 0 to 1, ImageNet's where not given) and ``name`` of a
        ``torch.nn.Module``, of which a copy is taken.


    Returns
    -------
    The encoder, called with patches (n, input_size, input_size, 3) uint8 RGB, which gives features (n, dim) float32. Networks
    that describe the places of a patch are :class:`TokenEncoder`, those with weights :class:`LearntEncoder`.

    Raises
    ------
    KeyError
        No encoder has this name.
    TypeError
        The object lacks part of the contract, or the encoder does not take one of the options.
    ValueError
        Weights for an encoder without any, or of another architecture; weights, device or options beside an object,
        which has them already; no such device, pooling or precision; a file that is damaged.
    PermissionError
        The weights are gated and the Hub does not give them; the message says where to ask.
    FileNotFoundError
        No such file, repository or revision; offline, and nothing in the cache.
    ConnectionError
        The Hub does not answer, or the download was cut.
    ImportError
        timm or transformers is needed, and is not there.

    Examples
    --------
    >>> import sthisto.encoders
    >>> encoder = sthisto.encoders.load("handcrafted")
    >>> encoder.input_size, encoder.patch_um
    (256, 512.0)
    """
    settings = {"revision": revision, "pooling": pooling, "precision": precision, "compile": compile or None, **options}
    given = {name: value for name, value in settings.items() if value is not None}
    if isinstance(encoder, str):
        if encoder in ENCODERS:
            return ENCODERS[encoder].load(encoder, weights=weights, device=device, **given)
        return _from_source("from_name", encoder, weights=weights, device=device, **given)
    if _is_module(encoder):
        if weights is not None:
            raise ValueError("weights given beside a torch.nn.Module: load them into it.")
        return _from_source("from_module", encoder, device=device, **given)
    given |= {name: value for name, value in {"weights": weights, "device": device}.items() if value is not None}
    if given:
        raise ValueError(f"{', '.join(sorted(given))} given beside an encoder object: set them when the object is made")
    _check_encoder(encoder)
    return encoder  # type: ignore[return-value]  # checked just above


def record(encoder: Encoder, *, keep_weights: bool = False) -> dict[str, Any]:
    """Give what ``uns`` holds of an encoder: its name, where its weights come from, and on demand the weights.

    With the weights the object alone reproduces its features, on a machine without network: :func:`restore`.

    Parameters
    ----------
    encoder
        From :func:`load`.
    keep_weights
        Whether to put the weights in, 4 bytes each. Their license may forbid passing the object on: then a warning
        names it.

    Returns
    -------
    ``encoder``, its name, and for one with weights ``provenance``, a dict of strings, numbers and arrays. With
    ``keep_weights``: ``weights`` (b,) uint8, a safetensors file, and its ``weights_sha256``. h5ad and zarr keep all.

    Raises
    ------
    ValueError
        The weights cannot be kept, as the network could not be built again.

    Examples
    --------
    >>> record(load("handcrafted"))
    {'encoder': 'handcrafted'}
    """
    if not has_weights(encoder):
        if keep_weights and encoder.name not in ENCODERS:
            raise ValueError(f"keep_weights=True: encoder {encoder.name!r} hands no weights over (weights_bytes).")
        return {"encoder": encoder.name}
    about = dict(encoder.provenance)
    if not keep_weights:
        return {"encoder": encoder.name, "provenance": about}
    if about.get("builder") not in {"timm", "transformers"}:
        raise ValueError(
            f"keep_weights=True: the network {encoder.name!r} was made by hand, and its weights alone do not bring "
            "it back. Save it beside the object, and pass it as encoder=."
        )
    if not may_be_passed_on(str(about["license"]), gated=bool(about["gated"])):
        warnings.warn(
            f"the object now holds the weights of {encoder.name!r}, under {about['license']}"
            f"{', gated' if about['gated'] else ''}: do not pass it on where that forbids it.",
            stacklevel=3,
        )
    kept = encoder.weights_bytes()
    return {
        "encoder": encoder.name,
        "provenance": about,
        "weights": np.frombuffer(kept, np.uint8),
        "weights_sha256": hashlib.sha256(kept).hexdigest(),
    }


def restore(made: Mapping[str, Any], *, device: str | None = None) -> Encoder:
    """Undo :func:`record`: from the weights it holds, else from where they came, which have to be the same.

    Parameters
    ----------
    made
        From :func:`record`, or ``uns["sthisto"]["features"][key]``, also from a file.
    device
        Where a network runs.

    Returns
    -------
    The encoder, with its pooling and precision; on the same kind of device it gives the same bits. It is not compiled.

    Raises
    ------
    KeyError
        The encoder was an object of the user's, or an ``torch.nn.Module``.
    ValueError
        The weights are damaged, or others by now.
    OSError
        The weights are not kept, and are not where they came from; as :func:`load` says it.

    Examples
    --------
    >>> restore(record(load("handcrafted"))).name
    'handcrafted'
    """
    name, about = str(made["encoder"]), made.get("provenance", {})
    if about.get("builder") in {"timm", "transformers"}:
        kept = np.asarray(made["weights"], np.uint8).tobytes() if "weights" in made else None
        return _from_source("from_record", about, kept, str(made.get("weights_sha256", "")), device=device)
    if about or name not in ENCODERS:
        raise KeyError(
            f"no encoder {name!r} to be found by name, as it was an object (by name there are: "
            f"{', '.join(sorted(ENCODERS))}): pass it again as encoder=."
        )
    return load(name, device=device)


def _from_source(function: str, *given: Any, **options: Any) -> Encoder:
    """Call what builds networks; torch and more are imported first here."""
    encoder: Encoder = getattr(import_module("sthisto.encoders._sources"), function)(*given, **options)
    return encoder


def _is_module(encoder: object) -> bool:
    """Whether this is a network that is not an encoder by itself; torch is loaded if it is."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(encoder, torch.nn.Module) and bool(_lacks(encoder))


def _lacks(encoder: object) -> list[str]:
    """Name what an object lacks of :class:`Encoder`."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "name": str,
        "dim": (int, np.integer),
        "input_size": (int, np.integer),
        "patch_um": (int, float, np.number),
    }
    wrong = [
        f"{name} ({getattr(encoder, name, 'absent')!r})"
        for name in kinds
        if not isinstance(getattr(encoder, name, None), kinds[name])
    ]
    if isinstance(encoder, type) or not callable(encoder):
        wrong.append("__call__")
    return wrong


def _check_encoder(encoder: object) -> None:
    """TypeError that names what an object lacks of :class:`Encoder`."""
    wrong = _lacks(encoder)
    if wrong:
        raise TypeError(
            f"{encoder!r} is no encoder; wrong or absent: {', '.join(wrong)}. Pass a name "
            f"({', '.join(sorted(ENCODERS))}) or an instance with name, dim, input_size, patch_um and __call__(patches)"
        )


def check_patches(patches: NDArray[np.uint8], side: int) -> None:
    """ValueError unless patches are (n, side, side, 3) uint8, as every encoder here takes them."""
    if patches.dtype != np.uint8 or patches.ndim != 4 or patches.shape[1:] != (side, side, 3):
        raise ValueError(
            f"patches must be RGB, uint8 (0 to 255), of shape (n, {side}, {side}, 3); got {patches.dtype} of shape "
            f"{patches.shape}. sthisto.images.sample_patches cuts them so"
        )
