"""The state machines of the tunnel protocol, as tables. They know no role: both ends use the same.

A half is one direction of a stream, seen from one end. An exchange is what happens on a link from `open` until the link
may be used again. A pair that stands in no table is an error of the caller; `wire/protocol.py` checks messages against
`EXPECTED` first, so that a peer cannot cause one.
"""

from __future__ import annotations

from enum import Enum

from wstunnel.wire.messages import Ack, Bye, Eof, Message, Open, Opened, Ping, Pong, Reset


class Half(Enum):
    """One direction. Sending: ended = our EOF went out, done = it was acked. Receiving: ended = the peer's EOF came,
    done = we acked it.
    """

    OPEN = "open"
    ENDED = "ended"
    DONE = "done"


class HalfEvent(Enum):
    EOF = "eof"
    EOF_ACK = "eof_ack"


HALF: dict[tuple[Half, HalfEvent], Half] = {
    (Half.OPEN, HalfEvent.EOF): Half.ENDED,
    (Half.ENDED, HalfEvent.EOF_ACK): Half.DONE,
}


class Exchange(Enum):
    """One link."""

    NEW = "new"  # the peer's hello (at the server) or welcome (at the client) has not come
    IDLE = "idle"  # no stream
    BUSY = "busy"  # a stream
    RESETTING = "resetting"  # we sent `reset`; what arrives is discarded until the peer's
    CLOSED = "closed"


class ExchangeEvent(Enum):
    GREETED = "greeted"  # hello or welcome came
    OPEN = "open"  # sent or received
    FINISHED = "finished"  # both halves are done
    RESET_SENT = "reset_sent"
    RESET_RECEIVED = "reset_received"
    CLOSED = "closed"  # close frame, end of the connection, or an error


EXCHANGE: dict[tuple[Exchange, ExchangeEvent], Exchange] = {
    (Exchange.NEW, ExchangeEvent.GREETED): Exchange.IDLE,
    # The client need not wait for `welcome`: it may open at once (one write carries hello, open and early data).
    # `LinkProtocol.greeted` tells the two kinds of BUSY apart.
    (Exchange.NEW, ExchangeEvent.OPEN): Exchange.BUSY,
    (Exchange.IDLE, ExchangeEvent.OPEN): Exchange.BUSY,
    (Exchange.BUSY, ExchangeEvent.GREETED): Exchange.BUSY,
    (Exchange.RESETTING, ExchangeEvent.GREETED): Exchange.RESETTING,
    (Exchange.BUSY, ExchangeEvent.FINISHED): Exchange.IDLE,
    (Exchange.BUSY, ExchangeEvent.RESET_SENT): Exchange.RESETTING,
    # The answering reset goes out in the same step.
    (Exchange.BUSY, ExchangeEvent.RESET_RECEIVED): Exchange.IDLE,
    # An answer, or one that crossed ours: crossing resets answer each other.
    (Exchange.RESETTING, ExchangeEvent.RESET_RECEIVED): Exchange.IDLE,
    **{(state, ExchangeEvent.CLOSED): Exchange.CLOSED for state in Exchange},
}

EXPECTED: dict[Exchange, frozenset[type[Message]]] = {
    Exchange.NEW: frozenset(),
    Exchange.IDLE: frozenset({Open, Ping, Pong, Bye}),
    Exchange.BUSY: frozenset({Opened, Ack, Eof, Reset, Ping, Pong}),
    Exchange.RESETTING: frozenset({Opened, Ack, Eof, Reset, Ping, Pong}),
    Exchange.CLOSED: frozenset(),
}
"""Messages that may come in each state after the greeting. Those with a lower `n` than the link's are ignored."""
