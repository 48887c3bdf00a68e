"""The datagram flows of one session: counted for its principal like streams, and ended when they are idle."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from typing import TYPE_CHECKING

from wstunnel import limits, logs
from wstunnel.flow import DialledFlow, Flow
from wstunnel.wire.datagrams import DatagramQueue, DatagramState

if TYPE_CHECKING:
    from collections.abc import Callable

    from wstunnel.reactor import Reactor
    from wstunnel.session import Principal

REFUSED = frozenset({"forbidden", "internal", "limit", "name-not-found", "refused", "timeout", "unreachable"})
"""Codes of flows that the next datagram would not open either."""
LOG_LINES = 50
"""About flows that open and end, of a session in a second; the rest is only counted. Any datagram may begin one,
whoever sent it."""
REFUSAL_LINES = 50
"""As LOG_LINES, about flows that were refused: many that fare well must not hide why one does not."""


class Flows:
    """The flows that one session has at this end.

    Args:
        principal: whom they count for.
        reactor: where their sockets live.
        log: of the role.
        session: how the log calls the session.
        bind_of: tells where the connections of a forward are accepted, by its id; "" if that is unknown.

    Attributes:
        timeout: seconds without a datagram after which a flow ends.
    """

    def __init__(
        self, principal: Principal, reactor: Reactor, log: logs.Log, session: str, bind_of: Callable[[str], str]
    ) -> None:
        self.reactor = reactor
        self.timeout: float = limits.UDP_IDLE_SECONDS
        self._principal = principal
        self._log = log
        self._session = session
        self._bind_of = bind_of
        self._flows: OrderedDict[str, Flow] = OrderedDict()  # the one that was idle longest first
        self._lines = {False: 0, True: 0}  # since the last sweep; apart: about refusals
        self._untold: dict[str, int] = {}  # what was not logged since then, and how often
        self._untold_codes: dict[str, int] = {}  # of the refusals among it
        self._untold_refusal: dict[str, object] = {}  # the last of them

    def __len__(self) -> int:
        return len(self._flows)

    def __contains__(self, flow_id: object) -> bool:
        return flow_id in self._flows

    def wanted(self, target: str, peer: str, *, forward: str, receive: Callable[[bytes | memoryview], bool]) -> Flow:
        """A new flow at the ingress; see `Flow`."""
        state = DatagramState(secrets.token_urlsafe(16), egress=False, budget=self._principal.budget)
        return self._add(Flow(state, self, target=target, peer=peer, forward=forward, receive=receive))

    def asked(self, flow_id: str, target: str, peer: str, *, forward: str = "") -> DialledFlow:
        """A new flow at the egress, which the peer has asked for."""
        budget = self._principal.budget
        state = DatagramState(flow_id, egress=True, budget=budget)
        flow = DialledFlow(state, self, target=target, peer=peer, forward=forward, early=DatagramQueue(budget))
        self._add(flow)
        return flow

    def _add(self, flow: Flow) -> Flow:
        self._flows[flow.state.id] = flow
        flow.bind = self._bind_of(flow.forward)
        self._principal.streams += 1
        self._principal.accepted += not flow.state.egress
        return flow

    def touched(self, flow: Flow) -> None:
        """A datagram came or went."""
        flow.active = self.reactor.now
        if flow.outcome is None:
            self._flows.move_to_end(flow.state.id)

    def opened(self, flow: Flow) -> None:
        """The target's socket is there."""
        if self._may_tell():
            self._log.info("flow opened", **self._describe(flow, address=flow.address))
        else:
            self._count("opened")

    def ended(self, flow: Flow) -> None:
        """The flow is over."""
        del self._flows[flow.state.id]
        self._principal.streams -= 1
        self._principal.accepted -= not flow.state.egress
        code, message = flow.outcome or ("internal", "")
        refused = not flow.state.opened
        if not self._may_tell(refusal=refused):
            self._count("refused" if refused else "ended")
            if refused:
                self._untold_codes[code] = self._untold_codes.get(code, 0) + 1
                self._untold_refusal = logs.whither(flow.target, flow.bind)
                if flow.note:
                    self._untold_refusal["policy"] = flow.note
            return
        fields = self._describe(
            flow,
            sent=flow.state.sent, received=flow.state.received, dropped=flow.lost(),
            seconds=round(self.reactor.now - flow.created, 3), reason=code,
        )  # fmt: skip
        if message:
            fields["detail"] = message
        if flow.note:
            fields["policy"] = flow.note
        if refused:
            self._log.warning("flow refused", **fields)
        else:
            self._log.info("flow ended", **fields)

    def _may_tell(self, *, refusal: bool = False) -> bool:
        """Whether there may be a line about it, which then counts."""
        if self._lines[refusal] >= (REFUSAL_LINES if refusal else LOG_LINES):
            return False
        self._lines[refusal] += 1
        return True

    def _count(self, what: str) -> None:
        """It has no line of its own."""
        self._untold[what] = self._untold.get(what, 0) + 1

    def _tell_rest(self) -> None:
        """In one line what had none of its own, and of the refusals among it how many had which code."""
        untold, self._untold, self._lines = self._untold, {}, {False: 0, True: 0}
        codes, self._untold_codes = self._untold_codes, {}
        if not untold:
            return
        fields: dict[str, object] = dict(untold)
        if codes:
            fields["reasons"] = ", ".join(f"{code} {count}" for code, count in sorted(codes.items()))
            fields |= {f"last_{name}": value for name, value in self._untold_refusal.items()}
        say = self._log.warning if codes else self._log.info
        say("more flows than the log tells of", **fields, principal=self._principal.name, session=self._session)

    def _describe(self, flow: Flow, **fields: object) -> dict[str, object]:
        whose: dict[str, object] = {
            "flow": logs.hash_id(flow.state.id),
            **logs.whither(flow.target, flow.bind),
            **fields,
        }
        whose |= {"peer": flow.peer, "principal": self._principal.name, "session": self._session}
        if flow.application:
            whose["application"] = flow.application
        return whose

    def sweep(self, now: float) -> None:
        """Once a second: what is idle ends."""
        self._tell_rest()
        while self._flows:
            flow = next(iter(self._flows.values()))
            if now - flow.active < self.timeout:
                return
            # First, so that one whose reset is not answered stands in nobody's way.
            flow.active = now
            self._flows.move_to_end(flow.state.id)
            flow.reset("idle", f"no datagram for {self.timeout:.0f} s")

    def close(self, reason: str) -> None:
        """The session ends."""
        for flow in list(self._flows.values()):
            flow.reset("shutdown", reason)
        self.reactor.later(self._tell_rest)  # most end in this turn, with their links
