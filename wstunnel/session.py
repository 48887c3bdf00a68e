"""Links and streams of one client, as both roles see them; and the principal whom they are counted for."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from wstunnel import limits, logs
from wstunnel.errors import ProtocolError
from wstunnel.flows import Flows
from wstunnel.outages import Outages
from wstunnel.stream import Stream
from wstunnel.wire.credit import Budget
from wstunnel.wire.protocol import StreamState
from wstunnel.wire.states import Half
from wstunnel.wire.tombstones import Crowd, Tombstones

if TYPE_CHECKING:
    from wstunnel.endpoints.plain import PlainConnection
    from wstunnel.flow import Flow
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
        remember: seconds for which ids of streams that ended are remembered.
        crowd: counts the tombstones of all principals.

    Attributes:
        links: connections that carry its streams, in use or not.
        streams: its streams and datagram flows.
        accepted: those of them that an ingress opens; a flow also while it waits.
        waiting: connections that an ingress has no link for yet.
        listening: sockets that listen for its clients.
    """

    def __init__(
        self,
        name: str,
        process: Budget,
        everyone: dict[str, Principal],
        *,
        remember: float = limits.MAX_RESUME_WINDOW_SECONDS,
        crowd: Crowd | None = None,
    ) -> None:
        self.name = name
        self.budget = Budget(limits.PRINCIPAL_BYTES, process)
        self.everyone = everyone
        everyone[name] = self
        self.sessions: set[Session] = set()
        self.plain: dict[PlainConnection, None] = {}  # in order, so that a run can be repeated
        self.tombstones = Tombstones(remember, crowd=crowd)
        self.links = 0
        self.streams = 0
        self.accepted = 0
        self.waiting = 0
        self.listening = 0
        self.detached = 0

    @property
    def sockets(self) -> int:
        """What takes descriptors beside the links, over all sessions."""
        return self.streams + self.waiting + self.listening

    def relieve(self) -> None:
        """A budget is used up: what holds most has to go, of the principal or of all, until there is room."""
        while self.budget.exhausted():
            principals = [self] if self.budget.held >= self.budget.capacity else list(self.everyone.values())
            streams = (stream for one in principals for session in one.sessions for stream in session.streams.values())
            largest = max(streams, key=_held, default=None)
            most = 0 if largest is None else _held(largest)
            plain = max((one for each in principals for one in each.plain), key=lambda one: one.held, default=None)
            if plain is not None and plain.held > most:
                plain.give_up()
            elif largest is not None and most:
                largest.outbound.discard()
                largest.reset("limit", "too much memory is held: the largest stream is reset")
                largest.state.discard()
            else:
                return


