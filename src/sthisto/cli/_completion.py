"""Completion of commands, options and files by the shell."""

import argparse
from pathlib import Path
from typing import Any

from sthisto.cli._job import Job

SHELLS = ("bash", "zsh", "tcsh")


def run_completion(job: Job) -> tuple[dict[str, Any], str]:
    """Give the script that a shell evaluates to complete what is typed after ``sthisto``."""
    from sthisto.cli._options import parser  # noqa: PLC0415  which names this command

    text = script(parser(), job.args.shell)
    return {"shell": job.args.shell, "script": text}, text


def script(whole: argparse.ArgumentParser, shell: str) -> str:
    """Give the script of a parser; options that take a file complete files."""
    import shtab  # noqa: PLC0415  only here

    for action in _actions(whole):
        if action.metavar == "DIR":
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.type is Path or action.metavar == "FILE":
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(whole, shell=shell))


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Those of a parser and of its commands."""
    found = []
    for action in parser._actions:
        found.append(action)
        if isinstance(action, argparse._SubParsersAction):
            found.extend(each for command in action.choices.values() for each in _actions(command))
    return found
