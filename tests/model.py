"""Two ends of the tunnel in memory: the product's sessions, links and streams, with memory sockets between them.

Client and server are the product's own, with their tasks; what stands in for the system is the network, the targets,
the clock, and as much of Trio as they need (`tests/memory.py`). Nothing moves by itself: `World.moves()` lists what can
happen next, a test picks. After each step `World.check()` holds the invariants of docs/reference/protocol.md;
`World.settle()` lets everything flow, without further harm, and `World.finish()` checks how each connection ended.

    python -m tests.model SEED      one random schedule of tests/test_model.py, step by step
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

from tests.memory import MemoryEvent, MemoryNursery, MemoryReactor, MemorySocket, MemoryTrio, Pipe
from wstunnel import client as client_module
from wstunnel import client_session, egress, ingress, reverse_server, server, server_session, sockets
from wstunnel.client_session import ClientSession
from wstunnel.config import ServerConfig
from wstunnel.errors import NetworkError, StreamError
from wstunnel.forwards import Forward, parse_reverse
from wstunnel.ingress import Wanted
from wstunnel.limits import OPEN_WAIT_SECONDS
from wstunnel.link import Link
from wstunnel.policy import parse_listen_rule
from wstunnel.reactor import Handler
from wstunnel.reverse_client import ReverseForwards
from wstunnel.server import Server
from wstunnel.session import Session
from wstunnel.stream import Stream
from wstunnel.targets import Target
from wstunnel.wire.protocol import LinkProtocol
from wstunnel.wire.states import Exchange

WINDOW = 16  # bytes: so small that credit always bites
SEND_QUEUE = 4096
WHOLE = 1 << 20  # bytes: all there is
CALM_SECONDS = 90.0  # a dead link is noticed, an unanswered question given up, and every pause over, well before
Side = Literal["client", "server"]
Move = tuple[Any, ...]  # a function and its arguments


class OrderedSet(dict):  # type: ignore[type-arg]
    """A set that keeps its order, so that a run can be repeated."""

    def add(self, item: Any) -> None:
        self[item] = None

    def discard(self, item: Any) -> None:
        self.pop(item, None)


class ModelReactor(MemoryReactor):
    """Knows which handler a socket has or had."""

    def adopt(self, handler: Any, sock: Any, mask: int = 1, *, look: bool = True) -> None:
        sock.handler = handler
        super().adopt(handler, sock, mask, look=look)


# --- the network ------------------------------------------------------------------------------------------------------


class LinkSocket(MemorySocket):
    """One end of a link's connection."""

    def __init__(self, incoming: Pipe, outgoing: Pipe) -> None:
        super().__init__(incoming, outgoing)
        self.handler: Link | None = None
        self.lossy = False  # what is written from now on is lost
        self.resets = False  # closed with a TCP reset, which goes behind what was sent
        self.unwanted = False  # has written to an end that was closed, and will be told so

    def send(self, data: bytes | memoryview) -> int:
        count = super().send(data)
        if self.peer.closed:
            self.unwanted = True
        if self.lossy or self.unwanted:
            self.outgoing.sent.clear()
        return count

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            incoming = self.incoming
            self.resets = self.linger_reset or bool(incoming.arrived or incoming.sent)
            self.outgoing.ended = True
            incoming.sent.clear()


