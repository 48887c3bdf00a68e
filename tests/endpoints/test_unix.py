"""Unix sockets that are listened on: the mode of the file, and what a crash left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from wstunnel.endpoints import tcp, unix
from wstunnel.endpoints.listeners import listen
from wstunnel.errors import LocalError
from wstunnel.forwards import parse_forward


@pytest.fixture
def opened() -> Iterator[list[socket.socket]]:
    sockets: list[socket.socket] = []
    yield sockets
    for sock in sockets:
        sock.close()


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_the_file_has_the_mode_that_was_asked_for(tmp_path: Path, opened: list[socket.socket], mode: int) -> None:
    before = os.umask(0o077)
    try:
        sock, _file = unix.bind(str(tmp_path / "s"), mode)
        opened.append(sock)
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == mode
        assert os.umask(0o077) == 0o077, "the process's own is as it was"
    finally:
        os.umask(before)


def test_it_never_has_more_than_that_mode(
    tmp_path: Path, opened: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(os, "chmod", lambda path, _mode: seen.append(stat.S_IMODE(Path(path).stat().st_mode)))
    opened.append(unix.bind(str(tmp_path / "s"), 0o600)[0])
    assert seen == [0o600]


def test_what_a_killed_program_left_is_replaced(tmp_path: Path, opened: list[socket.socket]) -> None:
    path = tmp_path / "s"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.listen()
    dead.close()
    sock, _file = unix.bind(str(path), 0o600)
    opened.append(sock)
    tcp.activate(sock)
    assert connects(path)


def test_a_program_that_listens_is_left_alone(tmp_path: Path, opened: list[socket.socket]) -> None:
    path = tmp_path / "s"
    alive = socket.socket(socket.AF_UNIX)
    opened.append(alive)
    alive.bind(str(path))
    alive.listen()
    with pytest.raises(LocalError, match="another program listens there"):
        unix.bind(str(path), 0o600)
    assert connects(path)


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(LocalError, match="no socket"):
        unix.bind(str(tmp_path / "s"), 0o600)
    assert (tmp_path / "s").read_text() == "precious"


def test_a_directory_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="directory does not exist"):
        unix.bind(str(tmp_path / "no" / "s"), 0o600)


def test_closing_removes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "s"
    (bound,) = listen(parse_forward(f"{path}:db:5432")[0])
    assert bound.name == str(path) and connects(path)
    bound.close()
    assert not path.exists()
    bound.close()


def test_closing_leaves_the_file_of_whoever_came_after_us(tmp_path: Path, opened: list[socket.socket]) -> None:
    path = tmp_path / "s"
    (bound,) = listen(parse_forward(f"{path}:db:5432")[0])
    path.unlink()
    other = socket.socket(socket.AF_UNIX)
    opened.append(other)
    other.bind(str(path))
    bound.close()
    assert path.exists()


def test_listening_on_two_addresses_is_one_port() -> None:
    bound = listen(parse_forward("localhost:0:db:5432")[0])
    try:
        assert len({each.name.rsplit(":", 1)[1] for each in bound}) == 1
    finally:
        for each in bound:
            each.close()


def test_a_peer_behind_a_unix_socket_is_named_by_its_process(tmp_path: Path, opened: list[socket.socket]) -> None:
    (bound,) = listen(parse_forward(f"{tmp_path / 's'}:db:5432")[0])
    client = socket.socket(socket.AF_UNIX)
    opened.append(client)
    client.connect(str(tmp_path / "s"))
    accepted, _ = bound.sock.accept()
    opened.append(accepted)
    assert tcp.peer_name(accepted) == f"unix:uid={os.getuid()},pid={os.getpid()}"
    assert tcp.local_name(accepted) == str(tmp_path / "s")
    bound.close()


def test_whether_a_path_leads_to_it(tmp_path: Path, opened: list[socket.socket]) -> None:
    sock, file = unix.bind(str(tmp_path / "s"), 0o600)
    opened.append(sock)
    (tmp_path / "link").symlink_to("s")
    (tmp_path / "other").touch()
    found = {name: file.is_at(f"{tmp_path}/{name}") for name in ("s", "link", "other", "none", "\0")}
    assert found == {"s": True, "link": True, "other": False, "none": False, "\0": False}


def test_what_is_bound_listens_at_once(tmp_path: Path, opened: list[socket.socket]) -> None:
    """One that does not would look like one whose program was killed, and be taken away."""
    opened.append(unix.bind(str(tmp_path / "s"), 0o600)[0])
    assert connects(tmp_path / "s")
    with pytest.raises(LocalError, match="another program listens there"):
        unix.bind(str(tmp_path / "s"), 0o600)


def test_nobody_else_binds_between_the_look_and_the_listening(
    tmp_path: Path, opened: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a program finds stale may be another's that listens by the time it removes it."""
    real = unix._listen
    others: list[str] = []

    def listen(path: str, mode: int) -> tuple[socket.socket, unix.SocketFile]:
        other = os.open(tmp_path, os.O_RDONLY)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            others.append("waits")
        finally:
            os.close(other)
        return real(path, mode)

    monkeypatch.setattr(unix, "_listen", listen)
    opened.append(unix.bind(str(tmp_path / "s"), 0o600)[0])
    assert others == ["waits"]
    with open_directory(tmp_path) as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it is free again


def test_a_lock_that_another_keeps_is_not_waited_for_for_ever(
    tmp_path: Path, opened: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    with open_directory(tmp_path) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        opened.append(unix.bind(str(tmp_path / "s"), 0o600)[0])
    assert connects(tmp_path / "s")
    assert naps == [unix.LOCK_PAUSE_SECONDS] * unix.LOCK_TRIES


def test_permissions_can_be_changed_later(tmp_path: Path, opened: list[socket.socket]) -> None:
    sock, file = unix.bind(str(tmp_path / "s"), 0o600)
    opened.append(sock)
    file.permit(0o640)
    assert stat.S_IMODE(os.stat(file.path).st_mode) == 0o640


def test_but_not_those_of_a_file_that_is_another_programs(tmp_path: Path, opened: list[socket.socket]) -> None:
    sock, file = unix.bind(str(tmp_path / "s"), 0o600)
    opened.append(sock)
    os.rename(file.path, tmp_path / "old")
    file.permit(0o666)
    other = Path(file.path)
    other.touch(0o600)
    file.permit(0o666)
    assert stat.S_IMODE(other.stat().st_mode) == 0o600


def test_nor_is_a_refusal_kept_quiet(
    tmp_path: Path, opened: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    sock, file = unix.bind(str(tmp_path / "s"), 0o600)
    opened.append(sock)
    monkeypatch.setattr(os, "chmod", refuse)
    with pytest.raises(LocalError, match=r"cannot listen on .*/s with mode 666: Operation not permitted"):
        file.permit(0o666)


@contextmanager
def open_directory(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)
