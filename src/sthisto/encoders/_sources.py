"""Encoders from their sources: the registry, timm, the Hub, a module of the user's, a record in ``uns``."""

import copy
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np
from torch import nn

from sthisto.encoders._architectures import (
    Backbone,
    classifier_of,
    given_backbone,
    needed,
    timm_backbone,
    transformers_backbone,
)
from sthisto.encoders._network import Forward, NetworkEncoder, encoder_of
from sthisto.encoders._registry import ENCODERS, NETWORK, Color, EncoderSpec
from sthisto.encoders._weights import CONFIGS, WeightFile, from_bytes, from_disk, from_hub, read, to_bytes

logger = logging.getLogger("sthisto")

Place = str | PathLike[str]

HUB = ("hf-hub:", "hf_hub:")
UM = 0.5  # um per pixel of networks that say nothing of it, as most pathology models have it
# What transformers writes into config.json beside the arguments of the architecture.
ABOUT = {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "auto_map"}


def from_registry(
    name: str,
    spec: EncoderSpec,
    *,
    weights: Place | None,
    device: str | None,
    revision: str | None = None,
    **options: Any,
) -> NetworkEncoder:
    """Build an entry of the registry, as :meth:`EncoderSpec.load` calls it."""
    forward = Forward(device=device, **options)  # what is wrong there is said before anything is downloaded
    needed(spec.builder)
    file = _found(spec.weights or "", weights, revision)
    _tell_other_colors(name, spec, file)
    return _built(name, replace(spec, params={**_params(file), **spec.params}), forward, file)


def from_name(
    name: str, *, weights: Place | None, device: str | None, revision: str | None = None, **options: Any
) -> NetworkEncoder:
    """Build a network that the registry has not: ``hf-hub:owner/name``, or one of timm's by its name there.

    Raises
    ------
    KeyError
        timm knows no such name.
    ValueError
        The repository's config.json tells no architecture; timm knows no weights of this name on the Hub.
    """
    forward = Forward(device=device, **options)
    if name.startswith(HUB):
        repo_id, _, commit = name.split(":", 1)[1].partition("@")
        file = _found(repo_id, weights, revision or commit or None)
        return _built(name, _hub_spec(name, file), forward, file)
    spec = _timm_spec(name)
    return _built(name, spec, forward, _found(spec.weights or "", weights, revision))


def from_module(
    module: nn.Module,
    *,
    device: str | None,
    name: str | None = None,
    input_size: int | None = None,
    patch_um: float | None = None,
    mean: Color | None = None,
    std: Color | None = None,
    **options: Any,
) -> NetworkEncoder:
    """Take a module of the user's as it is now: a copy, as further training would change the features unseen.

    Raises
    ------
    ValueError
        The side of its input is not known.
    """
    forward = Forward(device=device, **options)
    config = getattr(module, "pretrained_cfg", None) or {}  # of timm
    input_size = input_size or config.get("input_size", (3, None))[1]
    if input_size is None:
        raise ValueError(f"the input of {type(module).__name__} is not known: pass input_size=, its side in pixels.")
    known = EncoderSpec(
        source=NETWORK,
        dim=0,
        input_size=input_size,
        patch_um=patch_um or input_size * UM,
        architecture=type(module).__name__,
        mean=mean or config.get("mean", EncoderSpec.mean),
        std=std or config.get("std", EncoderSpec.std),
        pooling="own",
        license="unknown",
        reference="",
    )
    own = copy.deepcopy(module)
    about = {"builder": "module", "sha256": hashlib.sha256(to_bytes(own.state_dict())).hexdigest()}
    provenance = {**_about(name or type(module).__name__, known), **about}
    return encoder_of(given_backbone(own), known, forward, provenance)


def from_record(
    provenance: Mapping[str, Any], kept: bytes | None, kept_sha256: str, *, device: str | None
) -> NetworkEncoder:
    """Build the encoder again that a record in ``uns`` tells of, from kept weights or from where they came.

    Raises
    ------
    ValueError
        The weights are others now, or damaged.
    """
    spec = _recorded_spec(provenance)
    name = str(provenance["encoder"])
    forward = Forward(device=device, precision=str(provenance["precision"]))  # type: ignore[arg-type]  # checked there
    if kept is not None:
        needed(spec.builder)
        backbone = _backbone(spec)
        backbone.fill(from_bytes(kept, kept_sha256), "the object")
        own = {key: value for key, value in provenance.items() if key not in {"pooling", "precision"}}
        return encoder_of(backbone, spec, forward, own)
    repo_id, place = str(provenance["repo_id"]), str(provenance["file"])
    file = from_hub(repo_id, str(provenance["revision"])) if repo_id else from_disk(place)
    if file.sha256 != provenance["sha256"]:
        raise ValueError(
            f"the weights of {name!r} in {str(file.path)!r} are others than the features were made with: their SHA-256 "
            f"is {file.sha256}, it was {provenance['sha256']}. Extract the features anew, or pass encoder=."
        )
    return _built(name, spec, forward, replace(file, license=str(provenance["license"])))


