"""Outbound connections: to targets, under the policy, and to the tunnel server.

Several addresses are tried as Happy Eyeballs version 2 says (RFC 8305): families interleaved (§4), the next attempt
250 ms after the last or at once when one fails (§5), the first connection wins and the others are closed.

The sockets returned are plain non-blocking ones for the reactor, with Nagle's algorithm off.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import trio

from wstunnel import limits, sockets
from wstunnel.errors import LocalError, NetworkError, StreamError, UsageError
from wstunnel.policy import NameVerdict, Policy, denial
from wstunnel.targets import Target, address_family, join_host_port

STAGGER_SECONDS = 0.25
"""RFC 8305 §8: the Connection Attempt Delay should be 250 milliseconds."""
ADDRESSES = 32
"""Most addresses of one name that are tried: as many attempts as are begun in 8 s. A resolver may send thousands."""

SocketAddress = tuple[Any, ...] | str
"""(ip, port) for IPv4, (ip, port, flow, scope) for IPv6, a path for Unix sockets: as the socket module has it."""
Sources = Mapping[int, str]
"""By address family: which address of this machine connections come from. The kernel chooses where there is none."""
NO_SOURCES: Sources = {}
_LINUX_BIND_ADDRESS_NO_PORT = 24  # linux/in.h
Resolve = Callable[..., list[tuple[Any, Any, Any, Any, Any]]]
"""Called in a thread as `socket.getaddrinfo(host, port, type=SOCK_STREAM, proto=IPPROTO_TCP)`."""
Connect = Callable[[socket.AddressFamily, SocketAddress], Awaitable[socket.socket]]
"""`connect_socket`, or what a test puts in its place."""
DialServer = Callable[..., Awaitable[socket.socket]]
"""`dial_server`, or what stands in for it: called with host, port and `family=`."""

_UNIX: socket.AddressFamily | None = getattr(socket, "AF_UNIX", None)
"""Of Unix sockets; None where there are none."""
_REFUSED = frozenset(
    {
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        # of Unix sockets: no such file, no socket, one for datagrams, a backlog that is full
        errno.ENOENT,
        errno.ENOTDIR,
        errno.ENOTSOCK,
        errno.EPROTOTYPE,
        errno.EAGAIN,
    }
)
_UNREACHABLE = frozenset(
    {
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ENETDOWN,
        errno.EHOSTDOWN,
        errno.EADDRNOTAVAIL,
        errno.EAFNOSUPPORT,  # IPv6 switched off
        errno.EINVAL,  # a link-local address without a zone
        errno.EACCES,  # a `prohibit` route, or a firewall on this machine
        errno.EPERM,
    }
)
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_MOST_TELLING = ("refused", "timeout", "limit", "unreachable", "internal")
_NO_SUCH_NAME = frozenset(
    getattr(socket, name)
    for name in ("EAI_NONAME", "EAI_NODATA", "EAI_FAIL", "EAI_ADDRFAMILY", "EAI_SERVICE", "EAI_FAMILY")
    if hasattr(socket, name)
)


@dataclass(frozen=True, slots=True)
class Address:
    """One address to dial: exactly what the resolver returned, and what the policy looked at."""

    family: socket.AddressFamily
    sockaddr: SocketAddress

    def __str__(self) -> str:
        return _address_text(self.sockaddr)


def _address_text(sockaddr: SocketAddress) -> str:
    return f"unix:{sockaddr}" if isinstance(sockaddr, str) else join_host_port(sockaddr[0], sockaddr[1])


@dataclass(frozen=True, slots=True)
class Begun:
    """A connection attempt whose first system calls are made.

    Attributes:
        sock: non-blocking, with TCP_NODELAY; whoever has this owns it.
        sockaddr: where to.
        done: whether it is connected, which on this machine it is at once.
    """

    sock: socket.socket
    sockaddr: SocketAddress
    done: bool

    @property
    def address(self) -> str:
        """As `10.0.0.5:5432`, `[::1]:22` or `unix:/run/app.sock`."""
        return _address_text(self.sockaddr)

    async def connect(self, _family: socket.AddressFamily, _sockaddr: SocketAddress) -> socket.socket:
        """`connect_socket`, for whoever would begin the same attempt."""
        return await self.finish()

    async def finish(self) -> socket.socket:
        """Wait until it is connected; see `connect_socket`."""
        sock = self.sock
        try:
            if self.done:
                await trio.lowlevel.checkpoint()
            else:
                # Cancelled here, Trio has taken the socket off its selector before we close it.
                await trio.lowlevel.wait_writable(sock)
                _check_connected(sock, self.sockaddr, sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        except OSError:
            sock.close()
            raise
        except BaseException:
            sockets.reset(sock)  # it may be connected: to the target, who gave up is not who finished
            raise
        return sock


def _begin(
    family: socket.AddressFamily,
    sockaddr: SocketAddress,
    kind: socket.SocketKind = socket.SOCK_STREAM,
    sources: Sources = NO_SOURCES,
) -> Begun:
    sock = socket.socket(family, kind)
    try:
        sock.setblocking(False)
        if family in sources:
            _bind_source(sock, sources[family])
        if family != _UNIX and kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        error = sock.connect_ex(sockaddr)
        if error == errno.EINPROGRESS:
            # On loopback the answer is there by now. Asking costs 2 µs, finding out by the selector 40 µs.
            error = sock.connect_ex(sockaddr)
        done = error not in (errno.EALREADY, errno.EINPROGRESS)
        if done:
            _check_connected(sock, sockaddr, error)
    except BaseException:
        sock.close()
        raise
    return Begun(sock, sockaddr, done)


def _bind_source(sock: socket.socket, address: str) -> None:
    if sys.platform == "linux":
        # The port is chosen when the target is known, so that two targets may see the same one (ip(7)).
        sock.setsockopt(socket.IPPROTO_IP, _LINUX_BIND_ADDRESS_NO_PORT, 1)
    sock.bind((address, 0))


def source_addresses(addresses: Iterable[str]) -> Sources:
    """What `dial_target` takes as its sources, checked.

    Args:
        addresses: IP addresses of this machine without brackets, one of a family at most.

    Raises:
        LocalError: one is not this machine's.
        UsageError: there are two of a family.
    """
    sources: dict[int, str] = {}
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        if family in sources:
            raise UsageError(f"--source: {sources[family]} and {address} are of one family; give one of each")
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.bind((address, 0))
        except OSError as error:
            reason = error.strerror or error
            raise LocalError(f"--source: connections cannot come from {address}: {reason}") from error
        sources[family] = address
    return sources


def _check_connected(sock: socket.socket, sockaddr: SocketAddress, error: int) -> None:
    if error not in (0, errno.EISCONN):  # EISCONN: how BSDs say on the second call that it is connected
        raise OSError(error, os.strerror(error))
    # The kernel may pick the very port we dial as our own, and TCP then connects the socket to itself (RFC 9293 §3.5,
    # simultaneous open). Nobody listens there.
    own = sock.getsockname()
    if sock.family != _UNIX and own[1] == sockaddr[1] and own == sock.getpeername():
        raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


async def connect_socket(
    family: socket.AddressFamily, sockaddr: SocketAddress, sources: Sources = NO_SOURCES
) -> socket.socket:
    """Connect one non-blocking TCP socket, with TCP_NODELAY set, to one address.

    Returns:
        the connected socket, which the caller owns. On cancellation or failure it has been closed.

    Raises:
        OSError: it could not be connected, with the errno of connect(2) or socket(2).
    """
    try:
        begun = _begin(family, sockaddr, sources=sources)
    except OSError:
        await trio.lowlevel.checkpoint()
        raise
    return await begun.finish()


async def connect_datagrams(
    family: socket.AddressFamily, sockaddr: SocketAddress, sources: Sources = NO_SOURCES
) -> socket.socket:
    """A non-blocking UDP socket that sends to one address, and hears only from it. Asks nobody whether it is there.

    Raises:
        OSError: there is no way to it, or no descriptor left.
    """
    await trio.lowlevel.checkpoint()
    return _begin(family, sockaddr, socket.SOCK_DGRAM, sources).sock


def begin_dial(target: Target, policy: Policy, sources: Sources = NO_SOURCES) -> Begun | None:
    """Begin to connect to a target that is named by its address, without waiting: see `dial_target`.

    Returns:
        the attempt: connected, or to be handed on to `dial_target`. None when the target has a name to be resolved.

    Raises:
        StreamError: as `dial_target`.
    """
    family = _permitted_family(target, policy)
    if family is None:
        return None
    try:
        kind = socket.SOCK_DGRAM if target.kind == "udp" else socket.SOCK_STREAM
        return _begin(family, _literal(family, target.host or target.path, target.port).sockaddr, kind, sources)
    except OSError as error:
        code, message = _summary([error], None)
        raise StreamError(code, f"cannot connect to {target}: {message}") from error


async def dial_target(
    target: Target,
    policy: Policy,
    *,
    limiter: trio.CapacityLimiter | None,
    resolve: Resolve = socket.getaddrinfo,
    connect: Connect | None = None,
    sources: Sources = NO_SOURCES,
    begun: Begun | None = None,
) -> tuple[socket.socket, str]:
    """Connect to `target`, if `policy` allows it, within DIAL_SECONDS.

    A name is resolved once. Each address is checked, and the permitted ones are dialled by address, so a name that
    changes its mind in between changes nothing.

    Args:
        target: `tcp`, `unix`, or `udp`, for which the first permitted address with a route is taken.
        policy: what the principal may dial.
        limiter: bounds the threads that resolve names, one limiter a principal; None is Trio's own. A thread whose
            dial has ended keeps its place until the resolver returns.
        resolve: what resolves names, in a thread.
        connect: what connects one socket; None: `connect_socket`, or `connect_datagrams`.
        sources: where connections come from, see `source_addresses`.
        begun: what `begin_dial` said of the same target: that attempt goes on, and its socket is owned from now on.

    Returns:
        the connected non-blocking socket, which the caller owns and closes, and the address that was dialled, as
        `10.0.0.5:5432` or `[::1]:22`.

    Raises:
        StreamError: with a reset code and a message for the client. For `forbidden` the note (`__notes__`) has the
            reason in full, for the server's log only.
    """
    if begun is not None:
        connect = begun.connect
    elif connect is None:
        connect = functools.partial(connect_datagrams if target.kind == "udp" else connect_socket, sources=sources)
    family = _permitted_family(target, policy)
    failures: list[OSError] = []
    with trio.move_on_after(limits.DIAL_SECONDS) as scope:
        try:
            if family is not None and family == _UNIX:
                addresses = [_literal(family, target.path, 0)]
            else:
                addresses = await _addresses(target.host, target.port, limiter, resolve)
        except OSError as error:
            code, message = _resolve_failure(error)
            raise StreamError(code, f"{target.host}: {message}") from error
        if family is None:
            addresses = _permitted(target, policy, addresses)
        if connected := await _connect_any(addresses, connect, failures):
            return connected[0], str(connected[1])
    code, message = _summary(failures, scope)
    raise StreamError(code, f"cannot connect to {target}: {message}")


def _permitted_family(target: Target, policy: Policy) -> socket.AddressFamily | None:
    """The family of the address that names the target; None for a name, whose addresses have yet to be checked.

    Raises:
        StreamError: `forbidden`.
    """
    if target.kind == "unix" and _UNIX is None:
        raise StreamError("forbidden", "unix targets cannot be dialled here")
    if target.kind == "unix":
        if reason := policy.refusal(target, ""):
            raise _forbidden(target, reason)
        return _UNIX
    family = address_family(target.host)
    if policy.names(target) is NameVerdict.REFUSED:
        reason = f"no --allow rule matches {target}, whatever it resolves to"
        raise _forbidden(target, reason if family is None else policy.refusal(target, target.host) or reason)
    return family


async def dial_server(
    host: str,
    port: int,
    *,
    family: socket.AddressFamily | None = None,
    limiter: trio.CapacityLimiter | None = None,
    resolve: Resolve = socket.getaddrinfo,
    connect: Connect = connect_socket,
) -> socket.socket:
    """Connect to the tunnel server, or to a proxy on the way, within DIAL_SECONDS. No policy: the user named it.

    Args:
        host: a name or an IP address, without brackets.
        port: 1 to 65535.
        family: AF_INET or AF_INET6: only addresses of this family are dialled. None: of both.
        limiter: bounds the threads that resolve names; None is Trio's own.
        resolve: what resolves names, in a thread.
        connect: what connects one socket.

    Returns:
        the connected non-blocking socket, which the caller owns and closes.

    Raises:
        NetworkError: `name` if the name does not resolve, else `tcp`.
    """
    failures: list[OSError] = []
    with trio.move_on_after(limits.DIAL_SECONDS) as scope:
        addresses = await server_addresses(host, port, family=family, limiter=limiter, resolve=resolve)
        if connected := await _connect_any(addresses, connect, failures):
            return connected[0]
    raise NetworkError("tcp", f"cannot connect to {join_host_port(host, port)}: {_summary(failures, scope)[1]}")


async def server_addresses(
    host: str,
    port: int,
    *,
    family: socket.AddressFamily | None = None,
    limiter: trio.CapacityLimiter | None = None,
    resolve: Resolve = socket.getaddrinfo,
) -> list[Address]:
    """Where `dial_server` connects to, in the resolver's order. The caller sets the deadline. Arguments as there.

    Raises:
        NetworkError: `name`.
    """
    try:
        addresses = await _addresses(host, port, limiter, resolve)
    except OSError as error:
        message = _resolve_failure(error)[1]
        raise NetworkError("name", f"cannot connect to {join_host_port(host, port)}: {message}") from error
    if family is not None:
        addresses = [address for address in addresses if address.family == family]
        if not addresses:
            kind = "IPv4" if family == socket.AF_INET else "IPv6"
            raise NetworkError("name", f"cannot connect to {join_host_port(host, port)}: it has no {kind} address")
    return addresses


def is_local_address(ip: str) -> bool:
    """Whether this machine would take a connection to `ip` itself: the predicate that a `Policy` wants.

    The routing table is asked, which also knows secondary addresses and whole local networks (`ip route add local`).
    Where it cannot be asked the answer is that of bind(2). When in doubt it is yes. `ip` is without brackets or zone.
    """
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:
        return _route_is_local(family, socket.inet_pton(family, ip))
    except OSError:
        pass  # not Linux, or the service may not use AF_NETLINK
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((ip, 0))
    except OSError as error:
        return error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    return True


def _route_is_local(family: socket.AddressFamily, packed: bytes) -> bool:
    """Ask rtnetlink(7) for the route to an address: is its type RTN_LOCAL?"""
    if not hasattr(socket, "AF_NETLINK"):
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
    get_route, new_route, request, destination, local = 26, 24, 1, 1, 2
    body = struct.pack("=8BI", family, len(packed) * 8, 0, 0, 0, 0, 0, 0, 0)
    body += struct.pack("=HH", 4 + len(packed), destination) + packed
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        netlink.setblocking(False)  # the kernel answers within send(2)
        netlink.send(struct.pack("=IHHII", 16 + len(body), get_route, request, 1, 0) + body)
        answer = netlink.recv(4096)
    kind = struct.unpack_from("=H", answer, 4)[0]
    return kind == new_route and answer[16 + 7] == local


async def _addresses(host: str, port: int, limiter: trio.CapacityLimiter | None, resolve: Resolve) -> list[Address]:
    """The addresses of a host, each once, in the resolver's order (RFC 6724). A literal needs no resolver.

    Raises:
        OSError: it did not resolve; socket.gaierror is the usual one.
    """
    if (family := address_family(host)) is not None:
        return [_literal(family, host, port)]
    ask = functools.partial(resolve, host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    try:
        answers = await trio.to_thread.run_sync(ask, limiter=limiter, abandon_on_cancel=True)
    except UnicodeError:  # the socket module's own IDNA step
        raise socket.gaierror(socket.EAI_NONAME, "not a valid name") from None
    except RuntimeError as error:  # "can't start new thread"
        raise OSError(errno.ENOMEM, str(error)) from error
    families = (socket.AF_INET, socket.AF_INET6)
    found = [Address(socket.AddressFamily(answer[0]), answer[4]) for answer in answers if answer[0] in families]
    if not found:
        raise socket.gaierror(socket.EAI_NONAME, "no addresses")
    return list(dict.fromkeys(found))


def _literal(family: socket.AddressFamily, host: str, port: int) -> Address:
    if family == _UNIX:
        return Address(family, host)
    return Address(family, (host, port) if family == socket.AF_INET else (host, port, 0, 0))


def _permitted(target: Target, policy: Policy, addresses: Sequence[Address]) -> list[Address]:
    """Those that the policy permits.

    Raises:
        StreamError: `forbidden`, if there is none.
    """
    permitted, reasons = [], []
    for address in addresses:
        reason = policy.refusal(target, address.sockaddr[0])
        if reason is None:
            permitted.append(address)
        else:
            reasons.append(reason)
    if not permitted:
        raise _forbidden(target, "; ".join(reasons[:4]))
    return permitted


def _forbidden(target: Target, reason: str) -> StreamError:
    error = StreamError("forbidden", denial(target))
    error.add_note(reason)
    return error


async def _connect_any(
    addresses: Sequence[Address], connect: Connect, failures: list[OSError]
) -> tuple[socket.socket, Address] | None:
    """The first connection that is made; None if none is. Why not is appended to `failures` as it becomes known."""
    if len(addresses) > 1:
        return await _race(_interleaved(addresses)[:ADDRESSES], connect, failures)
    try:
        return await connect(addresses[0].family, addresses[0].sockaddr), addresses[0]
    except OSError as error:
        failures.append(error)
        return None


def _interleaved(addresses: Sequence[Address]) -> list[Address]:
    """RFC 8305 §4: families take turns, the resolver's first choice first."""
    preferred = [address for address in addresses if address.family == addresses[0].family]
    other = [address for address in addresses if address.family != addresses[0].family]
    return [address for pair in zip_longest(preferred, other) for address in pair if address is not None]


