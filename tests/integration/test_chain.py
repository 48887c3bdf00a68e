"""Ten tunnels, each through the one before it, compared by `cmp` at the end."""

from __future__ import annotations

import subprocess
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from .process import wait_until
from .programs import finish, make_file, require
from .sockets import Echo, unused_port
from .tunnel import Client, Server

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.programs, pytest.mark.timeout(120)]

TUNNELS = 10
SIZE = 8 << 20


def test_ten_tunnels_through_each_other(tmp_path: Path) -> None:
    """Every byte is tunnelled ten times, nine times inside other tunnels' TLS."""
    sent, back = tmp_path / "sent", tmp_path / "back"
    make_file(sent, SIZE)
    ports = [unused_port() for _ in range(TUNNELS)]
    with ExitStack() as stack:
        echo = stack.enter_context(Echo())
        # Two in turn: by default no server lets itself be dialled.
        servers = [stack.enter_context(_server(tmp_path / name)) for name in ("odd", "even")]
        for number, port in enumerate(ports):
            url = servers[number % 2].invitation.changed(port=ports[number - 1] if number else None)
            target = echo.address if number == TUNNELS - 1 else f"127.0.0.1:{servers[(number + 1) % 2].port}"
            forward = ["-L", f"{port}:{target}", "--idle-links", "1"]
            stack.enter_context(Client(tmp_path, url, [], arguments=forward, name=f"client-{number}"))
        last = ports[-1]

        def copy() -> bytes:
            """An echo of one line, through all ten."""
            try:
                return finish(require("nc"), "-N", "127.0.0.1", str(last), data=b"ready\n").stdout
            except AssertionError:
                return b""

        wait_until(lambda: copy() == b"ready\n", "ten tunnels", within=60)
        with sent.open("rb") as source, back.open("wb") as sink:
            nc = subprocess.Popen([require("nc"), "-N", "127.0.0.1", str(last)], stdin=source, stdout=sink)
            timer = threading.Timer(60, nc.kill)
            timer.start()
            assert nc.wait() == 0
            timer.cancel()
        finish(require("cmp"), sent, back)


def _server(directory: Path) -> Server:
    directory.mkdir()
    return Server(directory, plain=False)
