"""What each role is told to do: frozen, typed, already checked. Built by the command line, read by the roles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wstunnel import limits

if TYPE_CHECKING:
    from wstunnel.auth import LoginUrl
    from wstunnel.forwards import Forward
    from wstunnel.front import Source
    from wstunnel.plain_endpoints import Endpoint
    from wstunnel.policy import ListenRule, Rule
    from wstunnel.upstream import Proxies


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """`wstunnel server`.

    `bind` holds IP addresses without brackets, `bind_unix` paths with the mode of the file; with neither it is all
    addresses, IPv4 and IPv6. Connections from `proxy_protocol` begin with a PROXY header; X-Forwarded-For and Forwarded
    are believed from `trust_proxy`. `cert` and `key` are PEM files, both or
    neither; with neither the server makes its own in `state_dir`. `allow` empty means the default policy,
    `allow_listen` empty that no client may have it listen anywhere. `sources` are IP addresses of this machine.
    `max_resume_window` is in seconds; 0 means that streams end with their links. `udp_timeout` is, too. No two
    `endpoints` have one path, and none has the tunnel's; `allow_origins` are as `parse_origin` returns them.
    """

    port: int = 443
    bind: tuple[str, ...] = ()
    bind_unix: tuple[tuple[str, int], ...] = ()
    proxy_protocol: tuple[Source, ...] = ()
    trust_proxy: tuple[Source, ...] = ()
    path: str = "/"
    plain: bool = False
    cert: Path | None = None
    key: Path | None = None
    allow: tuple[Rule, ...] = ()
    allow_listen: tuple[ListenRule, ...] = ()
    sources: tuple[str, ...] = ()
    max_resume_window: int = limits.MAX_RESUME_WINDOW_SECONDS
    udp_timeout: int = limits.UDP_IDLE_SECONDS
    endpoints: tuple[Endpoint, ...] = ()
    endpoint_auth: Literal["token", "none"] = "token"
    endpoint_text: bool = False
    allow_origins: tuple[str, ...] = ()
    state_dir: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """`wstunnel client`.

    `ca` is a PEM file that replaces the system's trust store. `pins` are SHA-256 digests (32 bytes) of public keys;
    with any pin, from here or from the URL, the pins alone decide. `resume_window` is in seconds; 0 means that streams
    end with their links. `udp_timeout` is in seconds, for datagram flows. `fallbacks` are tried in turn when the server
    of `url` is away. `proxies` None: every server is dialled directly. `server_name` is what TLS asks for and verifies
    instead of the URL's host. `ip_version` None: both. `headers` may hold secrets. `dynamic_login` is the user and
    password that applications must give to those of `local_forwards` that are proxies.
    """

    url: LoginUrl
    fallbacks: tuple[LoginUrl, ...] = ()
    local_forwards: tuple[Forward, ...] = ()
    reverse_forwards: tuple[Forward, ...] = ()
    dynamic_login: tuple[bytes, bytes] | None = None
    ca: Path | None = None
    pins: tuple[bytes, ...] = ()
    idle_links: int = limits.IDLE_LINKS
    resume_window: int = limits.RESUME_WINDOW_SECONDS
    udp_timeout: int = limits.UDP_IDLE_SECONDS
    exit_on_forward_failure: bool = False
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    proxies: Proxies | None = None
    server_name: str | None = None
    ip_version: Literal[4, 6] | None = None

    @property
    def tunnelled(self) -> bool:
        """Whether a session with the server is needed: not if each forward dials it as a plain endpoint."""
        return needs_tunnel(self.local_forwards, self.reverse_forwards)


def needs_tunnel(local: Sequence[Forward], reverse: Sequence[Forward]) -> bool:
    """Whether these forwards of a client, or none at all, need a session with the server."""
    return bool(reverse) or not local or not all(forward.raw for forward in local)
