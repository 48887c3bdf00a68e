"""endpoints/plain.py: a WebSocket joined to a target's connection; in memory, so that every byte moves when told to."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.memory import MemoryReactor, MemorySocket
from tests.roles import LogLines, lines, tcp_pair, until
from wstunnel import limits, sockets, tls
from wstunnel.endpoints.plain import PlainConnection
from wstunnel.endpoints.plain_side import QUEUE_BYTES
from wstunnel.errors import LocalError
from wstunnel.reactor import READ, WRITE, Handler, make_reactor
from wstunnel.session import Principal
from wstunnel.transport import Transport
from wstunnel.wire.credit import Budget
from wstunnel.wire.frames import FrameDecoder, Opcode, encode_close, encode_frame, parse_close

__all__ = ["lines"]

KEY = b"\x01\x02\x03\x04"
FINISHED = "finished"


def frame(opcode: Opcode, payload: bytes = b"", *, fin: bool = True) -> bytes:
    return encode_frame(opcode, payload, fin=fin, key=KEY)


def data(payload: bytes) -> bytes:
    return frame(Opcode.BINARY, payload)


class Frames:
    """What the server sent a client."""

    def __init__(self) -> None:
        self._decoder = FrameDecoder(masked=False)
        self.data = b""
        self.pings = 0
        self.pongs: list[bytes] = []
        self.closed: tuple[int, str] | None = None

    def feed(self, received: bytes) -> None:
        for opcode, payload, _ in self._decoder.feed(received):
            assert self.closed is None, "nothing may follow a Close"
            if opcode is Opcode.BINARY:
                self.data += bytes(payload)
            elif opcode is Opcode.PING:
                self.pings += 1
            elif opcode is Opcode.PONG:
                self.pongs.append(bytes(payload))
            elif opcode is Opcode.CLOSE:
                self.closed = parse_close(bytes(payload))
            else:
                raise AssertionError(f"a server has no reason to send {opcode}")


class Owner:
    def __init__(self, reactor: Any) -> None:
        self.reactor = reactor
        self.ended: list[PlainConnection] = []

    def plain_ended(self, connection: PlainConnection) -> None:
        self.ended.append(connection)


class Joined:
    """A connection whose client and target are in the test's hands."""

    def __init__(
        self,
        *,
        text: bool = False,
        leftover: bytes = b"",
        reactor: MemoryReactor | None = None,
        principal: Principal | None = None,
        unix: bool = False,
    ) -> None:
        self.reactor = reactor or MemoryReactor()
        self.owner = Owner(self.reactor)
        self.principal = principal or Principal("alice", Budget(limits.PROCESS_BYTES), {})
        near, self.client = MemorySocket.pair()
        far, self.target = MemorySocket.pair()
        far.family = socket.AF_UNIX if unix else socket.AF_INET
        self.near, self.far = near, far
        self.frames = Frames()
        self.connection = PlainConnection(
            self.owner,
            self.principal,
            endpoint="/db",
            target="tcp:db:5432",
            peer="192.0.2.1:5",
            address="10.0.0.5:5432",
            text=text,
        )
        self.connection.start(near, far, leftover)  # type: ignore[arg-type]  # in memory

    def settle(self) -> None:
        busy = True
        while busy:
            busy = False
            for sock in (self.client, self.near, self.target, self.far):
                pipe = sock.outgoing
                if pipe.sent or (pipe.ended and not pipe.end_arrived):
                    pipe.move(len(pipe.sent))
                    busy = True
            for handler in self.reactor.ready():
                if handler.sock is not None:
                    self.reactor.turn(handler)
                    busy = True
        arrived = self.client.incoming.arrived
        self.frames.feed(bytes(arrived))
        arrived.clear()

    def send(self, *frames: bytes) -> None:
        self.client.send(b"".join(frames))
        self.settle()

    def pass_time(self, seconds: float) -> None:
        """With a sweep each second."""
        whole, rest = divmod(seconds, 1)
        for step in [1.0] * int(whole) + ([rest] if rest else []):
            self.reactor.advance(step)
            self.connection.sweep(self.reactor.now)
            self.settle()

    def at_target(self) -> bytes:
        """What arrived there since the last look."""
        arrived = bytes(self.target.incoming.arrived)
        self.target.incoming.arrived.clear()
        return arrived

    @property
    def target_sees(self) -> str:
        """How its connection stands."""
        if self.target.reset_by_peer:
            return "reset"
        return "eof" if self.target.incoming.end_arrived else "open"

    @property
    def over(self) -> bool:
        """The owner was told, exactly once, and nothing is held."""
        assert self.owner.ended in ([], [self.connection])
        if self.owner.ended:
            assert self.near.closed
            assert self.far.closed
            assert not self.reactor.handlers
            assert self.connection.held == 0
            assert self.connection not in self.principal.plain
        return bool(self.owner.ended)


@pytest.fixture
def joined() -> Joined:
    made = Joined()
    made.settle()
    return made


