"""Reverse forwards at the client: what the server is asked to listen on, and the targets that its opens name.

The server knows a forward's id and where to listen, not where it leads: the client looks that up. So a server that was
taken over can reach nothing that the user did not name, but through a dynamic forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wstunnel import logs
from wstunnel.egress import Egress
from wstunnel.endpoints import proxy_header
from wstunnel.errors import LocalError, ServerRefusedError, UsageError, WstunnelError
from wstunnel.forwards import Forward, listen_text
from wstunnel.policy import Policy, exactly
from wstunnel.targets import join_host_port, parse_target
from wstunnel.wire.messages import Listen, Listening, Open

if TYPE_CHECKING:
    from wstunnel.flow import DialledFlow
    from wstunnel.link import Link
    from wstunnel.stream import Stream

_log = logs.logger("client")

RETRY_SECONDS = 5.0
"""Between two attempts to have an address that is in use."""


@dataclass(slots=True)
class _Asked:
    """One forward, and what the server said of it."""

    forward: Forward
    address: str = ""
    refused: str = ""
    retry_at: float | None = None
    taken: bool = False  # by another client of the same user: to ask again would take it back, and so on for ever

    def accepted_at(self, application: str) -> str:
        """Which of the two addresses of `*` and `localhost` the application has connected to: that of its family."""
        forward = self.forward
        known = self.address.split(", ") if self.address else []  # a waiting connection may come before `listening`
        names = known or [join_host_port(address, forward.port) for address in forward.addresses]
        return next((name for name in names if name.startswith("[") == application.startswith("[")), names[0])


class ReverseForwards:
    """The client's reverse forwards.

    Args:
        forwards: from the command line.
        exit_on_failure: whether one that is refused ends the client.
        only: whether the client has nothing else to do.

    Attributes:
        need: how many reverse links should be parked, as the server says.
        parked: reverse links that carry nothing.
        failure: what ends the client, once there is such a thing.
    """

    def __init__(self, forwards: Sequence[Forward], *, exit_on_failure: bool = False, only: bool = False) -> None:
        self._asked = {str(number): _Asked(forward) for number, forward in enumerate(forwards, 1)}
        self._exit_on_failure = exit_on_failure
        self._only = only
        self._policies = {
            name: Policy((exactly(asked.forward.target),) if asked.forward.target else (), own_sockets=(), is_local=_no)
            for name, asked in self._asked.items()
        }
        self.need = 0
        self.parked: dict[Link, None] = {}
        self.failure: WstunnelError | None = None

    def __bool__(self) -> bool:
        return bool(self._asked)

    def ask(self, control: Link, features: Sequence[str]) -> None:
        """A control link is there: ask for every forward. What the server has already it only confirms."""
        if not self._asked:
            return
        if "reverse" not in features:
            self._fail(ServerRefusedError("the server is too old for -R: update it"))
            return
        for name, asked in self._asked.items():
            if asked.forward.udp and "udp" not in features:
                message = "the server is too old for UDP: update it"
                self.answered(Listening(forward=name, code="forbidden", message=message), 0.0)
            elif not asked.taken:
                control.send(Listen(forward=name, bind=listen_text(asked.forward)))

    def answered(self, message: Listening, now: float) -> None:
        """The server listens for a forward, or says why not."""
        asked = self._asked.get(message.forward)
        if asked is None:
            return
        asked.retry_at = None
        if not message.code:
            if asked.address != message.address:
                _log.announce(f"listening {logs.escape(message.address)} at the server -> {asked.forward.whither}")
            asked.address, asked.refused = message.address, ""
            return
        asked.address = ""
        asked.taken = message.code == "taken-over"
        if message.code == "in-use":
            asked.retry_at = now + RETRY_SECONDS
        if asked.refused != message.message:
            asked.refused = message.message
            _log.error(
                f"the server does not listen for -R: {logs.escape(message.message)}",
                forward=str(asked.forward), retry="yes" if asked.retry_at else "no",
            )  # fmt: skip
        if self._exit_on_failure or (self._only and self._hopeless()):
            failure = ServerRefusedError if message.code == "forbidden" else LocalError
            self._fail(failure(f"the server does not listen for -R {asked.forward}: {logs.escape(message.message)}"))

    def _hopeless(self) -> bool:
        """Whether the server will never listen for this client. What another client has now is no such case: streams go
        on here, and whoever starts this client again would take it back.
        """
        return all(asked.refused and asked.retry_at is None and not asked.taken for asked in self._asked.values())

    def _fail(self, error: WstunnelError) -> None:
        if self.failure is None:
            self.failure = error

    def retry(self, control: Link | None, now: float) -> None:
        """Ask again for what was in use."""
        for name, asked in self._asked.items():
            if control is not None and asked.retry_at is not None and now >= asked.retry_at:
                asked.retry_at = now + RETRY_SECONDS
                control.send(Listen(forward=name, bind=listen_text(asked.forward)))

    def missing(self) -> int:
        """How many reverse links to dial, those under way aside."""
        return max(self.need - len(self.parked), 0) if self._asked else 0

    def is_flow(self, message: Open) -> bool:
        """Whether datagrams are meant, as the forward says, or for a dynamic one the application."""
        asked = self._asked.get(message.forward)
        if asked is None:
            return False
        return asked.forward.udp or (asked.forward.target is None and message.target.startswith("udp:"))

    def dial(self, egress: Egress, stream: Stream | DialledFlow, message: Open) -> None:
        """The server has accepted a connection, or a datagram: connect its stream to the forward's target."""
        asked = self._asked.get(message.forward)
        if asked is None:
            stream.reset("forbidden", "no such forward")
            return
        target = asked.forward.target
        if target is None:
            try:
                target = parse_target(message.target)
            except UsageError as error:
                stream.reset("forbidden", f"not a target: {error.message}")
                return
        stream.target = str(target)
        prelude: Callable[[Stream], bytes] | None = None
        if version := asked.forward.proxy:

            def prelude(stream: Stream) -> bytes:
                return proxy_header.of_names(version, stream.application, asked.accepted_at(stream.application))

        egress.dial(stream, target, self._policies[message.forward], principal="local", prelude=prelude)


def _no(_address: str) -> bool:
    return False
