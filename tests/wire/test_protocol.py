"""wire/protocol.py: two ends and the bytes between them, and every message in every state."""

from __future__ import annotations

import json
import random
import typing
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wstunnel.errors import ProtocolError, StreamError
from wstunnel.limits import CONTROL_QUEUE_BYTES, KIB, MESSAGE_BYTES, WINDOW_FIRST
from wstunnel.wire import messages
from wstunnel.wire.credit import Budget
from wstunnel.wire.frames import FrameDecoder, MaskKeys, Opcode, encode_close, encode_frame, encode_pair, parse_close
from wstunnel.wire.messages import (
    Ack,
    AnyMessage,
    Bye,
    Detached,
    Drain,
    Eof,
    Gone,
    Hello,
    LinkRole,
    Listen,
    Listening,
    Message,
    Need,
    Open,
    Opened,
    Ping,
    Pong,
    Reset,
    Resume,
    Resumed,
    Unlisten,
    Welcome,
)
from wstunnel.wire.protocol import LinkProtocol, PeerClosed, StreamState
from wstunnel.wire.states import Exchange, Half
from wstunnel.wire.tombstones import Tombstone

Side = typing.Literal["client", "server"]
ID = "0123456789abcdefghijkA"
KEY = bytes.fromhex("37fa213d")
NOW = 1000.0
ROUND_TRIP = 0.08
PLENTY = 1 << 40
HELLO = Hello(version=1, session=ID, role="forward")
WELCOME = Welcome(version=1, server=ID, boot=ID)
reproducible = settings(derandomize=True, deadline=None)

# How the bytes of one write arrive at the other end: whole, byte by byte, and in between.
SPLITS = pytest.mark.parametrize("size", [None, 1, 7], ids=["whole", "bytes", "sevens"])


# --- one end, and a peer that may write anything --------------------------------------------------------------------


def new_keys() -> MaskKeys:
    return MaskKeys(random.Random(1).randbytes)


def new_stream(*, egress: bool, window: int = WINDOW_FIRST, budget: Budget | None = None) -> StreamState:
    return StreamState(ID, egress=egress, budget=budget or Budget(PLENTY), window=window)


def new_link(side: Side, role: LinkRole = "forward", *, greeted: bool = True) -> LinkProtocol:
    """One end, as its owner makes it; `greeted`: hello and welcome have crossed."""
    if side == "server":
        protocol = LinkProtocol("server")
        if greeted:
            feed(protocol, Hello(version=1, session=ID, role=role))
            protocol.send(WELCOME)
    else:
        protocol = LinkProtocol("client", keys=new_keys(), role=role)
        protocol.send(Hello(version=1, session=ID, role=role))
        if greeted:
            feed(protocol, WELCOME)
    pull(protocol)
    return protocol


def frame(protocol: LinkProtocol, opcode: Opcode, payload: bytes, *, fin: bool = True) -> bytes:
    """A frame as the peer of `protocol` would send it."""
    return encode_frame(opcode, payload, fin=fin, key=KEY if protocol.side == "server" else None)


def wire(protocol: LinkProtocol, *items: Message | bytes) -> bytes:
    """What the peer of `protocol` writes: messages, and bytes as binary messages."""
    return b"".join(
        frame(protocol, Opcode.BINARY, item)
        if isinstance(item, bytes)
        else frame(protocol, Opcode.TEXT, messages.encode(item))
        for item in items
    )


def receive(protocol: LinkProtocol, data: bytes, size: int | None = None) -> list[object]:
    """Let `data` arrive in pieces of `size`; payloads are copied and taken by the application at once."""
    events: list[object] = []
    for start in range(0, len(data), size or len(data)):
        for event in protocol.receive(data[start : start + (size or len(data))]):
            if isinstance(event, bytes | memoryview):
                assert protocol.stream is not None
                protocol.stream.inbound.passed(len(event))
                events.append(bytes(event))
            else:
                events.append(event)
                if isinstance(event, Open):
                    protocol.accept(new_stream(egress=True))
                elif isinstance(event, Resume):
                    answer(protocol, event)
    return events


def answer(protocol: LinkProtocol, message: Resume) -> None:
    """A server that still has the stream if the client says that it sent something; else it knows nothing of it."""
    stream = detached(egress=True, sent=b"abc")
    stream.epoch = 0
    try:
        protocol.resumed(stream, message, opened="")
    except StreamError as error:
        protocol.gone(Tombstone("reset", error.code, str(error)))


def feed(protocol: LinkProtocol, *items: Message | bytes) -> list[object]:
    return receive(protocol, wire(protocol, *items))


def refuses(protocol: LinkProtocol, data: bytes, *, code: int = 1002, size: int | None = None) -> str:
    """Assert that `data` is refused with `code`; closes as the caller of `receive` has to and returns the reason."""
    with pytest.raises(ProtocolError) as raised:
        receive(protocol, data, size)
    assert raised.value.code == code, raised.value
    protocol.close(raised.value.code, str(raised.value))
    sent = pull(protocol)
    assert [item for item in sent if isinstance(item, PeerClosed)] == [PeerClosed(code, str(raised.value))]
    assert isinstance(sent[-1], PeerClosed)
    return str(raised.value)


def read_back(side: Side, data: bytes) -> Iterator[object]:
    """What `side` wrote, read by an independent decoder: messages, payloads, (PING, …), (PONG, …), `PeerClosed`."""
    # The decoder ignores what follows a close frame; nothing may.
    assert all(first & 0x0F != Opcode.CLOSE for first, _ in list(headers(data))[:-1])
    decoder = FrameDecoder(masked=side == "client")
    left = b""
    for opcode, payload, last in decoder.feed(data):
        left += bytes(payload)
        if not last:
            continue
        whole, left = left, b""
        if opcode == Opcode.TEXT:
            yield messages.decode(whole)
        elif opcode == Opcode.BINARY:
            yield whole
        elif opcode == Opcode.CLOSE:
            yield PeerClosed(*parse_close(whole))
        else:
            yield opcode, whole
    assert not left