def _built(name: str, spec: EncoderSpec, forward: Forward, file: WeightFile) -> NetworkEncoder:
    """Build the network, put the weights of the file into it, and say where they came from."""
    backbone = _backbone(spec)
    backbone.fill(read(file), repr(str(file.path)), (*spec.unused, *classifier_of(backbone)))
    about = {
        "repo_id": file.repo_id,
        "revision": file.revision,
        "file": file.path.name if file.repo_id else str(file.path),
        "sha256": file.sha256,
        "gated": spec.gated or file.gated,
    }
    return encoder_of(backbone, spec, forward, {**_about(name, spec), **about})


def _backbone(spec: EncoderSpec) -> Backbone:
    if spec.builder == "timm":
        return timm_backbone(spec.architecture, spec.params)
    return transformers_backbone(spec.architecture, spec.params, spec.input_size)


def _about(name: str, spec: EncoderSpec) -> dict[str, Any]:
    """Give what ``uns`` can hold of an encoder's making: strings, numbers and arrays."""
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


def _recorded_spec(about: Mapping[str, Any]) -> EncoderSpec:
    """Undo :func:`_about`."""
    return EncoderSpec(
        source=NETWORK,
        dim=int(about["dim"]),
        input_size=int(about["input_size"]),
        patch_um=float(about["patch_um"]),
        builder=str(about["builder"]),  # type: ignore[arg-type]  # one of the two, as it was written
        architecture=str(about["architecture"]),
        params=json.loads(str(about["params"])),
        unused=tuple(str(about["unused"]).split()),
        pooling=str(about["pooling"]),  # type: ignore[arg-type]
        mean=tuple(map(float, about["mean"])),  # type: ignore[arg-type]
        std=tuple(map(float, about["std"])),  # type: ignore[arg-type]
        gated=bool(about["gated"]),
        license=str(about["license"]),
        reference="",
    )


def _found(repo_id: str, weights: Place | None, revision: str | None) -> WeightFile:
    if weights is None:
        return from_hub(repo_id, revision)
    if revision is not None:
        raise ValueError(f"revision={revision!r} is of the Hub, and weights= is a local file: pass one of the two.")
    return from_disk(weights)


def _params(file: WeightFile) -> dict[str, Any]:
    """Arguments of the architecture from config.json, in timm's form or transformers'."""
    config = file.configs.get(CONFIGS[0], {})
    if "model_type" in config:
        return {key: value for key, value in config.items() if key not in ABOUT}
    return {key: value for key, value in config.get("model_args", {}).items() if key != "num_classes"}


def _hub_spec(name: str, file: WeightFile) -> EncoderSpec:
    """Read what a repository says of its network in config.json."""
    config = file.configs.get(CONFIGS[0], {})
    source = {"source": NETWORK, "dim": 0, "pooling": "own", "params": _params(file), "reference": ""}
    if "architecture" in config:
        colors = config.get("pretrained_cfg", config)  # older ones have no part of their own for it
        input_size = colors.get("input_size", (3, 224))[-1]
        license = file.license or colors.get("license") or "unknown"
        kind: dict[str, Any] = {"builder": "timm", "architecture": config["architecture"]}
        mean, std = colors.get("mean", EncoderSpec.mean), colors.get("std", EncoderSpec.std)
    elif "model_type" in config:
        eyes = file.configs.get(CONFIGS[1], {})
        input_size = config.get("image_size", 224)
        license = file.license or "unknown"
        kind = {"builder": "transformers", "architecture": config["model_type"]}
        mean, std = eyes.get("image_mean", EncoderSpec.mean), eyes.get("image_std", EncoderSpec.std)
    else:
        raise ValueError(
            f"{name!r} has no config.json that tells its architecture, as timm and transformers write it. Build the "
            "network yourself and pass it as encoder=, or pass weights= with a folder that has one."
        )
    side = int(input_size[0] if isinstance(input_size, list) else input_size)
    seen: dict[str, Any] = {"input_size": side, "patch_um": side * UM, "mean": tuple(mean), "std": tuple(std)}
    return EncoderSpec(**source, **kind, **seen, license=license, gated=file.gated)  # type: ignore[arg-type]


def _timm_spec(name: str) -> EncoderSpec:
    """Ask what timm knows of one of its networks."""
    timm = needed("timm")
    try:
        config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # no such tag
        config = None
    if config is None:
        raise KeyError(
            f"no encoder {name!r} (there are: {', '.join(sorted(ENCODERS))}, timm's networks by their names there, and "
            "'hf-hub:owner/name'); a torch.nn.Module or an object is taken too"
        )
    return EncoderSpec(
        source=NETWORK,
        dim=0,
        input_size=config.input_size[1],
        patch_um=config.input_size[1] * UM,
        weights=config.hf_hub_id,
        architecture=name.partition(".")[0],
        pooling="own",
        mean=config.mean,
        std=config.std,
        license=config.license or "unknown",
        reference="",
    )


def _tell_other_colors(name: str, spec: EncoderSpec, file: WeightFile) -> None:
    """Log where the repository's own colors are others than those the network was trained with."""
    stated = file.configs.get(CONFIGS[0], {}).get("pretrained_cfg", {}).get("mean")
    if stated is not None and not np.allclose(stated, spec.mean, atol=1e-3):
        logger.info(
            "encoder %r: colors are centred on %s; the repository's config.json says %s", name, spec.mean, stated
        )
