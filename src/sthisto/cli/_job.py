"""One run of a command: its options and results, its log lines, and how mistakes are reported."""

import argparse
import logging
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger("sthisto")
MODEL, FEATURES, FIT = "attention", "X_histo", "sthisto"
N_GENES = 1000
SECTION = "section"  # column of the sample sheet, and of obs in what batch writes


@dataclass
class Job:
    """One run: its options, and what is reported of it at the end."""

    args: argparse.Namespace
    seconds: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    exit_code: int = 0

    @property
    def source(self) -> Path:
        """What is read: a section, or the sheet of several."""
        given = vars(self.args)
        return Path(given["sheet"] if "sheet" in given else given["section"])

    @property
    def reads(self) -> bool:
        """Whether anything is read: the demonstration makes its section."""
        return not {"sheet", "section"}.isdisjoint(vars(self.args))

    @property
    def inputs(self) -> list[Path]:
        """Files that are read, none of which may be written."""
        given = vars(self.args)
        images = [entry.partition("=")[2] or entry for entry in given.get("image") or []]
        named = (*images, *(given.get("image") or []), given.get("weights"), given.get("genes"))
        source = [self.source] if self.reads else []
        return [*source, *(Path(name) for name in named if name is not None)]

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        logger.info("%s: %.1f s", name, self.seconds[name])

    def asked(self, *options: str) -> list[str]:
        """Which of the options were given, as they are typed."""
        return [f"--{name.replace('_', '-')}" for name in options if getattr(self.args, name) is not None]

    def reuse(self, what: str) -> None:
        logger.info("reusing %s", what)
        self.reused.append(what)


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
