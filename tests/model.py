"""Two ends of the tunnel in memory: the product's sessions, links and streams, with memory sockets between them.

Nothing moves by itself. `World.actions()` lists what can happen next; a test picks. After each step `World.check()`
holds the invariants of docs/reference/protocol.md; `World.settle()` lets everything flow and `World.finish()`
checks how each connection ended.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Literal

from tests.memory import MemoryReactor, MemorySocket, Pipe
from wstunnel import logs
from wstunnel.errors import ProtocolError
from wstunnel.link import Link
from wstunnel.session import Principal, Session
from wstunnel.stream import Stream
from wstunnel.wire.credit import Budget
from wstunnel.wire.frames import MaskKeys
from wstunnel.wire.messages import VERSION, AnyMessage, Hello, Open, Welcome
from wstunnel.wire.protocol import LinkProtocol
from wstunnel.wire.states import Exchange

WINDOW = 16  # bytes: so small that credit always bites
SEND_QUEUE = 4096
Side = Literal["client", "server"]


class Application:
    """What stands at one end of a tunnelled connection."""

    def __init__(self, to_write: bytes) -> None:
        self.to_write = to_write
        self.written = 0
        self.read = bytearray()
        self.stalled = False  # does not read
        self.echo = False  # write what was read; stop reading while it cannot be written
        self.end_seen = False
        self.reset_seen = False
        self.aborted = False
        self.closed_write = False
        self.sock: MemorySocket | None = None

    def write(self, size: int) -> None:
        assert self.sock is not None
        piece = self.to_write[self.written : self.written + size]
        self.sock.send(piece)
        self.sock.outgoing.move(len(piece))
        self.written += len(piece)

    def close_write(self) -> None:
        assert self.sock is not None
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


class Connection:
    """One application connection through the tunnel."""

    def __init__(self, number: int, upward: bytes, downward: bytes, *, refuse: bool) -> None:
        self.number = number
        self.ingress = Application(upward)
        self.egress = Application(downward)
        self.refuse = refuse
        self.dialled = 0
        self.outcomes: dict[Side, tuple[str, str]] = {}


class ModelSession(Session):
    """A session whose dials are steps of the test."""

    window = WINDOW

    def __init__(self, world: World, side: Side) -> None:
        self.world = world
        self.side: Side = side
        budget = Budget(1 << 30)
        super().__init__("s" * 22, Principal(side, budget, {}), world.reactors[side], logs.logger("model"))  # type: ignore[arg-type]
        self.idle_links: list[Link] = []

    def message(self, link: Link, message: AnyMessage) -> None:
        if isinstance(message, Hello):
            link.protocol.send(Welcome(version=VERSION, server="v" * 22, boot="b" * 22))
        elif isinstance(message, Open):
            if message.stream in self.principal.tombstones or message.stream in self.streams:
                raise ProtocolError("open of a known id")
            stream = self.make_stream(message.stream, egress=True, target=message.target, peer=message.peer)
            stream.link = link
            link.attach(stream)
            link.protocol.accept(stream.state)
            self.world.dials.append((stream, self.world.connections[int(message.target)]))
        elif not isinstance(message, Welcome):
            super().message(link, message)

    def idle(self, link: Link) -> None:
        if self.side == "client":
            self.idle_links.append(link)

    def lost(self, link: Link, reason: str) -> None:
        super().lost(link, reason)
        self.world.lost.append(reason)
        if link in self.idle_links:
            self.idle_links.remove(link)

    def stream_ended(self, stream: Stream) -> None:
        assert stream.outcome is not None
        self.world.connections[int(stream.target)].outcomes[self.side] = stream.outcome
        super().stream_ended(stream)


class World:
    """Both ends, the links between them, the applications around them."""

    def __init__(self) -> None:
        self.reactors: dict[Side, MemoryReactor] = {"client": MemoryReactor(), "server": MemoryReactor()}
        self.sessions: dict[Side, ModelSession] = {
            "client": ModelSession(self, "client"),
            "server": ModelSession(self, "server"),
        }
        self.connections: list[Connection] = []
        self.dials: list[tuple[Stream, Connection]] = []
        self.pipes: list[Pipe] = []
        self.links: list[tuple[Link, Link]] = []
        self.lost: list[str] = []
        self._keys = 0
        self._marks: dict[tuple[str, str], tuple[int, ...]] = {}

    def _random(self, size: int) -> bytes:
        self._keys += 1
        return bytes((self._keys * 31 + i * 7) & 255 for i in range(size))

    # --- what can happen ----------------------------------------------------------------------------------------------

    def add_link(self) -> None:
        near, far = MemorySocket.pair()
        for pipe in (near.incoming, near.outgoing):
            pipe.room = SEND_QUEUE
            self.pipes.append(pipe)
        keys = MaskKeys(self._random)
        client = Link(
            LinkProtocol("client", keys=keys, role="forward"), self.sessions["client"], peer="server", now=0.0
        )
        server = Link(LinkProtocol("server"), self.sessions["server"], peer="client", now=0.0)
        self.sessions["client"].adopt_link(client)
        self.sessions["server"].adopt_link(server)
        client.protocol.send(Hello(version=VERSION, session="s" * 22, role="forward"))
        client.start(self.reactors["client"], near)  # type: ignore[arg-type]
        server.start(self.reactors["server"], far)  # type: ignore[arg-type]
        self.sessions["client"].idle_links.append(client)
        self.links.append((client, server))

    def open(
        self, upward: bytes, downward: bytes, *, refuse: bool = False, echo: bool = False, room: int = 8
    ) -> Connection:
        """An application connects at the client: a stream on an idle link (a new one if there is none)."""
        session = self.sessions["client"]
        if not session.idle_links:
            self.add_link()
        link = session.idle_links.pop()
        connection = Connection(len(self.connections), upward, downward, refuse=refuse)
        connection.egress.echo = echo
        self.connections.append(connection)
        near, far = MemorySocket.pair()
        connection.ingress.sock = near
        near.incoming.room = room
        number = base64.urlsafe_b64encode(connection.number.to_bytes(16, "big")).decode()[:22]
        stream = session.make_stream(number, egress=False, target=str(connection.number), peer="")
        stream.link = link
        link.attach(stream)
        link.open(stream.state, target=str(connection.number), peer="")
        stream.start(self.reactors["client"], far)  # type: ignore[arg-type]
        link.flush()
        return connection

    def dial(self, index: int, room: int = 8) -> None:
        """A dial at the server ends, in success or refusal."""
        stream, connection = self.dials.pop(index)
        if stream.outcome is not None or stream.reason is not None:
            return
        if connection.refuse:
            stream.reset("refused", "connection refused")
            return
        connection.dialled += 1
        near, far = MemorySocket.pair()
        connection.egress.sock = near
        near.incoming.room = room
        stream.connected(self.reactors["server"], far, "address")  # type: ignore[arg-type]

    def sweep(self, side: Side) -> None:
        # Little time: here it is the test that is slow, not the network, and no link is to be given up.
        self.reactors[side].now += 0.001
        self.sessions[side].sweep(self.reactors[side].now)

    def applications(self) -> list[Application]:
        return [
            application
            for connection in self.connections
            for application in (connection.ingress, connection.egress)
            if application.sock is not None and not application.sock.closed
        ]

    def actions(self, size: int) -> list[Callable[[], None]]:
        """Everything that can happen next, moving at most `size` bytes."""
        result: list[Callable[[], None]] = []
        for reactor in self.reactors.values():
            result += [lambda r=reactor, h=handler: r.turn(h) for handler in reactor.ready()]  # type: ignore[misc]
        for pipe in self.pipes:
            if pipe.sent or (pipe.ended and not pipe.end_arrived):
                result.append(lambda p=pipe: self._carry(p, size))  # type: ignore[misc]
        result += [lambda i=index: self.dial(i) for index in range(len(self.dials))]  # type: ignore[misc]
        for application in self.applications():
            result += self._application(application, size)
        return result

    @staticmethod
    def _carry(pipe: Pipe, size: int) -> None:
        before = len(pipe.sent)
        pipe.move(size)
        assert pipe.room is not None
        pipe.room += before - len(pipe.sent)

    @staticmethod
    def _application(application: Application, size: int) -> list[Callable[[], None]]:
        result: list[Callable[[], None]] = []
        sock = application.sock
        assert sock is not None
        if sock.reset_by_peer:
            application.reset_seen = True
        if application.echo:
            application.to_write = bytes(application.read)
        can_write = application.written < len(application.to_write) and not sock.reset_by_peer
        if can_write:
            result.append(lambda: application.write(size))
        elif not application.closed_write and not sock.reset_by_peer and (not application.echo or application.end_seen):
            result.append(application.close_write)
        pipe = sock.incoming
        readable = pipe.sent or (pipe.ended and not application.end_seen)
        if readable and not application.stalled and not (application.echo and can_write):
            result.append(lambda: application.take(size))
        return result

    # --- what must hold -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """The invariants, after any step."""
        for connection in self.connections:
            for reader, writer in ((connection.ingress, connection.egress), (connection.egress, connection.ingress)):
                got = bytes(reader.read)
                assert writer.to_write[: len(got)] == got, f"connection {connection.number}: wrong bytes"  # invariant 1
                if (
                    reader.end_seen
                    and not reader.reset_seen
                    and reader.sock is not None
                    and not reader.sock.reset_by_peer
                ):
                    assert writer.closed_write, f"connection {connection.number}: an end nobody sent"
                    assert got == writer.to_write[: writer.written], (
                        f"connection {connection.number}: end before all bytes"
                    )
            assert connection.dialled <= 1  # invariant 4
        for side, session in self.sessions.items():
            held = 0
            for stream in session.streams.values():
                held += self._check_stream(side, stream)
            assert session.principal.budget.held == held  # invariant 3: what is counted is what is held
            for link in session.links:
                assert link.protocol._control_bytes <= 64 * 1024
                if link.stream is not None:  # invariant 5
                    assert link.stream.link is link
        for client, server in self.links:  # invariant 9
            if (
                client.protocol.state is Exchange.IDLE
                and client.stream is None
                and client.protocol.n > server.protocol.n
            ):
                raise AssertionError("the client went on before the server heard of the exchange")

    def _check_stream(self, side: Side, stream: Stream) -> int:
        outbound, inbound = stream.outbound, stream.inbound
        end = outbound.replay.end + (outbound.total is not None and outbound.state.value != "open")
        peer = self.sessions["server" if side == "client" else "client"].streams.get(stream.state.id)
        assert outbound.replay.start <= outbound.cursor <= outbound.replay.end <= outbound.limit  # invariant 2
        assert inbound.consumed <= inbound.received <= inbound.window.limit + 1
        assert len(inbound.inbox) <= inbound.window.limit - min(inbound.consumed, inbound.window.limit)  # invariant 3
        if peer is not None:
            assert outbound.replay.start <= peer.inbound.consumed <= peer.inbound.received <= end
            assert outbound.limit <= peer.inbound.window.limit
        marks = (
            outbound.replay.start,
            outbound.cursor,
            outbound.limit,
            inbound.received,
            inbound.consumed,
            inbound.window.limit,
        )
        before = self._marks.get((stream.state.id, side), marks)
        assert all(new >= old for new, old in zip(marks, before, strict=True)), "an offset fell"
        self._marks[stream.state.id, side] = marks
        return len(outbound.replay) + len(inbound.inbox)

    def settle(self, steps: int = 200_000) -> None:
        """Let everything flow until nothing can happen any more; the sweep is needed for acks that were put off."""
        quiet = 0
        for _ in range(steps):
            actions = self.actions(1 << 20)
            if actions:
                quiet = 0
                for action in actions[:1]:
                    action()
                    self.check()
            else:
                quiet += 1
                if quiet > 3:
                    return
                for side in self.sessions:
                    self.sweep(side)
        raise AssertionError("never quiet: a livelock")

    def finish(self) -> None:
        """After `settle`: every connection ended as it should, and nothing is left."""
        for connection in self.connections:
            ingress, egress = connection.ingress, connection.egress
            outcomes = {side: outcome[0] for side, outcome in connection.outcomes.items()}
            assert set(outcomes) == {"client", "server"}, (
                f"connection {connection.number} hangs: {outcomes}, lost: {self.lost}"
            )
            if connection.refuse and not ingress.aborted:
                assert outcomes == {"client": "refused", "server": "refused"}
                assert ingress.sock is not None and ingress.sock.reset_by_peer
            elif not (ingress.aborted or egress.aborted or connection.refuse):
                assert outcomes == {"client": "finished", "server": "finished"}, outcomes
                assert ingress.end_seen and egress.end_seen
                assert bytes(egress.read) == ingress.to_write
                assert bytes(ingress.read) == egress.to_write
            else:
                for one, other in ((ingress, egress), (egress, ingress)):
                    if one.aborted and other.sock is not None and not other.aborted:
                        whole = other.end_seen and other.closed_write
                        assert other.sock.reset_by_peer or whole, (
                            f"connection {connection.number}: an abort was not passed on"
                        )
        assert not self.lost, f"links were lost: {self.lost}"
        for side, session in self.sessions.items():
            assert not session.streams
            assert session.principal.budget.held == 0
            assert all(link.protocol.state is Exchange.IDLE for link in session.links), side
            assert set(self.reactors[side].handlers) == session.links
