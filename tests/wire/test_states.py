"""wire/states.py: the tables are complete, and say what the protocol says. Messages against them: test_protocol.py."""

from __future__ import annotations

import typing
from collections.abc import Hashable, Mapping
from enum import Enum

import pytest

from wstunnel.wire.messages import (
    Ack,
    AnyMessage,
    Bye,
    Detached,
    Drain,
    Eof,
    Gone,
    Listen,
    Listening,
    Need,
    Open,
    Opened,
    Ping,
    Pong,
    Reset,
    Resume,
    Resumed,
    Unlisten,
)
from wstunnel.wire.states import EXCHANGE, EXPECTED, HALF, Exchange, ExchangeEvent, Half, HalfEvent


def reachable(table: Mapping[tuple[typing.Any, typing.Any], Enum], start: Hashable) -> set[Hashable]:
    """All states that some sequence of events leads to."""
    seen = {start}
    while more := {after for (before, _), after in table.items() if before in seen} - seen:
        seen |= more
    return seen


@pytest.mark.parametrize(
    ("table", "states", "events"),
    [(HALF, Half, HalfEvent), (EXCHANGE, Exchange, ExchangeEvent)],
    ids=["half", "exchange"],
)
def test_every_state_is_reached_and_every_event_is_used(
    table: dict[tuple[Enum, Enum], Enum], states: type[Enum], events: type[Enum]
) -> None:
    assert reachable(table, next(iter(states))) == set(states)
    assert {event for _, event in table} == set(events)
    assert {before for before, _ in table} | set(table.values()) == set(states)


class TestHalf:
    def test_the_whole_table(self) -> None:
        opened, ended, done = Half.OPEN, Half.ENDED, Half.DONE
        rows = {
            HalfEvent.EOF: {opened: ended},
            HalfEvent.EOF_ACK: {ended: done},
            HalfEvent.EOF_LOST: {opened: opened, ended: opened, done: done},
            HalfEvent.ACK_LOST: {opened: opened, ended: ended, done: ended},
        }
        assert {(before, event): after for event, row in rows.items() for before, after in row.items()} == HALF

    @pytest.mark.parametrize("event", [HalfEvent.EOF_LOST, HalfEvent.ACK_LOST])
    def test_a_link_can_be_lost_in_any_state_and_twice(self, event: HalfEvent) -> None:
        for state in Half:
            after = HALF[state, event]
            assert HALF[after, event] is after


class TestExchange:
    def test_the_whole_table(self) -> None:
        n, i, g, b, f, r, c = Exchange  # new, idle, resuming, busy, flow, resetting, closed
        assert g is Exchange.RESUMING
        rows = {
            ExchangeEvent.GREETED: {n: i, b: b, f: f, r: r},
            ExchangeEvent.OPEN: {n: b, i: b},
            ExchangeEvent.FLOW: {b: f},
            ExchangeEvent.RESUME_SENT: {i: g},
            ExchangeEvent.RESUMED: {g: b},
            ExchangeEvent.GONE: {g: i, b: i},
            ExchangeEvent.FINISHED: {b: i},
            ExchangeEvent.RESET_SENT: {b: r, f: r},
            ExchangeEvent.RESET_RECEIVED: {b: i, f: i, r: i},
            ExchangeEvent.CLOSED: {n: c, i: c, g: c, b: c, f: c, r: c, c: c},
        }
        assert {(before, event): after for event, row in rows.items() for before, after in row.items()} == EXCHANGE

    def test_closed_is_final(self) -> None:
        assert reachable(EXCHANGE, Exchange.CLOSED) == {Exchange.CLOSED}

    def test_a_link_is_used_again_only_after_both_ends_or_both_resets(self) -> None:
        """Nothing but the first greeting, the end of both halves, the peer's reset and `gone` leads to idle."""
        assert {(before, event) for (before, event), after in EXCHANGE.items() if after is Exchange.IDLE} == {
            (Exchange.NEW, ExchangeEvent.GREETED),
            (Exchange.RESUMING, ExchangeEvent.GONE),
            (Exchange.BUSY, ExchangeEvent.GONE),
            (Exchange.BUSY, ExchangeEvent.FINISHED),
            (Exchange.BUSY, ExchangeEvent.RESET_RECEIVED),
            (Exchange.FLOW, ExchangeEvent.RESET_RECEIVED),
            (Exchange.RESETTING, ExchangeEvent.RESET_RECEIVED),
        }

    def test_streams_resume_only_on_links_that_have_greeted(self) -> None:
        assert {before for before, event in EXCHANGE if event is ExchangeEvent.RESUME_SENT} == {Exchange.IDLE}


class TestExpected:
    def test_the_whole_table(self) -> None:
        of_a_stream = {Opened, Ack, Eof, Reset}
        of_places = {Listen, Listening, Unlisten, Need}
        anywhere = {Ping, Pong}
        assert {
            Exchange.NEW: set(),
            Exchange.IDLE: {Open, Resume, Detached, Gone, Drain, Bye} | of_places | anywhere,
            Exchange.RESUMING: {Resumed, Gone} | anywhere,
            Exchange.BUSY: of_a_stream | anywhere,
            Exchange.FLOW: {Opened, Reset} | anywhere,
            Exchange.RESETTING: of_a_stream | anywhere,
            Exchange.CLOSED: set(),
        } == EXPECTED
        assert set().union(*EXPECTED.values()) < set(typing.get_args(AnyMessage))
