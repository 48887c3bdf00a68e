"""The client's session: links kept warm, applications' connections, and streams that go on when their link is lost."""

from __future__ import annotations

import math
import os
import random
import secrets
import socket
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import trio

from wstunnel import limits, logs, sockets, systemd
from wstunnel.absence import YOUNG_SECONDS, Absence
from wstunnel.dialler import AGENT, Dialler
from wstunnel.endpoints import tcp
from wstunnel.errors import NetworkError, ProtocolError, ServerRefusedError, TrustError
from wstunnel.forwards import Forward
from wstunnel.link import Link
from wstunnel.pool import SURPLUS_SECONDS, Demand, links_to_dial
from wstunnel.reactor import Reactor
from wstunnel.recovery import Recovery
from wstunnel.session import Principal, Session
from wstunnel.stream import Stream
from wstunnel.wire.credit import Budget
from wstunnel.wire.frames import CloseCode, MaskKeys
from wstunnel.wire.messages import (
    FEATURES,
    VERSION,
    AnyMessage,
    Bye,
    Detached,
    Drain,
    Gone,
    Hello,
    LinkRole,
    Welcome,
)
from wstunnel.wire.protocol import LinkProtocol
from wstunnel.wire.states import Exchange

_log = logs.logger("client")

_random = random.SystemRandom()
_READY = frozenset({Exchange.NEW, Exchange.IDLE})
"""States of a link that can take a stream."""
GONE_AT_ONCE = 128
"""Answers to one `detached` that are queued at a time: a link's queue is short."""
GONE_PAUSE_SECONDS = 0.05
"""Between two such batches."""


class _Waiting(NamedTuple):
    """An application's connection without a link."""

    sock: socket.socket
    forward: Forward
    peer: str
    deadline: float


