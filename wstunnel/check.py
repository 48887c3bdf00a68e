"""What is in the way between this machine and a server: layer by layer, each with its evidence and the next step.

name, route, TCP are looked at one by one, all addresses of them; then one dial goes through proxy, TLS and upgrade as
every dial of the client does, and is watched; then a link is greeted, pinged, and with `idle` left silent.
"""

from __future__ import annotations

import base64
import functools
import secrets
import socket
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import trio

from wstunnel import check_advice as advice
from wstunnel import limits, logs
from wstunnel.check_idle import Idle
from wstunnel.check_link import CheckLink, ClosedByPeerError
from wstunnel.check_report import Report, Step, duration
from wstunnel.check_watch import Seen, http_evidence
from wstunnel.dial import ADDRESSES, Address, Connect, Resolve, connect_socket, dial_server, server_addresses
from wstunnel.errors import LocalError, NetworkError, ServerRefusedError, TrustError, WstunnelError
from wstunnel.failover import dialler_of, family_of
from wstunnel.route import Route, route_to
from wstunnel.targets import address_family, join_host_port
from wstunnel.wire.messages import VERSION

if TYPE_CHECKING:
    from wstunnel.auth import LoginUrl
    from wstunnel.config import ClientConfig
    from wstunnel.tls_relay import Relays

PINGS: Final = 5
OTHERS_SECONDS: Final = 2.0
"""When one address has answered, how long the others may still take."""
SECRET_CHARACTERS: Final = 4
"""Shorter passwords and header values are not looked for in the output: they would be found everywhere."""
RESOLVER_FILE: Final = Path("/etc/resolv.conf")


class _StopError(Exception):
    """A step failed that all later ones depend on. It has been reported."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a test puts others in place of.

    Args:
        resolve: what resolves names, in a thread.
        connect: what connects one socket.
        route: what tells the way to an address.
        resolver_file: names the resolvers.
    """

    resolve: Resolve = socket.getaddrinfo
    connect: Connect = connect_socket
    route: Callable[[str], Route] = route_to
    resolver_file: Path = RESOLVER_FILE


def secrets_of(config: ClientConfig, url: LoginUrl) -> tuple[str, ...]:
    """Texts of a configuration that must not be shown, the longest first."""
    proxy = None if config.proxies is None else config.proxies.choose(url)
    found = {value for name, value in config.headers if name.lower() not in ("host", "user-agent")}
    if proxy is not None and proxy.user is not None:
        found |= {proxy.password, base64.b64encode(f"{proxy.user}:{proxy.password}".encode()).decode("ascii")}
    kept = [text for text in found if len(text) >= SECRET_CHARACTERS]
    if url.token is not None:
        kept.append(url.token.reveal())
    return tuple(sorted(kept, key=len, reverse=True))


