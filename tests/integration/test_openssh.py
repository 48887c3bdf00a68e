"""OpenSSH through the tunnel: 200 MB each way, exit statuses, input and its end, many sessions."""

from __future__ import annotations

import getpass
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from .programs import finish, hash_file, make_file, require, sshd, tunnel_to

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.programs, pytest.mark.timeout(180)]

SIZE = 200_000_000
HERE = f"{getpass.getuser()}@127.0.0.1"

Access = tuple[int, list[str]]


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Access]:
    with sshd(tmp_path_factory.mktemp("openssh") / "run") as access:
        yield access


@pytest.fixture(scope="module", params=["tls", "plain"])
def access(
    request: pytest.FixtureRequest, direct: Access, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Access]:
    """The tunnel's port that leads there, and the options."""
    directory = tmp_path_factory.mktemp("tunnel") / "run"
    with tunnel_to(f"127.0.0.1:{direct[0]}", directory, plain=request.param == "plain") as port:
        yield port, direct[1]


def _ssh(access: Access, command: str) -> list[str]:
    port, options = access
    return [require("ssh"), *options, "-p", str(port), HERE, command]


def test_exit_status(access: Access) -> None:
    assert finish(*_ssh(access, "echo out; echo err >&2; exit 7"), expect=7).stdout == b"out\n"


def test_input_and_its_end(access: Access) -> None:
    data = os.urandom(5_000_000)
    done = finish(*_ssh(access, "sha256sum"), data=data)
    assert done.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_a_command_that_does_not_read_its_input(access: Access) -> None:
    assert finish(*_ssh(access, "echo done"), data=bytes(3_000_000)).stdout == b"done\n"


def test_ten_sessions_at_once(access: Access) -> None:
    with ThreadPoolExecutor(10) as threads:
        running = [threads.submit(finish, *_ssh(access, f"echo {index}")) for index in range(10)]
        assert [one.result().stdout for one in running] == [b"%d\n" % index for index in range(10)]


def test_scp_of_200_mb_each_way(access: Access, tmp_path: Path) -> None:
    port, options = access
    local, remote, back = (tmp_path / name for name in ("local", "remote", "back"))
    digest = make_file(local, SIZE)
    scp = [require("scp"), "-q", *options, "-P", str(port)]
    try:
        finish(*scp, local, f"{HERE}:{remote}")
        assert hash_file(remote) == digest
        finish(*scp, f"{HERE}:{remote}", back)
        assert hash_file(back) == digest
    finally:
        for path in (local, remote, back):  # pytest would keep them for three runs
            path.unlink(missing_ok=True)


def test_sftp(access: Access, tmp_path: Path) -> None:
    port, options = access
    local, remote, back = (tmp_path / name for name in ("local", "remote", "back"))
    digest = make_file(local, 10_000_000)
    batch = tmp_path / "batch"
    batch.write_text(f"put {local} {remote}\nget {remote} {back}\nrm {remote}\n")
    finish(require("sftp"), *options, "-P", str(port), "-b", batch, HERE)
    assert hash_file(back) == digest
    assert not remote.exists()
