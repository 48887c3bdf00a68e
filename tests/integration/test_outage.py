"""One side dies or cannot be reached for long: who is reset, when, and that nothing is left; and a very slow path."""

from __future__ import annotations

import re
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.chaos.relay import Relay

from .process import wait_until
from .sockets import Listener, pattern, read_exactly, unused_port
from .tunnel import Client, Server, settle

if TYPE_CHECKING:
    import socket
    from pathlib import Path

pytestmark = pytest.mark.timeout(120)

STREAMS = 5
WINDOW_SECONDS = 3.0
"""Given as the resume window where a test waits for its end."""
LATE_SECONDS = 20.0
"""After the end of the window: for the sweep, the reset itself and a busy machine. Unless told, it is 5 minutes."""
AT_ONCE_SECONDS = 10.0
"""For what would otherwise come at the end of those 5 minutes."""
SLOW_RATE = 12_500
"""Bytes a second: 100 kbit/s."""
SLOW_SECONDS = 30.0


class _Streams:
    """Some open streams, each with a little said both ways. Records when each end of them is reset."""

    def __init__(self, client: Client, listener: Listener, sockets: ExitStack) -> None:
        self.apps: list[socket.socket] = []
        self.targets: list[socket.socket] = []
        for _ in range(STREAMS):
            app = sockets.enter_context(client.connect(listener.address))
            target = sockets.enter_context(listener.accept())
            for one, other in ((app, target), (target, app)):
                one.sendall(b"hello")
                assert read_exactly(other, 5) == b"hello"
            self.apps.append(app)
            self.targets.append(target)


class _Resets:
    """Waits in threads until every one of these sockets is reset."""

    def __init__(self, sockets: list[socket.socket], *, within: float) -> None:
        self._outcomes: list[tuple[float, BaseException | None]] = []
        self._expected = len(sockets)
        self._within = within
        for sock in sockets:
            sock.settimeout(within)
            threading.Thread(target=self._watch, args=(sock,)).start()

    def _watch(self, sock: socket.socket) -> None:
        error = None
        try:
            sock.recv(1)
        except OSError as caught:
            error = caught
        self._outcomes.append((time.monotonic(), error))

    @property
    def any(self) -> bool:
        """Whether one has ended by now."""
        return bool(self._outcomes)

    def times(self) -> list[float]:
        """When each was reset, on `time.monotonic`; waits for all of them. An end in any other way is a failure."""
        wait_until(lambda: len(self._outcomes) == self._expected, "all ends", within=self._within + 5)
        for _, error in self._outcomes:
            assert isinstance(error, ConnectionResetError), f"ended with {error!r}, not with a reset"
        return sorted(when for when, _ in self._outcomes)


def _time_of_line(process: Client, pattern: str, after: int) -> float:
    """When the line came, to within the poll's 20 ms."""
    process.wait_for_line(pattern, within=60, after=after)
    return time.monotonic()


class TestServerKilled:
    def test_restarted_resets_at_once(self, tmp_path: Path) -> None:
        with Listener() as listener, ExitStack() as stack:
            crashing = stack.enter_context(Server(tmp_path, plain=False, port=unused_port(), name="crashing"))
            client = stack.enter_context(Client(tmp_path, crashing.invitation.url, [listener.address]))
            _, before = settle(crashing, client)
            streams = _Streams(client, listener, stack)
            resets = _Resets(streams.apps, within=60)
            said = len(client.stderr)
            crashing.kill()
            time.sleep(1)
            assert not resets.any, "reset though the server may come back"
            stack.enter_context(Server(tmp_path, plain=False, port=crashing.port, name="restarted"))
            connected = _time_of_line(client, r"\bconnected again\b", said)
            assert resets.times()[-1] - connected < AT_ONCE_SECONDS
            for target in streams.targets:
                target.close()
            stack.enter_context(client.connect(listener.address))
            stack.enter_context(listener.accept())
            # The new connection has its application's socket; its link is one of the pool's, which is filled up again.
            wait_until(lambda: client.descriptors() <= before + 2, "the client's descriptors to be closed", within=90)

    def test_never_restarted_resets_at_the_end_of_the_window(self, tmp_path: Path) -> None:
        with Listener() as listener, ExitStack() as stack:
            server = stack.enter_context(Server(tmp_path, plain=False))
            arguments = ["--resume-window", f"{WINDOW_SECONDS:g}"]
            url = server.invitation.url
            client = stack.enter_context(Client(tmp_path, url, [listener.address], arguments=arguments))
            _, before = settle(server, client)
            streams = _Streams(client, listener, stack)
            resets = _Resets(streams.apps, within=60)
            killed = time.monotonic()
            server.kill()
            times = resets.times()
            assert times[0] - killed > WINDOW_SECONDS - 0.1, "given up too early"
            assert times[-1] - killed < WINDOW_SECONDS + LATE_SECONDS
            for app in streams.apps:
                app.close()
            wait_until(lambda: client.descriptors() <= before, "the client's descriptors to be closed")


