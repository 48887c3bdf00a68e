"""`wstunnel client`: flags to configuration, and signals to the program."""

from __future__ import annotations

import base64
import json
import logging
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Invoke, Program
from wstunnel import limits
from wstunnel.auth import Token
from wstunnel.cli import running
from wstunnel.config import ClientConfig
from wstunnel.forwards import GRAMMAR, parse_forward

TOKEN = "T" * 43
URL = f"wss://{TOKEN}@tunnel.example.org/"
PIN = bytes(range(32))
FORWARD = ("-L", "5432:db:5432")

Captured = list[tuple[ClientConfig, dict[signal.Signals, int]]]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Captured:
    """What would have been run."""
    calls: Captured = []

    def run(role: Any, exit_codes: dict[signal.Signals, int]) -> int:
        from wstunnel.client import run as connect

        assert role.func is connect
        calls.append((*role.args, exit_codes))
        return 0

    monkeypatch.setattr(running, "run", run)
    return calls


def test_defaults(invoke: Invoke, captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSTUNNEL_URL", URL)
    result = invoke("client", *FORWARD)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    [(config, exit_codes)] = captured
    assert config.url.token == Token.parse(TOKEN)
    assert config == ClientConfig(url=config.url, local_forwards=parse_forward("5432:db:5432"))
    assert exit_codes == {signal.SIGTERM: 0, signal.SIGINT: 130}


def test_every_flag(invoke: Invoke, captured: Captured) -> None:
    assert invoke("login", URL.replace("tunnel", "work"), "--profile", "work").exit_code == 0
    encoded = base64.urlsafe_b64encode(PIN).decode().rstrip("=")
    flags = (
        f"-L 0:a:1 -L 8000-8001:b:80-81 --profile work --ca ca.pem --pin {PIN.hex()} --pin {encoded} --idle-links 64"
    )
    result = invoke("client", *flags.split(), "--exit-on-forward-failure", "-v", "--log-format", "json")
    assert result.exit_code == 0, result.stderr
    [(config, _)] = captured
    assert config.url.host == "work.example.org"
    assert [forward.port for forward in config.local_forwards] == [0, 8000, 8001]
    assert config.ca == Path("ca.pem")
    assert config.pins == (PIN, PIN)
    assert config.idle_links == 64
    assert config.exit_on_forward_failure


@pytest.mark.parametrize(("flags", "warned"), [([], True), (["-q"], True), (["-qq"], False)])
def test_a_url_with_a_token_as_argument_is_warned_about_once(
    invoke: Invoke, captured: Captured, flags: list[str], warned: bool
) -> None:
    result = invoke("client", URL, *FORWARD, *flags)
    assert result.exit_code == 0
    assert captured[0][0].url.host == "tunnel.example.org"
    assert result.stderr.count("\n") == warned
    assert ("wstunnel login" in result.stderr) == warned
    assert TOKEN not in result.stderr


@pytest.mark.parametrize(
    ("spec", "caret"),
    [
        ("", 0),
        ("5432", 4),
        ("5432:db", 7),
        ("db:5432", 0),
        ("5432:5432", 5),
        ("5432:db:http", 8),
        ("5432:db:0", 8),
        ("65536:db:1", 0),
        ("x:1:db:1", 0),
        ("1:db:1:2:3", 9),
        ("1::1", 2),
        ("8000-8002:db:80-81", 13),
        ("8002-8000:db:80-82", 0),
        ("[::1:1:db:1", 0),
        ("1:[::zz]:1", 3),
        ("1:fd00::5:80", None),
        ("1:d b:1", 3),
        ("1:db:1/udp", 6),
        ("/tmp/a.sock:db:1", 0),
        ("wss://x:1", None),
        ("1:db:1;proxy=v1", 6),
    ],
)
def test_every_mistake_in_a_forward_shows_the_grammar(
    invoke: Invoke, captured: Captured, spec: str, caret: int | None
) -> None:
    result = invoke("client", "-L", spec)
    assert result.exit_code == 2
    first, shown, pointer, grammar = result.stderr.splitlines()
    assert first.startswith("wstunnel: error: -L: ")
    assert shown == f"    {spec}"
    assert pointer.strip() == "^"
    assert caret is None or pointer.index("^") == 4 + caret
    assert grammar == f"expected: {GRAMMAR}"
    assert captured == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([URL], "nothing to forward: give at least one -L\nexpected: -L [BIND:]PORT:HOST:HOSTPORT"),
        ([*FORWARD], "there is no profile `default`"),
        ([*FORWARD, "--profile", "work"], "there is no profile `work`"),
        ([*FORWARD, "--profile", "../x"], "this cannot be a name"),
        ([*FORWARD, "wss://tunnel.example.org"], "the login URL has no token"),
        ([*FORWARD, "https://tunnel.example.org"], "did you mean wss://?"),
        ([*FORWARD, "5432:db:5432"], "a login URL begins with wss://"),
        ([*FORWARD, URL, "another"], "Got unexpected extra argument (another)"),
        ([*FORWARD, URL, "--pin", "abc"], "--pin: the pin is malformed"),
        ([*FORWARD, URL, "--pin", "00" * 31], "--pin: the pin is malformed"),
        ([*FORWARD, URL, "--idle-links", "0"], "0 is not in the range 1<=x<=64"),
        ([*FORWARD, URL, "--idle-links", "65"], "65 is not in the range 1<=x<=64"),
        (["-L"], "Option '-L' requires an argument."),
    ],
)
def test_mistakes(invoke: Invoke, captured: Captured, arguments: list[str], message: str) -> None:
    result = invoke("client", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("wstunnel: error: ")
    assert message in result.stderr
    assert TOKEN not in result.stderr
    assert captured == []


@pytest.mark.parametrize("flags", [["--pin", PIN.hex()], ["--ca", "ca.pem"]])
def test_trust_flags_without_tls_are_refused(invoke: Invoke, captured: Captured, flags: list[str]) -> None:
    result = invoke("client", URL.replace("wss://", "ws://"), *FORWARD, *flags)
    assert result.exit_code == 2
    assert f"{flags[0]} does nothing with a ws:// URL" in result.stderr
    assert captured == []


@pytest.mark.parametrize(
    ("url", "flags", "warning"),
    [
        (URL.replace("wss://", "ws://"), [], "ws:// is not encrypted"),
        (f"ws://{TOKEN}@127.0.0.2:80/", [], None),
        (f"ws://{TOKEN}@[::1]:80/", [], None),
        (f"ws://{TOKEN}@localhost/", [], None),
        (URL, ["--ca", "ca.pem", "--pin", PIN.hex()], "--ca is not used"),
        (URL, ["--ca", "ca.pem"], None),
    ],
)
def test_what_weakens_trust_is_warned_about(  # noqa: PLR0917  # fixtures
    invoke: Invoke,
    captured: Captured,
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    flags: list[str],
    warning: str | None,
) -> None:
    monkeypatch.setenv("WSTUNNEL_URL", url)
    result = invoke("client", *FORWARD, *flags)
    assert result.exit_code == 0
    assert result.stderr.count("\n") == (warning is not None)
    assert (warning or "") in result.stderr
    assert TOKEN not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [URL],
        ["client", "-L", URL],
        ["client", "--profile", URL, *FORWARD],
        ["client", "--idle-links", URL, *FORWARD],
        ["client", URL, *FORWARD, "--pin", TOKEN + "=="],
        ["invite", URL],
        ["invite", "--host", URL],
        ["client", *FORWARD, URL, URL],
        ["client", *FORWARD, "-qqq", "--log-format", "json", "--profile", URL],
    ],
)
def test_a_token_in_the_wrong_place_is_not_shown(invoke: Invoke, arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr
    assert TOKEN[:10] not in result.stderr


@pytest.mark.parametrize("arguments", [["--profile", "none", *FORWARD], ["-L", "x"]])
def test_a_failure_is_json_too(invoke: Invoke, arguments: list[str]) -> None:
    result = invoke("client", *arguments, "--log-format", "json")
    assert result.exit_code == 2
    line = json.loads(result.stderr)
    assert (line["level"], line["logger"]) == ("error", "cli")


def test_the_log_is_configured(invoke: Invoke, captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSTUNNEL_URL", URL)
    invoke("client", *FORWARD, "-v")
    assert logging.getLogger("wstunnel").level == logging.DEBUG


# --- as a program -----------------------------------------------------------------------------------------------------


@pytest.fixture
def client(program: Program) -> Any:
    """Start a client whose server is away, and wait until it listens; gives the process and its port."""

    def start(*flags: str) -> tuple[subprocess.Popen[str], int]:
        environment = {**os.environ, "WSTUNNEL_URL": f"ws://{TOKEN}@127.0.0.1:9/"}
        process = program("-m", "wstunnel", "client", "-L", "0:localhost:1", *flags, env=environment)
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("listening 127.0.0.1:"):
                return process, int(line.split()[1].rpartition(":")[2])
        raise AssertionError("the client ended")

    return start


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals(client: Any, number: signal.Signals, code: int) -> None:
    process, _ = client()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=limits.STOP_SECONDS + 5)
    assert process.returncode == code
    assert "Traceback" not in stderr


def test_a_signal_while_a_connection_waits_for_a_link(client: Any) -> None:
    process, port = client()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"x")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=limits.STOP_SECONDS + 5)
    assert process.returncode == 130


