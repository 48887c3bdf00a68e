"""A plain endpoint's connection: a client's WebSocket and the target's connection, joined on the reactor.

    client's side   frames, pings, the closing handshake        plain_client.py
    target's side   bytes; EOF and reset at either end          plain_target.py

Neither side waits for the other, and each holds little: the target is read only once the client took what came before,
the client only while the target has less than QUEUE_BYTES to take.

How ends are told, given that a WebSocket has no half-close:

    the target's EOF           Close 1000, behind all of its data
    the target's reset         Close 1011
    the client's Close 1000, or without code    the target's EOF, behind all of the client's data
    the client's Close 1001                     the same, unless it comes in the middle of a message
    any other Close, or no Close at all         a reset, behind all that came, unless the target's EOF came before
    the client breaks the rules                 a reset, at once

What the target still says after the client's end is thrown away. A reset behind all that came waits until the target's
kernel has it, and LINGER_SECONDS more: a program that finds a reset may drop what it has not read. A target at a Unix
socket cannot be reset, and is told EOF.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, ClassVar, Protocol

from wstunnel import limits, logs, sockets
from wstunnel.endpoints.plain_client import ClientSide
from wstunnel.endpoints.plain_side import QUEUE_BYTES
from wstunnel.endpoints.plain_target import TargetSide
from wstunnel.errors import LocalError
from wstunnel.wire.frames import CloseCode
from wstunnel.wire.plain import NO_STATUS

if TYPE_CHECKING:
    import socket

    from wstunnel.reactor import Reactor
    from wstunnel.session import Principal
    from wstunnel.wire.masking import MaskKeys

_log = logs.logger("endpoint")


class PlainOwner(Protocol):
    """Who a connection belongs to."""

    reactor: Reactor

    def plain_ended(self, connection: PlainConnection) -> None:
        """Both sockets are closed. Called once."""


class PlainConnection:
    """One WebSocket and what it leads to.

    The owner calls `start` once, `sweep` once a second, and `close` at its own end.

    Args:
        owner: see `PlainOwner`.
        principal: whose memory it holds; the owner counts the connection.
        endpoint: its path, for the log.
        target: canonical text, for the log.
        peer: the client's address, for the log.
        address: of the target, as dialled, for the log.
        text: whether text messages are taken.
        keys: of masking, where this process is the WebSocket's client.

    Attributes:
        far, near: who is at the WebSocket's other end, and at the raw connection's.
        orderly: codes of Close frames that say what a FIN does: that was all. A client says 1001 when its page or its
            process ends.
        patient: the closing handshake may take as long as anything moves; until `close`.
        outcome: how it ended, as a word and a detail; None until it does.
        held: bytes that are charged to the principal.
    """

    log: ClassVar[logs.Log] = _log
    kind: ClassVar[str] = "endpoint"
    far: ClassVar[str] = "client"
    near: ClassVar[str] = "target"
    orderly: ClassVar[frozenset[int]] = frozenset({CloseCode.NORMAL, CloseCode.GOING_AWAY, NO_STATUS})

    def __init__(
        self,
        owner: PlainOwner,
        principal: Principal,
        *,
        endpoint: str,
        target: str,
        peer: str,
        address: str,
        text: bool = False,
        keys: MaskKeys | None = None,
    ) -> None:
        self.owner = owner
        self.principal = principal
        self.endpoint = endpoint
        self.patient = True
        self.outcome: tuple[str, str] | None = None
        self.created = owner.reactor.now
        self.client = ClientSide(self, text=text, keys=keys, now=self.created)
        self.target = TargetSide(self, now=self.created)
        self._where: dict[str, object] = {"endpoint": endpoint, "target": target, "address": address, "peer": peer}
        self.held = 0
        self._swept = self.created
        self._over = False

    def start(self, client: socket.socket, target: socket.socket, leftover: bytes = b"") -> None:
        """Take over both connected, non-blocking sockets; `leftover` came behind the client's HTTP head."""
        self.principal.plain[self] = None
        self.log.info(f"{self.kind} opened", **self._describe())
        reactor = self.owner.reactor
        sockets.limit_unsent(client, QUEUE_BYTES)
        sockets.give_up_after(client, limits.STALLED_SECONDS)
        try:
            reactor.adopt(self.target, target)
        except LocalError as error:
            sockets.reset(target)
            client.close()
            self._end("limit", str(error))
        else:
            try:
                reactor.adopt(self.client, client)
            except LocalError as error:
                client.close()
                self.target.drop(reset=True)
                self._end("limit", str(error))
        self.client.secure = isinstance(client, ssl.SSLSocket)
        try:
            if leftover and self.client.sock is not None:
                self.client.process(leftover)
            self.refresh()
        except Exception as error:
            self.fault(error)
        self.check_over()

    def close(self, code: int, reason: str) -> None:
        """End both sides from here: the client is told why, the target's connection is reset."""
        self.patient = False
        self.target.drop(reset=True)
        self._end("shutdown", reason)
        self.client.close(code, reason)
        self.check_over()

    def sweep(self, now: float) -> None:
        """Once a second: is the client there, has somebody waited for too long, is there memory again."""
        late = max(0.0, now - self._swept - limits.SWEEP_SECONDS)
        self._swept = now
        try:
            self.client.sweep(now, late)
            self.target.sweep(now)
            self.refresh()
        except Exception as error:
            self.fault(error)
        self.check_over()

    def woke(self, now: float) -> None:
        """The machine or the process slept: the client is asked anew."""
        self.client.liveness.woke(now)
        self._swept = now

    # --- between the sides --------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Ask the reactor for what may go on now, and account for what is held."""
        client, target = self.client, self.target
        held = client.waiting() + len(target.queue)
        budget = self.principal.budget
        if held != self.held:
            budget.charge(held - self.held)
            if budget.exhausted():
                self.owner.reactor.later(self.principal.relieve)
            self.held = held
        room = budget.room() > 0
        client.refresh(may_read=len(target.queue) <= QUEUE_BYTES and (room or not len(target.queue)))
        target.refresh(may_read=target.discarding or (room and client.ready()))

    def client_closed(self, code: int, reason: str, *, midway: bool) -> None:
        """The client said goodbye: if that was all, the target is given its EOF once it has it.

        Args:
            code, reason: of its Close frame.
            midway: a message was begun that had not ended. Many messages or one are the same to the target, so that
                matters only to who did not choose when to go.
        """
        status = "" if code == NO_STATUS else f": {code} {reason}"
        detail = f"closed by the {self.far}{status}".rstrip()
        if code in self.orderly and not (midway and code == CloseCode.GOING_AWAY):
            self._end("finished", detail)
            self.target.finish()
        else:
            self._broken_off("reset", detail)

    def client_left(self, detail: str) -> None:
        """The client's connection is gone without a goodbye: a proxy closed it, the client was killed, the network."""
        self.client.drop()
        self._broken_off("lost", detail)

    def _broken_off(self, outcome: str, detail: str) -> None:
        """What came may not be all, and only a target that has said goodbye itself need not know."""
        agreed = self.outcome is not None and self.outcome[0] == "finished"
        if self.target.resettable:
            self._end(outcome, detail)
        else:
            self._end("lost", f"{detail}; the {self.near} saw an end: a Unix socket cannot be reset")
        self.target.finish(reset=not agreed)

    def client_failed(self, reason: str) -> None:
        """The client broke the rules: what it meant to say is not known, so the target is told of a reset."""
        self._end("protocol", reason)
        self.target.drop(reset=True)

    def target_ended(self) -> None:
        """The target's EOF, behind all that it sent."""
        self._end("finished", f"closed by the {self.near}")
        self.client.close(CloseCode.NORMAL, f"the {self.near} has closed the connection")

    def target_broke(self, reason: str) -> None:
        """The target's connection is gone."""
        self._end("reset", reason)
        self.client.close(CloseCode.INTERNAL, f"the {self.near}'s connection broke")

    def give_up(self) -> None:
        """Memory ran out, and this connection holds most of it."""
        self.target.drop(reset=True)
        self.client.drop()
        self._end("limit", "too much memory is held: the largest connection is broken off")
        self.check_over()

    def fault(self, error: Exception) -> None:
        """An exception in our own code: this connection only."""
        self.log.exception("fault in our own code", **self._describe())
        self.target.drop(reset=True)
        self.client.drop()
        self._end("internal", f"internal error: {type(error).__name__}")
        self.check_over()

    def check_over(self) -> None:
        """Tell the owner once both sockets are closed."""
        if self._over or self.client.sock is not None or self.target.sock is not None:
            return
        self._over = True
        self.principal.plain.pop(self, None)
        self.principal.budget.charge(-self.held)
        self.held = 0
        reason, detail = self.outcome or ("shutdown", "")
        fields: dict[str, object] = {
            "sent": self.client.sent,
            "received": self.client.received,
            "seconds": round(self.owner.reactor.now - self.created, 3),
            "reason": reason,
        }
        if detail:
            fields["detail"] = detail
        self.log.info(f"{self.kind} ended", **self._describe(), **fields)
        self.owner.plain_ended(self)

    def _end(self, outcome: str, detail: str) -> None:
        if self.outcome is None:
            self.outcome = (outcome, detail)

    def _describe(self) -> dict[str, object]:
        return {**self._where, "principal": self.principal.name}
