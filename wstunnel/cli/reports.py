"""What the person at the terminal reads: results on stdout, all else on stderr, a failure as one message and a code."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

import click

from wstunnel import __version__
from wstunnel.errors import LocalError, UsageError, WstunnelError

VERBOSITY = "wstunnel.verbosity"
"""Key in `click.Context.meta`: how often `-v` was given, less how often `-q`."""
TRACEBACK_VERBOSITY = 2
"""From `-vv` on, an unexpected error shows its traceback."""


LOG_FORMAT = "wstunnel.log_format"
"""Key in `click.Context.meta`: the value of `--log-format`, where the command has it."""

# A token has 43 characters; what follows `sha256=` is a pin, which is no secret and which people must compare.
# `TOKEN@HOST` is the grammar's own.
_SECRET = re.compile(r"(?i)(?:(?<=ws://)|(?<=wss://))(?!TOKEN@HOST)\S*(?=@)|(?<!sha256=)(?<![\w-])[A-Za-z0-9_-]{43,}")


class UnexpectedError(Exception):
    """A bug: an exception that is not of the tree came out of a role. The cause is the exception itself.

    It exists so that a role's stray `BrokenPipeError` is not taken for a closed stdout and passed over in silence.
    """


def verbosity(ctx: click.Context) -> int:
    """The verbosity that the command line asked for; 0 unless it did."""
    value = ctx.meta.get(VERBOSITY, 0)
    assert isinstance(value, int)  # options.py is the only writer
    return value


def say(text: str) -> None:
    """Write a result line to stdout, at once.

    Raises:
        click.exceptions.Exit: stdout's reader has gone; nothing is printed, as in `wstunnel profiles | head -1`.
        LocalError: stdout cannot be written (a full disk).
    """
    try:
        click.echo(text)
    except BrokenPipeError:
        _discard_stdout()
        raise click.exceptions.Exit(1) from None
    except OSError as error:
        _discard_stdout()
        raise LocalError(f"cannot write to standard output: {error.strerror}") from error


def unwritten(error: OSError) -> int:
    """Report that click could not write its own text to stdout, and return the exit code."""
    if not isinstance(error, BrokenPipeError):
        complain(f"cannot write to standard output: {error.strerror}")
    _discard_stdout()
    return 1


def tell(text: str) -> None:
    """Write a hint to stderr, unless `-q` was given. A stderr that nobody reads is no reason to fail."""
    ctx = click.get_current_context(silent=True)
    if ctx is None or verbosity(ctx) >= 0:
        _write(text)


def _write(text: str) -> None:
    try:
        click.echo(text, err=True)
    except OSError:
        pass  # there is nowhere left to say so


def warn(text: str) -> None:
    """Write a warning to stderr."""
    _write(f"wstunnel: {_paint('warning', 'yellow')}: {masked(text)}")


def complain(text: str) -> None:
    """Write an error to stderr. Lines after the first go below it as they are."""
    _write(f"wstunnel: {_paint('error', 'red')}: {masked(text)}")


def masked(text: str) -> str:
    """A message with `***` for what may be a token in it: a login URL is easily given to the wrong flag."""
    return _SECRET.sub("***", text)


def usage(error: click.ClickException, arguments: Sequence[str] = ()) -> None:
    """Say what is wrong with the command line, and how the right one reads.

    Args:
        error: what click found.
        arguments: the command line. An option that does not exist is found before any is looked at, `--log-format` too.
    """
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        _write(error.format_message())  # the help page itself
        return
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    if re.search(r"(?:^|\0)--log-format(?:=|\0)json(?:\0|$)", "\0".join(arguments)):
        _end(error.format_message(), "json", 0)
        return
    complain(error.format_message())
    if ctx is not None:
        _write(f"{ctx.get_usage()}\nTry '{ctx.command_path} --help'.")


def failure(error: Exception, level: int, log_format: str = "text") -> int:
    """Report `error` and return the exit code.

    Args:
        error: what came out of a command; of a group, the error of the tree inside it counts.
        level: the verbosity; from 2 on an unexpected error is followed by its traceback.
        log_format: `json` makes the message a line of the log, as those before it are.
    """
    found = unwrapped(error)
    if isinstance(found, click.exceptions.Exit):
        return found.exit_code
    if isinstance(found, BrokenPipeError):  # only click's own output gets here; a role's is an UnexpectedError
        _discard_stdout()
        return 1
    if isinstance(found, WstunnelError):
        _end(_shown(found), log_format, level)
        return found.exit_code
    cause = found.__cause__ if isinstance(found, UnexpectedError) and found.__cause__ is not None else found
    text = " ".join(f"{type(cause).__name__}: {cause}".split())
    shown = level >= TRACEBACK_VERBOSITY
    trace = _traceback(error) if shown else None
    message = f"unexpected {text} - a bug in wstunnel {__version__}, please report it (-vv shows where it happened)"
    _end(message, log_format, level, trace)
    return 1


def _traceback(error: Exception) -> str:
    import traceback  # 3 ms, of a command that rarely fails so

    return masked("".join(traceback.format_exception(error)).rstrip())


def _shown(error: WstunnelError) -> str:
    if not isinstance(error, UsageError) or error.text is None:
        return str(error)
    # Masked before it is laid out, so that the caret stays below the part at fault.
    text = masked(error.text)
    position = error.position if text == error.text else min(len(masked(error.text[: error.position])), len(text))
    return str(UsageError(error.message, text=text, position=position, grammar=error.grammar))


def _end(message: str, log_format: str, level: int, trace: str | None = None) -> None:
    if log_format != "json":
        complain(message)
        if trace is not None:
            _write(trace)
        return
    from wstunnel import logs

    # The mistake may have come before the command set up its log.
    logs.configure(verbosity=level, format="json", environ=os.environ)
    logs.logger("cli").error(masked(message), **({} if trace is None else {"traceback": trace}))


def unwrapped(error: BaseException) -> BaseException:
    """The one exception of a group that says most: of the tree, else a wish to exit, else whatever comes first."""
    leaves = list(_leaves(error))
    for wanted in (WstunnelError, click.exceptions.Exit):
        for leaf in leaves:
            if isinstance(leaf, wanted):
                return leaf
    return leaves[0]


def colourful(stream: TextIO) -> bool:
    """Whether colours may be written to `stream`: a terminal that can, and no NO_COLOR (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from _leaves(member)
    else:
        yield error


def _paint(text: str, colour: str) -> str:
    return click.style(text, fg=colour, bold=True) if colourful(sys.stderr) else text


def _discard_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not complain on its own."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return  # not a real file: a test's buffer
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