def test_a_token_that_the_server_does_not_know(program: Program, server: Any) -> None:
    _, port = server("--plain")
    environment = {**os.environ, "WSTUNNEL_URL": f"ws://{TOKEN}@127.0.0.1:{port}/"}
    process = program("-m", "wstunnel", "client", "-q", "-L", "0:a:1", env=environment)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 3
    assert stderr.startswith("wstunnel: error: ")
    assert "wstunnel invite" in stderr
    assert TOKEN not in stderr


@pytest.mark.parametrize("fragment", ["", f"#sha256={PIN.hex()}"])
def test_a_server_that_cannot_prove_who_it_is(program: Program, server: Any, fragment: str) -> None:
    _, port = server()
    environment = {**os.environ, "WSTUNNEL_URL": f"wss://{TOKEN}@127.0.0.1:{port}/{fragment}"}
    process = program("-m", "wstunnel", "client", "-q", "-L", "0:a:1", env=environment)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert stderr.startswith("wstunnel: error: ")
    assert "Traceback" not in stderr


@pytest.mark.parametrize("flags", [[], ["--exit-on-forward-failure"]])
def test_a_port_in_use(program: Program, flags: list[str]) -> None:
    environment = {**os.environ, "WSTUNNEL_URL": f"ws://{TOKEN}@127.0.0.1:9/"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = program("-m", "wstunnel", "client", "-L", f"{port}:a:1", *flags, env=environment)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    [line] = stderr.splitlines()
    assert line.startswith("wstunnel: error: ")
    assert str(port) in line
    assert "in use" in line
