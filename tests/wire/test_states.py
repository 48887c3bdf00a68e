"""wire/states.py: the tables are complete, and say what the protocol says. Messages against them: test_protocol.py."""

from __future__ import annotations

import typing
from collections.abc import Hashable, Mapping
from enum import Enum

import pytest

from wstunnel.wire.messages import Ack, AnyMessage, Bye, Eof, Open, Opened, Ping, Pong, Reset
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
    def test_eof_then_its_ack_and_nothing_else(self) -> None:
        assert HALF == {
            (Half.OPEN, HalfEvent.EOF): Half.ENDED,
            (Half.ENDED, HalfEvent.EOF_ACK): Half.DONE,
        }


class TestExchange:
    def test_the_whole_table(self) -> None:
        n, i, b, r, c = Exchange.NEW, Exchange.IDLE, Exchange.BUSY, Exchange.RESETTING, Exchange.CLOSED
        rows = {
            ExchangeEvent.GREETED: {n: i, b: b, r: r},
            ExchangeEvent.OPEN: {n: b, i: b},
            ExchangeEvent.FINISHED: {b: i},
            ExchangeEvent.RESET_SENT: {b: r},
            ExchangeEvent.RESET_RECEIVED: {b: i, r: i},
            ExchangeEvent.CLOSED: {n: c, i: c, b: c, r: c, c: c},
        }
        assert {(before, event): after for event, row in rows.items() for before, after in row.items()} == EXCHANGE

    def test_closed_is_final(self) -> None:
        assert reachable(EXCHANGE, Exchange.CLOSED) == {Exchange.CLOSED}

    def test_a_link_is_used_again_only_after_both_ends_or_both_resets(self) -> None:
        """Nothing but the first greeting, the end of both halves and the peer's reset leads to idle."""
        assert {(before, event) for (before, event), after in EXCHANGE.items() if after is Exchange.IDLE} == {
            (Exchange.NEW, ExchangeEvent.GREETED),
            (Exchange.BUSY, ExchangeEvent.FINISHED),
            (Exchange.BUSY, ExchangeEvent.RESET_RECEIVED),
            (Exchange.RESETTING, ExchangeEvent.RESET_RECEIVED),
        }


class TestExpected:
    def test_the_whole_table(self) -> None:
        of_a_stream = {Opened, Ack, Eof, Reset}
        anywhere = {Ping, Pong}
        assert {
            Exchange.NEW: set(),
            Exchange.IDLE: {Open, Bye} | anywhere,
            Exchange.BUSY: of_a_stream | anywhere,
            Exchange.RESETTING: of_a_stream | anywhere,
            Exchange.CLOSED: set(),
        } == EXPECTED
        assert set().union(*EXPECTED.values()) < set(typing.get_args(AnyMessage))
