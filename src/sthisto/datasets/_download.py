"""Files from the network, kept in a folder: fetched once, continued where a download was cut."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pooch
import requests

from sthisto._messages import progress_bar

logger = logging.getLogger("sthisto")

BLOCK = 1 << 16  # bytes; a block that is cut is lost, so they are small
SECONDS = 60  # without a byte, after which a connection counts as cut


def fetch(url: str, path: Path, *, sha256: str | None = None, progress: bool = True) -> Path:
    """Have the file of ``url`` at ``path``.

    A file that is there is used as it is, offline. Otherwise it grows next to it as ``path + ".part"``, which stays
    when the download is cut and is continued by the next call, where the server serves ranges.

    Raises
    ------
    ConnectionError
        The server cannot be reached or stopped answering.
    OSError
        It answers, but not with the file.
    ValueError
        The file's checksum is not ``sha256``; it is thrown away.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    known = f"sha256:{sha256}" if sha256 else None
    logger.info("downloading %s to %s", url, path)

    def download(url: str, target: str, _: Any) -> None:
        _whole(url, path, progress).replace(target)

    with _quiet(pooch.get_logger()):  # its messages are logged above
        return Path(pooch.retrieve(url, known, path.name, path.parent, downloader=download))


@contextmanager
def _quiet(log: logging.Logger) -> Iterator[None]:
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def part_of(path: Path) -> Path:
    """Name the file that holds what has come of a download."""
    return path.with_name(path.name + ".part")


def _whole(url: str, path: Path, progress: bool) -> Path:  # noqa: FBT001
    """Download until the file is whole, going on after every cut as long as something comes."""
    part = part_of(path)
    while True:
        before = _size(part)
        try:
            _more(url, path, progress)
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            if _size(part) > before:
                logger.info("%s was cut at %d bytes; going on", url, _size(part))
                continue
            raise ConnectionError(f"cannot download {url}: {type(error).__name__}. {_advice(path)}") from error
        return part


def _more(url: str, path: Path, progress: bool) -> None:  # noqa: FBT001
    """Ask for what is missing and append it; a server without ranges sends all of it, which starts again."""
    part = part_of(path)
    tag = part.with_name(part.name + ".etag")  # of the version that the part belongs to
    begun = _size(part)
    headers = {"Accept-Encoding": "identity", "User-Agent": "sthisto"}
    if begun:
        headers["Range"] = f"bytes={begun}-"
    if begun and tag.exists():
        headers["If-Range"] = tag.read_text()
    with requests.get(url, headers=headers, stream=True, timeout=SECONDS) as answer:
        if begun and answer.status_code == requests.codes.requested_range_not_satisfiable:
            part.unlink()  # as long as the file or longer, so of another version
            return _more(url, path, progress)
        if not answer.ok:
            raise OSError(f"cannot download {url}: {answer.status_code} {answer.reason}. {_advice(path)}")
        begun = begun if answer.status_code == requests.codes.partial_content else 0
        if answer.headers.get("ETag", "").startswith('"'):  # weak ones do not identify bytes
            tag.write_text(answer.headers["ETag"])
        length = answer.headers.get("Content-Length")
        total = None if length is None else begun + int(length)
        _append(answer, part, begun, total, progress)
    if total is not None and _size(part) != total:
        raise requests.ConnectionError(f"{_size(part)} of {total} bytes")
    tag.unlink(missing_ok=True)
    return None


def _append(answer: requests.Response, part: Path, begun: int, total: int | None, progress: bool) -> None:  # noqa: FBT001
    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "desc": part.stem, "leave": False}
    bar = progress_bar(total=total, initial=begun, shown=progress, **options)
    with part.open("r+b" if begun else "wb") as file, bar:
        file.seek(begun)
        for block in answer.iter_content(BLOCK):
            file.write(block)
            bar.update(len(block))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _advice(path: Path) -> str:
    kept = _size(part_of(path))
    begun = f"{kept:,} bytes are kept and the next call goes on from there. " if kept else ""
    return f"{begun}Without network, download that address elsewhere and put the file at {path}: it is read offline."


def data_folder(folder: str | os.PathLike[str] | None) -> Path:
    """Where data sets are kept: what was asked for, else ``STHISTO_DATA``, else the user's cache."""
    return Path(folder or os.environ.get("STHISTO_DATA") or pooch.os_cache("sthisto")).expanduser().resolve()
