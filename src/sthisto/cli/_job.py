"""One run of a command."""

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger("sthisto")
MODEL, FEATURES, FIT = "attention", "X_histo", "sthisto"


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
    def progress(self) -> bool:
        return not self.args.quiet and sys.stderr.isatty()

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
