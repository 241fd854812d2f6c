"""Network encoders from their sources: the registry, timm, the Hub, a module of the user's, metadata in ``uns``."""

import copy
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sthisto._messages import warn
from sthisto._training import pick_device
from sthisto.encoders._architectures import (
    Backbone,
    classifier_of,
    import_optional,
    module_backbone,
    timm_backbone,
    transformers_backbone,
)
from sthisto.encoders._network import Forward, NetworkEncoder, make_encoder
from sthisto.encoders._protocols import check_patches
from sthisto.encoders._registry import ENCODERS, Color, EncoderSpec
from sthisto.encoders._weights import CONFIGS, WeightFile, from_bytes, from_disk, from_hub, read, to_bytes

logger = logging.getLogger("sthisto")

Source = str | PathLike[str]

HUB = ("hf-hub:", "hf_hub:")
LAZYSLIDE = "lazyslide:"
MPP = 0.5  # um per pixel, as of most pathology models, for networks that state none


def from_registry(
    name: str, spec: EncoderSpec, *, weights: Source | None = None, revision: str | None = None, **options: Any
) -> NetworkEncoder:
    """Build an entry of the registry, as :meth:`EncoderSpec.load` calls it."""
    forward = Forward(**options)  # wrong options are refused before anything is downloaded
    import_optional(spec.builder)
    file = _weight_file(spec.weights or "", weights, revision)
    _log_other_colors(name, spec, file)
    return _build(name, replace(spec, params={**_config_params(file), **spec.params}), forward, file)


def from_name(
    name: str, *, weights: Source | None = None, revision: str | None = None, **options: Any
) -> "NetworkEncoder | LazySlideEncoder":
    """Build a network that is not in the registry: of the Hub, of timm, or of lazyslide_models."""
    forward = Forward(**options)
    if name.startswith(HUB):
        repo_id, _, commit = name.split(":", 1)[1].partition("@")
        file = _weight_file(repo_id, weights, revision or commit or None)
        return _build(name, _hub_spec(name, file), forward, file)
    models = _lazyslide_models()
    if name.removeprefix(LAZYSLIDE) in models and (
        name.startswith(LAZYSLIDE) or not import_optional("timm").is_model(name)
    ):
        if weights is not None or revision is not None:
            raise ValueError(f"{name!r} is loaded by lazyslide_models, which takes no weights= and no revision=.")
        return LazySlideEncoder(name.removeprefix(LAZYSLIDE), models[name.removeprefix(LAZYSLIDE)], forward)
    spec = _timm_spec(name)
    return _build(name, spec, forward, _weight_file(spec.weights or "", weights, revision))


