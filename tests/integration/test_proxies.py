"""Out of a network through proxies that no one here wrote: tinyproxy, squid (also in TLS), and microsocks."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme

from .process import Process, wait_until
from .programs import accepts, finish, require
from .sockets import Echo, pattern, read_exactly, read_to_end, unused_port
from .tunnel import Client, Server, run

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.programs, pytest.mark.timeout(120)]

IDLE_SECONDS = 5
USER, PASSWORD = "ann", "s3cret-pass"
SIZE = 3_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server"), plain=False) as running:
        yield running


@pytest.fixture(scope="module")
def echo() -> Iterator[str]:
    with Echo() as running:
        yield running.address


@contextmanager
def _up(process: Process, port: int) -> Iterator[int]:
    with process:
        wait_until(lambda: not process.running or accepts(port), f"{process.name} to listen")
        assert process.running, process.tail()
        yield port


@contextmanager
def tinyproxy(directory: Path, *settings: str) -> Iterator[int]:
    """Yields its port. It closes what is idle for IDLE_SECONDS."""
    program, port = require("tinyproxy"), unused_port()
    (directory / "tinyproxy.conf").write_text(
        f"Port {port}\nListen 127.0.0.1\nAllow 127.0.0.1\nTimeout {IDLE_SECONDS}\nMaxClients 100\n"
        + "\n".join(settings)
        + "\n"
    )
    with _up(Process("tinyproxy", [program, "-d", "-c", directory / "tinyproxy.conf"], directory=directory), port):
        yield port


@contextmanager
def squid(directory: Path, *settings: str, listener: str = "http_port", options: str = "") -> Iterator[int]:
    """Yields its port. It closes what is idle for IDLE_SECONDS."""
    program, port = require("squid"), unused_port()
    directory.chmod(0o755)
    (directory / "squid.conf").write_text(
        f"{listener} 127.0.0.1:{port} {options}\n"
        + "\n".join(settings)
        + f"""
