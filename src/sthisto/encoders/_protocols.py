"""The contract of encoders: patches of tissue in, one row of features per patch out."""

from typing import Any, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

BATCH_SIZE = 64  # of encoders that set none


class Encoder(Protocol):
    """Image features of patches. The caller cuts and resamples them; color normalization is the encoder's.

    Properties tested for every entry of :data:`ENCODERS` that needs no download: a row depends on its own patch alone,
    whatever the size and the order of the batch; the same patch gives the same bits; all features are finite; no
    global random state is read or set. An attribute ``batch_size`` is optional (64 where it is missing).

    Attributes
    ----------
    name
        Name of the encoder, which is stored with its features.
    dim
        Number of features per patch.
    input_size
        Side of the input patch, pixels.
    patch_um
        Side of the tissue patch that the encoder was made for, um.
    """

    name: str
    dim: int
    input_size: int
    patch_um: float

    def __call__(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (n, dim) of RGB patches (n, input_size, input_size, 3)."""


class TokenEncoder(Encoder, Protocol):
    """An encoder that also gives features of the parts of a patch, so that one pass serves many points.

    Attributes
    ----------
    token_dim
        Number of features per token.
    stride
        Distance between neighboring tokens, pixels.
    """

    token_dim: int
    stride: int

    def tokens(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (n, t, t, token_dim) of patches (n, input_size, input_size, 3), t = input_size // stride.

        Rows, then columns, without class and register tokens, after the network's last normalization: their mean over
        the patch is what ``pooling="mean"`` gives.
        """


class PretrainedEncoder(Encoder, Protocol):
    """An encoder with weights, which records their source and can export them.

    Attributes
    ----------
    provenance
        Strings, numbers and arrays: all that is needed to build the encoder again, and its license.
    """

    provenance: dict[str, Any]

    def weights_bytes(self) -> bytes:
        """All weights and buffers, as the bytes of a safetensors file."""


def has_tokens(encoder: Encoder) -> TypeGuard[TokenEncoder]:
    """Whether the encoder gives tokens, as :class:`TokenEncoder` defines them.

    Examples
    --------
    >>> from sthisto.encoders import load
    >>> has_tokens(load("handcrafted"))
    False
    """
    sizes = [getattr(encoder, name, None) for name in ("token_dim", "stride")]
    return all(isinstance(size, int | np.integer) for size in sizes) and callable(getattr(encoder, "tokens", None))


def has_weights(encoder: Encoder) -> TypeGuard[PretrainedEncoder]:
    """Whether the encoder records the source of its weights, as :class:`PretrainedEncoder` defines it."""
    return isinstance(getattr(encoder, "provenance", None), dict) and callable(getattr(encoder, "weights_bytes", None))


def missing_parts(encoder: object) -> list[str]:
    """List what an object lacks of :class:`Encoder`."""
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


def check_patches(patches: NDArray[np.uint8], side: int) -> None:
    """ValueError unless patches are (n, side, side, 3) uint8."""
    if patches.dtype != np.uint8 or patches.ndim != 4 or patches.shape[1:] != (side, side, 3):
        raise ValueError(
            f"patches must be RGB, uint8 (0 to 255), of shape (n, {side}, {side}, 3); found {patches.dtype} of shape "
            f"{patches.shape}. Cut them with sthisto.images.sample_patches."
        )


def checked_count(name: str, value: Any) -> int:
    """Return a positive whole number, or raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} has to be a positive whole number; found {value!r}.")
    return int(value)
