"""Plain endpoints, with WebSocket clients that others wrote: Go, Node, Python, websockify."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from .plain import Endpoints, endpoints
from .programs import finish, install, require
from .sockets import read_exactly, read_to_end, reset

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.programs, pytest.mark.timeout(300)]

CLIENTS = Path(__file__).parent / "clients"
NODE_WS = "ws@8.23.0"
WEBSOCKIFY = "websockify==0.13.0"
"""Not Debian's 0.10: its client side cannot mask under Python 3. Without what its tokens and numpy need."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    # x/net's client always says where it comes from, as a browser does.
    with endpoints(tmp_path_factory.mktemp("server"), "--allow-origin", "http://localhost") as running:
        yield running
        assert running.token not in running.server.stderr


@dataclass
class Clients:
    """Makes the command line of each client, once."""

    directory: Path

    def __post_init__(self) -> None:
        self._made: dict[str, list[str]] = {}

    def command(self, name: str) -> list[str]:
        if name not in self._made:
            self._made[name] = getattr(self, f"_{name}")()
        return self._made[name]

    def _go(self, name: str) -> list[str]:
        go = require("go")
        tree = self.directory / "go"
        if not tree.exists():
            shutil.copytree(CLIENTS, tree)
        binary = self.directory / name
        install(go, "build", "-o", binary, f"./{name}", cwd=tree, within=280)
        return [str(binary)]

    def _xnet(self) -> list[str]:
        return self._go("xnet")

    def _coder(self) -> list[str]:
        return self._go("coder")

    def _node(self) -> list[str]:
        npm, node = require("npm"), require("node")
        tree = self.directory / "node"
        tree.mkdir()
        install(npm, "install", "--no-audit", "--no-fund", "--no-save", "--prefix", tree, NODE_WS, cwd=tree)
        shutil.copy(CLIENTS / "node_ws.js", tree)
        return [node, str(tree / "node_ws.js")]

    def _websockify(self) -> list[str]:
        tree = self.directory / "websockify"
        install(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tree, WEBSOCKIFY)
        shutil.copy(CLIENTS / "websockify_client.py", tree)
        return [sys.executable, str(tree / "websockify_client.py")]


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Clients:
    return Clients(tmp_path_factory.mktemp("clients"))


PROGRAMS = pytest.mark.parametrize("program", ["xnet", "coder", "node", "websockify"])


@PROGRAMS
def test_bytes_both_ways(clients: Clients, served: Endpoints, program: str) -> None:
    command = clients.command(program)
    done = finish(*command, "echo", served.url("/echo"), served.token, "5000000", within=60)
    assert done.stdout.decode().strip() == "true"


@PROGRAMS
def test_what_the_target_says_unasked_and_its_end(clients: Clients, served: Endpoints, program: str) -> None:
    command = [*clients.command(program), "read", served.url("/listener"), served.token]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        with served.listener.accept() as target:
            target.sendall(b"unasked, ")
            target.sendall(b"x" * 100_000)
            target.sendall(b" and goodbye")
        out, err = running.communicate(timeout=30)
    assert running.returncode == 0, err
    assert out.decode().strip() == f"unasked, {'x' * 100_000} and goodbye"


@PROGRAMS
@pytest.mark.parametrize(("path", "valid"), [("/echo", False), ("/refusing", True)])
def test_refusals(clients: Clients, served: Endpoints, program: str, path: str, valid: bool) -> None:
    before = len(served.server.stderr)
    token = served.token if valid else "x" * 43
    finish(*clients.command(program), "echo", served.url(path), token, "10", expect=1, within=60)
    served.server.wait_for_line(f"status={502 if valid else 401}", after=before)


class TestWebsockets:
    """Python's `websockets`, which tells close codes and statuses."""

    def test_statuses(self, served: Endpoints) -> None:
        token = {"Authorization": f"Bearer {served.token}"}
        for path, headers, status in (
            ("/echo", {}, 401),
            ("/echo", {"Authorization": "Bearer " + "x" * 43}, 401),
            ("/echo", token | {"Origin": "http://localhost:81"}, 403),
            ("/refusing", token, 502),
            ("/echo/", token, 404),
        ):
            with (
                pytest.raises(InvalidStatus) as refused,
                connect(served.url(path), additional_headers=headers, proxy=None),
            ):
                pass
            assert refused.value.response.status_code == status, path

    def test_ends(self, served: Endpoints) -> None:
        headers = {"Authorization": f"Bearer {served.token}"}
        with connect(served.url("/listener"), additional_headers=headers, proxy=None) as client:
            assert client.subprotocol is None
            target = served.listener.accept()
            client.send([b"a message ", b"in pieces"])
            assert read_exactly(target, 19) == b"a message in pieces"
            reset(target)
            with pytest.raises(ConnectionClosed) as closed:
                client.recv(30)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1011
        with connect(served.url("/listener"), additional_headers=headers, proxy=None) as client:
            target = served.listener.accept()
            data = os.urandom(3_000_000)
            client.send(data)
            client.close()
            assert read_to_end(target) == data
            target.close()

    def test_a_client_that_is_killed(self, served: Endpoints) -> None:
        script = (
            "import sys, time\n"
            "from websockets.sync.client import connect\n"
            "with connect(sys.argv[1], subprotocols=['binary', 'bearer.' + sys.argv[2]], proxy=None) as client:\n"
            "    client.send(b'alive')\n"
            "    time.sleep(60)\n"
        )
        command = [sys.executable, "-c", script, served.url("/listener"), served.token]
        with subprocess.Popen(command) as running, served.listener.accept() as target:
            assert read_exactly(target, 5) == b"alive"
            running.kill()
            with pytest.raises(ConnectionResetError):
                target.recv(1)

    def test_the_server_stops(self, tmp_path: Path) -> None:
        with endpoints(tmp_path, "--endpoint-auth", "none", "--endpoint-text") as running:
            with connect(running.url("/echo"), proxy=None) as client:
                client.send("text")
                assert client.recv(30) == b"text"
                running.server.send(running.server._stop_signal)
                with pytest.raises(ConnectionClosed) as closed:
                    client.recv(30)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1001
            assert running.server.wait() == 0
