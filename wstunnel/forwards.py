"""Forwards: which local port leads to which target.

SPEC = [BIND:]PORT:HOST:HOSTPORT

5432:db:5432                      on 127.0.0.1
0:db:5432                         on any free port
*:8080:web:80                     on all addresses, as is :8080:web:80
localhost:8080:web:80             on 127.0.0.1 and ::1
[::1]:8080:[fd00::5]:80           IPv6 goes in brackets
8000-8010:web:9000-9010           a range, port by port
"""

from __future__ import annotations

from dataclasses import dataclass

from wstunnel.targets import Part, Target, address_family, join_host_port, parse_host, parse_ipv6, parse_port_range

RANGE_PORTS = 1024
"""Most ports in one range: each holds a descriptor, and the usual soft limit is 1,024 of them."""

GRAMMAR = "[BIND:]PORT:HOST:HOSTPORT, as in 5432:db:5432, *:8080:web:80 or [::1]:8000-8010:web:8000-8010"


@dataclass(frozen=True, slots=True)
class Forward:
    """One local port and the target that it leads to.

    Attributes:
        bind: an IP address without brackets, `*` for all addresses, or `localhost` for both loopback ones.
        port: 1 to 65535, or 0: any free one.
        target: what the other end dials.
    """

    bind: str
    port: int
    target: Target

    @property
    def addresses(self) -> tuple[str, ...]:
        """The IP addresses to listen on. Where there are two, the second may be missing on this machine (no IPv6)."""
        if self.bind == "*":
            return ("0.0.0.0", "::")  # noqa: S104  # asked for by the user
        if self.bind == "localhost":
            return ("127.0.0.1", "::1")
        return (self.bind,)

    def __str__(self) -> str:
        return f"{join_host_port(self.bind, self.port)} -> {self.target}"


def parse_forward(spec: str) -> tuple[Forward, ...]:
    """Read a local forward's SPEC.

    Returns:
        one forward, or for a range one for each port, in order.

    Raises:
        UsageError: it does not follow the grammar, or asks for what is not supported yet.
    """
    whole = Part.whole(spec, GRAMMAR)
    fields = _split(whole)
    _refuse_unsupported(whole, fields)
    bind, port, host, host_port = _arrange(whole, fields)
    bound = _parse_bind(bind) if bind else "127.0.0.1"
    low, high = (0, 0) if port.value == "0" else _parse_listen_range(port)
    name = parse_host(host)
    first, last = parse_port_range(host_port)
    if high - low != last - first:
        raise host_port.error(f"the ranges differ: {_count(low, high)} here, {_count(first, last)} at the target")
    if high - low >= RANGE_PORTS:
        raise port.error(f"a range has at most {RANGE_PORTS} ports")
    return tuple(
        Forward(bound, port_number, Target("tcp", name, target_port, ""))
        for port_number, target_port in zip(range(low, high + 1), range(first, last + 1), strict=True)
    )


def _count(low: int, high: int) -> str:
    ports = high - low + 1
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


def _refuse_unsupported(whole: Part, fields: list[Part]) -> None:
    """Forms that the grammar will have one day: an exact answer is better than a puzzling one."""
    value = whole.value
    if "://" in value:
        raise whole.error("this is a URL; a forward names a host and its port", value.index("://"))
    if ";proxy=" in value:
        raise whole.error("PROXY headers are not supported yet in -L", value.index(";proxy="))
    if value.endswith("/udp"):
        raise whole.error("UDP is not supported yet in -L", len(value) - 4)
    for field in fields:
        if field.value.startswith("/"):
            raise field.error("Unix sockets are not supported yet in -L")


def _is_port(field: Part) -> bool:
    value = field.value.replace("-", "")
    return value.isascii() and value.isdigit()


def _arrange(whole: Part, fields: list[Part]) -> tuple[Part | None, Part, Part, Part]:
    """Which field is which. With too few of them, the message says which one is missing and where."""
    if len(fields) > 4:
        raise fields[4].error("a field too many; an IPv6 address goes in brackets")
    if len(fields) == 4:
        return fields[0], fields[1], fields[2], fields[3]
    end = len(whole.value)
    if len(fields) == 3 and (_is_port(fields[0]) or not _is_port(fields[1])):
        return None, fields[0], fields[1], fields[2]
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


def _parse_bind(part: Part) -> str:
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
