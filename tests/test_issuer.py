"""issuer.py: who issued the certificate that was shown."""

from __future__ import annotations

import datetime
import ssl
from typing import Any

import pytest
import trio
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.roles import tcp_pair
from wstunnel import tls
from wstunnel.errors import TrustError
from wstunnel.issuer import issuer_name, issuer_shown
from wstunnel.transport import Transport


def certificate(*attributes: tuple[x509.ObjectIdentifier, str]) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(kind, text) for kind, text in attributes])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    return built.public_bytes(serialization.Encoding.DER)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ([(NameOID.COMMON_NAME, "An authority"), (NameOID.ORGANIZATION_NAME, "Ltd")], '"An authority" (Ltd)'),
        ([(NameOID.COUNTRY_NAME, "CH"), (NameOID.COMMON_NAME, "Zürich")], '"Zürich"'),
        ([(NameOID.ORGANIZATION_NAME, "Example Ltd")], '"Example Ltd"'),
        ([(NameOID.COUNTRY_NAME, "CH")], None),
        ([], None),
        ([(NameOID.COMMON_NAME, "a\x1b[31m")], r'"a\x1b[31m"'),
        ([(NameOID.COMMON_NAME, "x" * 64), (NameOID.COMMON_NAME, "second")], f'"{"x" * 64}"'),
    ],
)  # fmt: skip
def test_names(attributes: Any, expected: str | None) -> None:
    assert issuer_name(certificate(*attributes)) == expected


def test_every_cut_is_refused_or_read() -> None:
    whole = certificate((NameOID.COMMON_NAME, "Example CA"))
    for end in range(len(whole)):
        with pytest.raises(ValueError):
            issuer_name(whole[:end])
    for index in range(len(whole)):
        broken = bytearray(whole)
        broken[index] ^= 0x55
        try:
            issuer_name(bytes(broken))
        except ValueError:
            pass


async def shaken(context: ssl.SSLContext, authority: trustme.CA) -> tuple[str | None, Exception | None]:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("h").configure_cert(server)
    near, far = tcp_pair()
    client, peer = Transport(near, context, server_hostname="h"), Transport(far, server, server_side=True)
    caught: Exception | None = None

    async def other() -> None:
        try:
            await peer.handshake()
        except OSError:
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        try:
            await client.handshake()
        except ssl.SSLError as error:
            caught = error
        shown = issuer_shown(client.tls)
        nursery.cancel_scope.cancel()
    client.close()
    peer.close()
    return shown, caught


async def test_of_a_handshake_that_failed() -> None:
    shown, caught = await shaken(tls.client_context(None, ()), trustme.CA(organization_name="Corp Proxy"))
    assert isinstance(caught, ssl.SSLCertVerificationError)
    assert shown is not None
    assert "Corp Proxy" in shown
    translated = tls.translate_tls_error(caught, "h", issuer=shown)
    assert isinstance(translated, TrustError)
    assert f"It was issued by {shown}" in str(translated)
    assert "issued by" not in str(tls.translate_tls_error(caught, "h"))


async def test_of_one_that_succeeded() -> None:
    authority = trustme.CA(organization_name="Mine")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    shown, caught = await shaken(context, authority)
    assert caught is None
    assert shown is not None
    assert "Mine" in shown


def test_nothing_shown() -> None:
    assert issuer_shown(None) is None
    assert issuer_shown(object()) is None  # type: ignore[arg-type]
