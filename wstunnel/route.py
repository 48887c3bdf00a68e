"""Which way packets to an address would leave this machine, as the kernel's routing table says. Nothing is sent."""

from __future__ import annotations

import errno
import os
import socket
import struct
from dataclasses import dataclass
from typing import Final

_GET_ROUTE, _NEW_ROUTE = 26, 24  # rtnetlink(7): RTM_GETROUTE, RTM_NEWROUTE
_REQUEST: Final = 1  # NLM_F_REQUEST
_DESTINATION, _INTERFACE, _GATEWAY, _LOCAL = 1, 4, 5, 7  # RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PREFSRC
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_ROUTE_BYTES: Final = 12
_ANSWER_BYTES: Final = 8192
_PROBE_PORT: Final = 9  # discard; a UDP socket that is connected sends nothing


@dataclass(frozen=True, slots=True)
class Route:
    """A way out.

    Args:
        local: this machine's address on it.
        interface: such as `eth0`; None where the system does not tell.
        gateway: the next machine; None if the address is reached directly, or the system does not tell.
    """

    local: str
    interface: str | None = None
    gateway: str | None = None


def route_to(ip: str) -> Route:
    """The route that the kernel would take now.

    Args:
        ip: an IPv4 or IPv6 address without brackets, perhaps with a zone.

    Raises:
        OSError: there is none; with the kernel's errno.
    """
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((ip, _PROBE_PORT))
        local = str(probe.getsockname()[0])
    interface = gateway = None
    try:
        attributes = _ask(family, socket.inet_pton(family, ip.partition("%")[0]))
    except OSError:
        return Route(local)  # not Linux, or netlink is forbidden here; a zone may be needed, too
    if _INTERFACE in attributes:
        try:
            interface = socket.if_indextoname(struct.unpack("=I", attributes[_INTERFACE][:4])[0])
        except (OSError, struct.error):
            pass  # it went away in between
    if _GATEWAY in attributes:
        try:
            gateway = socket.inet_ntop(family, attributes[_GATEWAY])
        except ValueError:
            pass  # of the other family, as some routers do it
    return Route(local, interface, gateway)


def _ask(family: socket.AddressFamily, packed: bytes) -> dict[int, bytes]:
    """The attributes of rtnetlink's answer, by their kind."""
    if not hasattr(socket, "AF_NETLINK"):
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
    body = struct.pack("=8BI", family, len(packed) * 8, 0, 0, 0, 0, 0, 0, 0)
    body += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(packed), _DESTINATION) + packed
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        netlink.setblocking(False)  # the kernel answers within send(2)
        netlink.send(_HEADER.pack(_HEADER.size + len(body), _GET_ROUTE, _REQUEST, 1, 0) + body)
        answer = netlink.recv(_ANSWER_BYTES)
    size, kind = _HEADER.unpack_from(answer)[:2]
    if kind != _NEW_ROUTE:
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
    found: dict[int, bytes] = {}
    at = _HEADER.size + _ROUTE_BYTES
    while at + _ATTRIBUTE.size <= min(size, len(answer)):
        length, name = _ATTRIBUTE.unpack_from(answer, at)
        if length < _ATTRIBUTE.size:
            break
        found[name] = answer[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3  # NLMSG_ALIGN
    return found
