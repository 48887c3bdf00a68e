"""The client's session: links kept warm, applications' connections, and streams that go on when their link is lost."""

from __future__ import annotations

import math
import os
import random
import secrets
import socket
from collections.abc import Callable
from itertools import zip_longest

import trio

from wstunnel import limits, logs, sockets, systemd
from wstunnel.absence import LOST, UNREACHED, YOUNG_SECONDS, Absence
from wstunnel.dialler import AGENT, Dialler
from wstunnel.egress import Egress
from wstunnel.endpoints import proxy_header
from wstunnel.endpoints.tcp import peer_name
from wstunnel.errors import NetworkError, ProtocolError, ServerRefusedError, TrustError
from wstunnel.flow import DialledFlow, Flow
from wstunnel.forwards import Forward
from wstunnel.ingress import READY, Ingress, Wanted
from wstunnel.link import Link
from wstunnel.pool import SURPLUS_SECONDS, links_to_dial
from wstunnel.reactor import Reactor
from wstunnel.recovery import Recovery
from wstunnel.reverse_client import ReverseForwards
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
    Listening,
    Need,
    Open,
    Welcome,
)
from wstunnel.wire.protocol import LinkProtocol
from wstunnel.wire.states import Exchange
from wstunnel.wire.tombstones import UNKNOWN

_log = logs.logger("client")

_random = random.SystemRandom()
GONE_AT_ONCE = 128
"""Answers to one `detached` that are queued at a time: a link's queue is short."""
GONE_PAUSE_SECONDS = 0.05
"""Between two such batches."""


