"""Options of connected sockets."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from tests.roles import tcp_pair
from wstunnel import sockets


class TestReset:
    def test_reset_is_no_orderly_end(self) -> None:
        one, two = tcp_pair()
        sockets.reset(one)
        assert one.fileno() == -1
        two.setblocking(True)
        with pytest.raises(ConnectionResetError):
            two.recv(1)
        two.close()

    def test_a_dead_socket_is_closed_all_the_same(self) -> None:
        class Dead:
            closed = False

            def setsockopt(self, *_: object) -> None:
                raise OSError(errno.EINVAL, "Invalid argument")

            def close(self) -> None:
                self.closed = True

        dead: Any = Dead()
        sockets.reset(dead)
        assert dead.closed
