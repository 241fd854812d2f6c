"""Where weights come from: the Hub and its cache, a local file or folder, or bytes kept in an object.

A file is known by its SHA-256, which is always computed, and refused where the Hub says another one. Nothing is
unpickled: safetensors is preferred, else torch reads tensors alone (``weights_only=True``).
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

CONFIGS = ("config.json", "preprocessor_config.json")  # of the network; of transformers' input
USUAL = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
ENDINGS = (".safetensors", ".bin", ".pth", ".pt")
WRAPPED = ("state_dict", "model", "teacher")  # under which training scripts keep the weights
WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.)+")  # of torch.compile and of training on several GPUs
# What the client raises when the line is bad: OSError or, by its version, what requests or httpx call it.
_LINE: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
_FAILED: tuple[type[Exception], ...] = (HFValidationError, *_LINE)


@dataclass(frozen=True)
class WeightFile:
    """A file with weights, checked, and what is known of it."""

    path: Path
    sha256: str
    repo_id: str = ""  # "owner/name" on the Hub, empty for a local file
    revision: str = ""  # the commit
    license: str = ""  # as the Hub has it, empty where unknown
    gated: bool = False
    configs: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # of CONFIGS, those that are beside it


def from_disk(path: str | PathLike[str]) -> WeightFile:
    """Find weights in a local file, or in a folder as the Hub has it.

    Raises
    ------
    FileNotFoundError
        No such file, or no weights in the folder.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"weights={str(path)!r}: no such file or folder.")
    if not place.is_dir():
        return WeightFile(place, sha256_of(place))
    file = place / choose([each.name for each in place.iterdir()], str(place))
    return WeightFile(file, sha256_of(file), configs=_configs(place))


def from_hub(repo_id: str, revision: str | None = None) -> WeightFile:
    """Find weights in a repository of the Hub: in its cache where they are, else downloaded.

    Raises
    ------
    PermissionError
        The repository is gated and there is no token, or the Hub refuses it.
    FileNotFoundError
        No such repository, no such revision, or no weights in it; offline, and not in the cache.
    ConnectionError
        The Hub does not answer, or the download was cut.
    ValueError
        The name is no "owner/name", or the file's checksum is not the one that the Hub states.
    """
    try:
        about = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    except _FAILED as error:
        if _answered(error):
            _refuse(error, repo_id, revision)
        return _from_cache(repo_id, revision, error)
    try:
        return _download(about, repo_id, revision)
    except _LINE as error:
        _refuse(error, repo_id, revision)


def choose(names: Iterable[str], where: str) -> str:
    """Name of the file with weights among a folder's: safetensors before pickles, usual names before others.

    Examples
    --------
    >>> choose(["config.json", "pytorch_model.bin", "model.safetensors"], "here")
    'model.safetensors'
    """
    there = sorted(names)
    ranked = [name for name in USUAL if name in there]
    for ending in ENDINGS:
        others = [name for name in there if name.endswith(ending) and name not in USUAL]
        ranked += others if len(others) == 1 else []
    best = sorted(ranked, key=lambda name: not name.endswith(".safetensors"))
    if not best:
        raise FileNotFoundError(
            f"{where} holds no one file of weights (looked for {', '.join(USUAL)}; there are: "
            f"{', '.join(there) or 'none'}). Pass the file as weights=."
        )
    return best[0]


def read(file: WeightFile) -> State:
    """Give the tensors of a file by name, without wrappers of training scripts.

    Raises
    ------
    ValueError
        The file is damaged, or holds more than tensors.
    """
    try:
        if file.path.suffix == ".safetensors":
            return load_file(file.path)
        found = torch.load(file.path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{str(file.path)!r} cannot be read as weights: it is damaged, or holds more than tensors ({error})."
        ) from error
    for key in WRAPPED:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{str(file.path)!r} holds no table of tensors by name, but {type(found).__name__}.")
    return {WRAPPERS.sub("", name): value for name, value in found.items()}


def to_bytes(state: State) -> bytes:
    """Give tensors as the bytes of a safetensors file."""
    kept: bytes = save({name: value.detach().cpu().contiguous().clone() for name, value in state.items()})
    return kept


def from_bytes(kept: bytes, sha256: str) -> State:
    """Undo :func:`to_bytes`.

    Raises
    ------
    ValueError
        The bytes are not those that were kept.
    """
    found = hashlib.sha256(kept).hexdigest()
    if found != sha256:
        raise ValueError(f"the kept weights are damaged: their SHA-256 is {found}, it was {sha256}.")
    state: State = from_safetensors(kept)
    return state


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the Hub -------------------------------------------------------------------------------------------------------


