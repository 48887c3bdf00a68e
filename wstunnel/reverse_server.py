"""Reverse forwards at the server: where one client asked it to listen, and the connections that are accepted there.

A place outlives the links of its session, for the resume window: connections wait for a new link meanwhile. The next
session of the same user takes it over, waiting connections and all.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wstunnel import logs
from wstunnel.endpoints import tcp
from wstunnel.endpoints.listeners import Bound, listen
from wstunnel.endpoints.udp import UdpListener
from wstunnel.errors import LocalError, StreamError, UsageError
from wstunnel.forwards import Forward, parse_listen
from wstunnel.ingress import Ingress, Wanted
from wstunnel.policy import ListenRule, listen_rule_for, may_listen
from wstunnel.wire.messages import Listen, Listening

if TYPE_CHECKING:
    from wstunnel.server_session import ServerSession
    from wstunnel.session import Principal

_log = logs.logger("server")

FORWARDS = 1024
"""Places of one session: as many as a range of ports has."""

NO_PROXY = ("unreachable", "the next client listens here for a target of its own")
"""To an application that has named its target when the place was taken over as another kind."""


@dataclass(slots=True, eq=False)
class Place:
    """One place that the server listens on for a client.

    Attributes:
        owner: whose it is now; a session of the same user may take it over.
        forward_id: what that session calls it.
        forward: as the client asked for it.
        bound: its sockets.
        acceptors: what accepts on them.
    """

    owner: ReverseForwards
    forward_id: str
    forward: Forward
    bound: list[Bound]
    acceptors: list[tcp.Listener | UdpListener] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Where, as a person reads it: `127.0.0.1:8080`, a path, or both addresses of `*`."""
        return ", ".join(bound.name for bound in self.bound)

    @property
    def principal(self) -> Principal:
        """Whose it is, whichever session has it."""
        return self.owner._session.principal

    def way(self) -> tuple[Ingress, str]:
        """What opens streams for its connections, and the forward's id there. Another's after it was taken over.

        Raises:
            StreamError: it is no proxy any more, so its applications cannot name targets.
        """
        if not self.forward.speaks:
            raise StreamError(*NO_PROXY)
        return self.owner._session.ingress, self.forward_id

    def accepted(self, sock: socket.socket) -> None:
        self.owner.accepted(self, sock)

    def close(self) -> None:
        """Listen no more."""
        for acceptor in self.acceptors:
            acceptor.reactor.drop(acceptor)
            if isinstance(acceptor, UdpListener):
                acceptor.flows.close("no longer listening")
        for bound in self.bound:
            bound.close()


class Places:
    """All places of one server, by where they are.

    Args:
        rules: what clients may listen on.
        most: sockets that listen for one principal, over all its sessions.
    """

    def __init__(self, rules: tuple[ListenRule, ...], *, most: int) -> None:
        self.rules = rules
        self.most = most
        self._places: dict[str, Place] = {}

    def find(self, forward: Forward) -> Place | None:
        """The place that has been asked for in the same words."""
        return None if not forward.path and not forward.port else self._places.get(_key(forward))

    def add(self, place: Place) -> None:
        """Remember it."""
        self._places[_key(place.forward)] = place

    def remove(self, place: Place) -> None:
        """Forget it."""
        if self._places.get(_key(place.forward)) is place:
            del self._places[_key(place.forward)]


def _key(forward: Forward) -> str:
    return f"{forward.kind}:{forward.where}"