class ClientSession(Session):
    """All links to the server and all streams over them.

    Args:
        dialler: makes connections.
        reactor: running, or about to.
        idle_links: warm links to keep.
        resume_window: seconds for which streams without a link are to be kept; 0 is not at all.
        random_float: in [0, 1), for the back-off.

    Attributes:
        gone: set when the last link is gone after `stop`.
    """

    resumes = True

    def __init__(
        self,
        dialler: Dialler,
        reactor: Reactor,
        *,
        idle_links: int,
        resume_window: int = limits.RESUME_WINDOW_SECONDS,
        random_float: Callable[[], float] = _random.random,
    ) -> None:
        super().__init__(secrets.token_urlsafe(16), Principal("local", Budget(limits.PROCESS_BYTES), {}), reactor, _log)
        self._dialler = dialler
        self._wish = resume_window
        self._features = [name for name in FEATURES if resume_window or name != "resume"]
        self._boot = ""  # of the server that welcomed us last
        self._drained: str | None = None  # boot of a server that is going
        self._boots: dict[Link, str] = {}
        self._recovery = Recovery()  # streams that are detached, and not asked for on any link
        self._unknown: dict[str, None] = {}  # ids that the server thinks we have
        self._stalled: set[Link] = set()
        self._resuming = False
        self._demand = Demand(idle_links)
        self._least = idle_links
        self._idle: list[Link] = []
        self._waiting: deque[_Waiting] = deque()
        self._control: Link | None = None
        self._dialling = 0
        self._dialling_control = False
        self._absence = Absence(random_float)
        self._stopping = False
        self._refusal: ServerRefusedError | None = None
        self.gone = trio.Event()
        self._changed = trio.Event()
        self._keys = MaskKeys(secrets.token_bytes)

    # --- links --------------------------------------------------------------------------------------------------------

    async def keep_links(self) -> None:
        """Dial as the pool asks, for ever.

        Raises:
            ServerRefusedError: the server said no.
            TrustError: it could not prove who it is, and never had before.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._expire_waiting)
            while True:
                if self._refusal is not None:
                    raise self._refusal
                self._changed = trio.Event()
                if self._absence.away and not self._stopping and all(link.protocol.greeted for link in self.links):
                    # One dial at a time finds out when the server is back; its `welcome` ends the absence.
                    if self._waiting:
                        self._absence.hurry(trio.current_time())
                    with trio.move_on_at(self._absence.retry_at) as scope:
                        await self._changed.wait()
                    if not scope.cancelled_caught:
                        continue
                    await self._dial_link(self._next_role())
                    continue
                if not self._absence.away:
                    for _ in range(self._missing()):
                        role = self._next_role()
                        self._dialling += 1
                        self._dialling_control |= role == "control"
                        nursery.start_soon(self._dial_counted, role)
                await self._changed.wait()

    def _missing(self) -> int:
        if self._stopping:
            return 0
        if not self._absence.welcomed:
            # The first one finds out whether the server takes us at all: one refusal in its log, not twelve.
            return int(not self._dialling and not self.links)
        # While links die young only those are dialled that somebody needs now.
        warm = self._demand.wanted() if self._absence.settled else 0
        return links_to_dial(
            wanted=warm,
            idle=len(self._idle),
            waiting=len(self._waiting) + (self._control is None) + self._unproved(),
            dialling=self._dialling,
            total=len(self.links),
        )

    def _unproved(self) -> int:
        """Streams for which no idle link will do: they wait already, or theirs is silent and none was heard since."""
        needed = self._recovery.ready(self.reactor.now) + len(self._stalled)
        if not needed:
            return 0
        # Links that have not been welcomed yet will do, and for those that are silent, links that were heard since.
        since = max((link.last_received for link in self._stalled), default=math.inf)
        return max(needed - sum(not link.protocol.greeted or link.last_received > since for link in self._idle), 0)

    def _next_role(self) -> LinkRole:
        return "control" if self._control is None and not self._dialling_control else "forward"

    async def _dial_counted(self, role: LinkRole) -> None:
        try:
            await self._dial_link(role)
        finally:
            self._dialling -= 1
            if role == "control":
                self._dialling_control = False
        self._changed.set()

    async def _dial_link(self, role: LinkRole) -> None:
        try:
            sock, leftover = await self._dialler.dial()
        except TrustError as error:
            if not self._absence.welcomed:
                raise
            self._failed(error)  # a captive portal, perhaps; the next network will be another
        except ServerRefusedError as error:
            if not self._detached and not any(link.protocol.greeted for link in self.links):
                raise
            self._failed(NetworkError("http", str(error)))  # a proxy being reloaded, perhaps: streams live on
        except NetworkError as error:
            self._failed(error)
        else:
            self._add_link(sock, leftover, role)

    def _add_link(self, sock: socket.socket, leftover: bytes, role: LinkRole) -> None:
        if self._stopping:
            sockets.reset(sock)
            return
        if role == "control" and self._control is not None:
            role = "forward"
        protocol = LinkProtocol("client", keys=self._keys, role=role)
        link = Link(protocol, self, peer=self._dialler.url.authority, now=self.reactor.now)
        self.adopt_link(link)
        protocol.send(
            Hello(
                version=VERSION, session=self.id, role=role, agent=AGENT,
                resume_window=self._wish, features=self._features,
            )
        )  # fmt: skip
        if role == "control":
            self._control = link
        elif self._boot and not leftover:
            # hello, open and early data go out in one write. Not before a first `welcome`: if this link is cut, only
            # the server's boot id tells whether the stream may be opened again.
            self._use(link)
        link.start(self.reactor, sock, leftover)

    def _use(self, link: Link) -> None:
        """Give an idle link to whoever waits for one: streams that lost theirs first."""
        if link.protocol.state not in _READY or self._going(link):
            return
        stream = self._next_stream(link)
        if stream is not None:
            self._resume(stream, link)
        elif self._waiting:
            waiting = self._waiting.popleft()
            stream = self._open(link, waiting.sock, waiting.forward, waiting.peer)
            if link.sock is None:
                stream.read_early()  # the link's start sends it
            else:
                self.reactor.later(partial(self._send_early, stream))  # not now: `link` may be in the middle of a read
        elif link not in self._idle:
            self._idle.append(link)

    def message(self, link: Link, message: AnyMessage) -> None:
        if isinstance(message, Welcome):
            self._welcome(link, message)
        elif isinstance(message, Detached):
            self._server_detached(message)
        elif isinstance(message, Drain):
            self._server_drains(link)
        else:
            super().message(link, message)

    def _welcome(self, link: Link, message: Welcome) -> None:
        if message.version != VERSION:
            self._refusal = ServerRefusedError(
                f"the server speaks version {message.version} of the tunnel protocol, this client {VERSION}:"
                " update the older one"
            )
            self._changed.set()
            raise ProtocolError("version")
        link.measure(link.created)
        self._boot = self._boots[link] = message.boot
        if link.stream is not None:
            link.stream.boot = message.boot
        self.resume_window = float(message.resume_window) if "resume" in message.features and self._wish else 0.0
        if message.idle_links:
            self._demand.least = min(self._least, message.idle_links)
        if message.boot == self._drained:
            # It goes on accepting until it is gone: dialling it again and again would keep nobody's link warm.
            link.close(1000, "the server is stopping")
            self._failed(NetworkError("tunnel", "the server is stopping"))
            return
        self._absence.ended()
        if self._absence.settled:
            self._back()
        if link.protocol.role == "forward" and link.stream is None:
            if link in self._idle:
                self._idle.remove(link)
            self._use(link)
        self._changed.set()

    def _back(self) -> None:
        """The server is there, and stays."""
        line = self._absence.back()
        if line is not None:
            _log.info(line, server=str(self._dialler.url))
            systemd.notify(f"STATUS=connected to {self._dialler.url.authority}", environ=os.environ)

    def idle(self, link: Link) -> None:
        if link.protocol.role == "forward" and not self._stopping:
            self._use(link)

    def lost(self, link: Link, reason: str) -> None:
        super().lost(link, reason)
        self._boots.pop(link, None)
        self._stalled.discard(link)
        if link is self._control:
            self._control = None
        if link in self._idle:
            self._idle.remove(link)
        if self._stopping:
            pass
        elif not link.protocol.greeted and link.close_code == CloseCode.POLICY:
            self._refusal = ServerRefusedError(f"the server refused the link: {logs.escape(reason)}")
        elif self._absence.died(link.created, self.reactor.now) or not link.protocol.greeted:
            self._failed(NetworkError("tunnel", reason))
        if self._stopping and not self.links:
            self.leave()
            self.gone.set()
        self._changed.set()

    def _failed(self, error: NetworkError) -> None:
        first = self._absence.failed(trio.current_time())
        if first is None:
            return
        if first:
            _log.warning(
                "lost the server, trying again" if self._absence.welcomed else "cannot reach the server, trying again",
                layer=error.layer, reason=str(error),
            )  # fmt: skip
            systemd.notify(f"STATUS=the server is away: {logs.escape(str(error))}", environ=os.environ)
        self._changed.set()

    # --- streams that lost their link ---------------------------------------------------------------------------------

    def stream_detached(self, stream: Stream) -> bool:
        kept = super().stream_detached(stream)
        if kept:
            now = self.reactor.now
            not_before = self._recovery.add(stream, now)
            if not_before > now:
                self.reactor.at(not_before, self._resume_waiting)
            elif not self._resuming:
                self._resuming = True
                self.reactor.later(self._resume_waiting)  # not now: a link is in the middle of its end
        return kept

    def _resume_waiting(self) -> None:
        """Resume on idle links as far as there are any; more are dialled."""
        self._resuming = False
        for link in sorted(self._idle, key=lambda link: link.last_received, reverse=True):
            if link.protocol.state is not Exchange.IDLE:
                continue
            stream = self._next_stream(link)
            if stream is None:
                break  # one that was heard even earlier serves nobody either
            self._idle.remove(link)
            self._resume(stream, link)
        self._changed.set()

    def _next_stream(self, link: Link) -> Stream | None:
        """The stream that is to go on on this link now."""
        if link.protocol.state is not Exchange.IDLE or not self.resume_window:
            return None
        return self._recovery.next(link.last_received, self.reactor.now)

    def _resume(self, stream: Stream, link: Link) -> None:
        if self._recovery.take(stream, self.reactor.now):
            self._begin(stream, link)
            self.stream_resumed(stream)
            self.reactor.later(link.flush)  # not now: `link` may be in the middle of a read
        else:
            stream.state.epoch += 1
            stream.asked = self._boots[link]
            link.resume(stream)

    def stream_resumed(self, stream: Stream) -> None:
        super().stream_resumed(stream)
        self._useful()

    def stream_opened(self, stream: Stream) -> None:
        super().stream_opened(stream)
        self._useful()

    def _useful(self) -> None:
        """The server does its work: links that die young are not its fault."""
        if self._absence.useful(self.reactor.now):
            self._back()
            self._changed.set()

    def stream_unknown(self, stream: Stream) -> bool:
        """A stream that this very server was never asked for is opened afresh, under a new id: the old one is refused
        for good, so whatever is still held back on the way dials nothing."""
        state = stream.state
        if not state.unanswered() or stream.boot != stream.asked:
            return False
        del self.streams[state.id]
        state.id = secrets.token_urlsafe(16)
        state.epoch = 0
        state.replayed = state.outbound.restart()
        self.streams[state.id] = stream
        self._recovery.add_afresh(stream)
        self.reactor.later(self._resume_waiting)
        return True

    def stream_ended(self, stream: Stream) -> None:
        super().stream_ended(stream)
        self._recovery.forget(stream)

    def _server_detached(self, message: Detached) -> None:
        """The server noticed first that links are gone. What it asks for and we do not have is gone."""
        for stream_id, epoch in zip_longest(message.streams, message.epochs[: len(message.streams)]):
            stream = self.streams.get(stream_id)
            if stream is None:
                if len(self._unknown) >= limits.PRINCIPAL_STREAMS:
                    raise ProtocolError("more unknown streams than a user may have", 1008)
                self._unknown[stream_id] = None
            elif stream.link is not None and epoch in (None, stream.state.epoch):
                stream.link.close(1000, "the server has lost this link")
        self._tell_unknown()

    def _tell_unknown(self) -> None:
        control = self._control
        if not self._unknown or control is None or control.blocked or control.protocol.state is not Exchange.IDLE:
            return
        for stream_id in list(self._unknown)[:GONE_AT_ONCE]:
            del self._unknown[stream_id]
            control.protocol.send(Gone(stream=stream_id, outcome="unknown"))
        control.flush()
        if self._unknown:
            self.reactor.at(self.reactor.now + GONE_PAUSE_SECONDS, self._tell_unknown)

    def _server_drains(self, link: Link) -> None:
        """The server is going: its links take no stream any more."""
        self._drained = self._boots.get(link, self._boot)
        self._idle = [idle for idle in self._idle if not self._going(idle)]
        _log.warning("the server is stopping", server=str(self._dialler.url))

    def _going(self, link: Link) -> bool:
        """Whether the link's server has said `drain`. Before its welcome nobody knows whose link it is."""
        return self._drained is not None and self._boots.get(link) == self._drained

    def stalled(self, link: Link) -> None:
        """Nothing comes back on a link: dial another at once, and see which of the idle ones are alive."""
        if link.stream is not None:
            if not self._stalled:
                self.reactor.later(self._ask_idle)
            self._stalled.add(link)
        self._changed.set()

    def _ask_idle(self) -> None:
        """Which of the idle links are alive?"""
        since = max((link.last_received for link in self._stalled), default=-math.inf)
        for idle in list(self._idle):
            if idle.last_received < since and idle.protocol.greeted:
                idle.ping()

    # --- applications' connections ------------------------------------------------------------------------------------

    def accepted(self, sock: socket.socket, forward: Forward) -> None:
        """Carry a connection to the forward's target. Takes the socket over."""
        peer = tcp.peer_name(sock)
        if self._stopping:
            sockets.reset(sock)
        elif (
            not self.principal.budget.admitting() or len(self.streams) + len(self._waiting) >= limits.PRINCIPAL_STREAMS
        ):
            _log.warning(
                "connection reset: too many streams or too much memory held", peer=peer, target=str(forward.target)
            )
            sockets.reset(sock)
        elif (link := self._take_idle()) is not None:
            self._send_early(self._open(link, sock, forward, peer))
        else:
            self._waiting.append(_Waiting(sock, forward, peer, trio.current_time() + limits.OPEN_WAIT_SECONDS))
            self._changed.set()

    def _take_idle(self) -> Link | None:
        """The link that was used last. Those in their closing handshake are passed over: `lost` comes only after it."""
        while self._idle:
            link = self._idle.pop()
            if link.protocol.state in _READY and not self._going(link):
                return link
        return None

    def _open(self, link: Link, sock: socket.socket, forward: Forward, peer: str) -> Stream:
        stream = self.make_stream(secrets.token_urlsafe(16), egress=False, target=str(forward.target), peer=peer)
        self._begin(stream, link)
        stream.start(self.reactor, sock)
        self._demand.opened()
        if self._absence.away or self._missing():  # else `keep_links` has nothing to do, and to wake it costs
            self._changed.set()
        return stream

    @staticmethod
    def _send_early(stream: Stream) -> None:
        """What the application sent goes out with `open`, in one write: the reactor's turn to read would be later."""
        stream.read_early()
        if stream.link is not None:
            stream.link.flush()

    def _begin(self, stream: Stream, link: Link) -> None:
        """Ask the server to open the stream, on this idle link; goes out with the next flush."""
        stream.boot = self._boots.get(link, self._boot)
        link.attach(stream)
        link.open(stream.state, target=stream.target, peer=stream.peer)

    async def _expire_waiting(self) -> None:
        """Reset connections that no link came for."""
        while True:
            if not self._waiting:
                await trio.sleep(limits.SWEEP_SECONDS)
                continue
            await trio.sleep_until(self._waiting[0].deadline)
            now = trio.current_time()
            while self._waiting and self._waiting[0].deadline <= now:
                waiting = self._waiting.popleft()
                _log.warning(
                    "connection reset: no link to the server in time",
                    peer=waiting.peer,
                    target=str(waiting.forward.target),
                )
                sockets.reset(waiting.sock)

    # --- life ---------------------------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        super().sweep(now)
        self._demand.second()
        self._stalled = {link for link in self._stalled if link.stalled}
        self._tell_unknown()
        if self._recovery:
            self._resume_waiting()
        old = any(link.protocol.greeted and now - link.created >= YOUNG_SECONDS for link in self.links)
        if not self._absence.settled and old and self._absence.settle():
            self._back()
        surplus = len(self._idle) - self._demand.wanted()
        # The stack's bottom was idle longest.
        for link in self._idle[: max(surplus, 0)]:
            if now - link.idle_since > SURPLUS_SECONDS:
                self._idle.remove(link)
                link.close(1000, "surplus")
        self._changed.set()

    def stop(self) -> None:
        """Say goodbye and close everything."""
        self._stopping = True
        if self._control is not None and self._control.protocol.state is Exchange.IDLE:
            self._control.send(Bye())
        self._idle.clear()
        self.drop_waiting()
        self.close(1000, "the client is stopping")

    def drop_waiting(self) -> None:
        """Reset the connections that wait for a link: unlike a stream's, they are not the reactor's to close."""
        while self._waiting:
            sockets.reset(self._waiting.popleft().sock)
