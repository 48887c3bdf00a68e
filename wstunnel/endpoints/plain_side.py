"""What the two sides of a plain endpoint's connection have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wstunnel import limits
from wstunnel.reactor import Handler

if TYPE_CHECKING:
    from wstunnel.endpoints.plain import PlainConnection

QUEUE_BYTES = 256 * limits.KIB
"""Held at most for either side, and one read more; then the other side is not read."""


class Side(Handler):
    """A handler whose callbacks all end in the same way: the connection looks what may go on, and whether it is over.

    Subclasses write `read`, `write` and `hung_up`, which are as the callbacks of `Handler`.
    """

    __slots__ = ("connection",)

    def __init__(self, connection: PlainConnection) -> None:
        super().__init__()
        self.connection = connection

    def on_readable(self) -> None:
        self.read()
        self._done()

    def on_writable(self) -> None:
        self.write()
        self._done()

    def on_hangup(self) -> None:
        self.hung_up()
        self._done()

    def read(self) -> None:
        raise NotImplementedError

    def write(self) -> None:
        raise NotImplementedError

    def hung_up(self) -> None:
        raise NotImplementedError

    def _done(self) -> None:
        self.connection.refresh()
        self.connection.check_over()

    def fail(self, error: Exception) -> None:
        self.connection.fault(error)
