"""A way to the server through a proxy: connect to the proxy, ask it, and hand over a socket that leads to the server.

What goes wrong on this stretch is of layer `proxy`. The server's TLS is the caller's business: nothing of the token has
been seen by the proxy, and with `wss` nothing ever is.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from wstunnel import limits, tls, tls_relay
from wstunnel.dial import DialServer, dial_server
from wstunnel.errors import LocalError, NetworkError, TrustError
from wstunnel.issuer import issuer_shown
from wstunnel.targets import address_family
from wstunnel.transport import Transport
from wstunnel.upstream import ProxyUrl
from wstunnel.wire.connect import ConnectRequest

REFUSAL_SECONDS = 1.0
"""How long a proxy that has said no may go on saying why."""
SOCKS_ADDRESSES = 4
"""Most addresses of the server that a `socks5` proxy is asked for, one after the other."""
SOCKS_EXTRA = "pip install python-socks"
# RFC 1928 §6. Of these another address of the server may fare better.
_ADDRESS_AT_FAULT = frozenset({3, 4, 5, 6, 8})
_SOCKS_MEANINGS = {
    1: "failed",
    2: "does not allow it: ask its operator",
    3: "has no route to that network",
    4: "cannot reach that host",
    5: "says that the connection was refused: check host and port of the server, and that it runs",
    6: "says that the time to live ran out",
    7: "does not know the command CONNECT",
    8: "does not know this kind of address: try socks5:// instead of socks5h://, or the other way round",
}


@dataclass(slots=True)
class Stage:
    """How far a dial has come: what to say when its time is over."""

    layer: str
    text: str

    def set(self, layer: str, text: str) -> None:
        self.layer, self.text = layer, text


def check_socks() -> None:
    """See to it that SOCKS proxies can be spoken to at all.

    Raises:
        LocalError: python-socks is not installed; says how to.
    """
    try:
        import python_socks  # noqa: F401
    except ImportError:
        raise LocalError(f"SOCKS proxies need the library python-socks: {SOCKS_EXTRA}") from None


@dataclass(frozen=True, slots=True)
class ProxyTunnel:
    """Opens ways through one proxy.

    Args:
        proxy: which.
        context: for TLS to the proxy itself; None unless it is `https`.
        relays: run by the caller: TLS in TLS needs tasks that live as long as the connections; None unless it is
            `https`.
        family: AF_INET or AF_INET6 to dial the proxy by, or None.
        agent: what a CONNECT says who asks.
        dial: connects to the proxy, as `dial_server` does; None is that itself.
    """

    proxy: ProxyUrl
    context: ssl.SSLContext | None = None
    relays: tls_relay.Relays | None = None
    family: socket.AddressFamily | None = None
    agent: str | None = None
    dial: DialServer | None = None

    async def open(self, host: str, port: int, stage: Stage) -> socket.socket:
        """Connect to the server through the proxy. The caller sets the deadline.

        Args:
            host: of the server, without brackets.
            port: of the server.
            stage: is kept up to date.

        Returns:
            a non-blocking socket that leads to the server; the caller owns and closes it.

        Raises:
            NetworkError: `proxy`; `name` if this machine should resolve the server's name and cannot.
            TrustError: an `https` proxy did not prove who it is. User and password were not sent.
        """
        if self.proxy.is_socks:
            return await self._socks(host, port, stage)
        sock = await self._dial(stage)
        stage.set("proxy", f"the proxy {self.proxy.authority} did not answer")
        request = ConnectRequest(host, port, credentials=self._credentials(), agent=self.agent)
        try:
            if self.proxy.scheme == "https":
                return await self._connect_in_tls(sock, request, stage)
            transport = Transport(sock)
            try:
                await _ask(request, transport.send, transport.receive)
                return transport.detach()
            finally:
                transport.close()
        except OSError as error:
            raise self._broken(error) from error

    def _credentials(self) -> tuple[str, str] | None:
        return None if self.proxy.user is None else (self.proxy.user, self.proxy.password)

    def _broken(self, error: OSError) -> NetworkError:
        return NetworkError(
            "proxy", f"the connection to the proxy {self.proxy.authority} broke: {error.strerror or error}"
        )

    async def _dial(self, stage: Stage) -> socket.socket:
        stage.set("proxy", f"cannot connect to the proxy {self.proxy.authority}: no answer")
        try:
            return await (self.dial or dial_server)(self.proxy.host, self.proxy.port, family=self.family)
        except NetworkError as error:
            reason = str(error).removeprefix(f"cannot connect to {self.proxy.authority}: ")
            raise NetworkError("proxy", f"cannot connect to the proxy {self.proxy.authority}: {reason}") from error

    async def _connect_in_tls(self, sock: socket.socket, request: ConnectRequest, stage: Stage) -> socket.socket:
        assert self.context is not None
        assert self.relays is not None
        stage.set("proxy", f"the proxy {self.proxy.authority} did not finish the TLS handshake")
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        # Proxies seldom say the end of TLS before that of TCP; what is inside has an end of its own.
        outer = trio.SSLStream(stream, self.context, server_hostname=self.proxy.host, https_compatible=True)
        near = far = None
        try:
            try:
                await outer.do_handshake()
            except trio.BrokenResourceError as error:
                raise self._untrusted(error, outer) from error
            stage.set("proxy", f"the proxy {self.proxy.authority} did not answer")
            try:
                await _ask(request, outer.send_all, outer.receive_some)
            except trio.BrokenResourceError as error:
                cause = error.__cause__ if isinstance(error.__cause__, OSError) else OSError(str(error))
                raise self._broken(cause) from error
            near, far = tls_relay.pair()
            self.relays.start(far, outer)
        except BaseException:
            for end in (near, far, stream.socket):
                if end is not None:
                    end.close()
            raise
        return near

    def _untrusted(self, error: trio.BrokenResourceError, outer: trio.SSLStream[trio.SocketStream]) -> NetworkError:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else ConnectionResetError(str(error))
        translated = tls.translate_tls_error(
            cause, f"the proxy {self.proxy.authority}", issuer=issuer_shown(getattr(outer, "_ssl_object", None)),
            plain="http:// in the proxy's URL", pinned=False,
        )  # fmt: skip
        if isinstance(translated, TrustError):
            return translated
        return NetworkError("proxy", str(translated).replace("the server", "it", 1))

    # --- SOCKS --------------------------------------------------------------------------------------------------------

    async def _socks(self, host: str, port: int, stage: Stage) -> socket.socket:
        check_socks()
        addresses = [host]
        if self.proxy.scheme == "socks5" and address_family(host) is None:
            stage.set("name", f"{host}: no answer from the resolver")
            addresses = (await _resolve(host, port))[:SOCKS_ADDRESSES]
        for address in addresses[:-1]:
            try:
                return await self._socks_once(address, port, stage)
            except _AddressError:
                pass  # the next one's may be the better answer
        return await self._socks_once(addresses[-1], port, stage)

    async def _socks_once(self, host: str, port: int, stage: Stage) -> socket.socket:
        from python_socks import ProxyError, ProxyType
        from python_socks.async_.trio import Proxy

        name = f"the proxy {self.proxy.authority}"
        first = _Dialled(lambda: self._dial(stage), stage, f"{name} did not answer")
        user, password = self._credentials() or (None, None)
        proxy = Proxy(ProxyType.SOCKS5, self.proxy.host, self.proxy.port, user, password, rdns=True, forward=first)  # type: ignore[arg-type]
        try:
            await proxy.connect(host, port, timeout=2 * limits.HANDSHAKE_SECONDS)  # the caller's deadline comes first
        except ProxyError as error:
            target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            code = error.error_code
            if code is not None:
                kind = _AddressError if code in _ADDRESS_AT_FAULT else NetworkError
                meaning = _SOCKS_MEANINGS.get(code, f"refused ({error})")
                raise kind("proxy", f"{name}, asked for {target}, {meaning}") from error
            raise NetworkError("proxy", f"{name}: {_socks_fault(str(error), user is not None)}") from error
        except OSError as error:
            raise self._broken(error) from error
        except ValueError as error:  # text that is none in the answer, or a name too long for SOCKS
            raise NetworkError("proxy", f"{name} answered something that is not SOCKS5: {error}") from error
        return first.taken()


class _AddressError(NetworkError):
    """The proxy could not reach this address of the server."""


class _Dialled:
    """Stands where python-socks takes a proxy before the proxy: so the way there is dialled as everything is here."""

    def __init__(self, dial: Callable[[], Awaitable[socket.socket]], stage: Stage, text: str) -> None:
        self._dial = dial
        self._stage = stage
        self._text = text
        self._socket: socket.socket | None = None

    async def connect(self, **_: object) -> trio.socket.SocketType:
        self._socket = await self._dial()
        self._stage.set("proxy", self._text)
        return trio.socket.from_stdlib_socket(self._socket)

    def taken(self) -> socket.socket:
        """The connection itself, when python-socks is done."""
        assert self._socket is not None
        return self._socket


def _socks_fault(text: str, with_credentials: bool) -> str:
    """What python-socks says, in other words where there is something to be done."""
    lower = text.lower()
    if (
        "no acceptable" in lower
        or "unexpected socks authentication" in lower
        or "invalid authentication method" in lower
    ):
        if with_credentials:
            return "it takes neither no authentication nor user and password: other methods are not supported"
        return "it wants user and password: put them in its URL, socks5://USER:PASSWORD@HOST:PORT"
    if "password authentication failure" in lower:
        return "it refused user and password: check both in the proxy's URL"
    if "closed unexpectedly" in lower:
        return "it closed the connection without an answer: check that host and port are a SOCKS proxy's"
    if "version number" in lower:
        return "it answered something that is not SOCKS5: check scheme, host and port of the proxy's URL"
    return f"it answered something that is not SOCKS5 ({text})"


async def _resolve(host: str, port: int) -> list[str]:
    try:
        found = await trio.to_thread.run_sync(
            lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), abandon_on_cancel=True
        )
    except (OSError, UnicodeError) as error:
        raise NetworkError(
            "name",
            f"{host}: this machine cannot resolve the name; behind a proxy that is common: with socks5h:// the proxy"
            " resolves it",
        ) from error
    return list(dict.fromkeys(str(answer[4][0]) for answer in found))


async def _ask(
    request: ConnectRequest,
    send: Callable[[bytes], Awaitable[None]],
    receive: Callable[[int], Awaitable[bytes | bytearray]],
) -> None:
    """Send a CONNECT, and wait until the way is open.

    Raises:
        NetworkError: `proxy`.
    """
    await send(request.request())
    with trio.CancelScope() as scope:
        while not request.feed(bytes(data := await receive(limits.HEAD_BYTES))):
            if not data:
                request.eof()
            if request.refused:
                scope.deadline = min(scope.deadline, trio.current_time() + REFUSAL_SECONDS)
    if scope.cancelled_caught:
        request.eof()
