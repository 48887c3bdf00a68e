"""Many streams, and one that nobody reads: what they may cost the others, and what they may leave behind."""

from __future__ import annotations

import hashlib
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from .process import wait_until
from .sockets import Echo, chunks, pattern, read_exactly, read_to_end, send_until_blocked
from .tunnel import Client, Server, settle

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Route

MIB = 1 << 20
WINDOW = 16 * MIB
SLACK = 12 * MIB
"""What the allocator and the interpreter may take besides: a window of bytes objects is never packed perfectly."""
SPARE = 4
"""Warm links come and go a few at a time. What is lost with one stream in 500 is more."""


def test_300_connections_at_once(server: Server, tmp_path: Path) -> None:
    size = 65536
    with Echo() as echo, Client(tmp_path, server.invitation.url, [echo.address]) as client, ExitStack() as stack:
        port = client.port(echo.address)
        apps = []
        for _ in range(300):
            app = stack.enter_context(socket.socket())
            app.setblocking(False)
            assert app.connect_ex(("127.0.0.1", port)) in (0, 115)  # EINPROGRESS
            apps.append(app)
        for app in apps:
            app.settimeout(30)
        with ThreadPoolExecutor(8) as threads:
            sent = [threads.submit(app.sendall, pattern(size, index)) for index, app in enumerate(apps)]
            for index, app in enumerate(apps):
                assert read_exactly(app, size) == pattern(size, index)
            for one in sent:
                one.result()
        for app in apps:
            app.shutdown(socket.SHUT_WR)
        for app in apps:
            assert read_to_end(app) == b""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("plain", [False, True], ids=["tls", "plain"])
def test_2000_connections_in_a_row_leave_nothing_behind(tmp_path: Path, plain: bool) -> None:
    """Each descriptor is a link, a stream's socket or a listener; all that a stream took must be given back."""

    def open_and_close(index: int) -> None:
        with client.connect(echo.address) as app:
            app.sendall(struct.pack("!I", index))
            assert read_exactly(app, 4) == struct.pack("!I", index)
            if index % 3 == 0:
                app.shutdown(socket.SHUT_WR)
                assert read_to_end(app) == b""
            elif index % 3 == 1:
                app.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset

    with (
        Echo() as echo,
        Server(tmp_path, plain=plain) as server,
        Client(tmp_path, server.invitation.url, [echo.address]) as client,
    ):
        for index in range(300):  # so many in so short a time that the client keeps all the links that it may
            open_and_close(index)
        settled = settle(server, client)
        for index in range(2000):
            open_and_close(index)
        left = server.descriptors(), client.descriptors()
        # Links beyond the warm ones are closed after a minute, so give it more than that.
        wait_until(
            lambda: server.descriptors() <= settled[0] + SPARE and client.descriptors() <= settled[1] + SPARE,
            f"the descriptors of server and client to go back from {left} to {settled}",
            within=120,
        )


@pytest.mark.parametrize("reader", ["application", "target"])
def test_a_slow_reader_holds_no_more_than_its_window_and_slows_nobody(route: Route, reader: str) -> None:
    app, target = route.pair()
    slow, sender = (app, target) if reader == "application" else (target, app)
    data = pattern(MIB)

    # A fast start, so that the window grows as far as it may and all that is used once is in use.
    with ThreadPoolExecutor(1) as threads:
        sent = threads.submit(sender.sendall, data * 96)
        for _ in range(96):
            assert read_exactly(slow, MIB) == data
        sent.result()
    other_app, other_target = route.pair()
    _echo(other_app, other_target, 100)
    before = route.server.resident_bytes(), route.client.resident_bytes()

    pending = send_until_blocked(sender, data, at_most=512 * MIB)
    after = route.server.resident_bytes(), route.client.resident_bytes()
    assert after[0] - before[0] < WINDOW + SLACK
    assert after[1] - before[1] < WINDOW + SLACK

    _echo(other_app, other_target, 500)
    for _ in range(20):
        new_app, new_target = route.pair()
        _echo(new_app, new_target, 1)

    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(_hash_to_end, slow)
        sender.shutdown(socket.SHUT_WR)
        whole, rest = divmod(pending, MIB)
        assert reading.result() == hashlib.sha256(data * whole + data[:rest]).hexdigest()


def _hash_to_end(connection: socket.socket) -> str:
    digest = hashlib.sha256()
    for data in chunks(connection):
        digest.update(data)
    return digest.hexdigest()


def _echo(app: socket.socket, target: socket.socket, times: int) -> None:
    for index in range(times):
        message = struct.pack("!I", index) * 16
        app.sendall(message)
        assert read_exactly(target, 64) == message
        target.sendall(message)
        assert read_exactly(app, 64) == message
