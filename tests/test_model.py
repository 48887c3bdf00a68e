"""The protocol model: the two ends under arbitrary interleavings, splits, stalls, cuts, refusals and aborts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.model import WINDOW, World, installed, run
from wstunnel.reactor import READ
from wstunnel.stream import Stream
from wstunnel.wire.states import Exchange

pytestmark = pytest.mark.timeout(900)  # under coverage on a busy machine
BLOCK = 250  # schedules in one test
BYTES = st.integers(0, 200).map(lambda size: bytes((size * 7 + i * 13) & 255 for i in range(size)))


@pytest.fixture(autouse=True, scope="module")
def model() -> Iterator[None]:
    with installed():
        yield


class TunnelMachine(RuleBasedStateMachine):
    """Steps of any size in any order; at the end everything must come out even."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(idle_links=1)
        self.world.flow()

    @precondition(lambda self: len(self.world.connections) < 5)
    @rule(upward=BYTES, downward=BYTES, refuse=st.booleans(), echo=st.booleans(), room=st.integers(1, 40))
    def open(self, upward: bytes, downward: bytes, refuse: bool, echo: bool, room: int) -> None:
        self.world.open(upward, b"" if echo else downward, refuse=refuse and room > 30, echo=echo, room=room)

    @rule(pick=st.integers(0, 1 << 16), size=st.integers(1, 60), times=st.integers(1, 12))
    def step(self, pick: int, size: int, times: int) -> None:
        for i in range(times):
            moves = self.world.moves(size)
            if not moves:
                return
            self.world.do(moves[(pick * (i + 1)) % len(moves)])
            self.world.check()

    @rule(side=st.sampled_from(["client", "server"]))
    def sweep(self, side: str) -> None:
        self.world.sweep(side)  # type: ignore[arg-type]

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.1, 4.0]))
    def wait(self, seconds: float) -> None:
        self.world.tick(seconds)

    @precondition(lambda self: self.world.wires)
    @rule(pick=st.integers(0, 1 << 16))
    def harm(self, pick: int) -> None:
        harms = self.world.harms()
        if harms:
            self.world.do(harms[pick % len(harms)])

    @precondition(lambda self: self.world.applications())
    @rule(pick=st.integers(0, 9), often=st.integers(0, 3))
    def abort(self, pick: int, often: int) -> None:
        if not often:
            applications = self.world.applications()
            applications[pick % len(applications)].abort()

    @invariant()
    def holds(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.settle()
        self.world.finish()
        self.world.close()


TestTunnel = TunnelMachine.TestCase
TestTunnel.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "block" in metafunc.fixturenames:
        runs: int = metafunc.config.getoption("--model-runs")
        metafunc.parametrize("block", range(max(runs // BLOCK, 1)))


def test_random_schedules(block: int) -> None:
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        try:
            run(seed)
        except Exception as error:
            error.add_note(f"seed {seed}; step by step: python -m tests.model {seed}")
            raise


def test_the_schedules_are_worth_something() -> None:
    """Links that carry one stream each, or streams that never lose one, would show nothing."""
    worlds = [run(seed) for seed in range(200)]
    outages = [world.client.outages for world in worlds]
    assert sum(counts.cuts for counts in outages) > 100
    assert sum(counts.resumptions for counts in outages) > 100
    assert sum(counts.replayed for counts in outages) > 30
    assert sum(connection.reverse for world in worlds for connection in world.connections) > 20
    assert max(link.protocol.n for world in worlds for wire in world.all_wires if (link := wire.near.handler)) >= 3
    ends = [end for world in worlds for connection in world.connections for end in connection.outcomes["ingress"]]
    assert {"finished", "refused", "reset"} <= set(ends)
    assert ends.count("finished") > len(ends) / 2


# --- single rules -----------------------------------------------------------------------------------------------------


def carried(world: World) -> Stream:
    """The only stream, at the client; it is on a link."""
    (stream,) = world.client.streams.values()
    assert stream.link is not None
    return stream


def until_opened(world: World) -> None:
    for _ in range(50):
        if world.connections[-1].egress.sock is not None:
            return
        if not world.flow():
            world.tick(0.1)
    raise AssertionError("the target was never reached")


@pytest.mark.parametrize("size", [1, WINDOW, 3 * WINDOW])
def test_one_byte_through_for_each_link_is_progress(size: int) -> None:
    """Invariant 8: every link is cut as soon as one byte of the stream came out of it, at either end."""
    world = World()
    connection = world.open(bytes(range(size)), bytes(range(100, 100 + size)))
    seen: dict[Stream, int] = {}
    cuts = 0
    for _ in range(200_000):
        if world.over():
            break
        moves = world.turns("client") + world.turns("server") + world.answers() + world.application_moves(size)
        for wire in world.wires:
            busy = any(protocol.state is Exchange.BUSY for protocol in wire.protocols())
            moves += wire.moves(1 if busy else 1 << 20)
        moves = moves or [(world.tick, 0.2)]
        move = world.chance.choice(moves)
        world.do(move)
        if move[0].__name__ == "carry":  # and is read at once: bytes that come together count as one
            for turn in world.turns("client") + world.turns("server"):
                if turn[1] is move[1].peer.handler:
                    world.do(turn)
        for wire in world.wires:
            for sock in wire.ends:
                stream = sock.handler.stream if sock.handler is not None else None
                if stream is not None and stream.inbound.received > seen.get(stream, 0) and not wire.cut:
                    seen[stream] = stream.inbound.received
                    cuts += 1
                    wire.break_off(world.chance)
                    wire.notice(wire.near, reset=True)
                    wire.notice(wire.far, reset=True)
                    world.check()
                    break
    assert world.over()
    assert cuts >= 2 * size  # one byte, or the end, in one direction over each
    assert bytes(connection.ingress.read) == connection.egress.to_write
    assert bytes(connection.egress.read) == connection.ingress.to_write
    world.finish()


@pytest.mark.parametrize("gone", ["client", "server"])
def test_without_the_other_end_all_is_over_after_the_window(gone: str) -> None:
    """Invariant 7: no stream, link, socket, task or tombstone outlives the window by much."""
    world = World(resume_window=20)
    connections = [world.open(b"x" * 40, b"y" * 40) for _ in range(3)]
    until_opened(world)
    world.unreachable = True
    for wire in world.wires:
        wire.break_off(world.chance)
        sock = wire.near if gone == "server" else wire.far
        wire.notice(sock, reset=False)
    for _ in range(70):  # 26 s until the silence is noticed, 20 s of window, and the sweeps
        world.flow()
        world.tick(1.0)
        world.check()
    assert world.over()
    assert all(connection.outcomes["ingress"] == ["lost"] for connection in connections)
    assert all(set(connection.outcomes["egress"]) <= {"lost"} for connection in connections)
    assert not world.server._sessions
    world.leave()


def write_before_reading(size: int, *, reader_waits: bool) -> bool:
    """A client that writes `size` bytes before it reads one, to an echo server. Returns whether it could.

    Args:
        size: more than one window, less than all buffers on the way and back.
        reader_waits: the mistake: the client's link is not read while its local socket takes nothing.
    """
    world = World()
    connection = world.open(bytes(range(size)), b"", echo=True, room=4)
    ingress = connection.ingress
    ingress.stalled = True
    until_opened(world)
    client = carried(world).link
    assert client is not None
    for _ in range(5000):
        if len(connection.egress.read) == size:
            break
        stream = client.stream
        waits = reader_waits and stream is not None and len(stream.inbound.inbox) > 0
        client.mask = 0 if waits else client.mask | READ
        moves = world.moves(64)
        if moves:
            world.do(moves[0])
        else:
            world.sweep("client")
            world.sweep("server")
        world.check()
    done = len(connection.egress.read) == size  # all of it is at the echo server, and nothing was read here
    client.mask |= READ
    ingress.stalled = False
    world.settle()
    world.finish()
    assert bytes(ingress.read) == ingress.to_write
    return done


def test_a_client_that_writes_before_it_reads_does_not_deadlock_with_an_echo_server() -> None:
    """Without credit the reader of a link would have to wait for a local socket that nobody reads, and the acks that
    let the client go on would queue behind that data. Plain TCP carries this; so must the tunnel."""
    assert write_before_reading(3 * WINDOW, reader_waits=False)


def test_the_same_deadlocks_when_the_reader_waits() -> None:
    """The test above can fail."""
    with pytest.raises(AssertionError):
        assert write_before_reading(3 * WINDOW, reader_waits=True)


def test_crossing_resets_answer_each_other_and_the_link_is_used_again() -> None:
    world = World()
    first = world.open(b"x" * 100, b"y" * 100)
    until_opened(world)
    client = carried(world).link
    (wire,) = [wire for wire in world.wires if wire.near.handler is client]
    server = wire.far.handler
    assert client is not None and server is not None
    first.ingress.abort()
    first.egress.abort()
    for side, link in (("client", client), ("server", server)):
        for move in world.turns(side):  # type: ignore[arg-type]
            if move[1] is not link:  # each end resets before it hears of the other's reset
                world.do(move)
    assert client.protocol.state is server.protocol.state is Exchange.RESETTING
    world.settle()
    assert client.protocol.state is server.protocol.state is Exchange.IDLE
    second = world.open(b"again", b"and again")
    world.settle()
    assert len(world.wires) == 2  # that one, and the control link
    world.finish()
    assert bytes(second.egress.read) == b"again"
    assert client.protocol.n == server.protocol.n == 2
