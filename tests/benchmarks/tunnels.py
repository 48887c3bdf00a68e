"""A tunnel under measurement: two command lines, ours like any peer's, and the processes that run them.

    server: wstunnel server --port {server_port} --bind {server_host} …
    client: wstunnel client -L {listen_port}:{target_host}:{target_port} …

Placeholders: {server_host} {server_port} {listen_port} {target_host} {target_port}, {state}, an empty directory of this
tunnel alone, and for the client {prepared}: what the command `prepare` printed once the server listened.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.benchmarks.load import Load, LoadError, namespaced
from tests.integration.sockets import unused_port
from tests.integration.tunnel import environment

PLACEHOLDERS = ("server_host", "server_port", "listen_port", "target_host", "target_port", "state", "prepared")
NAME = re.compile(r"[a-z0-9_]+(-[a-z0-9_]+)*")
DIRECT = "direct"
STOP_SECONDS = 10.0
READY_SECONDS = 30.0
PREPARE_SECONDS = 30.0
TAIL_CHARACTERS = 300
GONE = (FileNotFoundError, ProcessLookupError)
"""What reading of a process raises that has just ended."""
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


class TunnelError(Exception):
    """A tunnel did not start, or ended by itself; the message says which part and its last words."""


@dataclass(frozen=True)
class Commands:
    """The command lines of a tunnel, with placeholders.

    Args:
        name: of small letters, digits and _, with -ws or -wss if it has such a transport.
        server, client: both stay in the foreground.
        prepare: run after the server listens, or empty.
        version: prints the program's version; unless given, the server's program with --version.
    """

    name: str
    server: str
    client: str
    prepare: str = ""
    version: str = ""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name) or self.name == DIRECT:
            raise ValueError(f"{self.name!r} is not a tunnel's name: small letters, digits, _ and -")
        # What `prepare` prints is how a client finds the server.
        reached_by = "prepared" if self.prepare else "server_port"
        self._check("server", self.server, {"server_port"})
        self._check("client", self.client, {reached_by, "listen_port", "target_port"})

    def _check(self, part: str, command: str, needed: set[str]) -> None:
        present = set(_PLACEHOLDER.findall(command))
        if missing := needed - present:
            raise ValueError(f"{self.name}: the {part}'s command lacks {{{'}, {'.join(sorted(missing))}}}")
        if unknown := present - set(PLACEHOLDERS):
            raise ValueError(f"{self.name}: {{{min(unknown)}}} in the {part}'s command is no placeholder")
        try:
            shlex.split(command)
        except ValueError as error:
            raise ValueError(f"{self.name}: the {part}'s command: {error}") from error

    @property
    def version_command(self) -> list[str]:
        return shlex.split(self.version) or [shlex.split(self.server)[0], "--version"]


def ours(transport: str) -> Commands:
    """This package over `ws` or `wss`, run by the Python that runs this."""
    program = f"{shlex.quote(sys.executable)} -m wstunnel"
    plain = " --plain" if transport == "ws" else ""
    return Commands(
        f"ours-{transport}",
        f"{program} server --port {{server_port}} --bind {{server_host}} --state-dir {{state}}{plain}",
        f"env WSTUNNEL_URL={{prepared}} {program} client -L {{listen_port}}:{{target_host}}:{{target_port}}",
        f"{program} invite --host {{server_host}} --state-dir {{state}}",
        f"{program} --version",
    )


def fill(command: str, values: Mapping[str, str | int]) -> list[str]:
    """The words of a command line with its placeholders filled in. What is filled in is never split."""
    return [_PLACEHOLDER.sub(lambda found: str(values[found[1]]), word) for word in shlex.split(command)]


@dataclass(frozen=True)
class Place:
    """Where the two ends run: network namespaces, `None` for this one, and the addresses seen from them.

    Args:
        near, far: namespaces of the client and the driver, and of the server and the target.
        server_host: at which the near end reaches the far end.
    """

    near: str | None = None
    far: str | None = None
    server_host: str = "127.0.0.1"


LOOPBACK = Place()


class Program:
    """One process of a tunnel, its output in a file. Leaving ends it, and whatever it started."""

    def __init__(self, what: str, command: list[str], log: Path, directory: Path) -> None:
        self.what = what
        self._log = log
        with log.open("wb") as output:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environment(directory),
                    cwd=directory,
                    start_new_session=True,
                )
            except OSError as error:
                raise TunnelError(f"{what}: {error}") from error
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                self._process.send_signal(number)
                try:
                    self._process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        try:
            os.killpg(self.pid, signal.SIGKILL)  # its own session: what it started and left behind
        except ProcessLookupError:
            pass  # as it should be

    def check(self) -> None:
        """Raises TunnelError if it has ended."""
        if (code := self._process.poll()) is not None:
            raise TunnelError(f"{self.what} ended with exit code {code}: {self.tail()}")

    def tail(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-TAIL_CHARACTERS:].strip()

    def cpu(self) -> float:
        """CPU seconds that it and its descendants have used."""
        ticks = 0
        for pid in family(self.pid):
            with contextlib.suppress(*GONE):  # then its parent has its time, when it has waited for it
                stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
                # utime, stime, and those of children that were waited for
                ticks += sum(map(int, stat.rpartition(")")[2].split()[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Bytes resident, of it and its descendants."""
        kilobytes = 0
        for pid in family(self.pid):
            with contextlib.suppress(*GONE):
                text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
                kilobytes += int(text.partition("Rss:")[2].split()[0])
        if not kilobytes:
            raise TunnelError(f"no process of {self.pid} is left")
        return kilobytes * 1024


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for one in found:  # grows as it goes
        with contextlib.suppress(*GONE):
            for task in Path(f"/proc/{one}/task").iterdir():
                with contextlib.suppress(*GONE):  # threads come and go
                    found += map(int, (task / "children").read_text(encoding="ascii").split())
    return found