def headers(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The first byte and the masking key of each frame, read by hand (RFC 6455 §5.2)."""
    position = 0
    while position < len(data):
        first, second = data[position : position + 2]
        length, width = second & 0x7F, {126: 2, 127: 8}.get(second & 0x7F, 0)
        position += 2 + width
        if width:
            length = int.from_bytes(data[position - width : position], "big")
        key = data[position : position + (4 if second & 0x80 else 0)]
        yield first, key
        position += len(key) + length
    assert position == len(data)


def pull_once(protocol: LinkProtocol, size: int = 1 << 20) -> list[object]:
    data = b"".join(protocol.pull(size, NOW, ROUND_TRIP))
    return list(read_back(protocol.side, data))


def pull(protocol: LinkProtocol, size: int = 1 << 20) -> list[object]:
    """All that there is to send. Whoever writes stops at `drained`: nothing may follow."""
    sent: list[object] = []
    drained = False
    while more := pull_once(protocol, size):
        assert not drained
        drained = protocol.drained
        sent += more
    assert protocol.drained
    return sent


def open_stream(protocol: LinkProtocol, *, answered: bool = True, window: int = WINDOW_FIRST) -> StreamState:
    """Begin an exchange on an idle link, from whichever side opens on it."""
    opens = protocol.role == ("forward" if protocol.side == "client" else "reverse")
    if opens:
        stream = new_stream(egress=False, window=window)
        protocol.open(stream, target="tcp:db:5432")
        if answered:
            feed(protocol, Opened(n=protocol.n))
    else:
        stream = new_stream(egress=True, window=window)
        feed(protocol, Open(n=protocol.n + 1, stream=ID, target="tcp:db:5432"))
        protocol.accept(stream)
        if answered:
            protocol.opened("10.0.0.5:5432")
    pull(protocol)
    assert protocol.stream is stream
    assert protocol.state is Exchange.BUSY
    return stream


def ask_reset(protocol: LinkProtocol, code: str = "reset", message: str = "why") -> None:
    assert protocol.stream is not None
    assert protocol.stream.resettable()
    protocol.stream.reset_wanted = (code, message)


# --- two ends -------------------------------------------------------------------------------------------------------


class End:
    """One end with an application, driven as link.py and stream.py drive it.

    Attributes:
        reading: whether the application takes what arrives.
        read: what it took; `ended` once it was given the EOF.
        resets: codes of the resets that came.
    """

    def __init__(self, side: Side, role: LinkRole, window: int) -> None:
        self.protocol = new_link(side, role, greeted=False) if side == "client" else LinkProtocol("server")
        self.budget = Budget(PLENTY)
        self.window = window
        self.stream: StreamState | None = None
        self.reading = True
        self.read = bytearray()
        self.ended = False
        self.resets: list[str] = []
        self.events: list[object] = []

    def new_stream(self, *, egress: bool) -> StreamState:
        self.stream = new_stream(egress=egress, window=self.window, budget=self.budget)
        self.read.clear()
        self.ended = False
        return self.stream

    def open(self) -> StreamState:
        stream = self.new_stream(egress=False)
        self.protocol.open(stream, target="tcp:db:5432", forward="f", peer="127.0.0.1:9")
        return stream

    def write(self, data: bytes) -> None:
        assert self.stream is not None
        assert len(data) <= self.stream.outbound.room()
        self.stream.outbound.append(data)

    def end(self) -> None:
        assert self.stream is not None
        self.stream.outbound.end()

    def reset(self, code: str = "reset") -> None:
        assert self.stream is not None
        assert self.stream.resettable()
        self.stream.reset_wanted = (code, "")

    def take(self) -> None:
        """The application takes all that there is, and the EOF after it."""
        assert self.stream is not None
        inbound = self.stream.inbound
        while (view := inbound.waiting(1 << 20)) is not None:
            size = len(view)
            self.read += view
            view.release()
            inbound.taken(size)
        if inbound.at_end():
            inbound.end_delivered()
            self.ended = True

    def dialled(self) -> str | None:
        """At the egress, once the target was reached: its address."""
        assert self.stream is not None
        return "10.0.0.5:5432" if self.stream.egress and self.stream.opened else None

    def resume(self) -> None:
        """The client goes on with its stream."""
        assert self.stream is not None
        self.stream.epoch += 1
        self.protocol.resume(self.stream, opened=self.dialled())

    def answer(self, message: Resume) -> None:
        """The server goes on with it, or says why not."""
        assert self.stream is not None
        try:
            self.protocol.resumed(self.stream, message, opened=self.dialled())
        except StreamError as error:
            self.protocol.gone(Tombstone("reset", error.code, str(error)))

    def arrive(self, data: bytes) -> None:
        for event in self.protocol.receive(data):
            if isinstance(event, bytes | memoryview):
                assert self.stream is not None
                assert self.protocol.stream is self.stream
                self.stream.inbound.store(event)
            elif isinstance(event, Open):
                self.events.append(event)
                self.protocol.accept(self.new_stream(egress=True))
            else:
                self.events.append(event)
                if isinstance(event, Hello):
                    self.protocol.send(WELCOME)
                elif isinstance(event, Reset):
                    self.resets.append(event.code)
                elif isinstance(event, Resume):
                    self.answer(event)
            if self.stream is not None and self.reading and self.protocol.stream is self.stream:
                self.take()


class Pair:
    """A client and a server, and a list of bytes each way between them.

    Args:
        size: how many bytes arrive at once; None: all that were written.
        role: of the link.
        window: first window, in bytes.
    """

    def __init__(self, size: int | None = None, role: LinkRole = "forward", *, window: int = WINDOW_FIRST) -> None:
        self.size = size
        self.client = End("client", role, window)
        self.client.protocol = LinkProtocol("client", keys=new_keys(), role=role)
        self.client.protocol.send(Hello(version=1, session=ID, role=role))
        self.server = End("server", role, window)
        self.ingress, self.egress = (self.client, self.server) if role != "reverse" else (self.server, self.client)
        self.under_way: dict[End, list[bytes]] = {self.client: [], self.server: []}
        self.sent: dict[End, bytearray] = {self.client: bytearray(), self.server: bytearray()}

    def write(self, end: End, size: int = 1 << 20) -> bool:
        """`end` writes once; True if it had something to write."""
        data = b"".join(end.protocol.pull(size, NOW, ROUND_TRIP))
        assert not (end.protocol.drained and end.protocol.pull(size, NOW, ROUND_TRIP))
        self.sent[end] += data
        step = self.size or len(data)
        self.under_way[end] += [data[start : start + step] for start in range(0, len(data), step or 1)]
        return bool(data)

    def arrive(self, end: End, pieces: int | None = None) -> bool:
        """What is under way to `end` arrives; True if there was something."""
        peer = self.server if end is self.client else self.client
        queue = self.under_way[peer]
        count = len(queue) if pieces is None else min(pieces, len(queue))
        for data in queue[:count]:
            end.arrive(data)
        del queue[:count]
        return bool(count)

    def run(self) -> None:
        """Until neither has anything to write and nothing is under way."""
        moved = True
        while moved:
            moved = False
            for end in (self.client, self.server):
                moved |= self.write(end)
                moved |= self.arrive(end, 1 if self.size else None)

    def open(self) -> None:
        """A stream, reached."""
        self.run()
        self.ingress.open()
        self.run()
        self.egress.protocol.opened("10.0.0.5:5432")
        self.run()

    def cut(self) -> None:
        """The link is lost with all that is under way. Both ends detach; another link is there, and has greeted."""
        for end in (self.client, self.server):
            assert end.stream is not None
            end.stream.link_lost()
            end.protocol = new_link("client" if end is self.client else "server")
            self.under_way[end].clear()
            self.sent[end].clear()

    def resume(self) -> None:
        self.client.resume()
        self.run()

    def texts(self, end: End) -> list[object]:
        """The messages that `end` sent so far."""
        return [item for item in read_back(end.protocol.side, bytes(self.sent[end])) if not isinstance(item, bytes)]

    def assert_idle(self, n: int) -> None:
        for end in (self.client, self.server):
            assert end.protocol.state is Exchange.IDLE
            assert end.protocol.n == n
            assert end.protocol.stream is None


# --- tests ----------------------------------------------------------------------------------------------------------


class TestGreeting:
    @SPLITS
    def test_hello_and_welcome(self, size: int | None) -> None:
        pair = Pair(size, "control")
        assert pair.client.protocol.state is pair.server.protocol.state is Exchange.NEW
        pair.run()
        assert pair.server.events == [Hello(version=1, session=ID, role="control")]
        assert pair.client.events == [WELCOME]
        assert pair.client.protocol.greeted
        assert pair.server.protocol.greeted
        assert pair.server.protocol.role == "control"
        pair.assert_idle(0)

    @SPLITS
    def test_the_client_may_open_and_send_before_welcome(self, size: int | None) -> None:
        """hello, open and early data in one write, and their end too."""
        pair = Pair(size)
        pair.client.open()
        pair.client.write(b"early")
        pair.client.end()
        assert pair.client.protocol.state is Exchange.BUSY
        pair.run()
        assert pair.server.read == b"early"
        assert pair.server.ended
        assert pair.client.events == [WELCOME, Ack(n=1, consumed=6, limit=6 + WINDOW_FIRST)]
        pair.server.protocol.opened("")
        pair.server.end()
        pair.run()
        pair.assert_idle(1)

    def test_a_reset_before_welcome(self) -> None:
        pair = Pair()
        pair.client.open()
        pair.client.reset("idle")
        pair.run()
        assert pair.server.resets == pair.client.resets == ["idle"]
        pair.assert_idle(1)

    def test_data_and_messages_before_welcome(self) -> None:
        protocol = new_link("client", greeted=False)
        protocol.open(new_stream(egress=False))
        assert refuses(protocol, wire(protocol, b"x")) == "data before opened"
        protocol = new_link("client", greeted=False)
        protocol.open(new_stream(egress=False))
        assert refuses(protocol, wire(protocol, Opened(n=1))) == "opened before the greeting"

    def test_pings_of_rfc_6455_are_answered_before_the_greeting(self) -> None:
        protocol = new_link("server", greeted=False)
        assert receive(protocol, frame(protocol, Opcode.PING, b"a")) == []
        assert pull(protocol) == [(Opcode.PONG, b"a")]


class TestWhoOpensWhere:
    """Only the client opens on `forward` links, only the server on `reverse` links."""

    @pytest.mark.parametrize("side", ["client", "server"])
    @pytest.mark.parametrize("role", ["control", "forward", "reverse"])
    def test_open(self, side: Side, role: LinkRole) -> None:
        protocol = new_link(side, role)
        message = Open(n=1, stream=ID, target="tcp:db:5432")
        if (side, role) in (("server", "forward"), ("client", "reverse")):
            assert feed(protocol, message) == [message]
            assert (protocol.state, protocol.n) == (Exchange.BUSY, 1)
        else:
            assert refuses(protocol, wire(protocol, message)) == f"open from the wrong side of a {role} link"

    @SPLITS
    @pytest.mark.parametrize("role", ["forward", "reverse"])
    def test_a_stream_each_way(self, size: int | None, role: LinkRole) -> None:
        pair = Pair(size, role)
        pair.open()
        opened = Open(n=1, stream=ID, target="tcp:db:5432", forward="f", peer="127.0.0.1:9")
        assert opened in pair.egress.events
        assert Opened(n=1, address="10.0.0.5:5432") in pair.ingress.events
        pair.ingress.write(b"question")
        pair.ingress.end()
        pair.run()
        assert (pair.egress.read, pair.egress.ended) == (b"question", True)
        pair.egress.write(b"answer")
        pair.egress.end()
        pair.run()
        assert (pair.ingress.read, pair.ingress.ended) == (b"answer", True)
        pair.assert_idle(1)

    @pytest.mark.parametrize("side", ["client", "server"])
    @pytest.mark.parametrize("role", ["control", "forward", "reverse"])
    def test_bye(self, side: Side, role: LinkRole) -> None:
        protocol = new_link(side, role)
        if (side, role) == ("server", "control"):
            assert feed(protocol, Bye()) == [Bye()]
        else:
            assert refuses(protocol, wire(protocol, Bye())) == "bye not from a client on its control link"


# Invariant 10: any message in any state has a defined effect, or is 1002 on that link alone.

SECOND = 2  # the `n` that the links below are at


def idle(side: Side, role: LinkRole) -> LinkProtocol:
    """An idle link after two exchanges (none on control links)."""
    protocol = new_link(side, role)
    if role != "control":
        for _ in range(SECOND):
            open_stream(protocol)
            feed(protocol, Reset(n=protocol.n, code="reset"))
            pull(protocol)
    return protocol


def busy(side: Side, role: LinkRole, *, answered: bool) -> LinkProtocol:
    """In the second exchange; either way the sender may go up to 1000 and has sent 3 bytes."""
    protocol = new_link(side, role)
    open_stream(protocol)
    feed(protocol, Reset(n=1, code="reset"))
    pull(protocol)
    stream = open_stream(protocol, answered=answered)
    stream.outbound.append(b"abc")
    pull(protocol)
    return protocol


def resetting(side: Side, role: LinkRole) -> LinkProtocol:
    protocol = busy(side, role, answered=True)
    ask_reset(protocol)
    pull(protocol)
    assert protocol.state is Exchange.RESETTING
    return protocol


def early(*, reset: bool) -> LinkProtocol:
    """A client that opened before `welcome`."""
    protocol = new_link("client", greeted=False)
    protocol.n = SECOND - 1
    protocol.open(new_stream(egress=False))
    if reset:
        ask_reset(protocol)
    pull(protocol)
    return protocol


def resuming() -> LinkProtocol:
    """A client that asked to go on with a stream, in the link's second exchange."""
    protocol = new_link("client", "forward")
    open_stream(protocol)
    feed(protocol, Reset(n=1, code="reset"))
    pull(protocol)
    protocol.resume(detached(sent=b"abc"), opened=None)
    assert [type(item) for item in pull(protocol)] == [Resume]
    return protocol


def detached(*, egress: bool = False, sent: bytes = b"", queued: bytes = b"", ended: bool = False) -> StreamState:
    """A stream that lost its link: `sent` was on it, `queued` was not."""
    stream = new_stream(egress=egress)
    stream.opened = True
    if sent:
        stream.outbound.append(sent)
        stream.outbound.take(len(sent))
    if queued:
        stream.outbound.append(queued)
    if ended:
        stream.outbound.end()
        if stream.outbound.eof_due():
            stream.outbound.eof_sent()
    stream.link_lost()
    stream.epoch = 1
    return stream


PINGS = {Ping, Pong}
# name: (how it comes about, messages that are events, messages that are dropped)
SCENES: dict[str, tuple[Callable[[], LinkProtocol], set[type], set[type]]] = {
    "server, new": (lambda: new_link("server", greeted=False), {Hello}, set()),
    "client, new": (lambda: new_link("client", greeted=False), {Welcome}, set()),
    "client, opened before welcome": (lambda: early(reset=False), {Welcome}, set()),
    "client, reset before welcome": (lambda: early(reset=True), {Welcome}, {bytes}),
    "server, control": (lambda: idle("server", "control"), {Bye, Gone, Listen, Unlisten} | PINGS, set()),
    "client, control": (lambda: idle("client", "control"), {Detached, Drain, Listening, Need} | PINGS, set()),
    "server, idle forward": (lambda: idle("server", "forward"), {Open, Resume} | PINGS, set()),
    "client, idle forward": (lambda: idle("client", "forward"), PINGS, set()),
    "server, idle reverse": (lambda: idle("server", "reverse"), PINGS, set()),
    "client, idle reverse": (lambda: idle("client", "reverse"), {Open} | PINGS, set()),
    "ingress, not answered": (
        lambda: busy("client", "forward", answered=False),
        {Opened, Ack, Reset} | PINGS,
        set(),
    ),
    "ingress at the server, not answered": (
        lambda: busy("server", "reverse", answered=False),
        {Opened, Ack, Reset} | PINGS,
        set(),
    ),
    "ingress": (lambda: busy("client", "forward", answered=True), {Ack, Eof, Reset, bytes} | PINGS, set()),
    "egress, dialling": (lambda: busy("server", "forward", answered=False), {Ack, Eof, Reset, bytes} | PINGS, set()),
    "egress": (lambda: busy("server", "forward", answered=True), {Ack, Eof, Reset, bytes} | PINGS, set()),
    "egress at the client": (
        lambda: busy("client", "reverse", answered=True),
        {Ack, Eof, Reset, bytes} | PINGS,
        set(),
    ),
    "client, resuming": (resuming, {Resumed, Gone} | PINGS, set()),
    "client, resetting": (lambda: resetting("client", "forward"), {Reset} | PINGS, {Opened, Ack, Eof, bytes}),
    "server, resetting": (lambda: resetting("server", "forward"), {Reset} | PINGS, {Opened, Ack, Eof, bytes}),
}
ONE_OF_EACH: list[Message | bytes] = [
    HELLO,
    WELCOME,
    Open(n=SECOND + 1, stream=ID, target="tcp:db:5432"),
    Opened(n=SECOND),
    Ack(n=SECOND, consumed=1, limit=WINDOW_FIRST),
    Eof(n=SECOND, total=0),
    Reset(n=SECOND, code="reset"),
    Resume(n=SECOND + 1, stream=ID, epoch=1, received=0, consumed=0, limit=WINDOW_FIRST),
    Resumed(n=SECOND, received=0, consumed=0, limit=WINDOW_FIRST),
    Gone(outcome="unknown", n=SECOND),
    Detached(streams=[ID]),
    Listen(forward="f", bind="127.0.0.1:80"),
    Listening(forward="f"),
    Unlisten(forward="f"),
    Need(links=1),
    Ping(number=7),
    Pong(number=7),
    Drain(deadline=30),
    Bye(),
    b"x",
]
COUNTED: list[tuple[type[Message], dict[str, object]]] = [
    (Opened, {}),
    (Ack, {"consumed": 0, "limit": WINDOW_FIRST}),
    (Eof, {"total": 0}),
    (Reset, {"code": "reset"}),
    (Resumed, {"received": 0, "consumed": 0, "limit": WINDOW_FIRST}),
]


def snapshot(protocol: LinkProtocol) -> object:
    """All that a message could change."""
    stream = protocol.stream
    of_stream = stream and (
        *(
            stream.opened,
            stream.outbound.state,
            stream.outbound.cursor,
            stream.outbound.limit,
            stream.outbound.replay.start,
        ),
        *(stream.inbound.state, stream.inbound.received, stream.inbound.consumed, stream.inbound.total),
    )
    return protocol.state, protocol.n, protocol.role, protocol.greeted, of_stream


class TestEveryMessageInEveryState:
    def test_the_list_is_whole(self) -> None:
        assert {type(message) for message in ONE_OF_EACH} == {*typing.get_args(AnyMessage), bytes}
        # Flows have theirs in test_datagrams.py.
        assert {scene().state for scene, _, _ in SCENES.values()} == set(Exchange) - {Exchange.CLOSED, Exchange.FLOW}

    @pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda message: type(message).__name__)
    @pytest.mark.parametrize("name", SCENES)
    def test_effect(self, name: str, message: Message | bytes) -> None:
        scene, events, dropped = SCENES[name]
        protocol = scene()
        before = snapshot(protocol)
        if type(message) in events:
            assert feed(protocol, message) == [message]
            assert not protocol.close_sent
        elif type(message) in dropped:
            assert feed(protocol, message) == []
            assert snapshot(protocol) == before
            assert pull(protocol) == []
        else:
            said = refuses(protocol, wire(protocol, message))
            word = "data" if isinstance(message, bytes) else type(message).__name__.lower()
            assert word in said

    @pytest.mark.parametrize(("kind", "fields"), COUNTED, ids=lambda value: getattr(value, "__name__", ""))
    @pytest.mark.parametrize("name", [name for name in SCENES if "new" not in name and "before" not in name])
    def test_counts(self, name: str, kind: type[Message], fields: dict[str, object]) -> None:
        """A message acts on its n's stream only. Lower `n`: ignored. Higher: 1002."""
        scene, _, _ = SCENES[name]
        at = scene().n
        assert at == (0 if "control" in name else SECOND)
        for n in range(1, at):
            protocol = scene()
            before = snapshot(protocol)
            assert feed(protocol, kind(n=n, **fields)) == []
            assert snapshot(protocol) == before
            assert pull(protocol) == []
        for n in (at + 1, at + 2, 2**53 - 1):
            protocol = scene()
            said = refuses(protocol, wire(protocol, kind(n=n, **fields)))
            assert said == f"{kind.__name__.lower()} for exchange {n}, the link is at {at}"

    @pytest.mark.parametrize("n", [1, SECOND, SECOND + 2, 2**53 - 1])
    @pytest.mark.parametrize("name", ["server, idle forward", "client, idle reverse"])
    def test_open_counts_one_more_than_the_last(self, name: str, n: int) -> None:
        protocol = SCENES[name][0]()
        said = refuses(protocol, wire(protocol, Open(n=n, stream=ID)))
        assert said == f"open counts {n}, expected {SECOND + 1}"

    @pytest.mark.parametrize("n", [1, SECOND, SECOND + 2, 2**53 - 1])
    def test_resume_counts_one_more_than_the_last(self, n: int) -> None:
        protocol = SCENES["server, idle forward"][0]()
        message = Resume(n=n, stream=ID, epoch=1, received=0, consumed=0, limit=WINDOW_FIRST)
        assert refuses(protocol, wire(protocol, message)) == f"resume counts {n}, expected {SECOND + 1}"

    @pytest.mark.parametrize("n", [0, 1])
    def test_a_gone_of_an_earlier_exchange_is_no_answer(self, n: int) -> None:
        protocol = resuming()
        before = snapshot(protocol)
        assert feed(protocol, Gone(n=n, outcome="unknown")) == []
        assert snapshot(protocol) == before
        assert pull(protocol) == []

    @pytest.mark.parametrize("n", [SECOND + 1, 2**53 - 1])
    def test_a_gone_of_a_later_exchange(self, n: int) -> None:
        protocol = resuming()
        said = refuses(protocol, wire(protocol, Gone(n=n, outcome="unknown")))
        assert said == f"gone for exchange {n}, the link is at {SECOND}"

    @pytest.mark.parametrize("message", [Detached(streams=[ID]), Drain(deadline=1), Gone(outcome="unknown"), Bye()])
    @pytest.mark.parametrize("role", ["control", "forward", "reverse"])
    @pytest.mark.parametrize("side", ["client", "server"])
    def test_messages_of_the_control_link(self, side: Side, role: LinkRole, message: Message) -> None:
        protocol = new_link(side, role)
        sender = "server" if isinstance(message, Detached | Drain) else "client"
        if role == "control" and side != sender:
            assert feed(protocol, message) == [message]
            assert (protocol.state, protocol.n, pull(protocol)) == (Exchange.IDLE, 0, [])
        else:
            name = type(message).__name__.lower()
            said = refuses(protocol, wire(protocol, message))
            assert said == f"{name} not from a {sender} on its control link"

    @pytest.mark.parametrize("role", ["control", "forward", "reverse"])
    @pytest.mark.parametrize("side", ["client", "server"])
    def test_who_resumes_where(self, side: Side, role: LinkRole) -> None:
        """Only the client, on `forward` links only, whoever opened the stream."""
        protocol = new_link(side, role)
        message = Resume(n=1, stream=ID, epoch=1, received=0, consumed=0, limit=WINDOW_FIRST)
        if (side, role) == ("server", "forward"):
            assert feed(protocol, message) == [message]
        else:
            assert refuses(protocol, wire(protocol, message)) == f"resume from the wrong side of a {role} link"

    @pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda message: type(message).__name__)
    @pytest.mark.parametrize("name", SCENES)
    def test_after_our_close_frame_nothing_counts(self, name: str, message: Message | bytes) -> None:
        protocol = SCENES[name][0]()
        protocol.close(1001, "going")
        pull(protocol)
        assert feed(protocol, message) == []
        assert protocol.state is Exchange.CLOSED
        assert pull(protocol) == []

    @pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda message: type(message).__name__)
    @pytest.mark.parametrize("name", SCENES)
    def test_after_the_peers_close_frame_nothing_counts(self, name: str, message: Message | bytes) -> None:
        protocol = SCENES[name][0]()
        close = frame(protocol, Opcode.CLOSE, encode_close(1000)[2:])
        assert receive(protocol, close + wire(protocol, message)) == [PeerClosed(1000, "")]
        assert pull(protocol)[-1] == PeerClosed(1000, "")
        assert feed(protocol, message) == []
        assert pull(protocol) == []

    def test_events_before_the_mistake_are_given(self) -> None:
        protocol = new_link("server", "forward")
        stream = open_stream(protocol)
        arriving = protocol.receive(wire(protocol, Ping(number=1), b"abc", Opened(n=1), Ping(number=2)))
        assert next(arriving) == Ping(number=1)
        assert next(arriving) == b"abc"
        with pytest.raises(ProtocolError, match="opened"):
            next(arriving)
        assert list(arriving) == []
        assert stream.inbound.received == 3

    def test_second_hello_and_welcome(self) -> None:
        protocol = new_link("server")
        assert refuses(protocol, wire(protocol, HELLO)) == "hello while idle"
        protocol = new_link("client")
        assert refuses(protocol, wire(protocol, WELCOME)) == "welcome while idle"

    def test_that_link_alone(self) -> None:
        budget = Budget(PLENTY)
        first, second = Pair(), Pair()
        for pair in (first, second):
            pair.client.budget = pair.server.budget = budget
            pair.open()
            pair.client.write(b"abc")
        refuses(first.server.protocol, wire(first.server.protocol, HELLO))
        second.run()
        assert second.server.read == b"abc"


