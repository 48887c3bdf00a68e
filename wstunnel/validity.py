"""When a certificate is valid, and what its owner should know of that.

Not by `cryptography`, for the reason that `tls.py` has not to read keys with it: it costs a tenth of the start-up.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from wstunnel.tls import der_element

SOON: Final = timedelta(days=14)
"""A certificate that lives for 90 days is commonly renewed 30 days before its end: that has failed for a while then."""

# Tags of X.690 §8, as the first byte of an element.
_INTEGER: Final = b"\x02"
_UTC_TIME: Final = b"\x17"
_GENERALIZED_TIME: Final = b"\x18"
_SEQUENCE: Final = b"\x30"
_VERSION: Final = b"\xa0"

_TIMES: Final = {
    _UTC_TIME: re.compile(rb"(\d\d)" * 6 + rb"Z"),
    _GENERALIZED_TIME: re.compile(rb"(\d{4})" + rb"(\d\d)" * 5 + rb"Z"),
}


def validity(cert: bytes) -> tuple[datetime, datetime]:
    """From when to when a certificate is valid.

    Args:
        cert: as DER.

    Raises:
        ValueError: it is not a certificate.
    """
    # Certificate ::= SEQUENCE { TBSCertificate ::= SEQUENCE { version [0] DEFAULT v1, serialNumber, signature, issuer,
    # validity, ... }, ... }
    start, end = der_element(cert, 0, len(cert), _SEQUENCE)
    start, end = der_element(cert, start, end, _SEQUENCE)
    if cert[start : start + 1] == _VERSION:
        _, start = der_element(cert, start, end, _VERSION)
    for tag in (_INTEGER, _SEQUENCE, _SEQUENCE):
        _, start = der_element(cert, start, end, tag)
    # Validity ::= SEQUENCE { notBefore Time, notAfter Time }
    start, end = der_element(cert, start, end, _SEQUENCE)
    not_before, start = _time(cert, start, end)
    return not_before, _time(cert, start, end)[0]


def _time(cert: bytes, start: int, end: int) -> tuple[datetime, int]:
    """The moment that stands at `start`, and where it ends."""
    tag = cert[start : start + 1]
    if tag not in _TIMES:
        raise ValueError("not a certificate in DER: a time is missing")
    begin, after = der_element(cert, start, end, tag)
    # RFC 5280 §4.1.2.5: both forms have seconds, and "Z" for the time zone.
    found = _TIMES[tag].fullmatch(cert[begin:after])
    if found is None:
        raise ValueError("not a certificate: a time is malformed")
    year, month, day, hour, minute, second = map(int, found.groups())
    if tag == _UTC_TIME:
        # "Where YY is greater than or equal to 50, the year SHALL be interpreted as 19YY"
        year += 1900 if year >= 50 else 2000
    return datetime(year, month, day, hour, minute, second, tzinfo=UTC), after


def trouble(cert: bytes, now: datetime) -> str | None:
    """What to warn of, to follow the words "the certificate"; None if all is well.

    Args:
        cert: as DER.
        now: the time, with its zone.

    Raises:
        ValueError: it is not a certificate.
    """
    not_before, not_after = validity(cert)
    if now > not_after:
        return f"expired on {_shown(not_after)}: clients refuse it. Renew it, and start the server again"
    if now < not_before:
        return f"is valid from {_shown(not_before)} only: clients refuse it until then. Is this machine's clock right?"
    if not_after - now < SOON:
        days = (not_after - now).days
        left = "less than a day" if days == 0 else "1 day" if days == 1 else f"{days} days"
        return f"expires in {left}, on {_shown(not_after)}: renew it, and start the server again"
    return None


def _shown(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
