"""The state machines of the tunnel protocol, as tables. They know no role: both ends use the same.

A half is one direction of a stream, seen from one end. An exchange is what happens on a link from `open` or `resume`
until the link may be used again. A pair that stands in no table is an error of the caller; `wire/protocol.py` checks
messages against `EXPECTED` first, so that a peer cannot cause one.
"""

from __future__ import annotations

from enum import Enum

from wstunnel.wire.messages import (
    Ack,
    Bye,
    Detached,
    Drain,
    Eof,
    Gone,
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
)


class _State(Enum):
    """Members are looked up in tables for each message, and `Enum` hashes their names, in Python."""

    __hash__ = object.__hash__


class Half(_State):
    """One direction. Sending: ended = our EOF went out, done = it was acked. Receiving: ended = the peer's EOF came,
    done = we acked it.
    """

    OPEN = "open"
    ENDED = "ended"
    DONE = "done"


class HalfEvent(_State):
    EOF = "eof"
    EOF_ACK = "eof_ack"
    EOF_LOST = "eof_lost"  # sending: the link is gone, and with it perhaps our EOF
    ACK_LOST = "ack_lost"  # receiving: the link is gone, and with it perhaps our ack


HALF: dict[tuple[Half, HalfEvent], Half] = {
    (Half.OPEN, HalfEvent.EOF): Half.ENDED,
    (Half.ENDED, HalfEvent.EOF_ACK): Half.DONE,
    (Half.OPEN, HalfEvent.EOF_LOST): Half.OPEN,
    (Half.ENDED, HalfEvent.EOF_LOST): Half.OPEN,
    (Half.DONE, HalfEvent.EOF_LOST): Half.DONE,  # what was acked stays so
    (Half.OPEN, HalfEvent.ACK_LOST): Half.OPEN,
    (Half.ENDED, HalfEvent.ACK_LOST): Half.ENDED,
    (Half.DONE, HalfEvent.ACK_LOST): Half.ENDED,
}


class Exchange(_State):
    """One link."""

    NEW = "new"  # the peer's hello (at the server) or welcome (at the client) has not come
    IDLE = "idle"  # no stream
    RESUMING = "resuming"  # we sent `resume`; nothing is sent for the stream until the answer
    BUSY = "busy"  # a stream
    FLOW = "flow"  # a datagram flow
    RESETTING = "resetting"  # we sent `reset`; what arrives is discarded until the peer's
    CLOSED = "closed"


class ExchangeEvent(_State):
    GREETED = "greeted"  # hello or welcome came
    OPEN = "open"  # `open` sent or received, or `resume` received
    FLOW = "flow"  # what was just opened carries datagrams
    RESUME_SENT = "resume_sent"
    RESUMED = "resumed"  # received
    GONE = "gone"  # sent or received
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
    (Exchange.IDLE, ExchangeEvent.RESUME_SENT): Exchange.RESUMING,
    (Exchange.RESUMING, ExchangeEvent.RESUMED): Exchange.BUSY,
    (Exchange.RESUMING, ExchangeEvent.GONE): Exchange.IDLE,
    # The answer goes out in the step in which `resume` came.
    (Exchange.BUSY, ExchangeEvent.GONE): Exchange.IDLE,
    (Exchange.BUSY, ExchangeEvent.GREETED): Exchange.BUSY,
    # Who is asked for the flow knows it by the target or by the forward, in the step in which `open` came.
    (Exchange.BUSY, ExchangeEvent.FLOW): Exchange.FLOW,
    (Exchange.FLOW, ExchangeEvent.GREETED): Exchange.FLOW,
    (Exchange.FLOW, ExchangeEvent.RESET_SENT): Exchange.RESETTING,
    (Exchange.FLOW, ExchangeEvent.RESET_RECEIVED): Exchange.IDLE,
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
    Exchange.IDLE: frozenset({Open, Resume, Ping, Pong, Detached, Gone, Listen, Listening, Unlisten, Need, Drain, Bye}),
    Exchange.RESUMING: frozenset({Resumed, Gone, Ping, Pong}),
    Exchange.BUSY: frozenset({Opened, Ack, Eof, Reset, Ping, Pong}),
    # A flow has no offsets, and nobody waits for its end.
    Exchange.FLOW: frozenset({Opened, Reset, Ping, Pong}),
    Exchange.RESETTING: frozenset({Opened, Ack, Eof, Reset, Ping, Pong}),
    Exchange.CLOSED: frozenset(),
}
"""Messages that may come in each state after the greeting. Those with a lower `n` than the link's are ignored."""
