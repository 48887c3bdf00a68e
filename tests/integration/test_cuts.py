"""Real programs while all connections of the tunnel are cut every second or so: none notices more than a pause."""

from __future__ import annotations

import getpass
import hashlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.chaos.relay import Relay

from .programs import finish, hash_file, make_file, nginx, postgresql, require, sshd
from .tunnel import Client, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.programs, pytest.mark.timeout(300)]

CUTS = ("rst", "fin", "half")
GIB = 1 << 30
DUMP_BYTES = 200_000_000
ROWS = 300_000
TREE_BYTES = 150_000_000
TREE_FILES = 1500
LINES = 40
KEY_SECONDS = 0.02
"""Between two keys: so a line takes about 0.4 s, and most cuts come in the middle of one."""
ECHO_SECONDS = 60.0
HITS = 4
"""Cuts of links with data on them, after which a transfer need not be repeated."""
PATIENCE_SECONDS = 5.0
"""Cuts of bulk wait so long for data to flow: else a slow machine is cut again before it has recovered, for ever."""
HERE = f"{getpass.getuser()}@127.0.0.1"


@contextmanager
def _cut_tunnel_to(port: int, directory: Path, *, patience: float = 0.0) -> Iterator[tuple[int, Relay]]:
    """The local port that leads to `port` of 127.0.0.1 through a tunnel that is cut all the time, and who cuts it."""
    target = f"127.0.0.1:{port}"
    with (
        Server(directory, plain=False) as server,
        Relay(server.port, directory, seed=4) as relay,
        Client(directory, server.invitation.changed(port=relay.port), [target]) as client,
        relay.faults(0.8, *CUTS, scope="all", patience=patience),
    ):
        yield client.port(target), relay


def _until_hit(relay: Relay, transfer: Callable[[], None]) -> None:
    """Do it once, and again until it was cut often enough: how long one takes is the machine's affair."""
    before = relay.counts().hits
    while relay.counts().hits - before < HITS:
        transfer()


@pytest.fixture(scope="module")
def direct() -> Iterator[int]:
    """PostgreSQL's own port."""
    with postgresql() as port:
        yield port


class TestPostgresql:
    def test_dump_and_restore_of_200_mb(self, direct: int, tmp_path: Path) -> None:
        columns = " || ".join(f"md5((i * 20 + {part})::text)" for part in range(20))
        rows = f"select i, {columns} t from generate_series(1, {ROWS}) i"  # noqa: S608 - of constants
        _psql(direct, "postgres", f"create table papers as {rows}")
        _psql(direct, "postgres", "alter table papers add primary key (i)")
        assert int(_psql(direct, "postgres", "select pg_total_relation_size('papers')")) > DUMP_BYTES
        with _cut_tunnel_to(direct, tmp_path, patience=PATIENCE_SECONDS) as (port, relay):
            dump = [require("pg_dump"), "-Fc", "-Z0", *_address(port), "postgres"]
            restore = [require("pg_restore"), "--exit-on-error", *_address(port), "-d", "restored"]

            def copy() -> None:
                _psql(direct, "postgres", "drop database if exists restored with (force)")
                _psql(direct, "postgres", "create database restored")
                with subprocess.Popen(dump, stdout=subprocess.PIPE) as dumping:
                    done = subprocess.run(restore, stdin=dumping.stdout, capture_output=True, timeout=240)
                    assert done.returncode == 0, done.stderr
                assert dumping.returncode == 0

            _until_hit(relay, copy)
        summary = "select count(*), sum(length(t)), sum(hashtextextended(i || t, 4)) from papers"
        assert _psql(direct, "restored", summary) == _psql(direct, "postgres", summary)
        assert _psql(direct, "restored", summary).startswith(f"{ROWS}|")

    def test_pgbench(self, direct: int, tmp_path: Path) -> None:
        pgbench = require("pgbench")
        finish(pgbench, "-i", "-q", "-s", "2", *_address(direct), "postgres")
        with _cut_tunnel_to(direct, tmp_path) as (port, relay):
            before = relay.counts()
            done = finish(pgbench, "-c", "8", "-j", "2", "-T", "15", *_address(port), "postgres")
            after = relay.counts()
            # Not hits: how many bytes a transaction's link has seen before it is cut is the disk's affair.
            assert after.cuts - before.cuts >= 50
            assert sum(after.faults.values()) - sum(before.faults.values()) >= 8
        said = done.stdout.decode()
        assert re.search(r"number of failed transactions: 0 ", said), said
        assert not done.stderr or b"aborted" not in done.stderr, done.stderr
        processed = re.search(r"number of transactions actually processed: (\d+)\n", said)
        assert processed and int(processed[1]) > 20, said
        # pgbench's own book-keeping: every transaction wrote one line of history, and all sums agree.
        assert _psql(direct, "postgres", "select count(*) from pgbench_history") == processed[1]
        sums = "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history)"
        assert _psql(direct, "postgres", sums) == "t"


def _address(port: int) -> list[str]:
    return ["-h", "127.0.0.1", "-p", str(port), "-U", "postgres"]


