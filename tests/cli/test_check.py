"""`wstunnel check`: its output and exit codes as a program; the real server is a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import ROOT, Invoke, Program, wait_for
from tests.roles import free_port
from wstunnel.auth import Token, parse_login_url
from wstunnel.cli.check import why
from wstunnel.cli.group import wstunnel
from wstunnel.config import ClientConfig
from wstunnel.upstream import Proxies, parse_proxy

Server = Callable[..., tuple["subprocess.Popen[str]", int]]
TOKEN = Token.new().reveal()


@pytest.fixture
def login(server: Server, invoke: Invoke, tmp_path: Path) -> str:
    """The login URL of a server that runs."""
    server()
    result = invoke("invite", "--state-dir", str(tmp_path / "server"), "--host", "127.0.0.1")
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def run(program: Program, *arguments: str, url: str = "", **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a whole run."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **environment}
    if url:
        variables["WSTUNNEL_URL"] = url
    process = program("-m", "wstunnel", "check", *arguments, env=variables)
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


def test_all_is_well(program: Program, login: str) -> None:
    code, stdout, stderr = run(program, url=login)
    assert (code, stderr) == (0, "")
    first, *steps, last = stdout.splitlines()
    assert first.startswith("wss://127.0.0.1:")
    assert "#" not in first
    assert last == "all is well"
    assert [line.split()[:2] for line in steps] == [
        ["✓", name]
        for name in ("name", "route", "proxy", "tcp", "tls", "http", "authentication", "tunnel", "round-trip")
    ]
    assert parse_login_url(login).require_token().reveal() not in stdout


def test_words_where_the_encoding_has_no_marks(program: Program, login: str) -> None:
    code, stdout, _ = run(program, url=login, PYTHONIOENCODING="ascii")
    assert code == 0
    assert stdout.isascii()
    assert "\n  ok   name" in stdout


def test_several_servers_as_json(program: Program, login: str) -> None:
    """A line each; the gravest failure is the exit code."""
    wrong = login.replace(parse_login_url(login).require_token().reveal(), TOKEN)
    away = f"ws://{TOKEN}@127.0.0.1:{free_port()}/"
    code, stdout, stderr = run(program, "--json", url=f"{login} {away} {wrong}")
    assert (code, stderr) == (3, "")
    found = [json.loads(line) for line in stdout.splitlines()]
    assert [each["ok"] for each in found] == [True, False, False]
    assert [each["steps"][-1]["step"] for each in found] == ["round-trip", "tcp", "authentication"]
    assert found[1]["steps"][-1]["next"].startswith("nothing listens there")
    assert TOKEN not in stdout
    assert run(program, "--json", url=f"{away} {login}")[0] == 1


def test_a_token_among_the_arguments_is_not_shown(program: Program) -> None:
    code, stdout, stderr = run(program, f"ws://{TOKEN}@127.0.0.1:{free_port()}/")
    assert code == 1
    assert stdout.splitlines()[-1] == "not well: tcp"
    assert TOKEN not in stdout + stderr


@pytest.mark.parametrize("as_json", [True, False])
def test_ctrl_c_tells_what_is_known(program: Program, login: str, tmp_path: Path, as_json: bool) -> None:
    file = tmp_path / "out"
    arguments = ["-m", "wstunnel", "check", "--idle", "1h", *(["--json"] if as_json else [])]
    with file.open("w") as out:
        process = program(
            *arguments,
            stdout=out,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "WSTUNNEL_URL": login},
        )
        if as_json:
            descriptors = Path(f"/proc/{process.pid}/fd")
            wait_for(lambda: sum(1 for _ in descriptors.iterdir()) > 25, process)  # the silent links
        else:
            wait_for(lambda: "round-trip" in file.read_text(), process)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr == ""
    if as_json:
        found = json.loads(file.read_text())
        assert (found["ok"], found["interrupted"]) == (False, True)
        assert [step["step"] for step in found["steps"]][8] == "round-trip"
    else:
        assert file.read_text().splitlines()[-1] == "interrupted"


def test_idle_takes_a_time_or_none(program: Program, login: str) -> None:
    code, stdout, _ = run(program, "--json", "--idle", "1", url=login)
    assert code == 0
    assert json.loads(stdout)["steps"][-1]["step"] == "idle"
    group = wstunnel.make_context("wstunnel", ["check"])  # click remembers how the first parent spells --help
    command = wstunnel.get_command(group, "check")
    assert command is not None
    for arguments, seconds in ((["--idle"], 180), ([], None), (["--idle", "5m", "ws://x"], 300)):
        assert command.make_context("check", arguments, parent=group).params["idle"] == seconds


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "no login URL|no profile|there is no"),
        (["--idle", "2h", "ws://x"], "longer than an hour"),
        (["--idle", "0", "ws://x"], "one second at least"),
        (["--idle", f"ws://{TOKEN}@x/"], "put it before --idle"),
        (["ws://127.0.0.1/"], "has no token"),
        (["--pin", "0" * 64, f"ws://{TOKEN}@127.0.0.1/"], "--pin does nothing"),
    ],
)
def test_usage(invoke: Invoke, arguments: list[str], text: str) -> None:
    result = invoke("check", *arguments)
    assert result.exit_code == 2
    assert any(each in result.stderr for each in text.split("|")), result.stderr
    assert TOKEN not in result.stderr


@pytest.mark.parametrize(
    ("given", "environment", "reason"),
    [
        (None, {}, "neither --proxy nor a variable of the environment names one"),
        (None, {"HTTPS_PROXY": "p:1", "ALL_PROXY": "q:1"}, "HTTPS_PROXY"),
        (None, {"HTTPS_PROXY": " ", "ALL_PROXY": "q:1"}, "ALL_PROXY"),
        (None, {"http_proxy": "p:1"}, "neither --proxy nor a variable of the environment names one"),
        (None, {"https_proxy": "p:1", "NO_PROXY": "host.test"}, "NO_PROXY takes this server out of https_proxy"),
        ("none", {"HTTPS_PROXY": "p:1"}, "--proxy none"),
        ("http://p:1", {"HTTPS_PROXY": "q:1"}, "--proxy"),
    ],
)
def test_why_that_proxy(given: str | None, environment: dict[str, str], reason: str) -> None:
    url = parse_login_url(f"wss://{TOKEN}@host.test/")
    proxies = None if given is None else parse_proxy(given)
    chosen = Proxies.from_environment(environment, {"wss"}) if proxies is None else proxies
    assert why(url, ClientConfig(url=url, proxies=chosen), proxies, environment) == reason
