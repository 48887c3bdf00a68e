"""curl through the SOCKS and HTTP proxies: names and addresses, https, passwords, and what it says of failures."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from .programs import finish, make_file, nginx_with, require
from .sockets import Refusing, unused_port
from .ways import Ways, ways

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.programs, pytest.mark.timeout(120)]

SIZE = 5_000_000
PLACES = [
    (scheme, host)
    for scheme in ("socks4", "socks4a", "socks5", "socks5h", "http")
    for host in ("localhost", "127.0.0.1", "[::1]")
    if not (scheme.startswith("socks4") and host == "[::1]")  # which has no IPv6
]
LOGIN = "somebody:with a secret"


class Site:
    """nginx on both loopback addresses, in clear and over TLS, with one certificate for `localhost`."""

    def __init__(self, directory: Path) -> None:
        self.http, self.https = unused_port(), unused_port()
        self.certificate = directory / "site.pem"
        self._key = directory / "site.key"
        self.log = directory / "nginx" / "access.log"
        finish(
            require("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-keyout", self._key, "-out", self.certificate, "-subj", "/CN=localhost", "-days", "2",
            "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1",
        )  # fmt: skip

    def config(self, files: Path) -> str:
        return f"""
    server {{
        listen 127.0.0.1:{self.http};
        listen [::1]:{self.http};
        listen 127.0.0.1:{self.https} ssl;
        listen [::1]:{self.https} ssl;
        ssl_certificate {self.certificate};
        ssl_certificate_key {self._key};
        root {files};
    }}"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, str]]:
    """The site, and the digest of its file `large`."""
    directory = tmp_path_factory.mktemp("site")
    made = Site(directory)
    run = directory / "nginx"
    run.mkdir()
    with nginx_with(made.config(run / "files"), run, made.http) as files:
        yield made, make_file(files / "large", SIZE)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    allow = [part for rule in ("*:*", "tcp:[::1]:*") for part in ("--allow", rule)]
    with ways(tmp_path_factory.mktemp("ways"), "-D", "0", "--http-proxy", "0", server_arguments=allow) as made:
        yield made


def proxy(running: Ways, scheme: str) -> str:
    port = running.port("HTTP proxy" if scheme == "http" else "SOCKS proxy")
    return f"{scheme}://127.0.0.1:{port}"


def curl(*arguments: str | Path, expect: int = 0) -> bytes:
    """What it wrote: to stdout, or, if it failed, to stderr."""
    done = finish(require("curl"), "--disable", "-sS", "--noproxy", "", *arguments, expect=expect, within=30)
    return done.stderr if expect else done.stdout


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize(("scheme", "host"), PLACES)
def test_a_file(running: Ways, site: tuple[Site, str], *, scheme: str, secure: bool, host: str) -> None:
    found, digest = site
    url = f"https://{host}:{found.https}/large" if secure else f"http://{host}:{found.http}/large"
    family = ["-4"] if scheme in ("socks4", "socks5") and host == "localhost" else []
    got = curl("-x", proxy(running, scheme), *family, "--cacert", found.certificate, "-f", url)
    assert hashlib.sha256(got).hexdigest() == digest


def test_many_requests_on_one_connection_to_the_http_proxy(running: Ways, site: tuple[Site, str]) -> None:
    """Two targets in turn: each request gets its own, whatever curl keeps open."""
    found, _ = site
    urls = [f"http://{host}:{found.http}/none" for host in ("127.0.0.1", "localhost") * 3]
    said = curl("-x", proxy(running, "http"), "-w", "%{http_code} ", "-o", "/dev/null", *urls[:1])
    assert said == b"404 "
    discard = [part for _ in urls for part in ("-o", "/dev/null")]
    assert curl("-x", proxy(running, "http"), "-w", "%{http_code} ", *discard, *urls) == b"404 " * 6


