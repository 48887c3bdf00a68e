"""The end that accepts: streams that somebody here wants, and the idle links that carry them.

At the client these are streams to the server's targets, on `forward` links; at the server those of reverse forwards,
on `reverse` links. Nothing here waits, but for `connect`.
"""

from __future__ import annotations

import secrets
import socket
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import trio

from wstunnel import limits, logs, sockets
from wstunnel.errors import StreamError
from wstunnel.flow import Flow
from wstunnel.link import Link
from wstunnel.pool import Demand
from wstunnel.stream import Stream
from wstunnel.wire.states import Exchange

if TYPE_CHECKING:
    from wstunnel.session import Session

FLOW_TURN = 8
"""Of so many links that something waits for, one goes to a flow if any waits: any sender of datagrams can have a
thousand flows wait, which must not keep streams out, and many streams must not keep all flows out."""
READY = frozenset({Exchange.NEW, Exchange.IDLE})
"""States of a link that can take a stream."""


@dataclass(slots=True, eq=False)
class Wanted:
    """A stream that is wanted, or a datagram flow.

    Attributes:
        target: canonical text, as the egress is asked for it.
        peer: the application's address.
        sock: the application's connection, non-blocking, which the ingress owns from now on; None if it is handed over
            only once the target was reached, see `Stream.begin`.
        forward: on `reverse` links: the forward's id.
        early: goes to the target before all that `sock` has to say.
        decided: called once with the stream when the target was reached, or when it ended without; `Stream.outcome`
            tells which.
        ended: called once with the stream when it is over.
        dropped: called instead if it never became a stream, with a reset code and a message.
        flow: what is wanted instead of a stream; it holds the datagrams that came early.
        deadline: when it has waited long enough for a link.
        holder: where it was last brought to; a place that is taken over takes what waits along.
    """

    target: str
    peer: str
    sock: socket.socket | None = None
    forward: str = ""
    early: bytes = b""
    decided: Callable[[Stream], None] | None = None
    ended: Callable[[Stream], None] | None = None
    dropped: Callable[[str, str], None] | None = None
    flow: Flow | None = None
    deadline: float = 0.0
    holder: Ingress | None = None


class Waiting:
    """What waits for a link: streams and flows apart, those that came first in front."""

    def __init__(self) -> None:
        self._streams: deque[Wanted] = deque()
        self._flows: deque[Wanted] = deque()
        self._passed = 0  # streams that went before waiting flows, since the last flow went

    def __len__(self) -> int:
        return len(self._streams) + len(self._flows)

    def __iter__(self) -> Iterator[Wanted]:
        yield from self._streams
        yield from self._flows

    def __contains__(self, wanted: Wanted) -> bool:
        return wanted in self._kind(wanted)

    def _kind(self, wanted: Wanted) -> deque[Wanted]:
        return self._streams if wanted.flow is None else self._flows

    def append(self, wanted: Wanted) -> None:
        """It came last. Its deadline is not before that of any other."""
        self._kind(wanted).append(wanted)

    def remove(self, wanted: Wanted) -> None:
        """It waits no more."""
        self._kind(wanted).remove(wanted)  # looked for from the front, where it mostly is

    def first(self) -> Wanted:
        """Whose deadline is next. Something waits."""
        heads = [queue[0] for queue in (self._streams, self._flows) if queue]
        return min(heads, key=lambda wanted: wanted.deadline)

    def flows(self) -> list[Wanted]:
        """The flows that wait."""
        return list(self._flows)

    def take(self) -> Wanted | None:
        """What is served next; it waits no more. None if nothing is left, less flows that ended while they waited."""
        flows = self._flows
        while flows and (flow := flows[0].flow) is not None and flow.outcome is not None:
            flows.popleft()
        if self._streams and not (flows and self._passed >= FLOW_TURN - 1):
            self._passed = self._passed + 1 if flows else 0
            return self._streams.popleft()
        self._passed = 0
        return flows.popleft() if flows else None


Way = Callable[[], "tuple[Ingress, str]"]
"""What opens streams now, and for which forward on reverse links; a StreamError if nothing does any more."""


class IngressOwner(Protocol):
    """What a session says about its links. `trouble`: why there are none, in words, or empty."""

    @property
    def trouble(self) -> str:
        """See above."""

    def lacking(self) -> None:
        """A stream waits for a link, or an idle link was taken: more may be needed."""

    def begin(self, stream: Stream | Flow, link: Link) -> None:
        """Ask the peer to open `stream`, on this idle link; goes out with the next flush."""

    def usable(self, link: Link) -> bool:
        """Whether a stream may still be opened on this link."""


