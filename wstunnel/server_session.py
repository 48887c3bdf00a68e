"""One client's session at the server: it accepts streams, and keeps those that lost their links for a while."""

from __future__ import annotations

import secrets
from functools import partial
from typing import TYPE_CHECKING

from wstunnel import limits, logs
from wstunnel.errors import ProtocolError, StreamError, UsageError
from wstunnel.ingress import READY, Ingress
from wstunnel.pool import SURPLUS_SECONDS
from wstunnel.reverse_server import ReverseForwards
from wstunnel.session import Principal, Session
from wstunnel.targets import parse_target
from wstunnel.wire.messages import (
    FEATURES,
    AnyMessage,
    Bye,
    Detached,
    Drain,
    Gone,
    Hello,
    Listen,
    Listening,
    Need,
    Open,
    Resume,
    Unlisten,
)
from wstunnel.wire.states import Exchange
from wstunnel.wire.tombstones import FINISHED, UNKNOWN, Tombstone, Tombstones

if TYPE_CHECKING:
    from wstunnel.flow import DialledFlow
    from wstunnel.link import Link
    from wstunnel.server import Server
    from wstunnel.stream import Stream

_log = logs.logger("server")

DETACHED_IDS = 256
"""Ids in one `detached`: the most that the message may have."""
DETACHED_PAUSE_SECONDS = 0.05
"""Between two of them: a link's queue is short."""
REVERSE_LINKS = 4
"""Parked reverse links that are asked for at first; more as connections come."""


