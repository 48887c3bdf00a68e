"""The `wstunnel` command. Only `main` is here, so that Ctrl-C is handled before anything slow is imported."""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from types import FrameType

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the number of SIGINT, as shells count it."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run one command and exit with its code. Must be called in the main thread.

    Args:
        arguments: the command line without the program's name; `None` takes it from `sys.argv`.
    """
    signal.signal(signal.SIGINT, _interrupted)
    _fill_descriptors()
    # Imports keep what they make: looking for garbage in it takes 6 % of a server's start-up and finds next to nothing.
    # `running.run` turns the collector on again; a command without it is over before it needs one.
    gc.disable()
    from wstunnel.cli.group import wstunnel

    wstunnel.main(arguments, prog_name="wstunnel")
    raise AssertionError("click exits by itself")  # pragma: no cover  # it says so only in its overloads


def _fill_descriptors() -> None:
    """Open what is missing of stdin, stdout and stderr, so that no socket or key gets their number.

    `sys.stdin` and the others stay `None`, by which commands see it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    """Leave with 130. `finally` clauses run (a terminal's echo comes back); a second Ctrl-C cannot cut into them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.isatty(2):
        os.write(2, b"\n")  # the shell's prompt goes below the terminal's ^C
    sys.exit(INTERRUPTED)
