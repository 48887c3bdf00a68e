"""`wstunnel.1` as somebody else speaks it: a client in Go that was written from docs/reference/protocol.md alone."""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .programs import finish, require
from .sockets import Echo, Listener, Refusing, read_to_end
from .tunnel import Server

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.programs, pytest.mark.timeout(300)]

CLIENTS = Path(__file__).parent / "clients"
SIZE = 1 << 20


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("go")
    shutil.copytree(CLIENTS, tree / "clients")
    finish(require("go"), "build", "-o", tree / "tunnel", "./tunnel", cwd=tree / "clients", within=280)
    return tree / "tunnel"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server"), plain=True, arguments=["-v"]) as running:
        yield running
        reasons = re.findall(r"link lost .*reason=(.*)", running.stderr)
        assert set(reasons) == {'"closed by the peer: 1000"'}


def run(program: Path, server: Server, *targets: str, size: int = SIZE) -> list[str]:
    invitation = server.invitation
    url = f"{invitation.scheme}://{invitation.host}:{invitation.port}{invitation.path}"
    done = finish(program, url, invitation.token, str(size), *targets, within=60)
    return done.stdout.decode().splitlines()


def test_one_mebibyte_and_the_end_both_ways(program: Path, server: Server) -> None:
    with Echo() as echo:
        assert run(program, server, f"tcp:{echo.address}") == ["echoed"]
        server.wait_for_line(rf"stream ended .*target=tcp:{echo.address} sent={SIZE} received={SIZE} .*reason=finished")


def test_an_answer_to_the_end(program: Path, server: Server) -> None:
    """The target says its 5 MB only when it has seen the end: half-close."""
    got: list[bytes] = []

    def answer(listener: Listener) -> None:
        with listener.accept() as target:
            got.append(read_to_end(target))
            target.sendall(bytes(5_000_000))

    with Listener() as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        assert run(program, server, listener.address) == ["answered 5000000"]
        thread.join()
    assert len(got[0]) == SIZE


def test_refusals_have_their_codes_and_the_link_is_used_again(program: Path, server: Server) -> None:
    with Echo() as echo, Refusing.bind() as refusing:
        targets = {
            refusing.address: "reset refused",
            echo.address: "echoed",
            "name.invalid:1": "reset name-not-found",
            "169.254.169.254:80": "reset forbidden",
            "not a target": "reset forbidden",
            f"abandon:{echo.address}": "abandoned",
            f"tcp:{echo.address}": "echoed",
        }
        assert run(program, server, *targets) == list(targets.values())


def test_nothing_at_all(program: Path, server: Server) -> None:
    with Echo() as echo:
        assert run(program, server, echo.address, size=0) == ["echoed"]
