"""Several servers, tried in turn: all links of a session go to one, until that one is away."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from weakref import WeakSet

import trio

from wstunnel import logs, sockets, tls
from wstunnel.auth import LoginUrl
from wstunnel.config import ClientConfig
from wstunnel.dial import DialServer
from wstunnel.dialler import AGENT, ServerDialler, Watch
from wstunnel.errors import NetworkError, TrustError
from wstunnel.proxy_tunnel import ProxyTunnel, check_socks
from wstunnel.tls_relay import Relays

STAY_SECONDS = 5.0
"""How long a server that is away keeps a session whose streams wait for it: they can go on nowhere else. Applications
wait 10 s for a link, so those that come meanwhile still get one at the next server."""

_log = logs.logger("client")


class Failover:
    """Dials the current server, and when that one is away the others: one round over all makes a dial.

    A server is left only when none of the links that were made to it lives, and not while streams wait to be resumed
    there, for STAY_SECONDS. It is returned to when the one in use is away.

    Args:
        diallers: one a server, in the order in which they are tried; at least one.

    Attributes:
        streams_wait: says whether there are streams that only the current server can resume. Set by the owner.
    """

    def __init__(self, diallers: Sequence[ServerDialler]) -> None:
        self._diallers = list(diallers)
        self._current = 0
        self._links: WeakSet[socket.socket] = WeakSet()  # closed by whoever got them
        self._away_since: float | None = None
        self._moves = 0  # since a server was last reached
        self.streams_wait: Callable[[], bool] = lambda: False

    @property
    def url(self) -> LoginUrl:
        """Of the server that is dialled now."""
        return self._diallers[self._current].url

    async def dial(self) -> tuple[socket.socket, bytes]:
        """Connect to the current server, or to the next one that is there; see `ServerDialler.dial`.

        Raises:
            ServerRefusedError: a server refused. The others are not tried: it is there.
            TrustError: none could be reached, and each failed to prove who it is.
            NetworkError: none could be reached, or the one in use could not and may not be left yet.
        """
        tried: dict[int, NetworkError] = {}
        while True:
            at = self._current
            try:
                sock, leftover = await self._diallers[at].dial()
            except NetworkError as error:
                tried[at] = error
                if at == self._current and not self._leave(error):
                    raise
            else:
                if at == self._current:
                    self._links.add(sock)
                    self._away_since = None
                    self._moves = 0
                    return sock, leftover
                sockets.reset(sock)  # another dial has moved on meanwhile
            if self._current in tried:
                raise _most_telling(tried)

    def failed(self, error: NetworkError) -> None:
        """The server was connected to and is of no use: it is stopping, or it closes its links at once.

        The next dial is to another one, on the conditions of a dial that failed.
        """
        self._leave(error)

    def _leave(self, error: NetworkError) -> bool:
        """Make the next server the current one, if this one may be left. Returns whether it was."""
        if len(self._diallers) == 1 or any(link.fileno() != -1 for link in self._links):
            return False
        if self.streams_wait():
            now = trio.current_time()
            if self._away_since is None:
                self._away_since = now
            if now - self._away_since < STAY_SECONDS:
                return False
        left = self.url
        self._current = (self._current + 1) % len(self._diallers)
        self._links.clear()
        self._moves += 1
        # One round says it all, the last server's reason too. While every server is away there is another one every few
        # seconds.
        log = _log.info if self._moves <= len(self._diallers) else _log.debug
        log("trying the next server", left=str(left), server=str(self.url), layer=error.layer, reason=str(error))
        return True


def _most_telling(tried: dict[int, NetworkError]) -> NetworkError:
    """Of what the servers' dials failed with: one that may pass by itself before one that will not; the first such."""
    errors = list(tried.values())
    return next((error for error in errors if not isinstance(error, TrustError)), errors[0])


def make_dialler(config: ClientConfig, relays: Relays, *, endpoint: bool = False) -> Failover:
    """What dials the servers of a client's configuration, each by the way that leads to it.

    Args:
        config: the servers, whom to trust, and which proxies there are.
        relays: for proxies that are spoken to in TLS; the caller runs them.
        endpoint: the URLs are dialled as plain endpoints.

    Raises:
        LocalError: `ca` could not be read, or the library for a SOCKS proxy is missing.
        UsageError: a URL has no token and needs one.
    """
    return Failover([dialler_of(config, url, relays, endpoint=endpoint) for url in (config.url, *config.fallbacks)])


def family_of(config: ClientConfig) -> socket.AddressFamily | None:
    """The only family of addresses that may be dialled; None: both."""
    if config.ip_version is None:
        return None
    return socket.AF_INET if config.ip_version == 4 else socket.AF_INET6


def dialler_of(
    config: ClientConfig,
    url: LoginUrl,
    relays: Relays,
    *,
    endpoint: bool = False,
    dial: DialServer | None = None,
    watch: Watch | None = None,
) -> ServerDialler:
    """What dials one server by the way that leads to it.

    Args:
        config, relays, endpoint: as for `make_dialler`.
        url: of that server.
        dial: connects to it, or to the proxy; None: `dial_server`.
        watch: see `ServerDialler`.

    Raises:
        LocalError, UsageError: as `make_dialler`.
    """
    family = family_of(config)
    pins = config.pins or url.pins
    proxy = None if config.proxies is None else config.proxies.choose(url)
    tunnel = None
    if proxy is not None:
        if proxy.is_socks:
            check_socks()
        # Pins are the server's: a proxy is known by the system's authorities, or by `ca`.
        context = tls.client_context(config.ca, ()) if proxy.scheme == "https" else None
        tunnel = ProxyTunnel(proxy, context, relays=relays, family=family, agent=AGENT, dial=dial)
    return ServerDialler(
        url,
        tls.client_context(config.ca, pins) if url.scheme == "wss" else None,
        pins=pins,
        headers=config.headers,
        server_name=config.server_name,
        family=family,
        proxy=tunnel,
        endpoint=endpoint,
        dial=dial,
        watch=watch,
    )
