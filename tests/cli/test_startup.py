"""What the program does not do before it is of use: modules that it does not import, and a collector that rests.

Which modules, not how long: a clock would say more about the machine. The figures are in the comments of the source.
"""

from __future__ import annotations

import gc
import json
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.cli.conftest import Program, wait_for
from tests.ports import unused_port
from wstunnel import limits
from wstunnel.auth import LoginUrl, Token, Users
from wstunnel.cli import running
from wstunnel.state import Announcement, read_announcement
from wstunnel.tls import ensure_certificate

# Writes to the file that is its first argument which modules there were when the command was over.
WATCHED = """
import atexit, json, sys
file = sys.argv.pop(1)
atexit.register(lambda: json.dump(sorted(sys.modules), open(file, "w")))
from wstunnel.cli import main
main(sys.argv[1:])
"""
OF_EVERY_COMMAND = {"cli", "cli.group", "cli.reports", "errors"}  # of the package
ONLY_FOR_ROLES = {"trio", "ssl", "cryptography", "msgspec", "h11", "websockets", "logging", "socket", "subprocess"}
NEVER = {
    *("asyncio", "concurrent.futures", "http.client", "multiprocessing", "unittest", "urllib.request", "xml"),
    *("websockets.asyncio", "websockets.client", "websockets.sync"),
    # extras
    *("rich", "prometheus_client", "coredis", "python_socks", "truststore", "dns", "h2"),
}

Watch = Callable[..., tuple["subprocess.Popen[str]", Callable[..., set[str]]]]


@pytest.fixture
def watch(program: Program, tmp_path: Path) -> Watch:
    """Start `wstunnel ARGUMENTS…`; gives the process, and a function that waits for its end and says what it imported.

    The function sends SIGTERM first when it is called with it.
    """

    def start(*arguments: str) -> tuple[subprocess.Popen[str], Callable[..., set[str]]]:
        file = tmp_path / f"modules-{arguments[0].strip('-')}"
        process = program("-c", WATCHED, str(file), *arguments)

        def modules(number: int | None = None) -> set[str]:
            if number is not None:
                process.send_signal(number)
            _, stderr = process.communicate(timeout=limits.STOP_SECONDS + 20)
            assert process.returncode in (0, 128 + (number or 0)), stderr
            return set(json.loads(file.read_text()))

        return process, modules

    return start


def own(modules: set[str]) -> set[str]:
    return {name.removeprefix("wstunnel.") for name in modules if name.startswith("wstunnel.")}


class TestWithoutARole:
    def test_version(self, watch: Watch) -> None:
        _, modules = watch("--version")
        found = modules()
        assert "click" in found
        assert not found & (ONLY_FOR_ROLES | NEVER | {"traceback", "ipaddress", "pathlib"})
        assert own(found) == OF_EVERY_COMMAND

    @pytest.mark.parametrize("command", ["client", "server"])
    def test_help(self, watch: Watch, command: str) -> None:
        _, modules = watch(command, "--help")
        found = modules()
        assert not found & (ONLY_FOR_ROLES | NEVER | {"traceback"})
        shared = {"cli.reach"} if command == "client" else set()
        assert own(found) == OF_EVERY_COMMAND | {f"cli.{command}", "cli.options", "limits"} | shared


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a target that echoes what one connection sends first."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            try:
                connection, _ = listener.accept()
            except OSError:  # the test failed before it came
                return
            with connection:
                connection.sendall(connection.recv(100))

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


class TestRoles:
    """The whole lives of a server that has its certificate and of a client that has a pin, a stream included."""

    @pytest.fixture
    def certified(self, tmp_path: Path) -> Path:
        directory = tmp_path / "state"
        directory.mkdir()
        ensure_certificate(directory, names=())
        return directory

    def start_server(self, watch: Watch, directory: Path, *flags: str) -> tuple[Announcement, Callable[..., set[str]]]:
        process, modules = watch(
            "server", "--bind", "127.0.0.1", "--port", "0", "--state-dir", str(directory), "--allow", "*:*", *flags
        )
        announcement: Announcement = wait_for(lambda: read_announcement(directory), process)
        return announcement, modules

    def test_cryptography_is_for_making_a_certificate_alone(self, watch: Watch, certified: Path, echo: int) -> None:
        announcement, server_modules = self.start_server(watch, certified)
        assert announcement.pins
        token = Token.new()
        Users(certified).add_token("default", token)
        url = LoginUrl("wss", "127.0.0.1", announcement.port, "/", token, announcement.pins)
        port = unused_port()
        client, client_modules = watch("client", url.reveal(), "-L", f"{port}:127.0.0.1:{echo}")

        def connected() -> socket.socket | None:
            try:
                return socket.create_connection(("127.0.0.1", port), timeout=20)
            except ConnectionRefusedError:
                return None

        with wait_for(connected, client) as application:
            application.sendall(b"through")
            assert application.recv(100) == b"through"
        for found in (client_modules(signal.SIGTERM), server_modules(signal.SIGTERM)):
            assert {"trio", "ssl", "wstunnel.tls"} <= found
            assert not found & (NEVER | {"cryptography"})

    def test_a_server_loads_nothing_of_the_client(self, watch: Watch, certified: Path) -> None:
        _, modules = self.start_server(watch, certified)
        assert not own(modules(signal.SIGTERM)) & {
            *(
                "client",
                "client_session",
                "dialler",
                "endpoints.stdio",
                "failover",
                "profiles",
                "recovery",
                "upstream",
                "cli.client",
                "cli.demo",
            )
        }

    def test_the_first_start_does_make_one(self, watch: Watch, tmp_path: Path) -> None:
        (tmp_path / "state").mkdir()
        _, modules = self.start_server(watch, tmp_path / "state")
        assert "cryptography" in modules(signal.SIGTERM)  # else the others would see nothing


class TestCollector:
    def test_it_is_off_while_modules_load(self, program: Program) -> None:
        code = "import gc; from wstunnel.cli import main; gc.callbacks.append(print); main(['--version'])"
        stdout, _ = program("-c", code).communicate(timeout=60)
        assert stdout == "wstunnel 0.1.0\n"

    def test_a_role_runs_with_it_on_and_without_what_was_there_before(self) -> None:
        seen: list[Any] = []

        async def role(*, shutdown: trio.Event, task_status: trio.TaskStatus[Any]) -> None:
            seen.extend([gc.isenabled(), gc.get_freeze_count(), gc.get_threshold()])

        before = gc.get_threshold()
        gc.disable()
        try:
            running.run(role, {signal.SIGUSR1: 1})
        finally:
            gc.enable()
        enabled, frozen, threshold = seen
        assert enabled
        assert frozen > 10_000
        assert threshold == running.GARBAGE_THRESHOLDS
        assert (gc.get_freeze_count(), gc.get_threshold()) == (0, before)
