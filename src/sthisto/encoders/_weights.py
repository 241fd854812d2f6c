"""Sources of weights: the Hub and its cache, a local file or folder, or bytes kept in an object.

A file is identified by its SHA-256, which is always computed, and refused where the Hub states another one. Nothing is
unpickled: safetensors is preferred, else torch reads tensors only (``weights_only=True``).
"""

import hashlib
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import HfApi, constants, get_token, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import load_file, save
from torch import Tensor

from sthisto.encoders._registry import ENCODERS

logger = logging.getLogger("sthisto")

State = dict[str, Tensor]

CONFIGS = ("config.json", "preprocessor_config.json")  # of the network, and of transformers' image preprocessor
USUAL = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
ENDINGS = (".safetensors", ".bin", ".pth", ".pt")
WRAPPED = ("state_dict", "model", "teacher")  # under which training scripts keep the weights
WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.)+")  # of torch.compile and of training on several GPUs
# Errors of the connection: OSError or, by the client's version, those of requests or httpx.
_CONNECTION: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
_FAILED: tuple[type[Exception], ...] = (HFValidationError, *_CONNECTION)


@dataclass(frozen=True)
class WeightFile:
    """A checked file with weights, and its metadata."""

    path: Path
    sha256: str
    repo_id: str = ""  # "owner/name" on the Hub, empty for a local file
    revision: str = ""  # the commit
    license: str = ""  # as the Hub states it, empty where unknown
    gated: bool = False
    configs: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # those of CONFIGS in its folder


def from_disk(path: str | PathLike[str]) -> WeightFile:
    """Weights in a local file, or in a folder in the Hub's layout."""
    source = Path(path).expanduser()
    if not source.exists():
        raise FileNotFoundError(f"weights={str(path)!r}: no such file or folder.")
    if not source.is_dir():
        return WeightFile(source, sha256_of(source))
    file = source / choose([entry.name for entry in source.iterdir()], str(source))
    return WeightFile(file, sha256_of(file), configs=_configs(source))


def from_hub(repo_id: str, revision: str | None = None) -> WeightFile:
    """Weights in a repository of the Hub: from its cache where they are there, else downloaded."""
    try:
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    except _FAILED as error:
        if _was_answered(error):
            _refuse(error, repo_id, revision)
        return _from_cache(repo_id, revision, error)
    try:
        return _download(info, repo_id, revision)
    except _CONNECTION as error:
        _refuse(error, repo_id, revision)


def choose(names: Iterable[str], where: str) -> str:
    """Name of the file with weights in a folder: safetensors before pickles, usual names before others.

    Examples
    --------
    >>> choose(["config.json", "pytorch_model.bin", "model.safetensors"], "here")
    'model.safetensors'
    """
    files = sorted(names)
    ranked = [name for name in USUAL if name in files]
    for ending in ENDINGS:
        others = [name for name in files if name.endswith(ending) and name not in USUAL]
        ranked += others if len(others) == 1 else []
    best = sorted(ranked, key=lambda name: not name.endswith(".safetensors"))
    if not best:
        raise FileNotFoundError(
            f"{where} has no single file of weights (searched for {', '.join(USUAL)}; found "
            f"{', '.join(files) or 'no files'}). Pass the file as weights=."
        )
    return best[0]


def read(file: WeightFile) -> State:
    """Tensors of a file by name, without the wrappers of training scripts."""
    try:
        if file.path.suffix == ".safetensors":
            return load_file(file.path)
        state = torch.load(file.path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{str(file.path)!r} cannot be read as weights: it is damaged, or holds more than tensors ({error})."
        ) from error
    for key in WRAPPED:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{str(file.path)!r} holds no table of tensors by name, but {type(state).__name__}.")
    return {WRAPPERS.sub("", name): value for name, value in state.items()}


def to_bytes(state: State) -> bytes:
    """Tensors as the bytes of a safetensors file."""
    data: bytes = save({name: value.detach().cpu().contiguous().clone() for name, value in state.items()})
    return data