class TestBytes:
    def test_both_ways(self, joined: Joined) -> None:
        joined.send(data(b"query"))
        assert joined.at_target() == b"query"
        joined.target.send(b"answer")
        joined.settle()
        assert joined.frames.data == b"answer"

    def test_the_target_may_speak_first(self, joined: Joined) -> None:
        joined.target.send(b"220 ready")
        joined.settle()
        assert joined.frames.data == b"220 ready"

    @pytest.mark.parametrize("size", [1, 2, 3, 7])
    def test_any_split_of_what_arrives(self, joined: Joined, size: int) -> None:
        stream = (
            frame(Opcode.BINARY, b"one ", fin=False)
            + frame(Opcode.PING, b"now")
            + frame(Opcode.CONTINUATION, b"", fin=False)
            + frame(Opcode.CONTINUATION, b"two ")
            + data(b"")
            + data(b"three " * 50)
        )
        for at in range(0, len(stream), size):
            joined.send(stream[at : at + size])
        assert joined.at_target() == b"one two " + b"three " * 50
        assert joined.frames.pongs == [b"now"]

    def test_what_came_behind_the_head(self) -> None:
        joined = Joined(leftover=data(b"early")[:7])
        joined.send(data(b"early")[7:])
        assert joined.at_target() == b"early"

    def test_a_close_behind_the_head(self) -> None:
        joined = Joined(leftover=data(b"early") + frame(Opcode.CLOSE))
        joined.settle()
        assert (joined.at_target(), joined.target_sees) == (b"early", "eof")

    def test_large_amounts_both_ways(self, joined: Joined) -> None:
        up, down = os.urandom(300_000), os.urandom(300_000)
        joined.send(data(up[:200_000]), data(up[200_000:]))
        joined.target.send(down)
        joined.settle()
        assert joined.at_target() == up
        assert joined.frames.data == down
        assert (joined.connection.client.received, joined.connection.client.sent) == (len(up), len(down))

    def test_text_is_taken_where_it_is_wanted(self) -> None:
        joined = Joined(text=True)
        joined.send(frame(Opcode.TEXT, "grüß".encode()), data(b"\xff"))
        assert joined.at_target() == "grüß".encode() + b"\xff"
        joined.target.send(b"answer")
        joined.settle()
        assert joined.frames.data == b"answer"