class Tunnel:
    """A running tunnel, or none at all.

    Args:
        address: `HOST:PORT` where the driver connects.
        near: the driver's namespace.
        client, server: `None` where there is no tunnel.
    """

    def __init__(
        self, name: str, address: str, near: str | None, client: Program | None = None, server: Program | None = None
    ) -> None:
        self.name = name
        self.address = address
        self.near = near
        self._client = client
        self._server = server

    @property
    def client(self) -> Program:
        assert self._client is not None
        return self._client

    @property
    def server(self) -> Program:
        assert self._server is not None
        return self._server

    def check(self) -> None:
        """Raises TunnelError if a process has ended."""
        for program in (self._server, self._client):
            if program is not None:
                program.check()

    def cpu(self) -> float:
        """CPU seconds of both sides added."""
        return self.client.cpu() + self.server.cpu()


def start(
    commands: Commands, load: Load, directory: Path, stack: ExitStack, *, place: Place, target: str, get: str = ""
) -> Tunnel:
    """Start server and client; return once a stream through them works.

    Args:
        directory: made here; for logs, and the state of this tunnel alone.
        stack: ends the processes.
        target: `HOST:PORT` as the far end sees it.
        get: the path for an HTTP request, if the target speaks that; else it is one of ours.

    Raises:
        TunnelError: it does not work within 30 s.
    """
    state = directory / "state"
    state.mkdir(parents=True)
    target_host, _, target_port = target.rpartition(":")
    values: dict[str, str | int] = {
        "server_host": place.server_host,
        "server_port": unused_port(),
        "listen_port": unused_port(),
        "target_host": target_host,
        "target_port": target_port,
        "state": str(state),
    }

    def program(side: str, command: str, namespace: str | None) -> Program:
        words = namespaced(namespace, fill(command, values))
        what = f"{commands.name}'s {side}"
        return stack.enter_context(Program(what, words, directory / f"{side}.log", directory))

    server = program("server", commands.server, place.far)
    wait_accepting(server, int(values["server_port"]))
    if commands.prepare:
        values["prepared"] = prepare(fill(commands.prepare, values), directory)
    client = program("client", commands.client, place.near)
    tunnel = Tunnel(commands.name, f"127.0.0.1:{values['listen_port']}", place.near, client, server)
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            check = ["--get", get] if get else []
            load.run("ready", "--to", tunnel.address, "--seconds", 2, *check, namespace=place.near)
            return tunnel
        except LoadError as error:
            tunnel.check()
            if time.monotonic() > deadline:
                said = f"server: {server.tail()} client: {client.tail()}"
                raise TunnelError(f"{commands.name}: {error}; {said}") from error


def prepare(command: list[str], directory: Path) -> str:
    """Run a command to its end and return what it printed."""
    done = subprocess.run(
        command, env=environment(directory), cwd=directory, capture_output=True, text=True, timeout=PREPARE_SECONDS
    )
    if done.returncode:
        raise TunnelError(f"{shlex.join(command)}: {done.stderr.strip()[-TAIL_CHARACTERS:]}")
    return done.stdout.strip()


def wait_accepting(server: Program, port: int) -> None:
    """Wait until something in the server's namespace listens on the port. Connects to nothing: some servers mind."""
    deadline = time.monotonic() + READY_SECONDS
    while not listens(server.pid, port):
        server.check()
        if time.monotonic() > deadline:
            raise TunnelError(f"{server.what} does not listen on port {port}: {server.tail()}")
        time.sleep(0.02)


def listens(pid: int, port: int) -> bool:
    """Whether any socket listens on the TCP port in the network namespace of this process."""
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue  # no IPv6, or the process is just ending
        for line in lines:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                return True
    return False
