"""One datagram flow at one end, without its socket: what waits to go out, and the message that is arriving.

A flow has no offsets, no credit and no memory of what it sent: a datagram that does not fit is lost, as in any network.
"""

from __future__ import annotations

from collections import deque

from wstunnel.errors import ProtocolError
from wstunnel.limits import DATAGRAM_BYTES, DATAGRAM_QUEUE_BYTES
from wstunnel.wire.credit import Budget

HEADER_BYTES = 28
"""What a datagram in a queue counts for besides its payload, as its headers of IPv4 and UDP would: empty ones count."""


class DatagramQueue:
    """Datagrams that wait, at most DATAGRAM_QUEUE_BYTES of them: the oldest goes first, for it is worth least.

    Args:
        budget: what the flow's principal holds.

    Attributes:
        dropped: datagrams that were lost here.
    """

    __slots__ = ("_budget", "_held", "_waiting", "dropped")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._waiting: deque[bytes] = deque()
        self._held = 0
        self.dropped = 0

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def push(self, datagram: bytes) -> None:
        """Add one. It is lost itself where the budget has no room for it, or if it is longer than any may be."""
        size = len(datagram) + HEADER_BYTES
        if len(datagram) > DATAGRAM_BYTES:
            self.dropped += 1  # over IPv6 there are longer ones, which the peer would refuse together with the link
            return
        while self._held + size > DATAGRAM_QUEUE_BYTES:
            self.pop()
            self.dropped += 1
        if size > self._budget.room():
            self.dropped += 1
            return
        self._budget.charge(size)
        self._held += size
        self._waiting.append(datagram)

    def pop(self) -> bytes:
        """Take the oldest. There must be one."""
        datagram = self._waiting.popleft()
        size = len(datagram) + HEADER_BYTES
        self._held -= size
        self._budget.charge(-size)
        return datagram

    def clear(self) -> None:
        """Drop all and give their memory back."""
        self.dropped += len(self._waiting)
        self._waiting.clear()
        self._budget.charge(-self._held)
        self._held = 0


class DatagramState:
    """One datagram flow at one end.

    Args:
        flow_id: 22 base64url characters.
        egress: whether this end sends to the target.
        budget: what the flow's principal holds.

    Attributes:
        queue: for the peer.
        opened: the target's socket is there (at the ingress: and `opened` came).
        reset_wanted: the reset to send once the queue is on the link.
        sent: datagrams that went onto the link.
        received: datagrams that came from it.
        dropped: datagrams that came in pieces, for which there was no room.
    """

    __slots__ = (
        "_arriving", "_arriving_bytes", "_budget", "dropped", "egress", "id", "opened", "queue", "received",
        "reset_wanted", "sent",
    )  # fmt: skip

    def __init__(self, flow_id: str, *, egress: bool, budget: Budget) -> None:
        self.id = flow_id
        self.egress = egress
        self.queue = DatagramQueue(budget)
        self.opened = False
        self.reset_wanted: tuple[str, str] | None = None
        self.sent = 0
        self.received = 0
        self.dropped = 0
        self._budget = budget
        self._arriving: bytearray | None = None
        self._arriving_bytes = 0  # more than are in `_arriving`: there was no room for all

    def arrived(self, payload: bytes | memoryview, last: bool) -> bytes | memoryview | None:
        """Part of a binary message came, perhaps all of it.

        Returns:
            the datagram, once it is whole; it may be a view into what `payload` is a view of. None also if it is lost,
            since the budget had no room for its parts.

        Raises:
            ProtocolError: more than a datagram may have, close code 1009.
        """
        size = self._arriving_bytes + len(payload)
        if size > DATAGRAM_BYTES:
            # RFC 6455 §7.4.1: 1009 is for "a message that is too big for it to process".
            raise ProtocolError(f"datagram of more than {DATAGRAM_BYTES} bytes", 1009)
        arriving = self._arriving
        if arriving is None:
            if last:
                self.received += 1
                return payload
            arriving = self._arriving = bytearray()
        if len(payload) <= self._budget.room():
            self._budget.charge(len(payload))
            arriving += payload
        self._arriving_bytes = size
        if not last:
            return None
        self.received += 1
        self._forget_parts()
        if len(arriving) < size:
            self.dropped += 1
            return None
        return bytes(arriving)

    def _forget_parts(self) -> None:
        if self._arriving is not None:
            self._budget.charge(-len(self._arriving))
        self._arriving = None
        self._arriving_bytes = 0

    def discard(self) -> None:
        """Give back all memory: the flow is over."""
        self.queue.clear()
        self._forget_parts()