class ReverseForwards:
    """The places of one session.

    Args:
        session: whose.
        places: all of the server.
        exhausted: called when no descriptor is left.
        negotiate: serves a connection whose application names the target, as a task.
    """

    def __init__(
        self,
        session: ServerSession,
        places: Places,
        *,
        exhausted: Callable[[], None],
        negotiate: Callable[[Place, socket.socket], None],
    ) -> None:
        self._session = session
        self._places = places
        self._exhausted = exhausted
        self._negotiate = negotiate
        self._by_id: dict[str, Place] = {}
        self._refused: dict[str, int] = {}  # by forward: a hash of what was said last

    def __len__(self) -> int:
        return len(self._by_id)

    def bind_of(self, forward_id: str) -> str:
        """Where the server listens for this forward, as a person reads it; empty if it does not."""
        place = self._by_id.get(forward_id)
        return "" if place is None else place.name

    def listen(self, message: Listen) -> Listening:
        """The client asks for a place. Asked again it is the same one."""
        known = self._by_id.get(message.forward)
        if known is not None:
            return Listening(forward=message.forward, address=known.name)
        try:
            place = self._find(message)
        except (UsageError, LocalError) as error:
            text = error.message if isinstance(error, UsageError) else str(error)
            code = "forbidden" if isinstance(error, UsageError) else "in-use"
            self._log_refusal(message, text)
            return Listening(forward=message.forward, code=code, message=text)
        self._by_id[message.forward] = place
        self._refused.pop(message.forward, None)
        _log.info("listening for a client", address=place.name, **self._session.describe())
        return Listening(forward=message.forward, address=place.name)

    def _log_refusal(self, message: Listen, text: str) -> None:
        """Once: the client asks again every few seconds."""
        refusal = hash((message.bind, text))
        new = self._refused.pop(message.forward, None) != refusal
        if len(self._refused) >= FORWARDS:
            del self._refused[next(iter(self._refused))]
        self._refused[message.forward] = refusal
        log = _log.warning if new else _log.debug
        log("listening refused", bind=message.bind, reason=text, **self._session.describe())

    def _find(self, message: Listen) -> Place:
        forward = parse_listen(message.bind)
        if not may_listen(self._places.rules, forward):
            raise UsageError(
                f"the server does not allow listening on {forward.where}; its operator can, with"
                f" --allow-listen {listen_rule_for(forward)}"
            )
        if len(self._by_id) >= FORWARDS:
            raise UsageError(f"a client may have {FORWARDS} reverse forwards")
        if forward.udp and self._session.ingress.flows_refused:
            raise UsageError("a client without the feature `udp` cannot have datagrams taken")
        held = self._places.find(forward)
        if held is not None and held.owner is self:
            raise LocalError(f"cannot listen on {forward.where}: another forward of this client has it")
        if held is not None and held.owner._session.principal is self._session.principal:
            for bound in held.bound:
                if bound.file is not None and held.forward.mode != forward.mode:
                    bound.file.permit(forward.mode)
            held.owner.hand_over(held, self, message.forward, forward)
            return held
        if self._session.principal.listening >= self._places.most:
            raise LocalError(f"the server listens on {self._places.most} sockets for one user at most")
        place = Place(self, message.forward, forward, listen(forward))
        try:
            for bound in place.bound:
                acceptor: tcp.Listener | UdpListener
                if forward.udp:
                    acceptor = UdpListener(bound.sock, self._session.ingress, forward=place.forward_id)
                else:
                    acceptor = tcp.Listener(bound.sock, place.accepted, self._exhausted)
                acceptor.start(self._session.reactor)
                place.acceptors.append(acceptor)
        except BaseException:
            place.close()
            raise
        self._places.add(place)
        self._session.principal.listening += len(place.bound)
        return place

    def hand_over(self, place: Place, other: ReverseForwards, forward_id: str, forward: Forward) -> None:
        """The user's newest session wants this place: it gets it, with the connections that wait."""
        self._by_id.pop(place.forward_id, None)
        waiting = self._session.ingress.withdraw(place.forward_id)
        self._session.taken_over(place.forward_id)
        place.owner, place.forward_id, place.forward = other, forward_id, forward
        for acceptor in place.acceptors:
            if isinstance(acceptor, UdpListener):
                acceptor.flows.hand_over(other._session.ingress, forward_id)
        for wanted in waiting:
            if wanted.flow is not None and wanted.target and not forward.speaks:
                wanted.flow.reset(*NO_PROXY)
            elif wanted.flow is not None:
                # It belongs to the old session, and so does its forward's id. The next datagram begins another.
                wanted.flow.reset("shutdown", "another client of the same user has it now")
            elif wanted.dropped is not None and not forward.speaks:
                wanted.dropped(*NO_PROXY)
            else:
                wanted.forward = forward_id
                other._session.ingress.accepted(wanted)

    def unlisten(self, forward_id: str) -> None:
        """The client wants it no more. Streams go on."""
        place = self._by_id.pop(forward_id, None)
        if place is not None:
            self._places.remove(place)
            place.close()
            self._session.principal.listening -= len(place.bound)
            _log.info("no longer listening for a client", address=place.name, **self._session.describe())

    def close(self) -> None:
        """All of them."""
        for forward_id in list(self._by_id):
            self.unlisten(forward_id)

    def accepted(self, place: Place, sock: socket.socket) -> None:
        """A connection: it waits for a reverse link if there is none."""
        if place.forward.speaks:
            self._negotiate(place, sock)
            return
        self._session.ingress.accepted(Wanted("", tcp.peer_name(sock), sock, forward=place.forward_id))
