"""Failures as messages and exit codes."""

from __future__ import annotations

import errno
import io
import sys
from typing import Any

import click
import pytest

from wstunnel.cli import reports
from wstunnel.errors import (
    LocalError,
    NetworkError,
    ServerRefusedError,
    TrustError,
    UsageError,
    WstunnelError,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    """A stream whose every write fails."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, _text: str) -> int:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("bad"), 2),
        (LocalError("bad"), 1),
        (ServerRefusedError("bad"), 3),
        (NetworkError("tcp", "bad"), 1),
        (TrustError("bad"), 1),
    ],
)
def test_errors_of_the_tree(error: WstunnelError, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert reports.failure(error, 2) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "wstunnel: error: bad\n")


def test_usage_error_shows_text_caret_and_grammar(capsys: pytest.CaptureFixture[str]) -> None:
    reports.failure(UsageError("no port", text="1:db", position=2, grammar="PORT:HOST:HOSTPORT"), 0)
    assert capsys.readouterr().err == ("wstunnel: error: no port\n    1:db\n      ^\nexpected: PORT:HOST:HOSTPORT\n")


def test_the_error_of_the_tree_wins_in_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    inner = ExceptionGroup("inner", [ValueError("x"), ServerRefusedError("the token is not known")])
    assert reports.failure(ExceptionGroup("outer", [KeyError("y"), inner]), 0) == 3
    assert capsys.readouterr().err == "wstunnel: error: the token is not known\n"


def test_an_exit_in_a_group_is_obeyed_silently(capsys: pytest.CaptureFixture[str]) -> None:
    assert reports.failure(ExceptionGroup("outer", [KeyError("y"), click.exceptions.Exit(7)]), 0) == 7
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("level", "shown"), [(0, False), (1, False), (2, True)])
def test_unexpected_error(level: int, shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        assert reports.failure(error, level) == 1
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith(
        "wstunnel: error: unexpected ValueError: two lines - a bug in wstunnel 0.1.0, please report"
    )
    assert bool(rest) == shown
    assert ("Traceback" in "".join(rest)) == shown


def test_a_role_s_exception_is_named_not_its_wrapper(capsys: pytest.CaptureFixture[str]) -> None:
    error = reports.UnexpectedError("gone")
    error.__cause__ = BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert reports.failure(error, 0) == 1
    assert "unexpected BrokenPipeError: [Errno 32] Broken pipe" in capsys.readouterr().err


def test_click_s_own_broken_pipe_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert reports.failure(BrokenPipeError(errno.EPIPE, "Broken pipe"), 2) == 1
    assert capsys.readouterr().err == ""


def test_say_writes_lines(capsys: pytest.CaptureFixture[str]) -> None:
    reports.say("one")
    reports.tell("two")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("one\n", "two\n")


def test_say_to_a_reader_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Broken(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    with pytest.raises(click.exceptions.Exit) as caught:
        reports.say("one")
    assert caught.value.exit_code == 1


def test_say_to_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Broken(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(LocalError, match="cannot write to standard output: No space left"):
        reports.say("one")


def test_tell_to_nobody_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Broken(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    reports.tell("one")


@pytest.mark.parametrize(
    ("stream", "environment", "coloured"),
    [
        (Terminal(), {"TERM": "xterm"}, True),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": ""}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {"TERM": "xterm"}, False),
    ],
)
def test_colours_only_on_a_terminal(
    stream: Any, environment: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", stream)
    stream.truncate(0)
    reports.warn("careful")
    assert ("\x1b[" in stream.getvalue()) == coloured
    assert click.unstyle(stream.getvalue()).lstrip("\0").endswith("wstunnel: warning: careful\n")


def test_pins_stay_readable_and_the_caret_stays_in_place(capsys: pytest.CaptureFixture[str]) -> None:
    pin = "sha256=" + "p" * 43
    assert reports.masked(f"expected {pin}, got {'t' * 43}") == f"expected {pin}, got ***"
    text = f"wss://{'t' * 43}@h/"
    assert reports.failure(UsageError("wrong", text=text, position=len(text) - 1), 0) == 2
    assert capsys.readouterr().err.splitlines()[1:] == ["    wss://***@h/", "               ^"]
