"""nginx and curl through the tunnel: 500 MB, a hundred requests at once, an upload, kept and closed connections."""

from __future__ import annotations

import hashlib
import socket
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from .programs import finish, hash_file, make_file, nginx, require, tunnel_to
from .sockets import SECONDS, read_to_end

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.programs, pytest.mark.timeout(180)]

LARGE = 500_000_000
SMALL = 100_000
CURL = ["--silent", "--show-error", "--fail", "--noproxy", "*", "--disable"]


@dataclass(frozen=True)
class Site:
    """nginx, its files, and the tunnel's port that leads to it."""

    directory: Path
    direct: int
    port: int

    @property
    def files(self) -> Path:
        return self.directory / "files"

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    directory = tmp_path_factory.mktemp("nginx") / "run"
    with nginx(directory) as port:
        yield directory, port


@pytest.fixture(scope="module", params=["tls", "plain"])
def site(
    request: pytest.FixtureRequest, direct: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("tunnel") / "run"
    with tunnel_to(f"127.0.0.1:{direct[1]}", directory, plain=request.param == "plain") as port:
        yield Site(direct[0], direct[1], port)


def _curl(*arguments: str | Path) -> bytes:
    return finish(require("curl"), *CURL, *arguments).stdout


def test_download_of_500_mb(site: Site) -> None:
    large = site.files / "large"
    try:
        expected = make_file(large, LARGE)
        digest = hashlib.sha256()
        command = [require("curl"), *CURL, site.url("large")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as curl:
            assert curl.stdout is not None
            while block := curl.stdout.read(1 << 20):  # nothing of it is kept on disk
                digest.update(block)
        assert curl.returncode == 0
        assert digest.hexdigest() == expected
    finally:
        large.unlink(missing_ok=True)


def test_100_requests_at_once(site: Site, tmp_path: Path) -> None:
    expected = [make_file(site.files / f"part-{index}", SMALL) for index in range(1, 101)]
    _curl(
        "--parallel", "--parallel-max", "100", "--parallel-immediate",
        "--output", tmp_path / "part-#1", site.url("part-[1-100]"),
    )  # fmt: skip
    assert [hash_file(tmp_path / f"part-{index}") for index in range(1, 101)] == expected


def test_upload(site: Site, tmp_path: Path) -> None:
    local = tmp_path / "upload"
    uploaded = site.files / "uploaded"
    uploaded.unlink(missing_ok=True)
    try:
        expected = make_file(local, 100_000_000)
        _curl("--upload-file", local, site.url("uploaded"))
        assert hash_file(uploaded) == expected
    finally:
        for path in (local, uploaded):
            path.unlink(missing_ok=True)


def test_one_connection_for_many_requests(site: Site) -> None:
    make_file(site.files / "kept", SMALL)
    said = _curl("--output", "/dev/null", "--write-out", "%{http_code} %{num_connects}\n", site.url("kept?[1-20]"))
    lines = said.decode().splitlines()
    assert lines == ["200 1", *["200 0"] * 19]


def test_the_server_closes_after_its_reply(site: Site) -> None:
    make_file(site.files / "closed", 3_000_000)
    for _ in range(10):
        body = _curl("--header", "Connection: close", site.url("closed"))
        assert hashlib.sha256(body).hexdigest() == hash_file(site.files / "closed")


def test_a_client_that_half_closes_gets_its_reply(site: Site) -> None:
    # Less than 2 MiB, its `sendfile_max_chunk`: nginx looks at its client between two such pieces, takes the half-close
    # for a whole one now and then, and ends the reply there, without a tunnel, too.
    make_file(site.files / "half", 1_000_000)
    request = b"GET /half HTTP/1.0\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", site.port), timeout=SECONDS) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        head, _, body = read_to_end(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert hashlib.sha256(body).hexdigest() == hash_file(site.files / "half")


def test_an_aborted_download_frees_the_connection(site: Site) -> None:
    large = site.files / "aborted"
    try:
        make_file(large, 100_000_000)
        # curl gives up after the first megabyte, by closing with unread input.
        finish(require("curl"), *CURL, "--max-filesize", "1000000", site.url("aborted"), expect=63)
        assert _curl("--output", "/dev/null", "--write-out", "%{http_code}", site.url("aborted")) == b"200"
    finally:
        large.unlink(missing_ok=True)
