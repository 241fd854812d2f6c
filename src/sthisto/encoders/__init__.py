"""The encoders by name, and the contract they share: patches of tissue in, one row of features a patch out.

An encoder is found by name in :data:`ENCODERS`, or is any object that satisfies :class:`Encoder`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

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
]

Colour = tuple[float, float, float]


class Encoder(Protocol):
    """Patches to features. Cutting and resampling are the caller's; colour normalisation is the encoder's.

    Laws, tested for every entry of :data:`ENCODERS` that needs no download: a row depends on its own patch alone,
    whatever the size and the order of the batch; the same patch gives the same bits; all features are finite; no
    global random state is read or set.
    """

    name: str
    dim: int  # features of a patch
    field: int  # side of the input patch, pixels
    patch_um: float  # side of the tissue it looks at by default, um

    def __call__(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (n, dim) of RGB patches (n, field, field, 3)."""


class TokenEncoder(Encoder, Protocol):
    """An encoder that also describes the places of a patch, so that one pass gives features at many points.

    A token stands for ``stride`` x ``stride`` pixels and knows what is around them.
    """

    token_dim: int  # features of a token
    stride: int  # pixels between neighbouring tokens

    def tokens(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (n, t, t, token_dim) of the places of patches (n, field, field, 3), t = field // stride.

        In reading order (rows, then columns), class and register tokens left out, after the network's last norm:
        their mean over the places is what pooling="mean" gives for the patch.
        """


class LearntEncoder(Encoder, Protocol):
    """An encoder with weights, which says where they come from and can hand them over."""

    provenance: dict[str, Any]  # strings, numbers and arrays: all that is needed to build it again, and its licence

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


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """What the registry says of an encoder without importing it: identity, input and licence in one record."""

    source: str  # "module:function", called as function(name, spec, weights=, device=, **options)
    dim: int
    field: int = 224
    patch_um: float = 112.0  # 224 pixels at the 0.5 um/px that most image models were trained at
    weights: str | None = None  # "owner/name@revision" on the Hub
    params: Mapping[str, object] = dataclasses.field(default_factory=dict)  # of the architecture
    mean: Colour = (0.485, 0.456, 0.406)  # of ImageNet
    std: Colour = (0.229, 0.224, 0.225)
    gated: bool = False
    license: str
    reference: str

    def load(self, name: str, *, weights: str | None, device: str | None, **options: object) -> Encoder:
        """Import the source and build the encoder."""
        module, function = self.source.split(":")
        encoder: Encoder = getattr(import_module(module), function)(
            name, self, weights=weights, device=device, **options
        )
        return encoder


ENCODERS: dict[str, EncoderSpec] = {
    "handcrafted": EncoderSpec(
        source="sthisto.encoders.handcrafted:build",
        dim=102,
        field=256,
        patch_um=512.0,
        license="BSD-3-Clause",
        reference="Ruifrok & Johnston 2001; Haralick et al. 1973; Ojala et al. 2002",
    ),
}


def load(encoder: str | Encoder, *, weights: str | None = None, device: str | None = None, **options: Any) -> Encoder:
    """Give the encoder of a name, or an encoder object itself once it is known to keep the contract.

    One door for both, so that a backbone of one's own needs no registration: any object with the attributes of
    :class:`Encoder` will do.

    Parameters
    ----------
    encoder
        Name in :data:`ENCODERS`, or an object that satisfies :class:`Encoder`.
    weights
        Local file with the weights, where the encoder has weights; the registry's own source where not given.
    device
        Where a learnt encoder runs, as torch names it; encoders without weights run on the CPU.
    options
        What the one encoder takes besides, such as ``threads`` of the hand-crafted one.

    Returns
    -------
    The encoder, called with patches (n, field, field, 3) uint8 RGB, which gives features (n, dim) float32.

    Raises
    ------
    KeyError
        No encoder has this name.
    TypeError
        The object lacks part of the contract, or the encoder does not take one of the options.
    ValueError
        Weights for an encoder without any, or weights, device or options beside an object, which has them already.

    Examples
    --------
    >>> import sthisto.encoders
    >>> encoder = sthisto.encoders.load("handcrafted")
    >>> encoder.field, encoder.patch_um
    (256, 512.0)
    """
    if isinstance(encoder, str):
        if encoder not in ENCODERS:
            raise KeyError(f"no encoder {encoder!r} (there are: {', '.join(sorted(ENCODERS))}); an object is taken too")
        return ENCODERS[encoder].load(encoder, weights=weights, device=device, **options)
    given = {"weights": weights, "device": device} | options
    surplus = sorted(name for name, value in given.items() if value is not None)
    if surplus:
        raise ValueError(f"{', '.join(surplus)} given beside an encoder object: set them when the object is made")
    _check_encoder(encoder)
    return encoder


def _check_encoder(encoder: object) -> None:
    """TypeError that names what an object lacks of :class:`Encoder`."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "name": str,
        "dim": (int, np.integer),
        "field": (int, np.integer),
        "patch_um": (int, float, np.number),
    }
    wrong = [
        f"{name} ({getattr(encoder, name, 'absent')!r})"
        for name in kinds
        if not isinstance(getattr(encoder, name, None), kinds[name])
    ]
    if isinstance(encoder, type) or not callable(encoder):
        wrong.append("__call__")
    if wrong:
        raise TypeError(
            f"{encoder!r} is no encoder; wrong or absent: {', '.join(wrong)}. Pass a name "
            f"({', '.join(sorted(ENCODERS))}) or an instance with name, dim, field, patch_um and __call__(patches)"
        )


def check_patches(patches: NDArray[np.uint8], side: int) -> None:
    """ValueError unless patches are (n, side, side, 3) uint8, as every encoder here takes them."""
    if patches.dtype != np.uint8 or patches.ndim != 4 or patches.shape[1:] != (side, side, 3):
        raise ValueError(
            f"patches must be RGB, uint8 (0 to 255), of shape (n, {side}, {side}, 3); got {patches.dtype} of shape "
            f"{patches.shape}. sthisto.images.sample_patches cuts them so"
        )
