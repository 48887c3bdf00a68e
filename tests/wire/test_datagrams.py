"""wire/datagrams.py, and exchanges of datagram flows in wire/protocol.py: queues, whole messages, every message."""

from __future__ import annotations

import random
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.test_protocol import (
    COUNTED,
    ID,
    NOW,
    ONE_OF_EACH,
    ROUND_TRIP,
    WELCOME,
    frame,
    headers,
    new_keys,
    pull,
    pull_once,
    read_back,
    wire,
)
from wstunnel.errors import ProtocolError
from wstunnel.limits import DATAGRAM_BYTES, DATAGRAM_QUEUE_BYTES, KIB
from wstunnel.wire.credit import Budget
from wstunnel.wire.datagrams import HEADER_BYTES, DatagramQueue, DatagramState
from wstunnel.wire.frames import Opcode, encode_close
from wstunnel.wire.messages import Ack, Bye, Eof, Hello, LinkRole, Message, Open, Opened, Ping, Pong, Reset, Welcome
from wstunnel.wire.protocol import LinkProtocol, PeerClosed, StreamState
from wstunnel.wire.states import Exchange

Side = typing.Literal["client", "server"]
PLENTY = 1 << 40


def new_flow(*, egress: bool, budget: Budget | None = None) -> DatagramState:
    return DatagramState(ID, egress=egress, budget=budget or Budget(PLENTY))


def new_link(side: Side, role: LinkRole = "forward") -> LinkProtocol:
    protocol = LinkProtocol("server") if side == "server" else LinkProtocol("client", keys=new_keys(), role=role)
    hello = Hello(version=1, session=ID, role=role)
    if side == "server":
        feed(protocol, hello)
        protocol.send(WELCOME)
    else:
        protocol.send(hello)
        feed(protocol, WELCOME)
    pull(protocol)
    return protocol


def receive(protocol: LinkProtocol, data: bytes, size: int | None = None) -> list[object]:
    """What arrives in pieces of `size`; an `open` is taken for one of a flow."""
    events: list[object] = []
    for start in range(0, len(data), size or len(data)):
        for event in protocol.receive(data[start : start + (size or len(data))]):
            events.append(bytes(event) if isinstance(event, memoryview) else event)
            if isinstance(event, Open):
                protocol.accept(new_flow(egress=True))
    return events


def feed(protocol: LinkProtocol, *items: Message | bytes) -> list[object]:
    return receive(protocol, wire(protocol, *items))


def begin(side: Side = "client", role: LinkRole = "forward", *, answered: bool = True) -> LinkProtocol:
    """A link that carries a flow, at the end that `side` is."""
    protocol = new_link(side, role)
    if (side, role) in (("client", "forward"), ("server", "reverse")):
        protocol.open(new_flow(egress=False), target="udp:127.0.0.1:53")
        if answered:
            feed(protocol, Opened(n=1, address="127.0.0.1:53"))
    else:
        feed(protocol, Open(n=1, stream=ID, target="udp:127.0.0.1:53"))
        if answered:
            protocol.opened("127.0.0.1:53")
    pull(protocol)
    assert protocol.state is Exchange.FLOW
    assert protocol.stream is None
    return protocol


def flow_of(protocol: LinkProtocol) -> DatagramState:
    assert protocol.flow is not None
    return protocol.flow


