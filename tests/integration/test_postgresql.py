"""PostgreSQL through the tunnel: queries, bulk both ways, cancelling, eight clients at once, a dump."""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from .process import wait_until
from .programs import finish, hash_file, postgresql, require, tunnel_to

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.programs, pytest.mark.timeout(180)]

SCALE = "2"


@pytest.fixture(scope="module")
def direct() -> Iterator[int]:
    """PostgreSQL's own port."""
    with postgresql() as port:
        yield port


@pytest.fixture(scope="module", params=["tls", "plain"])
def port(request: pytest.FixtureRequest, direct: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The tunnel's port that leads there."""
    directory = tmp_path_factory.mktemp("tunnel") / "run"
    with tunnel_to(f"127.0.0.1:{direct}", directory, plain=request.param == "plain") as local:
        yield local


def _psql(port: int, *arguments: str) -> list[str]:
    return [require("psql"), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", *_server(port), *arguments]


def _server(port: int) -> list[str]:
    return ["-h", "127.0.0.1", "-p", str(port), "-U", "postgres"]


def _query(port: int, sql: str) -> str:
    return finish(*_psql(port, "-c", sql)).stdout.decode().strip()


def test_query(port: int) -> None:
    assert _query(port, "select 6 * 7") == "42"


def test_an_error_comes_back(port: int) -> None:
    done = finish(*_psql(port, "-c", "select 1 / 0"), expect=1)
    assert b"division by zero" in done.stderr


def test_large_result(port: int, direct: int) -> None:
    sql = "select i, repeat(md5(i::text), 100) from generate_series(1, 20000) i"  # 64 MB
    through, straight = (finish(*_psql(where, "-c", sql)).stdout for where in (port, direct))
    assert len(through) > 64_000_000
    assert hashlib.sha256(through).digest() == hashlib.sha256(straight).digest()


def test_copy_in_and_out(port: int, direct: int, tmp_path: Path) -> None:
    rows, back = tmp_path / "rows", tmp_path / "back"
    with rows.open("w") as file:
        for index in range(300_000):
            file.write(f"{index}\t{hashlib.md5(str(index).encode()).hexdigest()}\n")
    _query(direct, "drop table if exists copied; create table copied (i int primary key, t text)")
    finish(*_psql(port, "-c", f"\\copy copied from '{rows}'"))
    assert _query(direct, "select count(*) from copied") == "300000"
    finish(*_psql(port, "-c", f"\\copy (table copied order by i) to '{back}'"))
    assert hash_file(back) == hash_file(rows)


def test_cancel_by_a_second_connection(port: int, direct: int) -> None:
    """Ctrl-C in psql opens another connection to the same place and says there what to cancel."""
    sleeping = "select pg_sleep(300)"
    active = "select count(*) from pg_stat_activity where state = 'active' and query = 'select pg_sleep(300)'"
    with subprocess.Popen(_psql(port, "-c", sleeping), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as psql:
        try:
            wait_until(lambda: _query(direct, active) == "1", "the query to run")
            psql.send_signal(signal.SIGINT)
            _, said = psql.communicate(timeout=30)
        finally:
            psql.kill()
    assert b"canceling statement due to user request" in said
    assert psql.returncode != 0
    assert _query(direct, active) == "0"


def test_a_killed_client_frees_its_backend(port: int, direct: int) -> None:
    # `client_connection_check_interval` has PostgreSQL look at the socket: the tunnel must have closed it.
    sql = "set client_connection_check_interval = '200ms'; select pg_sleep(301)"
    alive = "select count(*) from pg_stat_activity where query like '%pg_sleep(301)%' and pid <> pg_backend_pid()"
    with subprocess.Popen(_psql(port, "-c", sql), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as psql:
        try:
            wait_until(lambda: _query(direct, alive) == "1", "the query to run")
        finally:
            psql.kill()
    wait_until(lambda: _query(direct, alive) == "0", "the backend to end")


def test_pgbench(port: int) -> None:
    pgbench = require("pgbench")
    finish(pgbench, "-i", "-q", "-s", SCALE, *_server(port), "postgres")
    done = finish(pgbench, "-c", "8", "-j", "2", "-T", "5", *_server(port), "postgres")
    said = done.stdout.decode()
    assert re.search(r"number of failed transactions: 0 ", said), said
    processed = re.search(r"number of transactions actually processed: (\d+)", said)
    assert processed and int(processed[1]) > 100, said


def test_pgbench_with_a_connection_for_each_transaction(port: int) -> None:
    pgbench = require("pgbench")
    finish(pgbench, "-i", "-q", "-s", SCALE, *_server(port), "postgres")
    done = finish(pgbench, "-C", "-S", "-c", "8", "-j", "2", "-t", "50", *_server(port), "postgres")
    said = done.stdout.decode()
    assert "number of transactions actually processed: 400/400" in said, said
    assert re.search(r"number of failed transactions: 0 ", said), said


def test_dump_is_the_same_as_a_direct_one(port: int, direct: int) -> None:
    finish(require("pgbench"), "-i", "-q", "-s", SCALE, *_server(direct), "postgres")
    pg_dump = require("pg_dump")
    # Since 15.14 each dump has a random key in it, unless one is given.
    key = ["--restrict-key=same"] if b"--restrict-key" in finish(pg_dump, "--help").stdout else []
    through, straight = (finish(pg_dump, *key, *_server(where), "postgres").stdout for where in (port, direct))
    assert len(through) > 10_000_000
    assert through == straight
