"""Hosts as proxies' protocols carry them, and back: packed addresses, and texts whose only other form is a name.

Canonical texts are those of `targets.py`: names in lower case, IPv6 compressed as `inet_ntop` writes it, no brackets.
"""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

REMEMBERED = 1024
"""Addresses whose other form is remembered: `ipaddress` takes 10 µs for one, and UDP asks for each datagram."""

IPV4_BYTES = 4
IPV6_BYTES = 16
PORT_MAX = 65535
NAME_CHARACTERS = 253
"""RFC 1035 §2.3.4 allows 255 octets on the wire, which is 253 characters without the final dot."""

_NAME = re.compile(r"(?:[a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}\.?")  # RFC 1035 §2.3.4: labels of 63 octets or less
_MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291 §2.5.5.2
_MAPPED_NETWORK = IPv6Network((_MAPPED + bytes(4), 96))
_COMPATIBLE = bytes(12)  # RFC 4291 §2.5.5.1


def unmapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """IPv4-mapped addresses (RFC 4291 §2.5.5.2) are IPv4: the kernel sends IPv4 packets for them."""
    return address if isinstance(address, IPv4Address) else address.ipv4_mapped or address


def unmapped_network(network: IPv4Network | IPv6Network) -> IPv4Network | IPv6Network:
    """A network of IPv4-mapped addresses is one of IPv4."""
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED_NETWORK):
        return IPv4Network((int(network.network_address) & 0xFFFFFFFF, network.prefixlen - 96))
    return network


@lru_cache(REMEMBERED)
def unpack_address(packed: bytes) -> str:
    """The text of an address of 4 or 16 bytes, as `inet_ntop` writes it.

    Python's own text of IPv6 differs between its versions where an IPv4 address is inside.
    """
    if len(packed) == IPV4_BYTES:
        return "{}.{}.{}.{}".format(*packed)
    inside = "{}.{}.{}.{}".format(*packed[12:])
    if packed.startswith(_MAPPED):
        return f"::ffff:{inside}"
    if packed.startswith(_COMPATIBLE) and packed[12:14] != b"\0\0":
        return f"::{inside}"
    return str(IPv6Address(packed))


def url_address(packed: bytes) -> str:
    """The text of an IPv6 address of 16 bytes as the URL Standard serialises it, and so browsers: all in hex.

    `inet_ntop` writes an IPv4 address inside with dots, and newer versions of Python do so for mapped ones.
    """
    if packed.startswith(_MAPPED):
        return f"::ffff:{packed[12] << 8 | packed[13]:x}:{packed[14] << 8 | packed[15]:x}"
    return str(IPv6Address(packed))


@lru_cache(REMEMBERED)
def pack_address(host: str) -> bytes | None:
    """The 4 or 16 bytes of an IP address without brackets; `None` for anything else, names and zone ids included."""
    if "%" in host:
        return None
    try:
        return (IPv6Address(host) if ":" in host else IPv4Address(host)).packed
    except ValueError:
        return None


def parse_host(text: str) -> str | None:
    """The canonical form of a name or an address that came as text; `None` if it is neither.

    Args:
        text: an IPv6 address has its brackets or has none, since clients do both where only a name is expected.
            International names are A-labels already: no client of these protocols sends anything else.
    """
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if ":" in bare or bare != text:
        packed = pack_address(bare) if ":" in bare else None
        return None if packed is None else unpack_address(packed)
    name = text.lower()
    # Upper-case letters outside ASCII become ASCII ones: the Kelvin sign is a k.
    if not text.isascii() or not _NAME.fullmatch(name) or len(name.removesuffix(".")) > NAME_CHARACTERS:
        return None
    return name
