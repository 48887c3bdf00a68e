"""TLS: the server's own certificate, contexts for both roles, pins, and what TLS errors mean in plain words.

A pin is the SHA-256 of a certificate's SubjectPublicKeyInfo, so it survives a renewal that keeps the key. With a pin
the pin alone decides; without, the system's trust store or `--ca` does. Nothing turns verification off.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import socket
import ssl
import stat
import sys
from typing import TYPE_CHECKING, Final

from wstunnel import logs
from wstunnel.errors import LocalError, NetworkError, TrustError
from wstunnel.state import PrivateDirectory, raise_local, reason

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cryptography import x509

CERTIFICATE_NAME: Final = "server.crt"
KEY_NAME: Final = "server.key"
CERTIFICATE_DAYS: Final = 3650
"""Ten years: clients know the certificate by its pin and do not look at its dates."""
CLOCK_SKEW_DAYS: Final = 1
"""How far before now a certificate begins to be valid, for clients whose clock is behind."""
ALPN: Final = "http/1.1"

# Tags of X.690 §8, as the first byte of an element.
_INTEGER: Final = b"\x02"
_BIT_STRING: Final = b"\x03"
_SEQUENCE: Final = b"\x30"
_VERSION: Final = b"\xa0"

# RFC 5280 and OpenSSL's x509_vfy.h: values of X509_V_ERR_*.
_NOT_YET_VALID: Final = 9
_EXPIRED: Final = 10
_UNKNOWN_ISSUER: Final = frozenset({2, 18, 19, 20, 21})
_WRONG_NAME: Final = frozenset({62, 64})

# The last one is what OpenSSL 3 says when key and certificate are of different kinds.
_KEY_MISMATCH: Final = frozenset({"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"})

# What OpenSSL's various versions say when the first bytes that come back are not a TLS record.
_NOT_TLS: Final = frozenset(
    {
        "WRONG_VERSION_NUMBER",
        "HTTP_REQUEST",
        "HTTPS_PROXY_REQUEST",
        "UNKNOWN_PROTOCOL",
        "RECORD_LAYER_FAILURE",
        "PACKET_LENGTH_TOO_LONG",
        "RECORD_TOO_SMALL",
        "BAD_RECORD_TYPE",
    }
)
_TOO_OLD: Final = frozenset({"UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION", "VERSION_TOO_LOW"})
_WANTS_CERTIFICATE: Final = frozenset({"TLSV13_ALERT_CERTIFICATE_REQUIRED", "SSLV3_ALERT_BAD_CERTIFICATE"})

_log = logs.logger("tls")


class _EncryptedKeyError(Exception):
    """Raised out of OpenSSL's question for a passphrase."""


def ensure_certificate(directory: Path, *, names: Sequence[str]) -> tuple[Path, Path]:
    """The server's own certificate and key in the state directory, made at the first call and used again after it.

    An EC key on P-256 and a self-signed certificate for the machine's name, `localhost`, 127.0.0.1, ::1 and `names`.

    Args:
        directory: the state directory, which exists.
        names: further names and addresses by which clients may know the server.

    Returns:
        The certificate's file and the key's, both PEM, mode 0600.

    Raises:
        LocalError: the files cannot be read or written, only one of them exists, or they do not belong together.
    """
    certificate, key = directory / CERTIFICATE_NAME, directory / KEY_NAME
    try:
        # Locked: of two servers that start at once, the second finds what the first made.
        with PrivateDirectory.open(directory, lock=True) as private:
            certificate_pem, key_pem = private.read(CERTIFICATE_NAME), private.read(KEY_NAME)
            if certificate_pem is None and key_pem is None:
                key_pem, certificate_pem = _self_signed([*names, socket.gethostname()])
                private.write(KEY_NAME, key_pem)
                private.write(CERTIFICATE_NAME, certificate_pem)
                return certificate, key
    except OSError as error:
        raise_local(error, directory, "used for the certificate")
    if certificate_pem is None or key_pem is None:
        there, missing = (key, certificate) if certificate_pem is None else (certificate, key)
        raise LocalError(
            f"{there} exists without {missing}: put the other one back, or delete it to have both made anew "
            "(clients then need a new login URL)"
        )
    _context(certificate, key)
    return certificate, key


