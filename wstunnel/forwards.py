"""Forwards: what is listened on, and where each connection leads.

SPEC = [BIND:]PORT:HOST:HOSTPORT[/udp][;OPTION]...

5432:db:5432                      on 127.0.0.1
0:db:5432                         on any free port
*:8080:web:80                     on all addresses, as is :8080:web:80
localhost:8080:web:80             on 127.0.0.1 and ::1
[::1]:8080:[fd00::5]:80           IPv6 goes in brackets
8000-8010:web:9000-9010           a range, port by port
5353:9.9.9.9:53/udp               UDP
/run/db.sock:db:5432              a Unix socket instead of the port, and
2375:/run/docker.sock             instead of the target
5432:db:5432;proxy=v2             the target is told who connects (PROXY protocol, v1 or v2)
/run/db.sock:db:5432;mode=660     who may use the Unix socket; 600 unless given
5900:ws-raw                       the server's URL is dialled for each connection, as a plain endpoint

`-D`, `--http-proxy` and `-R` alone take [BIND:]PORT: the application names the target.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from wstunnel.targets import (
    Part,
    Target,
    address_family,
    join_host_port,
    parse_host,
    parse_ipv6,
    parse_port_range,
    parse_unix_path,
)

RANGE_PORTS = 1024
"""Most ports in one range: each holds a descriptor, and the usual soft limit is 1,024 of them."""
UNIX_MODE = 0o600
"""Of a Unix socket that is listened on, as ssh's StreamLocalBindMask has it."""

GRAMMAR = (
    "[BIND:]PORT:HOST:HOSTPORT[/udp], as in 5432:db:5432, *:8080:web:80 or [::1]:8000-8010:web:8000-8010;"
    " /PATH stands for a Unix socket at either end"
)
REVERSE_GRAMMAR = f"[BIND:]PORT alone for a SOCKS proxy, or {GRAMMAR}"
DYNAMIC_GRAMMAR = "[BIND:]PORT, as in 1080, *:1080 or [::1]:1080"

_MODE = re.compile(r"0?[0-7]{3}", re.ASCII)
Speech = Literal["socks", "http"]


@dataclass(frozen=True, slots=True)
class Forward:
    """One place to listen, and the target that it leads to.

    Attributes:
        bind: an IP address without brackets, `*` for all addresses, or `localhost` for both loopback ones; empty for a
            Unix socket.
        port: 1 to 65535, or 0: any free one; 0 for a Unix socket.
        target: what the other end dials; None if the application names it (`speaks`), or if `raw`.
        path: of the Unix socket to listen on; else empty.
        mode: of that socket.
        proxy: version of the PROXY header that the target is sent; 0: none.
        speaks: what the application names its target in; empty where there is one.
        raw: each connection is a WebSocket of its own, to the URL as a plain endpoint.
        udp: datagrams, not connections.
    """

    bind: str
    port: int
    target: Target | None = None
    path: str = ""
    mode: int = UNIX_MODE
    proxy: Literal[0, 1, 2] = 0
    speaks: tuple[Speech, ...] = ()
    raw: bool = False
    udp: bool = False

    @property
    def kind(self) -> Literal["tcp", "udp", "unix"]:
        """What is listened on."""
        if self.path:
            return "unix"
        return "udp" if self.udp else "tcp"

    @property
    def addresses(self) -> tuple[str, ...]:
        """The IP addresses to listen on. Where there are two, the second may be missing on this machine (no IPv6)."""
        return bind_addresses(self.bind)

    @property
    def where(self) -> str:
        """What is listened on, as `127.0.0.1:5432` or a path."""
        return self.path or join_host_port(self.bind, self.port)

    @property
    def whither(self) -> str:
        """What it leads to, in words."""
        if self.target is not None:
            return str(self.target)
        return (
            "ws-raw"
            if self.raw
            else "/".join({"socks": "SOCKS", "http": "HTTP"}[word] for word in self.speaks) + " proxy"
        )

    def __str__(self) -> str:
        return f"{self.where} -> {self.whither}"


def bind_addresses(bind: str) -> tuple[str, ...]:
    """The IP addresses that BIND stands for."""
    if bind == "*":
        return ("0.0.0.0", "::")  # noqa: S104  # asked for by the user
    if bind == "localhost":
        return ("127.0.0.1", "::1")
    return (bind,)


def parse_forward(spec: str) -> tuple[Forward, ...]:
    """Read the SPEC of `-L`.

    Returns:
        one forward, or for a range one for each port, in order.

    Raises:
        UsageError: it does not follow the grammar.
    """
    return _parse(Part.whole(spec, GRAMMAR))


def parse_reverse(spec: str) -> tuple[Forward, ...]:
    """Read the SPEC of `-R`: as `-L`, with the bind at the server; or `[BIND:]PORT` alone, a SOCKS proxy there.

    Raises:
        UsageError: it does not follow the grammar.
    """
    whole = Part.whole(spec, REVERSE_GRAMMAR)
    fields = _split(whole)
    if len(fields) <= 2 and _is_port(fields[-1]) and not fields[0].value.startswith("/"):
        return (_dynamic(fields, "socks"),)
    forwards = _parse(whole)
    if forwards[0].raw:
        raise whole.error("ws-raw is for -L only")
    return forwards


