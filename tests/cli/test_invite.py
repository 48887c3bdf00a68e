"""`wstunnel invite`: one login URL on stdout, and a hash in the state directory."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke, Program, Terminal
from wstunnel.auth import Token, Users, parse_login_url
from wstunnel.state import Announcement, state_directory, write_announcement

PIN = bytes(range(32))
TOKEN = Token.new().reveal()


def announce(directory: Path, **fields: object) -> None:
    state_directory(directory, {})
    announcement = {"scheme": "wss", "port": 8443, "path": "/t", "pins": (PIN,), **fields}
    write_announcement(directory, Announcement(**announcement))  # type: ignore[arg-type]


def test_the_url_is_what_the_server_announced(invoke: Invoke, tmp_path: Path) -> None:
    announce(tmp_path / "s")
    result = invoke("invite", "--host", "tunnel.example.org", "--state-dir", str(tmp_path / "s"))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 1
    url = parse_login_url(result.stdout)
    assert (url.scheme, url.host, url.port, url.path, url.pins) == ("wss", "tunnel.example.org", 8443, "/t", (PIN,))
    assert Users(tmp_path / "s").authenticate(url.require_token().reveal()) == "default"


def test_the_token_itself_is_not_kept(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("invite", "alice", "--host", "a", "--state-dir", str(tmp_path / "s"))
    token = parse_login_url(result.stdout).require_token().reveal()
    kept = [path.read_text() for path in (tmp_path / "s").rglob("*") if path.is_file()]
    assert kept
    assert not any(token in text for text in kept)
    assert Users(tmp_path / "s").authenticate(token) == "alice"


def test_each_invitation_is_another_token(invoke: Invoke, tmp_path: Path) -> None:
    flags = ("--host", "a", "--state-dir", str(tmp_path / "s"))
    tokens = [parse_login_url(invoke("invite", *flags).stdout).require_token().reveal() for _ in range(2)]
    assert tokens[0] != tokens[1]
    assert [Users(tmp_path / "s").authenticate(token) for token in tokens] == ["default", "default"]


@pytest.mark.parametrize(
    ("host", "expected"),
    [("a:9", ("a", 9)), ("[::1]", ("::1", 8080)), ("[::1]:9", ("::1", 9)), ("1.2.3.4", ("1.2.3.4", 8080))],
)
def test_host(invoke: Invoke, tmp_path: Path, host: str, expected: tuple[str, int]) -> None:
    announce(tmp_path / "s", scheme="ws", port=8080, path="/", pins=())
    url = parse_login_url(invoke("invite", "--host", host, "--state-dir", str(tmp_path / "s")).stdout)
    assert url.scheme == "ws"
    assert (url.host, url.port) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("wss://tunnel.example.org/tunnel/", ("wss", "tunnel.example.org", 443, "/tunnel/", ())),
        ("wss://tunnel.example.org", ("wss", "tunnel.example.org", 443, "/", ())),
        ("ws://[::1]:8000/x", ("ws", "::1", 8000, "/x", ())),
        (f"wss://a:9/#sha256={PIN.hex()}", ("wss", "a", 9, "/", (PIN,))),
    ],
)
def test_the_url_of_a_proxy_in_front(invoke: Invoke, tmp_path: Path, given: str, expected: tuple[object, ...]) -> None:
    announce(tmp_path / "s")  # with a pin of the server's own key, which clients never see
    result = invoke("invite", "alice", "--url", given, "--state-dir", str(tmp_path / "s"))
    assert (result.exit_code, result.stderr) == (0, "")
    url = parse_login_url(result.stdout)
    assert (url.scheme, url.host, url.port, url.path, url.pins) == expected
    assert Users(tmp_path / "s").authenticate(url.require_token().reveal()) == "alice"


def test_a_url_needs_no_announcement(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("invite", "--url", "wss://a/", "--state-dir", str(tmp_path / "s"))
    assert (result.exit_code, result.stderr) == (0, "")


def test_a_server_on_a_unix_socket_only(invoke: Invoke, tmp_path: Path) -> None:
    announce(tmp_path / "s", port=None, pins=())
    flags = ("--state-dir", str(tmp_path / "s"))
    for host in ([], ["--host", "tunnel.example.org"]):
        result = invoke("invite", *host, *flags)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "listens on a Unix socket only" in result.stderr
        assert "--url wss://tunnel.example.org/" in result.stderr
    assert not list((tmp_path / "s").rglob("default")), "a token was made that nobody has"
    assert invoke("invite", "--host", "a:9", *flags).stdout.strip().endswith("@a:9/t")
    assert invoke("invite", "--url", "wss://a/x", *flags).stdout.strip().endswith("@a/x")


def test_the_machine_s_name_unless_told_otherwise(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(tmp_path / "s")
    monkeypatch.setattr(socket, "gethostname", lambda: "box.example.org")
    url = parse_login_url(invoke("invite", "--state-dir", str(tmp_path / "s")).stdout)
    assert url.host == "box.example.org"


def test_a_server_that_never_ran(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("invite", "--host", "a", "--state-dir", str(tmp_path / "s"))
    assert result.exit_code == 0
    url = parse_login_url(result.stdout)
    assert (url.scheme, url.port, url.path, url.pins) == ("wss", 443, "/", ())
    assert result.stderr.startswith("wstunnel: warning: no server has run with ")
    assert not (tmp_path / "s" / "server.crt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["../x"], "this cannot be a name"),
        ([""], "this cannot be a name"),
        (["--host", "a b"], "--host: this is not a host name"),
        (["--host", "a:0"], "--host: a port is a number from 1 to 65535\n    a:0\n      ^\nexpected: HOST[:PORT]"),
        (["--host", "::1"], "--host: an IPv6 address stands in brackets"),
        (["--host", ""], "--host: the host is missing"),
        (["--host", "https://a/"], "--host: this is a URL: give it to --url\n    https://a/\n"),
        (["--url", "https://a/"], "--url: a login URL begins with wss://, not https://: did you mean wss://?"),
        (["--url", "wss://a/", "--host", "a"], "--host is a part of --url: give one of them"),
        (["--url", "wss://a/?q"], "--url: a login URL has no query: leave it out"),
        (["--url", f"wss://{TOKEN}@a/"], "--url: this URL has a token, and invite makes a new one: leave it out"),
        (["a", "b"], "Got unexpected extra argument (b)"),
    ],
)
def test_mistakes(invoke: Invoke, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = invoke("invite", "--state-dir", str(tmp_path / "s"), *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert TOKEN not in result.stderr
    assert result.stdout == ""


def test_a_malformed_announcement(invoke: Invoke, tmp_path: Path) -> None:
    announce(tmp_path / "s")
    (tmp_path / "s" / "server.json").write_text("{")
    result = invoke("invite", "--host", "a", "--state-dir", str(tmp_path / "s"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "server.json is malformed" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_terminal_is_told_what_to_do_with_the_url(tmp_path: Path) -> None:
    announce(tmp_path / "s")
    terminal = Terminal("invite", "--host", "a", "--state-dir", str(tmp_path / "s"))
    assert terminal.finish() == 0
    assert "On the client machine: wstunnel login" in terminal.shown


def test_a_token_that_nobody_saw_is_taken_back(program: Program, tmp_path: Path) -> None:
    flags = ("-m", "wstunnel", "invite", "--host", "a", "--state-dir", str(tmp_path / "s"))
    kept = program(*flags)
    url = parse_login_url(kept.communicate(timeout=60)[0])
    before = (tmp_path / "s/users/default").read_text()
    with open("/dev/full", "w") as full:
        unseen = program(*flags, stdout=full)
        said = unseen.communicate(timeout=60)[1]
    assert unseen.returncode == 1
    assert "cannot write to standard output" in said and "its token was taken back" in said
    assert (tmp_path / "s/users/default").read_text() == before
    assert Users(tmp_path / "s").authenticate(url.require_token().reveal()) == "default"


def test_a_token_whose_reader_has_gone_is_taken_back(program: Program, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        unread = program("-m", "wstunnel", "invite", "--host", "a", "--state-dir", str(tmp_path / "s"), stdout=writer)
        unread.communicate(timeout=60)
    finally:
        os.close(writer)
    assert unread.returncode == 1
    assert "sha256" not in (tmp_path / "s/users/default").read_text()
