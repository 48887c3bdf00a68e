"""One datagram flow at one end: what a UDP socket takes and gives, joined to the link that carries it.

Unlike a stream a flow dies with its link, and nobody waits for its end: the next datagram of its source begins another.
"""

from __future__ import annotations

import errno
import math
from typing import TYPE_CHECKING, Protocol

from wstunnel import logs, sockets
from wstunnel.errors import LocalError
from wstunnel.limits import DATAGRAM_QUEUE_BYTES
from wstunnel.reactor import Handler, Reactor
from wstunnel.wire.datagrams import HEADER_BYTES, DatagramQueue, DatagramState

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    import trio

    from wstunnel.link import Link

READ_BYTES = DATAGRAM_QUEUE_BYTES // 2
"""Read from a socket before what was read goes onto the links: more would push itself out of a flow's queue."""
READ_DATAGRAMS = 64
"""Read from a socket before other sockets have their turn: a thousand empty ones would take longer than a turn may."""
_UNREACHABLE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETDOWN})

_log = logs.logger("flow")


class FlowOwner(Protocol):
    """The table of a session's flows."""

    reactor: Reactor

    def opened(self, flow: Flow) -> None:
        """The target's socket is there."""

    def ended(self, flow: Flow) -> None:
        """The flow is over; `flow.outcome` says how. Called once."""

    def touched(self, flow: Flow) -> None:
        """A datagram came or went: it is not idle."""


class Flow(Handler):
    """A flow at the ingress: its socket is that of all sources, and not its own.

    Args:
        state: sans I/O.
        owner: see `FlowOwner`.
        target: what the egress sends to, canonical text.
        peer: who it came from: the application at the ingress, the link's other end at the egress.
        forward: on `reverse` links, the id of the forward that it belongs to; else empty.
        receive: takes each datagram that comes back, which may be a view that is good for this call only; returns
            whether it could.

    Attributes:
        link: what carries it; None while it waits for one, and at the end.
        reason: why it ends, once it does; then (code, message). It takes no datagram any more.
        outcome: the same, once it is over at both ends.
        active: when a datagram last came or went, in monotonic seconds.
        dropped: datagrams that its socket did not take.
        when_ending: called once, when it takes no more datagrams: perhaps the peer has yet to answer its reset.
        bind: at the server, where the datagrams of a reverse forward are accepted; else empty.
        address: what the egress sends to, once it is known.
        application: at the egress, the application's address as the peer claims it.
        boot: at the client, of the server that was asked for it. As `proof_after`, it is of use to streams only.
        note: at the egress, why the policy forbade the target, for the log only.
    """

    __slots__ = (
        "_receive", "active", "address", "application", "bind", "boot", "created", "dropped", "forward", "link", "note",
        "outcome", "owner", "peer", "proof_after", "reason", "state", "target", "when_ending",
    )  # fmt: skip

    def __init__(
        self,
        state: DatagramState,
        owner: FlowOwner,
        *,
        target: str,
        peer: str,
        forward: str = "",
        receive: Callable[[bytes | memoryview], bool] | None = None,
    ) -> None:
        super().__init__()
        self.state = state
        self.owner = owner
        self.reactor = owner.reactor
        self.target = target
        self.peer = peer
        self.forward = forward
        self.bind = ""
        self.link: Link | None = None
        self.reason: tuple[str, str] | None = None
        self.outcome: tuple[str, str] | None = None
        self.created = self.active = owner.reactor.now
        self.dropped = 0
        self.when_ending: Callable[[Flow], None] | None = None
        self.address = ""
        self.application = ""
        self.boot = ""
        self.note = ""
        self.proof_after = -math.inf
        self._receive = receive

    def lost(self) -> int:
        """Datagrams that were dropped at this end."""
        return self.dropped + self.state.dropped + self.state.queue.dropped

    # --- from the link ------------------------------------------------------------------------------------------------

    def deliver(self, data: bytes | memoryview) -> bool:
        """A datagram for this end's socket. Returns whether it took it: if not it is lost."""
        self.owner.touched(self)
        if self.reason is None and self._receive is not None and self._receive(data):
            return True
        self.dropped += 1
        return False

    def opened(self, address: str) -> None:
        """Ingress: the egress has a socket for it."""
        self.address = address
        self.owner.opened(self)

    def was_reset(self, code: str, message: str) -> None:
        """The peer's reset, or its answer to ours."""
        self._end(code, message)

    def finished(self) -> None:
        """The exchange on the link is over, as only a reset ends it."""
        assert self.reason is not None
        self._over(*self.reason)

    def link_lost(self, reason: str) -> None:
        """The link is gone, and with it the flow."""
        self._over(*(self.reason or ("lost", reason)))

    def refresh(self) -> None:
        """The link has written: nothing waits for that here, since nothing is held back."""

    # --- to the link --------------------------------------------------------------------------------------------------

    def send(self, datagram: bytes) -> None:
        """A datagram for the peer; goes out with the link's next flush."""
        self.owner.touched(self)
        self.state.queue.push(datagram)

    def reset(self, code: str, message: str) -> None:
        """End the flow here, and at the peer once it has what was queued before. Idempotent."""
        if self.outcome is not None or self.reason is not None:
            return
        self._end(code, message)
        if self.link is None:
            self._over(code, message)
        else:
            self.state.reset_wanted = (code, message)
            self.link.flush()

    def fail(self, error: Exception) -> None:
        """An exception in our own code: this flow only."""
        _log.exception("fault in our own code", target=self.target)
        self.reset("internal", f"internal error: {type(error).__name__}")

    def _end(self, code: str, message: str) -> None:
        """It takes no more datagrams; the first reason is the one that holds."""
        if self.reason is not None:
            return
        self.reason = (code, message)
        self._close_local()
        if self.when_ending is not None:
            self.when_ending(self)

    def _close_local(self) -> None:
        """The flow has no socket any more."""

    def _over(self, code: str, message: str) -> None:
        if self.outcome is not None:
            return
        self.outcome = (code, message)
        self._end(code, message)
        self.state.discard()
        self.owner.ended(self)


