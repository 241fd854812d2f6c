"""A network as an encoder: the forward pass, on any device, in float32 or bfloat16.

Patches go to the device as they are and are normalised there. A row depends on its own patch alone, but for the last
bits: matrix products add up in another order where a batch has another size.
"""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sthisto._training import pick_device
from sthisto.encoders import check_patches
from sthisto.encoders._architectures import Backbone
from sthisto.encoders._registry import EncoderSpec, Pooling

logger = logging.getLogger("sthisto")

Precision = Literal["float32", "bfloat16"]
Give = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Forward:
    """How a network is run, and what is taken from it; ``None`` leaves the choice to the device and the encoder."""

    device: str | None = None
    pooling: Pooling | None = None
    precision: Precision | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        for name, kinds in (("precision", get_args(Precision)), ("pooling", get_args(Pooling))):
            value = getattr(self, name)
            if value is not None and value not in kinds:
                raise ValueError(f"{name}={value!r}: there are {', '.join(map(repr, kinds))}.")
        pick_device(self.device)  # a device that is not there is refused before anything is downloaded


@dataclass(frozen=True)
class Shape:
    """Lengths of what a network gives for one patch; a token of length 0 where it describes no places."""

    dim: int
    token_dim: int
    stride: int


class NetworkEncoder:
    """A network as :class:`sthisto.encoders.LearntEncoder`; :func:`sthisto.encoders.load` makes it.

    Where memory runs out the batch is halved, for good, and the log says so.
    """

    def __init__(
        self, backbone: Backbone, spec: EncoderSpec, forward: Forward, *, shape: Shape, provenance: dict[str, Any]
    ) -> None:
        self.name = str(provenance["encoder"])
        self.input_size = spec.input_size
        self.patch_um = spec.patch_um
        self.dim = shape.dim
        self.shape = shape
        self.pooling: Pooling = forward.pooling or spec.pooling
        self.device = pick_device(forward.device)
        self.precision: Precision = forward.precision or precision_of(self.device)
        self.provenance = {**provenance, "pooling": self.pooling, "precision": self.precision}
        self.most = 2**20  # patches at once, until memory runs out
        self._backbone = backbone.eval().requires_grad_(requires_grad=False).to(self.device)
        self._raw = torch.compile(self._backbone) if forward.compile else self._backbone
        self._mean, self._std = (torch.tensor(each, device=self.device).view(3, 1, 1) for each in (spec.mean, spec.std))

    def __call__(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (n, dim) float32 of ``patches`` (n, input_size, input_size, 3) uint8; others are a ValueError."""
        return self._run(patches, lambda raw: pooled(self._backbone, raw, self.pooling), (self.dim,))

    def weights_bytes(self) -> bytes:
        """All weights and buffers, as the bytes of a safetensors file."""
        return self._backbone.kept()

    def _run(self, patches: NDArray[np.uint8], give: Give, each: tuple[int, ...]) -> NDArray[np.float32]:
        """Take (n, *each) from the network's output, as many patches at once as memory allows."""
        check_patches(patches, self.input_size)
        found = np.empty((len(patches), *each), np.float32)
        start = 0
        while start < len(patches):
            stop = min(start + self.most, len(patches))
            given = self._forward(patches[start:stop], give)
            if given is None:
                self._halve(stop - start)
            else:
                found[start:stop] = given
                start = stop
        return found

    def _forward(self, patches: NDArray[np.uint8], give: Give) -> NDArray[np.float32] | None:
        """Give what is taken from the network's output, or None where memory ran out."""
        with torch.inference_mode(), exact_in_float32(), self._autocast():
            try:
                taken: NDArray[np.float32] = give(self._raw(self._colors(patches))).float().cpu().numpy()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                return None
        return taken

    def _colors(self, patches: NDArray[np.uint8]) -> Tensor:
        """Normalised colors (n, 3, input_size, input_size) on the device."""
        whole = torch.from_numpy(np.require(patches, requirements=["C", "W"])).to(self.device)
        return (whole.permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise MemoryError(f"encoder {self.name!r}: {self.device} has too little memory for a single patch.")
        if self.device.type != "cpu":
            torch.get_device_module(self.device).empty_cache()
        self.most = tried // 2
        logger.warning(
            "encoder %r: memory of %s ran out at %d patches; %d at once from here on",
            self.name,
            self.device,
            tried,
            self.most,
        )


class TokenNetworkEncoder(NetworkEncoder):
    """A network that describes the places of a patch, too: :class:`sthisto.encoders.TokenEncoder`."""

    @property
    def token_dim(self) -> int:
        """Features of a token."""
        return self.shape.token_dim

    @property
    def stride(self) -> int:
        """Pixels between neighboring tokens."""
        return self.shape.stride

    def tokens(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (n, t, t, token_dim) of the places of patches (n, input_size, input_size, 3), t = input_size // stride."""
        t = self.input_size // self.stride
        return self._run(patches, self._backbone.places, (t, t, self.token_dim))


def encoder_of(
    backbone: Backbone, spec: EncoderSpec, forward: Forward, provenance: dict[str, Any]
) -> NetworkEncoder | TokenNetworkEncoder:
    """Make the encoder, with tokens where the network gives tokens.

    Raises
    ------
    ValueError
        The network has not the tokens that the pooling needs, or gives no features; no such device.
    """
    shape = measure(backbone, spec.input_size, forward.pooling or spec.pooling)
    kind = TokenNetworkEncoder if shape.stride else NetworkEncoder
    sizes = {"dim": shape.dim, "token_dim": shape.token_dim, "stride": shape.stride}
    return kind(backbone, spec, forward, shape=shape, provenance={**provenance, **sizes})


def measure(backbone: Backbone, input_size: int, pooling: Pooling) -> Shape:
    """Run one blank patch through the network, where it is, to know the shape of what it gives."""
    device = next(backbone.parameters(), torch.empty(0)).device
    with torch.inference_mode():
        raw = backbone.eval()(torch.zeros(1, 3, input_size, input_size, device=device))
        if not isinstance(raw, Tensor) or raw.ndim not in {2, 3, 4}:
            given = f"a tensor of shape {tuple(raw.shape)}" if isinstance(raw, Tensor) else type(raw).__name__
            raise ValueError(f"the network gives {given} for one patch; expected features (n, d), tokens or maps.")
        dim = pooled(backbone, raw, pooling).shape[1]
        places = backbone.places(raw) if raw.ndim > 2 else raw
    square = places.ndim == 4 and places.shape[1] == places.shape[2]
    return Shape(dim, places.shape[3], input_size // places.shape[1]) if square else Shape(dim, 0, 0)


def pooled(backbone: Backbone, raw: Tensor, pooling: Pooling) -> Tensor:
    """Features (b, d) from a network's raw output.

    Raises
    ------
    ValueError
        The network has no class token, or no tokens.
    """
    if pooling == "own":
        found = backbone.own(raw)
        if found.ndim != 2:
            raise ValueError(f"the network pools nothing itself (shape {tuple(found.shape)}): set pooling='mean'.")
        return found
    if raw.ndim == 2 or (pooling != "mean" and not (backbone.has_class and raw.ndim == 3)):
        lacks = "class token" if pooling != "mean" else "tokens"
        raise ValueError(f"pooling={pooling!r}: the network gives no {lacks}; set pooling='own'.")
    if pooling == "class":
        return raw[:, 0]
    mean = backbone.places(raw).flatten(1, -2).float().mean(1)
    return mean if pooling == "mean" else torch.cat([raw[:, 0].float(), mean], dim=1)


def precision_of(device: torch.device) -> Precision:
    """Fastest precision that loses nothing that matters: bfloat16 where the device computes in it."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"


def exact_in_float32() -> contextlib.AbstractContextManager[Any]:
    """Within, convolutions of float32 on a GPU are float32: by default torch rounds them to 10 bits."""
    flags: contextlib.AbstractContextManager[Any] = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return flags


def out_of_memory(error: Exception) -> bool:
    """Whether this is torch's or Python's way to say that memory ran out."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(words in str(error) for words in ("out of memory", "not enough memory", "t allocate memory"))
