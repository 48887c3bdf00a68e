"""Who issued the certificate that a server showed, accepted or not: so that whoever intercepts has a name.

Without `cryptography`, whose import would stop the client for a tenth of a second.
"""

from __future__ import annotations

import ssl
from typing import Any, Final

from wstunnel.logs import escape
from wstunnel.tls import der_element

_NAMES: Final = {b"\x55\x04\x03": "common name", b"\x55\x04\x0a": "organisation"}  # RFC 5280 §A.1: id-at 3 and 10
_TEXT_TAGS: Final = (b"\x0c", b"\x13", b"\x16", b"\x14")  # UTF8String, PrintableString, IA5String, TeletexString
_SHOWN_CHARACTERS: Final = 80
_DER: Final = 2  # _ssl.ENCODING_DER


def issuer_shown(sock: ssl.SSLSocket | ssl.SSLObject | None) -> str | None:
    """The issuer of the certificate that the peer of a TLS connection showed, for a message.

    Args:
        sock: after its handshake, or after that has failed; None is answered with None.

    Returns:
        as `"Example CA" (Example Ltd)`, escaped; None if no certificate came, or it cannot be read.
    """
    certificate = certificate_shown(sock)
    try:
        return None if certificate is None else issuer_name(certificate)
    except ValueError:
        return None


def certificate_shown(sock: Any) -> bytes | None:
    """The certificate that the peer showed, accepted or not, as DER; None if none came. `sock`: as `issuer_shown`."""
    # Public since Python 3.13. Before, OpenSSL's object has it, but `getpeercert` tells only of what was accepted.
    ask = getattr(sock, "get_unverified_chain", None) or getattr(
        getattr(sock, "_sslobj", None), "get_unverified_chain", None
    )
    try:
        chain = ask() if ask is not None else None
        if not chain:
            return None
        return chain[0] if isinstance(chain[0], bytes) else bytes(chain[0].public_bytes(_DER))
    except (OSError, ValueError, AttributeError):
        return None


def issuer_name(certificate: bytes) -> str | None:
    """Common name and organisation of a certificate's issuer; None if it has neither.

    Raises:
        ValueError: `certificate` is not one in DER.
    """
    # RFC 5280 §4.1: Certificate ::= SEQUENCE { SEQUENCE { [0] version, serialNumber, signature, issuer Name, ...
    start, end = der_element(certificate, 0, len(certificate), b"\x30")
    start, end = der_element(certificate, start, end, b"\x30")
    if certificate[start : start + 1] == b"\xa0":
        _, start = der_element(certificate, start, end, b"\xa0")
    for tag in (b"\x02", b"\x30"):
        _, start = der_element(certificate, start, end, tag)
    start, end = der_element(certificate, start, end, b"\x30")
    found: dict[str, str] = {}
    while start < end:
        # Name ::= SEQUENCE OF SET OF SEQUENCE { type OBJECT IDENTIFIER, value }
        inner, start = der_element(certificate, start, end, b"\x31")
        inner, attribute_end = der_element(certificate, inner, start, b"\x30")
        kind, value_at = der_element(certificate, inner, attribute_end, b"\x06")
        tag = certificate[value_at : value_at + 1]
        name = _NAMES.get(certificate[kind:value_at])
        if name is not None and tag in _TEXT_TAGS:
            value, value_end = der_element(certificate, value_at, attribute_end, tag)
            found.setdefault(name, certificate[value:value_end].decode("utf-8", "replace"))
    shown = {name: escape(text[:_SHOWN_CHARACTERS]) for name, text in found.items() if text}
    common, organisation = shown.get("common name"), shown.get("organisation")
    if common is None:
        return None if organisation is None else f'"{organisation}"'
    return f'"{common}" ({organisation})' if organisation is not None else f'"{common}"'
