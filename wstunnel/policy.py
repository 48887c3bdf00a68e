"""What a principal may dial. Decides purely: who asks does the resolving and the dialling.

    RULE = [tcp:|udp:]HOST|CIDR|*:PORT|LOW-HIGH|*  or  unix:/GLOB

    db:5432                  the name as asked, whatever it resolves to
    *.example.com:443        every name below it, not example.com itself
    tcp:10.0.0.0/8:*         addresses, also those that names resolve to
    [fd00::/8]:8000-8999     IPv6 and its networks go in brackets
    udp:*:53
    unix:/run/app/*.sock     `*` stays between two slashes

Without `tcp:` or `udp:` a rule is for both. Any rule replaces the default, which allows all of TCP and UDP but the
addresses of `_SPECIAL`. Those are then allowed only by a rule that names that very address. The sockets on which the
server itself accepts are never allowed.

The order of use: `names` before resolving, then `permits` for each address, then dial that address and no other.
"""

from __future__ import annotations

import enum
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Literal

from wstunnel.forwards import Forward, parse_bind
from wstunnel.targets import (
    Part,
    Target,
    address_family,
    join_host_port,
    parse_host,
    parse_port_range,
    parse_unix_path,
    split_host_port,
)
from wstunnel.wire.addresses import unmapped, unmapped_network

GRAMMAR = (
    "[tcp:|udp:]HOST|CIDR|*:PORT|LOW-HIGH|* or unix:/GLOB, as in db:5432, 10.0.0.0/8:*, [fd00::/8]:443 or *:8000-8999"
)

LISTEN_GRAMMAR = "[ADDR:]PORT|LOW-HIGH|* or unix:/GLOB, as in 8080, *:8000-8999, [::1]:* or unix:/run/tunnel/*.sock"

_METADATA = "a cloud's metadata address"
_LINK_LOCAL = "a link-local address"
_MULTICAST = "a multicast address"
_SPECIAL_4 = tuple(
    (IPv4Network(network), words)
    for network, words in (
        ("169.254.169.254", _METADATA),
        ("168.63.129.16", _METADATA),  # Azure's wire server
        ("100.100.100.200", _METADATA),  # Alibaba Cloud
        ("192.0.0.192", _METADATA),  # Oracle Cloud, classic
        ("169.254.0.0/16", _LINK_LOCAL),
        ("224.0.0.0/4", _MULTICAST),
        ("255.255.255.255", "the broadcast address"),
    )
)
_SPECIAL_6 = tuple(
    (IPv6Network(network), words)
    for network, words in (
        ("fd00:ec2::254", _METADATA),  # AWS
        ("fd20:ce::254", _METADATA),  # Google Cloud
        ("fe80::/10", _LINK_LOCAL),
        ("ff00::/8", _MULTICAST),
    )
)

_NAT64 = IPv6Network("64:ff9b::/96")
# IPv6 prefixes whose last 32 bits are an IPv4 address that a translator or tunnel on the way may deliver to:
# NAT64 (RFC 6052), NAT64 for local use (RFC 8215), SIIT (RFC 2765) and IPv4-compatible (RFC 4291 §2.5.5.1).
_WRAPPERS = (_NAT64, IPv6Network("64:ff9b:1::/48"), IPv6Network("::ffff:0:0:0/96"), IPv6Network("::/96"))
# inet_aton, behind getaddrinfo, reads a name whose last part is such a number as an IPv4 address.
_NUMERIC_END = re.compile(r"(?:^|\.)(?:[0-9]+|0x[0-9a-f]*)\.?$")

Address = IPv4Address | IPv6Address


class NameVerdict(enum.Enum):
    """What can be said before a name is resolved."""

    ALLOWED = "a rule allows the target as asked; its addresses are still to be checked"
    BY_ADDRESS = "it depends on the address"
    REFUSED = "no address could make it allowed: do not resolve"


