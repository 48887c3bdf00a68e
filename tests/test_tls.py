"""tls.py: the server's own certificate, contexts, pins, and what each failure of a handshake says."""

from __future__ import annotations

import base64
import datetime
import errno
import hashlib
import ipaddress
import logging
import os
import re
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trustme
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from wstunnel import tls
from wstunnel.errors import LocalError, NetworkError, TrustError
from wstunnel.transport import Transport

FORGEABLE = ssl.PEM_cert_to_DER_cert(trustme.CA().issue_cert("localhost").cert_chain_pems[0].bytes().decode())


def openssl(*arguments: str | Path) -> bytes:
    return subprocess.run(["openssl", *arguments], capture_output=True, check=True).stdout


def own(directory: Path, *names: str) -> tuple[Path, Path]:
    return tls.ensure_certificate(directory, names=names)


def loaded(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def der(path: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(path.read_text())


async def handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str = "localhost") -> bytes:
    """A real handshake; returns the certificate that the client saw, or raises what the client's side raised."""
    one, two = socket.socketpair()
    accepting = Transport(two, server, server_side=True)
    dialling = Transport(one, client, server_hostname=host)

    async def accept() -> None:
        try:
            await accepting.handshake()
            # In TLS 1.3 the server learns only now that the client went away.
            await accepting.receive(1)
        except ssl.SSLError:
            pass

    failure: BaseException | None = None
    seen = b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        try:
            await dialling.handshake()
            assert dialling.tls is not None
            seen = dialling.tls.getpeercert(binary_form=True) or b""
            assert dialling.tls.selected_alpn_protocol() == tls.ALPN
        except OSError as error:
            failure = error
        dialling.close()
    accepting.close()
    if failure is not None:
        raise failure
    return seen


class TestEnsureCertificate:
    def test_is_made_once_and_used_again(self, tmp_path: Path) -> None:
        first = own(tmp_path)
        assert first == (tmp_path / "server.crt", tmp_path / "server.key")
        before = [path.read_bytes() for path in first]
        assert own(tmp_path, "another") == first
        assert [path.read_bytes() for path in first] == before
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["server.crt", "server.key"]

    def test_what_it_is(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(socket, "gethostname", lambda: "machine")
        path, key_path = own(
            tmp_path, "tunnel.example.org", "2001:db8::1", "192.0.2.1", "fe80::1%eth0", "bücher", "localhost"
        )
        certificate = loaded(path)
        key = serialization.load_pem_private_key(key_path.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert key.curve.name == "secp256r1"
        assert certificate.public_key() == key.public_key()
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["tunnel.example.org", "localhost", "machine"]
        assert set(names.get_values_for_type(x509.IPAddress)) == {
            ipaddress.ip_address(text) for text in ("2001:db8::1", "192.0.2.1", "fe80::1", "127.0.0.1", "::1")
        }
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
        assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        now = datetime.datetime.now(datetime.UTC)
        day = datetime.timedelta(days=1)
        assert now - 2 * day < certificate.not_valid_before_utc < now
        assert now + 3649 * day < certificate.not_valid_after_utc < now + 3651 * day

    def test_only_the_owner_may_read(self, tmp_path: Path) -> None:
        for path in own(tmp_path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600

    @pytest.mark.parametrize(("gone", "there"), [("server.crt", "server.key"), ("server.key", "server.crt")])
    def test_one_without_the_other(self, tmp_path: Path, gone: str, there: str) -> None:
        own(tmp_path)
        (tmp_path / gone).unlink()
        with pytest.raises(LocalError, match=f"{there} exists without {tmp_path}/{gone}: put the other one back, or"):
            own(tmp_path)

    def test_files_that_do_not_match(self, tmp_path: Path) -> None:
        own(tmp_path)
        (tmp_path / "other").mkdir()
        own(tmp_path / "other")[1].rename(tmp_path / "server.key")
        with pytest.raises(LocalError, match=r"server\.key does not belong to the certificate .*server\.crt"):
            own(tmp_path)

    def test_a_directory_that_may_not_be_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(LocalError, match="none cannot be used for the certificate: no such file or directory"):
            own(tmp_path / "none")

        def refuse(*_: object, **__: object) -> int:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(LocalError, match="may not be used for the certificate by this user: run it as the user"):
            own(tmp_path)

    def test_two_servers_at_once_agree(self, tmp_path: Path) -> None:
        program = (
            "import sys, pathlib; from wstunnel import tls\n"
            "print(tls.certificate_pin(tls.ensure_certificate(pathlib.Path(sys.argv[1]), names=())[0]).hex())"
        )
        running = [
            subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(3)
        ]
        pins = {process.communicate()[0] for process in running}
        assert len(pins) == 1
        assert len(pins.pop()) == 65

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "tunnel.example.org"])
    async def test_it_serves_as_its_own_authority(self, tmp_path: Path, host: str) -> None:
        certificate, key = own(tmp_path, "tunnel.example.org")
        seen = await handshake(tls.server_context(certificate, key), tls.client_context(certificate, ()), host)
        assert seen == der(certificate)


class TestPins:
    def test_is_the_digest_of_the_public_key(self, tmp_path: Path) -> None:
        certificate, key = own(tmp_path)
        public = subprocess.run(
            ["openssl", "pkey", "-in", key, "-pubout", "-outform", "DER"], capture_output=True, check=True
        ).stdout
        expected = hashes.Hash(hashes.SHA256())
        expected.update(public)
        assert tls.public_key_pin(der(certificate)) == tls.certificate_pin(certificate) == expected.finalize()

    def test_a_renewal_that_keeps_the_key_keeps_the_pin(self, tmp_path: Path) -> None:
        certificate, key = own(tmp_path)
        before = tls.certificate_pin(certificate)
        subprocess.run(
            ["openssl", "req", "-x509", "-new", "-key", key, "-subj", "/CN=renewed", "-out", certificate], check=True
        )
        assert tls.certificate_pin(certificate) == before
        assert own(tmp_path) == (certificate, key)

    def test_the_first_certificate_of_a_chain_counts(self, tmp_path: Path) -> None:
        issued = trustme.CA().create_child_ca().issue_cert("localhost")
        chain = tmp_path / "chain.pem"
        chain.write_bytes(b"a comment\n" + b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        assert len(issued.cert_chain_pems) == 2
        first = ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())
        assert tls.certificate_pin(chain) == tls.public_key_pin(first)

    @pytest.mark.parametrize("body", ["", "AAAA", "!!!!"])
    def test_a_file_that_is_no_certificate(self, tmp_path: Path, body: str) -> None:
        path = tmp_path / "bad.pem"
        path.write_text(f"-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n")
        with pytest.raises(LocalError, match=r"the certificate .*bad\.pem is malformed"):
            tls.certificate_pin(path)

    def test_a_certificate_without_its_end(self, tmp_path: Path) -> None:
        path = tmp_path / "cut.pem"
        path.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n")
        with pytest.raises(LocalError, match=r"the certificate .*cut\.pem is malformed"):
            tls.certificate_pin(path)

    @pytest.mark.parametrize("kind", ["RSA:2048", "EC:P-256", "EC:P-521", "ED25519", "ED448"])
    @pytest.mark.parametrize("version", [1, 3])
    def test_every_kind_of_certificate(self, kind: str, version: int, tmp_path: Path) -> None:
        algorithm, _, size = kind.partition(":")
        option = {"RSA": "rsa_keygen_bits:", "EC": "ec_paramgen_curve:"}.get(algorithm, "") + size
        key, request, certificate = tmp_path / "key.pem", tmp_path / "request.pem", tmp_path / "certificate.pem"
        openssl("genpkey", "-algorithm", algorithm, *(("-pkeyopt", option) if option else ()), "-out", key)
        extensions = tmp_path / "extensions"
        extensions.write_text("subjectAltName=DNS:tunnel.example.org\n")
        openssl("req", "-new", "-key", key, "-subj", "/O=" + 60 * "x" + "/CN=tunnel", "-out", request)
        # OpenSSL 3.0 makes version 1, which has no version field, of whatever has no extensions.
        flags = ("-extfile", extensions) if version == 3 else ()
        openssl("x509", "-req", "-in", request, "-signkey", key, "-out", certificate, *flags)
        if x509.load_pem_x509_certificate(certificate.read_bytes()).version != x509.Version[f"v{version}"]:
            pytest.skip("this OpenSSL makes version 3 only")
        public = openssl("pkey", "-in", key, "-pubout", "-outform", "DER")
        assert tls.certificate_pin(certificate) == hashlib.sha256(public).digest()

    def test_nothing_may_be_missing_or_follow(self, tmp_path: Path) -> None:
        good = der(own(tmp_path)[0])
        for length in range(len(good)):
            with pytest.raises(ValueError, match="certificate"):
                tls.public_key_pin(good[:length])
        with pytest.raises(ValueError, match="bytes follow"):
            tls.public_key_pin(good + b"\0")

    @pytest.mark.parametrize("prefix", ["30 80", "30 83 00 {0:04x}", "30 84 00 00 {0:04x}", "31 82 {0:04x}"])
    def test_only_der(self, prefix: str, tmp_path: Path) -> None:
        good = der(own(tmp_path)[0])
        assert good[:2] == b"\x30\x82"  # two octets of length
        with pytest.raises(ValueError, match="not a certificate in DER"):
            tls.public_key_pin(bytes.fromhex(prefix.format(len(good) - 4)) + good[4:])

    def test_nothing_reaches_out_of_what_holds_it(self) -> None:
        def element(tag: int, *parts: bytes, short: int = 0) -> bytes:
            content = b"".join(parts)
            return bytes([tag, len(content) - short]) + content

        def certificate(key: bytes, short: int = 0) -> bytes:
            return element(0x30, element(0x30, element(2, b"\1"), 4 * element(0x30), key, short=short))

        key = element(0x30, element(0x30), element(3, b"\0key"))
        assert tls.public_key_pin(certificate(key)) == hashlib.sha256(key).digest()
        with pytest.raises(ValueError, match="cut off"):
            tls.public_key_pin(certificate(key, short=1))
        for wrong in (
            element(0x30, element(0x30), element(3, b"\0key"), b"more"),
            element(0x30, element(0x30), element(3, b"\0key"), short=1),
            element(0x30, element(0x30), element(4, b"\0key")),
            element(0x30, element(3, b"\0key")),
        ):
            with pytest.raises(ValueError, match=r"bytes follow|cut off|not a certificate"):
                tls.public_key_pin(certificate(wrong))

    # Of the parser: a forged serial number may be negative.
    @pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
    @given(st.data())
    def test_what_a_forger_changes_never_gives_another_pin_than_an_independent_parser(
        self, data: st.DataObject
    ) -> None:
        forged = bytearray(FORGEABLE)
        for _ in range(data.draw(st.integers(1, 4))):
            # Where the structure is: the signature's end says nothing.
            forged[data.draw(st.integers(0, len(forged) - 80))] = data.draw(st.integers(0, 255))
        try:
            pin = tls.public_key_pin(bytes(forged))
        except ValueError:
            return
        try:
            key = x509.load_der_x509_certificate(bytes(forged)).public_key()
        except (ValueError, UnsupportedAlgorithm):
            return
        info = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        assert pin == hashlib.sha256(info).digest()

    async def test_the_right_key_is_trusted_whatever_the_certificate_says(self, tmp_path: Path) -> None:
        certificate, key = own(tmp_path)
        pins = (bytes(32), tls.certificate_pin(certificate))
        seen = await handshake(
            tls.server_context(certificate, key), tls.client_context(None, pins), "elsewhere.example"
        )
        tls.verify_pins(seen, pins)
        tls.verify_pins(seen, ())

    async def test_another_key_is_not(self, tmp_path: Path) -> None:
        certificate, key = own(tmp_path)
        pins = (bytes(32), b"\xff" * 32)
        seen = await handshake(tls.server_context(certificate, key), tls.client_context(None, pins))
        with pytest.raises(TrustError) as caught:
            tls.verify_pins(seen, pins)
        text = str(caught.value)
        assert f"expected sha256={'A' * 43} or sha256={'_' * 42}8, got " in text
        got = base64.urlsafe_b64encode(tls.certificate_pin(certificate)).rstrip(b"=").decode()
        assert f"got sha256={got}." in text
        assert "Somebody may be in the middle, or the server's key has changed" in text

    @pytest.mark.parametrize("certificate", [b"", b"garbage"])
    def test_no_certificate(self, certificate: bytes) -> None:
        with pytest.raises(TrustError, match="certificate cannot be read"):
            tls.verify_pins(certificate, (bytes(32),))


class TestServerContext:
    def test_its_settings(self, tmp_path: Path) -> None:
        context = tls.server_context(*own(tmp_path))
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert context.options & ssl.OP_NO_COMPRESSION
        assert context.options & ssl.OP_NO_RENEGOTIATION

    @pytest.mark.parametrize("maximum", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    async def test_both_versions_work(self, tmp_path: Path, maximum: ssl.TLSVersion) -> None:
        certificate, key = own(tmp_path)
        client = tls.client_context(certificate, ())
        client.maximum_version = maximum
        assert await handshake(tls.server_context(certificate, key), client)

    def test_mistakes(self, tmp_path: Path) -> None:
        certificate, key = own(tmp_path)
        empty, garbage, broken, other = (tmp_path / name for name in ("empty", "garbage", "broken", "other"))
        empty.write_text("\n")
        garbage.write_bytes(b"\x30\x82\xff\x00")
        broken.write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
        other_key = rsa.generate_private_key(65537, 2048)
        plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
        other.write_bytes(other_key.private_bytes(*plain, serialization.NoEncryption()))
        encrypted = tmp_path / "encrypted"
        encrypted.write_bytes(other_key.private_bytes(*plain, serialization.BestAvailableEncryption(b"secret")))
        for cert_file, key_file, message in (
            (tmp_path / "none", key, f"the certificate {tmp_path}/none cannot be read: no such file or directory"),
            (certificate, tmp_path, f"the key {tmp_path} cannot be read: is a directory"),
            (empty, key, f"the certificate {empty} is empty"),
            (certificate, garbage, f"the key {garbage} is not PEM: it has no -----BEGIN line"),
            (
                key,
                certificate,
                f"the certificate {key} holds no certificate: are certificate and key the wrong way round?",
            ),
            (
                certificate,
                certificate,
                f"the key {certificate} holds no private key: are certificate and key the wrong",
            ),
            (certificate, broken, f"the certificate {certificate} or the key {broken} is malformed: "),
            (certificate, other, f"the key {other} does not belong to the certificate {certificate}"),
            (certificate, encrypted, f"the key {encrypted} is encrypted: make a copy without passphrase"),
        ):
            with pytest.raises(LocalError, match="^" + re.escape(message)) as caught:
                tls.server_context(cert_file, key_file)
            assert "\n" not in str(caught.value)

    def test_a_key_of_the_same_kind_that_does_not_match(self, tmp_path: Path) -> None:
        certificate, _ = own(tmp_path)
        (tmp_path / "b").mkdir()
        with pytest.raises(LocalError, match="does not belong to the certificate"):
            tls.server_context(certificate, own(tmp_path / "b")[1])

    def test_a_weak_key(self, tmp_path: Path) -> None:
        files = (tmp_path / "weak.crt", tmp_path / "weak.key")
        command = ["openssl", "req", "-x509", "-newkey", "rsa:512", "-nodes", "-subj", "/CN=x", "-out"]
        subprocess.run([*command, files[0], "-keyout", files[1]], check=True, capture_output=True)
        with pytest.raises(LocalError, match=r"weak\.crt is too weak for this system: ee key too small"):
            tls.server_context(*files)

    def test_no_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        files = own(tmp_path)

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            with pytest.raises(LocalError, match=r"server\.crt may not be read by this user"):
                tls.server_context(*files)
        # Between the two readings anything may happen to the file.
        monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", refuse)
        with pytest.raises(LocalError, match="cannot be read: permission denied"):
            tls.server_context(*files)

    @pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
    def test_a_key_that_others_may_read_is_a_warning(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: bool
    ) -> None:
        files = own(tmp_path)
        files[1].chmod(mode)
        with caplog.at_level(logging.WARNING, "wstunnel"):
            tls.server_context(*files)
        expected = [f"others may read the server's key: chmod 600 file={files[1]} mode={mode:04o}"]
        assert caplog.messages == (expected if warned else [])

    @pytest.mark.parametrize(("mode", "warned"), [(0o440, False), (0o444, True)])
    def test_with_an_access_list_the_group_bits_are_its_mask(
        self,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        mode: int,
        warned: bool,
    ) -> None:
        """So systemd hands out credentials. Not every file system of a test machine has access lists."""
        files = own(tmp_path)
        files[1].chmod(mode)
        monkeypatch.setattr(os, "getxattr", lambda *_: b"\x02\x00\x00\x00")
        with caplog.at_level(logging.WARNING, "wstunnel"):
            tls.server_context(*files)
        assert bool(caplog.messages) == warned


class TestClientContext:
    def test_verifies_by_default(self) -> None:
        context = tls.client_context(None, ())
        assert context.verify_mode == ssl.CERT_REQUIRED
        assert context.check_hostname
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert context.options & ssl.OP_NO_COMPRESSION

    def test_the_systems_store_is_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loaded_for: list[object] = []
        monkeypatch.setattr(ssl.SSLContext, "load_default_certs", lambda _self, purpose: loaded_for.append(purpose))
        tls.client_context(None, ())
        assert loaded_for == [ssl.Purpose.SERVER_AUTH]

    def test_ca_replaces_the_systems_store(self, tmp_path: Path) -> None:
        certificate, _ = own(tmp_path)
        assert tls.client_context(certificate, ()).cert_store_stats()["x509"] == 1

    def test_mistakes_in_ca(self, tmp_path: Path) -> None:
        certificate, key = own(tmp_path)
        broken = tmp_path / "broken"
        broken.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        accented = tmp_path / "accented"
        accented.write_bytes("# Zürich\n".encode() + certificate.read_bytes())
        for path, message in (
            (tmp_path / "none", "the CA file .*none cannot be read: no such file"),
            (key, "the CA file .*holds no certificate"),
            (broken, "the CA file .*broken is malformed"),
        ):
            with pytest.raises(LocalError, match=message):
                tls.client_context(path, ())
        assert tls.client_context(accented, ()).cert_store_stats()["x509"] == 1


def issued(*names: str, **options: object) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Contexts of a server with a certificate for `names`, and of a client that trusts its authority."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.set_alpn_protocols([tls.ALPN])
    authority.issue_cert(*names, **options).configure_cert(server)  # type: ignore[arg-type]
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(client)
    return server, client


async def failure(server: ssl.SSLContext, client: ssl.SSLContext, host: str = "localhost") -> NetworkError:
    with pytest.raises(ssl.SSLError) as caught:
        await handshake(server, client, host)
    return tls.translate_tls_error(caught.value, host)


class TestTranslationOfCertificates:
    async def test_self_signed(self, tmp_path: Path) -> None:
        error = await failure(tls.server_context(*own(tmp_path)), tls.client_context(None, ()))
        assert isinstance(error, TrustError)
        assert str(error).startswith("localhost did not prove who it is: its certificate is self-signed or from an ")
        assert str(error).endswith("use the login URL with its pin, or --ca")

    async def test_an_unknown_authority(self) -> None:
        server, _ = issued("localhost")
        _, client = issued("localhost")
        error = await failure(server, client)
        assert isinstance(error, TrustError)
        assert "from an authority that this machine does not know" in str(error)

    @pytest.mark.parametrize("host", ["elsewhere.example", "127.0.0.2"])
    async def test_another_name(self, host: str) -> None:
        error = await failure(*issued("localhost"), host)
        assert isinstance(error, TrustError)
        assert f"its certificate is for other names than {host}; " in str(error)

    async def test_another_name_is_told_as_it_was_asked_for(self) -> None:
        """With `--sni` that is not the URL's host, and a name has no port."""
        server, client = issued("localhost")
        with pytest.raises(ssl.SSLError) as caught:
            await handshake(server, client, "elsewhere.example")
        text = str(tls.translate_tls_error(caught.value, "127.0.0.1:8443"))
        assert "its certificate is for other names than elsewhere.example; " in text

    async def test_no_pin_helps_with_a_proxy(self) -> None:
        server, client = issued("localhost")
        for host, trusting in (("elsewhere.example", client), ("localhost", issued("localhost")[1])):
            with pytest.raises(ssl.SSLError) as caught:
                await handshake(server, trusting, host)
            assert "login URL" not in str(tls.translate_tls_error(caught.value, "the proxy", pinned=False))

    async def test_expired(self) -> None:
        past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
        error = await failure(*issued("localhost", not_before=past, not_after=past + datetime.timedelta(days=1)))
        assert isinstance(error, TrustError)
        assert "its certificate has expired; renew it on the server" in str(error)

    async def test_not_yet_valid(self) -> None:
        future = datetime.datetime(2990, 1, 1, tzinfo=datetime.UTC)
        error = await failure(*issued("localhost", not_before=future, not_after=future + datetime.timedelta(days=1)))
        assert isinstance(error, TrustError)
        assert "its certificate is not valid yet; check this machine's clock" in str(error)

    def test_any_other_reason(self) -> None:
        error = ssl.SSLCertVerificationError(1, "text of OpenSSL")
        assert "text of OpenSSL" in str(tls.translate_tls_error(error, "h"))
        error.verify_code, error.verify_message = 23, "certificate revoked"
        translated = tls.translate_tls_error(error, "h")
        assert isinstance(translated, TrustError)
        assert str(translated) == "h did not prove who it is: certificate revoked"


def alert(number: int) -> bytes:
    """A fatal alert in clear: RFC 5246 §7.2, what a server that dislikes the ClientHello sends."""
    return b"\x15\x03\x03\x00\x02\x02" + bytes([number])


def closing(answer: bytes) -> Callable[[socket.socket], None]:
    def act(peer: socket.socket) -> None:
        peer.recv(65536)
        peer.sendall(answer)
        peer.close()

    return act


class TestTranslationOfHandshakes:
    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak TLS on this port; did you mean ws://?"),
            (b"SSH-2.0-OpenSSH_9.2p1\r\n", "does not speak TLS on this port; did you mean ws://?"),
            (b"220 mail.example.org ESMTP\r\n", "does not speak TLS on this port; did you mean ws://?"),
            (alert(70), "the server speaks no TLS version from 1.2 on"),
            (alert(40), "no cipher in common with this machine, or does not know the name"),
            (alert(112), "the server does not know the name that it was asked for"),
            (alert(42), "asks for a client certificate, or refuses the one that it got"),
            (alert(80), "the TLS handshake with h failed: tlsv1 alert internal error"),
            (b"", "h closed the connection during the TLS handshake"),
        ],
    )
    async def test_what_servers_answer(self, answer: bytes, text: str) -> None:
        one, two = socket.socketpair()
        transport = Transport(one, tls.client_context(None, ()), server_hostname="h")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, closing(answer), two)
            with pytest.raises(OSError) as caught:
                await transport.handshake()
        transport.close()
        error = tls.translate_tls_error(caught.value, "h")
        assert type(error) is NetworkError
        assert error.layer == "tls"
        assert text in str(error)

    @pytest.mark.parametrize(
        ("error", "text"),
        [
            (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "h closed the connection during"),
            (BrokenPipeError(errno.EPIPE, "Broken pipe"), "h closed the connection during"),
            (ssl.SSLZeroReturnError(), "h closed the connection during"),
            (OSError(errno.EHOSTUNREACH, "No route to host"), "to h failed during the TLS handshake: no route to host"),
            (ssl.SSLError(1, "nameless"), "the TLS handshake with h failed: nameless"),
        ],
    )
    def test_what_sockets_raise(self, error: OSError, text: str) -> None:
        translated = tls.translate_tls_error(error, "h")
        assert type(translated) is NetworkError
        assert text in str(translated)


