"""Redis through the tunnel: fifty clients, pipelines, a large value, publish and subscribe."""

from __future__ import annotations

import hashlib
import os
import re
import socket
from typing import TYPE_CHECKING

import pytest

from .programs import finish, redis, require, tunnel_to
from .sockets import SECONDS, read_exactly

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.programs, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with redis(tmp_path_factory.mktemp("redis") / "run") as port:
        yield port


@pytest.fixture(scope="module", params=["tls", "plain"])
def port(request: pytest.FixtureRequest, direct: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The tunnel's port that leads there."""
    directory = tmp_path_factory.mktemp("tunnel") / "run"
    with tunnel_to(f"127.0.0.1:{direct}", directory, plain=request.param == "plain") as local:
        yield local


def _redis(port: int, *arguments: str, data: bytes = b"") -> bytes:
    return finish(require("redis-cli"), "-h", "127.0.0.1", "-p", str(port), *arguments, data=data).stdout


@pytest.mark.parametrize("pipeline", ["1", "16"])
def test_benchmark(port: int, pipeline: str) -> None:
    command = [require("redis-benchmark"), "-h", "127.0.0.1", "-p", str(port), "-q", "-e", "-t", "set,get,lpush"]
    done = finish(*command, "-n", "20000", "-c", "50", "-P", pipeline)
    said = done.stdout.decode().replace("\r", "\n")
    rates = re.findall(r"^(\S+): ([0-9.]+) requests per second", said, re.MULTILINE)
    assert [name for name, _ in rates] == ["SET", "GET", "LPUSH"], said
    assert all(float(rate) > 0 for _, rate in rates)
    assert "rror" not in said, said


def test_value_of_64_mb(port: int, direct: int) -> None:
    value = os.urandom(64 << 20)
    assert _redis(port, "-x", "set", "large", data=value) == b"OK\n"
    stored = _redis(direct, "eval", "return redis.sha1hex(redis.call('get', 'large'))", "0")
    assert stored.strip().strip(b'"').decode() == hashlib.sha1(value).hexdigest()
    assert _redis(port, "--raw", "get", "large") == value + b"\n"
    _redis(direct, "del", "large")


def test_pipeline_of_ten_thousand(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
        connection.sendall(b"".join(b"ECHO m%d\r\n" % index for index in range(10_000)))
        expected = b"".join(b"$%d\r\nm%d\r\n" % (len(b"m%d" % index), index) for index in range(10_000))
        assert read_exactly(connection, len(expected)) == expected


def test_publish_and_subscribe(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as subscriber:
        subscriber.sendall(b"SUBSCRIBE news\r\n")
        confirmation = b"*3\r\n$9\r\nsubscribe\r\n$4\r\nnews\r\n:1\r\n"
        assert read_exactly(subscriber, len(confirmation)) == confirmation
        published = b"".join(b"PUBLISH news %05d\r\n" % index for index in range(1000))
        with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as publisher:
            publisher.sendall(published)
            assert read_exactly(publisher, 4000) == b":1\r\n" * 1000
        expected = b"".join(b"*3\r\n$7\r\nmessage\r\n$4\r\nnews\r\n$5\r\n%05d\r\n" % index for index in range(1000))
        assert read_exactly(subscriber, len(expected)) == expected


def test_blocking_pop_waits_through_the_tunnel(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as waiting:
        waiting.sendall(b"BLPOP queue 20\r\n")
        _redis(port, "rpush", "queue", "work")
        expected = b"*2\r\n$5\r\nqueue\r\n$4\r\nwork\r\n"
        assert read_exactly(waiting, len(expected)) == expected
