"""Links and streams of one client, as both roles see them; and the principal whom they are counted for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from wstunnel import limits, logs
from wstunnel.errors import ProtocolError
from wstunnel.stream import Stream
from wstunnel.wire.credit import Budget
from wstunnel.wire.protocol import StreamState
from wstunnel.wire.states import Half
from wstunnel.wire.tombstones import Tombstones

if TYPE_CHECKING:
    from wstunnel.link import Link
    from wstunnel.reactor import Handler, Reactor
    from wstunnel.wire.messages import AnyMessage

HALF_CLOSED_SWEEPS = 30
"""Sweeps between two looks at the half-closed streams: their limit is an hour."""


class Principal:
    """Who was authenticated, and what is held for them over all their sessions.

    Args:
        name: the user's name.
        process: the budget of the whole process.
        everyone: all principals of the process, this one among them.
    """

    def __init__(self, name: str, process: Budget, everyone: dict[str, Principal]) -> None:
        self.name = name
        self.budget = Budget(limits.PRINCIPAL_BYTES, process)
        self.everyone = everyone
        everyone[name] = self
        self.sessions: set[Session] = set()
        self.tombstones = Tombstones()
        self.links = 0
        self.streams = 0


class Session:
    """Owner of links and streams. Subclassed by the roles, which say what idle links and new messages mean to them.

    The role's task calls `sweep` once a second and `close` at the end; a session has no task of its own.

    Args:
        session_id: 22 base64url characters.
        principal: whom to count for; the session enters itself into its `sessions`.
        reactor: where sockets live.
        log: of the role.

    Attributes:
        window: first window of its streams, in bytes. The protocol fixes it; tests make it small.
        streams: by id, from their first message until both ends are done with them.
        links: all links, whatever they carry.
    """

    window = limits.WINDOW_FIRST

    def __init__(self, session_id: str, principal: Principal, reactor: Reactor, log: logs.Log) -> None:
        self.id = session_id
        self._name = logs.hash_id(session_id)
        self.principal = principal
        self.reactor = reactor
        self.log = log
        self.streams: dict[str, Stream] = {}
        self.links: set[Link] = set()
        self._moved: dict[Stream, None] = {}  # in order, so that a run can be repeated
        self._starved: dict[Stream, None] = {}
        self._half_closed: dict[Stream, tuple[int, float]] = {}
        self._sweeps = 0
        self._relieving = False
        principal.sessions.add(self)

    # --- links --------------------------------------------------------------------------------------------------------

    def adopt_link(self, link: Link) -> None:
        """The link belongs to this session from now on."""
        link.owner = self
        self.links.add(link)
        self.principal.links += 1

    def message(self, link: Link, message: AnyMessage) -> None:
        """A message that the role must act on. Here: one that no role expects."""
        raise ProtocolError(f"{type(message).__name__.lower()} is not expected here")

    def idle(self, link: Link) -> None:
        """The link may carry another stream."""

    def lost(self, link: Link, reason: str) -> None:
        """The link's connection is gone."""
        self.links.discard(link)
        self.principal.links -= 1
        self.log.debug("link lost", peer=link.peer, role=link.protocol.role, reason=reason)

    # --- streams ------------------------------------------------------------------------------------------------------

    def make_stream(self, stream_id: str, *, egress: bool, target: str, peer: str) -> Stream:
        """A new stream, in the table."""
        state = StreamState(stream_id, egress=egress, budget=self.principal.budget, window=self.window)
        stream = Stream(state, self, target=target, peer=peer, now=self.reactor.now)
        self.streams[stream_id] = stream
        self.principal.streams += 1
        return stream

    def _whose(self, stream: Stream) -> dict[str, object]:
        fields: dict[str, object] = {"peer": stream.peer, "principal": self.principal.name, "session": self._name}
        if stream.application:
            fields["application"] = stream.application
        return fields

    def stream_opened(self, stream: Stream) -> None:
        self.log.info(
            "stream opened",
            stream=logs.hash_id(stream.state.id), target=stream.target, address=stream.address, **self._whose(stream),
        )  # fmt: skip

    def stream_ended(self, stream: Stream) -> None:
        del self.streams[stream.state.id]
        self.principal.streams -= 1
        self._moved.pop(stream, None)
        self._starved.pop(stream, None)
        self._half_closed.pop(stream, None)
        code, message = stream.outcome or ("internal", "")
        inbound = stream.inbound.received - (stream.inbound.total is not None)
        fields: dict[str, object] = {
            "stream": logs.hash_id(stream.state.id), "target": stream.target,
            "sent": stream.outbound.replay.end, "received": inbound,
            "seconds": round(self.reactor.now - stream.created, 3), "reason": code,
            **self._whose(stream),
        }  # fmt: skip
        if message:
            fields["detail"] = message
        if stream.note:
            fields["policy"] = stream.note
        if stream.state.opened:
            self.log.info("stream ended", **fields)
        else:
            self.log.warning("stream refused", **fields)

    def stream_moved(self, stream: Stream) -> None:
        self._moved[stream] = None

    def stream_starved(self, stream: Stream) -> None:
        self._starved[stream] = None
        self.stream_held()  # bytes being sent fill the budgets, too

    def stream_held(self) -> None:
        if not self._relieving and self.principal.budget.exhausted():
            self._relieving = True
            self.reactor.later(self._relieve)

    def _relieve(self) -> None:
        """A budget is used up: the stream that holds most has to go, of the principal or of all."""
        self._relieving = False
        principal = self.principal
        while principal.budget.exhausted():
            full = principal.budget.held >= principal.budget.capacity
            principals = [principal] if full else list(principal.everyone.values())
            largest = max(
                (stream for one in principals for session in one.sessions for stream in session.streams.values()),
                key=_held,
                default=None,
            )
            if largest is None or not _held(largest):
                return
            largest.outbound.discard()
            largest.reset("limit", "too much memory is held: the largest stream is reset")
            largest.state.discard()

    # --- time ---------------------------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """Once a second: late acks, silent links, streams that waited for memory, half-closed ones."""
        moved, self._moved = self._moved, {}
        for stream in moved:
            if stream.link is not None and stream.outcome is None:
                stream.state.ack_wanted = True
                _guarded(stream.link, stream.link.flush)
        starved, self._starved = self._starved, {}
        for stream in starved:
            stream.refresh()
        for link in list(self.links):
            _guarded(link, partial(link.sweep, now))
        if not self.reactor.reports_hangups:
            for stream in list(self.streams.values()):
                if stream.sock is not None and not stream.mask:
                    stream.on_hangup()
        self._sweeps += 1
        if self._sweeps % HALF_CLOSED_SWEEPS == 0:
            self._sweep_half_closed(now)

    def _sweep_half_closed(self, now: float) -> None:
        for stream in list(self.streams.values()):
            outbound, inbound = stream.outbound, stream.inbound
            if (outbound.total is None) == (inbound.total is None) and outbound.state is not Half.ENDED:
                self._half_closed.pop(stream, None)
                continue
            mark = outbound.replay.start + inbound.consumed
            seen, since = self._half_closed.get(stream, (-1, now))
            if mark != seen:
                self._half_closed[stream] = (mark, now)
            elif now - since >= limits.HALF_CLOSED_SECONDS:
                stream.reset("idle", "half-closed and silent for an hour")

    def close(self, code: int, reason: str) -> None:
        """End everything: streams are reset, links get a close frame. Sockets are gone when the links are."""
        for stream in list(self.streams.values()):
            stream.reset("shutdown", reason)
        for link in list(self.links):
            link.close(code, reason)

    def leave(self) -> None:
        """The session is over: it no longer counts for its principal."""
        self.principal.sessions.discard(self)


def _guarded(handler: Handler, function: Callable[[], None]) -> None:
    """Call outside of the reactor as the reactor would: a fault ends only the handler that it belongs to."""
    try:
        function()
    except Exception as error:
        handler.fail(error)


def _held(stream: Stream) -> int:
    return len(stream.outbound.replay) + len(stream.inbound.inbox)