class TestAnyPeer:
    """Whatever a peer writes, in whatever order: an event, silence or a `ProtocolError`, never another exception."""

    numbers = st.integers(0, 3) | st.sampled_from([WINDOW_FIRST - 1, WINDOW_FIRST, WINDOW_FIRST + 5])
    counts = st.integers(1, 4)
    items = st.one_of(
        st.sampled_from(ONE_OF_EACH),
        st.builds(Open, n=counts, stream=st.just(ID)),
        st.builds(Opened, n=counts),
        st.builds(Ack, n=counts, consumed=numbers, limit=numbers),
        st.builds(Eof, n=counts, total=numbers),
        st.builds(Reset, n=counts, code=st.just("x")),
        st.builds(
            Resume, n=counts, stream=st.just(ID), epoch=counts, received=numbers, consumed=numbers, limit=numbers
        ),
        st.builds(Resumed, n=counts, received=numbers, consumed=numbers, limit=numbers),
        st.builds(Gone, n=st.integers(0, 4), outcome=st.sampled_from(["finished", "unknown", "stale", "reset"])),
        st.binary(max_size=3),
    )
    # What our own side does in between.
    own = st.sampled_from(["open", "resume", "write", "end", "reset", "pull", "deliver", "sweep", "answer"])

    @given(
        st.sampled_from(["client", "server"]),
        st.sampled_from(["control", "forward", "reverse"]),
        st.lists(items | own, max_size=30),
    )
    @settings(derandomize=True, deadline=None, max_examples=500)
    def test_messages(self, side: Side, role: LinkRole, steps: list[Message | bytes | str]) -> None:
        protocol = new_link(side, role)
        n = 0
        for step in steps:
            if isinstance(step, str):
                self.act(protocol, step)
            else:
                try:
                    feed(protocol, step)
                except ProtocolError as error:
                    protocol.close(error.code, str(error))
                    assert isinstance(pull(protocol)[-1], PeerClosed)
                    assert feed(protocol, HELLO, b"x") == []
                    return
            assert protocol.n >= n
            n = protocol.n
            assert (protocol.stream is not None) is (
                protocol.state in (Exchange.BUSY, Exchange.RESETTING, Exchange.RESUMING)
            )
            if protocol.stream is not None:
                outbound, inbound = protocol.stream.outbound, protocol.stream.inbound
                assert outbound.replay.start <= outbound.cursor <= outbound.replay.end <= outbound.limit
                assert inbound.consumed <= inbound.received <= inbound.window.limit + 1

    @staticmethod
    def act(protocol: LinkProtocol, action: str) -> None:
        stream = protocol.stream
        if action == "pull":
            pull(protocol)
        elif action == "open":
            if protocol.state is Exchange.IDLE and protocol.role == (
                "forward" if protocol.side == "client" else "reverse"
            ):
                protocol.open(new_stream(egress=False))
        elif action == "resume":
            if protocol.state is Exchange.IDLE and (protocol.side, protocol.role) == ("client", "forward"):
                protocol.resume(detached(sent=b"abc"), opened=None)
        elif stream is not None and protocol.state is Exchange.BUSY:
            if action == "write" and stream.outbound.room():
                stream.outbound.append(b"ab")
            elif action == "end" and stream.outbound.total is None:
                stream.outbound.end()
            elif action == "reset" and stream.resettable():
                stream.reset_wanted = ("reset", "")
            elif action == "deliver" and stream.inbound.at_end():
                stream.inbound.end_delivered()
            elif action == "sweep":
                stream.ack_wanted = True
            elif action == "answer" and stream.egress and not stream.opened:
                protocol.opened("")

    @given(st.sampled_from(["client", "server"]), st.booleans(), st.binary(max_size=100), st.booleans())
    @settings(derandomize=True, deadline=None, max_examples=500)
    def test_bytes(self, side: Side, greeted: bool, data: bytes, framed: bool) -> None:
        protocol = new_link(side, greeted=greeted)
        try:
            receive(protocol, frame(protocol, Opcode.TEXT, data) if framed else data or b"\0")
        except ProtocolError as error:
            assert error.code in (1002, 1007)
            protocol.close(error.code, str(error))
            assert pull(protocol)


