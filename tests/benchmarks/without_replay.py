"""`python -m tests.benchmarks.without_replay ARGUMENTS…`: wstunnel as it would be if no stream outlived its link.

What was sent is forgotten at once, and what a link takes whole is never copied. Nothing else differs. Of no use but to
be compared with the real one: a link that is lost loses its streams.
"""

from __future__ import annotations

import sys
from typing import Any

from wstunnel.cli import main
from wstunnel.stream import Stream
from wstunnel.wire import messages, protocol
from wstunnel.wire.buffer import OffsetBuffer
from wstunnel.wire.directions import Outbound


class _Queue(OffsetBuffer):
    """Holds bytes only until they are on the link. `start` goes on saying what the peer has acked."""

    __slots__ = ("_direct", "_sent")

    def __init__(self) -> None:
        super().__init__()
        self._sent = 0
        self._direct: memoryview | None = None

    def append(self, data: bytes | bytearray | memoryview) -> None:
        if self._sent == self.end and isinstance(data, memoryview):
            self._blocks.clear()
            self._direct = data  # still in the scratch buffer; `keep` saves what the link did not take
            self.end += len(data)
        else:
            self.keep()
            self._copy(data)

    def adopt(self, data: memoryview) -> memoryview:
        self.append(data)
        return memoryview(data.obj)

    def keep(self) -> None:
        direct, self._direct = self._direct, None
        if direct is not None and self._sent < self.end:
            rest = direct[len(direct) - (self.end - self._sent) :]
            self.end = self._sent
            self._copy(rest)

    def _copy(self, data: bytes | bytearray | memoryview) -> None:
        acked, self.start = self.start, self._sent  # blocks begin with what was not sent
        super().append(data)
        self.start = acked

    def view(self, offset: int, limit: int) -> memoryview:
        direct = self._direct
        if direct is not None:
            begin = len(direct) - (self.end - offset)
            view = direct[begin : begin + limit]
        else:
            acked = self.start
            super().release(offset)
            self.start = acked
            view = super().view(offset, limit)
        self._sent = offset + len(view)
        return view

    def release(self, offset: int) -> None:
        self.start = offset
        if self._sent == self.end:
            self._blocks.clear()


class _Outbound(Outbound):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.replay = _Queue()


def _without_replay() -> None:
    setattr(protocol, "Outbound", _Outbound)  # noqa: B010  # a type checker would not allow the plain assignment
    messages.FEATURES = ("drain",)
    read = Stream.on_readable

    def on_readable(self: Stream) -> None:
        read(self)
        self.outbound.replay.keep()  # type: ignore[attr-defined]

    Stream.on_readable = on_readable  # type: ignore[method-assign]


if __name__ == "__main__":
    _without_replay()
    main(sys.argv[1:])
