"""Each rule that makes the protocol safe, taken away: the model must fail without it, or it would not have held it.

A mutation replaces a piece of the product for one test. Its first seeds are known to fail; should they fail no more,
because the schedules have changed, others are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from unittest import mock

import pytest

from tests.model import World, installed, run
from wstunnel import server_session
from wstunnel.client_session import ClientSession
from wstunnel.link import Link
from wstunnel.server_session import ServerSession
from wstunnel.stream import Stream
from wstunnel.wire.credit import ReceiveWindow
from wstunnel.wire.directions import Inbound, Outbound
from wstunnel.wire.messages import Resume
from wstunnel.wire.protocol import LinkProtocol, StreamState
from wstunnel.wire.states import EXCHANGE, Exchange, ExchangeEvent, Half
from wstunnel.wire.tombstones import FINISHED, Tombstone, Tombstones

Replacement = tuple[Any, str, Any]
TRIED = 1500  # seeds beyond the known ones


@dataclass
class Mutation:
    """What takes one rule away, and seeds that show it."""

    name: str
    replacements: list[Replacement] = field(default_factory=list)
    table: dict[tuple[Exchange, ExchangeEvent], Exchange] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()

    @contextmanager
    def applied(self) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name, value in self.replacements:
                stack.enter_context(mock.patch.object(owner, name, value))
            stack.enter_context(mock.patch.dict(EXCHANGE, self.table))
            yield


def replacing(owner: Any, name: str) -> Callable[[Callable[..., Any]], Replacement]:
    """Makes a replacement of a function that gets the original first."""
    original = getattr(owner, name)

    def decorate(function: Callable[..., Any]) -> Replacement:
        return owner, name, lambda *args, **options: function(original, *args, **options)

    return decorate


# --- offsets and credit -----------------------------------------------------------------------------------------------


@replacing(ReceiveWindow, "grant")
def falling_grant(grant: Any, window: ReceiveWindow, consumed: int, *rest: Any) -> int:
    grant(window, consumed, *rest)
    window.limit = consumed + window.size // 2  # what was granted before is forgotten
    return window.limit


@replacing(Outbound, "acknowledge")
def eof_without_offset(acknowledge: Any, outbound: Outbound, consumed: int, limit: int) -> None:
    ended = outbound.state is Half.ENDED and consumed == outbound.total
    acknowledge(outbound, consumed, limit)
    if ended:  # the ack of the last byte counts as that of the EOF
        outbound.state = Half.DONE


@replacing(Inbound, "restate")
def received_is_consumed(restate: Any, inbound: Inbound) -> tuple[int, int, int]:
    _received, consumed, limit = restate(inbound)
    return consumed, consumed, limit


@replacing(Outbound, "resume")
def resume_without_acks(resume: Any, outbound: Outbound, received: int, _consumed: int, _limit: int) -> int:
    base = outbound.replay.end + 1 if outbound.state is Half.DONE else outbound.replay.start
    return int(resume(outbound, received, base, outbound.limit))


# --- exchanges --------------------------------------------------------------------------------------------------------


@replacing(LinkProtocol, "_settle")
def release_at_eof(_settle: Any, protocol: LinkProtocol) -> None:
    stream = protocol.stream
    if stream is not None and stream.outbound.state is not Half.OPEN and stream.inbound.state is Half.DONE:
        protocol._move(ExchangeEvent.FINISHED)


@replacing(LinkProtocol, "pull")
def ack_after_final(pull: Any, protocol: LinkProtocol, *args: Any) -> Any:
    stream = protocol.stream
    if stream is not None and stream.ack_wanted and stream.inbound.state is Half.DONE:
        stream.inbound.state = Half.ENDED  # so that it acks once more
    return pull(protocol, *args)


@replacing(StreamState, "link_lost")
def reset_forgotten(link_lost: Any, state: StreamState) -> None:
    state.reset_wanted = None
    link_lost(state)


# --- resumption -------------------------------------------------------------------------------------------------------


@replacing(Link, "give_up_stream")
def late_detach(_give_up: Any, link: Link, _reason: str) -> None:
    if link.stream is not None:
        link.stream.link = None  # and the old link goes on delivering


@replacing(ServerSession, "_resume")
def any_epoch(resume: Any, session: ServerSession, link: Link, message: Resume) -> None:
    stream = session.streams.get(message.stream)
    if stream is not None:
        stream.state.epoch = message.epoch - 1
    resume(session, link, message)


@replacing(Tombstones, "add")
def unknown_not_remembered(add: Any, stones: Tombstones, stream_id: str, stone: Tombstone, now: float) -> None:
    if stone.outcome != "unknown":
        add(stones, stream_id, stone, now)


@replacing(Tombstones, "find")
def answering_forgets(find: Any, stones: Tombstones, stream_id: str) -> Any:
    stone = find(stones, stream_id)
    stones.forget(stream_id)
    return stone


@replacing(ClientSession, "stream_unknown")
def afresh_under_the_same_id(unknown: Any, session: ClientSession, stream: Stream) -> bool:
    old = stream.state.id
    afresh = bool(unknown(session, stream))
    if afresh:
        session.streams[old] = session.streams.pop(stream.state.id)
        stream.state.id = old
    return afresh


@replacing(ClientSession, "_resume")
def second_open(resume: Any, session: ClientSession, stream: Stream, link: Link) -> None:
    if stream.state.unanswered():
        stream.state.outbound.restart()
        session._recovery.add_afresh(stream)
    resume(session, stream, link)


@replacing(Stream, "gone")
def gone_is_believed(gone: Any, stream: Stream, outcome: str, code: str, message: str) -> None:
    if outcome == "finished" and stream.reason is None:
        stream._over("finished", "")
    else:
        gone(stream, outcome, code, message)


finished_instead_of_reset: Replacement = (server_session, "_stone", lambda _outcome: FINISHED)


MUTATIONS = [
    Mutation("shrink", [falling_grant], seeds=(1, 3)),
    Mutation("eof_takes_no_offset", [eof_without_offset], seeds=(7, 9)),
    Mutation("received_is_consumed", [received_is_consumed], seeds=(10, 106)),
    Mutation("no_sync", [resume_without_acks], seeds=(5, 21)),
    Mutation("release_at_eof", [release_at_eof], seeds=(1, 3)),
    Mutation("sweep_after_final", [ack_after_final], seeds=(52, 109)),
    Mutation("reset_after_final", [(StreamState, "resettable", lambda _state: True)], seeds=(206, 494)),
    Mutation("reset_not_awaited", table={(Exchange.BUSY, ExchangeEvent.RESET_SENT): Exchange.IDLE}, seeds=(0, 2)),
    Mutation("pending_reset_forgotten", [reset_forgotten], seeds=(22, 62)),
    Mutation("late_detach", [late_detach], seeds=(4, 10)),
    Mutation(
        "not_silent_while_resuming", table={(Exchange.IDLE, ExchangeEvent.RESUME_SENT): Exchange.BUSY}, seeds=(0, 4)
    ),
    Mutation("no_opened", [(Stream, "dialled", lambda _stream: None)], seeds=(4, 5)),
    Mutation("no_epoch", [any_epoch], seeds=(467, 736)),
    Mutation("no_unknown_tomb", [unknown_not_remembered], seeds=(61, 115)),
    Mutation("answering_forgets", [answering_forgets], seeds=(121, 181)),
    Mutation("same_id", [afresh_under_the_same_id], seeds=(4, 5)),
    Mutation("second_open", [second_open], seeds=(4, 5)),
    Mutation("gone_no_reset", [finished_instead_of_reset], seeds=(41, 87)),
    Mutation("gone_trusts_a_liar", [gone_is_believed, finished_instead_of_reset], seeds=(41, 87)),
    Mutation("no_lost", [(ServerSession, "_tell_detached", lambda _session: None)], seeds=(333, 358)),
]


def failure(seed: int, mutation: Mutation | None = None) -> Exception | None:
    """How the model fails with this seed, if it does."""
    with mutation.applied() if mutation is not None else nullcontext():
        try:
            run(seed)
        except Exception as error:
            return error
    return None


@pytest.fixture(autouse=True, scope="module")
def model() -> Iterator[None]:
    with installed():
        yield


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_model_fails_without(mutation: Mutation) -> None:
    for seed in chain(mutation.seeds, range(TRIED)):
        if failure(seed, mutation) is not None and failure(seed) is None:
            return
    pytest.fail(f"the rule may go: {TRIED} schedules do without it")


def test_a_clean_end_is_not_taken_on_trust() -> None:
    """No schedule shows this alone: a server says `finished` only of what is finished at the client, too, and a client
    that gave a stream up says `unknown` only after the window. Then the server's application must not see an end.
    """
    given_up_by_the_client()
    with (
        Mutation("gone_trusts", [gone_is_believed]).applied(),
        pytest.raises(AssertionError, match="finished"),
    ):
        given_up_by_the_client()


def given_up_by_the_client() -> None:
    """The client's window is over before the server notices that the link is gone; then it comes back."""
    world = World(resume_window=5)
    connection = world.open(b"x" * 40, b"y" * 40)
    world.flow()
    while connection.egress.sock is None:
        world.flow()
        world.tick(0.1)
    world.unreachable = True
    for wire in world.wires:
        wire.break_off(world.chance)
        wire.notice(wire.near, reset=False)
    for _ in range(8):
        world.flow()
        world.tick(1.0)
    assert connection.outcomes["ingress"] == ["lost"]
    world.unreachable = False
    for wire in world.wires:
        if wire.cut and not wire.far.closed:
            wire.notice(wire.far, reset=False)
    for _ in range(30):
        if world.over():
            break
        world.flow()
        world.check()
        world.tick(0.2)
    assert connection.outcomes["egress"] == ["lost"]
    assert connection.egress.sock.reset_by_peer, "an end nobody sent"
    world.leave()
