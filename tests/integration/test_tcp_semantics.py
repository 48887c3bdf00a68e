"""What TCP promises two programs, the tunnel between them promises too: half-close, reset, no byte lost at an end."""

from __future__ import annotations

import select
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from .sockets import (
    Echo,
    Listener,
    pattern,
    read_exactly,
    read_to_end,
    read_until_over,
    reset,
    send_until_blocked,
)
from .tunnel import Client

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Route
    from .tunnel import Server

MIB = 1 << 20


class TestBytes:
    """In order, once, whole: both ways."""

    def test_small_messages_both_ways(self, route: Route) -> None:
        app, target = route.pair()
        for index in range(200):
            app.sendall(b"question %d" % index)
            assert read_exactly(target, len(b"question %d" % index)) == b"question %d" % index
            target.sendall(b"answer %d" % index)
            assert read_exactly(app, len(b"answer %d" % index)) == b"answer %d" % index

    def test_the_target_may_speak_first(self, route: Route) -> None:
        app, target = route.pair()
        target.sendall(b"220 ready\r\n")
        assert read_exactly(app, 11) == b"220 ready\r\n"

    def test_bulk_both_ways_at_once(self, route: Route) -> None:
        app, target = route.pair()
        up, down = pattern(24 * MIB, 1), pattern(24 * MIB, 2)
        with ThreadPoolExecutor(4) as threads:
            sending = [threads.submit(app.sendall, up), threads.submit(target.sendall, down)]
            at_target = threads.submit(read_exactly, target, len(up))
            at_app = threads.submit(read_exactly, app, len(down))
            assert at_target.result() == up
            assert at_app.result() == down
            for sent in sending:
                sent.result()

    def test_a_client_that_writes_all_before_it_reads_does_not_deadlock(self, server: Server, tmp_path: Path) -> None:
        # More than a first window, less than the sockets' own buffers hold: without a tunnel it never stalls.
        data = pattern(MIB)
        with Echo() as echo, Client(tmp_path, server.invitation.url, [echo.address]) as client:
            for connect in (echo.connect, lambda: client.connect(echo.address)):
                with connect() as app:
                    app.sendall(data)
                    assert read_exactly(app, len(data)) == data

    def test_early_data_waits_for_a_target_that_accepts_late(self, route: Route) -> None:
        app = route.connect()
        data = pattern(200_000)
        app.sendall(data)
        app.shutdown(socket.SHUT_WR)
        target = route.accept()
        assert read_to_end(target) == data

    def test_early_data_waits_while_the_target_is_dialled(self, server: Server, tmp_path: Path) -> None:
        # A full accept queue: Linux drops the tunnel's SYN until there is room, and the dial hangs meanwhile.
        data = pattern(200_000)
        with (
            Listener(backlog=0) as listener,
            Client(tmp_path, server.invitation.url, [listener.address]) as client,
            socket.create_connection(("127.0.0.1", listener.port)),
            client.connect(listener.address) as app,
        ):
            app.sendall(data)
            app.shutdown(socket.SHUT_WR)
            listener.accept().close()  # the one that filled the queue
            with listener.accept() as target:
                assert read_to_end(target) == data


class TestHalfClose:
    """RFC 9293 §3.6: a side that has closed may still receive until the other has closed too."""

    def test_by_the_application(self, route: Route) -> None:
        app, target = route.pair()
        app.sendall(b"request")
        app.shutdown(socket.SHUT_WR)
        assert read_to_end(target) == b"request"
        target.sendall(b"the reply to " + b"request")
        target.close()
        assert read_to_end(app) == b"the reply to request"

    def test_by_the_target_while_the_application_still_sends(self, route: Route) -> None:
        app, target = route.pair()
        target.sendall(b"last words")
        target.shutdown(socket.SHUT_WR)
        assert read_to_end(app) == b"last words"
        data = pattern(4 * MIB)
        with ThreadPoolExecutor(1) as threads:
            received = threads.submit(read_to_end, target)
            app.sendall(data)
            app.shutdown(socket.SHUT_WR)
            assert received.result() == data

    def test_without_a_byte_either_way(self, route: Route) -> None:
        app, target = route.pair()
        app.shutdown(socket.SHUT_WR)
        assert read_to_end(target) == b""
        target.close()
        assert read_to_end(app) == b""

    def test_a_reply_of_ten_megabytes_arrives_whole_before_the_end(self, route: Route) -> None:
        app, target = route.pair()
        app.sendall(b"GET everything")
        app.shutdown(socket.SHUT_WR)
        assert read_to_end(target) == b"GET everything"
        reply = pattern(10_000_000)
        with ThreadPoolExecutor(1) as threads:
            sent = threads.submit(_send_and_close, target, reply)
            assert read_to_end(app) == reply
            sent.result()

    def test_a_request_of_ten_megabytes_arrives_whole_before_the_end(self, route: Route) -> None:
        app, target = route.pair()
        request = pattern(10_000_000)
        with ThreadPoolExecutor(1) as threads:
            sent = threads.submit(_send_and_close, app, request)
            assert read_to_end(target) == request
            sent.result()

    def test_close_by_both_at_once(self, route: Route) -> None:
        for _ in range(20):
            app, target = route.pair()
            app.sendall(b"a")
            target.sendall(b"b")
            app.shutdown(socket.SHUT_WR)
            target.shutdown(socket.SHUT_WR)
            assert read_to_end(app) == b"b"
            assert read_to_end(target) == b"a"