http_access allow all
access_log none
cache_log /dev/stderr
cache deny all
pid_filename none
coredump_dir none
netdb_filename none
pinger_enable off
shutdown_lifetime 0 seconds
read_timeout {IDLE_SECONDS} seconds
cache_effective_user {"proxy" if os.geteuid() == 0 else "nobody"}
"""
    )
    # Its name keeps two squids' shared memory apart.
    argv = [program, "-N", "-n", f"t{port}", "-f", directory / "squid.conf"]
    with _up(Process("squid", argv, directory=directory), port):
        yield port


@contextmanager
def microsocks(directory: Path, *arguments: str) -> Iterator[int]:
    program, port = require("microsocks"), unused_port()
    argv = [program, "-i", "127.0.0.1", "-p", str(port), *arguments]
    with _up(Process("microsocks", argv, directory=directory, exit_codes=(0, -15)), port):
        yield port


def works(client: Client, target: str) -> None:
    """Megabytes both ways, a half-close and its answer."""
    data = pattern(SIZE)
    with client.connect(target) as connection:
        connection.sendall(data[:1000])
        assert read_exactly(connection, 1000) == data[:1000]
    with client.connect(target) as connection:
        for start in range(0, SIZE, 100_000):
            part = data[start : start + 100_000]
            connection.sendall(part)
            assert read_exactly(connection, len(part)) == part
        connection.shutdown(socket.SHUT_WR)
        assert read_to_end(connection) == b""


def survives_silence(client: Client, target: str) -> None:
    """Longer than the proxy allows: its links are cut, the stream goes on."""
    with client.connect(target) as connection:
        connection.sendall(b"before")
        assert read_exactly(connection, 6) == b"before"
        time.sleep(IDLE_SECONDS + 2)
        connection.sendall(b"after")
        assert read_exactly(connection, 5) == b"after"


def through(directory: Path, server: Server, target: str, proxy: str, *arguments: str) -> Client:
    return Client(directory, server.invitation.url, [target], arguments=["--proxy", proxy, *arguments])


class TestTinyproxy:
    def test_without_authentication(self, server: Server, echo: str, tmp_path: Path) -> None:
        with (
            tinyproxy(tmp_path) as port,
            through(tmp_path, server, echo, f"http://127.0.0.1:{port}") as client,
        ):
            works(client, echo)
            survives_silence(client, echo)

    def test_basic_authentication(self, server: Server, echo: str, tmp_path: Path) -> None:
        with tinyproxy(tmp_path, f"BasicAuth {USER} {PASSWORD}") as port:
            with through(tmp_path, server, echo, f"http://{USER}:{PASSWORD}@127.0.0.1:{port}") as client:
                works(client, echo)
                assert "among this command's arguments" in client.stderr
                assert PASSWORD not in client.stderr
            for user_info, text in (("", "wants user and password"), (f"{USER}:wrong@", "refused user and password")):
                proxy = f"http://{user_info}127.0.0.1:{port}"
                with through(tmp_path, server, echo, proxy) as client:
                    line = client.wait_for_line(r"cannot reach the server, trying again.*layer=proxy.*")
                    assert text in line[0]

    def test_a_port_that_is_not_allowed(self, server: Server, echo: str, tmp_path: Path) -> None:
        with (
            tinyproxy(tmp_path, "ConnectPort 443") as port,
            through(tmp_path, server, echo, f"http://127.0.0.1:{port}") as client,
        ):
            client.wait_for_line(r"cannot reach the server.*layer=proxy.*does not allow.*403")

    def test_the_environments_proxy(self, server: Server, echo: str, tmp_path: Path) -> None:
        with tinyproxy(tmp_path) as port:
            client = Client(tmp_path, server.invitation.url, [echo], arguments=["-v"])
            assert client._env is not None
            environ = dict(client._env)
            # The proxy is a dead port: with NO_PROXY it is not asked, without it nothing works.
            dead = unused_port()
            client._env = environ | {"HTTPS_PROXY": f"http://127.0.0.1:{dead}", "NO_PROXY": "127.0.0.0/8"}
            with client:
                works(client, echo)
            client._env = environ | {"HTTPS_PROXY": f"127.0.0.1:{dead}"}
            client._ports.clear()
            with client:
                client.wait_for_line(rf"layer=proxy.*cannot connect to the proxy 127\.0\.0\.1:{dead}")
            client._env = environ | {"https_proxy": f"127.0.0.1:{port}"}
            client._ports.clear()
            with client:
                works(client, echo)


class TestSquid:
    def test_without_authentication(self, server: Server, echo: str, tmp_path: Path) -> None:
        with (
            squid(tmp_path) as port,
            through(tmp_path, server, echo, f"http://127.0.0.1:{port}") as client,
        ):
            works(client, echo)
            survives_silence(client, echo)

    def test_basic_authentication(self, server: Server, echo: str, tmp_path: Path) -> None:
        helper = Path("/usr/lib/squid/basic_ncsa_auth")
        require("squid")
        hashed = finish(require("openssl"), "passwd", "-1", PASSWORD).stdout.decode().strip()
        (tmp_path / "users").write_text(f"{USER}:{hashed}\n")
        for path in (tmp_path, *tmp_path.parents):  # squid's helper is another user
            if path.stat().st_uid == os.geteuid() and path != Path("/"):
                path.chmod(path.stat().st_mode | 0o055)
            if path.name.startswith("pytest-of-"):
                break
        settings = (
            f"auth_param basic program {helper} {tmp_path}/users",
            "auth_param basic realm here",
            "acl known proxy_auth REQUIRED",
            "http_access deny !known",
        )
        with squid(tmp_path, *settings) as port:
            with through(tmp_path, server, echo, f"http://{USER}:{PASSWORD}@127.0.0.1:{port}") as client:
                works(client, echo)
            with through(tmp_path, server, echo, f"http://127.0.0.1:{port}") as client:
                client.wait_for_line(r"layer=proxy.*wants user and password \(407.*ERR_CACHE_ACCESS_DENIED")

    def test_a_server_that_is_away(self, server: Server, echo: str, tmp_path: Path) -> None:
        url = server.invitation.changed(port=unused_port())
        with (
            squid(tmp_path) as port,
            Client(tmp_path, url, [echo], arguments=["--proxy", f"http://127.0.0.1:{port}"]) as client,
        ):
            client.wait_for_line(r"layer=proxy.*could not reach 127\.0\.0\.1:\d+ \(503.*ERR_CONNECT_FAIL")

    def test_tls_to_the_proxy(self, echo: str, tmp_path: Path) -> None:
        """TLS in TLS. One authority for both, which --ca names."""
        authority = trustme.CA()
        ca = tmp_path / "ca.pem"
        authority.cert_pem.write_to_path(str(ca))
        certificate = authority.issue_cert("127.0.0.1", "localhost")
        cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
        cert.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
        certificate.private_key_pem.write_to_path(str(key))
        key.chmod(0o600)
        with (
            Server(tmp_path, plain=False, arguments=["--cert", str(cert), "--key", str(key)]) as server,
            squid(tmp_path, listener="https_port", options=f"tls-cert={cert} tls-key={key}") as port,
        ):
            url = server.invitation.changed(pin="")
            proxy = f"https://127.0.0.1:{port}"
            with Client(tmp_path, url, [echo], arguments=["--ca", str(ca), "--proxy", proxy]) as client:
                works(client, echo)
                survives_silence(client, echo)
            done = run(tmp_path, "client", "-L", f"0:{echo}", "--proxy", proxy, WSTUNNEL_URL=url)
            assert done.returncode == 1
            assert f"the proxy 127.0.0.1:{port} did not prove who it is" in done.stderr


class TestMicrosocks:
    @pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
    def test_without_authentication(self, server: Server, echo: str, tmp_path: Path, scheme: str) -> None:
        with (
            microsocks(tmp_path) as port,
            through(tmp_path, server, echo, f"{scheme}://127.0.0.1:{port}") as client,
        ):
            works(client, echo)

    def test_authentication(self, server: Server, echo: str, tmp_path: Path) -> None:
        with microsocks(tmp_path, "-u", USER, "-P", PASSWORD) as port:
            with through(tmp_path, server, echo, f"socks5h://{USER}:{PASSWORD}@127.0.0.1:{port}") as client:
                works(client, echo)
            for user_info, text in (("", "wants user and password"), (f"{USER}:wrong@", "refused user and password")):
                proxy = f"socks5h://{user_info}127.0.0.1:{port}"
                with through(tmp_path, server, echo, proxy) as client:
                    line = client.wait_for_line(r"cannot reach the server, trying again.*layer=proxy.*")
                    assert text in line[0]

    def test_a_server_that_is_away(self, server: Server, echo: str, tmp_path: Path) -> None:
        url = server.invitation.changed(port=unused_port())
        with (
            microsocks(tmp_path) as port,
            Client(tmp_path, url, [echo], arguments=["--proxy", f"socks5://127.0.0.1:{port}"]) as client,
        ):
            client.wait_for_line(r"layer=proxy.*says that the connection was refused")


def test_failover_to_the_next_server_and_back(server: Server, echo: str, tmp_path: Path) -> None:
    first_directory = tmp_path / "first"
    first_directory.mkdir()
    first = Server(first_directory, plain=True, port=unused_port())
    with first:
        urls = f"{first.invitation.url} {server.invitation.url}"
        port = first.port
        with Client(tmp_path, urls, [echo], arguments=["-v"]) as client:
            works(client, echo)
            first.stop(signal.SIGTERM)
            client.wait_for_line(r"trying the next server")
            works(client, echo)
            assert first.invitation.token not in client.stderr
    # The second goes; the first is there again.
    again = Server(first_directory, plain=True, port=port, name="again")
    second_directory = tmp_path / "second"
    second_directory.mkdir()
    with Server(second_directory, plain=True, name="second") as second:
        urls = f"{first.invitation.url} {second.invitation.url}"
        with Client(tmp_path, urls, [echo], arguments=["-v"], name="other") as client:
            works(client, echo)  # the first is away at the start
            with again:
                second.stop(signal.SIGTERM)
                works(client, echo)