class Check:
    """One check of one server.

    Args:
        config: of a client, with whom to trust and by which way.
        url: one of its servers, with a token.
        why: why that proxy, or none: `--proxy`, the name of a variable, or a sentence.
        report: is filled, step by step; also with what is known when this is cancelled.
        relays: run by the caller.
        idle: seconds of silence to try at most; None: none.
        surroundings: of this machine.
    """

    def __init__(
        self,
        config: ClientConfig,
        url: LoginUrl,
        *,
        why: str,
        report: Report,
        relays: Relays,
        idle: float | None = None,
        surroundings: Surroundings = Surroundings(),
    ) -> None:
        self._config = config
        self._url = url
        self._why = why
        self._report = report
        self._relays = relays
        self._idle = idle
        self._around = surroundings
        self._proxy = None if config.proxies is None else config.proxies.choose(url)
        self._pins = config.pins or url.pins
        self._session = secrets.token_urlsafe(16)

    async def run(self) -> None:
        """Check, up to the first failure on which the rest depends. The report has it all."""
        try:
            addresses = await self._name()
            self._routes(addresses)
            if self._proxy is None:
                self._add("proxy", True, f"none ({self._why})", {"proxy": None, "why": self._why})
            await self._tcp(addresses)
            await self._tunnel()
        except _StopError:
            pass
        self._report.finished = True

    def _add(self, step: str, ok: bool, text: str, evidence: dict[str, Any], then: str | None = None) -> None:
        self._report.add(Step(step, ok, text, evidence, then))

    def _fail(self, step: str, text: str, evidence: dict[str, Any], then: str) -> NoReturn:
        self._add(step, False, text, evidence, then)
        raise _StopError

    # --- this machine -------------------------------------------------------------------------------------------------

    @property
    def _first(self) -> tuple[str, int]:
        """Host and port that are connected to: the server's, or the proxy's."""
        return (self._url.host, self._url.port) if self._proxy is None else (self._proxy.host, self._proxy.port)

    async def _name(self) -> list[Address]:
        host, port = self._first
        began = trio.current_time()
        resolver = f"system{_nameservers(self._around.resolver_file)}"
        evidence: dict[str, Any] = {"host": host, "resolver": resolver}
        whose, then = ("", advice.NAME) if self._proxy is None else (", the proxy", advice.PROXY_REACH)
        if (version := self._config.ip_version) is not None:
            then = f"-{version} takes IPv{version} addresses only: leave it out. Else {then}"
        addresses = None
        with trio.move_on_after(limits.DIAL_SECONDS):
            try:
                addresses = await server_addresses(
                    host, port, family=family_of(self._config), resolve=self._around.resolve
                )
            except NetworkError as error:
                reason = str(error).removeprefix(f"cannot connect to {join_host_port(host, port)}: ")
                self._fail("name", f"{host}{whose}: {reason} (resolver: {resolver})", evidence, then)
        if addresses is None:
            text = f"no answer from the resolver within {limits.DIAL_SECONDS:.0f} s (resolver: {resolver})"
            self._fail("name", f"{host}{whose}: {text}", evidence, then)
        seconds = trio.current_time() - began
        found = [str(address.sockaddr[0]) for address in addresses]
        if address_family(host) is not None:
            self._add("name", True, f"{host} is an address", {"host": host, "resolver": None, "addresses": found})
            return addresses
        evidence |= {"addresses": found, "seconds": round(seconds, 6)}
        shown = _shortened(found)
        subject = f"{host}{whose}," if whose else host
        self._add("name", True, f"{subject} is {shown} ({duration(seconds)}; resolver: {resolver})", evidence)
        return addresses[:ADDRESSES]

    def _routes(self, addresses: list[Address]) -> None:
        """The way to the first address of each family."""
        found: list[dict[str, Any]] = []
        texts: list[str] = []
        for family in dict.fromkeys(address.family for address in addresses):
            ip = str(next(address for address in addresses if address.family == family).sockaddr[0])
            kind = "IPv4" if family == socket.AF_INET else "IPv6"
            entry: dict[str, Any] = {"family": kind, "to": ip, "local": None, "interface": None, "gateway": None}
            try:
                way = self._around.route(ip)
            except OSError as error:
                entry["error"] = _reason(error)
                texts.append(f"{kind}: {_reason(error)}")
            else:
                entry |= {"local": way.local, "interface": way.interface, "gateway": way.gateway}
                by = "" if way.interface is None else f" on {way.interface}"
                via = "" if way.gateway is None else f" by way of {way.gateway}"
                texts.append(f"{kind} from {way.local}{by}{via}")
            found.append(entry)
        evidence = {"routes": found}
        if all("error" in entry for entry in found):
            self._fail("route", "; ".join(texts), evidence, advice.NO_ROUTE)
        self._add("route", True, "; ".join(texts), evidence)

    async def _tcp(self, addresses: list[Address]) -> None:
        """Connect to every address at the same time."""
        found: list[dict[str, Any]] = [{"address": str(address), "ok": False} for address in addresses]
        with trio.move_on_after(limits.DIAL_SECONDS) as scope:
            async with trio.open_nursery() as nursery:
                for address, entry in zip(addresses, found, strict=True):
                    nursery.start_soon(self._connect, address, entry, scope)
        for entry in found:
            if not entry["ok"]:
                entry.setdefault("error", "no answer in time")
        texts = [
            f"{entry['address']} {duration(entry['seconds']) if entry['ok'] else entry['error']}" for entry in found
        ]
        evidence = {"addresses": found}
        whose = "" if self._proxy is None else f"the proxy {self._proxy.authority}: "
        text = whose + _shortened(texts)
        if not any(entry["ok"] for entry in found):
            then = advice.TCP_REFUSED if any(_is_refused(entry) for entry in found) else advice.TCP_SILENT
            self._fail("tcp", text, evidence, then if self._proxy is None else advice.PROXY_REACH)
        self._add("tcp", True, text, evidence, None if all(entry["ok"] for entry in found) else advice.TCP_SOME)

    async def _connect(self, address: Address, entry: dict[str, Any], scope: trio.CancelScope) -> None:
        began = trio.current_time()
        try:
            sock = await self._around.connect(address.family, address.sockaddr)
        except OSError as error:
            entry["error"] = _reason(error)
            return
        sock.close()
        entry |= {"ok": True, "seconds": round(trio.current_time() - began, 6)}
        scope.deadline = min(scope.deadline, trio.current_time() + OTHERS_SECONDS)

    # --- the way to the server ----------------------------------------------------------------------------------------

    async def _dial(self, seen: Seen | None = None) -> CheckLink:
        dial = functools.partial(dial_server, resolve=self._around.resolve, connect=self._around.connect)
        sock, leftover = await dialler_of(self._config, self._url, self._relays, dial=dial, watch=seen).dial()
        return CheckLink(sock, leftover)

    async def _tunnel(self) -> None:
        seen = Seen("pin" if self._pins else "system" if self._config.ca is None else "ca")
        try:
            link = await self._dial(seen)
        except (NetworkError, ServerRefusedError) as error:
            self._dial_failed(seen, error)
        except LocalError as error:  # of a file, or a library
            socks = self._proxy is not None and self._proxy.is_socks
            self._fail("proxy" if socks else "tls", str(error), {}, "as it says")
        except trio.Cancelled:
            self._passed(seen, None)
            raise
        try:
            self._passed(seen, None)
            await self._greet(link)
            await self._round_trip(link)
        finally:
            await link.close()
        if self._idle is not None:
            await self._silence(self._idle)

    def _dial_failed(self, seen: Seen, error: NetworkError | ServerRefusedError) -> NoReturn:
        """Everything that the dial passed, then what it failed at."""
        text = str(error)
        if self._proxy is not None and seen.opened_at is None:
            evidence = {"proxy": str(self._proxy), "why": self._why}
            where = f"(the proxy is {self._proxy}, from {self._why})"
            self._fail("proxy", f"{text} {where}", evidence, advice.proxy(error))
        self._passed(seen, error)
        layer = error.layer if isinstance(error, NetworkError) else "http"
        if layer == "tls":
            issuer = seen.tls and seen.tls["issuer"]
            if issuer and issuer not in text:
                text += f" (the certificate that it showed was issued by {issuer})"
            then = advice.tls(error, pinned=bool(self._pins), proxied=self._proxy is not None)
            self._fail("tls", text, seen.tls or {}, then)
        if layer in ("name", "tcp"):  # it worked a moment ago and has been told: the next step is what is missing
            self._fail("tls", text, {}, advice.AGAIN)
        answer = seen.answer
        if answer is not None and answer.status == 401:
            self._report.refused = True
            evidence = http_evidence(answer)
            self._add("http", True, f"answered {_status(evidence)}", evidence)
            self._fail("authentication", text, evidence, advice.REFUSED)
        evidence = {} if answer is None else http_evidence(answer)
        shown = f" ({_status(evidence)})" if evidence and (evidence.keys() & {"server", "via"}) else ""
        refused = answer.status if isinstance(error, ServerRefusedError) and answer is not None else None
        self._report.refused = refused in (400, 403)
        then = advice.VERSION if refused == 400 else advice.http(answer, self._url, text)
        self._fail("http", text + shown, evidence, then)

    def _passed(self, seen: Seen, error: WstunnelError | None) -> None:
        """Report what a dial has behind it."""
        if seen.opened_at is None:
            return
        if self._proxy is not None:
            evidence = {"proxy": str(self._proxy), "why": self._why, "seconds": round(seen.opened_at, 6)}
            text = f"{self._proxy} ({self._why}) opened the way to {self._url.authority} in {duration(seen.opened_at)}"
            self._add("proxy", True, text, evidence)
        if seen.secured_at is None or isinstance(error, TrustError):
            return
        if seen.tls is None:
            loopback = address_family(self._url.host) is not None and self._url.host.startswith(("127.", "::1"))
            self._add("tls", True, "none: the URL begins with ws://", {}, None if loopback else advice.PLAIN)
        else:
            found = seen.tls
            seconds = seen.secured_at - seen.opened_at
            known = {"pin": "its key is the pinned one", "ca": "trusted by --ca"}.get(
                found["trusted_by"], "trusted by the system's store"
            )
            text = f"{found['version']}, {found['cipher']}; issued by {found['issuer']}; {known} ({duration(seconds)})"
            self._add("tls", True, text, {**found, "seconds": round(seconds, 6)})
        if error is None and seen.answer is not None and seen.answered_at is not None:
            evidence = http_evidence(seen.answer)
            seconds = seen.answered_at - seen.secured_at
            text = f"{_status(evidence)} ({duration(seconds)})"
            self._add("http", True, text, {**evidence, "seconds": round(seconds, 6)})
            self._add("authentication", True, "the server took the token", {})

    # --- the tunnel ---------------------------------------------------------------------------------------------------

    async def _greet(self, link: CheckLink) -> None:
        try:
            welcome = await link.greet(self._session)
        except NetworkError as error:
            self._report.refused = refused = isinstance(error, ClosedByPeerError) and error.code == 1008
            self._fail("tunnel", str(error), {}, advice.VERSION if refused else advice.TUNNEL)
        server, boot = logs.hash_id(welcome.server), logs.hash_id(welcome.boot)
        evidence = {
            "version": welcome.version, "features": list(welcome.features), "server": server, "boot": boot,
            "keepalive": welcome.keepalive, "resume_window": welcome.resume_window,
        }  # fmt: skip
        if welcome.version != VERSION:
            self._report.refused = True
            text = f"the server speaks version {welcome.version} of the tunnel protocol, this program {VERSION}"
            self._fail("tunnel", text, evidence, advice.VERSION)
        kept = welcome.resume_window
        window = f"streams without a connection are kept for up to {duration(kept)}" if kept else "streams end with it"
        features = " ".join(map(logs.escape, welcome.features)) or "none"
        self._add(
            "tunnel", True,
            f"wstunnel.{welcome.version}; features: {features}; {window}; server {server}, boot {boot}", evidence,
        )  # fmt: skip

    async def _round_trip(self, link: CheckLink) -> None:
        times: list[float] = []
        try:
            with trio.fail_after(limits.PONG_WITHIN_SECONDS):
                while len(times) < PINGS:
                    times.append(await link.ping())
        except (NetworkError, trio.TooSlowError) as error:
            text = str(error) or f"{PINGS} pings took longer than {limits.PONG_WITHIN_SECONDS:.0f} s"
            self._fail("round-trip", text, {"seconds": [round(each, 6) for each in times]}, advice.TUNNEL)
        least, median = min(times), statistics.median(times)
        self._add(
            "round-trip", True, f"{duration(least)} at least, {duration(median)} in the middle of {PINGS}",
            {"min": round(least, 6), "median": round(median, 6), "seconds": [round(each, 6) for each in times]},
        )  # fmt: skip

    async def _silence(self, longest: float) -> None:
        async def connect(quiet: int) -> tuple[CheckLink, int]:
            link = await self._dial()
            try:
                granted = (await link.greet(self._session, quiet=quiet)).quiet
                await link.ping()  # the server's own first one is behind us then
            except BaseException:
                await link.close()
                raise
            return link, granted

        measurement = Idle(connect, longest)
        try:
            await measurement.run()
        except WstunnelError as error:
            self._fail("idle", str(error), {}, advice.AGAIN)
        finally:  # also when it is cancelled: who interrupts it after an hour wants to know
            for step in measurement.steps():
                self._report.add(step)


def _status(evidence: dict[str, Any]) -> str:
    who = "".join(f", {name.title()}: {evidence[name]}" for name in ("server", "via") if name in evidence)
    return f"{evidence['status']} {evidence['reason']}".rstrip() + who


def _shortened(texts: list[str], most: int = 4) -> str:
    shown = ", ".join(texts[:most])
    return shown if len(texts) <= most else f"{shown} and {len(texts) - most} more"


def _is_refused(entry: dict[str, Any]) -> bool:
    return "refused" in str(entry.get("error", ""))


def _reason(error: OSError) -> str:
    text = error.strerror or str(error) or "unknown error"
    return text[0].lower() + text[1:]


def _nameservers(path: Path) -> str:
    """What the system's resolver asks, as far as its file says: `, nameserver 10.0.0.1`."""
    try:
        lines = path.read_text("ascii", "replace").splitlines()
    except OSError:
        return ""
    found = [parts[1] for line in lines if len(parts := line.split()) > 1 and parts[0] == "nameserver"]
    return f", nameserver {' '.join(map(logs.escape, found))}" if found else ""