class Ingress:
    """What waits, and what is idle.

    Args:
        session: whose streams these are.
        owner: the same, as far as it knows about links.
        least: idle links to keep ready.

    Attributes:
        demand: how many idle links are wanted.
        idle: links that are ready, the one that was used last behind all others.
        waiting: streams and flows that no link was there for.
        reopening: streams that the peer was never asked for, though their link is gone.
        flows_refused: why no datagram flow can be opened; empty if they can.
    """

    def __init__(self, session: Session, owner: IngressOwner, *, least: int) -> None:
        self.demand = Demand(least)
        self.idle: dict[Link, None] = {}
        self.waiting = Waiting()
        self.reopening: dict[Stream, None] = {}
        self.flows_refused = ""
        self._session = session
        self._owner = owner
        self._expiring = False
        self._stopped = False

    def accepted(self, wanted: Wanted) -> None:
        """Carry a connection: at once, or when a link is there, or not at all after OPEN_WAIT_SECONDS."""
        session = self._session
        wanted.holder = self
        if wanted.flow is not None and wanted.flow.outcome is not None:
            return
        if self._stopped:
            self._drop(wanted, "shutdown", "it is stopping", quiet=True)
            return
        principal = session.principal
        counted = wanted.flow is not None  # this one is, since it was made
        full = (
            principal.sockets - counted >= session.most_streams
            or principal.accepted + principal.waiting - counted >= session.most_accepted
        )
        if full or not principal.budget.admitting():
            self._drop(wanted, "limit", "too many streams or too much memory held")
        elif (link := self._take_idle()) is not None:
            stream = self._open(link, wanted)
            if stream is not None and wanted.sock is not None:
                _send_early(stream)
            else:
                link.flush()
        else:
            wanted.deadline = session.reactor.now + limits.OPEN_WAIT_SECONDS
            self.waiting.append(wanted)
            principal.waiting += not counted
            self._expire_later()
            self._owner.lacking()

    @property
    def now(self) -> float:
        """Monotonic seconds."""
        return self._session.reactor.now

    def make_flow(self, target: str, peer: str, *, forward: str, receive: Callable[[bytes | memoryview], bool]) -> Flow:
        """A new datagram flow of the session, to be `accepted`; see `Flow`."""
        return self._session.flows.wanted(target, peer, forward=forward, receive=receive)

    def refuse_flows(self, why: str) -> None:
        """The other end can carry no datagrams: those that wait end. Empty: it can."""
        self.flows_refused = why
        if why:
            for wanted in self.waiting.flows():
                self._no_more(wanted)
                self._drop(wanted, "forbidden", why)

    async def connect(self, target: str, peer: str, *, forward: str = "") -> Stream:
        """Open a stream whose application waits for the outcome.

        Returns:
            the stream, whose target was reached. The caller gives it a socket with `Stream.begin`, or resets it.

        Raises:
            StreamError: the egress refused it, or it was lost on the way; with the reset code.
        """
        decided = trio.Event()
        found: list[Stream] = []
        dropped: list[StreamError] = []

        def decide(stream: Stream) -> None:
            found.append(stream)
            decided.set()

        def drop(code: str, message: str) -> None:
            dropped.append(StreamError(code, message))
            decided.set()

        wanted = Wanted(target, peer, forward=forward, decided=decide, dropped=drop)
        self.accepted(wanted)
        try:
            await decided.wait()
        except trio.Cancelled:
            assert wanted.holder is not None
            wanted.holder._give_up(wanted, found)
            raise
        if dropped:
            raise dropped[0]
        stream = found[0]
        if stream.outcome is not None:
            raise StreamError(*stream.outcome)
        return stream

    def _give_up(self, wanted: Wanted, found: list[Stream]) -> None:
        """Nobody wants it any more."""
        if wanted in self.waiting:
            self._no_more(wanted)
            return
        for stream in found or [each for each in self._session.streams.values() if each.decided is wanted.decided]:
            stream.reset("reset", "the application went away")

    def _no_more(self, wanted: Wanted) -> None:
        """It waits here no more."""
        self.waiting.remove(wanted)
        self._session.principal.waiting -= wanted.flow is None

    def offer(self, link: Link) -> bool:
        """An idle link: it carries what waits longest, or is kept. Returns whether it was given a stream."""
        while self.reopening:
            stream = next(iter(self.reopening))
            del self.reopening[stream]
            if self._session.reopened(stream):
                self._owner.begin(stream, link)
                self._session.reactor.later(link.flush)
                return True
        wanted = self.waiting.take()
        if wanted is not None:
            self._session.principal.waiting -= wanted.flow is None
            opened = self._open(link, wanted)
            # Not now: `link` may be in the middle of a read. One that has yet to start sends it then.
            if opened is None:
                self._session.reactor.later(link.flush)
            elif link.sock is None:
                opened.read_early()
            else:
                self._session.reactor.later(partial(_send_early, opened))
            return True
        self.idle[link] = None
        return False

    def _take_idle(self) -> Link | None:
        """The link that was used last. Those in their closing handshake are passed over: `lost` comes only after it."""
        while self.idle:
            link = self.idle.popitem()[0]
            if link.protocol.state in READY and self._owner.usable(link):
                return link
        return None

    def _open(self, link: Link, wanted: Wanted) -> Stream | None:
        """Returns the stream; None if a flow is wanted."""
        session = self._session
        stream: Stream | None = None
        if wanted.flow is not None:
            self._owner.begin(wanted.flow, link)
        else:
            stream = session.make_stream(
                secrets.token_urlsafe(16), egress=False, target=wanted.target, peer=wanted.peer, forward=wanted.forward
            )
            stream.decided = wanted.decided
            stream.when_over = wanted.ended
            self._owner.begin(stream, link)
            if wanted.early:
                stream.outbound.append(wanted.early)
            if wanted.sock is not None:
                stream.start(session.reactor, wanted.sock)
        self.demand.opened()
        self._owner.lacking()
        return stream

    def again(self, stream: Stream) -> None:
        """Open a stream whose first `open` never arrived: as soon as there is a link, before all that waits."""
        self.reopening[stream] = None
        link = self._take_idle()
        if link is None:
            self._owner.lacking()
        else:
            self.offer(link)

    def withdraw(self, forward: str) -> list[Wanted]:
        """What waits for this forward; it waits here no more."""
        found = [wanted for wanted in self.waiting if wanted.forward == forward]
        for wanted in found:
            self._no_more(wanted)
        return found

    def surplus(self, now: float, seconds: float) -> list[Link]:
        """Links beyond the wanted number that were idle for more than `seconds`; they are not kept any more."""
        surplus = max(len(self.idle) - self.demand.wanted(), 0)
        # The first was idle longest.
        found = [link for link in list(self.idle)[:surplus] if now - link.idle_since > seconds]
        for link in found:
            del self.idle[link]
        return found

    def _expire_later(self) -> None:
        if self.waiting and not self._expiring:
            self._expiring = True
            self._session.reactor.at(self.waiting.first().deadline, self._expire)

    def _expire(self) -> None:
        """Drop what no link came for."""
        self._expiring = False
        now = self._session.reactor.now
        while self.waiting and (wanted := self.waiting.first()).deadline <= now:
            trouble = self._owner.trouble
            why = f": {trouble}" if trouble else ""
            self._no_more(wanted)
            self._drop(wanted, "unreachable", f"no link to the other end in time{why}")
        self._expire_later()

    def stop(self) -> None:
        """Drop all that waits, and what still comes: unlike a stream's, these connections are not the reactor's to
        close.
        """
        self._stopped = True
        self.flows_refused = "it is stopping"
        self.idle.clear()
        while self.waiting:
            wanted = self.waiting.first()
            self._no_more(wanted)
            self._drop(wanted, "shutdown", "it is stopping", quiet=True)

    def _drop(self, wanted: Wanted, code: str, message: str, *, quiet: bool = False) -> None:
        if wanted.flow is not None:
            wanted.flow.reset(code, message)  # which is logged as the end of any flow
            return
        if not quiet:
            where = logs.whither(wanted.target, self._session.bind_of(wanted.forward))
            self._session.warn_refused(f"connection reset: {message}", peer=wanted.peer, **where)
        if wanted.sock is not None:
            sockets.reset(wanted.sock)
        if wanted.dropped is not None:
            wanted.dropped(code, message)


def _send_early(stream: Stream) -> None:
    """What the application sent goes out with `open`, in one write: the reactor's turn to read would be later."""
    stream.read_early()
    if stream.link is not None:
        stream.link.flush()