def test_a_named_pipe_as_certificate_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LocalError, match=r"the certificate .*pipe is not a regular file"):
        tls.server_context(tmp_path / "pipe", tmp_path / "pipe")
    with pytest.raises(LocalError, match="the CA file /dev/zero is not a regular file"):
        tls.client_context(Path("/dev/zero"), ())


class TestSystemStore:
    """Without --ca and pins the operating system decides; truststore is asked where OpenSSL does not know its store."""

    def paths(self, monkeypatch: pytest.MonkeyPatch, cafile: str | None, capath: str | None) -> None:
        found = ssl.DefaultVerifyPaths(cafile, capath, "", "", "", "")
        monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: found)

    def test_where_openssl_knows_it_truststore_is_not_asked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "00000000.0").write_text("")
        for cafile, capath in (("some.pem", None), (None, str(tmp_path))):
            self.paths(monkeypatch, cafile, capath)
            assert type(tls.client_context(None, ())) is ssl.SSLContext

    @pytest.mark.parametrize("platform", ["linux", "darwin"])
    def test_elsewhere_it_is(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
        truststore = pytest.importorskip("truststore")
        monkeypatch.setattr("wstunnel.tls.sys.platform", platform)
        for capath in (None, str(tmp_path), str(tmp_path / "missing")):
            self.paths(monkeypatch, "some.pem" if platform == "darwin" else None, capath)
            context = tls.client_context(None, ())
            assert type(context) is truststore.SSLContext
            assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)
            assert context.minimum_version is ssl.TLSVersion.TLSv1_2

    async def test_it_verifies(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("truststore")
        self.paths(monkeypatch, None, None)
        error = await failure(tls.server_context(*own(tmp_path)), tls.client_context(None, ()))
        assert isinstance(error, TrustError)

    def test_without_the_library_there_is_openssls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths(monkeypatch, None, None)
        monkeypatch.setitem(sys.modules, "truststore", None)
        context = tls.client_context(None, ())
        assert type(context) is ssl.SSLContext
        assert context.verify_mode is ssl.CERT_REQUIRED

    def test_neither_with_an_authority_nor_with_pins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths(monkeypatch, None, None)
        assert type(tls.client_context(own(tmp_path)[0], ())) is ssl.SSLContext
        assert type(tls.client_context(None, (bytes(32),))) is ssl.SSLContext
