"""What a dial shows of the layers that it passes: the evidence for `check`."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any

import trio

from wstunnel import tls
from wstunnel.issuer import certificate_shown, issuer_name
from wstunnel.wire.handshake import escaped

if TYPE_CHECKING:
    from wstunnel.wire.http1 import Response

_FIELDS = ("server", "via", "location", "content-type", "www-authenticate", "proxy-authenticate")
"""Of an answer, those that tell who gave it."""


class Seen:
    """A `dialler.Watch` that remembers the times and the evidence of one dial.

    Args:
        trusted: by what the server is to be known: `pin`, `system` or `ca`.

    Attributes:
        opened_at: seconds from the start of the dial to the server's end of the way; None before.
        tls: evidence; None before the handshake ended, or without TLS.
        secured_at: likewise, the end of the TLS handshake, or the time when it was left out.
        answer: the head of what came for the upgrade.
        answered_at: likewise.
    """

    def __init__(self, trusted: str) -> None:
        self._began = trio.current_time()
        self._trusted = trusted
        self.opened_at: float | None = None
        self.tls: dict[str, Any] | None = None
        self.secured_at: float | None = None
        self.answer: Response | None = None
        self.answered_at: float | None = None

    def since(self, earlier: float | None) -> float:
        """Seconds since a time of this object; since the start for None."""
        return trio.current_time() - self._began - (earlier or 0.0)

    def opened(self) -> None:
        self.opened_at = self.since(None)

    def secured(self, peer: ssl.SSLSocket | None, error: Exception | None) -> None:
        if error is None:
            self.secured_at = self.since(None)
        if peer is not None:
            self.tls = tls_evidence(peer, self._trusted, accepted=error is None)

    def answered(self, response: Response) -> None:
        self.answered_at = self.since(None)
        self.answer = response


def tls_evidence(peer: ssl.SSLSocket, trusted: str, *, accepted: bool) -> dict[str, Any]:
    """What the server showed. `accepted`: the handshake came to its end; pins are judged later."""
    certificate = certificate_shown(peer) or b""
    if accepted:
        certificate = peer.getpeercert(binary_form=True) or certificate
    issuer = key = None
    try:
        issuer, key = issuer_name(certificate), tls.pin_text(tls.public_key_pin(certificate))
    except ValueError:
        pass  # there is none, or it cannot be read
    found: dict[str, Any] = {"issuer": issuer, "key": key, "trusted_by": trusted}
    if accepted:
        cipher = peer.cipher()
        found |= {"version": peer.version(), "cipher": cipher and cipher[0], "alpn": peer.selected_alpn_protocol()}
    return found


def http_evidence(response: Response) -> dict[str, Any]:
    """Status and reason of an answer, and the fields that tell whose it is; escaped."""
    found: dict[str, Any] = {"status": response.status, "reason": escaped(response.reason)}
    for name in _FIELDS:
        value = response.value(name)
        if value is not None:
            found[name.replace("-", "_")] = escaped(value)
    return found
