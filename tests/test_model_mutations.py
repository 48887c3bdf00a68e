"""Each rule that makes the protocol safe, taken away: the model must fail without it, or it would not have held it.

A mutation replaces a piece of the product for one test. Its first seeds are known to fail; should they fail no more,
because the schedules have changed, others are tried.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from unittest import mock

import pytest

from tests.model import installed, run
from wstunnel import server_session
from wstunnel.client_session import ClientSession
from wstunnel.errors import ProtocolError
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
    Mutation("shrink", [falling_grant]),
    Mutation("eof_takes_no_offset", [eof_without_offset]),
    Mutation("received_is_consumed", [received_is_consumed]),
    Mutation("no_sync", [resume_without_acks]),
    Mutation("release_at_eof", [release_at_eof]),
    Mutation("sweep_after_final", [ack_after_final]),
    Mutation("reset_after_final", [(StreamState, "resettable", lambda _state: True)]),
    Mutation("reset_not_awaited", table={(Exchange.BUSY, ExchangeEvent.RESET_SENT): Exchange.IDLE}),
    Mutation("pending_reset_forgotten", [reset_forgotten]),
    Mutation("late_detach", [late_detach]),
    Mutation("not_silent_while_resuming", table={(Exchange.IDLE, ExchangeEvent.RESUME_SENT): Exchange.BUSY}),
    Mutation("no_opened", [(Stream, "dialled", lambda _stream: None)]),
    Mutation("no_epoch", [any_epoch]),
    Mutation("no_unknown_tomb", [unknown_not_remembered]),
    Mutation("answering_forgets", [answering_forgets]),
    Mutation("same_id", [afresh_under_the_same_id]),
    Mutation("second_open", [second_open]),
    Mutation("gone_no_reset", [finished_instead_of_reset]),
    Mutation("gone_trusts_a_liar", [gone_is_believed, finished_instead_of_reset]),
    Mutation("no_lost", [(ServerSession, "_tell_detached", lambda _session: None)]),
]


def failure(mutation: Mutation, seed: int) -> Exception | None:
    """How the model fails with this seed, if it does."""
    with mutation.applied():
        try:
            run(seed)
        except Exception as error:
            return error
    return None