class TestReset:
    """RFC 9293 §3.10.7.4: a reset here is a reset there, and not a clean end."""

    def test_by_the_application(self, route: Route) -> None:
        app, target = route.pair()
        reset(app)
        with pytest.raises(ConnectionResetError):
            target.recv(1)

    def test_by_the_target(self, route: Route) -> None:
        app, target = route.pair()
        reset(target)
        with pytest.raises(ConnectionResetError):
            app.recv(1)

    def test_by_the_application_after_data_both_ways(self, route: Route) -> None:
        app, target = route.pair()
        app.sendall(b"ping")
        assert read_exactly(target, 4) == b"ping"
        target.sendall(b"pong")
        assert read_exactly(app, 4) == b"pong"
        reset(app)
        with pytest.raises(ConnectionResetError):
            read_to_end(target)

    def test_by_the_target_after_the_application_half_closed(self, route: Route) -> None:
        app, target = route.pair()
        app.sendall(b"request")
        app.shutdown(socket.SHUT_WR)
        assert read_to_end(target) == b"request"
        reset(target)
        with pytest.raises(ConnectionResetError):
            read_to_end(app)

    def test_by_the_application_after_the_target_half_closed(self, route: Route) -> None:
        app, target = route.pair()
        target.shutdown(socket.SHUT_WR)
        assert read_to_end(app) == b""
        reset(app)
        with pytest.raises(ConnectionResetError):
            target.recv(1)

    @pytest.mark.parametrize("sender", ["application", "target"])
    def test_of_a_sender_that_is_blocked(self, route: Route, sender: str) -> None:
        app, target = route.pair()
        blocked, other = (app, target) if sender == "application" else (target, app)
        send_until_blocked(blocked, pattern(MIB), at_most=256 * MIB)
        reset(other)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while True:
                blocked.sendall(bytes(MIB))

    @pytest.mark.parametrize("sender", ["application", "target"])
    def test_by_a_sender_that_is_blocked(self, route: Route, sender: str) -> None:
        # The tunnel reads no more from that socket then: the reset must be noticed all the same, and passed on to one
        # who does not read either.
        app, target = route.pair()
        blocked, other = (app, target) if sender == "application" else (target, app)
        send_until_blocked(blocked, pattern(MIB), at_most=256 * MIB)
        reset(blocked)
        over = select.poll()
        over.register(other, 0)
        assert over.poll(30_000), "the other side was not told"
        with pytest.raises(ConnectionResetError):
            read_to_end(other)

    def test_others_go_on(self, route: Route) -> None:
        app, target = route.pair()
        other_app, other_target = route.pair()
        reset(app)
        with pytest.raises(ConnectionResetError):
            target.recv(1)
        other_app.sendall(b"still here")
        assert read_exactly(other_target, 10) == b"still here"
        other_target.close()
        assert read_to_end(other_app) == b""


class TestReplyBeforeTheEnd:
    """A target that has answered may close without reading the rest; what it answered must not be lost in the reset.

    The replies are smaller than a first TCP window: what is still in the target's send queue dies with any TCP.
    """

    REPLY = pattern(30_000)

    def test_with_unread_input(self, route: Route) -> None:
        for _ in range(20):
            app, target = route.pair()
            app.sendall(bytes(100_000))
            read_exactly(target, 10)
            assert target.recv(1, socket.MSG_PEEK), "there must be input that stays unread"
            target.sendall(self.REPLY)
            target.close()  # with unread input: this sends RST
            assert read_until_over(app) == self.REPLY

    def test_while_the_application_still_sends(self, route: Route) -> None:
        for _ in range(5):
            app, target = route.pair()
            with ThreadPoolExecutor(1) as threads:
                sending = threads.submit(_send_for_ever, app)
                read_exactly(target, 10)
                target.sendall(self.REPLY)
                target.close()
                assert read_until_over(app) == self.REPLY
                sending.result()


def _send_and_close(connection: socket.socket, data: bytes) -> None:
    connection.sendall(data)
    connection.close()


def _send_for_ever(connection: socket.socket) -> None:
    """Until the other side has reset, as an upload that was refused half-way."""
    try:
        while True:
            connection.sendall(bytes(65536))
    except (ConnectionResetError, BrokenPipeError):
        return
