"""`wstunnel profiles`: what is saved, without secrets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke, Terminal
from wstunnel.auth import parse_login_url
from wstunnel.profiles import save_profile

TOKEN = "T" * 43


def save(name: str, host: str) -> Path:
    return save_profile(name, parse_login_url(f"wss://{TOKEN}@{host}/"), os.environ)


def test_none_yet(invoke: Invoke) -> None:
    result = invoke("profiles")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "wstunnel login" in result.stderr


def test_the_list(invoke: Invoke) -> None:
    save("work", "work.example.org:8443")
    save("default", "tunnel.example.org")
    result = invoke("profiles")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "* default  wss://***@tunnel.example.org/",
        "  work     wss://***@work.example.org:8443/",
    ]


def test_a_profile_that_others_may_read_is_reported_and_the_rest_listed(invoke: Invoke) -> None:
    save("a", "a.example.org").chmod(0o644)
    save("b", "b.example.org")
    result = invoke("profiles")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == ["  a  cannot be used", "  b  wss://***@b.example.org/"]
    assert "chmod 600" in result.stderr


@pytest.mark.parametrize("value", ["", "wss://x"])
def test_the_variable_is_not_mentioned_in_a_pipe(invoke: Invoke, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save("default", "tunnel.example.org")
    monkeypatch.setenv("WSTUNNEL_URL", value)
    assert invoke("profiles").stderr == ""


def test_the_variable_is_mentioned_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    save("default", "tunnel.example.org")
    monkeypatch.setenv("WSTUNNEL_URL", f"wss://{TOKEN}@x/")
    terminal = Terminal("profiles")
    assert terminal.finish() == 0
    assert "WSTUNNEL_URL is set" in terminal.shown
    assert TOKEN not in terminal.shown