def _self_signed(names: Sequence[str]) -> tuple[bytes, bytes]:
    """Returns the key and the certificate as PEM."""
    # It costs a tenth of the server's start-up and 9 MB, and only a server's first start needs it.
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    # The common name is for people only (RFC 9525 §2), and may have 64 characters where a host name has 253.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "wstunnel")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=CLOCK_SKEW_DAYS))
        .not_valid_after(now + datetime.timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.SubjectAlternativeName(_alternative_names(names)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return key_pem, certificate.public_bytes(serialization.Encoding.PEM)


def _alternative_names(names: Sequence[str]) -> list[x509.GeneralName]:
    import ipaddress

    from cryptography import x509

    found: dict[x509.GeneralName, None] = {}
    for name in [*names, "localhost", "127.0.0.1", "::1"]:
        try:
            found[x509.IPAddress(ipaddress.ip_address(name.partition("%")[0]))] = None
        except ValueError:
            # A machine may be called anything; what does not fit into a certificate is not looked for there either.
            if name and name.isascii() and len(name) <= 253:
                found[x509.DNSName(name)] = None
    return list(found)


def public_key_pin(cert: bytes) -> bytes:
    """The pin of a certificate: SHA-256 of its SubjectPublicKeyInfo (RFC 7469 §2.4), 32 bytes.

    Args:
        cert: the certificate as DER. `certificate_pin` takes a PEM file.

    Raises:
        ValueError: it is not a certificate.
    """
    return hashlib.sha256(_public_key_info(cert)).digest()


def _public_key_info(cert: bytes) -> bytes:
    """The SubjectPublicKeyInfo of a certificate in DER, byte for byte.

    Not by `cryptography`: that adds a tenth to the server's start-up, stops the client at its first link as long, and
    holds 9 MB ever after. Strictness keeps it safe: DER has one reading, so OpenSSL, which makes the peer prove that it
    holds the key, sees the same key in the same place.
    """
    # RFC 5280 §4.1: Certificate ::= SEQUENCE { TBSCertificate ::= SEQUENCE { version [0] DEFAULT v1, serialNumber,
    # signature, issuer, validity, subject, subjectPublicKeyInfo, ... }, signatureAlgorithm, signature }
    start, end = der_element(cert, 0, len(cert), _SEQUENCE)
    if end != len(cert):
        raise ValueError("bytes follow the certificate")
    start, end = der_element(cert, start, end, _SEQUENCE)
    if cert[start : start + 1] == _VERSION:
        _, start = der_element(cert, start, end, _VERSION)
    for tag in (_INTEGER, _SEQUENCE, _SEQUENCE, _SEQUENCE, _SEQUENCE):
        _, start = der_element(cert, start, end, tag)
    # SubjectPublicKeyInfo ::= SEQUENCE { algorithm SEQUENCE, subjectPublicKey BIT STRING }
    inner, end = der_element(cert, start, end, _SEQUENCE)
    _, inner = der_element(cert, inner, end, _SEQUENCE)
    if der_element(cert, inner, end, _BIT_STRING)[1] != end:
        raise ValueError("bytes follow the public key")
    return cert[start:end]


def der_element(data: bytes, start: int, end: int, tag: bytes) -> tuple[int, int]:
    """Where the content of the DER element at `start` begins and ends.

    Raises:
        ValueError: it is of another kind, reaches beyond `end`, or its length is not as DER writes it.
    """
    if data[start : start + 1] != tag or start + 2 > end:
        raise ValueError("not a certificate in DER")
    content, length = start + 2, data[start + 1]
    if length >= 0x80:
        octets = length - 0x80
        content += octets
        length = int.from_bytes(data[start + 2 : content])
        # X.690 §10.1: the definite form in the fewest octets. 0x80 would be the indefinite one.
        if length < 0x80 or length >> 8 * (octets - 1) == 0:
            raise ValueError("not a certificate in DER: a length is not in its shortest form")
    if content + length > end:
        raise ValueError("the certificate is cut off")
    return content, content + length


def certificate_pin(path: Path) -> bytes:
    """The pin of the first certificate in a PEM file, for the server to announce.

    Raises:
        LocalError: it cannot be read, or holds no certificate.
    """
    try:
        return public_key_pin(first_certificate(path))
    except ValueError as error:
        raise LocalError(f"the certificate {path} is malformed: {error}") from error


def first_certificate(path: Path) -> bytes:
    """The first certificate in a PEM file, as DER: the server's own, where a chain follows.

    Raises:
        LocalError: it cannot be read, or holds no certificate.
        ValueError: the block is not base64.
    """
    text = _pem(path, "certificate", "CERTIFICATE-----")
    begin = text.index("-----BEGIN CERTIFICATE-----")
    end = text.find("-----END CERTIFICATE-----", begin)
    return ssl.PEM_cert_to_DER_cert(text[begin : end + len("-----END CERTIFICATE-----")])


def server_context(cert: Path, key: Path) -> ssl.SSLContext:
    """The server's side of TLS 1.2 and later.

    Args:
        cert: PEM file of the certificate, followed by its intermediates.
        key: PEM file of its key, not encrypted.

    Raises:
        LocalError: names the file and what is wrong with it.
    """
    context = _context(cert, key)
    _warn_if_exposed(key)
    return context


def _context(cert: Path, key: Path) -> ssl.SSLContext:
    _pem(cert, "certificate", "CERTIFICATE-----")
    _pem(key, "key", "PRIVATE KEY-----")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _restrict(context)
    # RFC 5246 renegotiation lets a client make the server work at no cost of its own.
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        context.load_cert_chain(cert, key, password=_refuse_passphrase)
    except _EncryptedKeyError:
        raise LocalError(
            f"the key {key} is encrypted: make a copy without passphrase (openssl pkey -in {key} -out NEW), mode 0600"
        ) from None
    except ssl.SSLError as error:
        if error.reason in _KEY_MISMATCH:
            raise LocalError(f"the key {key} does not belong to the certificate {cert}") from error
        if error.reason in ("EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"):
            raise LocalError(f"the certificate {cert} is too weak for this system: {_reason(error)}") from error
        raise LocalError(f"the certificate {cert} or the key {key} is malformed: {_reason(error)}") from error
    except OSError as error:
        raise LocalError(f"the certificate {cert} or the key {key} cannot be read: {reason(error)}") from error
    return context


def client_context(ca: Path | None, pins: tuple[bytes, ...]) -> ssl.SSLContext:
    """The client's side of TLS 1.2 and later.

    With pins the handshake accepts any certificate: **call `verify_pins` before the first byte is sent**. The peer has
    proved by then that it holds the certificate's key. Without pins the handshake verifies chain, dates and name.

    Args:
        ca: PEM file that replaces the system's trust store; not looked at with pins.
        pins: SHA-256 digests of public keys.

    Raises:
        LocalError: `ca` cannot be read or holds no certificates.
    """
    if not pins and ca is None:
        context = _system_context()
        _restrict(context)
        return context
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _restrict(context)
    if pins:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif ca is not None:
        text = _pem(ca, "CA file", "CERTIFICATE-----")
        try:
            context.load_verify_locations(cadata=text)
        except (ssl.SSLError, ValueError) as error:
            raise LocalError(f"the CA file {ca} is malformed: {_reason(error)}") from error
    return context


def _system_context() -> ssl.SSLContext:
    """A client's context that trusts what the operating system trusts, the authorities that its operator added too.

    Where OpenSSL's own paths hold the system's store, as on Linux distributions with their own Python, that is all it
    takes. Elsewhere the library truststore asks the system, if it is installed.
    """
    paths = ssl.get_default_verify_paths()
    if sys.platform in ("darwin", "win32") or (paths.cafile is None and not _has_entries(paths.capath)):
        try:
            import truststore
        except ImportError:
            pass  # then OpenSSL's paths are all there is
        else:
            return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    return context


def _has_entries(directory: str | None) -> bool:
    try:
        return directory is not None and bool(os.listdir(directory))
    except OSError:
        return False


def _restrict(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # CRIME; and the tunnel's bytes are the application's business.
    context.options |= ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols([ALPN])


def verify_pins(peer: ssl.SSLSocket | bytes, pins: tuple[bytes, ...]) -> None:
    """Check that the server's key is one of those pinned. Without pins there is nothing to check.

    Args:
        peer: the socket after its handshake, or the peer's certificate as DER.
        pins: SHA-256 digests of public keys.

    Raises:
        TrustError: the server showed another key, or none. The connection is to be closed with nothing sent.
    """
    if not pins:
        return
    certificate = peer if isinstance(peer, bytes) else peer.getpeercert(binary_form=True)
    try:
        found = public_key_pin(certificate or b"")
    except ValueError as error:
        raise TrustError(f"the server's certificate cannot be read, so its pin is not known: {error}") from error
    if found not in pins:
        expected = " or ".join(pin_text(pin) for pin in pins)
        raise TrustError(
            f"the server's key is not the one in the login URL: expected {expected}, got {pin_text(found)}. "
            "Somebody may be in the middle, or the server's key has changed: "
            "then take a new login URL from `wstunnel invite`"
        )


def pin_text(pin: bytes) -> str:
    """A pin as a login URL shows it: `sha256=` and 43 base64url characters."""
    return "sha256=" + base64.urlsafe_b64encode(pin).rstrip(b"=").decode()


def translate_tls_error(
    error: ssl.SSLError | OSError, host: str, *, issuer: str | None = None, plain: str = "ws://", pinned: bool = True
) -> NetworkError | TrustError:
    """Say what a failed handshake with `host` means and what to do. Returns the error for the caller to raise.

    Args:
        error: what the handshake raised.
        host: who was spoken to, as a message names it.
        issuer: who issued the certificate that was shown, see `issuer.issuer_shown`; None if that is not known.
        plain: what a URL begins with that does without TLS.
        pinned: whether a pin in the login URL would help; it does not with a proxy.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return TrustError(f"{host} did not prove who it is: {_verification_text(error, host, issuer, pinned)}")
    if isinstance(error, ssl.SSLEOFError | ConnectionResetError | BrokenPipeError | ssl.SSLZeroReturnError):
        return NetworkError(
            "tls",
            f"{host} closed the connection during the TLS handshake: the port may be another service's, "
            "or something on the way does not let TLS through",
        )
    if not isinstance(error, ssl.SSLError):
        return NetworkError("tls", f"the connection to {host} failed during the TLS handshake: {reason(error)}")
    # An SSLError that Python made itself has no `reason`.
    name = getattr(error, "reason", None)
    if name in _NOT_TLS:
        text = "the server does not speak TLS on this port; did you mean ws://?".replace("ws://", plain)
    elif name in _TOO_OLD:
        text = "the server speaks no TLS version from 1.2 on"
    elif name in _WANTS_CERTIFICATE:
        text = "the server asks for a client certificate, or refuses the one that it got"
    elif name == "SSLV3_ALERT_HANDSHAKE_FAILURE":
        text = "the server has no cipher in common with this machine, or does not know the name that it was asked for"
    elif name == "TLSV1_UNRECOGNIZED_NAME":
        text = "the server does not know the name that it was asked for"
    else:
        text = _reason(error)
    return NetworkError("tls", f"the TLS handshake with {host} failed: {text}")


def _verification_text(error: ssl.SSLCertVerificationError, host: str, issuer: str | None, pinned: bool) -> str:
    code = getattr(error, "verify_code", 0)
    if code in _UNKNOWN_ISSUER:
        text = "its certificate is self-signed or from an authority that this machine does not know"
        if not pinned:
            text += "" if issuer is None else f"; it was issued by {issuer}"
            return f"{text}. If you trust that authority, name it with --ca"
        text += "; use the login URL with its pin, or --ca"
        if issuer is not None:
            text += (
                f". It was issued by {issuer}: if that is your network's own proxy, which then reads all that goes "
                "through it, and you trust it, name its authority with --ca"
            )
        return text
    if code in _WRONG_NAME:
        asked = re.search("'(.+)'", getattr(error, "verify_message", ""))  # not `host`, with --sni, and without a port
        return (
            f"its certificate is for other names than {asked[1] if asked else host}; "
            "use a name that the certificate has" + (", or the login URL with its pin" if pinned else "")
        )
    if code == _EXPIRED:
        return "its certificate has expired; renew it on the server (and check this machine's clock)"
    if code == _NOT_YET_VALID:
        return "its certificate is not valid yet; check this machine's clock"
    return getattr(error, "verify_message", "") or _reason(error)


def _pem(path: Path, noun: str, label: str) -> str:
    """The text of a PEM file that has at least one block whose label ends in `label`."""
    try:
        # O_NONBLOCK: opening a named pipe would wait for its other end, and not even SIGINT would end that.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise LocalError(f"the {noun} {path} is not a regular file")
            data = file.read()
    except PermissionError as error:
        raise LocalError(f"the {noun} {path} may not be read by this user: change its mode or owner") from error
    except OSError as error:
        raise LocalError(f"the {noun} {path} cannot be read: {reason(error)}") from error
    text = data.decode("ascii", "replace")
    if "-----BEGIN " not in text:
        kind = "is empty" if not data.strip() else "is not PEM: it has no -----BEGIN line"
        raise LocalError(f"the {noun} {path} {kind}")
    if not any(line.startswith("-----BEGIN ") and line.rstrip().endswith(label) for line in text.splitlines()):
        wanted = label.removesuffix("-----").lower()
        raise LocalError(f"the {noun} {path} holds no {wanted}: are certificate and key the wrong way round?")
    return text.replace("\N{REPLACEMENT CHARACTER}", "?")


def _refuse_passphrase() -> str:
    # Without this OpenSSL asks on the terminal, and a service hangs.
    raise _EncryptedKeyError


def _warn_if_exposed(key: Path) -> None:
    mode = key.stat().st_mode
    exposed = mode & stat.S_IROTH or (mode & stat.S_IRGRP and not _has_access_list(key))
    if exposed:
        _log.warning("others may read the server's key: chmod 600", file=key, mode=f"{mode & 0o777:04o}")


def _has_access_list(path: Path) -> bool:
    # acl(5): with an access list the group bits are its mask. systemd hands out credentials in this way (mode 0440).
    try:
        return bool(os.getxattr(path, "system.posix_acl_access"))
    except (OSError, AttributeError):
        return False


def _reason(error: Exception) -> str:
    name = getattr(error, "reason", None)
    return name.replace("_", " ").lower() if isinstance(name, str) else str(error)