class TestOffsets:
    @SPLITS
    def test_bytes_both_ways_then_both_ends(self, size: int | None) -> None:
        pair = Pair(size)
        pair.open()
        question, answer = random.Random(2).randbytes(3000), random.Random(3).randbytes(5000)
        pair.client.write(question)
        pair.server.write(answer)
        pair.run()
        assert pair.server.read == question
        assert pair.client.read == answer
        pair.client.end()
        pair.run()
        assert pair.server.ended
        assert pair.client.protocol.state is pair.server.protocol.state is Exchange.BUSY
        pair.server.end()
        pair.run()
        assert pair.client.ended
        pair.assert_idle(1)
        assert pair.client.budget.held == pair.server.budget.held == 0

    def test_an_eof_is_acked_at_once(self) -> None:
        """total + 1, though three bytes are no quarter of a window."""
        protocol = new_link("server")
        open_stream(protocol)
        assert feed(protocol, b"abc") == [b"abc"]
        assert pull(protocol) == []
        feed(protocol, Eof(n=1, total=3))
        assert protocol.stream is not None
        protocol.stream.inbound.end_delivered()
        assert pull(protocol) == [Ack(n=1, consumed=4, limit=4 + WINDOW_FIRST)]
        assert protocol.stream.inbound.state is Half.DONE

    def test_an_eof_follows_the_last_byte_without_being_asked_for(self) -> None:
        protocol = new_link("client")
        stream = open_stream(protocol)
        stream.outbound.append(b"abc")
        stream.outbound.end()
        assert pull_once(protocol, 2) == [b"ab"]
        assert pull_once(protocol, 2) == [b"c", Eof(n=1, total=3)]
        assert pull_once(protocol) == []

    def test_an_eof_needs_no_credit(self) -> None:
        pair = Pair(window=10)
        pair.open()
        pair.server.reading = False
        pair.client.write(bytes(10))
        pair.client.end()
        pair.run()
        assert pair.server.stream is not None
        assert pair.server.stream.inbound.received == 11

    @pytest.mark.parametrize("total", [0, 2, 4, 2**53 - 1])
    def test_total_mismatch(self, total: int) -> None:
        protocol = new_link("server")
        open_stream(protocol)
        assert (
            refuses(protocol, wire(protocol, b"abc", Eof(n=1, total=total))) == f"eof at {total}, but 3 bytes arrived"
        )

    def test_second_eof(self) -> None:
        protocol = new_link("server")
        open_stream(protocol)
        assert refuses(protocol, wire(protocol, Eof(n=1, total=0), Eof(n=1, total=0))) == "second eof"

    def test_data_after_eof(self) -> None:
        protocol = new_link("server")
        open_stream(protocol)
        assert refuses(protocol, wire(protocol, b"abc", Eof(n=1, total=3), b"d")) == "data after eof at 3"

    def test_eof_before_opened(self) -> None:
        protocol = new_link("client")
        open_stream(protocol, answered=False)
        assert refuses(protocol, wire(protocol, Eof(n=1, total=0))) == "eof before opened"

    def test_data_before_opened(self) -> None:
        protocol = new_link("client")
        open_stream(protocol, answered=False)
        assert refuses(protocol, wire(protocol, b"x")) == "data before opened"

    def test_second_opened(self) -> None:
        protocol = new_link("client")
        open_stream(protocol)
        assert refuses(protocol, wire(protocol, Opened(n=1))) == "second opened"

    def test_opened_is_known_at_both_ends(self) -> None:
        pair = Pair()
        pair.run()
        streams = [pair.client.open()]
        pair.run()
        assert pair.server.stream is not None
        streams.append(pair.server.stream)
        assert [stream.opened for stream in streams] == [False, False]
        pair.server.protocol.opened("10.0.0.5:5432")
        pair.run()
        assert [stream.opened for stream in streams] == [True, True]

    @pytest.mark.parametrize("answered", [False, True])
    def test_opened_from_the_ingress(self, answered: bool) -> None:
        protocol = new_link("server")
        open_stream(protocol, answered=answered)
        assert "opened" in refuses(protocol, wire(protocol, Opened(n=1)))

    def test_empty_messages_of_data_are_nothing(self) -> None:
        protocol = new_link("server")
        stream = open_stream(protocol)
        assert feed(protocol, b"", b"a", b"") == [b"a"]
        assert stream.inbound.received == 1

    @pytest.mark.parametrize(
        ("ack", "said"),
        [
            (Ack(n=1, consumed=4, limit=WINDOW_FIRST), "ack of 4, only 3 were sent"),
            (Ack(n=1, consumed=1, limit=WINDOW_FIRST + 9), "ack went back from 2 to 1"),
            (Ack(n=1, consumed=2, limit=WINDOW_FIRST + 8), f"limit fell from {WINDOW_FIRST + 9} to {WINDOW_FIRST + 8}"),
        ],
    )
    def test_wrong_acks(self, ack: Ack, said: str) -> None:
        protocol = new_link("client")
        stream = open_stream(protocol)
        stream.outbound.append(b"abcdef")
        assert pull_once(protocol, 3) == [b"abc"]
        good = Ack(n=1, consumed=2, limit=WINDOW_FIRST + 9)
        assert feed(protocol, good) == [good]
        assert refuses(protocol, wire(protocol, ack)) == said

    @pytest.mark.parametrize("side", ["client", "server"])
    @SPLITS
    def test_data_in_fragments_and_odd_frames(self, side: Side, size: int | None) -> None:
        """Any split: what is one message means nothing."""
        protocol = new_link(side)
        stream = open_stream(protocol)
        data = (
            frame(protocol, Opcode.BINARY, b"ab", fin=False)
            + frame(protocol, Opcode.PING, b"")
            + frame(protocol, Opcode.CONTINUATION, b"", fin=False)
            + frame(protocol, Opcode.CONTINUATION, b"cd")
        )
        assert b"".join(typing.cast("list[bytes]", receive(protocol, data, size))) == b"abcd"
        assert stream.inbound.received == 4


class TestCredit:
    @pytest.mark.parametrize("side", ["client", "server"])
    def test_data_past_the_limit(self, side: Side) -> None:
        protocol = new_link(side)
        open_stream(protocol, window=100)
        assert feed(protocol, bytes(60)) == [bytes(60)]
        said = refuses(protocol, wire(protocol, bytes(41)))
        assert said == "data up to 101 passes the limit 100"

    def test_data_past_the_limit_within_a_frame(self) -> None:
        """What the limit still lets in is given; a frame is never gathered, so its length alone is no reason."""
        protocol = new_link("server")
        open_stream(protocol, window=100)
        data = wire(protocol, bytes(101))
        assert receive(protocol, data[:-1], 50) != []
        assert refuses(protocol, data[-1:]) == "data up to 101 passes the limit 100"

    def test_a_sender_stops_at_the_limit(self) -> None:
        pair = Pair(window=100)
        pair.open()
        pair.server.reading = False
        assert pair.client.stream is not None
        pair.client.write(bytes(100))
        pair.run()
        assert pair.client.stream.outbound.room() == 0
        assert pair.server.budget.held == 100
        assert pair.server.stream is not None
        pair.server.reading = True
        pair.server.take()
        pair.run()
        assert pair.client.stream.outbound.room() == pair.client.stream.outbound.limit - 100 >= 100
        assert pair.client.budget.held == pair.server.budget.held == 0

    def test_an_ack_at_a_quarter_of_the_window_last_sent_not_one_per_read(self) -> None:
        protocol = new_link("server")
        open_stream(protocol)
        sent = []
        for _ in range(128):
            feed(protocol, bytes(2 * KIB))
            sent += pull(protocol)
        assert [ack.consumed for ack in sent if isinstance(ack, Ack)] == [64 * KIB, 128 * KIB, 192 * KIB, 256 * KIB]
        assert [ack.limit for ack in sent if isinstance(ack, Ack)][:3] == [320 * KIB, 384 * KIB, 448 * KIB]
        assert len(sent) == 4

    def test_the_sweep_acks_what_is_less(self) -> None:
        protocol = new_link("server")
        stream = open_stream(protocol)
        feed(protocol, b"abc")
        assert pull(protocol) == []
        stream.ack_wanted = True
        assert pull(protocol) == [Ack(n=1, consumed=3, limit=3 + WINDOW_FIRST)]
        assert pull(protocol) == []

    def test_what_is_not_consumed_is_not_acked(self) -> None:
        pair = Pair(window=100)
        pair.open()
        pair.server.reading = False
        pair.client.write(bytes(80))
        pair.run()
        assert not [item for item in pair.texts(pair.server) if isinstance(item, Ack)]

    def test_the_clock_and_the_round_trip_reach_the_window(self) -> None:
        for seconds, grown in ((ROUND_TRIP, True), (10 * ROUND_TRIP, False)):
            protocol = new_link("server")
            stream = open_stream(protocol)
            for step in range(1, 13):
                feed(protocol, bytes(64 * KIB))
                protocol.pull(1, NOW + step * seconds / 4, ROUND_TRIP)
            assert (stream.inbound.window.size > WINDOW_FIRST) is grown

    @SPLITS
    def test_a_client_that_writes_before_it_reads_and_an_echo_server(self, size: int | None) -> None:
        """Both windows full one way, the other way goes on: acks never queue behind data that nobody reads."""
        pair = Pair(size, window=64)
        pair.open()
        question = random.Random(6).randbytes(128)
        pair.client.reading = False
        pair.client.write(question[:64])
        pair.run()
        pair.server.write(bytes(pair.server.read))
        pair.server.reading = False  # it cannot write more before the client reads
        pair.run()
        assert pair.client.budget.held == 64
        assert pair.server.stream is not None
        assert pair.server.stream.outbound.room() == 0
        pair.client.write(question[64:])
        pair.run()
        assert pair.server.budget.held == 128  # an answer that is not acked, and a question that is not read
        pair.client.reading = pair.server.reading = True
        for end in (pair.client, pair.server):
            end.take()
        pair.run()
        pair.server.write(bytes(pair.server.read[64:]))
        pair.run()
        assert pair.client.read == question

    def test_an_ack_goes_out_though_our_own_data_may_not(self) -> None:
        """Our window is used up, the peer's application reads nothing: what it sent is acked all the same."""
        pair = Pair(window=100)
        pair.open()
        pair.client.reading = False
        pair.server.write(bytes(100))
        pair.run()
        assert pair.server.stream is not None
        assert pair.server.stream.outbound.room() == 0
        pair.client.write(bytes(100))
        pair.run()
        assert pair.client.stream is not None
        assert pair.client.stream.outbound.room() > 0

    def test_all_is_paid_back(self) -> None:
        pair = Pair()
        pair.open()
        pair.client.reading = pair.server.reading = False
        pair.client.write(bytes(5000))
        pair.server.write(bytes(700))
        assert pair.client.budget.held == 5000
        pair.run()
        assert pair.client.budget.held == pair.server.budget.held == 5700
        for end in (pair.client, pair.server):
            assert end.stream is not None
            end.stream.discard()
            assert end.budget.held == 0


