"""Networks built by timm, by transformers or by the user, behind one interface.

A :class:`Backbone` gives one raw output per batch, from which the patch tokens, the class token and the network's own
pooling are taken. Networks are first built on torch's ``meta`` device, so that a network of a billion weights is held
in memory once and none is drawn in vain.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from sthisto._training import seeded
from sthisto.encoders._weights import State, to_bytes

LAYERS = ("mlp_layer", "act_layer", "norm_layer")  # arguments of timm that are classes, given by name
# Arguments that shape a network of timm. Metadata from files may set no others: ``checkpoint_path`` would unpickle.
_ARGUMENTS = """
    act_layer attn_drop_rate block_size channels class_token depth depths dims drop_path_rate drop_rate dynamic_img_pad
    dynamic_img_size embed_dim embed_dims features_only global_pool img_size in_chans init_values layers ls_init_value
    mlp_layer mlp_ratio no_embed_class norm_layer num_classes num_heads out_indices output_stride patch_size pos_embed
    pre_norm proj_drop_rate qk_norm qkv_bias reg_tokens stem_type strict_img_size width window_size
"""
ARGUMENTS = frozenset(_ARGUMENTS.split())
SHOWN = 4  # names of weights in a message


class Backbone(nn.Module):
    """A network with one raw output, and how to read it.

    Raw outputs are (b, p + t * t, d), with p tokens first that are not patch tokens; maps (b, d, t, t) or (b, t, t, d);
    or features (b, d).
    """

    def __init__(
        self, network: nn.Module, *, prefix: int = 0, has_class: bool = False, maps_last: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        self.prefix = prefix
        self.has_class = has_class
        self.maps_last = maps_last

    def forward(self, colors: Tensor) -> Tensor:
        """Raw output for normalized patches (b, 3, h, w)."""
        raw: Tensor = self.network(colors)
        return raw

    def native_pooling(self, raw: Tensor) -> Tensor:
        """Features (b, d) by the network's own pooling."""
        return raw

    def patch_tokens(self, raw: Tensor) -> Tensor:
        """Patch tokens (b, t, t, d), or (b, n, d) where they form no square."""
        if raw.ndim == 4:
            return raw if self.maps_last else raw.permute(0, 2, 3, 1)
        tokens = raw[:, self.prefix :]
        side = round(tokens.shape[1] ** 0.5)
        return tokens.reshape(len(tokens), side, side, -1) if side**2 == tokens.shape[1] else tokens

    def load_weights(self, state: State, where: str, unused: tuple[str, ...] = ()) -> None:
        """Load weights in float32; those whose names begin as ``unused`` may be superfluous.

        Raises
        ------
        ValueError
            They are of another architecture; the message names what is missing, unexpected or of another shape.
        """
        expected = self.network.state_dict()
        given = {name: value for name, value in state.items() if name in expected or not name.startswith(unused)}
        if differences(given, expected):
            converted = _converted(self.network, given)
            _refuse(differences(given if converted is None else converted, expected), where, self.network)
            given = converted or given
        self.network.load_state_dict({name: _float(value) for name, value in given.items()}, assign=True)

    def weights_bytes(self) -> bytes:
        """All weights and buffers as the bytes of a safetensors file, which :meth:`load_weights` takes back."""
        return to_bytes(self.network.state_dict())


class TimmBackbone(Backbone):
    """A network of timm: its features before the head, which pools them."""

    def __init__(self, network: nn.Module) -> None:
        prefix = int(getattr(network, "num_prefix_tokens", 0))
        has_class = bool(getattr(network, "has_class_token", prefix > 0))
        super().__init__(network, prefix=prefix, has_class=has_class, maps_last=_maps_last(network))

    def forward(self, colors: Tensor) -> Tensor:
        raw: Tensor = self.network.forward_features(colors)  # type: ignore[operator]
        return raw

    def native_pooling(self, raw: Tensor) -> Tensor:
        pooled: Tensor = self.network.forward_head(raw, pre_logits=True)  # type: ignore[operator]
        return pooled


class StageBackbone(Backbone):
    """A stage of a convolutional network of timm (``features_only``): features are the mean of its maps."""

    def forward(self, colors: Tensor) -> Tensor:
        raw: Tensor = self.network(colors)[-1]
        return raw

    def native_pooling(self, raw: Tensor) -> Tensor:
        return self.patch_tokens(raw).flatten(1, -2).mean(1)


class TransformersBackbone(Backbone):
    """A network of transformers: its last hidden state, whose first token is the class token."""

    def forward(self, colors: Tensor) -> Tensor:
        raw: Tensor = self.network(pixel_values=colors).last_hidden_state
        return raw

    def native_pooling(self, raw: Tensor) -> Tensor:
        return raw[:, 0] if raw.ndim == 3 else self.patch_tokens(raw).flatten(1, -2).mean(1)

    def load_weights(self, state: State, where: str, unused: tuple[str, ...] = ()) -> None:
        """Load through transformers, which knows the names in files where they differ from its networks'."""
        network = self.network
        with seeded(0):
            self.network, report = type(network).from_pretrained(  # type: ignore[attr-defined]
                None,
                config=network.config,
                state_dict={name: _float(value) for name, value in state.items()},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        surplus = sorted(name for name in report["unexpected_keys"] if not name.startswith(unused))
        reshaped = [_reshaped(*mismatch) for mismatch in sorted(report["mismatched_keys"])]
        _refuse(_summary(sorted(report["missing_keys"]), surplus, reshaped), where, network)

    def weights_bytes(self) -> bytes:
        """Weights under the names of files, which later versions of transformers know, too."""
        with TemporaryDirectory() as folder:
            self.network.save_pretrained(folder, max_shard_size="1TB")  # type: ignore[operator]
            return (Path(folder) / "model.safetensors").read_bytes()


def timm_backbone(architecture: str, params: Mapping[str, Any]) -> Backbone:
    """Build a network of timm without values and without its classifier."""
    timm = import_optional("timm")
    if not timm.is_model(architecture):
        raise ValueError(f"timm {timm.__version__} has no architecture {architecture!r}.")
    refused = sorted(set(params) - ARGUMENTS)
    if refused:
        raise ValueError(f"{', '.join(refused)} of {architecture!r}: no arguments that shape a network of timm.")
    arguments = {key: _layer(value) if key in LAYERS else value for key, value in params.items()}
    if not arguments.get("features_only"):
        arguments["num_classes"] = 0
    try:
        network = build_on_meta(lambda: timm.create_model(architecture, pretrained=False, **arguments))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"timm {timm.__version__} builds no {architecture!r} with {dict(params)}: {error}.") from error
    if not arguments.get("features_only"):
        return TimmBackbone(network)
    return StageBackbone(network, maps_last=_maps_last(network))


