"""HTTP CONNECT, the client's side (RFC 9110 §9.3.6): asking a proxy for a way to the server, sans I/O.

connect = ConnectRequest("tunnel.example.org", 443, credentials=("user", "password"))
send(connect.request())
while not connect.feed(received): ...       # connect.eof() when the proxy closes, or after a while if `refused`
"""

from __future__ import annotations

import base64
import re
from typing import NoReturn

from wstunnel.errors import NetworkError
from wstunnel.wire.handshake import RefusalBody, escaped
from wstunnel.wire.http1 import Response, ResponseReader

_TLS_FIRST_BYTES = (0x15, 0x16)
# RFC 9110 §11.3: a challenge begins with its scheme; what has a `=` behind it is a parameter of the one before.
_SCHEME = re.compile(r"([-!#$%&'*+.^_`|~0-9A-Za-z]+)(?:[ \t]+|$)")
_FRAMING = re.compile(rb"\r\n(?:content-length|transfer-encoding):[^\r]*", re.IGNORECASE)
_WORDS_CHARACTERS = 120


class _AnswerReader(ResponseReader):
    """Reads the answer to a CONNECT, whose head may say of a body what is no answer elsewhere."""

    def _finish(self, head: bytes) -> Response | None:
        # RFC 9110 §9.3.6: "A client MUST ignore any Content-Length or Transfer-Encoding header fields received in a
        # successful response to CONNECT." h11, which knows of no CONNECT, would refuse what it cannot read.
        opened = head[len(b"HTTP/1.1 ") :].startswith(b"2")
        return super()._finish(_FRAMING.sub(b"", head) if opened else head)


class ConnectRequest:
    """One CONNECT on one connection. The caller dials, sends, receives and closes.

    Args:
        host: a name in ASCII or an address, without brackets.
        port: of the server.
        credentials: user and password for Basic authentication (RFC 7617), sent at once; None to send none.
        agent: what the proxy's log may call us.
    """

    def __init__(
        self, host: str, port: int, *, credentials: tuple[str, str] | None = None, agent: str | None = None
    ) -> None:
        self._target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._credentials = credentials
        self._agent = agent
        self._reader = _AnswerReader()
        self._heard = False
        self._body: RefusalBody | None = None

    @property
    def refused(self) -> bool:
        """The proxy has said no; `feed` waits for its words only."""
        return self._body is not None

    def request(self) -> bytes:
        """The request to send."""
        # RFC 9110 §7.2: Host has the target's authority, as in the request line.
        lines = [f"CONNECT {self._target} HTTP/1.1", f"Host: {self._target}"]
        if self._agent is not None:
            lines.append(f"User-Agent: {self._agent}")
        if self._credentials is not None:
            # RFC 7617 §2.1: UTF-8, which is what the servers that care ask for.
            pair = base64.b64encode(":".join(self._credentials).encode()).decode("ascii")
            lines.append(f"Proxy-Authorization: Basic {pair}")
        return "".join(line + "\r\n" for line in [*lines, ""]).encode("ascii")

    def feed(self, data: bytes) -> bool:
        """Take what the proxy sent.

        Returns:
            True once the way is open. False: more bytes are needed.

        Raises:
            NetworkError: `proxy`: it refused, it is no HTTP proxy, or bytes came behind its answer.
        """
        if not self._heard and data and data[0] in _TLS_FIRST_BYTES:
            raise NetworkError("proxy", "the proxy answered in TLS on this port: write https:// in its URL")
        self._heard = self._heard or bool(data)
        if self._body is None:
            try:
                response = self._reader.feed(data)
            except NetworkError as error:
                # The reader takes whoever answers for the server.
                text = str(error).replace("the server", "the proxy", 1).replace("in the URL", "in the proxy's URL")
                raise NetworkError("proxy", text) from error
            if response is None:
                return False
            data = self._reader.leftover
            if 200 <= response.status < 300:
                # What follows would be the server's, which waits for us to speak first.
                if data:
                    raise NetworkError("proxy", "the proxy sent bytes behind its answer, though the server sends none")
                return True
            self._body = RefusalBody(response)
        self._body.feed(data)
        if self._body.complete:
            raise self._refusal(self._body)
        return False

    def eof(self) -> NoReturn:
        """The proxy closed, or the caller waits no longer, while `feed` returned False. Always raises.

        Raises:
            NetworkError: `proxy`, with as much of the answer as came.
        """
        if self._body is not None:
            raise self._refusal(self._body)
        when = "in the middle of its answer" if self._heard else "without an answer"
        raise NetworkError("proxy", f"the proxy closed the connection {when}: check scheme and port of the proxy's URL")

    def _refusal(self, body: RefusalBody) -> NetworkError:
        response = body.response
        said = ": ".join([str(response.status), *self._words(body)])
        if response.status in (401, 407):  # tinyproxy refuses wrong credentials with 401
            return NetworkError("proxy", self._authentication(response, said))
        text = _MEANINGS.get(response.status)
        if text is None:
            text = _FAILED if response.status >= 500 else _OTHER
        return NetworkError("proxy", text.format(target=self._target, said=said))

    def _words(self, body: RefusalBody) -> list[str]:
        """What the proxy says besides the status: its first line, and what it tells machines."""
        words = [body.first_line()]
        # RFC 9209 §2, and what squid sends: the reason behind a page in HTML.
        words += [escaped(value) for name in ("proxy-status", "x-squid-error") for value in body.response.values(name)]
        return [word[:_WORDS_CHARACTERS] for word in dict.fromkeys(words) if word]

    def _authentication(self, response: Response, said: str) -> str:
        offered = [found[1] for text in response.elements("proxy-authenticate") if (found := _SCHEME.match(text))]
        schemes = [scheme for scheme in dict.fromkeys(offered) if scheme.isprintable()]
        if schemes and "basic" not in map(str.lower, schemes):
            return (
                f"the proxy wants {' or '.join(schemes)} authentication ({said}), and wstunnel speaks Basic only: run a"
                " helper on this machine that speaks it, such as cntlm or px, and name that one with --proxy"
            )
        if self._credentials is not None:
            return f"the proxy refused user and password ({said}): check both in the proxy's URL"
        return f"the proxy wants user and password ({said}): put them in its URL, http://USER:PASSWORD@HOST:PORT"


_UNREACHED = "the proxy could not reach {target} ({said}): check host and port of the server, and that it runs"
_NO_CONNECT = "the proxy does not do CONNECT ({said}): check that host and port in the proxy's URL are a proxy's"
_MEANINGS = {
    400: "the proxy did not understand CONNECT to {target} ({said}): check that host and port are a proxy's",
    403: (
        "the proxy does not allow {target} ({said}): ask the network's operator; many proxies allow port 443 only, so a"
        " server there may do"
    ),
    404: _NO_CONNECT,
    405: _NO_CONNECT,
    429: "the proxy had too many requests ({said}): try again later",
    501: _NO_CONNECT,
    502: _UNREACHED,
    503: _UNREACHED,
    504: _UNREACHED,
}
_FAILED = "the proxy failed to connect to {target} ({said})"
_OTHER = "the proxy refused to connect to {target} ({said})"