def parse_dynamic(spec: str, speech: Speech) -> Forward:
    """Read the SPEC of `-D` and `--http-proxy`.

    Raises:
        UsageError: it does not follow the grammar.
    """
    whole = Part.whole(spec, DYNAMIC_GRAMMAR)
    fields = _split(whole)
    if len(fields) > 2:
        raise fields[2].error("a field too many: the application names the target; IPv6 goes in brackets")
    return _dynamic(fields, speech)


def listen_text(forward: Forward) -> str:
    """What a client asks the server to listen on, as `listen` has it: `tcp:127.0.0.1:8080`, `socks:127.0.0.1:1080`,
    `udp:127.0.0.1:53`, `unix:/run/x.sock;mode=600`."""
    if forward.path:
        return f"unix:{forward.path};mode={forward.mode:o}"
    return f"{'socks' if forward.speaks else forward.kind}:{join_host_port(forward.bind, forward.port)}"


def parse_listen(text: str) -> Forward:
    """Read what `listen_text` wrote, from the peer. Its target is not the server's to know.

    Raises:
        UsageError: it does not follow the grammar.
    """
    whole = Part.whole(text, "tcp:BIND:PORT, udp:BIND:PORT, socks:BIND:PORT or unix:/PATH[;mode=MODE]")
    if text.startswith("unix:"):
        path, mode, _ = _options(whole.cut(5))
        return Forward("", 0, None, parse_unix_path(path), mode or UNIX_MODE)
    kind, colon, _ = text.partition(":")
    fields = _split(whole.cut(len(kind) + 1)) if colon else []
    if kind not in ("tcp", "udp", "socks") or len(fields) != 2:
        raise whole.error("not a place to listen on")
    forward = _dynamic(fields, "socks")
    if kind == "socks":
        return forward
    return replace(forward, speaks=(), udp=kind == "udp")


def merge_dynamic(forwards: tuple[Forward, ...]) -> tuple[Forward, ...]:
    """One port that was asked for as a SOCKS and as an HTTP proxy is both: their first bytes tell them apart."""
    merged: dict[tuple[str, int], Forward] = {}
    for number, forward in enumerate(forwards):
        key = (forward.bind, forward.port or -number)
        known = merged.get(key)
        speaks = forward.speaks if known is None else tuple(dict.fromkeys(known.speaks + forward.speaks))
        merged[key] = replace(forward, speaks=speaks)
    return tuple(merged.values())


def _dynamic(fields: list[Part], speech: Speech) -> Forward:
    port = fields[-1]
    low, high = (0, 0) if port.value == "0" else _parse_listen_range(port)
    if low != high:
        raise port.error("one port only")
    return Forward(parse_bind(fields[0]) if len(fields) > 1 else "127.0.0.1", low, speaks=(speech,))


def _parse(whole: Part) -> tuple[Forward, ...]:
    spec, mode, proxy = _options(whole)
    if "://" in spec.value:
        raise whole.error("this is a URL; a forward names a host and its port", spec.value.index("://"))
    fields = _split(spec)
    udp = spec.value.endswith("/udp") and not fields[-1].value.startswith("/")
    if udp:
        fields[-1] = fields[-1].cut(0, len(fields[-1].value) - 4)
    kind: Literal["tcp", "udp"] = "udp" if udp else "tcp"
    if fields[0].value.startswith("/"):
        path, (low, high), bound, rest = parse_unix_path(fields[0]), (0, 0), "", fields[1:]
        if udp:
            raise spec.error("UDP has no Unix sockets here", len(spec.value) - 4)
    else:
        path = ""
        bind, port, rest = _arrange(spec, fields)
        bound = parse_bind(bind) if bind else "127.0.0.1"
        low, high = (0, 0) if port.value == "0" else _parse_listen_range(port)
        if mode is not None:
            raise whole.error("mode is for a Unix socket that is listened on", whole.value.index(";mode="))
    if proxy and udp:
        raise whole.error("a PROXY header goes before a TCP stream, not UDP", whole.value.index(";proxy="))
    if high - low >= RANGE_PORTS:
        raise port.error(f"a range has at most {RANGE_PORTS} ports")
    raw = len(rest) == 1 and rest[0].value == "ws-raw"
    if raw and (udp or proxy):
        raise rest[0].error("ws-raw takes TCP and Unix sockets, without a PROXY header")
    targets: list[Target | None]
    targets = [None] * (high - low + 1) if raw else list(_targets(spec, rest, kind, high - low + 1))
    return tuple(
        Forward(bound, low + number if low else 0, target, path, mode or UNIX_MODE, proxy, raw=raw, udp=udp)
        for number, target in enumerate(targets)
    )


