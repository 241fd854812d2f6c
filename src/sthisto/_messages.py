"""Messages for the user: lists of names, near matches, and warnings that name the user's own line."""

import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

PACKAGE = str(Path(__file__).parent)


class SthistoWarning(UserWarning):
    """What a user of the package should change; raise it as an error, or silence it, by this class."""


def warn(message: str) -> None:
    """Warn of something that the user should change, at the line that called into the package."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]  # None at the end
    warnings.warn(message, SthistoWarning, stacklevel=level)


def listed(names: Iterable[object], most: int = 8) -> str:
    """Names for a message, at most so many of them."""
    texts = [repr(str(name)) for name in names]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more or "nothing"


def near(name: str, names: Iterable[str]) -> str:
    """What a name may have been meant to be, else what there is."""
    there = [str(each) for each in names]
    close = get_close_matches(name, there, n=3)
    return f"did you mean {listed(close)}?" if close else f"there: {listed(there)}"


def progress_bar(iterable: Iterable[Any] | None = None, *, shown: bool = True, **options: Any) -> Any:
    """Give a bar of tqdm, which the environment (``TQDM_DISABLE``) and ``shown`` can both turn off."""
    hidden = {} if shown else {"disable": True}  # disable=False would override the environment
    return tqdm(iterable, **options, **hidden)
