"""What a user may do about each failure that `check` finds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from wstunnel.errors import NetworkError, TrustError
from wstunnel.wire.handshake import TOO_MANY_LINKS, TRY_AGAIN_LATER

if TYPE_CHECKING:
    from wstunnel.auth import LoginUrl
    from wstunnel.errors import WstunnelError
    from wstunnel.wire.http1 import Response

NAME: Final = (
    "check the host in the URL, and this machine's DNS (`getent hosts HOST`). Where a network lets only its proxy out "
    "names are often not resolved: give the proxy with --proxy or HTTPS_PROXY"
)
NO_ROUTE: Final = "see that this machine's network is up, and that it has IPv4 or IPv6 as the server has"
TCP_REFUSED: Final = "nothing listens there: see that the server runs, and that the port is the one in the URL"
TCP_SILENT: Final = (
    "a firewall drops the packets, or the address is wrong. Ask for the port to be let through, run the server on "
    "port 443, or give the network's proxy with --proxy or HTTPS_PROXY"
)
TCP_SOME: Final = "addresses that do not answer make each connection slower: mend them, or use -4 or -6"
PROXY_REACH: Final = "check host and port of the proxy; `--proxy none` goes without it"
PROXY_ANSWER: Final = (
    "check scheme, host, port, user and password of the proxy's URL, and that the server runs on a port that the proxy "
    "lets through: many only 443. Its operator knows more; `--proxy none` goes without it"
)
PROXY_NAMES: Final = "write socks5h:// in the proxy's URL: then the proxy resolves the server's name"
PROXY_TRUST: Final = (
    "a proxy is known by its certificate, and a pin is the server's only: name the authority that issued the proxy's "
    "with --ca, and check that its host in the URL is the name in the certificate"
)
PLAIN: Final = "ws:// is not encrypted: everybody on the way can read the token and all data; use wss://"
PIN_WRONG: Final = (
    "another key answered than that of the login URL. If the issuer is your network's own proxy, it intercepts: with a "
    "pin it cannot be passed, so ask for an exception. If the server was set up anew, take a new login URL from "
    "`wstunnel invite`"
)
TRUST: Final = (
    "use the whole login URL from `wstunnel invite`, with what follows its #. If the issuer is your network's own "
    "proxy, it intercepts, and reads all that goes through it: if you trust it, name its authority with --ca"
)
TLS_OTHER: Final = (
    "check the port, and whether the URL should begin with ws://. If both are right something on the way does not let "
    "TLS through: give the network's proxy with --proxy, or ask its operator"
)
TLS_BEHIND_PROXY: Final = (
    "check the port, and whether the URL should begin with ws://. If both are right the proxy, or something behind it, "
    "does not let TLS through to that port: ask its operator; `--proxy none` goes without it"
)
NO_HTTP: Final = (
    "something accepted the connection, and what it answers, if anything, is no HTTP: another service has the port, or "
    "a firewall swallows what it does not know. Check the URL, and use wss:// on port 443"
)
AGAIN: Final = "the same worked a moment ago: try again, and if it comes and goes look for what limits connections"
REFUSED: Final = "take a new login URL from `wstunnel invite` on the server, then `wstunnel login`"
VERSION: Final = "install versions of wstunnel on both sides that fit together"
TUNNEL: Final = (
    "the upgrade passed and messages do not: a proxy on the way keeps them back, or cuts. See that it passes "
    "WebSockets on without buffering them (nginx: proxy_http_version 1.1, Upgrade and Connection), and the server's log"
)
_STRIPPED: Final = (
    "a proxy on the way took the upgrade out of the request: in front of the server it must speak HTTP/1.1 and pass "
    "Upgrade and Connection on (nginx: proxy_http_version, proxy_set_header); in the client's network wss:// hides the "
    "request from it"
)
_ALTERED: Final = (
    "the path in the URL may be a plain endpoint's, or another program's. Else a proxy on the way alters the answer: "
    "in front of the server it must pass it on as it is; in the client's network wss:// hides the answer from it"
)
_UNREACHED: Final = "the proxy in front of the server could not reach it: see that the server runs where it leads to"
BUSY: Final = (
    "the proxy in front of the server could not reach it, or has no room: see that the server runs where it leads to, "
    "and what the proxy's own log says"
)
BUSY_LINKS: Final = (
    "the server runs, and this user has as many links as it lets one have: end clients of theirs that are not needed, "
    "or give the server more open files (`ulimit -n`, systemd's LimitNOFILE=)"
)
BUSY_USERS: Final = "the server runs, and cannot read its users: its log says which file, and why"
_PAGE: Final = (
    "an ordinary web page came. In a guest network it is the log-in page: open http://example.com in a browser and log "
    "in. Else a web server has this host or path: check the URL, or the proxy in front of the server"
)
_BY_STATUS: Final = {
    400: _STRIPPED,
    403: "the server, or a firewall or proxy on the way, forbids it: ask its operator. Server and Via tell whose",
    404: "the path in the URL is not the server's --path, or another web server has this host: check host and path",
    407: "a proxy on the way wants credentials: give it by --proxy http://USER:PASSWORD@HOST:PORT",
    408: "try again; the network or the server is slow",
    426: _STRIPPED,
    429: "wait, then try again; or raise the limit of the proxy in front of the server",
    502: _UNREACHED,
    503: BUSY,
    504: _UNREACHED,
    505: _STRIPPED,  # nginx speaks HTTP/1.0 to the server unless it is told otherwise
}


def tls(error: WstunnelError, *, pinned: bool, proxied: bool) -> str:
    """After a failed TLS handshake, perhaps through a proxy."""
    if not isinstance(error, TrustError):
        return TLS_BEHIND_PROXY if proxied else TLS_OTHER
    return PIN_WRONG if pinned else TRUST


def proxy(error: WstunnelError) -> str:
    """After a proxy that was connected to did not open the way."""
    if isinstance(error, TrustError):
        return PROXY_TRUST
    by_us = isinstance(error, NetworkError) and error.layer == "name"
    return PROXY_NAMES if by_us else PROXY_ANSWER


def http(response: Response | None, url: LoginUrl, said: str = "") -> str:
    """After an answer that is no upgrade, or none at all; `said` holds the first line of its body."""
    if response is None:
        return NO_HTTP
    status = response.status
    if status == 101:
        return _ALTERED
    if 300 <= status < 400:
        return (
            "the server sends clients elsewhere. If that is a log-in page of the network, log in with a browser; if it "
            "is the right server, put that address into the URL"
        )
    if status < 300:
        return _PAGE
    if status == 503 and f"(503: {TOO_MANY_LINKS})" in said:
        return BUSY_LINKS
    if status == 503 and f"(503: {TRY_AGAIN_LATER})" in said:
        return BUSY_USERS
    if status == 400 and url.scheme == "ws":
        return f"the port may speak TLS: try wss://. Else {_STRIPPED}"
    return _BY_STATUS.get(status, "check the URL; what answered says more in its own log")