class TestFailures:
    """curl's own exit codes: 97 for SOCKS, 56 for CONNECT that was refused, and an answer for a request in clear."""

    @pytest.mark.parametrize("scheme", ["socks4a", "socks5h"])
    def test_a_name_that_fails_socks(self, running: Ways, scheme: str) -> None:
        said = curl("-x", proxy(running, scheme), "http://name.invalid/", expect=97)
        # RFC 1928 §6: 4 is "Host unreachable". SOCKS 4 has but one code for all.
        assert (b"(4)" if scheme == "socks5h" else b"(91)") in said, said

    def test_a_name_that_fails_http(self, running: Ways) -> None:
        url = proxy(running, "http")
        assert b"response 502" in curl("-x", url, "https://name.invalid/", expect=56)
        assert curl("-x", url, "-w", "%{http_code}", "-o", "/dev/null", "http://name.invalid/") == b"502"
        assert b"name.invalid" in curl("-x", url, "http://name.invalid/")

    def test_a_target_that_refuses(self, running: Ways) -> None:
        with Refusing.bind() as refusing:
            # RFC 1928 §6: 5 is "Connection refused".
            assert b"(5)" in curl("-x", proxy(running, "socks5h"), f"http://{refusing.address}/", expect=97)
            assert b"(91)" in curl("-x", proxy(running, "socks4a"), f"http://{refusing.address}/", expect=97)
            assert b"response 502" in curl("-x", proxy(running, "http"), f"https://{refusing.address}/", expect=56)

    def test_a_target_that_is_forbidden(self, running: Ways) -> None:
        # RFC 1928 §6: 2 is "connection not allowed by ruleset".
        assert b"(2)" in curl("-x", proxy(running, "socks5h"), "http://169.254.169.254/", expect=97)
        assert b"response 403" in curl("-x", proxy(running, "http"), "https://169.254.169.254/", expect=56)


class TestLogin:
    @pytest.fixture(scope="class")
    @classmethod
    def asking(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
        directory = tmp_path_factory.mktemp("login")
        login = directory / "login"
        login.write_text(LOGIN + "\n")
        login.chmod(0o600)
        both = str(unused_port())  # one port that tells both apart
        with ways(directory, "-D", both, "--http-proxy", both, "--dynamic-login", str(login)) as made:
            yield made

    @staticmethod
    def proxy(asking: Ways, scheme: str) -> str:
        return f"{scheme}://127.0.0.1:{asking.port('SOCKS/HTTP proxy')}"

    @pytest.mark.parametrize("scheme", ["socks5", "socks5h", "http"])
    @pytest.mark.parametrize("secure", [False, True])
    def test_the_right_one(self, asking: Ways, site: tuple[Site, str], scheme: str, secure: bool) -> None:
        found, _ = site
        url = f"https://127.0.0.1:{found.https}/" if secure else f"http://127.0.0.1:{found.http}/"
        arguments = ["-x", self.proxy(asking, scheme), "-U", LOGIN, "--cacert", found.certificate]
        assert curl(*arguments, "-w", "%{http_code}", "-o", "/dev/null", f"{url}none") == b"404"

    @pytest.mark.parametrize("user", [[], ["-U", "somebody:wrong"], ["-U", "nobody:with a secret"]])
    def test_none_and_wrong_ones(self, asking: Ways, site: tuple[Site, str], user: list[str]) -> None:
        found, _ = site
        url = f"http://127.0.0.1:{found.http}/none"
        curl("-x", self.proxy(asking, "socks5h"), *user, url, expect=97)
        curl("-x", self.proxy(asking, "socks4a"), *user, url, expect=97)
        http = ["-x", self.proxy(asking, "http"), *user]
        assert curl(*http, "-w", "%{http_code}", "-o", "/dev/null", url) == b"407"
        assert b"response 407" in curl(*http, f"https://127.0.0.1:{found.https}/", expect=56)
        assert "secret" not in asking.client.stderr
