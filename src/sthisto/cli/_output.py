"""Log messages during a run, and how mistakes are reported."""

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sthisto.cli._job import logger


@contextmanager
def configure_logging(*, quiet: bool) -> Iterator[None]:
    """Log lines and warnings as single lines on stderr, for as long as a command runs."""
    handler, level = logging.StreamHandler(sys.stderr), logger.level
    handler.setFormatter(logging.Formatter("sthisto: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            for of_developers in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", of_developers)
            warnings.showwarning = _show_warning
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"sthisto: warning: {_as_typed(str(message))}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return _as_typed(str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error))


def _as_typed(text: str) -> str:
    """One line, with the options of the functions named as they are typed here."""
    names = "device|genes|image|layer|library_key|mpp|patch_um|pitch_um|weights"
    text = re.sub(rf"\b({names})=(?=[\s.,;:)]|$)", lambda found: f"--{found[1].replace('_', '-')}", text)
    return " ".join(text.split())
