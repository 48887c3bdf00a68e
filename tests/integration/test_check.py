"""`wstunnel check` against a real server, and against what stands in its place or in between."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from .process import Process, wait_until
from .programs import accepts, require
from .sockets import unused_port
from .test_proxies import IDLE_SECONDS, PASSWORD, USER, microsocks, squid, tinyproxy
from .tunnel import Server, environment, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.programs, pytest.mark.timeout(180)]

OTHER_TOKEN = "A" * 43
OTHER_PIN = f"#sha256={'A' * 43}"
DIRECT = ["name", "route", "proxy", "tcp", "tls", "http", "authentication", "tunnel", "round-trip"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server"), plain=False) as running:
        yield running


@pytest.fixture(scope="module")
def plain_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("plain"), plain=True) as running:
        yield running


def check(directory: Path, url: str, *arguments: str, code: int) -> dict[str, Any]:
    """The JSON of a check that ends with `code`; its secrets are looked for."""
    done = run(directory, "check", "--json", *arguments, WSTUNNEL_URL=url)
    assert done.returncode == code, done.stdout + done.stderr
    print(done.stdout, done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["ok"] is (code == 0)
    token = url.partition("//")[2].partition("@")[0]
    assert token not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return found


def failed(found: dict[str, Any]) -> dict[str, Any]:
    """The step that failed: the last one."""
    steps: list[dict[str, Any]] = found["steps"]
    assert [step["ok"] for step in steps[:-1]] == [True] * (len(steps) - 1)
    assert not steps[-1]["ok"]
    assert steps[-1]["next"]
    return steps[-1]


@contextmanager
def up(process: Process, port: int) -> Iterator[int]:
    with process:
        wait_until(lambda: not process.running or accepts(port), f"{process.name} to listen")
        assert process.running, process.tail()
        yield port


class TestServer:
    def test_good(self, server: Server, plain_server: Server, tmp_path: Path) -> None:
        found = check(tmp_path, server.invitation.url, code=0)
        assert [step["step"] for step in found["steps"]] == DIRECT
        tls = found["steps"][4]["evidence"]
        assert (tls["trusted_by"], tls["key"]) == ("pin", server.invitation.pin.removeprefix("#"))
        assert found["url"] == f"wss://127.0.0.1:{server.port}/"
        check(tmp_path, plain_server.invitation.url, code=0)

    def test_text(self, server: Server, tmp_path: Path) -> None:
        done = run(tmp_path, "check", WSTUNNEL_URL=server.invitation.url, PYTHONIOENCODING="utf-8")
        assert done.returncode == 0
        assert done.stdout.count("✓") == len(DIRECT)
        assert done.stdout.endswith("all is well\n")

    def test_a_wrong_token(self, server: Server, tmp_path: Path) -> None:
        step = failed(check(tmp_path, server.invitation.changed(token=OTHER_TOKEN), code=3))
        assert step["step"] == "authentication"
        assert step["evidence"]["status"] == 401

    def test_a_wrong_pin(self, server: Server, tmp_path: Path) -> None:
        step = failed(check(tmp_path, server.invitation.changed(pin=OTHER_PIN), code=1))
        assert step["step"] == "tls"
        assert server.invitation.pin.removeprefix("#") in step["text"]
        assert '"wstunnel"' in step["text"], "the issuer of what was shown"

    def test_no_pin(self, server: Server, tmp_path: Path) -> None:
        step = failed(check(tmp_path, server.invitation.changed(pin=""), code=1))
        assert step["step"] == "tls"
        assert "self-signed" in step["text"]

    def test_a_wrong_path(self, server: Server, tmp_path: Path) -> None:
        url = server.invitation.url.replace("/#", "/elsewhere#")
        step = failed(check(tmp_path, url, code=1))
        assert (step["step"], step["evidence"]["status"]) == ("http", 404)

    def test_ws_where_it_speaks_tls(self, server: Server, tmp_path: Path) -> None:
        url = f"ws://{OTHER_TOKEN}@127.0.0.1:{server.port}/"
        step = failed(check(tmp_path, url, code=1))
        assert step["step"] == "http"
        assert "wss://" in step["text"] + step["next"]

    def test_wss_where_it_does_not(self, plain_server: Server, tmp_path: Path) -> None:
        url = f"wss://{OTHER_TOKEN}@127.0.0.1:{plain_server.port}/{OTHER_PIN}"
        step = failed(check(tmp_path, url, code=1))
        assert step["step"] == "tls"
        assert "ws://" in step["text"]

    def test_nothing_listens(self, server: Server, tmp_path: Path) -> None:
        step = failed(check(tmp_path, server.invitation.changed(port=unused_port()), code=1))
        assert step["step"] == "tcp"
        assert "connection refused" in step["text"]

    def test_a_name_that_does_not_exist(self, tmp_path: Path) -> None:
        url = f"wss://{OTHER_TOKEN}@no-such-name.invalid/"  # RFC 6761 §6.4
        step = failed(check(tmp_path, url, code=1))
        assert step["step"] == "name"
        assert "no-such-name.invalid" in step["text"]


class TestOthersInItsPlace:
    def test_a_web_server(self, tmp_path: Path) -> None:
        port = unused_port()
        (tmp_path / "index.html").write_text("<html>log in here</html>")
        argv = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path)]
        web = Process("web", argv, directory=tmp_path, env=environment(tmp_path), exit_codes=(0, -15))
        with up(web, port):
            step = failed(check(tmp_path, f"ws://{OTHER_TOKEN}@127.0.0.1:{port}/", code=1))
            assert (step["step"], step["evidence"]["status"]) == ("http", 200)
            assert "SimpleHTTP" in step["evidence"]["server"]
            assert step["evidence"]["content_type"] == "text/html"
            assert "log-in page" in step["next"]
            step = failed(check(tmp_path, f"ws://{OTHER_TOKEN}@127.0.0.1:{port}/t", code=1))
            assert (step["step"], step["evidence"]["status"]) == ("http", 404)


@contextmanager
def nginx(directory: Path, target: int, *lines: str, tls: bool = False) -> Iterator[int]:
    """nginx in front of a plain server, with an idle timeout of IDLE_SECONDS. Yields its port."""
    program, port = require("nginx"), unused_port()
    secure = ""
    if tls:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(directory / "ca.pem"))
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(directory / "nginx.pem"))
        secure = f"ssl_certificate {directory}/nginx.pem; ssl_certificate_key {directory}/nginx.pem;"
    user = "user root;" if os.geteuid() == 0 else ""
    temporary = "\n".join(
        f"{kind}_temp_path {directory}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    settings = "\n".join(lines)
    (directory / "nginx.conf").write_text(
        f"""
{user}
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off;
    {temporary}
    server {{
        listen 127.0.0.1:{port}{" ssl" if tls else ""};
        {secure}
        location / {{
            proxy_pass http://127.0.0.1:{target};
            proxy_read_timeout {IDLE_SECONDS}s;
            {settings}
        }}
    }}
}}
"""
    )
    argv: list[str | Path] = [program, "-p", directory, "-c", directory / "nginx.conf", "-e", directory / "error.log"]
    with up(Process("nginx", argv, directory=directory), port):
        yield port


UPGRADE = (
    "proxy_http_version 1.1;",
    "proxy_set_header Upgrade $http_upgrade;",
    'proxy_set_header Connection "upgrade";',
    "proxy_set_header Host $host;",
)


def closes_after_idle_seconds(found: dict[str, Any]) -> None:
    """What `--idle 8` says of a way whose idle timeout is IDLE_SECONDS: too short for our keepalive."""
    step = found["steps"][-1]
    assert (step["step"], step["ok"]) == ("idle", False)
    evidence = step["evidence"]
    assert 2 <= evidence["at_least"] <= IDLE_SECONDS
    assert IDLE_SECONDS - 0.5 <= evidence["at_most"] <= IDLE_SECONDS + 3
    assert "not enough" in step["text"]
    assert "idle timeout" in step["next"]
    assert [step["ok"] for step in found["steps"][:9]] == [True] * 9


class TestInBetween:
    def test_nginx_that_drops_the_upgrade(self, plain_server: Server, tmp_path: Path) -> None:
        with nginx(tmp_path, plain_server.port) as port:
            step = failed(check(tmp_path, plain_server.invitation.changed(port=port), code=1))
            assert step["step"] == "http"
            assert "nginx" in step["evidence"]["server"]
            assert "Upgrade" in step["next"]

    def test_nginx_in_front_of_nothing(self, plain_server: Server, tmp_path: Path) -> None:
        with nginx(tmp_path, unused_port(), *UPGRADE) as port:
            step = failed(check(tmp_path, plain_server.invitation.changed(port=port), code=1))
            assert (step["step"], step["evidence"]["status"]) == ("http", 502)

    def test_nginx_closes_what_is_silent(self, plain_server: Server, tmp_path: Path) -> None:
        with nginx(tmp_path, plain_server.port, *UPGRADE, tls=True) as port:
            url = plain_server.invitation.changed(port=port).replace("ws://", "wss://")
            found = check(tmp_path, url, "--ca", str(tmp_path / "ca.pem"), "--idle", "8", code=1)
            closes_after_idle_seconds(found)
            assert "trustme" in found["steps"][4]["evidence"]["issuer"]

    def test_tinyproxy_closes_what_is_silent(self, server: Server, tmp_path: Path) -> None:
        with tinyproxy(tmp_path) as port:
            arguments = ("--proxy", f"http://127.0.0.1:{port}", "--idle", "8")
            found = check(tmp_path, server.invitation.url, *arguments, code=1)
            closes_after_idle_seconds(found)
            (proxy,) = [step for step in found["steps"] if step["step"] == "proxy"]
            assert proxy["evidence"]["why"] == "--proxy"

    def test_tinyproxy_that_does_not_allow_the_port(self, server: Server, tmp_path: Path) -> None:
        with tinyproxy(tmp_path, "ConnectPort 443") as port:
            done = run(tmp_path, "check", "--json", WSTUNNEL_URL=server.invitation.url, HTTPS_PROXY=f"127.0.0.1:{port}")
            assert done.returncode == 1
            step = failed(json.loads(done.stdout))
            assert (step["step"], step["evidence"]["why"]) == ("proxy", "HTTPS_PROXY")
            assert "443" in step["next"]

    def test_squid_in_tls_closes_what_is_silent(self, tmp_path: Path) -> None:
        """TLS to the server in TLS to the proxy. Of a proxy whose authority is unknown it is said what to do."""
        authority = trustme.CA()
        ca, cert, key = tmp_path / "ca.pem", tmp_path / "cert.pem", tmp_path / "key.pem"
        authority.cert_pem.write_to_path(str(ca))
        certificate = authority.issue_cert("127.0.0.1")
        certificate.cert_chain_pems[0].write_to_path(str(cert))
        certificate.private_key_pem.write_to_path(str(key))
        key.chmod(0o600)
        with (
            Server(tmp_path, plain=False, arguments=["--cert", str(cert), "--key", str(key)]) as server,
            squid(tmp_path, listener="https_port", options=f"tls-cert={cert} tls-key={key}") as port,
        ):
            url, proxy = server.invitation.changed(pin=""), f"https://127.0.0.1:{port}"
            found = check(tmp_path, url, "--ca", str(ca), "--proxy", proxy, "--idle", "8", code=1)
            closes_after_idle_seconds(found)
            assert [step["step"] for step in found["steps"][:5]] == ["name", "route", "tcp", "proxy", "tls"]
            step = failed(check(tmp_path, url, "--proxy", proxy, code=1))
            assert step["step"] == "proxy"
            assert "did not prove who it is" in step["text"]
            assert "--ca" in step["next"]

    def test_microsocks(self, server: Server, tmp_path: Path) -> None:
        with microsocks(tmp_path, "-u", USER, "-P", PASSWORD) as port:
            proxy = f"socks5h://{USER}:{PASSWORD}@127.0.0.1:{port}"
            found = check(tmp_path, server.invitation.url, "--proxy", proxy, "--idle", "2", code=0)
            assert [step["step"] for step in found["steps"][:5]] == ["name", "route", "tcp", "proxy", "tls"]
            assert PASSWORD not in json.dumps(found)
            step = failed(check(tmp_path, server.invitation.url, "--proxy", f"socks5h://127.0.0.1:{port}", code=1))
            assert (step["step"], "wants user and password" in step["text"]) == ("proxy", True)
            dead = server.invitation.changed(port=unused_port())
            step = failed(check(tmp_path, dead, "--proxy", proxy, code=1))
            assert (step["step"], "connection was refused" in step["text"]) == ("proxy", True)
