"""What the egress dials, and the grammar that hosts and ports share.

    TARGET = [tcp:]HOST:PORT | udp:HOST:PORT | unix:/PATH

    db:5432                tcp:db:5432
    tcp:[::1]:22           IPv6 goes in brackets
    udp:9.9.9.9:53
    unix:/run/app.sock

The last colon splits host from port. A leading `tcp:`, `udp:` or `unix:` is always the kind, so a machine that is
called `tcp` is written `tcp:tcp:22`. Targets also arrive from the peer: parsing is strict and bounded.

Hosts that only the resolver takes for numbers (`127.1`, `0x7f.1`, `2130706433`) stay names here. getaddrinfo turns them
into addresses, and it is the resolved address that the policy checks.
"""

from __future__ import annotations

import functools
import re
import socket
from dataclasses import dataclass
from typing import Literal

from wstunnel.errors import UsageError

TEXT_CHARACTERS = 1024
"""Longest text that is parsed. The longest name is 253 bytes and the longest socket path 107."""
NAME_CHARACTERS = 253
"""RFC 1035 §2.3.4 allows 255 octets on the wire, which is 253 characters without the final dot."""
LABEL_CHARACTERS = 63
"""RFC 1035 §2.3.4."""
UNIX_PATH_BYTES = 107
"""`sun_path` of Linux holds 108 bytes with the final NUL."""

GRAMMAR = "[tcp:]HOST:PORT, udp:HOST:PORT or unix:/PATH, with IPv6 in brackets: db:5432, [::1]:22"

