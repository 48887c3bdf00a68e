"""state.py: where the state is, what the server announces, and files that are only their owner's."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from wstunnel import state
from wstunnel.errors import LocalError
from wstunnel.state import (
    Announcement,
    Claim,
    PrivateDirectory,
    read_announcement,
    state_directory,
    write_announcement,
)

ANNOUNCEMENT = Announcement(scheme="wss", port=8443, path="/t", pins=(bytes(range(32)), b"\xff" * 32))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def refusing(error: type[OSError], number: int) -> object:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise error(number, os.strerror(number))

    return refuse


class TestStateDirectory:
    def test_flag_before_systemd_before_xdg_before_home(self, tmp_path: Path) -> None:
        environ = {"HOME": str(tmp_path / "home")}
        assert state_directory(None, environ) == tmp_path / "home/.local/state/wstunnel"
        environ["XDG_STATE_HOME"] = str(tmp_path / "xdg")
        assert state_directory(None, environ) == tmp_path / "xdg/wstunnel"
        environ["STATE_DIRECTORY"] = f"{tmp_path}/one:{tmp_path}/two"
        assert state_directory(None, environ) == tmp_path / "one"
        assert state_directory(tmp_path / "flag", environ) == tmp_path / "flag"
        for made in ("home/.local/state/wstunnel", "xdg/wstunnel", "one", "flag"):
            assert mode(tmp_path / made) == 0o700
        assert not (tmp_path / "two").exists()

    def test_a_relative_xdg_path_is_ignored(self, tmp_path: Path) -> None:
        environ = {"XDG_STATE_HOME": "relative", "HOME": str(tmp_path)}
        assert state_directory(None, environ) == tmp_path / ".local/state/wstunnel"

    def test_home_comes_from_the_user_database_else(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Path, "home", lambda: tmp_path)
        assert state_directory(None, {}) == tmp_path / ".local/state/wstunnel"

    def test_no_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def homeless() -> Path:
            raise RuntimeError

        monkeypatch.setattr(Path, "home", homeless)
        with pytest.raises(LocalError, match=r"no home directory: set HOME or XDG_STATE_HOME, or .* --state-dir"):
            state_directory(None, {})

    def test_an_existing_one_stays_as_it_is(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o750)
        assert state_directory(tmp_path, {}) == tmp_path
        assert mode(tmp_path) == 0o750

    def test_a_link_may_lead_there(self, tmp_path: Path) -> None:
        (tmp_path / "private").mkdir()
        (tmp_path / "link").symlink_to("private")
        assert state_directory(tmp_path / "link", {}) == tmp_path / "link"

    def test_a_file_in_its_place(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for path in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(LocalError, match=r"file(/below)? cannot be used: not a directory; .* --state-dir$"):
                state_directory(path, {})

    def test_no_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "open", refusing(PermissionError, errno.EACCES))
        with pytest.raises(LocalError, match=r"run it as the user of the server, or with sudo, or .* --state-dir"):
            state_directory(tmp_path, {})


class TestClaim:
    def test_the_second_learns_of_the_first(self, tmp_path: Path) -> None:
        first = Claim(tmp_path, 443)
        assert first.other is None
        second = Claim(tmp_path, None)
        assert second.other == f"pid {os.getpid()}, port 443"
        second.release()
        assert Claim(tmp_path, 80).other is not None, "the first one runs on"
        first.release()
        first.release()
        third = Claim(tmp_path, None)
        assert third.other is None
        assert Claim(tmp_path, 1).other == f"pid {os.getpid()}, Unix sockets"
        third.release()
        fourth = Claim(tmp_path, 8)
        assert Claim(tmp_path, 1).other == f"pid {os.getpid()}, port 8", "nothing is left of the longer text"
        fourth.release()
        assert mode(tmp_path / "server.lock") == 0o600

    def test_one_that_was_killed_leaves_none(self, tmp_path: Path) -> None:
        code = (
            "import os, sys; from pathlib import Path; from wstunnel.state import Claim;"
            "claim = Claim(Path(sys.argv[1]), 9); os.kill(os.getpid(), 9)"
        )
        killed = [sys.executable, "-c", code, str(tmp_path)]
        assert subprocess.run(killed, check=False, timeout=60).returncode == -9
        assert (tmp_path / "server.lock").read_text().endswith("port 9\n")
        claim = Claim(tmp_path, 443)
        assert claim.other is None
        claim.release()

    def test_a_first_one_that_has_not_said_who_it_is(self, tmp_path: Path) -> None:
        with (tmp_path / "server.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert Claim(tmp_path, 443).other == "which has only begun to start"

    def test_a_file_system_without_locks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(fcntl, "flock", refusing(OSError, errno.ENOLCK))
        assert Claim(tmp_path, 443).other is None
        assert len(os.listdir("/proc/self/fd")) == before

    @pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
    def test_what_is_no_file_is_left_alone(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "server.lock"
        if kind == "link":
            path.symlink_to("victim")
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(LocalError, match=r"server\.lock"):
            Claim(tmp_path, 443)
        assert not (tmp_path / "victim").exists()
        assert len(os.listdir("/proc/self/fd")) == before


class TestAnnouncement:
    def test_is_read_as_written(self, tmp_path: Path) -> None:
        assert read_announcement(tmp_path) is None
        write_announcement(tmp_path, ANNOUNCEMENT)
        assert read_announcement(tmp_path) == ANNOUNCEMENT
        plain = Announcement(scheme="ws", port=80, path="/")
        write_announcement(tmp_path, plain)
        assert read_announcement(tmp_path) == plain
        without_port = Announcement(scheme="ws", port=None, path="/")
        write_announcement(tmp_path, without_port)
        assert read_announcement(tmp_path) == without_port
        assert [entry.name for entry in tmp_path.iterdir()] == ["server.json"]
        assert mode(tmp_path / "server.json") == 0o600

    def test_no_directory_is_no_announcement(self, tmp_path: Path) -> None:
        assert read_announcement(tmp_path / "none") is None

    def test_the_file_is_plain_json(self, tmp_path: Path) -> None:
        write_announcement(tmp_path, ANNOUNCEMENT)
        assert json.loads((tmp_path / "server.json").read_text()) == {
            "scheme": "wss",
            "port": 8443,
            "path": "/t",
            "pins": [bytes(range(32)).hex(), "ff" * 32],
        }

    @pytest.mark.parametrize(
        "change",
        [
            {"scheme": "https"},
            {"port": 0},
            {"port": 65536},
            {"port": True},
            {"port": "443"},
            {"path": "relative"},
            {"path": "/\n"},
            {"path": "/é"},
            {"path": None},
            {"pins": "ff"},
            {"pins": ["ff"]},
            {"pins": ["xx" * 32]},
            {"pins": [1]},
        ],
    )
    def test_wrong_values(self, tmp_path: Path, change: dict[str, object]) -> None:
        document = {"scheme": "wss", "port": 443, "path": "/", "pins": []}
        (tmp_path / "server.json").write_text(json.dumps(document))
        assert read_announcement(tmp_path) == Announcement(scheme="wss", port=443, path="/")
        (tmp_path / "server.json").write_text(json.dumps(document | change))
        with pytest.raises(LocalError, match=r"server\.json is malformed .* delete it and restart the server"):
            read_announcement(tmp_path)

    @pytest.mark.parametrize("text", ["", "{", "[]", "1", "{}", '{"scheme": "wss"}', "\x00", "[" * 100_000])
    def test_not_an_announcement(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "server.json").write_text(text)
        with pytest.raises(LocalError, match=r"server\.json is malformed"):
            read_announcement(tmp_path)

    def test_not_utf_8(self, tmp_path: Path) -> None:
        (tmp_path / "server.json").write_bytes(b"\xff\xfe\xff")
        with pytest.raises(LocalError, match=r"server\.json is malformed"):
            read_announcement(tmp_path)

    def test_no_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "open", refusing(PermissionError, errno.EACCES))
        advice = r"server\.json may not be {} by this user: run it as the user to whom it belongs, or with sudo"
        with pytest.raises(LocalError, match=advice.format("read")):
            read_announcement(tmp_path)
        with pytest.raises(LocalError, match=advice.format("written")):
            write_announcement(tmp_path, ANNOUNCEMENT)

    def test_a_full_disk_leaves_the_old_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_announcement(tmp_path, ANNOUNCEMENT)
        monkeypatch.setattr(os, "write", refusing(OSError, errno.ENOSPC))
        with pytest.raises(LocalError, match=r"server\.json cannot be written: no space left on device"):
            write_announcement(tmp_path, Announcement(scheme="ws", port=1, path="/"))
        assert read_announcement(tmp_path) == ANNOUNCEMENT
        assert [entry.name for entry in tmp_path.iterdir()] == ["server.json"]

    def test_what_is_no_regular_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "server.json")
        with pytest.raises(LocalError, match=r"server\.json cannot be read: not a regular file"):
            read_announcement(tmp_path)

    def test_a_link_is_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("{}")
        (tmp_path / "server.json").symlink_to("secret")
        with pytest.raises(LocalError, match=r"server\.json is a symbolic link"):
            read_announcement(tmp_path)
        write_announcement(tmp_path, ANNOUNCEMENT)
        assert (tmp_path / "secret").read_text() == "{}"
        assert not (tmp_path / "server.json").is_symlink()


class TestPrivateDirectory:
    def test_follow_false_refuses_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "there").mkdir()
        (tmp_path / "link").symlink_to("there")
        with pytest.raises(OSError):  # ENOTDIR or ELOOP
            PrivateDirectory.open(tmp_path / "link", follow=False)
        PrivateDirectory.open(tmp_path / "link").close()

    def test_the_limit_of_a_file(self, tmp_path: Path) -> None:
        with PrivateDirectory.open(tmp_path) as private:
            private.write("file", b"x" * state.PRIVATE_FILE_BYTES)
            assert private.read("file") == b"x" * state.PRIVATE_FILE_BYTES
            private.write("file", b"x" * (state.PRIVATE_FILE_BYTES + 1))
            with pytest.raises(OSError, match="longer than 262144 bytes"):
                private.read("file")

    def test_names_leave_temporary_files_out(self, tmp_path: Path) -> None:
        for name in ("b", "a", ".a.0123"):
            (tmp_path / name).touch()
        with PrivateDirectory.open(tmp_path) as private:
            assert private.names() == ["a", "b"]

    def test_the_lock_is_held_until_close(self, tmp_path: Path) -> None:
        with PrivateDirectory.open(tmp_path, lock=True):
            other = os.open(tmp_path, os.O_RDONLY)
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)

    def test_close_may_be_called_again(self, tmp_path: Path) -> None:
        private = PrivateDirectory.open(tmp_path)
        private.close()
        private.close()

    def test_nothing_is_left_open_when_the_lock_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(fcntl, "flock", refusing(OSError, errno.ENOLCK))
        with pytest.raises(OSError, match="No locks available"):
            PrivateDirectory.open(tmp_path, lock=True)
        assert len(os.listdir("/proc/self/fd")) == before

    def test_short_writes_are_continued(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write = os.write
        monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
        with PrivateDirectory.open(tmp_path) as private:
            private.write("file", b"0123456789")
            assert private.read("file") == b"0123456789"

    def test_data_is_on_the_disk_before_the_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[str] = []
        fsync, rename = os.fsync, os.rename

        def fsynced(descriptor: int) -> None:
            calls.append("fsync")
            fsync(descriptor)

        def renamed(old: str, new: str, **directories: int) -> None:
            calls.append("rename")
            rename(old, new, **directories)

        monkeypatch.setattr(os, "fsync", fsynced)
        monkeypatch.setattr(os, "rename", renamed)
        with PrivateDirectory.open(tmp_path) as private:
            private.write("file", b"x")
        assert calls == ["fsync", "rename", "fsync"]


class TestRootInTheDirectoryOfTheServersUser:
    def test_files_and_directories_are_given_to_the_owner(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given: list[tuple[int, int]] = []
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setattr(os, "fchown", lambda _fd, uid, gid: given.append((uid, gid)))
        status, fstat = os.stat, os.fstat

        def owned(result: os.stat_result) -> os.stat_result:
            return os.stat_result([*result[:4], 4711, 4712, *result[6:10]])

        monkeypatch.setattr(os, "stat", lambda *a, **k: owned(status(*a, **k)))
        monkeypatch.setattr(os, "fstat", lambda fd: owned(fstat(fd)))
        with PrivateDirectory.open(tmp_path / "users", create=True) as private:
            assert given == [(4711, 4712)]
            private.write("file", b"x")
        assert given == [(4711, 4712)] * 2
        PrivateDirectory.open(tmp_path / "users", create=True).close()
        assert len(given) == 2

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    def test_for_real(self, tmp_path: Path) -> None:
        os.chown(tmp_path, 4711, 4712)
        with PrivateDirectory.open(tmp_path / "users", create=True) as private:
            private.write("file", b"x")
        for path in (tmp_path / "users", tmp_path / "users" / "file"):
            assert (path.stat().st_uid, path.stat().st_gid) == (4711, 4712)

    def test_nothing_is_given_away_else(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.setattr(os, "fchown", refusing(PermissionError, errno.EPERM))
        with PrivateDirectory.open(tmp_path / "users", create=True) as private:
            private.write("file", b"x")


def test_a_lock_that_is_never_given_up_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "LOCK_SECONDS", 0.0)
    with (
        PrivateDirectory.open(tmp_path, lock=True),
        pytest.raises(LocalError, match=f"{tmp_path} is locked by another process"),
    ):
        PrivateDirectory.open(tmp_path, lock=True)
    PrivateDirectory.open(tmp_path, lock=True).close()


def test_a_lock_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = PrivateDirectory.open(tmp_path, lock=True)
    monkeypatch.setattr(state.time, "sleep", lambda _: other.close())
    PrivateDirectory.open(tmp_path, lock=True).close()
