"""The protocol model: the product's two ends under arbitrary interleavings, splits, stalls, refusals and aborts."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.model import WINDOW, World
from wstunnel.reactor import READ
from wstunnel.wire.states import Exchange

pytestmark = pytest.mark.timeout(900)  # hypothesis under coverage on a busy machine takes minutes
BYTES = st.integers(0, 200).map(lambda size: bytes((size * 7 + i * 13) & 255 for i in range(size)))


class TunnelMachine(RuleBasedStateMachine):
    """Steps of any size in any order; at the end everything must come out even."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @precondition(lambda self: len(self.world.connections) < 5)
    @rule(upward=BYTES, downward=BYTES, refuse=st.booleans(), echo=st.booleans(), room=st.integers(1, 40))
    def open(self, upward: bytes, downward: bytes, refuse: bool, echo: bool, room: int) -> None:
        self.world.open(upward, b"" if echo else downward, refuse=refuse and room > 30, echo=echo, room=room)

    @rule(pick=st.integers(0, 1 << 16), size=st.integers(1, 60), times=st.integers(1, 12))
    def step(self, pick: int, size: int, times: int) -> None:
        for i in range(times):
            actions = self.world.actions(size)
            if not actions:
                return
            actions[(pick * (i + 1)) % len(actions)]()
            self.world.check()

    @rule(side=st.sampled_from(["client", "server"]))
    def sweep(self, side: str) -> None:
        self.world.sweep(side)  # type: ignore[arg-type]

    @precondition(lambda self: self.world.applications())
    @rule(pick=st.integers(0, 9), often=st.integers(0, 3))
    def abort(self, pick: int, often: int) -> None:
        if not often:
            applications = self.world.applications()
            applications[pick % len(applications)].abort()

    @rule()
    def add_link(self) -> None:
        if len(self.world.links) < 4:
            self.world.add_link()

    @invariant()
    def holds(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.settle()
        self.world.finish()


TestTunnel = TunnelMachine.TestCase
TestTunnel.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)


def run(seed: int, *, aborts: bool = True) -> World:
    """One random schedule; the seed is all that it depends on."""
    chance = random.Random(seed)
    world = World()
    for _ in range(chance.randint(1, 5)):
        sizes = [chance.choice([0, 1, 5, 40, 90, 300]) for _ in range(2)]
        up, down = (bytes(chance.randrange(256) for _ in range(size)) for size in sizes)
        echo = chance.random() < 0.25
        world.open(up, b"" if echo else down, refuse=chance.random() < 0.1, echo=echo, room=chance.randint(1, 40))
        for _ in range(chance.randint(0, 300)):
            actions = world.actions(chance.randint(1, 60))
            if actions:
                chance.choice(actions)()
            if chance.random() < 0.05:
                world.sweep(chance.choice(["client", "server"]))  # type: ignore[arg-type]
            if aborts and chance.random() < 0.004 and (applications := world.applications()):
                chance.choice(applications).abort()
            world.check()
    world.settle()
    world.finish()
    return world


@pytest.mark.parametrize("block", range(20))
def test_random_schedules(block: int) -> None:
    for seed in range(block * 25, block * 25 + 25):
        try:
            run(seed)
        except Exception as error:
            error.add_note(f"seed {seed}: `python -c 'from tests.test_model import run; run({seed})'`")
            raise


def test_random_schedules_use_links_again() -> None:
    """The model is worth nothing if its links carry one stream each."""
    assert max(client.protocol.n for seed in range(30) for client, _ in run(seed).links) >= 3


def write_before_reading(size: int, *, reader_waits: bool) -> bool:
    """A client that writes `size` bytes before it reads one, to an echo server. Returns whether it could.

    Args:
        size: more than one window, less than all buffers on the way and back.
        reader_waits: the mistake: the client's link is not read while its local socket takes nothing.
    """
    world = World()
    connection = world.open(bytes(range(size)), b"", echo=True, room=4)
    client, _server = world.links[0]
    ingress = connection.ingress
    ingress.stalled = True
    for _ in range(5000):
        if len(connection.egress.read) == size:
            break
        stream = client.stream
        waits = reader_waits and stream is not None and len(stream.inbound.inbox) > 0
        client.mask = 0 if waits else client.mask | READ
        actions = world.actions(64)
        if actions:
            actions[0]()
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
    first = world.open(b"x" * 10, b"y" * 10)
    while first.egress.sock is None:
        world.actions(100)[0]()
    (client, server) = world.links[0]
    assert first.ingress.sock is not None
    first.ingress.abort()
    first.egress.abort()
    for side, link in (("client", client), ("server", server)):
        reactor = world.reactors[side]  # type: ignore[index]
        for handler in reactor.ready():
            if handler is not link:  # each end resets before it hears of the other's reset
                reactor.turn(handler)
    assert client.protocol.state is server.protocol.state is Exchange.RESETTING
    world.settle()
    assert client.protocol.state is server.protocol.state is Exchange.IDLE
    second = world.open(b"again", b"and again")
    world.settle()
    world.finish()
    assert world.links == [(client, server)]
    assert bytes(second.egress.read) == b"again"
    assert client.protocol.n == server.protocol.n == 2
