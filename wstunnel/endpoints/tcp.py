"""Listeners: bind TCP ports, and accept on the reactor, from whatever socket listens."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable

from wstunnel import logs
from wstunnel.errors import LocalError
from wstunnel.reactor import READ, Handler, Reactor
from wstunnel.targets import join_host_port

_log = logs.logger("tcp")

BACKLOG = 1024
"""Connections that the kernel completes before we accept them."""
BATCH = 64
"""Accepts before other sockets have their turn."""
RETRY_SECONDS = 0.1
_RETRY = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def bind(address: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """Bind a non-blocking socket. It listens once `activate` was called.

    Args:
        address: an IP address without brackets; `::` binds IPv6 only.
        port: 0 picks one.
        kind: SOCK_DGRAM binds a UDP socket.

    Returns:
        the bound socket, which the caller closes.

    Raises:
        LocalError: in use, not permitted, or not an address of this machine.
        OSError: EAFNOSUPPORT when the machine has no IPv6 (or IPv4).
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, kind)
    try:
        sock.setblocking(False)
        if os.name == "posix" and kind == socket.SOCK_STREAM:  # on UDP it would let two programs share the port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
    except OSError as error:
        sock.close()
        where = join_host_port(address, port)
        if error.errno == errno.EAFNOSUPPORT:
            raise
        if error.errno == errno.EADDRINUSE:
            raise _in_use(where, kind) from error
        if error.errno == errno.EACCES:
            raise LocalError(
                f"cannot listen on {where}: no permission for ports below 1024; run as root, with the capability"
                " CAP_NET_BIND_SERVICE (the systemd unit does), or choose another port"
            ) from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise LocalError(f"cannot listen on {where}: this machine has no such address") from error
        raise LocalError(f"cannot listen on {where}: {error.strerror}") from error
    return sock


def bind_all(
    addresses: tuple[str, ...], port: int, *, lenient: bool, kind: socket.SocketKind = socket.SOCK_STREAM
) -> list[socket.socket]:
    """Bind every address, with the same port when 0 picks one.

    Args:
        addresses: IP addresses without brackets.
        port: 0 picks one.
        lenient: nobody named these addresses one by one (`*`, `localhost`): one that the machine lacks is left out.
        kind: as in `bind`.

    Raises:
        LocalError: one of them cannot be bound; none is left open.
    """
    bound: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for address in addresses:
            try:
                sock = bind(address, port, kind)
            except OSError as error:
                missing = error
                if not lenient:
                    break
                continue
            except LocalError as error:
                cause = error.__cause__
                if lenient and isinstance(cause, OSError) and cause.errno == errno.EADDRNOTAVAIL:
                    missing = cause  # `::` or `::1` where IPv6 is disabled by sysctl
                    continue
                raise
            bound.append(sock)
            port = sock.getsockname()[1]
    except BaseException:
        for sock in bound:
            sock.close()
        raise
    if not bound or (missing is not None and not lenient):
        for sock in bound:
            sock.close()
        assert missing is not None
        raise LocalError(f"cannot listen on {', '.join(addresses)}: {missing.strerror}") from missing
    return bound


def activate(listener: socket.socket) -> None:
    """Start to listen.

    Raises:
        LocalError: another process listens there since we bound it.
    """
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise _in_use(local_name(listener)) from error


def _in_use(where: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> LocalError:
    tool = "ss -ltnp" if kind == socket.SOCK_STREAM else "ss -lunp"
    return LocalError(f"cannot listen on {where}: the port is in use; stop what uses it ({tool}) or choose another")


def peer_name(sock: socket.socket) -> str:
    """The other end as `192.0.2.1:5000`, `[2001:db8::1]:5000` or `unix:uid=1000,pid=4711`; empty once it is gone."""
    try:
        address = sock.getpeername()
        if isinstance(address, str | bytes):
            return _unix_peer(sock)
    except OSError:
        return ""
    return join_host_port(address[0], address[1])


def _unix_peer(sock: socket.socket) -> str:
    if not hasattr(socket, "SO_PEERCRED"):
        return "unix:"
    pid, uid, _gid = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return f"unix:uid={uid},pid={pid}"


def local_name(sock: socket.socket) -> str:
    """This end's address: host and port, or a Unix socket's path."""
    address = sock.getsockname()
    if isinstance(address, str | bytes):
        return os.fsdecode(address)
    return join_host_port(address[0], address[1])


class Listener(Handler):
    """Accepts on the reactor, until it is dropped, which closes the listener.

    Args:
        listener: active; the reactor's from `start` on.
        accepted: called with each connection (non-blocking, Nagle off), which it owns; it must not wait.
        exhausted: called when no descriptor is left, before the next attempt: it may give some back.
    """

    __slots__ = ("_accepted", "_exhausted", "_is_tcp", "_listener", "_told")

    def __init__(
        self,
        listener: socket.socket,
        accepted: Callable[[socket.socket], None],
        exhausted: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._listener = listener
        self._accepted = accepted
        self._exhausted = exhausted
        self._is_tcp = listener.family in (socket.AF_INET, socket.AF_INET6)
        self._told = False

    def start(self, reactor: Reactor) -> None:
        """Accept from now on.

        Raises:
            LocalError: the reactor cannot watch it; it is closed.
        """
        try:
            reactor.adopt(self, self._listener, look=False)
        except LocalError:
            self._listener.close()
            raise

    def on_readable(self) -> None:
        listener = self.sock
        assert listener is not None
        for _ in range(BATCH):
            try:
                sock, _address = listener.accept()
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                if error.errno in _RETRY:
                    self._pause(error)
                    return
                continue  # it was aborted before we got to it (accept(2)): nobody is waiting
            try:
                sock.setblocking(False)
                if self._is_tcp:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError:
                sock.close()  # macOS says EINVAL when the peer has gone already
                continue
            try:
                self._accepted(sock)
            except Exception:
                # That connection only: the next one has not done anything wrong. It is not ours to close: somebody may
                # have taken it over before the fault.
                _log.exception("fault in our own code", address=local_name(listener))
        self._told = False

    def _pause(self, error: OSError) -> None:
        """The connection stays in the backlog; somebody must close a descriptor first."""
        assert self.sock is not None
        if not self._told:
            _log.warning("cannot accept connections", address=local_name(self.sock), reason=error.strerror)
            self._told = True
        self.reactor.want(self, 0)
        self.reactor.at(self.reactor.now + RETRY_SECONDS, self._again)
        self._exhausted()

    def _again(self) -> None:
        self.reactor.want(self, READ)

    def on_writable(self) -> None:
        """Never: nothing is written to a listener."""

    def on_hangup(self) -> None:
        """Never: a listener that pauses is not connected to anything."""

    def fail(self, error: Exception) -> None:
        _log.error("accepting has failed", reason=f"{type(error).__name__}: {error}")