class TestQueue:
    def test_in_order(self) -> None:
        queue = DatagramQueue(Budget(PLENTY))
        for datagram in (b"a", b"", b"ccc"):
            queue.push(datagram)
        assert [queue.pop() for _ in range(len(queue))] == [b"a", b"", b"ccc"]
        assert not queue
        assert queue.dropped == 0

    def test_the_oldest_is_dropped(self) -> None:
        queue = DatagramQueue(Budget(PLENTY))
        fits = DATAGRAM_QUEUE_BYTES // (1000 + HEADER_BYTES)
        for number in range(fits + 3):
            queue.push(number.to_bytes(2, "big") + bytes(998))
        assert len(queue) == fits
        assert queue.dropped == 3
        assert [int.from_bytes(queue.pop()[:2], "big") for _ in range(fits)] == list(range(3, fits + 3))

    def test_the_largest_drives_all_others_out(self) -> None:
        budget = Budget(PLENTY)
        queue = DatagramQueue(budget)
        queue.push(b"a")
        queue.push(bytes(DATAGRAM_BYTES))
        assert (len(queue), queue.dropped) == (1, 1)
        assert budget.held == DATAGRAM_BYTES + HEADER_BYTES <= DATAGRAM_QUEUE_BYTES

    @pytest.mark.parametrize("size", [DATAGRAM_BYTES + 1, DATAGRAM_BYTES + 2, 65_527])
    def test_one_that_the_peer_would_refuse(self, size: int) -> None:
        """UDP over IPv6 has 20 bytes more to give than over IPv4."""
        budget = Budget(PLENTY)
        queue = DatagramQueue(budget)
        queue.push(b"a")
        queue.push(bytes(size))
        assert (len(queue), queue.dropped, budget.held) == (1, 1, 1 + HEADER_BYTES)

    def test_empty_ones_count(self) -> None:
        queue = DatagramQueue(Budget(PLENTY))
        for _ in range(10_000):
            queue.push(b"")
        assert len(queue) == DATAGRAM_QUEUE_BYTES // HEADER_BYTES

    def test_the_budget(self) -> None:
        budget = Budget(8000)  # of which 7000 may be read
        first, second = DatagramQueue(budget), DatagramQueue(budget)
        first.push(bytes(5000))
        second.push(bytes(2000))
        assert (len(second), second.dropped) == (0, 1)
        second.push(bytes(1900))
        assert budget.held == 5000 + 1900 + 2 * HEADER_BYTES
        first.pop()
        second.clear()
        assert budget.held == 0
        assert second.dropped == 2


class TestWholeMessages:
    @pytest.mark.parametrize("size", [None, 1, 7])
    @pytest.mark.parametrize("side", ["client", "server"])
    def test_each_frame_is_a_datagram(self, side: Side, size: int | None) -> None:
        protocol = begin(side)
        sent = [b"one", b"", bytes(200), b"four"]
        assert receive(protocol, wire(protocol, *sent), size) == sent
        assert flow_of(protocol).received == 4
        assert protocol.receive_data(memoryview(wire(protocol, b"x"))) is None  # whose way is for streams

    @pytest.mark.parametrize("size", [None, 1, 7])
    def test_fragments(self, size: int | None) -> None:
        protocol = begin("server")
        data = frame(protocol, Opcode.BINARY, b"on", fin=False) + frame(protocol, Opcode.CONTINUATION, b"", fin=False)
        data += frame(protocol, Opcode.PING, b"p") + frame(protocol, Opcode.CONTINUATION, b"e")
        assert receive(protocol, data + wire(protocol, b"two"), size) == [b"one", b"two"]
        assert flow_of(protocol).received == 2

    def test_the_largest(self) -> None:
        protocol = begin("server")
        whole = bytes(DATAGRAM_BYTES)
        assert feed(protocol, whole) == [whole]
        half = frame(protocol, Opcode.BINARY, whole[:30_000], fin=False)
        assert receive(protocol, half + frame(protocol, Opcode.CONTINUATION, whole[30_000:]), 16 * KIB) == [whole]

    @pytest.mark.parametrize("size", [None, 16 * KIB])
    @pytest.mark.parametrize("fragmented", [False, True])
    def test_more_is_1009(self, fragmented: bool, size: int | None) -> None:
        protocol = begin("server")
        large = bytes(DATAGRAM_BYTES + 1)
        if fragmented:
            data = frame(protocol, Opcode.BINARY, large[:40_000], fin=False)
            data += frame(protocol, Opcode.CONTINUATION, large[40_000:])
        else:
            data = wire(protocol, large)
        with pytest.raises(ProtocolError, match="datagram of more than 65507 bytes") as raised:
            receive(protocol, data, size)
        assert raised.value.code == 1009

    def test_what_is_gathered_is_bounded(self) -> None:
        """A frame may claim any length: it is refused once too much of it is here."""
        protocol = begin("server")
        data = frame(protocol, Opcode.BINARY, bytes(1 << 20))
        receive(protocol, data[:DATAGRAM_BYTES])
        with pytest.raises(ProtocolError) as raised:
            receive(protocol, data[DATAGRAM_BYTES : DATAGRAM_BYTES + 100])
        assert raised.value.code == 1009

    def test_what_is_gathered_counts_as_held(self) -> None:
        budget = Budget(8000)  # of which 7000 may be read
        one, two = new_flow(egress=True, budget=budget), new_flow(egress=True, budget=budget)
        assert one.arrived(bytes(4000), False) is None
        assert one.arrived(bytes(1000), False) is None
        assert budget.held == 5000
        assert two.arrived(bytes(3000), False) is None
        assert two.arrived(b"fits in", False) is None
        assert two.arrived(b"", True) is None, "its beginning is missing"
        assert (budget.held, two.dropped, two.received) == (5000, 1, 1)
        assert one.arrived(b"!", True) == bytes(5000) + b"!"
        assert (budget.held, one.dropped) == (0, 0)
        two.arrived(bytes(6000), False)
        assert budget.held == 6000
        two.discard()
        assert budget.held == 0
        assert two.arrived(b"new", True) == b"new"

    def test_one_that_finds_no_room_is_bounded_all_the_same(self) -> None:
        flow = new_flow(egress=True, budget=Budget(8))
        flow.arrived(bytes(DATAGRAM_BYTES), False)
        with pytest.raises(ProtocolError) as raised:
            flow.arrived(b"x", False)
        assert raised.value.code == 1009

    def test_before_opened(self) -> None:
        protocol = begin("client", answered=False)
        with pytest.raises(ProtocolError, match="data before opened"):
            feed(protocol, b"x")

    def test_a_piece_dies_with_the_flow(self) -> None:
        protocol = begin("server")
        receive(protocol, frame(protocol, Opcode.BINARY, b"half", fin=False))
        flow = flow_of(protocol)
        flow.discard()
        assert flow.arrived(b"new", True) == b"new"