def from_bytes(data: bytes, sha256: str) -> State:
    """Inverse of :func:`to_bytes`; ValueError where the bytes have changed."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"the kept weights are damaged: their SHA-256 is {found}, it was {sha256}.")
    state: State = from_safetensors(data)
    return state


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the Hub -------------------------------------------------------------------------------------------------------


def _download(info: ModelInfo, repo_id: str, revision: str | None) -> WeightFile:
    files = {sibling.rfilename: sibling for sibling in info.siblings or []}
    name = choose([file for file in files if "/" not in file], f"{repo_id!r} on the Hub")
    # By the name of the revision, not its commit: only then can the cache resolve the name offline.
    for config in CONFIGS:
        if config in files:
            HfApi().hf_hub_download(repo_id, config, revision=revision)
    path = Path(HfApi().hf_hub_download(repo_id, name, revision=revision))
    card = vars(info.card_data) if info.card_data else {}
    return WeightFile(
        path,
        _checked(path, getattr(files[name].lfs, "sha256", None)),
        repo_id=repo_id,
        revision=path.parent.name,
        license=str(card.get("license_name") or card.get("license") or ""),
        gated=bool(info.gated),
        configs=_configs(path.parent),
    )


def _from_cache(repo_id: str, revision: str | None, error: Exception) -> WeightFile:
    """Find the file in the Hub's cache, where the Hub does not answer."""
    cached = (try_to_load_from_cache(repo_id, name, revision=revision) for name in (*CONFIGS, *USUAL))
    folder = next((Path(path).parent for path in cached if isinstance(path, str)), None)
    offline = isinstance(error, OfflineModeIsEnabled)
    why = "HF_HUB_OFFLINE is set" if offline else f"the Hub at {constants.ENDPOINT} does not answer"
    if folder is None:
        message = (
            f"{why}, and the cache {constants.HF_HUB_CACHE} has no weights of {repo_id!r}"
            f"{f' at revision {revision!r}' if revision else ''}. Load it once with network, or pass weights= with a "
            "local file or folder."
        )
        raise (FileNotFoundError if offline else ConnectionError)(message) from error
    path = folder / choose([entry.name for entry in folder.iterdir()], str(folder))
    logger.info("%s: weights of %r from the cache, commit %s", why, repo_id, folder.name)
    blob = path.resolve().name  # the cache calls large files by their SHA-256
    stated = blob if re.fullmatch("[0-9a-f]{64}", blob) else None
    return WeightFile(path, _checked(path, stated), repo_id=repo_id, revision=folder.name, configs=_configs(folder))


def _checked(path: Path, stated: str | None) -> str:
    """SHA-256 of the file, compared with the one that the Hub states, if any."""
    found = sha256_of(path)
    if stated and found != stated:
        raise ValueError(
            f"{str(path.resolve())!r} is damaged: its SHA-256 is {found}, the Hub states {stated}. Delete that file "
            "and load again."
        )
    return found


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: json.loads((folder / name).read_text()) for name in CONFIGS if (folder / name).is_file()}


def _was_answered(error: Exception) -> bool:
    """Whether the Hub was reached and refused, so that the cache is not used."""
    status = _status(error)
    return isinstance(error, HFValidationError) or (400 <= status < 500 and status != 429)  # 429: too many requests


def _status(error: Exception) -> int:
    return getattr(getattr(error, "response", None), "status_code", None) or 0


def _refuse(error: Exception, repo_id: str, revision: str | None) -> NoReturn:
    """Raise the error of a refusal by the Hub, with what to do; never with the token that requests carry."""
    page = f"{constants.ENDPOINT}/{repo_id}"
    if isinstance(error, HFValidationError):
        raise ValueError(f"{repo_id!r} is no repository of the Hub: those are named 'owner/name'.") from error
    if isinstance(error, GatedRepoError) or (
        _status(error) in {401, 403} and not isinstance(error, RepositoryNotFoundError)
    ):
        raise PermissionError(_forbidden(page, repo_id)) from error
    if isinstance(error, RevisionNotFoundError):
        raise FileNotFoundError(f"{repo_id!r} has no revision {revision!r}; see {page}/commits/main.") from error
    if isinstance(error, RepositoryNotFoundError):
        raise FileNotFoundError(
            f"no repository {repo_id!r} at {constants.ENDPOINT}. If it is private, log in first (hf auth login, or "
            "HF_TOKEN in the environment)."
        ) from error
    remote = isinstance(error, ConnectionError | LocalEntryNotFoundError | HfHubHTTPError)
    if isinstance(error, OSError) and not remote and (isinstance(error, FileNotFoundError) or error.errno is not None):
        raise error  # no weights in the repository; the disk is full
    raise ConnectionError(
        f"the download of {repo_id!r} from {constants.ENDPOINT} was cut or not answered"
        f"{f' (status {_status(error)})' if _status(error) else ''}. Load again, and it goes on where it stopped; or "
        "pass weights= with a local file or folder."
    ) from error


def _forbidden(page: str, repo_id: str) -> str:
    reason = "no token is set" if get_token() is None else "the token in use is refused"
    free = ", ".join(name for name, spec in ENCODERS.items() if not spec.gated)
    return (
        f"the Hub does not give the weights of {repo_id!r}: {reason}. Ask for access at {page}, then log in with 'hf "
        f"auth login' or set HF_TOKEN; or pass weights= with a local file or folder. Open to everyone are: {free}."
    )
