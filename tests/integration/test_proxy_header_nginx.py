"""nginx is told who really connects: `;proxy=v1` and `;proxy=v2`, by `-L` and by `-R`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .process import wait_until
from .programs import finish, nginx_with, require
from .sockets import unused_port
from .ways import Ways, ways

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.programs, pytest.mark.timeout(120)]

Way = tuple[Ways, Path, int]
SAID = "$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_addr $proxy_protocol_server_port $uri"


@pytest.fixture(scope="module", params=["v1", "v2"])
def way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Way]:
    """The tunnel, nginx' log, and nginx' port."""
    directory = tmp_path_factory.mktemp("nginx")
    port = unused_port()
    run = directory / "nginx"
    run.mkdir()
    log = directory / "said"
    servers = f"""
    log_format said '{SAID}';
    server {{
        listen 127.0.0.1:{port} proxy_protocol;
        access_log {log} said;
        root {run}/files;
    }}"""
    option = f"127.0.0.1:{port};proxy={request.param}"
    forwards = ["-L", f"127.0.0.1:0:{option}", "-L", f"[::1]:0:{option}", "-R", f"127.0.0.1:0:{option}"]
    forwards += ["-L", f"{directory}/x.sock:{option}"]
    with nginx_with(servers, run, port), ways(directory, *forwards) as running:
        yield running, log, port


def port_of(way: Way, listener: str) -> int:
    running, _, port = way
    return int(running.client.wait_for_line(rf"listening {listener} -> tcp:127\.0\.0\.1:{port}")[1])


def said(log: Path, page: str) -> str:
    """What nginx logged of the request for this page."""

    def lines() -> list[str]:
        return [line for line in log.read_text().splitlines() if line.endswith(f" /{page}")]

    wait_until(lambda: bool(lines()), "nginx' log")
    (line,) = lines()
    return line


def ask(url: str, *arguments: str) -> str:
    """Ask for a page. Returns the application's port."""
    command = [require("curl"), "--disable", "-sS", "--noproxy", "*", "-o", "/dev/null"]
    command += ["-w", "%{http_code} %{local_port}"]
    status, port = finish(*command, *arguments, url).stdout.decode().split()
    assert status == "404"
    return port


@pytest.mark.parametrize(
    ("flag", "listener", "source"),
    [
        ("-L", r"127\.0\.0\.1:(\d+)", "127.0.0.5"),
        ("-R", r"127\.0\.0\.1:(\d+) at the server", "127.0.0.6"),
        ("-L6", r"\[::1\]:(\d+)", "::1"),
    ],
)
def test_addresses(way: Way, flag: str, listener: str, source: str) -> None:
    port = port_of(way, listener)
    host, near = ("[::1]", "::1") if source == "::1" else ("127.0.0.1", "127.0.0.1")
    own = ask(f"http://{host}:{port}/{flag}", "--interface", source)
    assert said(way[1], flag) == f"{source} {own} {near} {port} /{flag}"


def test_a_unix_socket_has_no_address(way: Way) -> None:
    running, log, _ = way
    ask("http://x/unix", "--unix-socket", str(running.directory / "x.sock"))
    assert said(log, "unix").split()[0] in ("-", "127.0.0.1"), "UNKNOWN, or LOCAL"


def test_many_at_once_each_with_its_own(way: Way) -> None:
    port = port_of(way, r"127\.0\.0\.1:(\d+)")
    command = [require("curl"), "--disable", "-sS", "--noproxy", "*", "--parallel", "-H", "Connection: close"]
    urls = [part for number in range(30) for part in ("-o", "/dev/null", f"http://127.0.0.1:{port}/many-{number}")]
    finish(*command, *urls)
    ports = {said(way[1], f"many-{number}").split()[1] for number in range(30)}
    assert len(ports) == 30
