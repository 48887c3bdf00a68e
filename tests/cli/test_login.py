"""`wstunnel login`: a URL from an argument, a pipe or a terminal, kept as a profile."""

from __future__ import annotations

import os
import signal
import termios
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke, Terminal
from wstunnel.profiles import load_profile

TOKEN = "T" * 43
URL = f"wss://{TOKEN}@tunnel.example.org/"


def saved(name: str = "default") -> str:
    return load_profile(name, os.environ).reveal()


def test_an_argument(invoke: Invoke, home: Path) -> None:
    result = invoke("login", URL)
    assert (result.exit_code, result.stdout) == (0, "")
    assert saved() == URL
    path = home / "config" / "wstunnel" / "profiles" / "default"
    assert path.stat().st_mode & 0o777 == 0o600
    assert result.stderr.splitlines() == [
        f"Saved wss://***@tunnel.example.org/ as profile default in {path} (mode 0600).",
        "Next: wstunnel client -L 5432:db:5432",
    ]


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_standard_input(invoke: Invoke, arguments: list[str]) -> None:
    result = invoke("login", *arguments, "--profile", "work", stdin=f"  {URL}\r\nnext line\n")
    assert result.exit_code == 0, result.stderr
    assert saved("work") == URL
    assert "Next: wstunnel client --profile work -L 5432:db:5432" in result.stderr


def test_a_variable_that_outranks_the_profile_is_mentioned(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSTUNNEL_URL", URL)
    assert "WSTUNNEL_URL is set" in invoke("login", URL).stderr
    assert "WSTUNNEL_URL is set" not in invoke("login", URL, "--profile", "work").stderr


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        ([], "", "no login URL was given\nexpected: wss://TOKEN@HOST"),
        ([], "\n", "no login URL was given"),
        ([""], None, "no login URL was given"),
        ([], b"\xff\xfe\n", "standard input holds no text"),
        (["wss://tunnel.example.org/"], None, "the login URL has no token"),
        (["https://x/"], None, "did you mean wss://?"),
        ([f"wss://{TOKEN}x@tunnel.example.org/"], None, "the token is malformed"),
        ([URL, "--profile", ".."], None, "this cannot be a name"),
    ],
)
def test_mistakes(invoke: Invoke, home: Path, arguments: list[str], stdin: str | bytes | None, message: str) -> None:
    result = invoke("login", *arguments, stdin=stdin)
    assert result.exit_code == 2
    assert message in result.stderr
    assert TOKEN not in result.stderr
    assert not (home / "config").exists()


def test_an_unusable_configuration_directory(invoke: Invoke, home: Path) -> None:
    (home / "config").touch()
    result = invoke("login", URL)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "cannot be written" in result.stderr


def test_a_terminal_is_asked_and_does_not_show_the_url() -> None:
    terminal = Terminal("login")
    terminal.expect("Login URL (not shown): ")
    terminal.type(URL + "\n")
    assert terminal.finish() == 0
    assert TOKEN not in terminal.shown
    assert "Saved wss://***@tunnel.example.org/" in terminal.shown
    assert saved() == URL


@pytest.mark.parametrize(("keys", "code"), [("\x03", 130), ("\x04", 1), ("\n", 2)])
def test_a_terminal_that_gives_nothing(keys: str, code: int, home: Path) -> None:
    terminal = Terminal("login")
    terminal.expect("Login URL (not shown): ")
    terminal.type(keys)
    assert terminal.finish() == code
    assert "Traceback" not in terminal.shown
    assert terminal.shown.endswith("\n")
    assert not (home / "config").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_at_the_prompt_gives_the_echo_back(number: signal.Signals) -> None:
    # Whoever runs the tests under nohup has SIGHUP ignored, and children inherit that.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        terminal = Terminal("login")
    finally:
        signal.signal(number, before)
    terminal.expect("Login URL (not shown): ")

    def echoes() -> bool:
        return bool(termios.tcgetattr(terminal.master)[3] & termios.ECHO)

    assert not echoes()
    terminal.process.send_signal(number)
    assert terminal.process.wait(30) == 128 + number
    assert echoes()
    terminal.finish()