class TestBackPressure:
    def test_a_client_that_does_not_read_stops_the_reading_of_the_target(self, joined: Joined) -> None:
        joined.near.outgoing.room = 1000
        down = os.urandom(100_000)
        joined.target.send(down)
        joined.settle()
        assert 0 < joined.connection.client.waiting() <= limits.SCRATCH_BYTES
        assert len(joined.far.incoming.arrived) > 80_000, "the target is not read"
        assert joined.principal.budget.held == joined.connection.client.waiting()
        assert not joined.connection.target.mask & READ
        # What is urgent still gets through to the target meanwhile.
        joined.send(data(b"stop"))
        assert joined.at_target() == b"stop"
        while len(joined.frames.data) < len(down):
            joined.near.outgoing.room = 5000
            joined.settle()
        joined.near.outgoing.room = None
        joined.settle()
        assert joined.frames.data == down
        assert joined.principal.budget.held == 0

    def test_a_target_that_does_not_read_stops_the_reading_of_the_client(self, joined: Joined) -> None:
        joined.far.outgoing.room = 0
        up = os.urandom(3 * QUEUE_BYTES)
        for at in range(0, len(up), 10_000):
            joined.client.send(data(up[at : at + 10_000]))
        joined.settle()
        held = len(joined.connection.target.queue)
        assert QUEUE_BYTES < held <= QUEUE_BYTES + len(joined.reactor.scratch)
        assert joined.principal.budget.held == held
        assert joined.connection.client.mask == 0
        assert joined.connection.target.mask == READ | WRITE
        joined.target.send(b"still heard")
        joined.settle()
        assert joined.frames.data == b"still heard"
        joined.far.outgoing.room = None
        joined.settle()
        assert joined.at_target() == up
        assert joined.principal.budget.held == 0

    def test_pongs_and_pings_go_between_frames_that_were_begun(self, joined: Joined) -> None:
        joined.near.outgoing.room = 1
        joined.target.send(b"x" * 3000)
        joined.settle()
        joined.send(frame(Opcode.PING, b"one"), frame(Opcode.PING, b"two"))
        joined.near.outgoing.room = None
        joined.settle()
        assert joined.frames.data == b"x" * 3000
        assert joined.frames.pongs == [b"two"]  # RFC 6455 §5.5.3: the latest is enough

    def test_without_memory_nothing_is_read_and_a_sweep_goes_on(self, joined: Joined) -> None:
        budget = joined.principal.budget
        budget.charge(limits.PRINCIPAL_BYTES)
        joined.connection.sweep(0.0)
        joined.target.send(b"down")
        joined.settle()
        assert joined.frames.data == b""
        joined.send(data(b"up"))  # passes through, nothing of it is held
        assert joined.at_target() == b"up"
        budget.charge(-limits.PRINCIPAL_BYTES)
        joined.pass_time(1)
        assert joined.frames.data == b"down"

    def test_room_that_others_took_meanwhile_is_no_room(self, joined: Joined) -> None:
        joined.far.outgoing.room = 0
        joined.send(data(bytes(100)))
        joined.principal.budget.charge(limits.PRINCIPAL_BYTES * 7 // 8)  # and nobody told this connection
        joined.target.send(b"down")
        joined.send(data(bytes(3000)))
        assert joined.frames.data == b""
        assert 100 <= len(joined.connection.target.queue) <= 100 + limits.READ_FLOOR_BYTES
        assert not joined.connection.client.mask & READ

    def test_without_memory_each_connection_takes_a_little_once(self, joined: Joined) -> None:
        joined.principal.budget.charge(limits.PRINCIPAL_BYTES * 7 // 8)
        joined.connection.sweep(0.0)
        joined.far.outgoing.room = 0
        joined.send(data(bytes(3000)))
        assert 0 < len(joined.connection.target.queue) < limits.READ_FLOOR_BYTES
        joined.far.outgoing.room = None
        joined.settle()
        assert joined.at_target() == bytes(3000), "whose target takes it goes on"

    @pytest.mark.parametrize("whose", ["the principal's", "the process's"])
    def test_when_memory_is_used_up_the_connection_that_holds_most_goes(self, whose: str) -> None:
        process = Budget(20_000)
        everyone: dict[str, Principal] = {}
        alice = Principal("alice", process, everyone)
        bob = Principal("bob", process, everyone)
        connections = [Joined(principal=owner) for owner in (alice, alice, bob)]
        for joined, size in zip(connections, (2000, 3000, 4000), strict=True):
            joined.far.outgoing.room = 0
            joined.send(data(bytes(size)))
        if whose == "the principal's":
            alice.budget.capacity = alice.budget.held
        else:
            process.held = process.capacity
        connections[2].pass_time(1)
        assert not any(joined.over for joined in connections), "who does not grow asks for nothing"
        connections[0].send(data(b"x"))
        gone = 1 if whose == "the principal's" else 2
        assert [number for number, joined in enumerate(connections) if joined.over] == [gone]
        lost = connections[gone]
        lost.settle()
        assert lost.target_sees == "reset"
        assert lost.client.incoming.end_arrived
        assert lost.connection.outcome == ("limit", "too much memory is held: the largest connection is broken off")

    def test_reads_are_short_while_frames_take_long(self, joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
        client = joined.connection.client
        spent = iter([0.0, 1.0] * 3 + [0.0, 0.0] * 9)
        monkeypatch.setattr(joined.reactor, "spent", lambda: next(spent))
        joined.send(data(b"x"))
        assert client._read_size == limits.READ_FIRST_BYTES // 4
        joined.send(data(b"x"))
        joined.send(data(b"x"))
        assert client._read_size == limits.READ_FLOOR_BYTES
        for _ in range(9):
            joined.send(data(b"x"))
        assert client._read_size == QUEUE_BYTES


class TestEndsOfTheTarget:
    def test_its_end_is_a_close_1000_behind_all_of_its_data(self, joined: Joined) -> None:
        joined.near.outgoing.room = 10
        joined.target.send(b"last words" * 100)
        joined.target.shutdown(socket.SHUT_WR)
        joined.settle()
        joined.near.outgoing.room = None
        joined.settle()
        assert joined.frames.data == b"last words" * 100
        assert joined.frames.closed == (1000, "the target has closed the connection")
        assert not joined.client.incoming.end_arrived, "the client may have something under way"
        # It still reads until the client has closed as well.
        joined.send(data(b"and you"), frame(Opcode.CLOSE, b"\x03\xe8"))
        assert (joined.at_target(), joined.target_sees) == (b"and you", "eof")
        assert joined.client.incoming.end_arrived, "RFC 6455 §7.1.1: the server ends TCP first"
        assert not joined.over
        joined.client.close()
        joined.settle()
        assert joined.over
        assert joined.connection.outcome == (FINISHED, "closed by the target")

    def test_a_client_that_never_answers_the_close(self, joined: Joined) -> None:
        joined.target.shutdown(socket.SHUT_WR)
        joined.settle()
        joined.pass_time(limits.LINGER_SECONDS)
        assert joined.over
        assert joined.target_sees == "eof"

    def test_a_client_that_takes_long_is_waited_for_while_the_kernel_holds_something(
        self, joined: Joined, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waiting = 5000
        monkeypatch.setattr("wstunnel.sockets.unsent", lambda _: waiting)
        joined.target.shutdown(socket.SHUT_WR)
        joined.settle()
        joined.pass_time(limits.STALLED_SECONDS)
        assert not joined.over
        waiting = 4000
        joined.pass_time(limits.STALLED_SECONDS)
        assert not joined.over, "it moved"
        waiting = 0
        joined.pass_time(1)
        assert not joined.over
        joined.pass_time(1)
        assert joined.over

    def test_a_client_that_takes_nothing_more_is_given_up_after_a_minute(
        self, joined: Joined, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("wstunnel.sockets.unsent", lambda _: 5000)
        joined.target.shutdown(socket.SHUT_WR)
        joined.settle()
        joined.pass_time(limits.STALLED_SECONDS)
        assert not joined.over
        joined.pass_time(1)
        assert joined.over
        assert joined.target_sees == "eof"

    def test_who_only_talks_is_waited_for_no_longer_than_somebody_listens(self, joined: Joined) -> None:
        joined.target.shutdown(socket.SHUT_WR)
        joined.settle()
        for _ in range(5):
            joined.send(data(b"and "))
            joined.pass_time(1)
        assert (joined.over, joined.at_target()) == (False, b"and " * 5)
        joined.far.reset_by_peer = True
        while not joined.over:
            assert joined.reactor.now < 10
            joined.send(data(b"nobody"))
            joined.pass_time(1)

    def test_a_client_that_cuts_instead_of_answering_changes_nothing(self, joined: Joined) -> None:
        joined.target.shutdown(socket.SHUT_WR)
        joined.settle()
        joined.near.reset_by_peer = True
        joined.settle()
        assert joined.over
        assert joined.target_sees == "eof"

    def test_its_reset_is_a_close_1011_behind_its_data(self, joined: Joined) -> None:
        joined.target.send(b"half an ans")
        joined.target.outgoing.move(100)
        joined.far.reset_by_peer = True
        joined.settle()
        assert joined.frames.data == b"half an ans"
        assert joined.frames.closed == (1011, "the target's connection broke")
        joined.client.close()
        joined.settle()
        assert joined.over
        assert joined.connection.outcome == ("reset", "connection reset")

    def test_another_failure_is_named_in_the_log(self, joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> int:
            raise OSError(errno.ETIMEDOUT, "Connection timed out")

        monkeypatch.setattr(joined.far, "recv_into", fail)
        joined.target.send(b"x")
        joined.settle()
        assert joined.frames.closed == (1011, "the target's connection broke")
        assert joined.connection.outcome == ("reset", "the target's connection failed: Connection timed out")

    @pytest.mark.parametrize("queued", [False, True])
    def test_when_it_takes_no_more_what_it_said_is_still_read(
        self, joined: Joined, monkeypatch: pytest.MonkeyPatch, queued: bool
    ) -> None:
        if queued:
            joined.far.outgoing.room = 0
            joined.send(data(b"in the queue"))

        def fail(_data: object) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        monkeypatch.setattr(joined.far, "send", fail)
        joined.target.send(b"the reason")
        joined.far.outgoing.room = None
        joined.send(data(b"more"))
        joined.send(data(b"and more"))
        joined.target.shutdown(socket.SHUT_WR)
        joined.settle()
        assert joined.frames.data == b"the reason"
        assert joined.frames.closed == (1011, "the target's connection broke")

    def test_nothing_is_delivered_to_a_target_that_is_gone(self, joined: Joined) -> None:
        joined.far.reset_by_peer = True
        joined.settle()
        joined.send(data(b"too late"), frame(Opcode.CLOSE, b"\x03\xf3"))
        joined.client.close()
        joined.settle()
        assert joined.over
        assert joined.at_target() == b""


class TestEndsOfTheClient:
    @pytest.mark.parametrize("code", [None, 1000, 1001])
    def test_its_close_is_answered_and_becomes_the_targets_end(self, joined: Joined, code: int | None) -> None:
        joined.send(data(b"last"), encode_close(code, key=KEY))
        assert joined.frames.closed == ((code or 1005), "")
        assert (joined.at_target(), joined.target_sees) == (b"last", "eof")
        joined.target.shutdown(socket.SHUT_WR)
        joined.client.shutdown(socket.SHUT_WR)
        joined.settle()
        assert joined.over
        detail = "closed by the client" + (f": {code}" if code else "")
        assert joined.connection.outcome == (FINISHED, detail)

    @pytest.mark.parametrize("code", [1002, 1003, 1007, 1008, 1009, 1011, 4000])
    def test_a_close_for_another_reason_is_no_end(self, joined: Joined, code: int) -> None:
        joined.send(data(b"not all"), encode_close(code, "why", key=KEY))
        assert joined.frames.closed == (code, ""), "answered all the same"
        assert (joined.at_target(), joined.target_sees) == (b"not all", "open")
        joined.client.shutdown(socket.SHUT_WR)
        joined.settle()
        joined.pass_time(limits.LINGER_SECONDS)
        assert joined.target_sees == "reset"
        assert joined.over
        assert joined.connection.outcome == ("reset", f"closed by the client: {code} why")

    @pytest.mark.parametrize(("code", "end"), [(1000, "eof"), (1001, "reset")])
    def test_a_goodbye_in_the_middle_of_a_message(self, joined: Joined, code: int, end: str) -> None:
        """A program may send all in one message, and say that it is done; one that goes away was not."""
        joined.send(frame(Opcode.BINARY, b"half", fin=False), encode_close(code, key=KEY))
        joined.pass_time(limits.LINGER_SECONDS)
        assert (joined.at_target(), joined.target_sees) == (b"half", end)

    def test_going_away_behind_a_message_of_several_frames(self, joined: Joined) -> None:
        joined.send(
            frame(Opcode.BINARY, b"al", fin=False), frame(Opcode.CONTINUATION, b"l"), encode_close(1001, key=KEY)
        )
        assert (joined.at_target(), joined.target_sees) == (b"all", "eof")

    def test_a_reset_leaves_the_target_a_second_to_read(self, joined: Joined) -> None:
        """Some programs find the reset before what they have not read, and drop that."""
        joined.send(data(b"last"))
        joined.client.shutdown(socket.SHUT_WR)
        joined.settle()
        joined.pass_time(limits.LINGER_SECONDS - 0.5)
        assert joined.target_sees == "open"
        joined.pass_time(0.5)
        assert joined.target_sees == "reset"

    def test_elsewhere_than_on_linux_a_reset_waits_for_the_lingering(
        self, joined: Joined, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What the kernel holds is not known there."""
        monkeypatch.setattr(sockets, "unsent", lambda _: None)
        joined.far.outgoing.room = 0
        joined.client.send(data(b"x" * 5000))
        joined.client.shutdown(socket.SHUT_WR)
        joined.settle()
        joined.pass_time(10)
        assert joined.target_sees == "open"
        joined.far.outgoing.room = None
        joined.settle()
        assert (joined.at_target(), joined.target_sees) == (b"x" * 5000, "open")
        joined.pass_time(limits.LINGER_SECONDS)
        assert joined.target_sees == "reset"

    @pytest.mark.parametrize("how", ["close", "fin", "rst"])
    def test_a_target_at_a_unix_socket_is_told_an_end(self, how: str) -> None:
        """A reset does not exist there, so none is waited for, and the log speaks of none."""
        joined = Joined(unix=True)
        joined.send(data(b"not all"))
        if how == "close":
            joined.send(encode_close(1011, "why", key=KEY))
        elif how == "fin":
            joined.client.shutdown(socket.SHUT_WR)
        else:
            joined.near.reset_by_peer = True
        joined.settle()
        assert (joined.at_target(), joined.target_sees) == (b"not all", "eof")
        joined.client.close()
        joined.settle()
        joined.pass_time(limits.LINGER_SECONDS)
        assert joined.over
        assert not joined.far.linger_reset
        assert joined.connection.outcome is not None
        outcome, detail = joined.connection.outcome
        assert outcome == "lost"
        assert detail.endswith("; the target saw an end: a Unix socket cannot be reset")

    def test_the_end_waits_for_a_slow_target_that_waits_to_be_read(self, joined: Joined) -> None:
        joined.far.outgoing.room = 0
        up = os.urandom(50_000)
        joined.send(data(up), frame(Opcode.CLOSE))
        assert joined.target_sees == "open"
        joined.target.send(b"nobody hears this" * 10_000)
        joined.settle()
        assert not joined.far.incoming.arrived, "a target that is not read may not read either"
        joined.far.outgoing.room = None
        joined.settle()
        assert (joined.at_target(), joined.target_sees) == (up, "eof")
        assert joined.frames.data == b""

    def test_a_target_that_does_not_end_is_closed_after_a_second(self, joined: Joined) -> None:
        joined.send(frame(Opcode.CLOSE))
        joined.client.close()
        joined.settle()
        joined.pass_time(limits.LINGER_SECONDS - 0.5)
        assert not joined.over
        joined.pass_time(0.5)
        assert joined.over

    def test_a_target_that_takes_nothing_is_reset_after_a_minute(self, joined: Joined) -> None:
        joined.far.outgoing.room = 0
        joined.send(data(b"x" * 1000), frame(Opcode.CLOSE))
        joined.pass_time(limits.STALLED_SECONDS)
        assert not joined.over
        joined.pass_time(1)
        assert joined.over
        assert joined.target_sees == "reset"

    @pytest.mark.parametrize("cut", [0, 1])
    def test_its_connections_end_without_a_close_frame(self, joined: Joined, cut: int) -> None:
        """A proxy that closes what is idle, or a client that was killed: whether it was all, nobody knows."""
        sent = data(b"last")
        joined.client.send(sent[: len(sent) - cut])
        joined.client.shutdown(socket.SHUT_WR)
        joined.settle()
        joined.pass_time(limits.LINGER_SECONDS)
        assert (joined.at_target(), joined.target_sees) == (b"last"[: 4 - cut], "reset")
        assert joined.over
        assert joined.connection.outcome == ("lost", "connection closed without a close frame")

    def test_a_reset_goes_behind_what_came(self, joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the target's queue and the kernel hold is delivered first."""
        unsent = [1000]
        monkeypatch.setattr(sockets, "unsent", lambda sock: unsent[0] if sock is joined.far else 0)
        joined.far.outgoing.room = 0
        up = os.urandom(50_000)
        joined.client.send(data(up))
        joined.client.shutdown(socket.SHUT_WR)
        joined.settle()
        joined.target.send(b"nobody hears this" * 10_000)
        joined.settle()
        assert not joined.far.incoming.arrived, "a target that is not read may not read either"
        joined.far.outgoing.room = None
        joined.settle()
        joined.pass_time(2)
        assert (joined.at_target(), joined.target_sees) == (up, "open")
        unsent[0] = 0
        joined.pass_time(limits.LINGER_SECONDS)
        assert joined.target_sees == "reset"
        assert joined.over

    @pytest.mark.parametrize("code", [1000, 1011])
    def test_a_slow_target_has_a_minute_for_each_step(
        self, joined: Joined, code: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The kernel still sends, though nothing is written any more."""
        unsent = [100_000]
        monkeypatch.setattr(sockets, "unsent", lambda sock: unsent[0] if sock is joined.far else 0)
        joined.send(data(b"x"), encode_close(code, key=KEY))
        joined.client.close()
        joined.settle()
        for _ in range(3):
            joined.pass_time(limits.STALLED_SECONDS - 1)
            assert not joined.over
            unsent[0] -= 1000
        joined.pass_time(1)
        unsent[0] = 0
        joined.pass_time(limits.LINGER_SECONDS / 2)
        assert not joined.over
        joined.pass_time(limits.LINGER_SECONDS / 2)
        assert joined.over
        assert joined.target_sees == ("eof" if code == 1000 else "reset")

    def test_a_target_that_took_nothing_before_the_end_has_its_minute(
        self, joined: Joined, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sockets, "unsent", lambda sock: 1000 if sock is joined.far else 0)
        joined.send(data(b"x"))
        joined.reactor.advance(2 * limits.STALLED_SECONDS)
        joined.client.shutdown(socket.SHUT_WR)
        joined.settle()
        joined.pass_time(limits.STALLED_SECONDS)
        assert not joined.over

    def test_after_the_end_a_target_that_takes_nothing_is_left_to_the_kernel(
        self, joined: Joined, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sockets, "unsent", lambda sock: 1000 if sock is joined.far else 0)
        joined.send(data(b"x"), frame(Opcode.CLOSE))
        joined.client.close()
        joined.settle()
        joined.pass_time(limits.STALLED_SECONDS + 1)
        assert joined.over
        assert joined.target_sees == "eof"

    def test_a_reset_waits_for_a_minute_at_most(self, joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sockets, "unsent", lambda sock: 1000 if sock is joined.far else 0)
        joined.send(data(b"x"))
        joined.client.shutdown(socket.SHUT_WR)
        joined.settle()
        joined.target.shutdown(socket.SHUT_WR)
        joined.settle()
        joined.pass_time(limits.STALLED_SECONDS)
        assert not joined.over
        joined.pass_time(1)
        assert joined.over
        assert joined.target_sees == "reset"

    @pytest.mark.parametrize("stopped", [False, True])
    def test_its_reset_is_the_targets(self, joined: Joined, stopped: bool) -> None:
        if stopped:  # then nothing is wanted of it, and only a hangup tells
            joined.far.outgoing.room = 0
            joined.send(data(b"x" * 2 * QUEUE_BYTES))
            assert joined.connection.client.mask == 0
        held = len(joined.connection.target.queue)
        joined.near.reset_by_peer = True
        joined.settle()
        assert joined.near.closed
        joined.far.outgoing.room = None
        joined.settle()
        assert (len(joined.at_target()), bool(held)) == (held, stopped), "what came goes before it"
        joined.pass_time(limits.LINGER_SECONDS)
        assert joined.over
        assert joined.target_sees == "reset"
        assert joined.connection.outcome is not None
        assert joined.connection.outcome[0] == "lost"

    def test_a_reset_that_a_write_finds_out(self, joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(_data: object) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        monkeypatch.setattr(joined.near, "send", fail)
        joined.target.send(b"news")
        joined.settle()
        joined.pass_time(limits.LINGER_SECONDS)
        assert joined.over
        assert joined.connection.outcome == ("lost", "connection failed: Broken pipe")

    @pytest.mark.parametrize(
        ("broken", "code"),
        [
            (encode_frame(Opcode.BINARY, b"clear"), 1002),
            (b"\xc2\x80" + KEY, 1002),
            (frame(Opcode.CLOSE, b"\x00"), 1002),
            (frame(Opcode.TEXT, b"words"), 1003),
            (frame(Opcode.TEXT), 1003),
        ],
    )
    def test_what_breaks_the_rules(self, joined: Joined, broken: bytes, code: int) -> None:
        joined.send(data(b"good"), broken, data(b"ignored"))
        assert joined.frames.closed is not None
        assert joined.frames.closed[0] == code
        assert joined.at_target() == b"good"
        assert joined.target_sees == "reset"
        joined.send(data(b"ignored"))
        assert not joined.over, "what is on the way would have a reset destroy the Close"
        joined.pass_time(limits.LINGER_SECONDS)
        assert joined.over
        assert joined.connection.outcome is not None
        assert joined.connection.outcome[0] == "protocol"

    def test_text_that_is_not_utf8(self) -> None:
        joined = Joined(text=True)
        joined.send(frame(Opcode.TEXT, b"\xff"))
        assert joined.frames.closed == (1007, "text message is not valid UTF-8")


class TestTime:
    def test_a_silent_client_is_asked_and_lives_while_it_answers(self, joined: Joined) -> None:
        for turn in range(1, 4):
            joined.pass_time(limits.PING_AFTER_SECONDS)
            assert joined.frames.pings == turn
            joined.send(frame(Opcode.PONG))
        assert not joined.over

    def test_one_that_does_not_answer_is_dead(self, joined: Joined) -> None:
        joined.pass_time(limits.PING_AFTER_SECONDS + limits.PONG_WITHIN_SECONDS - 1)
        assert not joined.over
        joined.pass_time(2)
        assert joined.over
        assert joined.target_sees == "reset"
        assert joined.connection.outcome == ("lost", "the client answers no ping")

    def test_an_answer_that_nobody_had_read_yet_counts(self, joined: Joined) -> None:
        joined.pass_time(limits.PING_AFTER_SECONDS)
        joined.client.send(frame(Opcode.PONG))
        joined.client.outgoing.move(100)
        for _ in range(int(limits.PONG_WITHIN_SECONDS) + 2):  # with others' work in the way of every read
            joined.reactor.advance(1)
            joined.connection.sweep(joined.reactor.now)
        assert not joined.over

    def test_a_check_that_comes_late_asks_again(self, joined: Joined) -> None:
        joined.pass_time(limits.PING_AFTER_SECONDS)
        joined.reactor.advance(limits.PONG_WITHIN_SECONDS + 5)
        joined.connection.sweep(joined.reactor.now)
        joined.settle()
        assert not joined.over
        assert joined.frames.pings == 2

    def test_after_a_sleep_it_is_asked_anew(self, joined: Joined) -> None:
        joined.pass_time(limits.PING_AFTER_SECONDS)
        joined.reactor.advance(3600)
        joined.connection.woke(joined.reactor.now)
        joined.pass_time(1)
        assert not joined.over
        assert joined.frames.pings == 2

    def test_one_that_the_target_holds_up_is_asked_and_not_judged(self, joined: Joined) -> None:
        joined.far.outgoing.room = 0
        joined.send(data(b"x" * 2 * QUEUE_BYTES))
        assert joined.connection.client.mask == 0
        joined.pass_time(4 * limits.PING_AFTER_SECONDS)
        assert not joined.over
        assert joined.frames.pings >= 3

    def test_one_that_takes_nothing_for_a_minute(self, joined: Joined) -> None:
        joined.near.outgoing.room = 1
        joined.target.send(b"x" * 1000)
        joined.settle()
        for _ in range(int(limits.STALLED_SECONDS)):  # it does speak
            joined.send(frame(Opcode.PONG))
            joined.pass_time(1)
        assert joined.connection.outcome is None
        joined.send(frame(Opcode.PONG))
        joined.pass_time(1)
        assert joined.near.closed
        joined.pass_time(limits.LINGER_SECONDS)
        assert joined.over
        assert joined.connection.outcome == ("lost", "the client took nothing for 61 s")


class TestTls:
    """What OpenSSL may ask for at any time, since a read may have to write and the other way round."""

    def test_a_read_that_has_to_write(self, joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
        real, asked = joined.near.recv_into, []

        def read(*arguments: Any) -> int:
            asked.append(arguments)
            if len(asked) == 1:
                raise ssl.SSLWantWriteError
            return real(*arguments)

        monkeypatch.setattr(joined.near, "recv_into", read)
        joined.near.outgoing.room = 0
        joined.client.send(data(b"x"))
        joined.client.outgoing.move(100)
        joined.reactor.turn(joined.connection.client)
        assert joined.connection.client.mask == READ | WRITE
        joined.near.outgoing.room = None
        joined.settle()
        assert joined.at_target() == b"x"
        assert joined.connection.client.mask == READ

    def test_a_write_that_has_to_read(self, joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
        real, asked = joined.near.send, []

        def send(piece: memoryview) -> int:
            asked.append(bytes(piece))
            if len(asked) == 1:
                raise ssl.SSLWantReadError
            return real(piece)

        monkeypatch.setattr(joined.near, "send", send)
        joined.target.send(b"news")
        joined.settle()
        assert joined.connection.client.mask == READ, "to wait for room, which there is, would spin"
        assert joined.frames.data == b""
        joined.send(frame(Opcode.PONG))
        assert joined.frames.data == b"news"
        assert asked[0] == asked[1], "OpenSSL wants the same bytes again"

    def test_records_that_are_inside_openssl_are_read_on(self, joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
        real = joined.near.recv_into
        monkeypatch.setattr(joined.near, "recv_into", lambda buffer, _size: real(buffer, 5))
        monkeypatch.setattr(joined.near, "pending", lambda: len(joined.near.incoming.arrived), raising=False)
        monkeypatch.setattr(joined.near, "readable", lambda: False)  # to a selector
        joined.connection.client.secure = True
        joined.client.send(data(b"in several reads"))
        joined.client.outgoing.move(100)
        joined.reactor.again(joined.connection.client)
        joined.settle()
        assert joined.at_target() == b"in several reads"


class TestOurEnds:
    def test_shutdown(self, joined: Joined) -> None:
        joined.connection.close(1001, "the server is stopping")
        joined.settle()
        assert joined.frames.closed == (1001, "the server is stopping")
        assert joined.target_sees == "reset"
        joined.send(data(b"ignored"), frame(Opcode.CLOSE, b"\x03\xe9"))
        joined.client.close()
        joined.settle()
        assert joined.over
        assert joined.connection.outcome == ("shutdown", "the server is stopping")

    def test_shutdown_waits_for_no_slow_client(self, joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("wstunnel.sockets.unsent", lambda _: 5000)
        joined.connection.close(1001, "the server is stopping")
        joined.pass_time(limits.LINGER_SECONDS)
        assert joined.over

    def test_shutdown_while_closing_already(self, joined: Joined) -> None:
        joined.send(frame(Opcode.CLOSE))
        joined.connection.close(1001, "the server is stopping")
        joined.client.close()
        joined.settle()
        assert joined.over

    @pytest.mark.parametrize("side", ["client", "target"])
    def test_a_fault_of_ours_ends_this_connection_only(self, joined: Joined, side: str, lines: LogLines) -> None:
        joined.near.outgoing.room = 1
        joined.target.send(b"what is held then is given back")
        joined.settle()
        assert joined.principal.budget.held
        handler: Handler = getattr(joined.connection, side)
        handler.fail(ZeroDivisionError("division by zero"))
        assert joined.over
        assert joined.target_sees == "reset"
        assert joined.connection.outcome == ("internal", "internal error: ZeroDivisionError")
        assert lines("fault in our own code", "endpoint")

    def test_a_fault_in_the_sweep(self, joined: Joined, monkeypatch: pytest.MonkeyPatch, lines: LogLines) -> None:
        monkeypatch.setattr(type(joined.connection.client), "sweep", lambda *_: 1 / 0)
        joined.connection.sweep(1.0)
        assert joined.over

    def test_a_fault_at_the_start(self, monkeypatch: pytest.MonkeyPatch, lines: LogLines) -> None:
        monkeypatch.setattr("wstunnel.endpoints.plain_client.PlainProtocol.receive", lambda *_: 1 / 0)
        joined = Joined(leftover=b"x")
        assert joined.over

    @pytest.mark.parametrize("refused", [1, 2])
    def test_a_reactor_that_takes_no_more(self, refused: int) -> None:
        class Full(MemoryReactor):
            adopted = 0

            def adopt(self, handler: Handler, sock: Any, mask: int = READ, *, look: bool = True) -> None:
                self.adopted += 1
                if self.adopted == refused:
                    raise LocalError("too many watches")
                super().adopt(handler, sock, mask, look=look)

        joined = Joined(reactor=Full())
        assert joined.over
        assert joined.target.reset_by_peer
        assert joined.connection.outcome == ("limit", "too many watches")


def test_log_lines(joined: Joined, lines: LogLines) -> None:
    other = Joined()
    other.send(data(b"four"))
    other.target.send(b"to it")
    other.settle()
    other.reactor.advance(2)
    other.send(frame(Opcode.CLOSE, b"\x03\xe8bye"))
    other.target.close()
    other.client.close()
    other.settle()
    where = {"endpoint": "/db", "target": "tcp:db:5432", "address": "10.0.0.5:5432", "peer": "192.0.2.1:5"}
    assert lines("endpoint opened", "endpoint") == [where | {"principal": "alice"}]
    assert lines("endpoint ended", "endpoint") == [
        where
        | {"principal": "alice", "sent": 5, "received": 4, "seconds": 2.0, "reason": "finished"}
        | {"detail": "closed by the client: 1000 bye"}
    ]
    assert not joined.over


@pytest.mark.parametrize("secure", [False, True])
async def test_real_sockets(nursery: trio.Nursery, tmp_path: Path, secure: bool) -> None:
    """Plain and TLS, megabytes both ways at once, then the whole closing handshake."""
    reactor = make_reactor()
    await nursery.start(reactor.run)
    server_context: ssl.SSLContext | None = None
    client_context: ssl.SSLContext | None = None
    if secure:
        cert, key = tls.ensure_certificate(tmp_path, names=("here",))
        server_context = tls.server_context(cert, key)
        client_context = ssl.create_default_context(cafile=str(cert))
        client_context.check_hostname = False
    ours, theirs = tcp_pair()
    near = Transport(ours, server_context, server_side=True)
    client = Transport(theirs, client_context, server_hostname="here" if secure else None)
    async with trio.open_nursery() as handshakes:
        handshakes.start_soon(near.handshake)
        handshakes.start_soon(client.handshake)
    far, application = tcp_pair()
    target = trio.SocketStream(trio.socket.from_stdlib_socket(application))
    owner = Owner(reactor)
    connection = PlainConnection(
        owner, Principal("alice", Budget(limits.PROCESS_BYTES), {}), endpoint="/", target="", peer="", address=""
    )
    connection.start(near.detach(), far)
    up, down = os.urandom(3_000_000), os.urandom(3_000_000)
    got, frames = bytearray(), Frames()

    async def send_up() -> None:
        for at in range(0, len(up), 70_000):
            await client.send(data(up[at : at + 70_000]))

    async def read_up() -> None:
        while len(got) < len(up):
            got.extend(await target.receive_some(50_000))

    with trio.fail_after(20):
        # One direction at a time over TLS: `Transport` is for one task.
        async with trio.open_nursery() as both:
            both.start_soon(send_up)
            both.start_soon(read_up)
        async with trio.open_nursery() as both:
            both.start_soon(target.send_all, down)
            while len(frames.data) < len(down):
                frames.feed(await client.receive(60_000))
        assert got == up
        assert frames.data == down
        await target.send_eof()
        while frames.closed is None:
            frames.feed(await client.receive(60_000))
        assert frames.closed[0] == 1000
        await client.send(frame(Opcode.CLOSE, b"\x03\xe8"))
        assert await client.receive(100) == b""
        assert await target.receive_some(100) == b""
        client.close()
        await until(lambda: owner.ended == [connection])
    assert connection.outcome == (FINISHED, "closed by the target")
    await target.aclose()
    nursery.cancel_scope.cancel()


async def test_a_real_unix_socket_is_told_an_end(nursery: trio.Nursery) -> None:
    reactor = make_reactor()
    await nursery.start(reactor.run)
    near, client = tcp_pair()
    far, target = socket.socketpair()
    far.setblocking(False)
    owner = Owner(reactor)
    connection = PlainConnection(
        owner, Principal("alice", Budget(limits.PROCESS_BYTES), {}), endpoint="/", target="", peer="", address=""
    )
    with client, target:
        connection.start(near, far)
        client.send(data(b"not all"))
        client.close()
        await until(lambda: connection.outcome is not None)
        assert (target.recv(100), target.recv(100)) == (b"not all", b"")
        target.shutdown(socket.SHUT_WR)
        await until(lambda: bool(owner.ended))
    assert connection.outcome is not None
    assert connection.outcome[0] == "lost"
    nursery.cancel_scope.cancel()


async def test_a_slow_client_that_goes_on_talking_gets_all(nursery: trio.Nursery) -> None:
    """To close while the kernel still holds what it has yet to take: its next byte would draw a reset."""
    reactor = make_reactor()
    await nursery.start(reactor.run)
    near, slow = tcp_pair()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    far, application = tcp_pair()
    owner = Owner(reactor)
    connection = PlainConnection(
        owner, Principal("alice", Budget(limits.PROCESS_BYTES), {}), endpoint="/", target="", peer="", address=""
    )
    connection.start(near, far)
    target = trio.SocketStream(trio.socket.from_stdlib_socket(application))
    client = trio.SocketStream(trio.socket.from_stdlib_socket(slow))
    down, frames = os.urandom(200_000), Frames()
    with trio.fail_after(20):
        await target.send_all(down)
        await target.send_eof()
        await until(lambda: connection.outcome is not None and not connection.client.waiting())
        assert sockets.unsent(near), "or this tests nothing"
        for second in range(1, 6):
            connection.sweep(reactor.now + second)
        await client.send_all(data(b"still here"))
        assert await target.receive_some(100) == b"still here"
        while frames.closed is None:
            received = await client.receive_some(60_000)
            assert received, "no Close frame"
            frames.feed(received)
        assert frames.data == down
        assert frames.closed[0] == 1000
        await client.send_all(frame(Opcode.CLOSE, b"\x03\xe8"))
        assert await client.receive_some(100) == b""
        await client.aclose()
        await target.aclose()
        await until(lambda: owner.ended == [connection])
    nursery.cancel_scope.cancel()
