"""Networks as they are built: by timm, by transformers, or by the user, and all read in one way.

A :class:`Backbone` gives one raw output a batch, from which the tokens of the places, the class token and the network's
own pooling are taken. It is built without values first, on torch's ``meta`` device, so that a network of a billion
weights is held once in memory, not twice, and none is drawn for nothing.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from sthisto._training import seeded
from sthisto.encoders._weights import State, to_bytes

LAYERS = ("mlp_layer", "act_layer")  # arguments of timm that are classes, which the registry and files name
SHOWN = 4  # names of weights in a message


class Backbone(nn.Module):
    """A network that gives one raw output, and how to read it.

    Raw outputs are (b, p + t * t, d), p tokens first that are no places; maps (b, d, t, t) or (b, t, t, d); or plain
    features (b, d).
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
        """Raw output of normalised patches (b, 3, h, w)."""
        raw: Tensor = self.network(colors)
        return raw

    def own(self, raw: Tensor) -> Tensor:
        """Features (b, d) as the network itself pools them."""
        return raw

    def places(self, raw: Tensor) -> Tensor:
        """Features (b, t, t, d) of the places, or (b, n, d) where they make no square."""
        if raw.ndim == 4:
            return raw if self.maps_last else raw.permute(0, 2, 3, 1)
        tokens = raw[:, self.prefix :]
        side = round(tokens.shape[1] ** 0.5)
        return tokens.reshape(len(tokens), side, side, -1) if side**2 == tokens.shape[1] else tokens

    def fill(self, state: State, where: str, unused: tuple[str, ...] = ()) -> None:
        """Put the weights into the network, in float32; names that begin as ``unused`` may be too many.

        Raises
        ------
        ValueError
            They are of another architecture; the message names what is missing, unknown or of another shape.
        """
        expected = self.network.state_dict()
        found = {name: value for name, value in state.items() if name in expected or not name.startswith(unused)}
        if differences(found, expected):
            converted = _converted(self.network, found)
            _refuse(differences(found if converted is None else converted, expected), where, self.network)
            found = converted or found
        self.network.load_state_dict({name: _float(value) for name, value in found.items()}, assign=True)

    def kept(self) -> bytes:
        """All weights and buffers as the bytes of a safetensors file, which :meth:`fill` takes back."""
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

    def own(self, raw: Tensor) -> Tensor:
        pooled: Tensor = self.network.forward_head(raw, pre_logits=True)  # type: ignore[operator]
        return pooled


class StageBackbone(Backbone):
    """A stage of a convolutional network of timm (``features_only``): its maps, whose mean are the features."""

    def forward(self, colors: Tensor) -> Tensor:
        raw: Tensor = self.network(colors)[-1]
        return raw

    def own(self, raw: Tensor) -> Tensor:
        return self.places(raw).flatten(1, -2).mean(1)


class TransformersBackbone(Backbone):
    """A network of transformers: its last hidden state, whose first token is the class."""

    def forward(self, colors: Tensor) -> Tensor:
        raw: Tensor = self.network(pixel_values=colors).last_hidden_state
        return raw

    def own(self, raw: Tensor) -> Tensor:
        return raw[:, 0] if raw.ndim == 3 else self.places(raw).flatten(1, -2).mean(1)

    def fill(self, state: State, where: str, unused: tuple[str, ...] = ()) -> None:
        """Let transformers put the weights in: names in files are often others than in its networks."""
        network = self.network
        with seeded(0):
            self.network, told = type(network).from_pretrained(  # type: ignore[attr-defined]
                None,
                config=network.config,
                state_dict={name: _float(value) for name, value in state.items()},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        surplus = sorted(name for name in told["unexpected_keys"] if not name.startswith(unused))
        reshaped = [_reshaped(*each) for each in sorted(told["mismatched_keys"])]
        _refuse(_said(sorted(told["missing_keys"]), surplus, reshaped), where, network)

    def kept(self) -> bytes:
        """Weights under the names of files, which later versions of transformers know, too."""
        with TemporaryDirectory() as folder:
            self.network.save_pretrained(folder, max_shard_size="1TB")  # type: ignore[operator]
            return (Path(folder) / "model.safetensors").read_bytes()


def timm_backbone(architecture: str, params: Mapping[str, Any]) -> Backbone:
    """Build a network of timm without values and without its classifier.

    Raises
    ------
    ImportError
        timm cannot be loaded.
    ValueError
        timm knows no such architecture, or it does not take one of the params.
    """
    timm = needed("timm")
    given = {key: _layer(value) if key in LAYERS else value for key, value in params.items()}
    if not given.get("features_only"):
        given["num_classes"] = 0
    try:
        network = without_values(lambda: timm.create_model(architecture, pretrained=False, **given))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"timm {timm.__version__} builds no {architecture!r} with {dict(params)}: {error}.") from error
    if not given.get("features_only"):
        return TimmBackbone(network)
    return StageBackbone(network, maps_last=_maps_last(network))


