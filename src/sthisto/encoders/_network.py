"""A network as an encoder: the forward pass, on any device, in float32 or bfloat16.

Patches go to the device as they are and are normalized there. A row depends on its own patch alone, up to rounding:
matrix products add up in another order where a batch has another size.
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
from sthisto.encoders._architectures import Backbone
from sthisto.encoders._protocols import BATCH_SIZE, check_patches
from sthisto.encoders._registry import EncoderSpec, Pooling

logger = logging.getLogger("sthisto")

Precision = Literal["float32", "bfloat16"]
Take = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Forward:
    """How a network is run and pooled; ``None`` leaves the choice to the device and the encoder."""

    device: str | None = None
    batch_size: int = BATCH_SIZE
    pooling: Pooling | None = None
    precision: Precision | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        for name, kinds in (("precision", get_args(Precision)), ("pooling", get_args(Pooling))):
            value = getattr(self, name)
            if value is not None and value not in kinds:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, kinds))}.")
        pick_device(self.device)  # a missing device is refused before anything is downloaded


@dataclass(frozen=True)
class OutputSpec:
    """Sizes of a network's output for one patch; token sizes are 0 where it has no patch tokens."""

    dim: int
    token_dim: int
    stride: int


class NetworkEncoder:
    """A network as :class:`sthisto.encoders.PretrainedEncoder`; :func:`sthisto.encoders.load` makes it.

    Where memory runs out ``batch_size`` is halved, permanently, and the log reports it.
    """

    def __init__(
        self, backbone: Backbone, spec: EncoderSpec, forward: Forward, *, output: OutputSpec, provenance: dict[str, Any]
    ) -> None:
        self.name = str(provenance["encoder"])
        self.input_size = spec.input_size
        self.patch_um = spec.patch_um
        self.dim = output.dim
        self.output = output
        self.pooling: Pooling = forward.pooling or spec.pooling
        self.device = pick_device(forward.device)
        self.batch_size = forward.batch_size
        self.precision: Precision = forward.precision or default_precision(self.device)
        self.provenance = {**provenance, "pooling": self.pooling, "precision": self.precision}
        self._backbone = backbone.eval().requires_grad_(requires_grad=False).to(self.device)
        self._raw = torch.compile(self._backbone) if forward.compile else self._backbone
        self._mean, self._std = (
            torch.tensor(value, device=self.device).view(3, 1, 1) for value in (spec.mean, spec.std)
        )

    def __call__(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (n, dim) float32 of RGB ``patches`` (n, input_size, input_size, 3) uint8."""
        return self._run(patches, lambda raw: pool(self._backbone, raw, self.pooling), (self.dim,))

    def weights_bytes(self) -> bytes:
        """All weights and buffers, as the bytes of a safetensors file."""
        return self._backbone.weights_bytes()

    def _run(self, patches: NDArray[np.uint8], take: Take, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Take (n, *shape) from the network's output, batch by batch."""
        check_patches(patches, self.input_size)
        features = np.empty((len(patches), *shape), np.float32)
        start = 0
        while start < len(patches):
            stop = min(start + self.batch_size, len(patches))
            batch = self._forward(patches[start:stop], take)
            if batch is None:
                self._halve(stop - start)
            else:
                features[start:stop] = batch
                start = stop
        return features

    def _forward(self, patches: NDArray[np.uint8], take: Take) -> NDArray[np.float32] | None:
        """Run the network and take a part of its output; None where memory ran out."""
        with torch.inference_mode(), exact_in_float32(), self._autocast():
            try:
                taken: NDArray[np.float32] = take(self._raw(self._colors(patches))).float().cpu().numpy()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                return None
        return taken

    def _colors(self, patches: NDArray[np.uint8]) -> Tensor:
        """Normalize colors (n, 3, input_size, input_size) on the device."""
        whole = torch.from_numpy(np.require(patches, requirements=["C", "W"])).to(self.device)
        return (whole.permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise MemoryError(f"encoder {self.name!r}: {self.device} has too little memory for a single patch.")
        if self.device.type != "cpu":
            torch.get_device_module(self.device).empty_cache()
        self.batch_size = tried // 2
        logger.warning(
            "encoder %r: out of memory on %s at %d patches; batch_size is %d from here on",
            self.name,
            self.device,
            tried,
            self.batch_size,
        )


class TokenNetworkEncoder(NetworkEncoder):
    """A network with patch tokens: :class:`sthisto.encoders.TokenEncoder`."""

    @property
    def token_dim(self) -> int:
        """Number of features per token."""
        return self.output.token_dim

    @property
    def stride(self) -> int:
        """Distance between neighboring tokens, pixels."""
        return self.output.stride

    def tokens(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (n, t, t, token_dim) of ``patches`` (n, input_size, input_size, 3), t = input_size // stride."""
        t = self.input_size // self.stride
        return self._run(patches, self._backbone.patch_tokens, (t, t, self.token_dim))


def make_encoder(
    backbone: Backbone, spec: EncoderSpec, forward: Forward, provenance: dict[str, Any]
) -> NetworkEncoder | TokenNetworkEncoder:
    """Make the encoder, with ``tokens`` where the network has patch tokens."""
    output = infer_output_spec(backbone, spec.input_size, forward.pooling or spec.pooling)
    kind = TokenNetworkEncoder if output.stride else NetworkEncoder
    sizes = {"dim": output.dim, "token_dim": output.token_dim, "stride": output.stride}
    return kind(backbone, spec, forward, output=output, provenance={**provenance, **sizes})


def infer_output_spec(backbone: Backbone, input_size: int, pooling: Pooling) -> OutputSpec:
    """Sizes of a network's output, from a blank patch; ValueError where it has no features or not this pooling."""
    device = next(backbone.parameters(), torch.empty(0)).device
    with torch.inference_mode():
        raw = backbone.eval()(torch.zeros(1, 3, input_size, input_size, device=device))
        if not isinstance(raw, Tensor) or raw.ndim not in {2, 3, 4}:
            found = f"a tensor of shape {tuple(raw.shape)}" if isinstance(raw, Tensor) else type(raw).__name__
            raise ValueError(f"the network gives {found} for one patch; expected features (n, d), tokens or maps.")
        dim = pool(backbone, raw, pooling).shape[1]
        tokens = backbone.patch_tokens(raw) if raw.ndim > 2 else raw
    square = tokens.ndim == 4 and tokens.shape[1] == tokens.shape[2]
    return OutputSpec(dim, tokens.shape[3], input_size // tokens.shape[1]) if square else OutputSpec(dim, 0, 0)


def pool(backbone: Backbone, raw: Tensor, pooling: Pooling) -> Tensor:
    """Features (b, d) from a network's raw output; ValueError where it lacks the tokens for this pooling."""
    if pooling == "native":
        features = backbone.native_pooling(raw)
        if features.ndim != 2:
            raise ValueError(f"the network has no pooling (shape {tuple(features.shape)}): set pooling='mean'.")
        return features
    if raw.ndim == 2 or (pooling != "mean" and not (backbone.has_class and raw.ndim == 3)):
        lacks = "class token" if pooling != "mean" else "tokens"
        raise ValueError(f"pooling={pooling!r}: the network gives no {lacks}; set pooling='native'.")
    if pooling == "class":
        return raw[:, 0]
    mean = backbone.patch_tokens(raw).flatten(1, -2).float().mean(1)
    return mean if pooling == "mean" else torch.cat([raw[:, 0].float(), mean], dim=1)


def default_precision(device: torch.device) -> Precision:
    """bfloat16 where the device computes in it, which changes features little, else float32."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"


def exact_in_float32() -> contextlib.AbstractContextManager[Any]:
    """Within, convolutions of float32 on a GPU are float32: by default torch rounds them to 10 bits."""
    flags: contextlib.AbstractContextManager[Any] = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return flags


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch or Python ran out of memory."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(words in str(error) for words in ("out of memory", "not enough memory", "t allocate memory"))