def quickly(protocol: LinkProtocol, data: bytes) -> list[object]:
    """Let `data` arrive as link.py does with a short read."""
    payload = protocol.receive_data(memoryview(data))
    if payload is None:
        return receive(protocol, data)
    assert protocol.stream is not None
    protocol.stream.inbound.passed(len(payload))
    return [bytes(payload)]


class TestReceiveData:
    """One short data frame alone, in a short cut: `receive` is the oracle."""

    @staticmethod
    def outcome(
        protocol: LinkProtocol, function: Callable[[LinkProtocol, bytes], list[object]], *data: bytes
    ) -> object:
        """What came of it: the events or the error of each piece, what has changed, and what there is to send."""
        results: list[object] = []
        for piece in data:
            try:
                results.append(function(protocol, piece))
            except ProtocolError as error:
                results.append((error.code, str(error)))
                break
        return results, snapshot(protocol), protocol.ack_due(), pull(protocol)

    @pytest.mark.parametrize("message", [*ONE_OF_EACH, b""], ids=lambda message: type(message).__name__)
    @pytest.mark.parametrize("name", SCENES)
    def test_every_message_in_every_state(self, name: str, message: Message | bytes) -> None:
        scene = SCENES[name][0]
        data = wire(scene(), message)
        assert self.outcome(scene(), quickly, data) == self.outcome(scene(), receive, data)

    @pytest.mark.parametrize("side", ["client", "server"])
    @pytest.mark.parametrize("length", [1, 125])
    def test_it_is_taken(self, side: Side, length: int) -> None:
        protocol = busy(side, "forward", answered=True)
        payload = protocol.receive_data(memoryview(wire(protocol, b"x" * length)))
        assert payload is not None
        assert bytes(payload) == b"x" * length
        assert protocol.stream is not None
        assert protocol.stream.inbound.received == length

    @pytest.mark.parametrize("name", [name for name, (_, events, _) in SCENES.items() if bytes not in events])
    def test_not_where_no_data_may_come(self, name: str) -> None:
        protocol = SCENES[name][0]()
        assert protocol.receive_data(memoryview(wire(protocol, b"x"))) is None

    def test_not_after_our_close_frame(self) -> None:
        protocol = busy("server", "forward", answered=True)
        protocol.close(1000)
        assert protocol.receive_data(memoryview(wire(protocol, b"x"))) is None
        assert feed(protocol, b"x") == []

    @pytest.mark.parametrize("side", ["client", "server"])
    def test_its_errors(self, side: Side) -> None:
        def end(*, ended: bool) -> LinkProtocol:
            protocol = new_link(side)
            open_stream(protocol, window=3)
            if ended:
                feed(protocol, Eof(n=protocol.n, total=0))
            return protocol

        for ended, said in ((False, "data up to 4 passes the limit 3"), (True, "data after eof at 0")):
            data = wire(end(ended=ended), b"four")
            with pytest.raises(ProtocolError, match=said):
                end(ended=ended).receive_data(memoryview(data))
            assert self.outcome(end(ended=ended), quickly, data) == self.outcome(end(ended=ended), receive, data)

    @given(
        st.sampled_from(["client", "server"]),
        st.lists(
            st.one_of(
                st.binary(max_size=130), st.sampled_from([Ping(number=7), Ack(n=SECOND, consumed=3, limit=2000)])
            ),
            min_size=1,
            max_size=6,
        ),
        st.data(),
    )
    @reproducible
    def test_any_traffic_in_any_split(self, side: Side, items: list[Message | bytes], data: st.DataObject) -> None:
        """Frames that are cut, joined, or alone: what begins in one way may end in the other."""
        stream = wire(busy(side, "forward", answered=True), *items)
        frames = [len(wire(busy(side, "forward", answered=True), *items[:count])) for count in range(len(items))]
        cuts = data.draw(st.sets(st.one_of(st.sampled_from(frames), st.integers(0, len(stream)))))
        ends = sorted(cuts | {0, len(stream)})
        pieces = [stream[start:stop] for start, stop in pairwise(ends)]
        left, right = (busy(side, "forward", answered=True) for _ in range(2))
        assert self.outcome(left, quickly, *pieces) == self.outcome(right, receive, *pieces)

    def test_when_an_ack_is_due(self) -> None:
        protocol = new_link("server")
        assert not protocol.ack_due(), "no stream"
        open_stream(protocol, window=400)
        data = wire(protocol, bytes(50))
        assert quickly(protocol, data) == [bytes(50)]
        assert not protocol.ack_due()
        assert pull(protocol) == []
        assert quickly(protocol, data) == [bytes(50)]
        assert protocol.ack_due(), "a quarter of the window"
        assert [type(item) for item in pull(protocol)] == [Ack]
        assert not protocol.ack_due()


class TestCarry:
    """What was just read, as a frame in a short cut: `append` and `pull` are the oracle."""

    @staticmethod
    def stated(protocol: LinkProtocol) -> object:
        stream = protocol.stream
        held = stream and (len(stream.outbound.replay), stream.outbound.budget.held)
        return snapshot(protocol), held, protocol.expecting

    @pytest.mark.parametrize("size", [1, 125, 126, 1024])
    @pytest.mark.parametrize("name", SCENES)
    def test_as_append_and_pull_in_every_state(self, name: str, size: int) -> None:
        quick, plain = SCENES[name][0](), SCENES[name][0]()
        data = bytes(index % 251 for index in range(size))
        if plain.stream is None:
            assert quick.carry(memoryview(data)) is None
            return
        if plain.stream.outbound.discarded:
            assert quick.carry(memoryview(data)) is None
            return
        assert quick.stream is not None
        plain.expecting = quick.expecting = False
        plain.stream.outbound.append(data)
        expected = b"".join(plain.pull(1 << 20, NOW, ROUND_TRIP))
        got = quick.carry(memoryview(data))
        if got is None:
            assert not expected, "nothing else had to go first"
            assert not quick.stream.outbound.queued(), "nothing was done"
            return
        assert got == expected
        assert self.stated(quick) == self.stated(plain)
        assert pull(quick) == pull(plain) == []

    def test_nothing_is_overtaken(self) -> None:
        """Control messages, pongs of both kinds, a reset, and bytes that were read before."""

        def queue(protocol: LinkProtocol) -> None:
            assert protocol.stream is not None
            protocol.stream.outbound.append(b"before")

        before: list[tuple[Callable[[LinkProtocol], object], list[object]]] = [
            (lambda protocol: protocol.send(Pong(number=1)), [Pong(number=1)]),
            (lambda protocol: feed(protocol, Ping(number=2)), [Pong(number=2)]),
            (lambda protocol: receive(protocol, frame(protocol, Opcode.PING, b"3")), [(Opcode.PONG, b"3")]),
            (queue, [b"before"]),
            (ask_reset, [Reset(n=SECOND, code="reset", message="why")]),
        ]
        for put_first, sent in before:
            protocol = busy("server", "forward", answered=True)
            put_first(protocol)
            was = self.stated(protocol)
            assert protocol.carry(memoryview(b"x")) is None
            assert self.stated(protocol) == was
            assert pull(protocol) == sent

    def test_each_frame_has_its_own_key(self) -> None:
        protocol = busy("client", "forward", answered=True)
        frames = [protocol.carry(memoryview(b"same")) for _ in range(2)]
        assert frames[0] != frames[1]
        assert protocol.stream is not None
        assert bytes(protocol.stream.outbound.replay.view(3, 99)) == b"samesame", "kept, to be sent again"


class TestDrained:
    """It spares whoever writes the pull that would find nothing; `pull` above asserts that nothing would."""

    def test_when_the_last_byte_is_out(self) -> None:
        protocol = new_link("server")
        stream = open_stream(protocol)
        stream.outbound.append(bytes(10))
        assert pull_once(protocol, 6) == [bytes(6)]
        assert not protocol.drained
        assert pull_once(protocol, 6) == [bytes(4)]
        assert protocol.drained

    def test_control_messages_alone(self) -> None:
        protocol = new_link("server")
        protocol.send(Ping(number=1))
        assert pull_once(protocol) == [Ping(number=1)]
        assert protocol.drained

    def test_it_is_told_anew_each_time(self) -> None:
        protocol = new_link("server")
        stream = open_stream(protocol)
        stream.outbound.append(bytes(10))
        pull_once(protocol, 6)
        feed(protocol, Reset(n=protocol.n, code="reset"))
        assert pull_once(protocol) == [Reset(n=1, code="reset")]
        assert protocol.drained, "the rest went with the stream"

    def test_an_end_and_a_reset_go_in_the_pull_that_empties_it(self) -> None:
        for reset in (False, True):
            protocol = new_link("server")
            stream = open_stream(protocol)
            stream.outbound.append(bytes(10))
            if reset:
                ask_reset(protocol)
            else:
                stream.outbound.end()
            assert pull_once(protocol, 10)[1:] == [
                Reset(n=1, code="reset", message="why") if reset else Eof(n=1, total=10)
            ]
            assert protocol.drained


