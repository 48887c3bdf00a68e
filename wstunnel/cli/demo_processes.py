"""The demo's processes: started, watched and ended together, with a temporary directory that goes with them."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import trio

import wstunnel
from wstunnel.errors import LocalError

T = TypeVar("T")

READY_SECONDS = 10.0
"""A process that is not ready by then has failed. They take about half a second."""
POLL_SECONDS = 0.02
END_SECONDS = 1.0
"""From SIGTERM to SIGKILL."""
TAIL_LINES = 10
"""How much of a failed process's stderr is shown."""
FOREIGN = (
    "WSTUNNEL_URL",
    "STATE_DIRECTORY",
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    # The demo stays on this machine, where no proxy is needed, nor gets to.
    "https_proxy",
    "HTTPS_PROXY",
    "http_proxy",
    "all_proxy",
    "ALL_PROXY",
)
"""Variables that would lead the demo's processes to somebody else's state, server or service manager."""


@dataclass
class Child:
    """One process. Its stdout and stderr are files in the demo's directory."""

    name: str
    process: subprocess.Popen[bytes]
    directory: Path

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return (self.directory / f"{self.name}.out").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What it has said and logged so far."""
        return (self.directory / f"{self.name}.err").read_text(errors="replace")

    def tell(self, line: str) -> None:
        """Write a line to its stdin, which a pipe takes at once.

        Raises:
            LocalError: it has ended.
        """
        assert self.process.stdin is not None  # a pipe, see start()
        try:
            self.process.stdin.write(f"{line}\n".encode())
        except OSError as error:
            raise self.failed("has ended") from error

    def failed(self, what: str) -> LocalError:
        """An error that says what happened to this process, with the end of its stderr."""
        tail = self.stderr.splitlines()[-TAIL_LINES:]
        lines = [f"the demo's {self.name} {what}" + ("; it said last:" if tail else ", without a word")]
        return LocalError("\n".join([*lines, *(f"    {line}" for line in tail)]))


class Processes:
    """An asynchronous context manager. Leaving it, for whatever reason, ends every process and removes the directory.

    Each process also ends by itself when this one is killed: see `wstunnel.cli.demo_child`.
    """

    def __init__(self) -> None:
        self.children: list[Child] = []

    async def __aenter__(self) -> Processes:
        try:
            self.directory = Path(tempfile.mkdtemp(prefix="wstunnel-demo-"))
        except OSError as error:
            raise LocalError(f"cannot make a temporary directory: {error.strerror}") from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with trio.CancelScope(shield=True):  # at most END_SECONDS, and the kernel's time for SIGKILL
            try:
                await self._end()
            finally:
                shutil.rmtree(self.directory, ignore_errors=True)

    def start(self, name: str, module: str, *arguments: str, environment: dict[str, str] | None = None) -> Child:
        """Start `python -m MODULE ARGUMENTS…`.

        Args:
            name: what the process is called in messages.
            module: a module of this package that watches its stdin.
            arguments: anybody on the machine may read them: no secrets.
            environment: further variables, which only this user may read.

        Raises:
            LocalError: it could not be started.
        """
        files = self.directory / f"{name}.out", self.directory / f"{name}.err"
        try:
            with files[0].open("wb") as out, files[1].open("wb") as err:
                process = subprocess.Popen(  # noqa: S603  # our own interpreter and modules
                    [sys.executable, "-P", "-m", module, *arguments],  # -P: nothing is imported from the user's folder
                    stdin=subprocess.PIPE,
                    bufsize=0,  # what cannot be written is known at once, and not again at the end
                    stdout=out,
                    stderr=err,
                    env=self._environment() | (environment or {}),
                    process_group=0,  # a terminal's Ctrl-C is for the demo alone, which then ends the others
                )
        except OSError as error:
            raise LocalError(f"cannot start the demo's {name}: {error.strerror}") from error
        child = Child(name, process, self.directory)
        self.children.append(child)
        return child

    async def ready(self, child: Child, probe: Callable[[], T | None]) -> T:
        """Wait until `probe` returns something, and return that.

        Raises:
            LocalError: a process ended, or READY_SECONDS went by.
        """
        with trio.move_on_after(READY_SECONDS):
            while True:
                found = probe()
                if found is not None:
                    return found
                self.check()
                await trio.sleep(POLL_SECONDS)
        raise child.failed(f"was not ready within {READY_SECONDS:.0f} s")

    def check(self) -> None:
        """See that every process lives.

        Raises:
            LocalError: one has ended.
        """
        for child in self.children:
            code = child.process.poll()
            if code is not None:
                raise child.failed(f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}")

    async def watch(self) -> None:
        """Check for ever. Raises as `check` does."""
        while True:
            self.check()
            await trio.sleep(POLL_SECONDS)

    async def _end(self) -> None:
        alive = [child.process for child in self.children if child.process.poll() is None]
        for process in alive:
            process.terminate()
        deadline = trio.current_time() + END_SECONDS
        while trio.current_time() < deadline and any(process.poll() is None for process in alive):  # noqa: ASYNC110  # no event: only the kernel knows
            await trio.sleep(POLL_SECONDS)
        for process in alive:
            if process.poll() is None:
                process.kill()
        for child in self.children:
            child.process.wait()
            assert child.process.stdin is not None  # a pipe, see start()
            child.process.stdin.close()

    def _environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        environment["XDG_STATE_HOME"] = str(self.directory / "state")
        environment["XDG_CONFIG_HOME"] = str(self.directory / "config")
        root = str(Path(wstunnel.__file__).resolve().parent.parent)
        installed = (*site.getsitepackages(), site.getusersitepackages())
        if root not in {str(Path(directory).resolve()) for directory in installed}:  # run from a source tree
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        return environment
