"""What each role is told to do: frozen, typed, already checked. Built by the command line, read by the roles."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from wstunnel import limits

if TYPE_CHECKING:
    from wstunnel.auth import LoginUrl
    from wstunnel.forwards import Forward
    from wstunnel.policy import Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """`wstunnel server`.

    `bind` holds IP addresses without brackets; empty means all, IPv4 and IPv6. `cert` and `key` are PEM files, both or
    neither; with neither the server makes its own in `state_dir`. `allow` empty means the default policy.
    `max_resume_window` is in seconds; 0 means that streams end with their links.
    """

    port: int = 443
    bind: tuple[str, ...] = ()
    path: str = "/"
    plain: bool = False
    cert: Path | None = None
    key: Path | None = None
    allow: tuple[Rule, ...] = ()
    max_resume_window: int = limits.MAX_RESUME_WINDOW_SECONDS
    state_dir: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """`wstunnel client`.

    `ca` is a PEM file that replaces the system's trust store. `pins` are SHA-256 digests (32 bytes) of public keys;
    with any pin, from here or from the URL, the pins alone decide. `resume_window` is in seconds; 0 means that streams
    end with their links.
    """

    url: LoginUrl
    local_forwards: tuple[Forward, ...] = ()
    ca: Path | None = None
    pins: tuple[bytes, ...] = ()
    idle_links: int = limits.IDLE_LINKS
    resume_window: int = limits.RESUME_WINDOW_SECONDS
    exit_on_forward_failure: bool = False
    headers: tuple[tuple[str, str], ...] = field(default=())