class TestReset:
    @SPLITS
    @pytest.mark.parametrize("by_client", [True, False])
    def test_is_answered_by_a_reset(self, size: int | None, by_client: bool) -> None:
        pair = Pair(size)
        pair.open()
        first, second = (pair.client, pair.server) if by_client else (pair.server, pair.client)
        first.reset("idle")
        pair.run()
        assert second.resets == ["idle"]
        assert first.resets == ["idle"]
        assert [m for m in pair.texts(first) if isinstance(m, Reset)] == [Reset(n=1, code="idle")]
        assert [m for m in pair.texts(second) if isinstance(m, Reset)] == [Reset(n=1, code="idle")]
        pair.assert_idle(1)

    def test_the_link_waits_for_the_answer_and_drops_what_comes_before(self) -> None:
        protocol = new_link("client")
        stream = open_stream(protocol)
        ask_reset(protocol, "reset", "connection reset")
        assert pull(protocol) == [Reset(n=1, code="reset", message="connection reset")]
        assert protocol.state is Exchange.RESETTING
        late = [bytes(WINDOW_FIRST), b"past the limit", Ack(n=1, consumed=99, limit=0), Eof(n=1, total=5), Opened(n=1)]
        assert feed(protocol, *late) == []
        assert stream.inbound.received == 0
        assert protocol.state is Exchange.RESETTING
        answer = Reset(n=1, code="reset")
        assert feed(protocol, answer) == [answer]
        assert protocol.state is Exchange.IDLE
        assert protocol.stream is None
        assert pull(protocol) == []  # an answer is not answered

    @SPLITS
    def test_crossing_ones_answer_each_other(self, size: int | None) -> None:
        pair = Pair(size)
        pair.open()
        pair.client.write(b"abc")
        pair.server.write(b"def")
        pair.client.reset("idle")
        pair.server.reset("limit")
        for end in (pair.client, pair.server):
            pair.write(end)
            assert end.protocol.state is Exchange.RESETTING
        pair.run()
        assert pair.client.resets == ["limit"]
        assert pair.server.resets == ["idle"]
        for end in (pair.client, pair.server):
            assert sum(isinstance(m, Reset) for m in pair.texts(end)) == 1
        pair.assert_idle(1)

    @SPLITS
    def test_crossing_an_end(self, size: int | None) -> None:
        pair = Pair(size)
        pair.open()
        pair.server.write(b"abc")
        pair.server.end()
        pair.write(pair.server)
        pair.client.reset()
        pair.write(pair.client)
        pair.run()
        assert pair.server.resets == pair.client.resets == ["reset"]
        pair.assert_idle(1)

    def test_is_a_refusal_before_opened(self) -> None:
        pair = Pair()
        pair.run()
        pair.client.open()
        pair.client.write(b"early")
        pair.run()
        pair.server.reset("refused")
        pair.run()
        assert pair.client.resets == ["refused"]
        pair.assert_idle(1)

    def test_goes_after_the_bytes_read_before_it(self) -> None:
        protocol = new_link("client")
        stream = open_stream(protocol)
        stream.outbound.append(b"abcd")
        ask_reset(protocol)
        assert pull_once(protocol, 3) == [b"abc"]
        assert protocol.state is Exchange.BUSY
        assert pull_once(protocol, 3) == [b"d", Reset(n=1, code="reset", message="why")]
        assert protocol.state is Exchange.RESETTING

    def test_acks_go_on_while_bytes_wait_before_it(self) -> None:
        protocol = new_link("client")
        stream = open_stream(protocol, window=100)
        stream.outbound.append(b"abcd")
        ask_reset(protocol)
        feed(protocol, bytes(50))
        sent = pull_once(protocol, 3)
        assert sent == [Ack(n=1, consumed=50, limit=150), b"abc"]

    def test_control_comes_first_but_nothing_of_the_stream_follows_it(self) -> None:
        protocol = new_link("client")
        stream = open_stream(protocol)
        ask_reset(protocol)
        pull(protocol)
        stream.ack_wanted = True
        stream.outbound.append(b"late")
        protocol.send(Ping(number=1))
        assert pull(protocol) == [Ping(number=1)]

    def test_stream_data_does_not_follow_the_answer(self) -> None:
        protocol = new_link("client")
        stream = open_stream(protocol)
        stream.outbound.append(b"abc")
        stream.outbound.end()
        stream.ack_wanted = True
        feed(protocol, Reset(n=1, code="limit", message="m"))
        assert pull(protocol) == [Reset(n=1, code="limit")]
        assert protocol.state is Exchange.IDLE

    @SPLITS
    def test_the_link_is_used_again_after_it(self, size: int | None) -> None:
        pair = Pair(size)
        for n, (by_client, by_server) in enumerate([(True, False), (False, True), (True, True)], 1):
            pair.open()
            pair.client.write(b"abc")
            pair.server.write(b"def")
            if by_client:
                pair.client.reset()
            if by_server:
                pair.server.reset()
            pair.run()
            pair.assert_idle(n)
        pair.open()
        pair.client.write(b"ghi")
        pair.run()
        assert pair.server.read == b"ghi"


class TestSilenceAfterTheEnd:
    """After its own EOF and its ack of the peer's a side sends nothing more for that stream and cannot reset it."""

    def ended(self) -> LinkProtocol:
        """A client that sent its EOF and acked the peer's; its own was not acked."""
        protocol = new_link("client")
        stream = open_stream(protocol)
        stream.outbound.end()
        feed(protocol, Eof(n=1, total=0))
        stream.inbound.end_delivered()
        assert pull(protocol) == [Ack(n=1, consumed=1, limit=1 + WINDOW_FIRST), Eof(n=1, total=0)]
        return protocol

    def test_no_ack_not_even_from_the_sweep(self) -> None:
        protocol = self.ended()
        assert protocol.stream is not None
        protocol.stream.ack_wanted = True
        assert pull(protocol) == []
        assert protocol.state is Exchange.BUSY

    def test_the_last_ack_frees_the_link(self) -> None:
        protocol = self.ended()
        ack = Ack(n=1, consumed=1, limit=1 + WINDOW_FIRST)
        assert feed(protocol, ack) == [ack]
        assert protocol.state is Exchange.IDLE
        assert refuses(protocol, wire(protocol, ack)) == "ack while idle"

    def test_no_reset(self) -> None:
        protocol = self.ended()
        assert protocol.stream is not None
        assert not protocol.stream.resettable()
        protocol.stream.reset_wanted = ("idle", "asked for all the same")
        assert pull(protocol) == []
        assert protocol.state is Exchange.BUSY

    def test_either_end_open_it_can_be_reset(self) -> None:
        stream = new_stream(egress=False)
        assert stream.resettable()
        stream.outbound.end()
        stream.outbound.eof_sent()
        assert stream.resettable()
        other = new_stream(egress=False)
        other.inbound.ended(0)
        other.inbound.end_delivered()
        other.inbound.grant(NOW, ROUND_TRIP)
        assert other.inbound.state is Half.DONE
        assert other.resettable()

    def test_the_peer_may_still_reset_and_is_answered(self) -> None:
        protocol = self.ended()
        assert feed(protocol, Reset(n=1, code="idle")) == [Reset(n=1, code="idle")]
        assert pull(protocol) == [Reset(n=1, code="idle")]
        assert protocol.state is Exchange.IDLE

    @SPLITS
    def test_a_reset_that_waits_for_bytes_goes_instead_of_our_eof(self, size: int | None) -> None:
        """The peer's EOF was acked. With our EOF on the link before it, the reset would find the peer's link idle."""
        pair = Pair(size)
        pair.open()
        pair.server.end()
        pair.run()
        pair.client.write(b"abc")
        pair.client.end()
        pair.client.reset("idle")
        pair.run()
        assert pair.server.read == b"abc"
        assert pair.server.resets == ["idle"]
        assert not pair.server.ended
        pair.assert_idle(1)

    @SPLITS
    def test_a_reset_that_waited_goes_instead_of_our_last_ack(self, size: int | None) -> None:
        """Our EOF is out and acked. The connection was full when the reset was asked for, then the peer's EOF came."""
        pair = Pair(size)
        pair.open()
        pair.client.end()
        pair.run()
        pair.client.reset("idle")
        pair.server.end()
        pair.write(pair.server)
        pair.arrive(pair.client)
        pair.run()
        assert pair.server.resets == ["idle"]
        pair.assert_idle(1)

    @SPLITS
    def test_a_stream_reset_for_its_memory_tells_no_false_end(self, size: int | None) -> None:
        """Bytes that were read and never sent are dropped; an EOF behind the gap would be a lie."""
        pair = Pair(size)
        pair.open()
        pair.client.write(b"abcdef")
        pair.client.end()
        pair.write(pair.client, 4)
        assert pair.client.stream is not None
        pair.client.stream.outbound.discard()
        pair.client.reset("limit")
        pair.client.stream.discard()
        pair.run()
        assert pair.server.read == b"abcd"
        assert not pair.server.ended
        assert pair.server.resets == ["limit"]
        pair.assert_idle(1)

    @SPLITS
    def test_acks_under_way_when_memory_was_given_back_are_no_fault(self, size: int | None) -> None:
        """The connection is full, so the reset is not out yet: the link is still busy when an ack comes."""
        pair = Pair(size, window=16)
        pair.open()
        pair.client.write(b"0123456789abcdef")
        pair.write(pair.client, 8)
        pair.arrive(pair.server)
        assert pair.client.stream is not None
        pair.client.stream.outbound.discard()
        pair.client.reset("limit")
        pair.write(pair.server)
        pair.arrive(pair.client)  # an ack of 8
        pair.run()
        assert pair.server.resets == ["limit"]
        pair.assert_idle(1)