def transformers_backbone(architecture: str, params: Mapping[str, Any], input_size: int) -> Backbone:
    """Build a network of transformers without values, from its model type and config."""
    transformers = import_optional("transformers")
    try:
        # Only what this type of model defines: general settings may name code on the Hub.
        known = set(transformers.AutoConfig.for_model(architecture).to_dict())
        known -= set(transformers.PretrainedConfig().to_dict())
        config = transformers.AutoConfig.for_model(
            architecture, **{key: value for key, value in params.items() if key in known}
        )
        network = build_on_meta(lambda: transformers.AutoModel.from_config(config))
    except (KeyError, ValueError) as error:
        raise ValueError(f"transformers {transformers.__version__} builds no {architecture!r}: {error}.") from error
    side = input_size // int(getattr(config, "patch_size", input_size))
    with torch.inference_mode():
        blank = torch.zeros(1, 3, input_size, input_size, device=next(network.parameters()).device)
        raw = network(pixel_values=blank).last_hidden_state
    prefix = raw.shape[1] - side**2 if raw.ndim == 3 else 0
    return TransformersBackbone(network, prefix=prefix, has_class=prefix > 0)


def module_backbone(network: nn.Module) -> Backbone:
    """Wrap a module of the user's: one of timm as such, any other by what it returns."""
    if hasattr(network, "forward_features") and hasattr(network, "forward_head"):
        return TimmBackbone(network)
    return Backbone(network)


def import_optional(package: str) -> Any:
    """Import a package that only some encoders need; ImportError with what to install."""
    wanted = "timm torch torchvision" if package == "timm" else "'sthisto[transformers]'"
    try:
        return __import__(package)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another build than torch
        raise ImportError(
            f"this encoder needs {package}, which cannot be imported ({error}): pip install --upgrade {wanted}"
        ) from error


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network on torch's meta device, or on the CPU where it computes something while it is built."""
    with seeded(0):
        try:
            with torch.device("meta"):
                network = build()
        except NotImplementedError:  # an operation without a meta version
            return build()
        # Buffers that are no weights are in no file, so they have to be computed.
        stored = set(network.state_dict())
        return build() if any(name not in stored for name, _ in network.named_buffers()) else network


def differences(given: State, expected: State) -> list[str]:
    """Weights that are missing, unexpected or of another shape than the network's; empty where they fit."""
    missing = [name for name in expected if name not in given]
    surplus = [name for name in given if name not in expected]
    both = [name for name in expected if name in given and given[name].shape != expected[name].shape]
    return _summary(missing, surplus, [_reshaped(name, given[name].shape, expected[name].shape) for name in both])


def classifier_of(backbone: Backbone) -> tuple[str, ...]:
    """Prefixes of the classifier's weights, which features do not need."""
    config = getattr(backbone.network, "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names)) or ("classifier.", "head.")


def is_meta(network: nn.Module) -> bool:
    """Whether a network has no values yet."""
    return any(value.is_meta for value in chain(network.parameters(), network.buffers()))


def _maps_last(network: nn.Module) -> bool:
    layout = getattr(network, "output_fmt", "NCHW")
    return str(getattr(layout, "value", layout)) == "NHWC"


def _layer(name: Any) -> Any:
    """Class of a layer from its name in timm or torch."""
    for layers in (import_optional("timm").layers, nn):
        layer = getattr(layers, str(name), None)
        kind = layer.func if isinstance(layer, partial) else layer
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            return layer
    raise ValueError(f"no layer {name!r} in timm.layers or torch.nn.")


def _converted(network: nn.Module, given: State) -> State | None:
    """Weights renamed by timm from their authors' form; None where it cannot."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return None
    try:
        return dict(convert(dict(given), network))
    except (KeyError, AttributeError, IndexError, RuntimeError, ValueError, TypeError):
        return None  # weights of another network, which the caller reports


def _float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _summary(missing: list[str], surplus: list[str], reshaped: list[str]) -> list[str]:
    kinds = {"missing": missing, "unexpected": surplus, "of another shape": reshaped}
    return [f"{len(names)} {kind}: {_few(names)}" for kind, names in kinds.items() if names]


def _reshaped(name: str, given: Iterable[int], expected: Iterable[int]) -> str:
    return f"{name} {tuple(given)} instead of {tuple(expected)}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _refuse(odd: list[str], where: str, network: nn.Module) -> None:
    if odd:
        raise ValueError(f"{where} holds no weights of this network ({type(network).__name__}): {'; '.join(odd)}.")
