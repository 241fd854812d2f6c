"""Files that are whole or not there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a name to write to, and move what was written to ``path`` once it is whole and on the disk.

    The name is in a new private folder next to the target, so that two writers do not share it and no link can be
    planted there. A link at ``path`` stays a link, and a file that is replaced keeps its permissions.
    """
    target = Path(os.path.realpath(path))
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
    with tempfile.TemporaryDirectory(prefix=".sthisto-", dir=target.parent) as folder:
        draft = Path(folder) / target.name
        yield draft
        draft.chmod(mode)
        _sync(draft)
        draft.replace(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    return mask
