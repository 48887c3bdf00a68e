"""validity.py: the dates of a certificate, against an independent parser, and what is said of them."""

from __future__ import annotations

import ssl
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
import trustme
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from wstunnel.validity import SOON, trouble, validity

NOW = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
CA = trustme.CA()


def issued(begins: datetime, ends: datetime) -> bytes:
    cert = CA.issue_cert("localhost", not_before=begins, not_after=ends)
    return ssl.PEM_cert_to_DER_cert(cert.cert_chain_pems[0].bytes().decode())


@pytest.mark.parametrize(
    ("begins", "ends"),
    [
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC)),
        (datetime(1950, 1, 1, tzinfo=UTC), datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)),  # the ends of UTCTime
        (datetime(1999, 12, 31, tzinfo=UTC), datetime(2050, 1, 1, tzinfo=UTC)),  # GeneralizedTime
        (datetime(2000, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)),  # RFC 5280: no end
    ],
)
def test_dates_are_those_of_an_independent_parser(begins: datetime, ends: datetime) -> None:
    cert = issued(begins, ends)
    other = x509.load_der_x509_certificate(cert)
    assert validity(cert) == (begins, ends) == (other.not_valid_before_utc, other.not_valid_after_utc)


GOOD = issued(NOW, NOW + timedelta(days=1))


@given(st.integers(0, len(GOOD)), st.binary(min_size=1, max_size=4))
def test_what_is_no_certificate_is_a_value_error(at: int, noise: bytes) -> None:
    for broken in (GOOD[:at] if at < len(GOOD) else b"", GOOD[:at] + noise + GOOD[at + len(noise) :]):
        try:
            validity(broken)
        except ValueError:
            pass


@pytest.mark.parametrize("wrong", [b"260301123000+", b"261301123000Z", b"2603011230ZZZ", b"\xb2\xb260301123Z"])
def test_a_time_of_another_form_is_refused(wrong: bytes) -> None:
    good = f"{NOW:%y%m%d%H%M%S}Z".encode()
    assert GOOD.count(good) == 1
    with pytest.raises(ValueError):  # datetime's own words for the 13th month
        validity(GOOD.replace(good, wrong))


DAY = timedelta(days=1)


@pytest.mark.parametrize(
    ("begins", "ends", "said"),
    [
        (-10 * DAY, -DAY, "expired on 2026-02-28 12:30 UTC: clients refuse it. Renew it, and start the server again"),
        (DAY, 9 * DAY, "is valid from 2026-03-02 12:30 UTC only: clients refuse it until then."),
        (-DAY, DAY / 2, "expires in less than a day, on 2026-03-02 00:30 UTC: renew it"),
        (-DAY, DAY * 1.5, "expires in 1 day, on"),
        (-DAY, SOON - timedelta(seconds=1), "expires in 13 days, on 2026-03-15 12:29 UTC: renew it"),
        (-DAY, SOON, None),
        (timedelta(0), 90 * DAY, None),
    ],
)
def test_what_is_said(begins: timedelta, ends: timedelta, said: str | None) -> None:
    found = trouble(issued(NOW + begins, NOW + ends), NOW)
    assert found is None if said is None else found is not None and found.startswith(said)


def test_it_costs_no_start_up() -> None:
    code = "import sys, wstunnel.server; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