class DialledFlow(Flow):
    """A flow at the egress, with a socket of its own that is connected to the target: only that may answer.

    Attributes:
        dialling: the cancel scope of the name's resolution under way.
        when_refused: called with `address` if nobody listens there, or if it cannot be reached.
    """

    __slots__ = ("_early", "dialling", "when_refused")

    def __init__(
        self, state: DatagramState, owner: FlowOwner, *, target: str, peer: str, forward: str = "", early: DatagramQueue
    ) -> None:
        super().__init__(state, owner, target=target, peer=peer, forward=forward)
        self.dialling: trio.CancelScope | None = None
        self.when_refused: Callable[[str], None] | None = None
        self._early = early  # until there is a socket

    def lost(self) -> int:
        return super().lost() + self._early.dropped

    def connected(self, reactor: Reactor, sock: socket.socket, address: str) -> None:
        """The target's socket, which is owned from now on; what came before it is sent."""
        self.dialling = None
        if self.outcome is not None or self.reason is not None:
            sock.close()
            return
        self.address = address
        sockets.widen(sock)
        try:
            reactor.adopt(self, sock, look=False)
        except LocalError as error:
            sock.close()
            self.reset("limit", str(error))
            return
        assert self.link is not None  # else it would be over
        self.link.opened(address)
        self.owner.opened(self)
        while self._early and self.sock is not None:
            self._send(self._early.pop())
        if self.link is not None:
            self.link.flush()

    def deliver(self, data: bytes | memoryview) -> bool:
        self.owner.touched(self)
        if self.sock is not None:
            return self._send(data)
        if self.reason is None:
            self._early.push(bytes(data))
        else:
            self.dropped += 1
        return False

    def _send(self, data: bytes | memoryview) -> bool:
        assert self.sock is not None
        try:
            self.sock.send(data)
        except OSError as error:
            self.dropped += 1
            self._failed(error)
            return False
        return True

    def on_readable(self) -> None:
        sock, scratch = self.sock, self.reactor.scratch
        assert sock is not None
        queue = self.state.queue
        room = READ_BYTES
        for _ in range(READ_DATAGRAMS):
            try:
                size = sock.recv_into(scratch)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self._failed(error)
                break
            queue.push(bytes(scratch[:size]))
            room -= size + HEADER_BYTES
            if room <= 0:
                break
        if room < READ_BYTES:
            self.owner.touched(self)
            if self.link is not None:
                self.link.flush()

    def _failed(self, error: OSError) -> None:
        """What the socket says of this datagram or of an earlier one. Most is of the moment, and no end."""
        if error.errno == errno.ECONNREFUSED:
            # ICMP: nobody has that port. Who dials TCP would be told so, too.
            code, message = "refused", "the target refused a datagram: nobody listens there"
        elif error.errno in _UNREACHABLE:
            code, message = "unreachable", f"the target cannot be reached: {error.strerror}"
        else:
            return
        if self.when_refused is not None:
            self.when_refused(self.address)
        self.reset(code, message)

    def _close_local(self) -> None:
        if self.dialling is not None:
            self.dialling.cancel()
            self.dialling = None
        if self._early:
            self._early.clear()
        if self.sock is not None:
            self.reactor.drop(self)
