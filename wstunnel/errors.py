"""The one tree of errors. Each says who is at fault and carries its answer on the wire or its exit code.

    WstunnelError
    ├── UsageError          the command line or a grammar: exit 2
    ├── LocalError          this machine: a port in use, a file unreadable: exit 1
    ├── ServerRefusedError  the server said no (credentials, policy, version): exit 3
    ├── NetworkError        the way to the server: name, TCP, TLS, HTTP: exit 1, or try again
    │   └── TrustError      the server could not prove who it is: exit 1, never tried again at start
    ├── HandshakeError      the HTTP peer broke the rules: an HTTP status
    ├── ProtocolError       the WebSocket peer broke the rules: a close code, for that link only
    └── StreamError         one stream cannot go on: a reset code

Foreign exceptions (OSError, ssl.SSLError, h11, msgspec) are translated once, where they come in.
"""

from __future__ import annotations


class WstunnelError(Exception):
    """Base of every error that this package raises on purpose. `str()` is one line for a person."""

    exit_code = 1


class UsageError(WstunnelError):
    """The command line, or a text with a grammar, is wrong.

    Args:
        message: what is wrong.
        text: the offending text as given, if there is one.
        position: index in `text` of the part at fault, for the caret.
        grammar: what would have been right.
    """

    exit_code = 2

    def __init__(self, message: str, *, text: str | None = None, position: int = 0, grammar: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.text = text
        self.position = position
        self.grammar = grammar

    def __str__(self) -> str:
        lines = [self.message]
        if self.text is not None:
            shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in self.text)
            lines += [f"    {shown}", "    " + " " * min(self.position, len(self.text)) + "^"]
        if self.grammar:
            lines += [f"expected: {self.grammar}"]
        return "\n".join(lines)


class LocalError(WstunnelError):
    """This machine would not: a port in use, no permission, an unreadable file. One clear line."""


class ServerRefusedError(WstunnelError):
    """The server understood and said no: credentials, policy or version. Trying again will not help."""

    exit_code = 3


class NetworkError(WstunnelError):
    """The server was not reached. `layer` is one of `name`, `tcp`, `proxy`, `tls`, `http`, `websocket`, `tunnel`."""

    def __init__(self, layer: str, message: str) -> None:
        super().__init__(message)
        self.layer = layer


class TrustError(NetworkError):
    """The server did not prove who it is (certificate or pin). The token was not sent."""

    def __init__(self, message: str) -> None:
        super().__init__("tls", message)


class HandshakeError(WstunnelError):
    """An HTTP head that is answered with `status` and a closed connection.

    Args:
        status: the HTTP status code, 400 to 599.
        message: the reason, safe to show to a stranger.
        headers: extra header fields of the answer.
    """

    def __init__(self, status: int, message: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


class ProtocolError(WstunnelError):
    """The peer broke RFC 6455 or the tunnel protocol: the link is closed with `code`, nothing else is touched.

    Args:
        code: a close code of RFC 6455 §7.4.1, 1002 unless the section says another.
        message: the reason sent in the close frame (cut to 123 bytes there).
    """

    def __init__(self, message: str, code: int = 1002) -> None:
        super().__init__(message)
        self.code = code


class StreamError(WstunnelError):
    """One stream cannot go on. `code` is a reset code of docs/reference/protocol.md."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