class Wire:
    """The connection under one link, from the client's end to the server's.

    Attributes:
        cut: nothing more gets onto it; each end notices on its own, or never.
        slow: a proxy in between holds what passes.
    """

    def __init__(self) -> None:
        near, far = LinkSocket.pair()
        assert isinstance(near, LinkSocket) and isinstance(far, LinkSocket)
        self.near, self.far = near, far
        self.ends = (near, far)
        self.cut = False
        self.slow = False
        for pipe in (near.incoming, near.outgoing):
            pipe.room = SEND_QUEUE

    def protocols(self) -> list[LinkProtocol]:
        return [sock.handler.protocol for sock in self.ends if sock.handler is not None]

    def moves(self, size: int) -> list[Move]:
        result: list[Move] = []
        for sock in self.ends:
            pipe = sock.outgoing
            if not sock.peer.closed:
                if pipe.sent or (pipe.ended and not pipe.end_arrived and not self.cut):
                    result.append((self.carry, sock, size))
            elif sock.unwanted and not (self.cut or sock.closed or sock.reset_by_peer):
                result.append((self.tell_reset, sock))
        return result

    def carry(self, sock: LinkSocket, size: int) -> None:
        """Up to `size` bytes of what `sock` has sent arrive, and its end behind them."""
        pipe = sock.outgoing
        before = len(pipe.sent)
        if self.cut:
            pipe.arrived += pipe.sent[:size]
            del pipe.sent[:size]
        else:
            pipe.move(size)
            sock.peer.reset_by_peer |= sock.resets and not pipe.sent
        assert pipe.room is not None
        pipe.room += before - len(pipe.sent)

    @staticmethod
    def tell_reset(sock: LinkSocket) -> None:
        """The other end was closed before this one's last bytes came."""
        sock.reset_by_peer = True

    def break_off(self, chance: random.Random) -> None:
        """Cut: each direction loses any suffix of what is under way, and everything after it."""
        self.cut = True
        for sock in self.ends:
            sent = sock.outgoing.sent
            del sent[chance.randint(0, len(sent)) :]
            sock.lossy = True

    @staticmethod
    def notice(sock: LinkSocket, reset: bool) -> None:
        """One end of a cut connection sees that it is gone; what had not arrived there by then never does."""
        sock.incoming.sent.clear()
        if reset:
            sock.reset_by_peer = True
        else:
            sock.incoming.end_arrived = True


# --- the applications -------------------------------------------------------------------------------------------------


class Application:
    """What stands at one end of a tunnelled connection."""

    def __init__(self, to_write: bytes) -> None:
        self.to_write = to_write
        self.written = 0
        self.read = bytearray()
        self.stalled = False  # does not read
        self.echo = False  # write what was read; stop reading while it cannot be written
        self.end_seen = False
        self.aborted = False
        self.closed_write = False
        self.ended = False  # the tunnel has no more to do with it
        self.sock: MemorySocket | None = None

    def write(self, size: int) -> None:
        assert self.sock is not None
        if self.sock.reset_by_peer:
            return
        piece = self.to_write[self.written : self.written + size]
        self.sock.send(piece)
        self.sock.outgoing.move(len(piece))
        self.written += len(piece)

    def close_write(self) -> None:
        assert self.sock is not None
        if self.sock.reset_by_peer:
            return
        self.closed_write = True
        self.sock.shutdown(1)
        self.sock.outgoing.move(0)

    def abort(self) -> None:
        assert self.sock is not None
        self.aborted = True
        self.sock.linger_reset = True
        self.sock.close()

    def take(self, size: int) -> None:
        """Read up to `size` bytes; makes room for the tunnel's next write."""
        assert self.sock is not None
        pipe = self.sock.incoming
        pipe.move(size)
        self.read += pipe.arrived
        if pipe.room is not None:
            pipe.room += len(pipe.arrived)
        pipe.arrived.clear()
        if pipe.end_arrived:
            self.end_seen = True

    def moves(self, size: int) -> list[Move]:
        sock = self.sock
        if sock is None or sock.closed:
            return []
        result: list[Move] = []
        if self.echo:
            self.to_write = bytes(self.read)
        dead = sock.reset_by_peer
        can_write = self.written < len(self.to_write) and not dead
        if can_write:
            result.append((self.write, size))
        elif not self.closed_write and not dead and (not self.echo or self.end_seen):
            result.append((self.close_write,))
        pipe = sock.incoming
        readable = pipe.sent or (pipe.ended and not self.end_seen)
        if readable and not self.stalled and not (self.echo and can_write):
            result.append((self.take, size))
        return result


