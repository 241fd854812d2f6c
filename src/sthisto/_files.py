"""Files and folders that are whole or not there, whatever stops the run.

What is written gets its name once it is whole and on the disk. Until then it is in a private folder next to its target
(``.sthisto-`` and a random part, mode 700), so that two writers do not share it, no link can be planted there, and
moving it is one step of the file system. The folder goes on errors and signals; one that a killed process left is
removed by the next writer into the same folder, as its lock is free.
"""

import errno
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

try:
    import fcntl
except ImportError:  # Windows: folders are not locked, and what a killed process left stays
    fcntl = None  # type: ignore[assignment]

PREFIX = ".sthisto-"
FORMER = "former"
FRESH = 60.0  # seconds, in which a new folder may not be locked yet


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


_stops: list[Stopped] = []  # signals of this run: libraries may swallow the exception, as h5py does in its destructors


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise :class:`Stopped` at SIGINT, SIGTERM and SIGHUP, so that drafts are removed; ignored ones stay ignored."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():  # only this one may set handlers
        numbers = []
    former = {number: signal.getsignal(number) for number in numbers}
    for number, handler in former.items():
        if handler is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        _stops.clear()


def _stop(number: int, _: FrameType | None) -> None:
    _stops.append(Stopped(number))
    raise _stops[-1]


def _refuse_if_stopped() -> None:
    if _stops:
        raise _stops[0]


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a name to write to, and move what was written to ``path`` once it is whole and on the disk.

    A link at ``path`` stays a link and its target is replaced, and a file that is replaced keeps its permissions.
    """
    target = Path(os.path.realpath(path))
    with _errors_named(path), _private_folder(target.parent) as folder:
        draft = folder / target.name
        yield draft
        _refuse_if_stopped()
        if target.exists():
            _keep_permissions(target, draft)
        _sync(draft)
        draft.replace(target)
    _sync(target.parent)


@contextmanager
def whole_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Give the name of a folder to make, as a zarr store, and move it to ``path`` once it is whole and on the disk.

    Raises
    ------
    FileExistsError
        ``path`` is there, and not empty, and ``replace`` is not set.
    """
    target = Path(os.path.realpath(path))
    with _errors_named(path), _private_folder(target.parent) as folder:
        draft = folder / target.name
        yield draft
        _refuse_if_stopped()
        for each in (draft, *draft.rglob("*")):
            _sync(each)
        if replace and target.exists():
            (folder / FORMER).mkdir()
            target.rename(folder / FORMER / target.name)
        try:
            draft.rename(target)
        except OSError as error:
            if replace and not target.exists():
                (folder / FORMER / target.name).rename(target)
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise FileExistsError(f"{path} was written meanwhile by another run: give each its own.") from error
    _sync(target.parent)


def check_target(path: Path, *, inputs: Iterable[Path] = ()) -> None:
    """Refuse before the work what cannot be written after it, by writing an empty draft.

    Raises
    ------
    FileNotFoundError
        There is no folder to write into.
    ValueError
        ``path`` is one of the ``inputs``, or a device or pipe.
    OSError
        The folder or the file is read-only, or the name too long.
    """
    target = Path(os.path.realpath(path))
    if any(_same(target, each) for each in inputs):
        raise ValueError(f"{path} is read by this command and would be replaced. Name another file to write.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into. Make it first.")
    with _errors_named(path):
        if target.exists() and not (target.is_file() or target.is_dir()):
            raise ValueError(f"{path} is no ordinary file: name another to write.")
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(f"{path} is read-only: name another file to write.")
        with _private_folder(target.parent) as folder:
            (folder / target.name).touch()


@contextmanager
def _errors_named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Have errors of the system name the path that was given, not a draft."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and PREFIX not in str(error.filename)):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _same(target: Path, other: Path) -> bool:
    return target.exists() and other.exists() and target.samefile(other)


@contextmanager
def _private_folder(parent: Path) -> Iterator[Path]:
    """Make a locked folder of an unguessable name, and remove it with what is left in it."""
    _remove_stale(parent)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with _locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder, for as long as the process lives; whether that was possible."""
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    free = False
    try:
        with suppress(OSError):  # taken, or a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        yield free
    finally:
        os.close(descriptor)


def _remove_stale(parent: Path) -> None:
    """Remove the user's own drafts whose process is dead; what they were about to replace is left."""
    if fcntl is None:
        return
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # gone meanwhile, or a link
            found = folder.lstat()
            old = time.time() - found.st_mtime > FRESH
            if old and found.st_uid == os.getuid() and not (folder / FORMER).exists():
                with _locked(folder) as free:
                    if free:
                        shutil.rmtree(folder, ignore_errors=True)


def _keep_permissions(target: Path, draft: Path) -> None:
    found = target.stat()
    with suppress(OSError, AttributeError):  # only root may give files away, and Windows has no owners
        os.chown(draft, found.st_uid, found.st_gid)
    draft.chmod(found.st_mode & 0o777)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
