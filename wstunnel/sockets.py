"""What the data path asks of a connected socket besides reading and writing."""

from __future__ import annotations

import socket
import struct

_LINGER_RESET = struct.pack("ii", 1, 0)


def reset_on_close(sock: socket.socket) -> None:
    """Have close() send a TCP reset: SO_LINGER on, with no time (socket(7))."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
    except OSError:
        pass  # already dead


def reset(sock: socket.socket) -> None:
    """Close a connection with a TCP reset, so that its other end does not take it for an orderly end."""
    reset_on_close(sock)
    sock.close()
