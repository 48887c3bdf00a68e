"""OpenSSH and git by the other ways: `wstunnel connect` as ProxyCommand, and `-R` back to an sshd at the client."""

from __future__ import annotations

import getpass
import hashlib
import os
import shlex
from typing import TYPE_CHECKING

import pytest

from .programs import finish, hash_file, make_file, require, sshd
from .ways import Ways, ways

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.programs, pytest.mark.timeout(120)]

HERE = f"{getpass.getuser()}@127.0.0.1"
SIZE = 30_000_000

Access = tuple[int, list[str]]


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Access]:
    with sshd(tmp_path_factory.mktemp("openssh") / "run") as access:
        yield access


@pytest.fixture(scope="module", params=["tls", "plain"])
def running(request: pytest.FixtureRequest, direct: Access, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    directory = tmp_path_factory.mktemp("ways")
    with ways(directory, "-R", f"0:127.0.0.1:{direct[0]}", plain=request.param == "plain") as made:
        yield made


@pytest.fixture(params=["connect", "reverse"])
def access(request: pytest.FixtureRequest, direct: Access, running: Ways) -> Access:
    """The port to name, and the options that lead there."""
    port, options = direct
    if request.param == "connect":
        return port, [*options, *running.proxy_command]
    return running.port(f"tcp:127.0.0.1:{port}"), options


def test_exit_status_input_and_its_end(access: Access, running: Ways) -> None:
    port, options = access
    ssh = [require("ssh"), *options, "-p", str(port), HERE]
    assert finish(*ssh, "echo out; exit 7", expect=7, env=running.environment).stdout == b"out\n"
    data = os.urandom(5_000_000)
    done = finish(*ssh, "sha256sum", data=data, env=running.environment)
    assert done.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()
    assert done.stderr == b""


def test_scp_each_way(access: Access, running: Ways, tmp_path: Path) -> None:
    port, options = access
    local, remote, back = (tmp_path / name for name in ("local", "remote", "back"))
    digest = make_file(local, SIZE)
    scp = [require("scp"), "-q", *options, "-P", str(port)]
    try:
        finish(*scp, local, f"{HERE}:{remote}", env=running.environment)
        assert hash_file(remote) == digest
        finish(*scp, f"{HERE}:{remote}", back, env=running.environment)
        assert hash_file(back) == digest
    finally:
        for path in (local, remote, back):  # pytest would keep them for three runs
            path.unlink(missing_ok=True)


def test_git_clones_and_pushes(access: Access, running: Ways, tmp_path: Path) -> None:
    port, options = access
    git = require("git")
    origin, clone, again = (tmp_path / name for name in ("origin.git", "clone", "again"))
    env = running.environment | {
        "GIT_SSH_COMMAND": shlex.join([require("ssh"), *options]),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        "GIT_TERMINAL_PROMPT": "0",
    }
    author = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.org"]

    def run(*arguments: str | Path) -> bytes:
        return finish(git, *author, *arguments, env=env).stdout

    url = f"ssh://{HERE}:{port}{origin}"
    run("init", "-q", "--bare", "-b", "main", origin)
    run("clone", "-q", url, clone)
    for index in range(30):
        (clone / f"file-{index}").write_bytes(os.urandom(index * 4000))
    run("-C", clone, "add", ".")
    run("-C", clone, "commit", "-q", "-m", "thirty files")
    run("-C", clone, "push", "-q", "origin", "HEAD:main")
    run("clone", "-q", url, again)
    head = run("-C", clone, "rev-parse", "HEAD^{tree}")
    assert run("-C", again, "rev-parse", "HEAD^{tree}") == head
    assert (again / "file-29").read_bytes() == (clone / "file-29").read_bytes()


def test_a_target_that_refuses_is_told(direct: Access, running: Ways) -> None:
    _, options = direct
    ssh = [require("ssh"), *options, *running.proxy_command, "-p", "1", HERE, "true"]
    assert b"refused" in finish(*ssh, expect=255, env=running.environment).stderr