class LazySlideEncoder:
    """An image model of lazyslide_models, with its own preprocessing, as :class:`sthisto.encoders.Encoder`."""

    input_size = 224

    def __init__(self, name: str, model: Any, forward: Forward) -> None:
        if forward.pooling or forward.precision or forward.compile:
            raise ValueError(f"{name!r} is run by lazyslide_models: pooling, precision and compile are its own.")
        self.name = LAZYSLIDE + name
        self.patch_um = self.input_size * MPP
        self.batch_size = forward.batch_size
        self.device = pick_device(forward.device)
        self._model = model()
        self._model.to(self.device)
        self._transform = self._model.get_transform()
        self.dim = self(np.zeros((1, self.input_size, self.input_size, 3), np.uint8)).shape[1]

    def __call__(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (n, dim) float32 of RGB ``patches`` (n, 224, 224, 3) uint8."""
        check_patches(patches, self.input_size)
        features = [np.empty((0, getattr(self, "dim", 0)), np.float32)]
        for start in range(0, len(patches), self.batch_size):
            images = [self._transform(patch) for patch in patches[start : start + self.batch_size]]
            with torch.inference_mode():
                encoded = torch.as_tensor(self._model.encode_image(torch.stack(images).to(self.device)))
            features.append(encoded.float().cpu().numpy())
        return np.concatenate(features[1:] or features)


def _lazyslide_models() -> Mapping[str, Any]:
    """Image models of lazyslide_models by name, where it is installed."""
    if find_spec("lazyslide_models") is None:
        return {}
    registry: Mapping[str, Any] = import_module("lazyslide_models").MODEL_REGISTRY
    return {name: registry[name] for name in registry if hasattr(registry[name], "encode_image")}


def from_module(
    module: nn.Module,
    *,
    name: str | None = None,
    input_size: int | None = None,
    patch_um: float | None = None,
    mean: Color | None = None,
    std: Color | None = None,
    **options: Any,
) -> NetworkEncoder:
    """Wrap a copy of a module of the user's, as further training would change the features; its input size is known."""
    forward = Forward(**options)
    config = getattr(module, "pretrained_cfg", None) or {}  # of timm
    input_size = config.get("input_size", (3, None))[1] if input_size is None else input_size
    if input_size is None:
        raise ValueError(f"the input size of {type(module).__name__} is unknown: pass input_size=, a side in pixels.")
    patch_um = input_size * MPP if patch_um is None else patch_um
    if not (input_size > 0 and patch_um > 0):
        raise ValueError(f"input_size={input_size} and patch_um={patch_um} have to be positive.")
    spec = EncoderSpec(
        dim=0,
        input_size=input_size,
        patch_um=patch_um,
        architecture=type(module).__name__,
        mean=config.get("mean", EncoderSpec.mean) if mean is None else mean,
        std=config.get("std", EncoderSpec.std) if std is None else std,
        pooling="native",
        license="unknown",
        reference="",
    )
    network = copy.deepcopy(module)
    sha256 = hashlib.sha256(to_bytes(network.state_dict())).hexdigest()
    provenance = {**_provenance(name or spec.architecture, spec), "builder": "module", "sha256": sha256}
    return make_encoder(module_backbone(network), spec, forward, provenance)


def from_record(
    provenance: Mapping[str, Any], weights: bytes | None, weights_sha256: str, **options: Any
) -> NetworkEncoder:
    """Rebuild the encoder of metadata in ``uns``, from kept weights or from their source."""
    spec = _recorded_spec(provenance)
    name = str(provenance["encoder"])
    forward = Forward(precision=str(provenance["precision"]), **options)  # type: ignore[arg-type]  # checked there
    if weights is not None:
        import_optional(spec.builder)
        backbone = _backbone(spec)
        backbone.load_weights(from_bytes(weights, weights_sha256), "the object")
        source = {key: value for key, value in provenance.items() if key not in {"pooling", "precision"}}
        return make_encoder(backbone, spec, forward, source)
    repo_id, path = str(provenance["repo_id"]), str(provenance["file"])
    if repo_id and all(repo_id != known.weights for known in ENCODERS.values()):
        warn(
            f"the object has the weights of {name!r} loaded from the repository {repo_id!r} of the Hub, with your "
            f"token where one is set. Pass encoder='hf-hub:{repo_id}' to choose it yourself."
        )
    file = from_hub(repo_id, str(provenance["revision"])) if repo_id else from_disk(path)
    if file.sha256 != provenance["sha256"]:
        raise ValueError(
            f"the weights of {name!r} in {str(file.path)!r} have changed since the features were extracted: their "
            f"SHA-256 is {file.sha256}, it was {provenance['sha256']}. Extract the features again, or pass encoder=."
        )
    return _build(name, spec, forward, replace(file, license=str(provenance["license"])))


def _build(name: str, spec: EncoderSpec, forward: Forward, file: WeightFile) -> NetworkEncoder:
    """Build the network, load the weights of the file, and record their source."""
    backbone = _backbone(spec)
    backbone.load_weights(read(file), repr(str(file.path)), (*spec.unused, *classifier_of(backbone)))
    source = {
        "repo_id": file.repo_id,
        "revision": file.revision,
        "file": file.path.name if file.repo_id else str(file.path),
        "sha256": file.sha256,
        "gated": spec.gated or file.gated,
    }
    return make_encoder(backbone, spec, forward, {**_provenance(name, spec), **source})


def _backbone(spec: EncoderSpec) -> Backbone:
    if spec.builder == "timm":
        return timm_backbone(spec.architecture, spec.params)
    return transformers_backbone(spec.architecture, spec.params, spec.input_size)


def _provenance(name: str, spec: EncoderSpec) -> dict[str, Any]:
    """Metadata of an encoder that ``uns`` can hold: strings, numbers and arrays."""
    return {
        "encoder": name,
        "builder": spec.builder,
        "architecture": spec.architecture,
        "params": json.dumps(dict(spec.params)),
        "unused": " ".join(spec.unused),
        "input_size": spec.input_size,
        "patch_um": spec.patch_um,
        "mpp": spec.mpp,
        "mean": np.array(spec.mean),
        "std": np.array(spec.std),
        "license": spec.license,
        "gated": spec.gated,
        "repo_id": "",
        "revision": "",
        "file": "",
    }


def _recorded_spec(provenance: Mapping[str, Any]) -> EncoderSpec:
    """Inverse of :func:`_provenance`."""
    return EncoderSpec(
        dim=int(provenance["dim"]),
        input_size=int(provenance["input_size"]),
        patch_um=float(provenance["patch_um"]),
        builder=str(provenance["builder"]),  # type: ignore[arg-type]  # one of the two, as it was written
        architecture=str(provenance["architecture"]),
        params=json.loads(str(provenance["params"])),
        unused=tuple(str(provenance["unused"]).split()),
        pooling=str(provenance["pooling"]),  # type: ignore[arg-type]
        mean=tuple(map(float, provenance["mean"])),  # type: ignore[arg-type]
        std=tuple(map(float, provenance["std"])),  # type: ignore[arg-type]
        gated=bool(provenance["gated"]),
        license=str(provenance["license"]),
        reference="",
    )


def _weight_file(repo_id: str, weights: Source | None, revision: str | None) -> WeightFile:
    if weights is None:
        return from_hub(repo_id, revision)
    if revision is not None:
        raise ValueError(f"revision={revision!r} is of the Hub, and weights= is a local file: pass one of the two.")
    return from_disk(weights)


def _config_params(file: WeightFile) -> dict[str, Any]:
    """Arguments of the architecture from config.json, in timm's form or transformers'."""
    config = file.configs.get(CONFIGS[0], {})
    if "model_type" in config:
        return {key: value for key, value in config.items() if key != "model_type"}
    return {key: value for key, value in config.get("model_args", {}).items() if key != "num_classes"}


def _hub_spec(name: str, file: WeightFile) -> EncoderSpec:
    """Record of a repository's network, from its config.json."""
    config = file.configs.get(CONFIGS[0], {})
    license = file.license or "unknown"
    kind: dict[str, Any]
    if "architecture" in config:
        colors = config.get("pretrained_cfg", config)  # older ones have no part of their own for it
        input_size = colors.get("input_size", (3, 224))[-1]
        license = file.license or colors.get("license") or "unknown"
        kind = {"builder": "timm", "architecture": config["architecture"]}
        mean, std = colors.get("mean", EncoderSpec.mean), colors.get("std", EncoderSpec.std)
    elif "model_type" in config:
        preprocessor = file.configs.get(CONFIGS[1], {})
        input_size = config.get("image_size", 224)
        kind = {"builder": "transformers", "architecture": config["model_type"]}
        mean, std = preprocessor.get("image_mean", EncoderSpec.mean), preprocessor.get("image_std", EncoderSpec.std)
    else:
        raise ValueError(
            f"{name!r} has no config.json that names its architecture, as timm and transformers write it. Build the "
            "network yourself and pass it as encoder=, or pass weights= with a folder that has one."
        )
    side = int(input_size[0] if isinstance(input_size, list) else input_size)
    return EncoderSpec(
        **kind,
        dim=0,
        input_size=side,
        patch_um=side * MPP,
        params=_config_params(file),
        pooling="native",
        mean=tuple(mean),
        std=tuple(std),
        gated=file.gated,
        license=license,
        reference="",
    )


def _timm_spec(name: str) -> EncoderSpec:
    """Record of one of timm's networks."""
    timm = import_optional("timm")
    try:
        config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # no such tag
        config = None
    if config is None:
        raise KeyError(
            f"no encoder {name!r}. Names are {', '.join(sorted(ENCODERS))}, those of timm's networks and, where it is "
            "installed, of lazyslide_models, and 'hf-hub:owner/name'; a torch.nn.Module or an encoder object is "
            "accepted, too."
        )
    return EncoderSpec(
        dim=0,
        input_size=config.input_size[1],
        patch_um=config.input_size[1] * MPP,
        weights=config.hf_hub_id,
        architecture=name.partition(".")[0],
        pooling="native",
        mean=config.mean,
        std=config.std,
        license=config.license or "unknown",
        reference="",
    )


def _log_other_colors(name: str, spec: EncoderSpec, file: WeightFile) -> None:
    """Log where the repository's color normalization differs from the one of the network's training."""
    stated = file.configs.get(CONFIGS[0], {}).get("pretrained_cfg", {}).get("mean")
    if stated is not None and not np.allclose(stated, spec.mean, atol=1e-3):
        logger.info(
            "encoder %r: colors are centered on %s; the repository's config.json has %s", name, spec.mean, stated
        )