async def _race(
    addresses: Sequence[Address], connect: Connect, failures: list[OSError]
) -> tuple[socket.socket, Address] | None:
    winner: tuple[socket.socket, Address] | None = None
    failed = trio.Event()

    async def attempt(address: Address) -> None:
        nonlocal winner
        try:
            sock = await connect(address.family, address.sockaddr)
        except OSError as error:
            failures.append(error)
            failed.set()
            return
        if winner is None:
            winner = sock, address
            nursery.cancel_scope.cancel()
        else:
            sock.close()

    try:
        async with trio.open_nursery() as nursery:
            for address in addresses:
                failed = trio.Event()
                nursery.start_soon(attempt, address)
                with trio.move_on_after(STAGGER_SECONDS):
                    await failed.wait()
    except BaseException:
        # Cancelled from outside between the victory and the end of the losers.
        if winner is not None:
            sockets.reset(winner[0])
        raise
    return winner


def _resolve_failure(error: OSError) -> tuple[str, str]:
    """Reset code and reason for a name that did not resolve."""
    if isinstance(error, socket.gaierror):
        if error.errno == socket.EAI_AGAIN:
            return "name-not-found", "temporary failure in name resolution"
        if error.errno in _NO_SUCH_NAME:
            return "name-not-found", "no such name, or it has no address"
        return "internal", f"name resolution failed ({_reason(error)})"
    return _code(error), f"name resolution failed ({_reason(error)})"


def _code(error: OSError) -> str:
    """The reset code for an errno of socket(2), connect(2) or SO_ERROR."""
    if error.errno in _REFUSED:
        return "refused"
    if error.errno == errno.ETIMEDOUT:
        return "timeout"
    if error.errno in _UNREACHABLE:
        return "unreachable"
    return "limit" if error.errno in _OUT_OF_RESOURCES else "internal"


def _reason(error: OSError) -> str:
    text = error.strerror or "unknown error"
    return text[0].lower() + text[1:]


def _summary(failures: Iterable[OSError], scope: trio.CancelScope | None) -> tuple[str, str]:
    """The most telling code of all failures, and their distinct reasons, that one first."""
    everything = list(failures)
    if scope is not None and scope.cancelled_caught:
        everything.append(OSError(errno.ETIMEDOUT, f"no answer within {limits.DIAL_SECONDS:g} seconds"))
    everything.sort(key=lambda error: _MOST_TELLING.index(_code(error)))
    return _code(everything[0]), "; ".join(dict.fromkeys(map(_reason, everything)))
