"""What every command that dials a server shares: which one, by which way, and whom to trust."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wstunnel.cli import options
from wstunnel.errors import UsageError

if TYPE_CHECKING:
    from wstunnel.auth import LoginUrl
    from wstunnel.config import ClientConfig
    from wstunnel.upstream import Proxies

_SECRET_HEADERS = frozenset({"authorization", "cookie", "proxy-authorization"})


def flags(command: options.Command) -> options.Command:
    """Add `--profile`, `--ca`, `--pin` and the flags of `options.way_out`: what `configure` takes by these names."""
    for option in (
        options.way_out,
        click.option(
            "--pin",
            "pins",
            type=options.PIN,
            multiple=True,
            help="Trust this server key (and only pins). May be repeated.",
        ),
        click.option(
            "--ca",
            type=options.FILE,
            metavar="FILE",
            help="Trust these certificate authorities (PEM), not the system's.",
        ),
        options.profile,
    ):
        command = option(command)
    return command


def configure(
    urls: tuple[str, ...],
    *,
    profile: str | None,
    ca: Path | None,
    pins: tuple[bytes, ...],
    proxies: Proxies | None,
    headers: tuple[tuple[str, str], ...],
    server_name: str | None,
    **rest: Any,
) -> ClientConfig:
    """The configuration of a client of these servers, checked; warns of secrets that others can read.

    Args:
        urls: from the command line; empty means the environment's, else the profile's.
        profile, ca, pins, proxies, headers, server_name: from the flags.
        rest: further fields of `ClientConfig`.

    Raises:
        UsageError: there is no URL, one has no token and needs one, or a flag could not do what it promises.
    """
    from wstunnel import profiles
    from wstunnel.config import ClientConfig, needs_tunnel

    login_urls = profiles.client_urls(urls, os.environ, profile)
    ways = _ways(login_urls, proxies)
    tunnelled = needs_tunnel(rest.get("local_forwards", ()), rest.get("reverse_forwards", ()))
    for login_url in login_urls:
        if tunnelled:
            login_url.require_token()
        proxy = ways.choose(login_url)
        _check_trust(login_url, ca, pins, server_name, secure_proxy=proxy is not None and proxy.scheme == "https")
    _check_headers(headers, bearer=tunnelled or any(login_url.token is not None for login_url in login_urls))
    _warn_of_arguments(login_urls if urls else (), headers)
    return ClientConfig(
        url=login_urls[0],
        fallbacks=login_urls[1:],
        ca=ca,
        pins=pins,
        headers=headers,
        proxies=ways,
        server_name=server_name,
        **rest,
    )


def _ways(urls: tuple[LoginUrl, ...], given: Proxies | None) -> Proxies:
    """The proxies that --proxy names, else those of the environment; warns of a password among the arguments."""
    from wstunnel import logs
    from wstunnel.upstream import Proxies

    if given is None:
        return Proxies.from_environment(os.environ, {url.scheme for url in urls})
    if given.wss is not None and given.wss.user is not None:
        logs.logger("cli").warning(
            "the proxy's password is among this command's arguments, where every user of this machine can read it:"
            " set HTTPS_PROXY instead"
        )
    return given


def _warn_of_arguments(urls: tuple[LoginUrl, ...], headers: tuple[tuple[str, str], ...]) -> None:
    """Say which secrets the process list shows. `urls` are those that stand among the arguments."""
    from wstunnel import logs

    log = logs.logger("cli")
    if any(url.token is not None for url in urls):
        log.warning(
            "the token is among this command's arguments, where every user of this machine can read it:"
            " keep the URL with `wstunnel login`, or set WSTUNNEL_URL"
        )
    if any(url.query for url in urls):
        log.warning(
            "the URL's query, which may be a secret, is among this command's arguments, where every user of this"
            " machine can read it: set WSTUNNEL_URL"
        )
    for name, _ in headers:
        if name.lower() in _SECRET_HEADERS:
            log.warning(
                "a secret is among this command's arguments, where every user of this machine can read it",
                header=name,
            )


def _check_headers(headers: tuple[tuple[str, str], ...], *, bearer: bool) -> None:
    names = [name.lower() for name, _ in headers]
    for name in ("Host", "Authorization"):
        if names.count(name.lower()) > 1:
            raise UsageError(f"--header: {name} is given more than once")
    if bearer and "authorization" in names:
        raise UsageError("--header: Authorization carries the token of the login URL and cannot be set")


def _check_trust(
    url: LoginUrl, ca: Path | None, pins: tuple[bytes, ...], server_name: str | None, *, secure_proxy: bool
) -> None:
    """Refuse flags that could not do what they promise, and warn of a token that goes out in clear."""
    from wstunnel import logs

    log = logs.logger("cli")
    if url.scheme == "ws":
        given = {
            "--pin": bool(pins),
            "--ca": ca is not None and not secure_proxy,
            "--sni": server_name is not None,
        }
        flag = next((flag for flag, present in given.items() if present), None)
        if flag is not None:
            raise UsageError(
                f"{flag} does nothing with a ws:// URL, which has no TLS: the token would go out in clear;"
                f" use a wss:// URL, or leave {flag} out"
            )
        if not is_loopback(url.host):
            log.warning(
                "ws:// is not encrypted: everybody on the way can read the token and all data; use wss://",
                host=url.host,
            )
    elif ca is not None and (pins or url.pins) and not secure_proxy:
        log.warning("--ca is not used: the server's key is pinned, and then the pin alone decides", ca=ca)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it: a loopback address, without brackets, or a name for one."""
    import ipaddress

    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost" or host.lower().rstrip(".").endswith(".localhost")