def _targets(spec: Part, rest: list[Part], kind: Literal["tcp", "udp"], count: int) -> list[Target]:
    """What the fields behind the place to listen on name: `/PATH`, or HOST and HOSTPORT."""
    if len(rest) == 2 and rest[0].value == "unix" and rest[1].value.startswith("/"):
        rest = rest[1:]  # as TARGET has it elsewhere
    if len(rest) == 1 and rest[0].value.startswith("/"):
        if count > 1:
            raise rest[0].error("a range of ports leads to a range of ports, not to one Unix socket")
        return [Target("unix", "", 0, parse_unix_path(rest[0]))]
    if not rest:
        raise spec.error("the target is missing: HOST:HOSTPORT comes after what is listened on", len(spec.value))
    if len(rest) == 1:
        raise spec.error("the target's port is missing", len(spec.value))
    if len(rest) > 2:
        raise rest[2].error("a field too many; an IPv6 address goes in brackets")
    host, host_port = rest
    name = parse_host(host)
    first, last = parse_port_range(host_port)
    if count != last - first + 1:
        raise host_port.error(f"the ranges differ: {_count(count)} here, {_count(last - first + 1)} at the target")
    return [Target(kind, name, port, "") for port in range(first, last + 1)]


def _options(whole: Part) -> tuple[Part, int | None, Literal[0, 1, 2]]:
    """What stands behind semicolons: the SPEC without it, the mode and the version of the PROXY header."""
    at = whole.value.find(";")
    if at < 0:
        return whole, None, 0
    mode: int | None = None
    proxy: Literal[0, 1, 2] = 0
    offset = at
    for option in whole.value[at:].split(";")[1:]:
        offset += 1
        name, _, value = option.partition("=")
        if name == "proxy" and value in ("v1", "v2"):
            proxy = 1 if value == "v1" else 2
        elif name == "mode" and _MODE.fullmatch(value):
            mode = int(value, 8)
        else:
            raise whole.error("after ';' comes proxy=v1, proxy=v2 or mode=600", offset)
        offset += len(option)
    return whole.cut(0, at), mode, proxy


def _count(ports: int) -> str:
    return f"{ports} port" if ports == 1 else f"{ports} ports"


def _split(whole: Part) -> list[Part]:
    """The fields between the colons that do not stand in brackets."""
    fields, start, opened = [], 0, -1
    for offset, character in enumerate(whole.value):
        if character == "[" and opened < 0:
            opened = offset
        elif character == "]":
            opened = -1
        elif character == ":" and opened < 0:
            fields.append(whole.cut(start, offset))
            start = offset + 1
    if opened >= 0:
        raise whole.error("the bracket is not closed", opened)
    return [*fields, whole.cut(start)]


def _is_port(field: Part) -> bool:
    value = field.value.replace("-", "")
    return value.isascii() and value.isdigit()


def _ends_here(field: Part) -> bool:
    """Whether the field is a target by itself."""
    return field.value.startswith("/") or field.value == "ws-raw"


def _arrange(whole: Part, fields: list[Part]) -> tuple[Part | None, Part, list[Part]]:
    """BIND, PORT and the target's fields. With too few, the message says which one is missing and where."""
    if _ends_here(fields[-1]) and len(fields) in (2, 3) and _is_port(fields[-2]):
        return (fields[0] if len(fields) == 3 else None), fields[-2], fields[-1:]
    if len(fields) > 4:
        raise fields[4].error("a field too many; an IPv6 address goes in brackets")
    if len(fields) == 4:
        return fields[0], fields[1], fields[2:]
    end = len(whole.value)
    if len(fields) == 3 and (_is_port(fields[0]) or not _is_port(fields[1])):
        return None, fields[0], fields[1:]
    if len(fields) == 3:
        if _is_port(fields[2]):
            raise fields[2].error("the target's HOST is missing after the address and the port to listen on")
        raise whole.error("the target's port is missing", end)
    if not whole.value:
        raise whole.error("nothing given")
    if not _is_port(fields[0]):
        raise whole.error("the port to listen on is missing, which comes before the target")
    if len(fields) == 1:
        raise whole.error("the target is missing: HOST:HOSTPORT comes after the port to listen on", end)
    if _is_port(fields[1]):
        raise fields[1].error("the target's HOST is missing")
    raise whole.error("the target's port is missing", end)


def _parse_listen_range(part: Part) -> tuple[int, int]:
    low, dash, _ = part.value.partition("-")
    if dash and low == "0":
        raise part.error("port 0, any free port, cannot begin a range")
    return parse_port_range(part)


def parse_bind(part: Part) -> str:
    """Read BIND: an IP address, `*` (or nothing) for all, or `localhost`.

    Raises:
        UsageError: it is none of these.
    """
    value = part.value
    if value in ("", "*"):
        return "*"
    if value.lower() == "localhost":
        return "localhost"
    if value.startswith("[") and value.endswith("]"):
        return parse_ipv6(part.cut(1, len(value) - 1))
    if address_family(value) is None:
        raise part.error("BIND is an IP address of this machine, IPv6 in brackets, or '*', or 'localhost'")
    return value
