"""The command line: files in, files out.

Each command reads an AnnData file, does what is missing, logs what it decided, and writes its result whole or not at
all. What the person did wrong ends in one line and exit code 2; decisions go to stderr, the result to stdout.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from sthisto import __version__
from sthisto._files import stopped_by_signals
from sthisto.cli._job import Job, configure_logging, one_line
from sthisto.cli._options import parser

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Pipelines need to distinguish a mistake in their input from a fault of the program: the first is one line on
    stderr and 2, the second a traceback.

    Parameters
    ----------
    argv
        Arguments without the program's name; ``None`` takes those of the process.

    Returns
    -------
    0, or 2 where the input was wrong, or 128 and the signal's number where one stopped the run (130 for Ctrl-C); of
    ``batch`` 1 where some sections failed, of ``check`` 1 where facts contradict each other.

    Raises
    ------
    SystemExit
        2 for options that cannot be read, 0 after ``--help``.

    Examples
    --------
    >>> main(["fit", "section.h5ad", "--save", "nowhere/fit.safetensors"])
    2
    """
    args = parser().parse_args(argv)
    job = Job(args)
    with configure_logging(quiet=args.quiet), stopped_by_signals():
        try:
            module, run = args.run.split(":")  # loaded now, as --help does without
            summary, text = getattr(import_module(f"sthisto.cli.{module}"), run)(job)
        except (KeyError, ValueError, OSError, ImportError) as error:
            if args.debug:
                traceback.print_exc()
            print(f"sthisto: error: {one_line(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as stop:
            print("sthisto: interrupted, nothing half-written is left", file=sys.stderr)
            return 128 + int(getattr(stop, "number", signal.SIGINT))
    summary_of_run = {"command": args.command, "version": __version__, **summary, "seconds": job.seconds}
    try:
        print(json.dumps(summary_of_run) if args.json else text, flush=True)
    except BrokenPipeError:  # the reader, such as head, has closed; Python would complain again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return job.exit_code
