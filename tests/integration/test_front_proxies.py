"""nginx, HAProxy, Caddy and Apache in front of the server, with the configurations of the how-to page, word for word.

Only ports, addresses, certificates and timeouts are others: 5 seconds instead of 60, and the page's TCP port of the
server is one of [::1], so that the proxy's address and the client's differ.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from wstunnel import tls

from .process import Process, wait_until
from .programs import accepts, require
from .sockets import SECONDS, Listener, read_exactly, read_to_end, unused_port
from .tunnel import Client, Server, run

pytestmark = [pytest.mark.programs, pytest.mark.timeout(180)]

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "behind-a-reverse-proxy.md"
FORGED = "203.0.113.9"
SILENCE_SECONDS = 7
"""Longer than the proxies' 5, shorter than the 13 and 15 after which the two ends ping each other."""
PIECES = 40


def block(name: str) -> str:
    """The page's configuration behind the mark `<!-- name -->`."""
    found = re.search(rf"^<!-- {name} -->\n```\w+\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{PAGE.name} has no block {name}"
    return found[1]


def changed(text: str, *changes: tuple[str, str]) -> str:
    """The text with each of these replaced wherever it stands, which must be somewhere."""
    for old, new in changes:
        assert old in text, f"{old!r} is not in the page's configuration"
        text = text.replace(old, new)
    return text


@dataclass(frozen=True)
class Place:
    """What a proxy is given."""

    directory: Path
    cert: Path
    key: Path
    port: int
    server: str

    @property
    def temporary(self) -> Path:
        made = self.directory / "temporary"
        made.mkdir(exist_ok=True)
        return made


def _write(place: Place, name: str, text: str) -> Path:
    path = place.directory / name
    path.write_text(text)
    return path


def nginx(place: Place, *, unix: bool = False) -> Process:
    site = block("nginx")
    if unix:
        (line,) = re.findall(r"^ *proxy_pass .*\n", site, re.MULTILINE)
        path = "/run/wstunnel/wstunnel.sock"
        site = site.replace(line, changed(block("nginx-unix"), (path, place.server)))
    else:
        site = changed(site, ("127.0.0.1:8080", place.server))
    site = changed(
        site,
        ("listen 443", f"listen 127.0.0.1:{place.port}"),
        ("/etc/ssl/tunnel/fullchain.pem", str(place.cert)),
        ("/etc/ssl/tunnel/privkey.pem", str(place.key)),
        ("60s", "5s"),
    )
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "\n".join(f"{kind}_temp_path {place.temporary}/{kind};" for kind in kinds)
    path = _write(
        place,
        "nginx.conf",
        # Its workers leave root for a user who may not enter pytest's directories.
        f"{'user root;' if os.geteuid() == 0 else ''}\ndaemon off;\nworker_processes 1;\npid {place.directory}/pid;\n"
        f"error_log {place.directory}/error.log;\nevents {{ worker_connections 256; }}\n"
        f"http {{\naccess_log {place.directory}/access.log;\n{temporary}\n{site}}}\n",
    )
    argv = [require("nginx"), "-p", place.directory, "-c", path, "-e", place.directory / "error.log"]
    return Process("proxy", argv, directory=place.directory)


def haproxy(place: Place, *, name: str = "haproxy", through: bool = False) -> Process:
    crt = "/etc/haproxy/tunnel.pem"
    pem = _write(place, "tunnel.pem", place.cert.read_text() + place.key.read_text())
    text = changed(
        block(name),
        ("bind :443", f"bind 127.0.0.1:{place.port}"),
        ("127.0.0.1:8080", place.server),
        ("60s", "5s"),
        (f" ssl crt {crt}", "" if through else f" ssl crt {pem}"),
    )
    if through:
        text = changed(text, ("send-proxy-v2", "send-proxy"))  # the other version
    path = _write(place, "haproxy.cfg", f"global\n    maxconn 256\n{text}")
    # It ends by the signal that asked it to.
    argv = [require("haproxy"), "-db", "-f", path]
    return Process("proxy", argv, directory=place.directory, exit_codes=(0, -signal.SIGTERM))


def caddy(place: Place) -> Process:
    site = changed(
        block("caddy"),
        ("tunnel.example.org {", f"https://127.0.0.1:{place.port} {{\n    tls {place.cert} {place.key}"),
        ("127.0.0.1:8080", place.server),
        ("60s", "5s"),
    )
    path = _write(place, "Caddyfile", f"{{\n    admin off\n    auto_https disable_redirects\n}}\n{site}")
    home = {name: str(place.temporary) for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME")}
    argv = [require("caddy"), "run", "--config", path, "--adapter", "caddyfile"]
    return Process("proxy", argv, directory=place.directory, env=os.environ | home)


def apache(place: Place) -> Process:
    modules = Path("/usr/lib/apache2/modules")
    site = changed(
        block("apache"),
        ("*:443", f"127.0.0.1:{place.port}"),
        ("/etc/ssl/tunnel/fullchain.pem", str(place.cert)),
        ("/etc/ssl/tunnel/privkey.pem", str(place.key)),
        ("127.0.0.1:8080", place.server),
        ("Timeout 60", "Timeout 5"),
    )
    names = ("mpm_event", "authz_core", "ssl", "headers", "proxy", "proxy_http", "proxy_wstunnel")
    load = "\n".join(f"LoadModule {name}_module {modules}/mod_{name}.so" for name in names)
    path = _write(
        place,
        "apache.conf",
        f"ServerRoot {place.directory}\nServerName localhost\nPidFile {place.directory}/pid\n"
        f"DefaultRuntimeDir {place.temporary}\nListen 127.0.0.1:{place.port}\nErrorLog {place.directory}/error.log\n"
        f"{load}\nStartServers 2\nThreadsPerChild 50\nMaxRequestWorkers 100\n"
        f"{'User nobody' if os.geteuid() == 0 else ''}\n{site}",
    )
    return Process("proxy", [require("apache2"), "-D", "FOREGROUND", "-f", path], directory=place.directory)


@dataclass(frozen=True)
class Front:
    """One way to stand in front of the server.

    Args:
        start: the proxy, not yet running.
        flags: of the server, besides its address and `--plain`.
        peer: what the server's log calls the client, as a regular expression.
        unix: the server is reached by a Unix socket.
        tls: the server speaks TLS itself.
    """

    start: Callable[[Place], Process]
    flags: tuple[str, ...] = ("--trust-proxy", "::1")
    peer: str = r"127\.0\.0\.1"
    unix: bool = False
    tls: bool = False


TCP_FLAGS = ("--proxy-protocol", "::1", "--path", "/tunnel/")
WITH_PORT = r"127\.0\.0\.1:\d+"
FRONTS = {
    "nginx": Front(nginx),
    "nginx-unix": Front(lambda place: nginx(place, unix=True), ("--trust-proxy", "unix"), unix=True),
    "haproxy": Front(haproxy),
    "haproxy-tcp": Front(lambda place: haproxy(place, name="haproxy-tcp"), TCP_FLAGS, WITH_PORT),
    "haproxy-tcp-through": Front(
        lambda place: haproxy(place, name="haproxy-tcp", through=True), TCP_FLAGS, WITH_PORT, tls=True
    ),
    "caddy": Front(caddy),
    "apache": Front(apache),
}


@dataclass(frozen=True)
class Route:
    """A tunnel whose links all come through the proxy."""

    server: Server
    client: Client
    listener: Listener


def _public_url(server: Server, front: Front, port: int, pin: str) -> str:
    where = ("--host", f"127.0.0.1:{port}") if front.tls else ("--url", f"wss://127.0.0.1:{port}/tunnel/#sha256={pin}")
    done = run(server.state.parent, "invite", "--state-dir", str(server.state), *where)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextmanager
def through(front: Front, directory: Path) -> Iterator[Route]:
    cert, key = tls.ensure_certificate(directory, names=("localhost",))
    pin = tls.certificate_pin(cert).hex()
    socket_file = directory / "server.sock"
    flags = ("--bind", f"unix:{socket_file};mode=666") if front.unix else ("--bind", "::1")
    with ExitStack() as stack:
        server = Server(directory, plain=not front.tls, arguments=[*flags, *front.flags])
        stack.enter_context(server)
        place = Place(directory, cert, key, unused_port(), str(socket_file) if front.unix else f"[::1]:{server.port}")
        proxy = stack.enter_context(front.start(place))
        wait_until(lambda: not proxy.running or accepts(place.port), "the proxy to listen")
        assert proxy.running, proxy.tail()
        listener = stack.enter_context(Listener())
        url = _public_url(server, front, place.port, pin)
        # The proxy's client says that it is somebody else.
        forged = ("--header", f"X-Forwarded-For: {FORGED}")
        client = Client(directory, url, [listener.address], arguments=["-v", *forged])
        yield Route(server, stack.enter_context(client), listener)


def _exchange(sender: socket.socket, receiver: socket.socket) -> None:
    """Random bytes, in pieces that fit into any buffer: each comes out before the next goes in."""
    sender.settimeout(SECONDS)
    receiver.settimeout(SECONDS)
    for _ in range(PIECES):
        piece = os.urandom(65536)
        sender.sendall(piece)
        assert read_exactly(receiver, len(piece)) == piece


@pytest.mark.parametrize("name", FRONTS)
def test_a_silent_stream_outlives_the_proxys_patience(name: str, tmp_path: Path) -> None:
    front = FRONTS[name]
    with through(front, tmp_path) as route:
        with route.client.connect(route.listener.address) as app, route.listener.accept() as target:
            _exchange(app, target)
            _exchange(target, app)
            time.sleep(SILENCE_SECONDS)
            _exchange(app, target)
            _exchange(target, app)
            app.shutdown(socket.SHUT_WR)
            assert target.recv(1) == b""
            target.sendall(b"the end")
            target.shutdown(socket.SHUT_WR)
            assert read_to_end(app) == b"the end"
        route.client.stop(signal.SIGINT)
        wait_until(lambda: "client gone" in route.server.stderr, "the client to be gone")
        said = route.server.stderr
        (peer,) = re.findall(r"client connected .*?\bpeer=(\S+)", said)
        assert re.fullmatch(front.peer, peer), said
        assert FORGED not in said
        (resumptions,) = re.findall(r"client gone .*?\bresumptions=(\d+)", said)
        assert int(resumptions) >= 1, "the proxy had patience, so nothing was shown"
