"""Real programs as targets, each with its own data in a temporary directory and its own port on 127.0.0.1."""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .process import Process, wait_until
from .sockets import unused_port
from .tunnel import Client, Server

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

BLOCK = 1 << 20
_POSTGRESQL_BINARIES = Path("/usr/lib/postgresql")
_SYSTEM_BINARIES = ("/usr/sbin", "/sbin")


def require(program: str) -> str:
    """The path of an installed program.

    Without it the test is skipped and says so; where CI is "true" it fails instead, so that CI cannot run fewer tests
    than it seems to.
    """
    found = _find(program)
    if found is not None:
        return found
    reason = f"{program} is not installed"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}: CI must have it")
    pytest.skip(reason)


def _find(program: str) -> str | None:
    # Debian keeps a cluster's programs out of PATH, one directory a major version.
    clusters = sorted(_POSTGRESQL_BINARIES.glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    places = [*map(str, clusters), *os.environ.get("PATH", "").split(os.pathsep), *_SYSTEM_BINARIES]
    return shutil.which(program, path=os.pathsep.join(places))


def finish(
    *command: str | Path,
    expect: int = 0,
    within: float = 120.0,
    data: bytes = b"",
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end, capturing its output, and check its exit code.

    Args:
        command: program and arguments.
        expect: the right exit code.
        within: seconds until it is killed and the test fails.
        data: its standard input.
        cwd: where it runs.
        env: its whole environment; None means that of the test.

    Raises:
        AssertionError: another exit code, with what it wrote.
    """
    argv = [str(part) for part in command]
    done = subprocess.run(argv, input=data, capture_output=True, timeout=within, check=False, cwd=cwd, env=env)
    assert done.returncode == expect, (
        f"{command} exited with {done.returncode}, not {expect}\n"
        f"{done.stdout[-2000:].decode(errors='replace')}\n{done.stderr[-4000:].decode(errors='replace')}"
    )
    return done


def install(*command: str | Path, cwd: Path | None = None, within: float = 120.0) -> None:
    """Run a command that asks a package registry, which does not answer now and then: up to three times.

    Args:
        command: program and arguments.
        cwd: where it runs.
        within: seconds for each try.

    Raises:
        AssertionError: it failed three times, with what it wrote last.
        subprocess.TimeoutExpired: it took longer than `within`, which is not tried again.
    """
    for pause in (1.0, 5.0):
        try:
            finish(*command, cwd=cwd, within=within)
        except AssertionError as error:
            print(error)
            time.sleep(pause)
        else:
            return
    finish(*command, cwd=cwd, within=within)


@contextmanager
def tunnel_to(target: str, directory: Path, *, plain: bool) -> Iterator[int]:
    """A server and a client of the tunnel. Yields the local port that leads to `target`."""
    directory.mkdir()
    with Server(directory, plain=plain) as server, Client(directory, server.invitation.url, [target]) as client:
        yield client.port(target)


def make_file(path: Path, size: int) -> str:
    """Write `size` random bytes, which nothing on the way can compress. Returns their SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, size, BLOCK):
            block = os.urandom(min(BLOCK, size - start))
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def accepts(port: int) -> bool:
    """Whether a connection to this port of 127.0.0.1 is accepted."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


@contextmanager
def _running(process: Process, port: int) -> Iterator[int]:
    with process:
        wait_until(lambda: not process.running or accepts(port), f"{process.name} to listen")
        assert process.running, process.tail()
        yield port


@contextmanager
def postgresql() -> Iterator[int]:
    """A fresh cluster with the superuser `postgres` and no password. Yields its port."""
    initdb, postgres = require("initdb"), require("postgres")
    for client_program in ("psql", "pgbench", "pg_dump"):
        require(client_program)
    # Not below pytest's own directory: that is closed to the user `postgres`, and PostgreSQL refuses to run as root.
    with tempfile.TemporaryDirectory(prefix="wstunnel-postgresql-") as name:
        directory = Path(name)
        command: list[str] = []
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(directory, user.pw_uid, user.pw_gid)
            command = [require("setpriv"), f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        data = directory / "data"
        finish(
            *command, initdb, "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync",
            cwd=directory,
        )  # fmt: skip
        port = unused_port()
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "unix_socket_directories": "",
            "fsync": "off",
            "max_connections": "50",
        }
        flags = [part for setting in settings.items() for part in ("-c", "=".join(setting))]
        with _running(Process("postgres", [*command, postgres, "-D", data, *flags], directory=directory), port):
            # It accepts before it is ready.
            ready = [require("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
            wait_until(lambda: subprocess.run(ready, timeout=60).returncode == 0, "PostgreSQL to be ready")
            yield port


@contextmanager
def sshd(directory: Path) -> Iterator[tuple[int, list[str]]]:
    """An OpenSSH server for the user who runs the tests.

    Yields:
        its port, and the options that let `ssh`, `scp` and `sftp` in, whatever port they come by.
    """
    program, keygen = require("sshd"), require("ssh-keygen")
    for client_program in ("ssh", "scp", "sftp"):
        require(client_program)
    directory.mkdir()
    for name in ("host", "user"):
        finish(keygen, "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", directory / name)
    (directory / "authorized_keys").write_text((directory / "user.pub").read_text())
    (directory / "known_hosts").write_text(f"tunnelled-host {(directory / 'host.pub').read_text()}")
    port = unused_port()
    (directory / "sshd_config").write_text(
        f"Port {port}\n"
        "ListenAddress 127.0.0.1\n"
        f"HostKey {directory}/host\n"
        f"AuthorizedKeysFile {directory}/authorized_keys\n"
        f"PidFile {directory}/sshd.pid\n"
        "StrictModes no\n"
        "UsePAM no\n"
        "PermitRootLogin prohibit-password\n"
        "PasswordAuthentication no\n"
        "KbdInteractiveAuthentication no\n"
        "MaxStartups 100\n"
        "Subsystem sftp internal-sftp\n"
    )
    options = [
        "-F", "none", "-i", f"{directory}/user",
        "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes",
        "-o", "HostKeyAlias=tunnelled-host", "-o", f"UserKnownHostsFile={directory}/known_hosts",
        "-o", "GlobalKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
    ]  # fmt: skip
    if os.geteuid() == 0:
        # Where sshd locks up its unprivileged part. systemd makes it when sshd is a service; here nobody has. It stays:
        # other tests' servers may be using it by then.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    # 255 is how sshd ends after SIGTERM.
    process = Process(
        "sshd", [program, "-D", "-e", "-f", directory / "sshd_config"], directory=directory, exit_codes=(0, 255)
    )
    with _running(process, port):
        yield port, options


@contextmanager
def redis(directory: Path) -> Iterator[int]:
    """A Redis server without persistence. Yields its port."""
    program = require("redis-server")
    for client_program in ("redis-cli", "redis-benchmark"):
        require(client_program)
    directory.mkdir()
    port = unused_port()
    command = [
        program,
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "no",
        "--dir",
        str(directory),
    ]
    with _running(Process("redis", command, directory=directory), port):
        yield port


@contextmanager
def nginx(directory: Path) -> Iterator[int]:
    """nginx that serves `directory`/files, takes PUT there, and logs to `directory`. Yields its port."""
    port = unused_port()
    servers = f"""
    server {{
        listen 127.0.0.1:{port} backlog=1024;
        root {directory}/files;
        client_max_body_size 0;
        location / {{ dav_methods PUT; }}
    }}"""
    with nginx_with(servers, directory, port):
        yield port


@contextmanager
def nginx_with(servers: str, directory: Path, port: int) -> Iterator[Path]:
    """nginx with these parts of its `http` section, once it listens on `port`. Yields the directory `files`."""
    program = require("nginx")
    require("curl")
    files = directory / "files"
    files.mkdir(parents=True)
    (directory / "temporary").mkdir()
    # Its workers leave root for a user who may not enter pytest's directories.
    user = "user root;" if os.geteuid() == 0 else ""
    temporary = "\n".join(
        f"    {kind}_temp_path {directory}/temporary/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (directory / "nginx.conf").write_text(
        f"""
{user}
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{ worker_connections 1024; }}
http {{
    access_log {directory}/access.log;
    sendfile on;
{temporary}
{servers}
}}
"""
    )
    argv: list[str | Path] = [program, "-p", directory, "-c", directory / "nginx.conf", "-e", directory / "error.log"]
    with _running(Process("nginx", argv, directory=directory), port):
        yield files
