"""A Redis at the client, used at the server through `-R`: many clients, a large value, messages that come unasked."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from .programs import finish, redis, require
from .ways import ways

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.programs, pytest.mark.timeout(120)]

Ports = tuple[int, int]


@pytest.fixture(scope="module", params=["tls", "plain"])
def ports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    """The port at the server, and Redis' own."""
    directory = tmp_path_factory.mktemp("redis")
    with (
        redis(directory / "run") as direct,
        ways(directory, "-R", f"0:127.0.0.1:{direct}", plain=request.param == "plain") as running,
    ):
        yield running.port(f"tcp:127.0.0.1:{direct}"), direct


def cli(port: int, *arguments: str, data: bytes = b"") -> bytes:
    return finish(require("redis-cli"), "-h", "127.0.0.1", "-p", str(port), *arguments, data=data).stdout


def test_fifty_clients(ports: Ports) -> None:
    command = [require("redis-benchmark"), "-h", "127.0.0.1", "-p", str(ports[0]), "-q", "-e", "-t", "set,get,lpush"]
    said = finish(*command, "-n", "10000", "-c", "50").stdout.decode().replace("\r", "\n")
    rates = re.findall(r"^(\S+): ([0-9.]+) requests per second", said, re.MULTILINE)
    assert [name for name, _ in rates] == ["SET", "GET", "LPUSH"], said
    assert "rror" not in said, said


def test_a_large_value(ports: Ports) -> None:
    port, direct = ports
    value = os.urandom(32 << 20)
    assert cli(port, "-x", "set", "large", data=value) == b"OK\n"
    stored = cli(direct, "eval", "return redis.sha1hex(redis.call('get', 'large'))", "0")
    assert stored.strip().strip(b'"').decode() == hashlib.sha1(value).hexdigest()
    assert cli(port, "--raw", "get", "large") == value + b"\n"
    cli(direct, "del", "large")


def test_a_subscriber_is_told(ports: Ports) -> None:
    port, direct = ports
    command = [require("redis-cli"), "-h", "127.0.0.1", "-p", str(port), "subscribe", "news"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as subscriber:
        assert subscriber.stdout is not None
        assert [subscriber.stdout.readline() for _ in range(3)] == [b"subscribe\n", b"news\n", b"1\n"]
        assert cli(direct, "publish", "news", "unasked") == b"1\n"
        assert [subscriber.stdout.readline() for _ in range(3)] == [b"message\n", b"news\n", b"unasked\n"]
        subscriber.terminate()