class Connection:
    """One application connection through the tunnel.

    Attributes:
        reverse: the application has connected at the server, and the client reaches the target.
        dialled: how often the target was reached.
        outcomes: of its streams at ingress and egress; an `open` that was held back may make a second one there.
    """

    def __init__(self, number: int, upward: bytes, downward: bytes, *, refuse: bool, reverse: bool = False) -> None:
        self.number = number
        self.ingress = Application(upward)
        self.egress = Application(downward)
        self.refuse = refuse
        self.reverse = reverse
        self.dialled = 0
        self.began = 0.0
        self.outcomes: dict[Literal["ingress", "egress"], list[str]] = {"ingress": [], "egress": []}

    @property
    def ends(self) -> tuple[Application, Application]:
        return self.ingress, self.egress


# --- both ends --------------------------------------------------------------------------------------------------------


class PendingDial:
    """A dial under way, of the client to the server or of the server to a target; the test says how it ends."""

    def __init__(self, connection: Connection | None) -> None:
        self.connection = connection
        self.fails = False
        self.over = MemoryEvent()


class NamedSocket(MemorySocket):
    def getpeername(self) -> tuple[str, int]:
        return "192.0.2.1", 1


class World:
    """Both ends, the links between them, the applications around them. Make it inside of `installed`.

    Args:
        seed: of everything that happens by chance.
        idle_links: that the client keeps.
        resume_window: that it asks for, in seconds.
        reverse: the client has a reverse forward, a dynamic one: so each connection may have a target of its own.
        trace: say every step.
    """

    current: World

    def __init__(
        self,
        seed: int = 0,
        *,
        idle_links: int = 0,
        resume_window: int = 300,
        reverse: bool = False,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        World.current = self
        self.reverse = reverse
        self.chance = random.Random(seed)
        self.trace = trace
        self.steps = 0
        self._ids = 0
        self._marks: dict[Any, tuple[int, ...]] = {}
        self.connections: list[Connection] = []
        self.wires: list[Wire] = []  # those of which an end is open, and a while longer
        self.all_wires: list[Wire] = []
        self.dials: list[PendingDial] = []
        self.unreachable = False  # the server
        self.reactors: dict[Side, ModelReactor] = {"client": ModelReactor(), "server": ModelReactor()}
        self.trio = MemoryTrio(lambda: self.reactors["client"].now)
        self.server = Server(
            ServerConfig(
                state_dir=Path("/nonexistent"), max_resume_window=resume_window or 300,
                allow_listen=(parse_listen_rule("*:*"),),
            ),
            self.reactors["server"], MemoryNursery(self.trio), [], None,
        )  # type: ignore[arg-type]  # fmt: skip
        self.client = ClientSession(
            self, self.reactors["client"],
            idle_links=idle_links, resume_window=resume_window, random_float=self.chance.random,
            reverse=ReverseForwards(parse_reverse("1080") if reverse else ()),
        )  # type: ignore[arg-type]  # fmt: skip
        self.client.egress = egress.Egress(self.reactors["client"], MemoryNursery(self.trio))  # type: ignore[arg-type]
        self.url = SimpleNamespace(authority="server")  # of the dialler, which this is
        self.trio.spawn(self.client.keep_links())
        self.trio.spawn(client_module._sweep(self.client))
        self.trio.spawn(self.server.sweep_forever())
        self.after()

    # --- what stands in for the system ----------------------------------------------------------------------------

    def token(self, _size: int) -> str:
        """An id: 22 characters, never the same."""
        self._ids += 1
        return f"{self._ids:022d}"

    async def dial(self) -> tuple[Any, bytes]:
        """The client's dialler: TCP and HTTP to the server."""
        pending = PendingDial(None)
        self.dials.append(pending)
        await pending.over.wait()
        if pending.fails or self.unreachable:
            raise NetworkError("tcp", "no route")
        wire = Wire()
        self.wires.append(wire)
        self.all_wires.append(wire)
        link = Link(LinkProtocol("server"), self.server, peer="client", now=self.reactors["server"].now)
        self.server._greeting[link] = "alice"
        link.start(self.reactors["server"], wire.far)  # type: ignore[arg-type]
        return wire.near, b""

    def failed(self, _error: Exception) -> None:
        """The client's dialler has but one server."""

    async def dial_target(
        self, target: Target, _policy: object, *, limiter: object, sources: object, begun: None
    ) -> tuple[Any, str]:
        """The egress's: to the target."""
        connection = self.connections[target.port - 1]
        pending = PendingDial(connection)
        self.dials.append(pending)
        try:
            await pending.over.wait()
        finally:
            if pending in self.dials:
                self.dials.remove(pending)
        if connection.refuse:
            raise StreamError("refused", "connection refused")
        connection.dialled += 1
        near, far = MemorySocket.pair()
        connection.egress.sock = near
        near.incoming.room = 8
        return far, "192.0.2.9:1"

    def end_dial(self, pending: PendingDial, fails: bool) -> None:
        self.dials.remove(pending)
        pending.fails = fails
        pending.over.set()

    def stream_ended(self, session: Session, stream: Stream) -> None:
        side: Side = "client" if session is self.client else "server"
        connection = self.connections[int(stream.target.rpartition(":")[2]) - 1]
        assert stream.outcome is not None
        outcome = stream.outcome[0]
        end: Literal["ingress", "egress"] = "egress" if stream.state.egress else "ingress"
        connection.outcomes[end].append("repeated" if "used before" in stream.outcome[1] else outcome)
        (connection.egress if stream.state.egress else connection.ingress).ended |= outcome != "forbidden"
        if self.trace:
            self.trace(f"       {side} stream {stream.state.id} of connection {connection.number}: {stream.outcome}")

    # --- what can happen ------------------------------------------------------------------------------------------

    def open(
        self,
        upward: bytes,
        downward: bytes,
        *,
        refuse: bool = False,
        echo: bool = False,
        room: int = 8,
        reverse: bool = False,
    ) -> Connection:
        """An application connects at the client; or if `reverse` at the server, where there is a session for it."""
        session = next(iter(self.server._sessions.values()), None) if reverse else None
        reverse = session is not None and bool(session.reverse)
        connection = Connection(len(self.connections), upward, downward, refuse=refuse, reverse=reverse)
        connection.egress.echo = echo
        connection.began = self.reactors["client"].now
        self.connections.append(connection)
        near, far = NamedSocket.pair()
        connection.ingress.sock = near
        near.incoming.room = room
        target = Target("tcp", "db", connection.number + 1, "")
        if reverse:
            assert session is not None
            session.ingress.accepted(Wanted(str(target), "192.0.2.1:1", far, forward="1"))  # type: ignore[arg-type]
        else:
            self.client.accepted(far, Forward("127.0.0.1", 1, target))  # type: ignore[arg-type]
        self.after()
        return connection

    def turns(self, side: Side) -> list[Move]:
        reactor = self.reactors[side]
        return [(reactor.turn, handler) for handler in reactor.ready()]

    def carries(self, size: int, *, slow: bool = True) -> list[Move]:
        return [move for wire in self.wires if slow or not wire.slow for move in wire.moves(size)]

    def answers(self) -> list[Move]:
        return [(self.end_dial, pending, False) for pending in self.dials]

    def application_moves(self, size: int) -> list[Move]:
        applications = [application for connection in self.connections for application in connection.ends]
        return [move for application in applications for move in application.moves(size)]

    def moves(self, size: int) -> list[Move]:
        """Everything that can happen next without harm or waiting, moving at most `size` bytes."""
        return [
            *self.turns("client"), *self.turns("server"),
            *self.carries(size), *self.answers(), *self.application_moves(size),
        ]  # fmt: skip

    def do(self, move: Move) -> None:
        self.steps += 1
        if self.trace:
            self.trace(f"{self.steps:4} {self.reactors['client'].now:8.3f} {_told(move)}")
        for reactor in self.reactors.values():
            reactor.now += 0.0001
        move[0](*move[1:])
        self.after()

    def after(self) -> None:
        """What follows from a step at once."""
        for _ in range(100):
            self.trio.run()
            busy = False
            for reactor in self.reactors.values():
                if reactor._later:
                    busy = True
                    reactor._run_later()
            if not busy:
                return
        raise AssertionError("what was put off never ends")

    def tick(self, seconds: float) -> None:
        """Let time pass."""
        for reactor in self.reactors.values():
            reactor.advance(seconds)
        self.after()

    def sweep(self, side: Side) -> None:
        sessions = [self.client] if side == "client" else list(self.server._sessions.values())
        for session in sessions:
            session.sweep(self.reactors[side].now)
        self.after()

    def applications(self) -> list[Application]:
        """Those that may still do harm."""
        return [
            application
            for connection in self.connections
            for application in connection.ends
            if application.sock is not None and not application.sock.closed and not application.ended
        ]

    @staticmethod
    def hold(wire: Wire) -> None:
        """A proxy holds back what is on its way, and the client gives the link up."""
        assert wire.near.handler is not None
        wire.slow = True
        wire.near.handler.lose("no answer")

    def harms(self) -> list[Move]:
        """One each of what may go wrong in the network and at the ends' idea of it."""
        chance = self.chance
        result: list[Move] = []
        whole = [wire for wire in self.wires if not wire.cut]
        if whole:
            busy = [wire for wire in whole if wire.near.handler is not None and wire.near.handler.stream is not None]
            wire = chance.choice(busy if busy and chance.random() < 0.7 else whole)
            result += 2 * [(wire.break_off, chance)]
            result.append((setattr, wire, "slow", not wire.slow))
            sock = chance.choice(wire.ends)
            if sock.handler is not None and not sock.closed:  # a false alarm: what it takes for dead lives
                result += 2 * [(sock.handler.lose, "no answer")]
                result.append((sock.handler.close, 1001, "going"))
            if wire.near.handler is not None and not wire.near.closed:
                result += 2 * [(self.hold, wire)]
        unseen = [
            sock
            for wire in self.wires
            if wire.cut
            for sock in wire.ends
            if not (sock.closed or sock.reset_by_peer or sock.incoming.end_arrived)
        ]
        if unseen:
            result += 2 * [(Wire.notice, chance.choice(unseen), chance.random() < 0.5)]
        pending = [pending for pending in self.dials if pending.connection is None]
        if pending:
            result.append((self.end_dial, chance.choice(pending), True))
        return result

    # --- what must hold -------------------------------------------------------------------------------------------

    def check(self) -> None:
        """The invariants, after any step."""
        for connection in self.connections:
            for reader, writer in (connection.ends, connection.ends[::-1]):
                got = bytes(reader.read)
                assert writer.to_write.startswith(got), f"connection {connection.number}: wrong bytes"  # invariant 1
                if reader.end_seen and reader.sock is not None and not reader.sock.reset_by_peer:
                    assert writer.closed_write, f"connection {connection.number}: an end nobody sent"
                    assert len(got) == writer.written, f"connection {connection.number}: end before all bytes"
            assert connection.dialled <= 1, f"connection {connection.number} was dialled twice"  # invariant 4
        sessions: dict[Side, list[Any]] = {"client": [self.client], "server": list(self.server._sessions.values())}
        for side, all_of_them in sessions.items():
            for session in all_of_them:
                held = 0
                for stream in session.streams.values():
                    held += self._check_stream(side, stream)
                assert session.principal.budget.held == held, "what is counted is not what is held"  # invariant 3
                for link in session.links:
                    assert link.protocol._control_bytes <= 64 * 1024
                    if link.stream is not None:  # invariant 5
                        assert link.stream.link is link, "two links for one stream"
                        assert session.streams.get(link.stream.state.id) is link.stream
        for wire in self.wires:
            client, server = wire.near.handler, wire.far.handler
            if client is not None and server is not None:
                self._rising(wire, (client.protocol.n, server.protocol.n))
                # invariant 9
                one, other = (server, client) if client.protocol.role == "reverse" else (client, server)
                idle = one.protocol.state is Exchange.IDLE and one.stream is None
                assert not idle or one.protocol.n <= other.protocol.n, "who opens went on before the other end heard"

    def _rising(self, key: Any, marks: tuple[int, ...]) -> None:
        before = self._marks.get(key, marks)
        assert all(new >= old for new, old in zip(marks, before, strict=True)), f"fell from {before} to {marks}"
        self._marks[key] = marks

    def _check_stream(self, side: Side, stream: Stream) -> int:
        outbound, inbound = stream.outbound, stream.inbound
        replay, window = outbound.replay, inbound.window
        assert replay.start <= outbound.cursor <= replay.end <= outbound.limit  # invariant 2
        assert inbound.consumed <= inbound.received <= window.limit + 1
        assert len(inbound.inbox) <= window.limit - min(inbound.consumed, window.limit)  # invariant 3
        peer = self.peer(side, stream)
        if peer is not None and not outbound.discarded:
            end = replay.end + (outbound.total is not None)
            assert replay.start <= peer.inbound.consumed <= peer.inbound.received <= end
            assert outbound.limit <= peer.inbound.window.limit
        self._rising(
            (stream.state.id, side),
            (
                replay.start, outbound.limit, inbound.received, inbound.consumed, window.limit, stream.state.epoch,
                stream.state.opened,
            ),
        )  # fmt: skip
        return len(replay) + len(inbound.inbox)

    def peer(self, side: Side, stream: Stream) -> Stream | None:
        """The same stream at the other end."""
        sessions = self.server._sessions.values() if side == "client" else (self.client,)
        for session in sessions:
            found: Stream | None = session.streams.get(stream.state.id)
            if found is not None:
                return found
        return None

    # --- the end --------------------------------------------------------------------------------------------------

    def over(self) -> bool:
        """Whether no connection is left in the tunnel."""
        return (
            not self.client.streams
            and not self.client.ingress.waiting
            and not any(
                session.streams or session.ingress.waiting or session.ingress.reopening
                for session in self.server._sessions.values()
            )
        )

    def settle(self, seconds: float = CALM_SECONDS) -> None:
        """No more harm; let everything flow until no connection is left, or nothing happens for `seconds`."""
        for wire in self.wires:
            wire.slow = False
        quiet = 0.0
        rounds = 0
        while quiet <= seconds:
            rounds += 1
            assert rounds < 5000, "never quiet: a livelock"
            moved = self.flow()
            self.check()
            if moved:
                quiet = 0.0
                continue
            if self.over():
                return
            self.wires = [wire for wire in self.wires if not (wire.near.closed and wire.far.closed)]
            self.tick(0.5)
            quiet += 0.5
        left = [f"{s.target} {s.state.id.lstrip('0')}" for s in self.client.streams.values()]
        raise AssertionError(f"connections hang: {left}")

    def flow(self) -> bool:
        """Do everything that can be done now; False if there is nothing."""
        moves = self.moves(WHOLE)
        for function, *arguments in moves:
            what = arguments[0] if arguments else None
            # What one step has ended is no more there for the next.
            if not (isinstance(what, Handler) and what.sock is None) and not (
                isinstance(what, PendingDial) and what not in self.dials
            ):
                self.do((function, *arguments))
        return bool(moves)

    def finish(self) -> None:
        """After `settle`: every connection ended as it should; the client leaves, and nothing is left."""
        assert self.over()
        for connection in self.connections:
            self._check_end(connection)
        for session in (self.client, *self.server._sessions.values()):
            assert session.principal.budget.held == session.principal.streams == session.principal.detached == 0
        self.check()
        self.leave()

    def _check_end(self, connection: Connection) -> None:
        ingress, egress = connection.ends
        near = connection.outcomes["ingress"]
        far = [outcome for outcome in connection.outcomes["egress"] if outcome != "repeated"]
        name = f"connection {connection.number}: {near} {far}"
        if not near and self.reactors["client"].now - connection.began >= OPEN_WAIT_SECONDS:
            # No link came for it in time.
            assert not far and ingress.sock is not None and (ingress.aborted or ingress.sock.reset_by_peer), name
            return
        assert len(near) == 1, name
        assert len(far) <= 1, name
        if connection.refuse and not ingress.aborted:
            assert near == far == ["refused"], name
            assert ingress.sock is not None and ingress.sock.reset_by_peer, name
        elif not (ingress.aborted or egress.aborted):  # invariant 6
            assert near == far == ["finished"], name
            assert connection.dialled == 1, name
            assert ingress.end_seen and egress.end_seen, name
            assert bytes(egress.read) == ingress.to_write, name
            assert bytes(ingress.read) == egress.to_write, name
        else:
            for one, other in (connection.ends, connection.ends[::-1]):
                if one.aborted and other.sock is not None and not other.aborted:
                    whole = other.end_seen and other.closed_write
                    assert other.sock.reset_by_peer or whole, f"{name}: an abort was not passed on"

    def leave(self) -> None:
        """The client stops, and after a while the server has forgotten it."""
        self.client.stop()
        self.unreachable = True
        quiet = 0.0
        # Where `bye` has found no control link the server keeps its places for the resume window.
        patience = CALM_SECONDS + (self.client.resume_window if self.reverse else 0)
        while (self.client.links or self.server._sessions or self.server._greeting) and quiet < patience:
            if not self.flow():
                self.tick(0.5)
                quiet += 0.5
        assert not self.client.links
        assert not self.server._sessions and not self.server._greeting
        for reactor in self.reactors.values():
            assert not reactor.handlers, "sockets are left"
        self.tick(3601.0)
        for principal in self.server._principals.values():
            assert not len(principal.tombstones), "tombstones are left"
            assert not principal.links and not principal.sessions
        assert not self.server._crowd.count
        # keep_links and its child, the two sweeps; and dials, which end with the client
        assert len(self.trio.tasks) - len(self.dials) <= 4, "tasks are left"

    def close(self) -> None:
        self.trio.close()


def _told(move: Move) -> str:
    owner = getattr(move[0], "__self__", None)
    return f"{type(owner).__name__ if owner else ''}.{move[0].__name__} {move[1:]}"


# --- putting it in place ----------------------------------------------------------------------------------------------


class FaultError(AssertionError):
    """What must never happen in the product's own code."""


def _fail(handler: object, error: Exception) -> None:
    raise FaultError(f"fault in {type(handler).__name__}: {error!r}") from error


_FINE = ("was not answered", "in time")
_close = Link.close


def _close_link(link: Link, code: int, reason: str = "") -> None:
    if code not in (1000, 1001) and not any(text in reason for text in _FINE):
        raise FaultError(f"protocol error at the {link.protocol.side}: {reason}")
    _close(link, code, reason)


@contextmanager
def installed() -> Iterator[None]:
    """Put the model's clock, randomness and targets in the place of the system's."""
    ended, begun = Session.stream_ended, Session.__init__

    def stream_ended(session: Session, stream: Stream) -> None:
        ended(session, stream)
        World.current.stream_ended(session, stream)

    def begin(session: Session, *args: Any) -> None:
        begun(session, *args)
        session.links = OrderedSet()  # type: ignore[assignment]

    class Trio:
        def __getattr__(self, name: str) -> Any:
            return getattr(World.current.trio, name)

    class Secrets:
        @staticmethod
        def token_urlsafe(size: int) -> str:
            return World.current.token(size)

        @staticmethod
        def token_bytes(size: int) -> bytes:
            return (bytes(range(1, 256)) * (size // 255 + 1))[:size]

    async def dial_target(*args: Any, **options: Any) -> tuple[Any, str]:
        return await World.current.dial_target(*args, **options)

    stand_ins = {
        "trio": Trio(),
        "secrets": Secrets,
        "begin_dial": lambda *_: None,
        "dial_target": dial_target,
        "listen": lambda *_: [],  # who connects is put where a listener would put it
        "boottime": lambda: World.current.reactors["client"].now,
    }
    logger = logging.getLogger("wstunnel")
    level = logger.level
    with ExitStack() as stack:
        for module in (client_module, client_session, egress, ingress, reverse_server, server, server_session):
            for name, stand_in in stand_ins.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, stand_in))
        for owner, name, value in (
            (Session, "window", WINDOW),
            (Session, "stream_ended", stream_ended),
            (Session, "__init__", begin),
            (Link, "fail", _fail),
            (Stream, "fail", _fail),
            (Link, "close", _close_link),
            (sockets, "unsent", lambda sock: len(sock.outgoing.sent)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


# --- random schedules -------------------------------------------------------------------------------------------------


def run(seed: int, *, harm: bool = True, aborts: bool = True, trace: Callable[[str], None] | None = None) -> World:
    """One random schedule, to its end; the seed is all that it depends on."""
    with_trace = trace is not None
    world = World(seed, idle_links=seed % 3, reverse=seed % 5 == 4, trace=trace)
    chance = world.chance
    to_open = chance.randint(1, 4)
    aborts = aborts and seed % 2 == 0  # half of all are about what must not fail without an application's fault
    rate = chance.choice([0.02, 0.05, 0.095]) if harm else 0.0
    random_float = chance.random
    if chance.random() < 0.5:  # links are there before the first connection
        for _ in range(12):
            world.flow()
    for step in range(chance.randint(120, 400)):
        what = random_float()
        size = chance.randint(1, 60)
        if len(world.connections) < to_open and (step == 0 or what < 0.02):
            sizes = [chance.choice([0, 1, 5, WINDOW, 40, 90]) for _ in range(2)]
            up, down = (chance.randbytes(size) for size in sizes)
            refuse, echo = random_float() < 0.12, random_float() < 0.2
            reverse = world.reverse and random_float() < 0.7
            connection = world.open(
                up, b"" if echo else down, refuse=refuse, echo=echo, room=chance.randint(1, 40), reverse=reverse
            )
            if random_float() < 0.3:  # asks, and says at once that this was all
                connection.ingress.write(WHOLE)
                connection.ingress.close_write()
            continue
        if what < 0.4:
            moves = world.turns(chance.choice(("client", "server")))
        elif what < 0.68:
            moves = world.carries(size, slow=random_float() < 0.04)
        elif what < 0.8:
            moves = world.application_moves(size)
        elif what < 0.87:
            moves = world.answers()
        elif what < 0.89:
            moves = [(world.tick, chance.choice((0.01, 0.1, 0.3, 1.1, 1.1, 4.0)))]
        elif what < 0.9:
            moves = [(world.sweep, chance.choice(("client", "server")))]
        elif what < 0.9 + rate:
            moves = world.harms()
        elif aborts and what > 0.995:
            moves = [(application.abort,) for application in world.applications()]
        else:
            continue
        moves = moves or world.turns("client") or world.turns("server") or world.carries(size, slow=False)
        if moves:
            world.do(chance.choice(moves))
            if not step % 6:
                world.check()
    if with_trace:
        world.trace("-- calm")  # type: ignore[misc]
    for wire in world.wires:
        if wire.cut and random_float() < 0.7:
            for sock in wire.ends:
                if not sock.closed:
                    Wire.notice(sock, random_float() < 0.5)
    world.settle()
    world.finish()
    world.close()
    return world


def main(seed: int) -> None:
    """Replay one seed, with a trace on stdout."""
    receive = LinkProtocol._apply

    def told(protocol: LinkProtocol, message: Any) -> bool:
        numbers = [index for index, wire in enumerate(World.current.all_wires) if protocol in wire.protocols()]
        print(f"       {protocol.side} link {numbers} gets {message}")
        return receive(protocol, message)

    with installed(), mock.patch.object(LinkProtocol, "_apply", told):
        run(seed, trace=print)


if __name__ == "__main__":
    main(int(sys.argv[1]))