class TestReuse:
    """A link is idle at both ends before it is used again."""

    @SPLITS
    @pytest.mark.parametrize("role", ["forward", "reverse"])
    def test_stream_after_stream(self, size: int | None, role: LinkRole) -> None:
        pair = Pair(size, role)
        for n in range(1, 6):
            pair.open()
            pair.ingress.write(b"question %d" % n)
            pair.ingress.end()
            pair.run()
            pair.egress.write(b"answer %d" % n)
            pair.egress.end()
            pair.run()
            assert pair.egress.read == b"question %d" % n
            assert pair.ingress.read == b"answer %d" % n
            pair.assert_idle(n)

    @SPLITS
    def test_opened_again_in_the_write_that_ends_the_last(self, size: int | None) -> None:
        pair = Pair(size)
        pair.open()
        pair.client.end()
        pair.run()
        pair.server.end()
        pair.write(pair.server)
        pair.arrive(pair.client)  # the EOF: our ack of it is the last word
        pair.write(pair.client)
        assert pair.client.protocol.state is Exchange.IDLE
        assert pair.server.protocol.state is Exchange.BUSY
        pair.client.open()
        pair.client.write(b"next")
        pair.run()
        assert pair.server.read == b"next"
        assert pair.client.protocol.n == pair.server.protocol.n == 2

    def test_the_last_ack_ends_it_at_its_sender_when_it_is_on_the_link(self) -> None:
        protocol = new_link("server")
        stream = open_stream(protocol)
        stream.outbound.end()
        pull(protocol)
        feed(protocol, Ack(n=1, consumed=1, limit=1 + WINDOW_FIRST), Eof(n=1, total=0))
        stream.inbound.end_delivered()
        assert protocol.state is Exchange.BUSY
        assert pull_once(protocol) == [Ack(n=1, consumed=1, limit=1 + WINDOW_FIRST)]
        assert protocol.state is Exchange.IDLE

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["write", "end", "reset", "send", "arrive", "open", "pause"]),
                st.booleans(),
                st.integers(1, 80),
            ),
            max_size=150,
        ),
        st.sampled_from([None, 1, 5]),
        st.sampled_from(["forward", "reverse"]),
    )
    @reproducible
    def test_whatever_both_ends_do(self, steps: list[tuple[str, bool, int]], size: int | None, role: LinkRole) -> None:
        """No schedule of two right ends leads to a protocol error, to wrong bytes, or to a link that hangs."""
        pair = Pair(size, role, window=50)
        pair.run()
        exchanges: dict[int, dict[End, bytearray]] = {}
        for action, at_client, amount in steps:
            end = pair.client if at_client else pair.server
            stream, protocol = end.stream, end.protocol
            live = protocol.state is Exchange.BUSY and stream is not None and stream.reset_wanted is None
            if action == "open" and end is pair.ingress and protocol.state is Exchange.IDLE:
                end.open()
                exchanges[protocol.n] = {pair.client: bytearray(), pair.server: bytearray()}
            elif action == "send":
                pair.write(end, amount)
            elif action == "arrive":
                pair.arrive(end, 1 + amount // 20)
            elif action == "pause":
                end.reading = not end.reading
                if live and end.reading:
                    end.take()
            elif live and stream is not None:
                if stream.egress and not stream.opened:
                    protocol.opened("")
                room = stream.outbound.room()
                if action == "write" and room:
                    data = random.Random(amount).randbytes(min(room, amount))
                    end.write(data)
                    exchanges[protocol.n][end] += data
                elif action == "end" and stream.outbound.total is None:
                    end.end()
                elif action == "reset" and amount % 3 == 0 and stream.resettable():
                    end.reset()
            for reader, writer in ((pair.client, pair.server), (pair.server, pair.client)):
                if reader.protocol.n:
                    assert exchanges[reader.protocol.n][writer].startswith(reader.read)
        pair.client.reading = pair.server.reading = True
        pair.run()
        for end in (pair.client, pair.server):
            if end.protocol.state is Exchange.BUSY and end.stream is not None:
                end.take()
                if end.stream.outbound.total is None and end.stream.reset_wanted is None:
                    if end.stream.egress and not end.stream.opened:
                        end.protocol.opened("")
                    end.end()
        pair.run()
        pair.assert_idle(pair.ingress.protocol.n)


class TestControlQueue:
    def test_control_overtakes_data(self) -> None:
        protocol = new_link("client")
        stream = open_stream(protocol)
        stream.outbound.append(b"abcdef")
        assert pull_once(protocol, 3) == [b"abc"]
        protocol.send(Ping(number=1))
        assert pull_once(protocol, 3) == [Ping(number=1), b"def"]

    def test_one_frame_of_data_a_time(self) -> None:
        protocol = new_link("server")
        stream = open_stream(protocol)
        stream.outbound.append(bytes(100_000))
        assert [len(typing.cast("bytes", item)) for item in pull_once(protocol, 30_000)] == [30_000]
        assert [len(typing.cast("bytes", item)) for item in pull(protocol, 30_000)] == [30_000, 30_000, 10_000]

    @pytest.mark.parametrize("size", [4095, 4096])
    @pytest.mark.parametrize("side", ["client", "server"])
    def test_small_frames_are_one_buffer_large_ones_two(self, side: Side, size: int) -> None:
        """Joining is cheaper than gathering below 4 KiB, and copies above it."""
        protocol = new_link(side)
        stream = open_stream(protocol)
        data = random.Random(4).randbytes(size)
        stream.outbound.append(data)
        buffers = protocol.pull(size, NOW, ROUND_TRIP)
        assert len(buffers) == (1 if size < 4096 else 2)
        assert list(read_back(side, b"".join(buffers))) == [data]

    def test_in_order(self) -> None:
        protocol = new_link("client", "control")
        sent = [Ping(number=3), Bye(), Pong(number=1)]
        for message in sent:
            protocol.send(message)
        assert pull(protocol) == sent
        assert protocol.pull(1, NOW, ROUND_TRIP) == []

    @pytest.mark.parametrize("side", ["client", "server"])
    def test_more_than_64_kib_queued(self, side: Side) -> None:
        protocol = new_link(side, "control")
        fill = KIB - len(messages.encode(Listening(forward="f", message="x"))) + 1
        message = Listening(forward="f", message="x" * fill)
        assert len(messages.encode(message)) == KIB
        for _ in range(CONTROL_QUEUE_BYTES // KIB):
            protocol.send(message)
        with pytest.raises(ProtocolError, match="the peer does not read") as raised:
            protocol.send(Bye())
        assert raised.value.code == 1008
        protocol.close(raised.value.code, str(raised.value))
        sent = pull(protocol)
        assert sent[-1] == PeerClosed(1008, str(raised.value))
        assert sent[:-1] == [message] * 64

    def test_what_was_pulled_is_queued_no_more(self) -> None:
        protocol = new_link("client", "control")
        message = Listening(forward="f", message="x" * 1000)
        for _ in range(1000):
            protocol.send(message)
            assert pull(protocol) == [message]

    def test_answers_to_a_peer_that_opens_and_resets_without_reading(self) -> None:
        protocol = new_link("server")
        n = 0
        with pytest.raises(ProtocolError) as raised:
            while n < 10_000:
                n += 1
                feed(protocol, Open(n=n, stream=ID), Reset(n=n, code="x" * 64))
        assert raised.value.code == 1008
        protocol.close(raised.value.code)
        assert sum(len(buffer) for buffer in protocol.pull(1, NOW, ROUND_TRIP)) < 2 * CONTROL_QUEUE_BYTES

    def test_ping_frames_are_bounded_too(self) -> None:
        protocol = new_link("client", "control")
        try:
            for _ in range(100_000):
                protocol.ping(1)
        except ProtocolError as error:
            assert error.code == 1008  # refusing them is as good as joining them
        assert sum(len(buffer) for buffer in protocol.pull(1, NOW, ROUND_TRIP)) <= CONTROL_QUEUE_BYTES + 1 * KIB


class TestPings:
    def test_a_ping_message_is_answered_with_its_number(self) -> None:
        for side in ("client", "server"):
            protocol = new_link(typing.cast("Side", side), "control")
            assert feed(protocol, Ping(number=2**53 - 1)) == [Ping(number=2**53 - 1)]
            assert pull(protocol) == [Pong(number=2**53 - 1)]
            assert pull(protocol) == []

    def test_one_pending_pong_of_each_kind(self) -> None:
        protocol = new_link("server", "control")
        for number in range(1000):
            feed(protocol, Ping(number=number))
            assert receive(protocol, frame(protocol, Opcode.PING, b"%d" % number)) == []
        assert pull(protocol) == [(Opcode.PONG, b"999"), Pong(number=999)]
        assert pull(protocol) == []

    def test_a_pong_answers_nothing(self) -> None:
        protocol = new_link("server", "control")
        assert feed(protocol, Pong(number=5)) == [Pong(number=5)]
        assert receive(protocol, frame(protocol, Opcode.PONG, b"x")) == []
        assert pull(protocol) == []

    def test_an_empty_ping_frame(self) -> None:
        protocol = new_link("server", "control")
        receive(protocol, frame(protocol, Opcode.PING, b""))
        assert pull(protocol) == [(Opcode.PONG, b"")]

    def test_our_own_ping_frame(self) -> None:
        for side in ("client", "server"):
            protocol = new_link(typing.cast("Side", side), "control")
            protocol.ping(3)
            assert pull(protocol) == [(Opcode.PING, b""), Ping(number=3)]

    @SPLITS
    def test_while_a_stream_is_reset(self, size: int | None) -> None:
        protocol = resetting("server", "forward")
        data = wire(protocol, Ping(number=4)) + frame(protocol, Opcode.PING, b"q") + wire(protocol, Pong(number=5))
        assert receive(protocol, data, size) == [Ping(number=4), Pong(number=5)]
        assert pull(protocol) == [(Opcode.PONG, b"q"), Pong(number=4)]
        assert protocol.state is Exchange.RESETTING


class TestClose:
    """RFC 6455 §5.5.1: after a Close frame no data may be sent, and the answer echoes its code."""

    @pytest.mark.parametrize("side", ["client", "server"])
    def test_ours(self, side: Side) -> None:
        protocol = new_link(side)
        stream = open_stream(protocol)
        stream.outbound.append(b"abc")
        protocol.send(Ping(number=1))
        protocol.close(1001, "going away")
        assert protocol.state is Exchange.CLOSED
        assert protocol.stream is None
        assert pull(protocol) == [Ping(number=1), PeerClosed(1001, "going away")]
        assert (protocol.close_sent, protocol.close_received) == (True, False)

    def test_nothing_follows_it(self) -> None:
        protocol = new_link("server")
        stream = open_stream(protocol)
        feed(protocol, Ping(number=1))
        receive(protocol, frame(protocol, Opcode.PING, b"a"))
        stream.ack_wanted = True
        protocol.close(1000)
        protocol.close(1002, "second")
        protocol.send(Ping(number=2))
        protocol.ping(2)
        feed(protocol, Ping(number=3), b"abc")
        receive(protocol, frame(protocol, Opcode.PING, b"b"))
        stream.outbound.append(b"late")
        stream.outbound.end()
        assert pull(protocol) == [PeerClosed(1000, "")]
        assert pull(protocol) == []

    @pytest.mark.parametrize("after_ours", [False, True])
    @pytest.mark.parametrize(("code", "reason"), [(1000, ""), (1001, "going"), (1012, ""), (4999, "x" * 123)])
    @SPLITS
    def test_theirs(self, size: int | None, code: int, reason: str, after_ours: bool) -> None:
        protocol = new_link("client")
        open_stream(protocol)
        if after_ours:
            protocol.close(1008, "ours")
            assert pull(protocol) == [PeerClosed(1008, "ours")]
        assert receive(protocol, encode_close(code, reason), size) == [PeerClosed(code, reason)]
        assert protocol.close_received
        assert protocol.state is Exchange.CLOSED
        assert pull(protocol) == ([] if after_ours else [PeerClosed(code, "")])

    def test_theirs_without_a_code(self) -> None:
        """§7.1.5: that is 1005, which may not be sent; the answer is 1000."""
        protocol = new_link("server")
        assert receive(protocol, frame(protocol, Opcode.CLOSE, b"")) == [PeerClosed(1005, "")]
        assert pull(protocol) == [PeerClosed(1000, "")]

    @pytest.mark.parametrize("payload", [b"\x03", b"\x03\xec", b"\x00\x00", b"\x03\xed", b"\x0b\xb7"])
    def test_wrong_ones(self, payload: bytes) -> None:
        protocol = new_link("server")
        refuses(protocol, frame(protocol, Opcode.CLOSE, payload))

    def test_a_reason_that_is_not_utf_8(self) -> None:
        protocol = new_link("server")
        refuses(protocol, frame(protocol, Opcode.CLOSE, b"\x03\xe8\xff"), code=1007)

    def test_before_the_greeting(self) -> None:
        protocol = new_link("server", greeted=False)
        protocol.close(1008, "no hello in time")
        assert pull(protocol) == [PeerClosed(1008, "no hello in time")]


class TestFrames:
    @pytest.mark.parametrize("side", ["client", "server"])
    def test_wrong_masking(self, side: Side) -> None:
        protocol = new_link(side, "control")
        data = encode_frame(Opcode.TEXT, b'{"type":"bye"}', key=KEY if side == "client" else None)
        assert "masked" in refuses(protocol, data)

    def test_every_client_frame_has_a_fresh_key(self) -> None:
        """RFC 6455 §5.3. Whatever it is: control, data, pong, ping, close."""
        drawn: list[bytes] = []
        source = random.Random(5)

        def randomness(size: int) -> bytes:
            block = source.randbytes(size)
            drawn.extend(block[start : start + 4] for start in range(0, size, 4))
            return block

        protocol = LinkProtocol("client", keys=MaskKeys(randomness), role="forward")
        out = bytearray()
        protocol.send(HELLO)
        feed(protocol, WELCOME)
        stream = open_stream_of(protocol, out)
        stream.outbound.append(bytes(10_000))
        feed(protocol, Ping(number=1))
        receive(protocol, frame(protocol, Opcode.PING, b"a"))
        protocol.ping(1)
        stream.ack_wanted = True
        stream.outbound.end()
        while buffers := protocol.pull(3000, NOW, ROUND_TRIP):
            out += b"".join(buffers)
        protocol.close(1000)
        out += b"".join(protocol.pull(1, NOW, ROUND_TRIP))
        keys = [key for _, key in headers(bytes(out))]
        assert len(keys) == 2 + 2 + 1 + 1 + 1 + 4 + 1 + 1  # hello open, ping twice, pongs, ack, data, eof, close
        assert keys == drawn[: len(keys)]
        assert len(set(keys)) == len(keys)

    def test_the_server_masks_nothing(self) -> None:
        protocol = new_link("server")
        stream = open_stream(protocol)
        stream.outbound.append(b"abc")
        assert protocol.pull(9, NOW, ROUND_TRIP) == [b"\x82\x03abc"]

    @pytest.mark.parametrize("side", ["client", "server"])
    def test_reserved_bits_and_opcodes(self, side: Side) -> None:
        for first in (0xC2, 0x83, 0x8B, 0x09, 0x80):
            protocol = new_link(side)
            whole = bytearray(frame(protocol, Opcode.BINARY, b""))
            whole[0] = first
            refuses(protocol, bytes(whole))


def open_stream_of(protocol: LinkProtocol, out: bytearray) -> StreamState:
    """Open a stream as a client; what is sent meanwhile goes to `out`."""
    stream = new_stream(egress=False)
    protocol.open(stream)
    out += b"".join(protocol.pull(1, NOW, ROUND_TRIP))
    feed(protocol, Opened(n=protocol.n))
    return stream


class TestText:
    @pytest.mark.parametrize("side", ["client", "server"])
    @SPLITS
    def test_in_fragments_with_a_ping_between(self, side: Side, size: int | None) -> None:
        protocol = new_link(side, "control")
        text = json.dumps({"type": "ping", "number": 5, "later": "é€\U0001f600"}, ensure_ascii=False).encode()
        for at in range(len(text) + 1):
            data = (
                frame(protocol, Opcode.TEXT, text[:at], fin=False)
                + frame(protocol, Opcode.PING, b"p")
                + frame(protocol, Opcode.CONTINUATION, b"", fin=False)
                + frame(protocol, Opcode.CONTINUATION, text[at:])
            )
            assert receive(protocol, data, size) == [Ping(number=5)]
            assert pull(protocol) == [(Opcode.PONG, b"p"), Pong(number=5)]

    @SPLITS
    def test_many_fragments_then_another(self, size: int | None) -> None:
        protocol = new_link("server", "control")
        data = b""
        for number in range(3):
            text = messages.encode(Ping(number=number))
            opcode = Opcode.TEXT
            for start in range(len(text)):
                data += frame(protocol, opcode, text[start : start + 1], fin=False)
                opcode = Opcode.CONTINUATION
            data += frame(protocol, Opcode.CONTINUATION, b"")
        assert receive(protocol, data, size) == [Ping(number=number) for number in range(3)]

    @pytest.mark.parametrize("fragment", [None, 1000, MESSAGE_BYTES])
    @pytest.mark.parametrize("size", [None, 1, 1000])
    def test_up_to_16_kib(self, size: int | None, fragment: int | None) -> None:
        protocol = new_link("server", "control")
        text = messages.encode(Ping(number=1)).ljust(MESSAGE_BYTES)
        assert receive(protocol, fragments(protocol, text, fragment), size) == [Ping(number=1)]

    @pytest.mark.parametrize("fragment", [None, 1000, MESSAGE_BYTES])
    @pytest.mark.parametrize("size", [None, 1, 1000])
    def test_over_16_kib(self, size: int | None, fragment: int | None) -> None:
        """1002, however it was split: a limit passed is a protocol error."""
        protocol = new_link("server", "control")
        text = messages.encode(Ping(number=1)).ljust(MESSAGE_BYTES + 1)
        said = refuses(protocol, fragments(protocol, text, fragment), size=size)
        assert said == f"control message of more than {MESSAGE_BYTES} bytes"

    def test_a_length_alone_makes_us_hold_nothing(self) -> None:
        """A frame that announces a gigabyte is refused when 16 KiB of it are here."""
        protocol = new_link("client", "control")
        head = b"\x81\x7f" + (1 << 30).to_bytes(8, "big")
        assert receive(protocol, head + b" " * MESSAGE_BYTES) == []
        refuses(protocol, b" ")

    @SPLITS
    def test_not_utf_8(self, size: int | None) -> None:
        for text in (b'{"type":"bye","x":"\xff"}', b'{"type":"bye","x":"\xed\xa0\x80"}', b'{"type":"bye","x":"\xc3'):
            protocol = new_link("server", "control")
            refuses(protocol, frame(protocol, Opcode.TEXT, text), code=1007, size=size)

    @SPLITS
    @pytest.mark.parametrize(
        "text",
        [
            *(b"", b"null", b"[]", b'{"type":"nope"}', b'{"type":"ping","number":-1}', b'{"type":"ping","number":1.0}'),
            *(b'{"type":"ping","number":true}', b'{"type":"ping","number":null}', b'{"type":"ping"}'),
            b'{"type":"ping","number":%d}' % 2**53,
            b'{"type":"ping","number":%s}' % (b"9" * 400),
            b'{"type":"ping","number":1,"x":%s}' % (b"[" * 1100 + b"]" * 1100),
            b'{"type":"open","n":1,"stream":"short"}',
        ],
        ids=lambda text: text[:30].decode(),
    )
    def test_not_a_message(self, text: bytes, size: int | None) -> None:
        protocol = new_link("server")
        refuses(protocol, frame(protocol, Opcode.TEXT, text), size=size)

    def test_unknown_keys_are_ignored(self) -> None:
        protocol = new_link("server", "control")
        data = frame(protocol, Opcode.TEXT, b'{"later":[{}],"type":"ping","number":1}')
        assert receive(protocol, data) == [Ping(number=1)]


def fragments(protocol: LinkProtocol, text: bytes, size: int | None) -> bytes:
    """A text message in frames of `size`; None: in one."""
    pieces = [text[start : start + (size or len(text))] for start in range(0, len(text), size or len(text))]
    opcodes = [Opcode.TEXT, *[Opcode.CONTINUATION] * (len(pieces) - 1)]
    last = len(pieces) - 1
    return b"".join(frame(protocol, opcodes[at], piece, fin=at == last) for at, piece in enumerate(pieces))


def closed(side: Side) -> LinkProtocol:
    protocol = new_link(side)
    protocol.close(1000)
    pull(protocol)
    return protocol


class TestReceivePing:
    """The short way for the frames of an idle link: it does what `receive` does, or nothing."""

    STATES: typing.ClassVar = {
        "idle": new_link,
        "busy": lambda side: busy(side, "forward", answered=True),
        "resetting": lambda side: resetting(side, "forward"),
        "not greeted": lambda side: new_link(side, greeted=False),
        "closed": closed,
    }

    @staticmethod
    def pair(side: Side, opcode: int, text: bytes) -> bytes:
        return encode_pair(opcode, text, new_keys() if side == "server" else None)

    @staticmethod
    def ends(make: typing.Callable[[Side], LinkProtocol], side: Side, data: bytes) -> bool:
        """Let `data` arrive at two ends, the short way at one. Returns whether it was taken."""
        one, other = make(side), make(side)
        taken = one.receive_ping(memoryview(data))
        outcomes: list[object] = []
        for protocol in (one, other):
            try:
                events = [taken] if protocol is one and taken is not None else receive(protocol, data)
                outcomes.append([event for event in events if not isinstance(event, Ping)])
            except ProtocolError as error:
                outcomes.append((error.code, str(error)))
        assert outcomes[0] == outcomes[1]
        assert pull(one) == pull(other)
        assert (one.state, one.close_sent, one.expecting) == (other.state, other.close_sent, other.expecting)
        return taken is not None

    @pytest.mark.parametrize("state", STATES)
    @pytest.mark.parametrize("side", ["client", "server"])
    def test_is_as_good_as_receive(self, side: Side, state: str) -> None:
        taken = [
            self.ends(self.STATES[state], side, self.pair(side, opcode, messages.encode(message)))
            for opcode in (Opcode.PING, Opcode.PONG)
            for message in (
                Ping(number=1),
                Pong(number=1),
                Ping(number=2**53 - 1),
                Bye(),
                Ack(n=9, consumed=0, limit=0),
            )
        ]
        alive = state in ("idle", "busy", "resetting")
        assert taken == [alive, False, False, False, False, False, alive, False, False, False]

    @reproducible
    @given(st.sampled_from(["client", "server"]), st.booleans(), st.integers(0, 50), st.binary(max_size=3))
    def test_with_any_byte_changed(self, side: Side, pong: bool, at: int, new: bytes) -> None:
        right = self.pair(
            side, Opcode.PONG if pong else Opcode.PING, messages.encode((Pong if pong else Ping)(number=7))
        )
        self.ends(new_link, side, right[:at] + new + right[at + 1 :])

    @pytest.mark.parametrize("side", ["client", "server"])
    def test_text_that_is_not_utf_8_is_refused_as_ever(self, side: Side) -> None:
        data = self.pair(side, Opcode.PING, b'{"type":"ping","number":1\xff}')
        protocol = new_link(side)
        assert protocol.receive_ping(memoryview(data)) is None
        assert "UTF-8" in refuses(protocol, data, code=1007)

    def test_a_ping_frame_with_a_payload_before_it_is_not_forgotten(self) -> None:
        """RFC 6455 §5.5.3: of several pings only the last need be answered."""
        protocol = new_link("server")
        receive(protocol, frame(protocol, Opcode.PING, b"x"))
        feed(protocol, Ping(number=1))
        assert pull(protocol) == [(Opcode.PONG, b"x"), Pong(number=1)]
        receive(protocol, frame(protocol, Opcode.PING, b"x"))
        assert protocol.receive_ping(memoryview(self.pair("server", Opcode.PING, messages.encode_ping(2)))) is not None
        assert pull(protocol) == [(Opcode.PONG, b""), Pong(number=2)]