def _download(about: ModelInfo, repo_id: str, revision: str | None) -> WeightFile:
    files = {each.rfilename: each for each in about.siblings or []}
    name = choose([each for each in files if "/" not in each], f"{repo_id!r} on the Hub")
    # By the name of the revision, not its commit: only so does the cache know offline what the name stood for.
    for beside in CONFIGS:
        if beside in files:
            HfApi().hf_hub_download(repo_id, beside, revision=revision)
    path = Path(HfApi().hf_hub_download(repo_id, name, revision=revision))
    card = vars(about.card_data) if about.card_data else {}
    return WeightFile(
        path,
        _checked(path, getattr(files[name].lfs, "sha256", None)),
        repo_id=repo_id,
        revision=path.parent.name,
        license=str(card.get("license_name") or card.get("license") or ""),
        gated=bool(about.gated),
        configs=_configs(path.parent),
    )


def _from_cache(repo_id: str, revision: str | None, error: Exception) -> WeightFile:
    """Take the file from the Hub's cache, as the Hub is not there to ask."""
    known = (try_to_load_from_cache(repo_id, name, revision=revision) for name in (*CONFIGS, *USUAL))
    folder = next((Path(path).parent for path in known if isinstance(path, str)), None)
    offline = isinstance(error, OfflineModeIsEnabled)
    why = "HF_HUB_OFFLINE is set" if offline else f"the Hub at {constants.ENDPOINT} does not answer"
    if folder is None:
        message = (
            f"{why}, and the cache {constants.HF_HUB_CACHE} has no weights of {repo_id!r}"
            f"{f' at revision {revision!r}' if revision else ''}. Load it once with network, or pass weights= with a "
            "local file or folder."
        )
        raise (FileNotFoundError if offline else ConnectionError)(message) from error
    path = folder / choose([each.name for each in folder.iterdir()], str(folder))
    logger.info("%s: weights of %r from the cache, commit %s", why, repo_id, folder.name)
    blob = path.resolve().name  # the cache calls large files by their SHA-256
    stated = blob if re.fullmatch("[0-9a-f]{64}", blob) else None
    return WeightFile(path, _checked(path, stated), repo_id=repo_id, revision=folder.name, configs=_configs(folder))


def _checked(path: Path, stated: str | None) -> str:
    """SHA-256 of the file, once it is known to be what the Hub states where it states one."""
    found = sha256_of(path)
    if stated and found != stated:
        raise ValueError(
            f"{str(path.resolve())!r} is damaged: its SHA-256 is {found}, the Hub states {stated}. Delete that file "
            "and load again."
        )
    return found


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: json.loads((folder / name).read_text()) for name in CONFIGS if (folder / name).is_file()}


def _answered(error: Exception) -> bool:
    """Whether the Hub was reached and said no, so that the cache is not asked."""
    status = _status(error)
    return isinstance(error, HFValidationError) or (400 <= status < 500 and status != 429)  # 429: too many requests


def _status(error: Exception) -> int:
    return getattr(getattr(error, "response", None), "status_code", None) or 0


def _refuse(error: Exception, repo_id: str, revision: str | None) -> NoReturn:
    """Say what went wrong at the Hub in words that help; never with a token, which requests carry."""
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
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | LocalEntryNotFoundError | HfHubHTTPError):
        ours = isinstance(error, FileNotFoundError)
        if ours or error.errno is not None:  # no weights in the repository; the disk is full
            raise error
    raise ConnectionError(
        f"the download of {repo_id!r} from {constants.ENDPOINT} was cut or not answered"
        f"{f' (status {_status(error)})' if _status(error) else ''}. Load again, and it goes on where it stopped; or "
        "pass weights= with a local file or folder."
    ) from error


def _forbidden(page: str, repo_id: str) -> str:
    found = "there is no token here" if get_token() is None else "the token found here is refused"
    free = ", ".join(name for name, spec in ENCODERS.items() if not spec.gated)
    return (
        f"the Hub does not give the weights of {repo_id!r}: {found}. Ask for access at {page}, then log in with 'hf "
        f"auth login' or set HF_TOKEN; or pass weights= with a local file or folder. Open to everyone are: {free}."
    )
