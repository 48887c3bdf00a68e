"""The end that dials: a stream's target, under a policy."""

from __future__ import annotations

import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from wstunnel.dial import NO_SOURCES, Sources, begin_dial, dial_target
from wstunnel.errors import StreamError
from wstunnel.targets import join_host_port

if TYPE_CHECKING:
    from wstunnel.flow import DialledFlow
    from wstunnel.policy import Policy
    from wstunnel.reactor import Reactor
    from wstunnel.stream import Stream
    from wstunnel.targets import Target

RESOLVER_THREADS = 8
"""Names that one principal resolves at once: slow names of one user must not stop the others."""

REFUSALS = 1024
"""Addresses that are remembered for having refused datagrams."""

REFUSAL_SECONDS = 60.0
"""How long they are: what listens there again is found at its usual place after that."""

Prelude = Callable[["Stream"], bytes]
"""What the target is sent before the stream's own bytes."""


class Egress:
    """Connects streams to their targets, and datagram flows.

    Args:
        reactor: where sockets live.
        nursery: where dials that take time run.
        sources: where connections come from.
    """

    def __init__(self, reactor: Reactor, nursery: trio.Nursery, sources: Sources = NO_SOURCES) -> None:
        self.sources = sources
        self._reactor = reactor
        self._nursery = nursery
        self._limiters: dict[str, trio.CapacityLimiter] = {}
        # When addresses refused, in monotonic seconds: the one that did so last at the end.
        self._refusals: OrderedDict[str, float] = OrderedDict()

    def dial(
        self,
        stream: Stream | DialledFlow,
        target: Target,
        policy: Policy,
        *,
        principal: str,
        prelude: Prelude | None = None,
    ) -> None:
        """Connect a new stream or flow; what takes time is a task of its own, which `stream.dialling` cancels.

        Not before the end of the reactor's batch: the link that brought `open` is still being read.

        Args:
            stream: from the peer's `open`.
            target: what to dial.
            policy: whether it may be dialled.
            principal: whose threads resolve names.
            prelude: at most 4 KiB, for the target of a stream.
        """
        self._reactor.later(partial(self._dial, stream, target, policy, principal, prelude))

    def _dial(
        self, stream: Stream | DialledFlow, target: Target, policy: Policy, principal: str, prelude: Prelude | None
    ) -> None:
        if stream.outcome is not None or stream.reason is not None:
            return  # it was reset in the same read: nobody wants the target any more
        try:
            begun = begin_dial(target, policy, self.sources)
        except Exception as error:
            _refuse_target(stream, error)
            return
        if begun is not None and begun.done:
            self._connected(stream, begun.sock, begun.address, prelude)
        else:
            stream.dialling = trio.CancelScope()
            dial = partial(
                dial_target, target, policy, limiter=self.limiter(principal), sources=self.sources, begun=begun
            )
            if target.kind == "udp":
                stream.when_refused = self._note_refusal  # type: ignore[union-attr]  # a flow, as its target says
                dial = partial(dial, resolve=partial(_resolve, self._lately_refusing()))
            self._nursery.start_soon(self._await_dial, stream, stream.dialling, dial, prelude)

    async def _await_dial(
        self,
        stream: Stream | DialledFlow,
        scope: trio.CancelScope,
        dial: Callable[[], Awaitable[tuple[socket.socket, str]]],
        prelude: Prelude | None,
    ) -> None:
        with scope:
            try:
                sock, address = await dial()
            except Exception as error:
                _refuse_target(stream, error)
                return
            self._connected(stream, sock, address, prelude)

    def _note_refusal(self, address: str) -> None:
        """Datagrams find nobody there: the next flow to the same name goes to another of its addresses."""
        self._refusals[address] = self._reactor.now
        self._refusals.move_to_end(address)
        if len(self._refusals) > REFUSALS:
            self._refusals.popitem(last=False)

    def _lately_refusing(self) -> tuple[str, ...]:
        """Addresses to be tried after others, the one that refused last at the end."""
        while self._refusals and next(iter(self._refusals.values())) <= self._reactor.now - REFUSAL_SECONDS:
            self._refusals.popitem(last=False)
        return tuple(self._refusals)

    def _connected(
        self, stream: Stream | DialledFlow, sock: socket.socket, address: str, prelude: Prelude | None
    ) -> None:
        try:
            if prelude is not None:
                try:
                    # The buffer of a new connection takes it whole.
                    sock.send(prelude(stream))  # type: ignore[arg-type]  # only streams have one
                except OSError:
                    pass  # the stream's first read says so again
            stream.connected(self._reactor, sock, address)
        except Exception as error:
            stream.fail(error)

    def limiter(self, principal: str) -> trio.CapacityLimiter:
        """Bounds the principal's threads that resolve names."""
        limiter = self._limiters.get(principal)
        if limiter is None:
            limiter = self._limiters[principal] = trio.CapacityLimiter(RESOLVER_THREADS)
        return limiter


def _resolve(refusals: Sequence[str], *question: Any, **options: Any) -> list[Any]:
    """`socket.getaddrinfo` in a thread, those addresses last that were the last to refuse datagrams.

    TCP finds out by connecting which of a name's addresses is the right one (`localhost` mostly has two). Of datagrams
    only a refusal tells, and that comes when they are lost.
    """
    answers = socket.getaddrinfo(*question, **options)
    order = {address: number for number, address in enumerate(refusals)}
    return sorted(answers, key=lambda answer: order.get(join_host_port(answer[4][0], answer[4][1]), -1))


def _refuse_target(stream: Stream | DialledFlow, error: Exception) -> None:
    """The dial failed: for a reason that the peer is told, or by our own fault, which ends this stream only."""
    if not isinstance(error, StreamError):
        stream.fail(error)
        return
    stream.note = " ".join(getattr(error, "__notes__", ()))
    stream.reset(error.code, str(error))