def transformers_backbone(architecture: str, params: Mapping[str, Any], input_size: int) -> Backbone:
    """Build a network of transformers without values, from its model type and config.

    Raises
    ------
    ImportError
        transformers cannot be loaded.
    ValueError
        transformers knows no such model type.
    """
    transformers = needed("transformers")
    try:
        config = transformers.AutoConfig.for_model(architecture, **params)
        network = without_values(lambda: transformers.AutoModel.from_config(config))
    except (KeyError, ValueError) as error:
        raise ValueError(f"transformers {transformers.__version__} builds no {architecture!r}: {error}.") from error
    side = input_size // int(getattr(config, "patch_size", input_size))
    with torch.inference_mode():
        blank = torch.zeros(1, 3, input_size, input_size, device=next(network.parameters()).device)
        raw = network(pixel_values=blank).last_hidden_state
    prefix = raw.shape[1] - side**2 if raw.ndim == 3 else 0
    return TransformersBackbone(network, prefix=prefix, has_class=prefix > 0)


def given_backbone(network: nn.Module) -> Backbone:
    """Read a module of the user's: one of timm as such, any other by what it returns."""
    if hasattr(network, "forward_features") and hasattr(network, "forward_head"):
        return TimmBackbone(network)
    return Backbone(network)


def needed(package: str) -> Any:
    """Import a package that only some encoders need.

    Raises
    ------
    ImportError
        It is not installed, or does not load.
    """
    wanted = "timm torch torchvision" if package == "timm" else "'sthisto[transformers]'"
    try:
        return __import__(package)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another build than torch
        raise ImportError(
            f"this encoder needs {package}, which does not load here ({error}): pip install --upgrade {wanted}"
        ) from error


def without_values(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network on torch's meta device; elsewhere where it computes something while it is built."""
    with seeded(0):
        try:
            with torch.device("meta"):
                network = build()
        except NotImplementedError:  # an operation without a meta version
            return build()
        # What is no weight is in no file, so it has to be computed.
        kept = set(network.state_dict())
        return build() if any(name not in kept for name, _ in network.named_buffers()) else network


def differences(found: State, expected: State) -> list[str]:
    """Say what weights lack, have too many, and have in other shapes than the network; nothing where they fit."""
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected]
    both = [name for name in expected if name in found and found[name].shape != expected[name].shape]
    return _said(missing, surplus, [_reshaped(name, found[name].shape, expected[name].shape) for name in both])


def classifier_of(backbone: Backbone) -> tuple[str, ...]:
    """Beginnings of names of the weights that classify, which features do not need."""
    config = getattr(backbone.network, "pretrained_cfg", None) or {}
    found = config.get("classifier") or ()
    return tuple(f"{name}." for name in ([found] if isinstance(found, str) else found)) or ("classifier.", "head.")


def is_meta(network: nn.Module) -> bool:
    """Whether a network has places for values only."""
    return any(value.is_meta for value in chain(network.parameters(), network.buffers()))


def _maps_last(network: nn.Module) -> bool:
    form = getattr(network, "output_fmt", "NCHW")
    return str(getattr(form, "value", form)) == "NHWC"


def _layer(name: Any) -> Any:
    """Class of a layer from its name in timm or torch."""
    if not isinstance(name, str):
        return name
    for layers in (needed("timm").layers, nn):
        if hasattr(layers, name):
            return getattr(layers, name)
    raise ValueError(f"no layer {name!r} in timm.layers or torch.nn.")


def _converted(network: nn.Module, found: State) -> State | None:
    """Weights as timm itself would rename them from the form of their authors; None where it cannot."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return None
    try:
        return dict(convert(dict(found), network))
    except (KeyError, AttributeError, IndexError, RuntimeError, ValueError, TypeError):
        return None  # the weights are of another network, as the caller says


def _float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _said(missing: list[str], surplus: list[str], reshaped: list[str]) -> list[str]:
    kinds = {"missing": missing, "unexpected": surplus, "of another shape": reshaped}
    return [f"{len(names)} {kind}: {_few(names)}" for kind, names in kinds.items() if names]


def _reshaped(name: str, found: Iterable[int], expected: Iterable[int]) -> str:
    return f"{name} {tuple(found)} instead of {tuple(expected)}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _refuse(odd: list[str], where: str, network: nn.Module) -> None:
    if odd:
        raise ValueError(f"{where} holds no weights of this network ({type(network).__name__}): {'; '.join(odd)}.")