class ClientSession(Session):
    """All links to the server and all streams over them.

    Args:
        dialler: makes connections.
        reactor: running, or about to.
        idle_links: warm links to keep.
        resume_window: seconds for which streams without a link are to be kept; 0 is not at all.
        reverse: reverse forwards; None is none.
        random_float: in [0, 1), for the back-off.
        descriptors: that the process may have.

    Attributes:
        gone: set when the last link is gone after `stop`.
        udp_forwards: whether some forward cannot do without datagrams: a server that has none is worth a message.
        egress: dials the targets of reverse forwards; set by the role, which has the nursery.
    """

    resumes = True

    def __init__(
        self,
        dialler: Dialler,
        reactor: Reactor,
        *,
        idle_links: int,
        resume_window: int = limits.RESUME_WINDOW_SECONDS,
        reverse: ReverseForwards | None = None,
        random_float: Callable[[], float] = _random.random,
        descriptors: int = 2 * limits.PRINCIPAL_LINKS,
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
        self.ingress = Ingress(self, self, least=idle_links)
        self.reverse = reverse or ReverseForwards(())
        self.egress: Egress | None = None  # where there are reverse forwards
        self._dialling_reverse = 0
        self.trouble = ""
        self._least = idle_links
        self.descriptors = descriptors
        self._control: Link | None = None
        self._dialling = 0
        self._dialling_control = False
        self._absence = Absence(random_float)
        self._stopping = False
        self._refusal: ServerRefusedError | None = None
        self.udp_forwards = False
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
            while True:
                if self._refusal is not None:
                    raise self._refusal
                if self.reverse.failure is not None:
                    raise self.reverse.failure
                self._changed = trio.Event()
                if self._absence.away and not self._stopping and all(link.protocol.greeted for link in self.links):
                    # One dial at a time finds out when the server is back; its `welcome` ends the absence.
                    if self.ingress.waiting:
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
                    for _ in range(self._missing_reverse()):
                        self._dialling_reverse += 1
                        nursery.start_soon(self._dial_reverse)
                await self._changed.wait()

    def _missing(self) -> int:
        if self._stopping:
            return 0
        if not self._absence.welcomed:
            # The first one finds out whether the server takes us at all: one refusal in its log, not twelve.
            return int(not self._dialling and not self.links)
        # While links die young only those are dialled that somebody needs now.
        warm = self.ingress.demand.wanted() if self._absence.settled else 0
        return links_to_dial(
            wanted=warm,
            idle=len(self.ingress.idle),
            waiting=len(self.ingress.waiting) + (self._control is None) + self._unproved(),
            dialling=self._dialling,
            total=len(self.links) + self._dialling_reverse,
            most=self._most_links(),
        )

    def _most_links(self) -> int:
        """The rest of the descriptors is for applications and targets, whatever the server says that it needs."""
        return min(limits.PRINCIPAL_LINKS, int(self.descriptors * limits.PRINCIPAL_SHARE))

    def _missing_reverse(self) -> int:
        if self._stopping or not self._absence.settled or self._control is None:
            return 0
        room = self._most_links() - len(self.links) - self._dialling - self._dialling_reverse
        at_once = limits.DIALS_AT_ONCE - self._dialling - self._dialling_reverse
        return max(min(self.reverse.missing() - self._dialling_reverse, at_once, room), 0)

    def _unproved(self) -> int:
        """Streams for which no idle link will do: they wait already, or theirs is silent and none was heard since."""
        silent = [link for link in self._stalled if link.stalled]  # not those that were heard again since
        needed = self._recovery.ready(self.reactor.now) + len(silent)
        if not needed:
            return 0
        # Links that have not been welcomed yet will do, and for those that are silent, links that were heard since.
        since = max((link.last_received for link in silent), default=math.inf)
        idle = self.ingress.idle
        return max(needed - sum(not link.protocol.greeted or link.last_received > since for link in idle), 0)

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

    async def _dial_reverse(self) -> None:
        try:
            await self._dial_link("reverse")
        finally:
            self._dialling_reverse -= 1
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
        elif role == "reverse":
            self.reverse.parked[link] = None
        elif self._boot and not leftover:
            # hello, open and early data go out in one write. Not before a first `welcome`: if this link is cut, only
            # the server's boot id tells whether the stream may be opened again.
            self._use(link)
        link.start(self.reactor, sock, leftover)

    def _use(self, link: Link) -> None:
        """Give an idle link to whoever waits for one: streams that lost theirs first."""
        if link.protocol.state not in READY or self._going(link):
            return
        stream = self._next_stream(link)
        if stream is not None:
            self._resume(stream, link)
        else:
            self.ingress.offer(link)

    def message(self, link: Link, message: AnyMessage) -> None:
        if isinstance(message, Welcome):
            self._welcome(link, message)
        elif isinstance(message, Detached):
            self._server_detached(message)
        elif isinstance(message, Open):
            self._accept(link, message)
        elif isinstance(message, Listening):
            self.reverse.answered(message, self.reactor.now)
            self._changed.set()
        elif isinstance(message, Need):
            self.reverse.need = min(message.links, self._most_links())
            self._changed.set()
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
        if "udp" in message.features:
            self.ingress.flows_refused = ""
        elif not self.ingress.flows_refused:
            self.ingress.refuse_flows("the server is too old for UDP: update it")
            if self.udp_forwards:
                _log.error(self.ingress.flows_refused, server=str(self._dialler.url))
        if message.idle_links:
            self.ingress.demand.least = min(self._least, message.idle_links)
        if message.boot == self._drained:
            # It goes on accepting until it is gone: dialling it again and again would keep nobody's link warm.
            link.close(1000, "the server is stopping")
            self._failed(NetworkError("tunnel", "the server is stopping"))
            return
        self._absence.ended()
        self.trouble = ""
        if self._absence.settled:
            self._back()
        if link.protocol.role == "control":
            self.reverse.ask(link, message.features)
        if link.protocol.role == "forward" and link.stream is None:
            self.ingress.idle.pop(link, None)
            self._use(link)
        self._changed.set()

    def _back(self) -> None:
        """The server is there, and stays."""
        line = self._absence.back()
        if line is not None:
            _log.info(line, server=str(self._dialler.url))
            systemd.notify(f"STATUS=connected to {self._dialler.url.authority}", environ=os.environ)

    def idle(self, link: Link) -> None:
        if link.protocol.role == "reverse":
            self.reverse.parked[link] = None
        elif link.protocol.role == "forward" and not self._stopping:
            self._use(link)

    def lost(self, link: Link, reason: str) -> None:
        super().lost(link, reason)
        self._boots.pop(link, None)
        self._stalled.discard(link)
        if link is self._control:
            self._control = None
            self.reverse.need = 0  # until the server says so anew: it may be another, with no place of ours
        self.ingress.idle.pop(link, None)
        self.reverse.parked.pop(link, None)
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
        self.trouble = str(error)
        if error.layer == "tunnel":
            self._dialler.failed(error)
        line = self._absence.failed(trio.current_time(), linked=any(self._lives(link) for link in self.links))
        if line is None:
            return
        if line:
            _log.warning(line, layer=error.layer, reason=str(error))
        if line in (LOST, UNREACHED):
            systemd.notify(f"STATUS=the server is away: {logs.escape(str(error))}", environ=os.environ)
        self._changed.set()

    def _lives(self, link: Link) -> bool:
        """Whether the link shows that the server is there, as far as anybody knows."""
        protocol = link.protocol
        return protocol.greeted and protocol.state is not Exchange.CLOSED and not link.stalled and not self._going(link)

    # --- streams that lost their link ---------------------------------------------------------------------------------

    def _disowned(self, stream_id: str) -> bool:
        """Whether the server was told, or is about to be, that there is no such stream."""
        return stream_id in self._unknown or stream_id in self.principal.tombstones

    def stream_detached(self, stream: Stream) -> bool:
        if self._disowned(stream.state.id):
            return False  # its `open` was held back, and refused: the server's stream of this id knows nothing of that
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
        for link in sorted(self.ingress.idle, key=lambda link: link.last_received, reverse=True):
            if link.protocol.state is not Exchange.IDLE:
                continue
            stream = self._next_stream(link)
            if stream is None:
                break  # one that was heard even earlier serves nobody either
            del self.ingress.idle[link]
            self._resume(stream, link)
        self._changed.set()

    def _next_stream(self, link: Link) -> Stream | None:
        """The stream that is to go on on this link now."""
        if link.protocol.state is not Exchange.IDLE or not self.resume_window:
            return None
        return self._recovery.next(link.last_received, self.reactor.now)

    def _resume(self, stream: Stream, link: Link) -> None:
        if self._recovery.take(stream, self.reactor.now):
            self.begin(stream, link)
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
        if not stream.state.unanswered() or stream.boot != stream.asked:
            return False
        self._renew(stream, secrets.token_urlsafe(16))
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
            # An `open` of it that is held back somewhere must not dial any more.
            self.principal.tombstones.add(stream_id, UNKNOWN, self.reactor.now)
            control.protocol.send(Gone(stream=stream_id, outcome="unknown"))
        control.flush()
        if self._unknown:
            self.reactor.at(self.reactor.now + GONE_PAUSE_SECONDS, self._tell_unknown)

    def _server_drains(self, link: Link) -> None:
        """The server is going: its links take no stream any more."""
        self._drained = self._boots.get(link, self._boot)
        for idle in [idle for idle in self.ingress.idle if self._going(idle)]:
            del self.ingress.idle[idle]
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
        for idle in list(self.ingress.idle):
            if idle.last_received < since and idle.protocol.greeted:
                idle.ping()

    # --- reverse forwards ---------------------------------------------------------------------------------------------

    def _accept(self, link: Link, message: Open) -> None:
        """The server has a connection for a reverse forward."""
        self.reverse.parked.pop(link, None)
        if message.stream in self.streams or message.stream in self.flows:
            raise ProtocolError("open repeats the id of a live stream")
        stream: Stream | DialledFlow
        if self.reverse.is_flow(message):
            stream = self.flows.asked(message.stream, message.target, link.peer, forward=message.forward)
        else:
            stream = self.make_stream(
                message.stream, egress=True, target=message.target, peer=link.peer, forward=message.forward
            )
        stream.application = message.peer
        stream.boot = self._boots.get(link, self._boot)
        link.attach(stream)
        link.protocol.accept(stream.state)
        if self._disowned(message.stream):
            stream.reset("forbidden", "this stream id was used before")
        elif self._stopping or not self.principal.budget.admitting() or self.egress is None:
            stream.reset("limit", "the client takes no more streams")
        else:
            self.reverse.dial(self.egress, stream, message)
        self._changed.set()  # another link is to be parked

    # --- applications' connections ------------------------------------------------------------------------------------

    def accepted(self, sock: socket.socket, forward: Forward) -> None:
        """Carry a connection to the forward's target. Takes the socket over."""
        if self._stopping:
            sockets.reset(sock)
            return
        early = proxy_header.of_socket(forward.proxy, sock) if forward.proxy else b""
        self.ingress.accepted(Wanted(str(forward.target), peer_name(sock), sock, early=early))

    def lacking(self) -> None:
        if self.ingress.waiting or self._absence.away or self._missing():  # else to wake `keep_links` only costs
            self._changed.set()

    def begin(self, stream: Stream | Flow, link: Link) -> None:
        stream.boot = self._boots.get(link, self._boot)
        super().begin(stream, link)

    def usable(self, link: Link) -> bool:
        return not self._going(link)

    # --- life ---------------------------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        super().sweep(now)
        self.ingress.demand.second()
        self.reverse.retry(self._control, now)
        self.principal.tombstones.sweep(now)
        self._stalled = {link for link in self._stalled if link.stalled}
        self._tell_unknown()
        if self._recovery:
            self._resume_waiting()
        old = any(link.protocol.greeted and now - link.created >= YOUNG_SECONDS for link in self.links)
        if not self._absence.settled and old and self._absence.settle():
            self._back()
        for link in self.ingress.surplus(now, SURPLUS_SECONDS):
            link.close(1000, "surplus")
        self._changed.set()

    def stop(self) -> None:
        """Say goodbye and close everything."""
        self._stopping = True
        if self._control is not None and self._control.protocol.state is Exchange.IDLE:
            self._control.send(Bye())
        self.ingress.stop()
        self.close(1000, "the client is stopping")