@dataclass(frozen=True, slots=True)
class Rule:
    """One `--allow` rule. Made by `parse_rule`.

    Attributes:
        kinds: the kinds of target it is for.
        matches: how `host` (or `network`) is compared.
        host: a name, the suffix of a wildcard (`.example.com`) or a path's glob; else empty.
        network: for `address` (one address) and `network`; IPv4-mapped ones are IPv4 here.
        low: the lowest port.
        high: the highest port.
    """

    kinds: tuple[Literal["tcp", "udp", "unix"], ...]
    matches: Literal["any", "name", "suffix", "address", "network", "path"]
    host: str = ""
    network: IPv4Network | IPv6Network | None = None
    low: int = 1
    high: int = 65535

    def covers(self, target: Target) -> bool:
        """Whether kind and port fit, the host aside."""
        return target.kind in self.kinds and (target.kind == "unix" or self.low <= target.port <= self.high)

    def matches_name(self, host: str) -> bool:
        """Whether the host as asked is enough. `host` is canonical and no IP address."""
        name = host.removesuffix(".")
        if self.matches == "name":
            return name == self.host
        if self.matches == "suffix":
            return name.endswith(self.host)
        return self.matches == "any"

    def matches_address(self, address: Address) -> bool:
        """Whether the address is enough, whatever name led to it."""
        if self.network is None:
            return self.matches == "any"
        return address.version == self.network.version and address in self.network

    def matches_path(self, path: str) -> bool:
        """Whether the glob fits, segment by segment."""
        return _glob_matches(self.host, path)


def _glob_matches(glob: str, path: str) -> bool:
    globs, segments = glob.split("/"), path.split("/")
    return len(globs) == len(segments) and all(map(fnmatchcase, segments, globs))


def _glob_of(path: str) -> str:
    """The glob that fits this path and no other."""
    return re.sub(r"([*?[])", r"[\1]", path)


def parse_rule(text: str) -> Rule:
    """Read one RULE of `--allow`.

    Raises:
        UsageError: it does not follow the grammar; `position` points at the part at fault.
    """
    part = Part.whole(text, GRAMMAR)
    if text.startswith("unix:"):
        return Rule(("unix",), "path", host=parse_unix_path(part.cut(5)))
    kinds: tuple[Literal["tcp", "udp"], ...] = ("tcp", "udp")
    if text.startswith("tcp:"):
        kinds, part = ("tcp",), part.cut(4)
    elif text.startswith("udp:"):
        kinds, part = ("udp",), part.cut(4)
    host, port = split_host_port(part)
    if port is None:
        raise part.error("the port is missing; ':*' is any port", len(part.value))
    matches, name, network = _parse_rule_host(host)
    low, high = (1, 65535) if port.value == "*" else parse_port_range(port)
    return Rule(kinds, matches, name, network, low, high)


def _parse_rule_host(
    part: Part,
) -> tuple[Literal["any", "name", "suffix", "address", "network"], str, IPv4Network | IPv6Network | None]:
    value = part.value
    if value == "*":
        return "any", "", None
    if "/" in value:
        return "network", "", _parse_network(part)
    if value.startswith("*."):
        suffix = parse_host(part.cut(2)).removesuffix(".")
        _refuse_number(part, suffix)  # else `*.0.0.1` would let 127.0.0.1 in, and by a name at that
        return "suffix", f".{suffix}", None
    name = parse_host(part)
    if address_family(name) is not None:
        return "address", "", ip_network(unmapped(ip_address(name)))
    name = name.removesuffix(".")
    _refuse_number(part, name)
    return "name", name, None


def _refuse_number(part: Part, name: str) -> None:
    if ":" in name or _NUMERIC_END.search(name):
        raise part.error("an address is written in full, as in 10.0.0.5; a name does not end in a number")


def _parse_network(part: Part) -> IPv4Network | IPv6Network:
    value = part.value
    inner = part
    if value.startswith("["):
        inner = part.cut(1, len(value) - 1)
    elif ":" in value:
        raise part.error("an IPv6 network goes in brackets, as in [fd00::/8]")
    base, _, length = inner.value.partition("/")
    slash = len(base)
    if address_family(base) is None or (":" in base) != (inner is not part):
        raise inner.error("not the address of a network")
    bits = 128 if ":" in base else 32
    if not (length.isascii() and length.isdigit() and len(length) <= 3 and int(length) <= bits):
        raise inner.error(f"after '/' comes the length of the prefix, 0 to {bits}", slash + 1)
    network = ip_network(f"{base}/{int(length)}", strict=False)
    if str(network.network_address) != str(ip_address(base)):
        raise inner.error(f"bits are set beyond the prefix; the network is {network}")
    return unmapped_network(network)