class Session:
    """Owner of links and streams. Subclassed by the roles, which say what idle links and new messages mean to them.

    The role's task calls `sweep` once a second and `close` at the end; a session has no task of its own.

    Args:
        session_id: 22 base64url characters.
        principal: whom to count for; the session enters itself into its `sessions`.
        reactor: where sockets live.
        log: of the role.

    Attributes:
        resumes: see `StreamOwner`.
        resume_window: seconds for which a stream without a link is kept; 0 until both ends agreed on one.
        outages: what became of the streams that lost their links.
        window: first window of its streams, in bytes. The protocol fixes it; tests make it small.
        most_streams: beyond which it opens and accepts none; what waits counts, and so do sockets that listen.
        most_accepted: the same for those that its ingress opens.
        streams: by id, from their first message until both ends are done with them.
        flows: its datagram flows.
        links: all links, whatever they carry.
        tells_refusals: whoever wants a stream says itself that it was refused; the log need not.
    """

    resumes = False
    window = limits.WINDOW_FIRST
    most_streams = limits.PRINCIPAL_STREAMS
    most_accepted = limits.PRINCIPAL_STREAMS
    tells_refusals = False

    def __init__(self, session_id: str, principal: Principal, reactor: Reactor, log: logs.Log) -> None:
        self.id = session_id
        self._name = logs.hash_id(session_id)
        self.principal = principal
        self.reactor = reactor
        self.log = log
        self.streams: dict[str, Stream] = {}
        self.flows = Flows(principal, reactor, log, self._name, self.bind_of)
        self.links: set[Link] = set()
        self.resume_window = 0.0
        self.outages = Outages()
        self._detached: dict[Stream, float] = {}  # and since when; also while `resume` is not answered
        self._closing = False
        self._reporting = False
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

    def stalled(self, link: Link) -> None:
        """A link may be dead. Nothing to do here: who dials can do something."""

    def lost(self, link: Link, reason: str) -> None:
        """The link's connection is gone."""
        self.links.discard(link)
        self.principal.links -= 1
        self.log.debug("link lost", peer=link.peer, role=link.protocol.role, reason=reason)

    def begin(self, stream: Stream | Flow, link: Link) -> None:
        """Ask the peer to open `stream`, on this idle link; goes out with the next flush."""
        link.attach(stream)
        link.open(stream.state, target=stream.target, peer=stream.peer, forward=stream.forward)

    # --- streams ------------------------------------------------------------------------------------------------------

    def make_stream(self, stream_id: str, *, egress: bool, target: str, peer: str, forward: str = "") -> Stream:
        """A new stream, in the table."""
        state = StreamState(stream_id, egress=egress, budget=self.principal.budget, window=self.window)
        stream = Stream(state, self, target=target, peer=peer, now=self.reactor.now, forward=forward)
        stream.bind = self.bind_of(forward)
        self.streams[stream_id] = stream
        self.principal.streams += 1
        self.principal.accepted += not egress
        return stream

    def bind_of(self, forward: str) -> str:
        """Where the connections of this forward are accepted, for the log. Here: unknown."""
        return ""

    def warn_refused(self, text: str, **fields: object) -> None:
        """Log that a stream or a connection was refused."""
        say = self.log.info if self.tells_refusals else self.log.warning
        say(text, **fields)

    def _whose(self, stream: Stream) -> dict[str, object]:
        fields: dict[str, object] = {"peer": stream.peer, "principal": self.principal.name, "session": self._name}
        if stream.application:
            fields["application"] = stream.application
        return fields

    def stream_opened(self, stream: Stream) -> None:
        self.log.info(
            "stream opened",
            stream=logs.hash_id(stream.state.id), **logs.whither(stream.target, stream.bind), address=stream.address,
            **self._whose(stream),
        )  # fmt: skip

    def stream_ended(self, stream: Stream) -> None:
        del self.streams[stream.state.id]
        self.principal.streams -= 1
        self.principal.accepted -= not stream.state.egress
        self._moved.pop(stream, None)
        self._starved.pop(stream, None)
        self._half_closed.pop(stream, None)
        code, message = stream.outcome or ("internal", "")
        if self._attached(stream) and code in ("lost", "limit"):
            self.outages.lost()
        inbound = stream.inbound.received - (stream.inbound.total is not None)
        fields: dict[str, object] = {
            "stream": logs.hash_id(stream.state.id), **logs.whither(stream.target, stream.bind),
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
            self.warn_refused("stream refused", **fields)

    def stream_moved(self, stream: Stream) -> None:
        self._moved[stream] = None

    def stream_starved(self, stream: Stream) -> None:
        self._starved[stream] = None

    def stream_held(self) -> None:
        if not self._relieving and self.principal.budget.exhausted():
            self._relieving = True
            self.reactor.later(self._relieve)

    def _relieve(self) -> None:
        self._relieving = False
        self.principal.relieve()

    # --- streams without a link -------------------------------------------------------------------------------------

    def stream_detached(self, stream: Stream) -> bool:
        if self._closing or not self.resume_window:
            return False
        if stream not in self._detached:
            self._detached[stream] = self.reactor.now
            self.principal.detached += 1
            silent = stream.proof_after
            self.outages.cut(self.reactor.now if silent == -math.inf else silent)
            self._report()
            # Not now: whoever calls is in the middle of a link's end.
            if self.principal.detached > limits.PRINCIPAL_DETACHED or self._all_detached() > limits.DETACHED:
                self.reactor.later(self._thin_out)
        return True

    def stream_resumed(self, stream: Stream) -> None:
        if self._attached(stream) and stream.reason is None:
            self.outages.resumed(stream.state.id, stream.state.replayed)

    def stream_unknown(self, stream: Stream) -> bool:
        """Here: it ends."""
        return False

    def _renew(self, stream: Stream, stream_id: str) -> None:
        """The peer was never asked for the stream, and refuses its id from now on: it begins again under another."""
        state = stream.state
        del self.streams[state.id]
        state.id = stream_id
        state.epoch = 0
        state.replayed = state.outbound.restart()
        self.streams[stream_id] = stream

    def reopened(self, stream: Stream) -> bool:
        """A stream is about to be opened afresh. Returns whether it still lives."""
        self._attached(stream)
        return stream.outcome is None and stream.reason is None

    def _attached(self, stream: Stream) -> bool:
        """The stream waits for a link no more. Returns whether it did."""
        if self._detached.pop(stream, None) is None:
            return False
        self.principal.detached -= 1
        self._report()
        return True

    def _report(self) -> None:
        """Say at the end of the turn what happened in it, once for all streams."""
        if not self._reporting:
            self._reporting = True
            self.reactor.later(self._say)

    def _say(self, *, final: bool = False) -> None:
        self._reporting = False
        outages = self.outages
        line = outages.report(len(self._detached), self.reactor.now, final=final)
        if line is not None:
            say = self.log.info if outages.over else self.log.warning
            say(
                line,
                **self.describe(),
                cuts=outages.cuts, resumptions=outages.resumptions, replayed=outages.replayed,
            )  # fmt: skip

    def describe(self) -> dict[str, object]:
        """Fields for a log line about the session."""
        return {"principal": self.principal.name, "session": self._name}

    def _all_detached(self) -> int:
        return sum(principal.detached for principal in self.principal.everyone.values())

    def _thin_out(self) -> None:
        """Too many streams without a link: those that have waited longest go, of the principal or of all."""
        count = 0
        while True:
            if self.principal.detached > limits.PRINCIPAL_DETACHED:
                principals = [self.principal]
            elif self._all_detached() > limits.DETACHED:
                principals = list(self.principal.everyone.values())
            else:
                break
            sessions = [session for one in principals for session in one.sessions if session._detached]
            oldest = min(sessions, key=lambda session: next(iter(session._detached.values())))
            stream = next(iter(oldest._detached))
            stream.abandon("limit", "too many streams without a link: the oldest is reset")
            count += 1
        if count:
            self.log.warning("too many streams without a link: the oldest were reset", count=count, **self.describe())

    def woke(self, now: float) -> None:
        """The machine or the process slept: no window ran meanwhile."""
        self._detached = dict.fromkeys(self._detached, now)
        for link in list(self.links):
            link.woke(now)

    # --- time ---------------------------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """Once a second: late acks, silent links, streams that waited for memory, half-closed ones."""
        moved, self._moved = self._moved, {}
        for stream in moved:
            if stream.link is not None and stream.outcome is None:
                stream.state.ack_wanted = True
                _guarded(stream.link, stream.link.flush)
        for stream, since in list(self._detached.items()):
            if now - since < self.resume_window:
                break
            _guarded(stream, partial(stream.abandon, "lost", f"no link for {self.resume_window:.0f} s"))
        if not self.outages.over:
            self._say()
        starved, self._starved = self._starved, {}
        for stream in starved:
            _guarded(stream, stream.refresh)
        self.flows.sweep(now)
        for link in list(self.links):
            try:  # as `_guarded`, which with thousands of links costs more than what it guards
                link.sweep(now)
            except Exception as error:
                link.fail(error)
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
        self._closing = True
        for stream in list(self.streams.values()):
            if stream.link is None:
                stream.abandon("shutdown", reason)
            else:
                stream.reset("shutdown", reason)
        self.flows.close(reason)
        for link in list(self.links):
            link.close(code, reason)

    def leave(self) -> None:
        """The session is over: it no longer counts for its principal."""
        self._say(final=True)
        self.principal.sessions.discard(self)


def _guarded(handler: Handler, function: Callable[[], None]) -> None:
    """Call outside of the reactor as the reactor would: a fault ends only the handler that it belongs to."""
    try:
        function()
    except Exception as error:
        handler.fail(error)


def _held(stream: Stream) -> int:
    return len(stream.outbound.replay) + len(stream.inbound.inbox)