class TestPull:
    @pytest.mark.parametrize("side", ["client", "server"])
    def test_many_in_one_buffer_control_first(self, side: Side) -> None:
        protocol = begin(side)
        datagrams = [bytes([number]) * number for number in range(200)]
        for datagram in datagrams:
            flow_of(protocol).queue.push(datagram)
        protocol.send(Ping(number=1))
        protocol.expecting = False
        buffers = protocol.pull(1 << 20, NOW, ROUND_TRIP)
        assert len(buffers) == 2
        assert list(read_back(side, b"".join(buffers))) == [Ping(number=1), *datagrams]
        assert protocol.drained
        assert not protocol.expecting  # nobody has to answer a datagram
        assert flow_of(protocol).sent == 200
        assert pull_once(protocol) == []

    def test_each_frame_has_a_key_of_its_own(self) -> None:
        protocol = begin("client")
        for _ in range(50):
            flow_of(protocol).queue.push(b"same")
        sent = list(headers(b"".join(protocol.pull(1 << 20, NOW, ROUND_TRIP))))
        assert len({key for _, key in sent}) == 50
        assert all(first == 0x82 for first, _ in sent)

    def test_no_more_than_asked_but_one_at_least(self) -> None:
        protocol = begin("server")
        for _ in range(5):
            flow_of(protocol).queue.push(bytes(1000))
        assert pull_once(protocol, 2000) == [bytes(1000)] * 2
        assert not protocol.drained
        assert pull_once(protocol, 1) == [bytes(1000)]
        assert pull_once(protocol, 1 << 20) == [bytes(1000)] * 2
        assert protocol.drained

    def test_early_ones_go_behind_open(self) -> None:
        protocol = new_link("client")
        flow = new_flow(egress=False)
        flow.queue.push(b"early")
        protocol.open(flow, target="udp:db:53", peer="127.0.0.1:9")
        assert protocol.expecting
        assert pull_once(protocol) == [Open(n=1, stream=ID, target="udp:db:53", peer="127.0.0.1:9"), b"early"]

    def test_early_ones_before_the_welcome(self) -> None:
        protocol = LinkProtocol("client", keys=new_keys(), role="forward")
        protocol.send(Hello(version=1, session=ID, role="forward"))
        flow = new_flow(egress=False)
        flow.queue.push(b"early")
        protocol.open(flow, target="udp:db:53")
        assert [type(item) for item in pull(protocol)] == [Hello, Open, bytes]
        assert [type(event) for event in feed(protocol, WELCOME, Opened(n=1), b"late")] == [Welcome, Opened, bytes]
        assert protocol.state is Exchange.FLOW

    def test_the_reset_goes_last_and_the_link_is_used_again(self) -> None:
        protocol = begin("client")
        flow = flow_of(protocol)
        flow.queue.push(bytes(1000))
        flow.queue.push(b"last")
        flow.reset_wanted = ("idle", "why")
        assert pull_once(protocol, 100) == [bytes(1000)]
        assert pull_once(protocol, 100) == [b"last", Reset(n=1, code="idle", message="why")]
        assert protocol.expecting
        assert protocol.state is Exchange.RESETTING
        assert feed(protocol, b"under way") == []
        assert feed(protocol, Reset(n=1, code="idle")) == [Reset(n=1, code="idle")]
        assert (protocol.state, protocol.flow) == (Exchange.IDLE, None)
        protocol.open(StreamState(ID, egress=False, budget=Budget(PLENTY)), target="tcp:db:1")
        assert protocol.state is Exchange.BUSY
        assert protocol.flow is None

    def test_the_peers_reset_is_answered(self) -> None:
        protocol = begin("server")
        assert feed(protocol, Reset(n=1, code="idle")) == [Reset(n=1, code="idle")]
        assert protocol.state is Exchange.IDLE
        assert pull(protocol) == [Reset(n=1, code="idle")]
        assert [type(event) for event in feed(protocol, Open(n=2, stream="x" * 22, target="udp:a:1"))] == [Open]
        assert protocol.state is Exchange.FLOW

    def test_crossing_resets_answer_each_other(self) -> None:
        protocol = begin("server")
        flow_of(protocol).reset_wanted = ("refused", "")
        assert pull(protocol) == [Reset(n=1, code="refused")]
        feed(protocol, Reset(n=1, code="idle"))
        assert protocol.state is Exchange.IDLE
        assert pull(protocol) == []

    def test_after_a_close_frame_nothing_goes(self) -> None:
        protocol = begin("client")
        flow_of(protocol).queue.push(b"x")
        protocol.close(1000)
        assert pull(protocol) == [PeerClosed(1000, "")]
        assert protocol.flow is None