def _psql(port: int, database: str, sql: str) -> str:
    command = [require("psql"), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", *_address(port), "-c", sql, database]
    return finish(*command).stdout.decode().strip()


class TestOpenssh:
    def test_a_terminal_typed_through_cuts(self, tmp_path: Path) -> None:
        with sshd(tmp_path / "sshd") as (direct, options), _cut_tunnel_to(direct, tmp_path) as (port, relay):
            # A shell that asks nothing: what comes back is the echo of what was typed, and what the command printed.
            command = [require("ssh"), *options, "-tt", "-p", str(port), HERE, "PS1= ENV= exec sh -i"]
            with _terminal(command) as terminal:
                terminal.type("echo $((1000 + 1))\n")
                terminal.expect(b"1001\r\n", skip=True)
                before = relay.counts()
                for number in range(LINES):
                    terminal.type(f"echo $((1000 * {number}))\n")
                    terminal.expect(f"echo $((1000 * {number}))\r\n{1000 * number}\r\n".encode())
                after = relay.counts()
                terminal.type("exit 7\n")
                assert terminal.ended() == 7
            assert after.cuts - before.cuts >= 50  # links; each time all of them
            assert sum(after.faults.values()) - sum(before.faults.values()) >= 8

    def test_rsync_of_a_tree(self, tmp_path: Path) -> None:
        rsync = require("rsync")
        here, there = tmp_path / "here", tmp_path / "there"
        _make_tree(here)
        with (
            sshd(tmp_path / "sshd") as (direct, options),
            _cut_tunnel_to(direct, tmp_path, patience=PATIENCE_SECONDS) as (port, relay),
        ):
            shell = " ".join([require("ssh"), *options, "-p", str(port)])

            def copy() -> None:
                shutil.rmtree(there, ignore_errors=True)
                # The limit is in KiB/s: else a fast machine is done before it is cut.
                finish(rsync, "-a", "--bwlimit=25000", "-e", shell, f"{here}/", f"{HERE}:{there}/", within=240)

            _until_hit(relay, copy)
            again = finish(rsync, "-ai", "--checksum", "-e", shell, f"{here}/", f"{HERE}:{there}/")
            assert again.stdout == b""
        assert _tree(there) == _tree(here)


def _make_tree(root: Path) -> None:
    """Many small files, a few large ones, directories, a link, an empty file."""
    for index in range(TREE_FILES):
        directory = root / f"directory-{index % 37}" / f"deeper-{index % 5}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"file-{index}").write_bytes(os.urandom(index * 7 % 20_000))
    for index in range(4):
        make_file(root / f"large-{index}", TREE_BYTES // 4)
    (root / "link").symlink_to("large-0")


def _tree(root: Path) -> dict[str, str]:
    """Every path below `root` with what is there."""
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else hash_file(path)
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


class _Terminal:
    """A program at a terminal, and who types there."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self._process = process
        self._master = master
        self._seen = b""

    def type(self, text: str) -> None:
        """Key by key."""
        for key in text:
            os.write(self._master, key.encode())
            time.sleep(KEY_SECONDS)

    def expect(self, text: bytes, *, skip: bool = False) -> None:
        """Wait for this on the screen, next or, with `skip`, after anything else."""
        deadline = time.monotonic() + ECHO_SECONDS
        while len(self._seen) < len(text) or (skip and text not in self._seen):
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self._master], [], [], left)[0], f"{self._seen!r} instead of {text!r}"
            self._seen += os.read(self._master, 65536)
        if skip:
            self._seen = self._seen.partition(text)[2]
        else:
            assert self._seen.startswith(text), f"{self._seen!r} instead of {text!r}"
            self._seen = self._seen[len(text) :]

    def ended(self) -> int:
        """Wait for the end. Returns the exit code."""
        return self._process.wait(ECHO_SECONDS)


@contextmanager
def _terminal(command: list[str]) -> Iterator[_Terminal]:
    master, slave = pty.openpty()
    try:
        # The outer terminal is made raw by ssh itself.
        process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    finally:
        os.close(slave)
    try:
        yield _Terminal(process, master)
    finally:
        os.close(master)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


def test_curl_download_of_1_gib(tmp_path: Path) -> None:
    directory = tmp_path / "nginx"
    with nginx(directory) as direct, _cut_tunnel_to(direct, tmp_path, patience=PATIENCE_SECONDS) as (port, relay):
        large = directory / "files" / "large"
        try:
            expected = make_file(large, GIB)
            # The limit: else a fast machine is done before it is cut.
            command = [require("curl"), "-sSf", "--noproxy", "*", "--disable", "--limit-rate", "150M"]
            _until_hit(relay, lambda: _download([*command, f"http://127.0.0.1:{port}/large"], expected))
        finally:
            large.unlink(missing_ok=True)


def _download(command: list[str], expected: str) -> None:
    digest, size = hashlib.sha256(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE) as curl:
        timer = threading.Timer(240, curl.kill)
        timer.start()
        assert curl.stdout is not None
        while block := curl.stdout.read(1 << 20):  # nothing of it is kept on disk
            digest.update(block)
            size += len(block)
        timer.cancel()
    assert curl.returncode == 0
    assert size == GIB
    assert digest.hexdigest() == expected