def exactly(target: Target) -> Rule:
    """A rule for this very target and nothing else, for what a user named at this end."""
    if target.kind == "unix":
        return Rule(("unix",), "path", host=_glob_of(target.path))
    family = address_family(target.host)
    network = None if family is None else ip_network(unmapped(ip_address(target.host)))
    name = "" if network else target.host.removesuffix(".")
    return Rule((target.kind,), "address" if network else "name", name, network, target.port, target.port)


class Policy:
    """What one principal may dial. Immutable, and safe to share.

    Args:
        rules: from `parse_rule`; empty means the default policy.
        own_sockets: (address without brackets, port) of every socket on which this server accepts WebSockets or
            administration. `0.0.0.0` and `::` both stand for every address of this machine.
        is_local: whether an address (canonical text) belongs to an interface of this machine. Asked only for
            wildcard sockets whose port is the target's; loopback addresses need not be known to it.
        is_own_path: whether the file at a path is a Unix socket of this server. Asked only where a rule allows it.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        *,
        own_sockets: Iterable[tuple[str, int]],
        is_local: Callable[[str], bool],
        is_own_path: Callable[[str], bool] = lambda _path: False,
    ) -> None:
        self._rules = tuple(rules)
        self._own = tuple((unmapped(ip_address(address)), port) for address, port in own_sockets)
        self._own_ports = frozenset(port for _, port in self._own)
        self._is_local = is_local
        self._is_own_path = is_own_path

    def names(self, target: Target) -> NameVerdict:
        """What can be said before resolving. For a target that is an IP address or a path this is the whole answer.

        `ALLOWED` does not spare the check of each resolved address by `permits`.
        """
        if target.kind == "unix" or address_family(target.host) is not None:
            return NameVerdict.REFUSED if self.refusal(target, target.host) else NameVerdict.ALLOWED
        if not self._rules:
            return NameVerdict.BY_ADDRESS
        verdict = NameVerdict.REFUSED
        for rule in self._rules:
            if rule.covers(target):
                if rule.matches_name(target.host):
                    return NameVerdict.ALLOWED
                if rule.network is not None:
                    verdict = NameVerdict.BY_ADDRESS
        return verdict

    def permits(self, target: Target, ip: str) -> bool:
        """Whether `target` may be dialled at `ip`, an address that it resolved to (or is).

        Raises:
            ValueError: `ip` is no IP address.
        """
        return self.refusal(target, ip) is None

    def refusal(self, target: Target, ip: str) -> str | None:
        """Why `target` may not be dialled at `ip`, in full, for the server's own log; None if it may.

        The client is told `denial(target)` and no more. `ip` is not looked at for Unix sockets.

        Raises:
            ValueError: `ip` is no IP address.
        """
        if target.kind == "unix":
            allowed = any(rule.covers(target) and rule.matches_path(target.path) for rule in self._rules)
            if allowed and self._is_own_path(target.path):
                return f"{target} is a socket of this server itself"
            return None if allowed else f"no --allow rule matches {target}"
        # A zone id changes the way to an address, not the address.
        address = unmapped(ip_address(ip.partition("%")[0]))
        hidden = _wrapped(address)
        candidates = (address,) if hidden is None else (address, hidden)
        if target.port in self._own_ports and any(self._is_own(candidate, target.port) for candidate in candidates):
            return f"{join_host_port(ip, target.port)} is a socket of this server itself"
        for candidate in candidates:
            if (words := _special(candidate)) and not self._names_exactly(target, address):
                stands_for = "is" if candidate is address else f"stands for {candidate},"
                return f"{ip} {stands_for} {words}, which only a rule that names {address} allows"
        if not self._rules or self._matched(target, address):
            return None
        return f"no --allow rule matches {target} at {ip}"

    def _matched(self, target: Target, address: Address) -> bool:
        name = target.host if address_family(target.host) is None else None
        # In an IPv6-only network, NAT64 is how the IPv4 addresses of the rules look.
        translated = _wrapped(address) if address in _NAT64 else None
        for rule in self._rules:
            if rule.covers(target) and (
                (name is not None and rule.matches_name(name))
                or rule.matches_address(address)
                or (translated is not None and rule.matches_address(translated))
            ):
                return True
        return False

    def _names_exactly(self, target: Target, address: Address) -> bool:
        return any(
            rule.matches == "address" and rule.covers(target) and rule.matches_address(address) for rule in self._rules
        )

    def _is_own(self, address: Address, port: int) -> bool:
        if address.is_unspecified:
            # Linux takes a connection to 0.0.0.0 or :: as one to the loopback address.
            address = ip_address("127.0.0.1" if address.version == 4 else "::1")
        for own, own_port in self._own:
            if own_port != port:
                continue
            if own.is_unspecified:
                if address.is_loopback or self._is_local(str(address)):
                    return True
            elif own == address:
                return True
        return False


@dataclass(frozen=True, slots=True)
class ListenRule:
    """One `--allow-listen` rule. Made by `parse_listen_rule`.

    Attributes:
        bind: an IP address without brackets, `localhost`, or `*` for any; empty for Unix sockets.
        low: the lowest port.
        high: the highest port.
        path: a glob for the paths of Unix sockets.
    """

    bind: str
    low: int = 1
    high: int = 65535
    path: str = ""

    def covers(self, forward: Forward) -> bool:
        """Whether a client may have this place."""
        if forward.path or self.path:
            return bool(forward.path and self.path) and _glob_matches(self.path, forward.path)
        any_port = (self.low, self.high) == (1, 65535)  # which 0, any free one, may turn out to be
        fits = self.low <= forward.port <= self.high if forward.port else any_port
        if self.bind == "*":
            return fits
        binds = ("127.0.0.1", "::1") if self.bind == "localhost" else (self.bind,)
        return fits and forward.bind != "*" and all(address in binds for address in forward.addresses)


def parse_listen_rule(text: str) -> ListenRule:
    """Read one RULE of `--allow-listen`: `[ADDR:]PORT|LOW-HIGH|*`, ADDR 127.0.0.1 unless given; or `unix:/GLOB`.

    Raises:
        UsageError: it does not follow the grammar; `position` points at the part at fault.
    """
    part = Part.whole(text, LISTEN_GRAMMAR)
    if text.startswith("unix:"):
        return ListenRule("", path=parse_unix_path(part.cut(5)))
    first, second = split_host_port(part)
    port = first if second is None else second
    low, high = (1, 65535) if port.value == "*" else parse_port_range(port)
    return ListenRule("127.0.0.1" if second is None else parse_bind(first), low, high)


def may_listen(rules: Sequence[ListenRule], forward: Forward) -> bool:
    """Whether one of the rules lets a client have this place. Without rules none may be had."""
    return any(rule.covers(forward) for rule in rules)


def listen_rule_for(forward: Forward) -> str:
    """The narrowest `--allow-listen` rule that lets a client have this place, as one types it in a shell."""
    if forward.path:
        return shlex.quote(f"unix:{_glob_of(forward.path)}")
    port = str(forward.port or "*")  # whatever port the server picks
    return shlex.quote(join_host_port(forward.bind, port))


def denial(target: Target) -> str:
    """What the client is told when its target is forbidden: nothing that it did not say itself."""
    return f"the server's policy does not allow {target}"


def _special(address: Address) -> str | None:
    """What sort of address this is, if a name or network in a rule is not enough to allow it."""
    if isinstance(address, IPv4Address):
        return next((words for network, words in _SPECIAL_4 if address in network), None)
    return next((words for network, words in _SPECIAL_6 if address in network), None)


def _wrapped(address: Address) -> IPv4Address | None:
    """The IPv4 address that a translator or a 6to4 relay (RFC 3056) may deliver to."""
    if isinstance(address, IPv4Address):
        return None
    if address.sixtofour is not None:
        return address.sixtofour
    if int(address) > 1 and any(address in network for network in _WRAPPERS):
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return None