class TestClientKilled:
    def test_targets_are_reset_at_the_end_of_the_window(self, tmp_path: Path) -> None:
        with Listener() as listener, ExitStack() as stack:
            arguments = ["--max-resume-window", f"{WINDOW_SECONDS:g}"]
            server = stack.enter_context(Server(tmp_path, plain=False, arguments=arguments))
            before = server.descriptors()
            client = stack.enter_context(Client(tmp_path, server.invitation.url, [listener.address]))
            settle(server, client)
            streams = _Streams(client, listener, stack)
            resets = _Resets(streams.targets, within=60)
            killed = time.monotonic()
            client.kill()
            times = resets.times()
            assert times[0] - killed > WINDOW_SECONDS - 0.1, "given up too early"
            assert times[-1] - killed < WINDOW_SECONDS + LATE_SECONDS
            wait_until(lambda: server.descriptors() <= before, "the server's descriptors to be closed")

    def test_the_next_client_of_the_same_user_resets_them_at_once(self, tmp_path: Path) -> None:
        with Listener() as listener, ExitStack() as stack:
            server = stack.enter_context(Server(tmp_path, plain=False))
            url = server.invitation.url
            client = stack.enter_context(Client(tmp_path, url, [listener.address], name="first"))
            before, _ = settle(server, client)
            streams = _Streams(client, listener, stack)
            resets = _Resets(streams.targets, within=60)
            client.kill()
            time.sleep(1)
            assert not resets.any, "reset though the client may come back"
            second = stack.enter_context(Client(tmp_path, url, [listener.address], name="second"))
            connected = _time_of_line(second, r"\bconnected\b", 0)
            assert resets.times()[-1] - connected < AT_ONCE_SECONDS
            # As many links as the first one had, and no more.
            settle(server, second)
            wait_until(lambda: server.descriptors() <= before, "the server's descriptors to be closed")


class TestSlowPath:
    def test_no_link_is_given_up_at_100_kbit(self, tmp_path: Path) -> None:
        """Full buffers both ways on a path so slow that what is queued takes many seconds: late is not dead."""
        with (
            Listener() as listener,
            Server(tmp_path, plain=False, arguments=["-v"]) as server,
            Relay(server.port, tmp_path, rate=SLOW_RATE) as relay,
            Client(
                tmp_path, server.invitation.changed(port=relay.port), [listener.address], arguments=["-v"]
            ) as client,
            ExitStack() as stack,
        ):
            app = stack.enter_context(client.connect(listener.address, within=60))
            target = stack.enter_context(listener.accept())
            up = _Flow(app, target, seed=1)
            down = _Flow(target, app, seed=2)
            ends = time.monotonic() + SLOW_SECONDS
            while time.monotonic() < ends:
                assert up.error is None, up.error
                assert down.error is None, down.error
                time.sleep(0.5)
            # The stream moved in both directions, and what arrived is what was sent, as far as it came.
            for flow in (up, down):
                assert flow.received > SLOW_SECONDS * SLOW_RATE / 4, f"{flow.received} bytes in {SLOW_SECONDS:g} s"
            assert relay.counts().open >= 2
            said = {process.name: process.stderr for process in (server, client)}
            for flow in (up, down):
                flow.stop()
        for name, text in said.items():
            assert not re.search(r"\b(lost|detached|resum\w+)\b", text), f"{name} gave up a link: {text[-4000:]}"


class _Flow:
    """Bytes in one direction, as fast as they go, until stopped."""

    def __init__(self, sender: socket.socket, receiver: socket.socket, *, seed: int) -> None:
        self.received = 0
        self.error: str | None = None
        self._sender, self._receiver = sender, receiver
        self._data = pattern(4_000_000, seed)
        self._stopped = False
        self._threads = [threading.Thread(target=each) for each in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End both threads, however far they are."""
        import socket

        self._stopped = True
        for sock in (self._sender, self._receiver):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the other direction's stop was first
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def _send(self) -> None:
        try:
            self._sender.settimeout(120)
            self._sender.sendall(self._data)
        except OSError as error:
            self._fail(f"sending: {error!r}")

    def _receive(self) -> None:
        try:
            self._receiver.settimeout(120)
            while data := self._receiver.recv(65536):
                if data != self._data[self.received : self.received + len(data)]:
                    self._fail(f"wrong bytes after {self.received}")
                self.received += len(data)
            self._fail("the stream ended")
        except OSError as error:
            self._fail(f"receiving: {error!r}")

    def _fail(self, what: str) -> None:
        if not self._stopped:
            self.error = what