def resetting(side: Side) -> LinkProtocol:
    protocol = begin(side)
    flow_of(protocol).reset_wanted = ("idle", "")
    pull(protocol)
    return protocol


PINGS = {Ping, Pong}
SCENES: dict[str, tuple[typing.Callable[[], LinkProtocol], set[type], set[type]]] = {
    "ingress, not answered": (lambda: begin("client", answered=False), {Opened, Reset} | PINGS, set()),
    "ingress": (lambda: begin("client"), {Reset, bytes} | PINGS, set()),
    "ingress at the server": (lambda: begin("server", "reverse"), {Reset, bytes} | PINGS, set()),
    "egress, dialling": (lambda: begin("server", answered=False), {Reset, bytes} | PINGS, set()),
    "egress": (lambda: begin("server"), {Reset, bytes} | PINGS, set()),
    "egress at the client": (lambda: begin("client", "reverse"), {Reset, bytes} | PINGS, set()),
    "client, resetting": (lambda: resetting("client"), {Reset} | PINGS, {Opened, bytes}),
    "server, resetting": (lambda: resetting("server"), {Reset} | PINGS, {Opened, bytes}),
}
FIRST = {Opened(n=1), Ack(n=1, consumed=1, limit=1 << 18), Eof(n=1, total=0), Reset(n=1, code="reset")}
EACH: list[Message | bytes] = [
    next((mine for mine in FIRST if type(mine) is type(message)), message) for message in ONE_OF_EACH
]


class TestEveryMessage:
    """Of an exchange of a flow: no ack, eof, resume or resumed."""

    def test_the_list_is_whole(self) -> None:
        assert {type(message) for message in EACH} == {type(message) for message in ONE_OF_EACH}
        assert {scene().state for scene, _, _ in SCENES.values()} == {Exchange.FLOW, Exchange.RESETTING}

    @pytest.mark.parametrize("message", EACH, ids=lambda message: type(message).__name__)
    @pytest.mark.parametrize("name", SCENES)
    def test_effect(self, name: str, message: Message | bytes) -> None:
        scene, events, dropped = SCENES[name]
        protocol = scene()
        if type(message) in events:
            assert feed(protocol, message) == [message]
            assert not protocol.close_sent
        elif type(message) in dropped:
            assert feed(protocol, message) == []
            assert pull(protocol) == []
        else:
            with pytest.raises(ProtocolError) as raised:
                feed(protocol, message)
            # Resumed and Gone of another exchange than this are refused for their counts.
            assert raised.value.code == 1002
            word = "data" if isinstance(message, bytes) else type(message).__name__.lower()
            assert word in str(raised.value)

    @pytest.mark.parametrize(("kind", "fields"), COUNTED, ids=lambda value: getattr(value, "__name__", ""))
    @pytest.mark.parametrize("name", SCENES)
    def test_higher_counts(self, name: str, kind: type[Message], fields: dict[str, object]) -> None:
        with pytest.raises(ProtocolError, match="for exchange 2, the link is at 1"):
            feed(SCENES[name][0](), kind(n=2, **fields))

    def test_those_of_an_earlier_exchange_are_ignored(self) -> None:
        protocol = begin("server")
        feed(protocol, Reset(n=1, code="idle"), Open(n=2, stream="x" * 22, target="udp:a:1"))
        pull(protocol)
        assert feed(protocol, Reset(n=1, code="idle"), Ack(n=1, consumed=0, limit=0)) == []
        assert protocol.state is Exchange.FLOW

    def test_opened_twice_and_from_the_ingress(self) -> None:
        with pytest.raises(ProtocolError, match="second opened"):
            feed(begin("client"), Opened(n=1))
        with pytest.raises(ProtocolError, match="opened from the ingress"):
            feed(begin("server", answered=False), Opened(n=1))

    @pytest.mark.parametrize("name", SCENES)
    def test_the_peers_close_frame(self, name: str) -> None:
        protocol = SCENES[name][0]()
        assert receive(protocol, frame(protocol, Opcode.CLOSE, encode_close(1000)[2:])) == [PeerClosed(1000, "")]
        assert (protocol.state, protocol.flow) == (Exchange.CLOSED, None)


