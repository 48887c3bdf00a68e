"""Whom a proxy says that it passes on: `X-Forwarded-For`, and `Forwarded` (RFC 7239).

    x_forwarded_for(["203.0.113.7, 10.0.0.5"])                 # [Hop("203.0.113.7"), Hop("10.0.0.5")]
    forwarded(['for=203.0.113.7;proto=https, for="[::1]:80"'])  # [Hop("203.0.113.7"), Hop("::1", 80)]

Each proxy appends whom it was reached by, so the last hop is the word of the proxy that we talk to, and every other one
is the word of whoever stands before it: the caller decides how far back it believes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from wstunnel.errors import ProtocolError
from wstunnel.wire.addresses import PORT_MAX, pack_address, unpack_address

_CHARACTERS = r"[-!#$%&'*+.^_`|~0-9A-Za-z]+"  # RFC 9110 §5.6.2: token
# RFC 7239 §4 and RFC 9110 §5.6.4. The two sorts of a quoted string's characters exclude each other: nothing backtracks.
_PAIR = re.compile(
    rf"({_CHARACTERS})=(?:({_CHARACTERS})|"
    r'"((?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*)")'
)
_QUOTED_PAIR = re.compile(r"\\(.)")
_SPACE = re.compile(r"[ \t]*")
_NAME = re.compile(r"(?i:unknown)|_[-._0-9A-Za-z]+")  # RFC 7239 §6.2 and §6.3
_PORT = re.compile(r"([0-9]{1,5})|_[-._0-9A-Za-z]+")  # RFC 7239 §6: node-port


class Hop(NamedTuple):
    """Who reached a proxy.

    Args:
        host: an IP address in its usual form; `None`: the proxy does not say, or says a name that only it understands.
        port: `None` if it is not said, which is the rule.
    """

    host: str | None
    port: int | None = None


def x_forwarded_for(fields: Sequence[str]) -> list[Hop]:
    """The hops of all `X-Forwarded-For` fields, in their order, the nearest proxy's last.

    There is no standard. Taken are addresses, IPv6 with or without brackets, each with or without a port, and
    `unknown`, which squid sends.

    Raises:
        ProtocolError: anything else.
    """
    elements = [element for field in fields for part in field.split(",") if (element := part.strip(" \t"))]
    return [_bare(element) for element in elements]


def forwarded(fields: Sequence[str]) -> list[Hop]:
    """The hops of all `Forwarded` fields, in their order, the nearest proxy's last.

    Each field is read for itself: a quotation mark that one leaves open does not reach into the next.

    Raises:
        ProtocolError: not what RFC 7239 §4 and §6 describe.
    """
    return [hop for field in fields for hop in _elements(field)]


def _elements(field: str) -> list[Hop]:
    """`forwarded-element = [ forwarded-pair ] *( ";" [ forwarded-pair ] )`, between commas; empty ones do not count."""
    hops = []
    parameters: dict[str, str] = {}
    position = 0
    while True:
        position = _skip(field, position)
        pair = _PAIR.match(field, position)
        if pair is not None:
            name = pair[1].lower()
            if name in parameters:  # §4: "Each parameter MUST NOT occur more than once per field-value."
                raise ProtocolError(f"a Forwarded field with two parameters {name!r} in one element")
            parameters[name] = _QUOTED_PAIR.sub(r"\1", pair[3]) if pair[2] is None else pair[2]
            position = _skip(field, pair.end())
        after = field[position : position + 1]
        position += 1
        if after == ";":
            continue
        if after not in (",", ""):
            raise ProtocolError("a Forwarded field that is no list of `name=value` parts")
        if parameters:
            hops.append(_node(parameters["for"]) if "for" in parameters else Hop(None))
            parameters = {}
        if not after:
            return hops


def _skip(field: str, position: int) -> int:
    space = _SPACE.match(field, position)
    assert space is not None  # it matches nothing, too
    return space.end()


def _node(text: str) -> Hop:
    """§6: `node = nodename [ ":" node-port ]`, where an IPv6 address has its brackets."""
    name, colon, port = text.partition(":") if not text.startswith("[") else _cut_bracket(text)
    if _NAME.fullmatch(name):
        host = None
    elif (host := _address(name)) is None:
        raise ProtocolError("a node of Forwarded or X-Forwarded-For that is neither an address nor unknown")
    if not colon:
        return Hop(host)
    found = _PORT.fullmatch(port)
    if found is None or int(found[1] or 0) > PORT_MAX:
        raise ProtocolError("a node of Forwarded or X-Forwarded-For with what is no port")
    return Hop(host, int(found[1]) if found[1] and host else None)


def _bare(text: str) -> Hop:
    """As `_node`, and IPv6 without brackets, which then has no port."""
    if text.count(":") < 2 or text.startswith("["):
        return _node(text)
    return _node(f"[{text}]")


def _cut_bracket(text: str) -> tuple[str, str, str]:
    name, bracket, rest = text.partition("]")
    if not bracket or rest[:1] not in ("", ":"):
        raise ProtocolError("a node of Forwarded or X-Forwarded-For whose bracket is not closed")
    return name + bracket, rest[:1], rest[1:]


def _address(name: str) -> str | None:
    """IPv4, or IPv6 in its brackets."""
    six = name.startswith("[")
    host = name[1:-1] if six else name
    if six is not (":" in host):
        return None
    packed = pack_address(host)
    return None if packed is None else unpack_address(packed)
