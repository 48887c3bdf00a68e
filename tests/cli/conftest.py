"""Fixtures: the command line in this process (`invoke`) and as a program (`program`), each with a home of its own."""

from __future__ import annotations

import logging
import os
import pty
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from wstunnel.state import read_announcement

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = ("WSTUNNEL_URL", "STATE_DIRECTORY", "NOTIFY_SOCKET", "NO_COLOR")
FOREIGN += ("https_proxy", "HTTPS_PROXY", "http_proxy", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY")

Invoke = Callable[..., Result]
Program = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, state home and configuration home for this test, and none of the variables that matter."""
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger("wstunnel")
    before = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:], root.level, root.propagate = before


@pytest.fixture
def invoke() -> Invoke:
    """Run `wstunnel ARGUMENTS…` in this process."""
    from wstunnel.cli.group import wstunnel

    def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(wstunnel, arguments, input=stdin, prog_name="wstunnel")

    return run


@pytest.fixture
def program() -> Iterator[Program]:
    """Start `python ARGUMENTS…` with pipes; whatever is left of it is killed after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **keywords: object) -> subprocess.Popen[str]:
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **keywords}
        options.setdefault("env", {**os.environ, "PYTHONPATH": str(ROOT)})
        process: subprocess.Popen[str] = subprocess.Popen(  # type: ignore[call-overload]
            [sys.executable, *arguments], text=True, **options
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        with process:
            pass  # closes its pipes


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """Poll until `condition` gives something; fails with the program's stderr when it ends before."""
    while True:
        found = condition()
        if found:
            return found
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.fixture
def server(program: Program, tmp_path: Path) -> Callable[..., tuple[subprocess.Popen[str], int]]:
    """Start a server and wait until it listens; gives the process and its port."""

    def start(*flags: str) -> tuple[subprocess.Popen[str], int]:
        directory = tmp_path / "server"
        arguments = ("server", "--bind", "127.0.0.1", "--port", "0", "--state-dir", str(directory), *flags)
        process = program("-m", "wstunnel", *arguments)
        announcement = wait_for(lambda: read_announcement(directory), process)
        wait_for(lambda: listening(announcement.port), process)
        return process, announcement.port

    return start


class Terminal:
    """A wstunnel command on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "wstunnel", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
            start_new_session=True,
            preexec_fn=_own_terminal,  # noqa: PLW1509  # there are no other threads
        )
        os.close(slave)
        self.shown = ""

    def expect(self, text: str) -> None:
        while text not in self.shown:
            assert select.select([self.master], [], [], 30)[0], self.shown
            self.shown += os.read(self.master, 4096).decode()

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def finish(self) -> int:
        while True:
            try:
                data = os.read(self.master, 4096)
            except OSError:  # EIO: the other end is closed
                break
            if not data:
                break
            self.shown += data.decode()
        os.close(self.master)
        return self.process.wait(30)


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that a typed ^C is a SIGINT