class ServerSession(Session):
    """One client's links and streams. Ends with its last link and its last stream.

    Args:
        session_id: the client's.
        principal: whose.
        server: where it is registered.
        hello: of its first link.

    Attributes:
        settled: it has had a control link, and taken the place of what an earlier client of its user left.
    """

    def __init__(self, session_id: str, principal: Principal, server: Server, hello: Hello) -> None:
        super().__init__(session_id, principal, server.reactor, _log)
        self._server = server
        self._features = frozenset(hello.features) & frozenset(FEATURES)
        self.settled = False
        self._control: Link | None = None
        self._alone_since: float | None = None  # without links, while places are held
        self._untold: dict[Stream, None] = {}  # detached, and the client does not know yet
        self.most_streams = server.share(limits.PRINCIPAL_STREAMS)
        self.most_accepted = self.most_streams // limits.REVERSE_DIVISOR
        self.ingress = Ingress(self, self, least=REVERSE_LINKS)
        self.reverse = ReverseForwards(self, server.places, exhausted=server.drop_oldest, negotiate=server.negotiate)
        self._needed = 0  # what the client was told last
        self.flows.timeout = server.udp_timeout
        if "udp" not in self._features:
            self.ingress.refuse_flows("the client does not know UDP")
        if "resume" in self._features:
            self.resume_window = float(min(hello.resume_window, server.max_resume_window))

    def welcomed(self, link: Link) -> None:
        """The link has joined. A control link learns at once which streams have lost theirs."""
        self._alone_since = None
        if link.protocol.role == "reverse":
            self.idle(link)
        if link.protocol.role == "control":
            self._control = link
            self._needed = 0
            self._untold = dict.fromkeys(self._detached)
            self._tell_detached()

    def drain(self) -> None:
        """Tell the client that the server is going."""
        if self._control is not None and "drain" in self._features:
            self._control.send(Drain(deadline=int(limits.LINGER_SECONDS)))

    def message(self, link: Link, message: AnyMessage) -> None:
        if isinstance(message, Open):
            self._accept(link, message)
        elif isinstance(message, Resume):
            self._resume(link, message)
        elif isinstance(message, Gone):
            self._unknown_to_client(message)
        elif isinstance(message, Listen | Unlisten):
            self._listen(link, message)
        elif isinstance(message, Bye):
            self._server.reactor.later(partial(self.close, 1000, "the client said goodbye"))
        else:
            super().message(link, message)

    def lost(self, link: Link, reason: str) -> None:
        super().lost(link, reason)
        self.ingress.idle.pop(link, None)
        if link is self._control:
            # A client that lost one and dialled another may be heard of in the wrong order.
            self._control = None
            for other in list(self.links):
                if other.protocol.role == "control":
                    self.welcomed(other)
        self._check_over()

    def _check_over(self) -> None:
        if self.links:
            return
        if self.reverse and not self._closing and self.resume_window:
            # What it listens on outlives its links: connections wait for the client to come back.
            if self._alone_since is None:
                self._alone_since = self.reactor.now
            return
        if self.streams:
            return
        self.reverse.close()
        self.ingress.stop()
        self._server.forget(self)

    def woke(self, now: float) -> None:
        super().woke(now)
        if self._alone_since is not None:
            self._alone_since = now

    def close(self, code: int, reason: str) -> None:
        super().close(code, reason)
        self.reverse.close()
        self.ingress.stop()
        self._check_over()

    def sweep(self, now: float) -> None:
        super().sweep(now)
        self._tell_detached()
        if self._alone_since is not None and now >= self._alone_since + self.resume_window:
            self._alone_since = None
            self.reverse.close()
            self._check_over()
        self.ingress.demand.second()
        self.ingress.demand.least = REVERSE_LINKS if self.reverse else 0
        if self.reverse:
            self._tell_need()
        for link in self.ingress.surplus(now, SURPLUS_SECONDS):
            link.close(1000, "surplus")

    # --- reverse forwards ---------------------------------------------------------------------------------------------

    def _listen(self, link: Link, message: Listen | Unlisten) -> None:
        if "reverse" not in self._features:
            raise ProtocolError(f"{type(message).__name__.lower()} without the feature `reverse`")
        if isinstance(message, Unlisten):
            self.reverse.unlisten(message.forward)
        else:
            link.send(self.reverse.listen(message))
        self._tell_need()

    def taken_over(self, forward_id: str) -> None:
        """Another session of the same user has one of the places now."""
        if self._control is not None:
            self._control.send(
                Listening(forward=forward_id, code="taken-over", message="another client of the same user has it now")
            )
        self._tell_need()
        self._check_over()

    def _tell_need(self) -> None:
        """How many reverse links should be parked."""
        ingress = self.ingress
        room = max(self.most_accepted - self.principal.accepted - self.principal.waiting, 0)
        wanted = min(ingress.demand.wanted(), room)  # links for more would only be kept from its other streams
        needed = wanted + len(ingress.waiting) + len(ingress.reopening) if self.reverse else 0
        control = self._control
        if needed != self._needed and control is not None and not control.blocked:
            self._needed = needed
            control.send(Need(links=needed))

    def bind_of(self, forward: str) -> str:
        return self.reverse.bind_of(forward)

    def lacking(self) -> None:
        if self.ingress.waiting or self.ingress.reopening:
            self.reactor.later(self._tell_need)

    @property
    def trouble(self) -> str:
        return "" if self.links else "the client is away"

    def usable(self, link: Link) -> bool:
        return True

    def idle(self, link: Link) -> None:
        if link.protocol.role == "reverse" and link.protocol.state in READY and not self._closing:
            self.ingress.offer(link)

    def stream_unknown(self, stream: Stream) -> bool:
        """The client was never asked for it: it is opened afresh under a new id, since that one is refused for good."""
        if not stream.state.unanswered():
            return False
        self.principal.tombstones.add(stream.state.id, UNKNOWN, self.reactor.now)
        self._renew(stream, secrets.token_urlsafe(16))
        self.ingress.again(stream)
        return True

    # --- streams that lost their link ---------------------------------------------------------------------------------

    def stream_detached(self, stream: Stream) -> bool:
        kept = super().stream_detached(stream)
        if kept:
            if not self._untold:
                self.reactor.later(self._tell_detached)
            self._untold[stream] = None
        return kept

    def _tell_detached(self) -> None:
        """The server cannot dial: it says which streams wait. One message at a time: a link's queue is short."""
        control = self._control
        if not self._untold or control is None or control.blocked or control.protocol.state is not Exchange.IDLE:
            return
        waiting = [stream for stream in self._untold if stream.link is None and stream not in self.ingress.reopening]
        self._untold = dict.fromkeys(waiting[DETACHED_IDS:])
        told = [stream.state for stream in waiting[:DETACHED_IDS]]
        if told:
            control.send(Detached(streams=[state.id for state in told], epochs=[state.epoch for state in told]))
        if self._untold:
            self.reactor.at(self.reactor.now + DETACHED_PAUSE_SECONDS, self._tell_detached)

    def _resume(self, link: Link, message: Resume) -> None:
        """The client goes on with a stream on this link: detach first, then compare, all in this call."""
        tombstones = self._went_on(link)
        stream = self.streams.get(message.stream)
        stone = tombstones.find(message.stream)
        if stream is None and stone is None:
            # An `open` of it that is still held back somewhere must not dial any more.
            stone = UNKNOWN
            tombstones.add(message.stream, stone, self.reactor.now)
        if stream is None or (stone is not None and stream.reason is not None):
            # With both, a repeated `open` is just being refused: that is not what became of the stream.
            assert stone is not None
            link.protocol.gone(stone)
        elif message.epoch <= stream.state.epoch:
            link.protocol.gone(Tombstone("stale"))
        else:
            if stream.link is not None:
                stream.link.give_up_stream("its stream goes on on another link")
                self.stream_detached(stream)  # the client noticed first
            if stream.reason is not None:
                stream.abandon(*stream.reason)
            else:
                try:
                    link.resumed(stream, message)
                except StreamError as error:
                    stream.abandon(error.code, str(error))
            if stream.outcome is not None:
                link.protocol.gone(_stone(stream.outcome))

    def _went_on(self, link: Link) -> Tombstones:
        """The client begins another exchange on the link: it will not ask again for what ended there."""
        tombstones = self.principal.tombstones
        tombstones.forget(link.last_id)
        link.last_id = None
        return tombstones

    def _unknown_to_client(self, message: Gone) -> None:
        stream = self.streams.get(message.stream or "")
        if stream is not None and stream.link is None:
            stream.gone("unknown" if stream.state.unanswered() else "finished", "", "")

    def _accept(self, link: Link, message: Open) -> None:
        """A client asks for a stream. The stream is registered in this call: early data may follow in the same read."""
        tombstones = self._went_on(link)
        if message.stream in self.streams or message.stream in self.flows:
            raise ProtocolError("open repeats the id of a live stream")
        full = self.principal.sockets >= self._server.share(limits.PRINCIPAL_STREAMS)
        stream: Stream | DialledFlow
        if message.target.startswith("udp:") and "udp" in self._features:
            stream = self.flows.asked(message.stream, message.target, link.peer)
        else:
            stream = self.make_stream(message.stream, egress=True, target=message.target, peer=link.peer)
        stream.application = message.peer
        link.attach(stream)
        link.protocol.accept(stream.state)
        if message.stream in tombstones:
            stream.reset("forbidden", "this stream id was used before")
        elif full or not self.principal.budget.admitting():
            stream.reset("limit", "too many streams" if full else "too much memory is held")
        else:
            try:
                target = parse_target(message.target)
            except UsageError as error:
                stream.reset("forbidden", f"not a target: {error.message}")
                return
            if target.kind == "udp" and "udp" not in self._features:
                stream.reset("forbidden", "a client without the feature `udp` cannot ask for datagrams")
                return
            self._server.dial(self.principal, stream, target)

    def stream_ended(self, stream: Stream) -> None:
        super().stream_ended(stream)
        self._untold.pop(stream, None)
        self.ingress.reopening.pop(stream, None)
        assert stream.outcome is not None
        tombstones = self.principal.tombstones
        if stream.state.id not in tombstones:  # else it was refused for that, and the first verdict stands
            tombstones.add(stream.state.id, _stone(stream.outcome), self.reactor.now)
        if not self.links:
            self.reactor.later(self._check_over)


def _stone(outcome: tuple[str, str]) -> Tombstone:
    code, message = outcome
    return FINISHED if code == "finished" else Tombstone("reset", code, message)