class TestAnyPeer:
    """Whatever a peer writes: an event, silence or a `ProtocolError`; memory is bounded and given back."""

    items = st.one_of(
        st.sampled_from(EACH),
        st.builds(Open, n=st.integers(1, 4), stream=st.just(ID)),
        st.builds(Opened, n=st.integers(1, 4)),
        st.builds(Reset, n=st.integers(1, 4), code=st.just("x")),
        st.binary(max_size=200),
        st.just(bytes(DATAGRAM_BYTES)),
    )
    own = st.sampled_from(["open", "push", "reset", "pull", "opened"])

    @given(
        st.sampled_from(["client", "server"]),
        st.sampled_from(["forward", "reverse"]),
        st.lists(st.one_of(items, own, st.booleans()), max_size=30),
    )
    @settings(derandomize=True, deadline=None, max_examples=300)
    def test_messages(self, side: Side, role: LinkRole, steps: list[Message | bytes | str | bool]) -> None:
        protocol = new_link(side, role)
        budget = Budget(PLENTY)
        for step in steps:
            if isinstance(step, str):
                self.act(protocol, step, budget)
            else:
                try:
                    if isinstance(step, bool):
                        receive(protocol, frame(protocol, Opcode.CONTINUATION, b"more", fin=step))
                    else:
                        feed(protocol, step)
                except ProtocolError as error:
                    assert error.code in (1002, 1009)
                    protocol.close(error.code, str(error))
                    break
            assert (protocol.flow is not None) is (protocol.state in (Exchange.FLOW, Exchange.RESETTING))
            assert budget.held <= 30 * DATAGRAM_QUEUE_BYTES

    @staticmethod
    def act(protocol: LinkProtocol, action: str, budget: Budget) -> None:
        flow = protocol.flow
        if action == "pull":
            pull(protocol)
        elif action == "open":
            opens = protocol.role == ("forward" if protocol.side == "client" else "reverse")
            if protocol.state is Exchange.IDLE and opens:
                protocol.open(new_flow(egress=False, budget=budget), target="udp:a:1")
        elif flow is not None and protocol.state is Exchange.FLOW:
            if action == "push":
                flow.queue.push(random.Random(1).randbytes(1400))
            elif action == "reset":
                flow.reset_wanted = ("idle", "")
            elif action == "opened" and flow.egress and not flow.opened:
                protocol.opened("")

    @given(st.sampled_from(["client", "server"]), st.binary(max_size=200))
    @settings(derandomize=True, deadline=None, max_examples=300)
    def test_bytes(self, side: Side, data: bytes) -> None:
        protocol = begin(side)
        try:
            receive(protocol, data or b"\0")
        except ProtocolError as error:
            assert error.code in (1002, 1007, 1009)

    @given(st.lists(st.binary(max_size=300), max_size=40), st.integers(1, 400), st.integers(1, 2000))
    @settings(derandomize=True, deadline=None, max_examples=200)
    def test_two_ends(self, datagrams: list[bytes], split: int, size: int) -> None:
        """What goes in at one end comes out at the other: each whole, once and in order."""
        client, server = begin("client"), begin("server")
        for one, other in ((client, server), (server, client)):
            for datagram in datagrams:
                flow_of(one).queue.push(datagram)
            data = b""
            while buffers := one.pull(size, NOW, ROUND_TRIP):
                data += b"".join(buffers)
            assert receive(other, data, split) == datagrams


def test_bye_is_not_for_flows() -> None:
    with pytest.raises(ProtocolError, match="bye while flow"):
        feed(begin("server"), Bye())
