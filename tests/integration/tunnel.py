"""The tunnel under test: `wstunnel server` and `wstunnel client`, each a process of its own, on loopback."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import wstunnel

from .process import Process, wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMAND = [sys.executable, "-m", "wstunnel"]

_URL = re.compile(
    r"(?P<scheme>wss?)://(?P<token>[A-Za-z0-9_-]{43})@(?P<host>127\.0\.0\.1):(?P<port>\d+)(?P<path>/[^#\s]*)?(?P<pin>#\S+)?"
)
_OTHERS_SETTINGS = re.compile(r"(?i)^(wstunnel_.*|xdg_.*|state_directory|notify_socket|listen_(fds|pid)|.*_proxy)$")


@dataclass(frozen=True)
class Invitation:
    """A login URL as `wstunnel invite` printed it, and its parts. `pin` has its `#`, or is empty."""

    url: str
    scheme: str
    token: str
    host: str
    port: int
    path: str
    pin: str

    def changed(self, *, token: str | None = None, port: int | None = None, pin: str | None = None) -> str:
        """The URL with some parts replaced."""
        token = self.token if token is None else token
        port = self.port if port is None else port
        pin = self.pin if pin is None else pin
        return f"{self.scheme}://{token}@{self.host}:{port}{self.path}{pin}"


def environment(directory: Path, **extra: str) -> dict[str, str]:
    """The test's environment less every setting of the person who runs it, with `directory` as home.

    The package is the one that the test itself imports, also in a child with another working directory.
    """
    kept = {name: value for name, value in os.environ.items() if not _OTHERS_SETTINGS.match(name)}
    root = str(Path(wstunnel.__file__).parents[1])
    return kept | {"HOME": str(directory), "PYTHONPATH": root, "PYTHONUNBUFFERED": "1"} | extra


def run(directory: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a `wstunnel` command to its end. `extra` is environment."""
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environment(directory, **extra),
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


class Server(Process):
    """`wstunnel server` on 127.0.0.1, with its state in `directory`/state. Entering returns once it accepts.

    Args:
        directory: of this server alone, or of one that ended before.
        plain: without TLS.
        port: 0 picks a free one.
        arguments: more of the command line.
        name: of its logs.
    """

    def __init__(
        self, directory: Path, *, plain: bool, port: int = 0, arguments: Sequence[str] = (), name: str = "server"
    ) -> None:
        self.state = directory / "state"
        argv: list[str | Path] = [
            *COMMAND,
            "server",
            "--state-dir",
            self.state,
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
        ]
        argv += [*(["--plain"] if plain else []), *arguments]
        super().__init__(name, argv, directory=directory, env=environment(directory))

    def __enter__(self) -> Server:
        super().__enter__()
        try:
            announcement = self.state / "server.json"
            wait_until(lambda: announcement.exists() or not self.running, "the server's announcement")
            assert self.running, f"the server ended: {self.tail()}"
            self.invitation = self.invite()
            # It announces before it listens, and after a restart the old announcement is still there.
            wait_until(lambda: not self.running or self._accepts(), "the server's socket")
            assert self.running, f"the server ended: {self.tail()}"
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    @property
    def port(self) -> int:
        return self.invitation.port

    def invite(self) -> Invitation:
        """Make a new token for the user, with `wstunnel invite`."""
        host = "127.0.0.1"
        done = run(self.state.parent, "invite", "--state-dir", str(self.state), "--host", host)
        assert done.returncode == 0, f"invite: {done.stderr}"
        found = _URL.fullmatch(done.stdout.strip())
        assert found, f"invite printed {done.stdout!r}, not one login URL"
        return Invitation(
            url=found[0],
            scheme=found["scheme"],
            token=found["token"],
            host=found["host"],
            port=int(found["port"]),
            path=found["path"] or "",
            pin=found["pin"] or "",
        )

    def _accepts(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.invitation.port), timeout=5).close()
        except OSError:
            return False
        return True


class Client(Process):
    """`wstunnel client` with one `-L 0:TARGET` a target. Entering returns once every forward is announced.

    Args:
        directory: for its logs and home.
        url: the login URL, passed as WSTUNNEL_URL.
        targets: `HOST:PORT` each.
        arguments: more of the command line.
        name: of its logs.
        stop_signal: SIGINT, as Ctrl-C, or SIGTERM.
    """

    def __init__(
        self,
        directory: Path,
        url: str,
        targets: Sequence[str],
        *,
        arguments: Sequence[str] = (),
        name: str = "client",
        stop_signal: signal.Signals = signal.SIGINT,
    ) -> None:
        argv = [*COMMAND, "client"]
        for target in targets:
            argv += ["-L", f"0:{target}"]
        super().__init__(
            name,
            [*argv, *arguments],
            directory=directory,
            env=environment(directory, WSTUNNEL_URL=url),
            stop_signal=stop_signal,
            exit_codes=(0, 130),
        )
        self._targets = targets
        self._ports: dict[str, int] = {}

    def __enter__(self) -> Client:
        super().__enter__()
        try:
            for target in self._targets:
                self.port(target)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def port(self, target: str) -> int:
        """The local port that leads to `target`."""
        if target not in self._ports:
            line = self.wait_for_line(rf"listening 127\.0\.0\.1:(\d+) -> tcp:{re.escape(target)}(\s|$)")
            self._ports[target] = int(line[1])
        return self._ports[target]

    def connect(self, target: str, *, within: float = 30.0) -> socket.socket:
        """A connection to the local port of `target`; every blocking call on it fails after `within` seconds."""
        return socket.create_connection(("127.0.0.1", self.port(target)), timeout=within)


def settle(server: Server, client: Client) -> tuple[int, int]:
    """Wait until neither has opened or closed a descriptor for a second: the warm links stand, nothing else goes on.

    Returns:
        the descriptors of the server and of the client.
    """
    seen = (0, 0)
    since = time.monotonic()

    def steady() -> bool:
        nonlocal seen, since
        now = server.descriptors(), client.descriptors()
        if now != seen:
            seen, since = now, time.monotonic()
        return time.monotonic() - since > 1

    wait_until(steady, "the links to settle", within=90)
    return seen
