"""What surrounds a measure: a target on loopback, nginx, or two network namespaces with a slow path between them."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.load import Load, LoadError, Running
from tests.benchmarks.measures import Stage
from tests.benchmarks.tunnels import DIRECT, LOOPBACK, Commands, Place, Tunnel, TunnelError, start
from tests.integration.programs import nginx

ROUND_TRIP_MS = 80
PATH_MBIT = 1000
PATH_BUFFER_KB = 4096
"""About 33 ms of the path's rate: less than its round trip, more than any tunnel's bursts."""
NEAR_ADDRESS, FAR_ADDRESS = "10.77.0.1", "10.77.0.2"
DEVICE = "wide"
QUEUE_PACKETS = 10000
"""Of a TUN device: with its 500 it drops packets before the path has seen them."""
PAGE_BYTES = 1000


class StageError(Exception):
    """Nothing of this stage can be measured here; the message says why."""


@dataclass(frozen=True)
class Surroundings:
    """Where tunnels run, and what they lead to.

    Args:
        target: `HOST:PORT` as the far end sees it; empty if nothing is there.
        direct: `HOST:PORT` as the near end reaches it without a tunnel.
        get: the path to ask for, if the target is nginx.
        path: the slow path, if there is one.
    """

    place: Place = LOOPBACK
    target: str = ""
    direct: str = ""
    get: str = ""
    path: Running | None = None


def surround(stage: Stage, load: Load, directory: Path, stack: ExitStack) -> Surroundings:
    """Set up what a stage needs; it ends with `stack`. `StageError` if it cannot be had."""
    directory.mkdir()
    try:
        if stage is Stage.START:
            return Surroundings()
        if stage is Stage.HTTP:
            return _site(directory, stack)
        if stage is Stage.WIDE:
            return _wide(load, stack)
        port = stack.enter_context(load.start("target")).first["port"]
        return Surroundings(target=f"127.0.0.1:{port}", direct=f"127.0.0.1:{port}")
    except (LoadError, OSError, AssertionError) as error:
        raise StageError(str(error)) from error


def _site(directory: Path, stack: ExitStack) -> Surroundings:
    search = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    for program in ("nginx", "curl"):
        if shutil.which(program, path=search) is None:
            raise StageError(f"{program} is not installed")
    port = stack.enter_context(_quietly(nginx(directory / "nginx")))
    (directory / "nginx" / "files" / "page").write_bytes(os.urandom(PAGE_BYTES))
    return Surroundings(target=f"127.0.0.1:{port}", direct=f"127.0.0.1:{port}", get="/page")


@contextlib.contextmanager
def _quietly(program: contextlib.AbstractContextManager[int]) -> Iterator[int]:
    """Without the last words that it prints for a test that failed."""
    words = io.StringIO()
    with contextlib.redirect_stdout(words):
        port = program.__enter__()
    try:
        yield port
    finally:
        with contextlib.redirect_stdout(words):
            program.__exit__(None, None, None)


def _wide(load: Load, stack: ExitStack) -> Surroundings:
    if os.geteuid() != 0:
        raise StageError("network namespaces need root")
    if shutil.which("ip") is None or not Path("/dev/net/tun").exists():
        raise StageError("there is no ip(8) or no /dev/net/tun")
    near, far = (f"wstunnel-benchmark-{os.getpid()}-{side}" for side in ("near", "far"))
    for name in (near, far):
        _ip("netns", "add", name)
        stack.callback(_ip, "netns", "del", name)
    path = stack.enter_context(
        load.start(
            *("path", "--name-a", near, "--name-b", far, "--delay-ms", ROUND_TRIP_MS / 2),
            *("--mbit", PATH_MBIT, "--buffer-kb", PATH_BUFFER_KB),
        )
    )
    for name, address in ((near, NEAR_ADDRESS), (far, FAR_ADDRESS)):
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
        _ip("-n", name, "link", "set", DEVICE, "up", "mtu", "1500", "txqueuelen", str(QUEUE_PACKETS))
        _ip("-n", name, "link", "set", "lo", "up")
    target = stack.enter_context(load.start("target", "--bind", "0.0.0.0", namespace=far))
    port = target.first["port"]
    return Surroundings(
        Place(near, far, FAR_ADDRESS), target=f"127.0.0.1:{port}", direct=f"{FAR_ADDRESS}:{port}", path=path
    )


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise StageError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Tunnels:
    """The tunnels of a stage, started when they are first asked for. Leaving ends them."""

    def __init__(
        self, commands: Mapping[str, Commands], load: Load, surroundings: Surroundings, directory: Path
    ) -> None:
        self._commands = commands
        self._load = load
        self._surroundings = surroundings
        self._directory = directory
        self._started = 0
        self._standing: dict[str, tuple[Tunnel, ExitStack]] = {}

    def __enter__(self) -> Tunnels:
        return self

    def __exit__(self, *_: object) -> None:
        for _tunnel, stack in self._standing.values():
            stack.close()

    def standing(self, name: str) -> Tunnel:
        """The one that stands for all rounds; one that ended, or failed a measure, is started anew."""
        if name in self._standing:
            return self._standing[name][0]
        stack = ExitStack()
        tunnel = self.fresh(name, stack)
        self._standing[name] = tunnel, stack
        return tunnel

    def forget(self, name: str) -> None:
        """End the standing tunnel: what it failed may have left it in any state."""
        if name in self._standing:
            self._standing.pop(name)[1].close()

    def fresh(self, name: str, stack: ExitStack) -> Tunnel:
        """One that was never used, and ends with `stack`. `TunnelError` if it does not start."""
        around = self._surroundings
        if name == DIRECT:
            return Tunnel(DIRECT, around.direct, around.place.near)
        self._started += 1
        try:
            return start(
                self._commands[name],
                self._load,
                self._directory / f"{name}-{self._started}",
                stack,
                place=around.place,
                target=around.target,
                get=around.get,
            )
        except (TunnelError, LoadError, OSError, subprocess.SubprocessError):
            stack.close()
            raise
