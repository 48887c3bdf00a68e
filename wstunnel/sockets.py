"""What the data path asks of a connected socket besides reading and writing."""

from __future__ import annotations

import socket
import ssl
import struct
import sys

if sys.platform == "linux":
    import fcntl
    import termios

DATAGRAMS_BYTES = 1024 * 1024
"""Receive queue of a UDP socket, for what comes while other sockets have their turn."""

_LINGER_RESET = struct.pack("ii", 1, 0)
_LINUX_SO_RCVBUFFORCE = 33  # asm-generic/socket.h; `socket` has no name for it
_LINUX_TCP_NOTSENT_LOWAT = 25  # linux/tcp.h; `socket` has the name since Python 3.12, and other systems other numbers
_INT = bytes(4)


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


def end_writing(sock: socket.socket) -> bool:
    """Say the end and go on reading: a FIN, with TLS behind a close_notify, which MUST go before it (RFC 8446 §6.1).

    Returns:
        whether TLS is over in both directions, since the peer's close_notify had come: nothing follows that it could
        read. False without TLS.

    Raises:
        OSError: the connection broke.
    """
    if not isinstance(sock, ssl.SSLSocket):
        sock.shutdown(socket.SHUT_WR)
        return False
    over = False
    try:
        sock.unwrap()
        over = True
    except ssl.SSLError:
        pass  # the peer's has not come yet, or there is no room for ours
    # SSLSocket's own method forgets the TLS state, and reading goes on.
    socket.socket.shutdown(sock, socket.SHUT_WR)
    return over


def unsent(sock: socket.socket) -> int | None:
    """Bytes in the kernel's send queue that the peer's kernel has not acknowledged, sent or not (SIOCOUTQ, tcp(7)).

    While it falls the path works, however slowly. Of a TLS socket it counts encrypted bytes, of a Unix socket the
    kernel's memory. One system call, 1.5 µs.

    Returns:
        None if it cannot be known: not on Linux, or `sock` is closed.
    """
    if sys.platform == "linux":
        try:
            # TIOCOUTQ is the same number under the name that Python has.
            return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, _INT), sys.byteorder)
        except (OSError, ValueError):  # ValueError: the descriptor is -1
            pass
    return None


def give_up_after(sock: socket.socket, seconds: float) -> None:
    """Have the kernel break the connection if sent bytes stay unacknowledged for `seconds` (TCP_USER_TIMEOUT, tcp(7)).

    The next read or write then raises TimeoutError. A peer that lives but does not read for so long is given up as
    well, so this is not for sockets of applications. Does nothing where there is no such option, nor to what is no TCP
    socket.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        milliseconds = max(1, round(seconds * 1000))  # 0 would mean the system's own, some 15 minutes
        _set_tcp(sock, socket.TCP_USER_TIMEOUT, milliseconds)


def ask_when_silent(sock: socket.socket, seconds: int) -> None:
    """Have the kernel ask the peer of a TCP connection that says nothing whether it is there (SO_KEEPALIVE, tcp(7)).

    After `seconds` of silence, and from then on as the system is set up to. Where it is not there the next read raises
    TimeoutError or ConnectionResetError. On what is no TCP socket, and of a time that the system cannot set, it does
    nothing more than SO_KEEPALIVE itself does.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    except OSError:
        return  # dead already
    if hasattr(socket, "TCP_KEEPIDLE"):
        _set_tcp(sock, socket.TCP_KEEPIDLE, seconds)


def widen(sock: socket.socket) -> None:
    """Ask for a receive queue of DATAGRAMS_BYTES (socket(7)).

    The kernel gives what net.core.rmem_max allows, which is mostly a fifth of it; to CAP_NET_ADMIN it gives all.
    """
    options = [_LINUX_SO_RCVBUFFORCE, socket.SO_RCVBUF] if sys.platform == "linux" else [socket.SO_RCVBUF]
    for option in options:
        try:
            sock.setsockopt(socket.SOL_SOCKET, option, DATAGRAMS_BYTES)
        except OSError:
            continue  # the usual one has to do
        return


def limit_unsent(sock: socket.socket, size: int) -> None:
    """Call the socket writable only while fewer than `size` bytes wait to be sent (TCP_NOTSENT_LOWAT, tcp(7)).

    So that what is urgent does not queue behind megabytes. Bytes on their way do not count. Does nothing where there is
    no such option, nor to what is no TCP socket.
    """
    default = _LINUX_TCP_NOTSENT_LOWAT if sys.platform == "linux" else None
    option: int | None = getattr(socket, "TCP_NOTSENT_LOWAT", default)
    if option is not None:
        _set_tcp(sock, option, size)


def _set_tcp(sock: socket.socket, option: int, value: int) -> None:
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        try:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        except OSError:
            pass  # not TCP, not on this kernel, or dead: nothing that depends on it is lost but time
