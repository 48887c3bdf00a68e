"""profiles.py: login URLs kept in files that only their owner reads."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from wstunnel.auth import parse_login_url
from wstunnel.errors import LocalError, UsageError
from wstunnel.profiles import client_url, list_profiles, load_profile, save_profile

SECRET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNO-_"
URL = parse_login_url(f"wss://{SECRET}@one.example/#sha256={'0' * 64}")
OTHER = parse_login_url(f"wss://{SECRET}@two.example/")


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CONFIG_HOME": str(tmp_path / "config")}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "config/wstunnel/profiles"


class TestFiles:
    def test_is_loaded_as_saved(self, environ: dict[str, str], directory: Path) -> None:
        assert list_profiles(environ) == ()
        assert save_profile("work", URL, environ) == directory / "work"
        save_profile("default", OTHER, environ)
        assert load_profile("work", environ) == URL
        assert load_profile("default", environ) == OTHER
        assert list_profiles(environ) == ("default", "work")
        save_profile("work", OTHER, environ)
        assert load_profile("work", environ) == OTHER

    def test_only_the_owner_may_read(self, environ: dict[str, str], directory: Path) -> None:
        save_profile("work", URL, environ)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert stat.S_IMODE((directory / "work").stat().st_mode) == 0o600

    def test_home_when_xdg_is_not_set(self, tmp_path: Path) -> None:
        path = save_profile("work", URL, {"HOME": str(tmp_path)})
        assert path == tmp_path / ".config/wstunnel/profiles/work"

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o622])
    def test_others_may_read_it(self, environ: dict[str, str], mode: int) -> None:
        path = save_profile("work", URL, environ)
        path.chmod(mode)
        with pytest.raises(LocalError, match=f"may read .mode {mode:04o}.: chmod 600 {path}") as caught:
            load_profile("work", environ)
        assert SECRET not in str(caught.value)
        path.chmod(0o400)
        assert load_profile("work", environ) == URL

    def test_missing_names_the_existing_ones(self, environ: dict[str, str]) -> None:
        with pytest.raises(UsageError, match=r"no profile `default` \(there are none yet\): .*`wstunnel login URL`,"):
            load_profile("default", environ)
        save_profile("home", URL, environ)
        save_profile("work", URL, environ)
        with pytest.raises(UsageError, match=r"\(there are: home, work\): .*`wstunnel login URL --profile wrk`"):
            load_profile("wrk", environ)

    def test_a_name_is_not_a_path(self, environ: dict[str, str]) -> None:
        with pytest.raises(UsageError, match="this cannot be a name"):
            save_profile("../x", URL, environ)
        with pytest.raises(UsageError, match="this cannot be a name"):
            load_profile("../x", environ)

    def test_malformed(self, environ: dict[str, str]) -> None:
        path = save_profile("work", URL, environ)
        for content, message in (
            (f"https://{SECRET}@h".encode(), "is malformed .*did you mean wss"),
            (b"", "is malformed"),
            (b"\xff", "is not text"),
        ):
            path.write_bytes(content)
            with pytest.raises(LocalError, match=f"{path} {message}.* `wstunnel login`") as caught:
                load_profile("work", environ)
            assert SECRET not in str(caught.value)

    def test_unreadable(self, environ: dict[str, str], directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        directory.mkdir(parents=True)
        os.mkfifo(directory / "work")
        with pytest.raises(LocalError, match="profiles/work cannot be read: not a regular file"):
            load_profile("work", environ)
        monkeypatch.setattr(os, "listdir", None)

        def refuse(*_: object, **__: object) -> int:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(LocalError, match="cannot be read: permission denied"):
            list_profiles(environ)
        with pytest.raises(LocalError, match="profiles/work cannot be written: permission denied"):
            save_profile("work", URL, environ)


class TestClientUrl:
    def test_argument_before_profile_before_variable_before_default(self, environ: dict[str, str]) -> None:
        save_profile("default", parse_login_url("wss://default"), environ)
        save_profile("work", parse_login_url("wss://work"), environ)
        assert client_url(None, environ, None).host == "default"
        environ["WSTUNNEL_URL"] = " \n"
        assert client_url(None, environ, None).host == "default"
        environ["WSTUNNEL_URL"] = "wss://variable\n"
        assert client_url(None, environ, None).host == "variable"
        assert client_url(None, environ, "work").host == "work"
        assert client_url("wss://argument", environ, None).host == "argument"
        assert client_url("wss://argument", environ, "work").host == "argument"

    def test_an_empty_argument_is_an_error(self, environ: dict[str, str]) -> None:
        environ["WSTUNNEL_URL"] = "wss://variable"
        with pytest.raises(UsageError, match="begins with wss://"):
            client_url("", environ, None)

    def test_the_variable_is_named(self, environ: dict[str, str]) -> None:
        environ["WSTUNNEL_URL"] = f"wss://{SECRET}@h:x"
        with pytest.raises(UsageError, match="in WSTUNNEL_URL: a port is a number") as caught:
            client_url(None, environ, None)
        assert caught.value.text == "wss://***@h:x"
        assert SECRET not in str(caught.value)

    def test_nothing_at_all(self, environ: dict[str, str]) -> None:
        with pytest.raises(
            UsageError, match=r"no profile `default`.*or give a login URL as argument or in WSTUNNEL_URL"
        ):
            client_url(None, environ, None)