_NOT_IN_A_NAME = re.compile(r"(?![A-Za-z0-9._-])[\x00-\x7f]")  # as a negated class it takes 8 ms to compile
_PORT = re.compile(r"[1-9][0-9]{0,4}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Target:
    """What the egress dials. Made by `parse_target`, which has checked every field.

    Attributes:
        kind: the transport.
        host: a lower-case ASCII name, or an IP address in its usual form without brackets; empty for `unix`.
        port: 1 to 65535; 0 for `unix`.
        path: an absolute path; empty unless `unix`.
    """

    kind: Literal["tcp", "udp", "unix"]
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        """The canonical form, which `parse_target` reads back to an equal target."""
        if self.kind == "unix":
            return f"unix:{self.path}"
        return f"{self.kind}:{join_host_port(self.host, self.port)}"


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a text that knows where it stands, so that an error can point at it."""

    text: str
    start: int
    stop: int
    grammar: str

    @classmethod
    def whole(cls, text: str, grammar: str) -> Part:
        """The whole of `text`, checked for its length.

        Raises:
            UsageError: `text` is longer than TEXT_CHARACTERS.
        """
        if len(text) > TEXT_CHARACTERS:
            raise UsageError(f"too long: {len(text)} characters, at most {TEXT_CHARACTERS}", grammar=grammar)
        return cls(text, 0, len(text), grammar)

    @property
    def value(self) -> str:
        """The characters of this part."""
        return self.text[self.start : self.stop]

    def cut(self, start: int, stop: int | None = None) -> Part:
        """The part from `start` to `stop` (its end if None), both counted from the start of this one."""
        return Part(self.text, self.start + start, self.stop if stop is None else self.start + stop, self.grammar)

    def error(self, message: str, offset: int = 0) -> UsageError:
        """An error that points `offset` characters into this part. The caller raises it."""
        return UsageError(message, text=self.text, position=self.start + offset, grammar=self.grammar)


@functools.lru_cache(maxsize=1024)  # the streams of a forward all name the same
def parse_target(text: str) -> Target:
    """Read a TARGET, from the command line or from the peer.

    Raises:
        UsageError: it does not follow the grammar; `position` points at the part at fault.
    """
    part = Part.whole(text, GRAMMAR)
    kind: Literal["tcp", "udp"] = "tcp"
    if text.startswith("unix:"):
        return Target("unix", "", 0, parse_unix_path(part.cut(5)))
    if text.startswith("udp:"):
        kind, part = "udp", part.cut(4)
    elif text.startswith("tcp:"):
        part = part.cut(4)
    host, port = split_host_port(part)
    if port is None:
        raise part.error("the port is missing" if part.value else "the host and the port are missing", len(part.value))
    return Target(kind, parse_host(host), parse_port(port), "")


def parse_host_port(text: str, *, default_port: int | None = None) -> tuple[str, int]:
    """Read `HOST:PORT`, or `HOST[:PORT]` where there is a default port.

    Returns:
        the host as in `Target.host` (no brackets) and the port.

    Raises:
        UsageError: it does not follow the grammar, or the port is missing and has no default.
    """
    part = Part.whole(text, "HOST:PORT" if default_port is None else "HOST[:PORT]")
    host, port = split_host_port(part)
    if port is not None:
        return parse_host(host), parse_port(port)
    if default_port is None:
        raise part.error("the port is missing", len(text))
    return parse_host(host), default_port


def join_host_port(host: str, port: int | str) -> str:
    """`host:port`, with brackets round an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_family(host: str) -> socket.AddressFamily | None:
    """The family of an IP address in its usual form without brackets; None for anything else, names included."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.inet_pton(family, host)
    except (OSError, ValueError):  # ValueError: a NUL or a surrogate inside
        return None
    return family


def split_host_port(part: Part) -> tuple[Part, Part | None]:
    """Split at the last colon, or at the one after a closing bracket. No colon: no port.

    Raises:
        UsageError: a bracket is not closed, or something other than a colon follows it; or it is a URL.
    """
    value = part.value
    url = value.find("://")
    if value.startswith("//") or url >= 0:
        raise part.error("this is not a URL: leave out '//' and what belongs to it", max(url + 1, 0))
    if value.startswith("["):
        after = value.find("]") + 1
        if not after:
            raise part.error("the bracket is not closed")
        if after == len(value):
            return part, None
        if value[after] != ":":
            raise part.error("after the bracket comes ':' and the port", after)
        return part.cut(0, after), part.cut(after + 1)
    colon = value.rfind(":")
    return (part, None) if colon < 0 else (part.cut(0, colon), part.cut(colon + 1))


def parse_host(part: Part) -> str:
    """Read one HOST: a name, an IPv4 address, or an IPv6 address in brackets.

    Returns:
        the canonical form: names in lower case and as A-labels (RFC 5890 §2.3.2.1), IPv6 compressed, no brackets.

    Raises:
        UsageError: it is none of these.
    """
    value = part.value
    if not value:
        raise part.error("the host is missing")
    if value.startswith("["):
        if not value.endswith("]"):
            raise part.error("the bracket is not closed")
        return parse_ipv6(part.cut(1, len(value) - 1))
    if ":" in value:
        # The last group may have been taken for a port, so the test is whether it makes an address with another one.
        if address_family(value) or address_family(value.partition("%")[0] + ":1"):
            raise part.error("an IPv6 address goes in brackets")
        raise part.error("a colon too many: a host has none, and an IPv6 address goes in brackets", value.index(":"))
    return _parse_name(part)


def parse_ipv6(part: Part) -> str:
    """Read an IPv6 address that stands without brackets here; the canonical form.

    Raises:
        UsageError: it is no IPv6 address, or has a zone id (`%eth0`): a zone has a meaning on one machine only.
    """
    value = part.value
    if "%" in value:
        raise part.error("an address with a zone id cannot be used here", value.index("%"))
    if ":" not in value or address_family(value) is None:
        raise part.error("not an IPv6 address")
    return socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, value))


def parse_port(part: Part) -> int:
    """Read a port number, 1 to 65535, in plain decimal.

    Raises:
        UsageError: it is none.
    """
    value = part.value
    if _PORT.fullmatch(value) and (port := int(value)) <= 65535:
        return port
    raise part.error("a port is a number from 1 to 65535" if value else "the port is missing")


def parse_port_range(part: Part) -> tuple[int, int]:
    """Read PORT or LOW-HIGH; a single port is a range of one.

    Raises:
        UsageError: an end is no port, or the range runs backwards.
    """
    dash = part.value.find("-")
    if dash < 0:
        port = parse_port(part)
        return port, port
    low, high = parse_port(part.cut(0, dash)), parse_port(part.cut(dash + 1))
    if low > high:
        raise part.error("the range runs backwards")
    return low, high


def parse_unix_path(part: Part) -> str:
    """Read the absolute path of a socket, with nothing in it that would let two texts name one file.

    Raises:
        UsageError: it is relative, too long, has a control character, or a segment that is empty, `.` or `..`.
    """
    value = part.value
    if not value.startswith("/"):
        raise part.error("the path of a socket starts with '/'")
    for offset, character in enumerate(value):
        if not character.isprintable():
            raise part.error("a character that cannot be printed", offset)
    if len(value.encode()) > UNIX_PATH_BYTES:
        raise part.error(f"a socket's path has at most {UNIX_PATH_BYTES} bytes")
    offset = 1
    for segment in value[1:].split("/"):
        if segment in ("", ".", ".."):
            raise part.error("a path without '//', '.', '..' or a final '/' is wanted", offset)
        offset += len(segment) + 1
    return value


def _parse_name(part: Part) -> str:
    """A name or an IPv4 address, which look alike."""
    value = part.value
    if found := _NOT_IN_A_NAME.search(value):
        raise part.error(f"{found[0]!r} cannot stand in a host name", found.start())
    if value.isascii():
        name = value.lower()
    else:
        try:
            name = value.encode("idna").decode("ascii").lower()
        except UnicodeError:
            raise part.error("not a valid international name") from None
        # Nameprep turns full-width forms and the like into ASCII, so what comes out is looked at again.
        if _NOT_IN_A_NAME.search(name):
            raise part.error("not a valid international name")
    bare = name.removesuffix(".")
    if len(bare) > NAME_CHARACTERS:
        raise part.error(f"a name has at most {NAME_CHARACTERS} characters")
    for label in bare.split("."):
        if not label:
            raise part.error("a name has no empty part between its dots")
        if len(label) > LABEL_CHARACTERS:
            raise part.error(f"a part of a name has at most {LABEL_CHARACTERS} characters")
    return name
