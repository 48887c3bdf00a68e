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
from wstunnel.upstream import Proxies

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
    assert config == ClientConfig(url=config.url, local_forwards=parse_forward("5432:db:5432"), proxies=Proxies())
    assert exit_codes == {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGHUP: 129}


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


def test_udp(invoke: Invoke, captured: Captured) -> None:
    assert invoke("client", "-L", "53:db:53/udp", "-R", "54:db:54/udp", "--udp-timeout", "90", URL).exit_code == 0
    [(config, _)] = captured
    assert [str(forward.target) for forward in (*config.local_forwards, *config.reverse_forwards)] == [
        "udp:db:53",
        "udp:db:54",
    ]
    assert config.udp_timeout == 90


def test_connect_has_no_udp(invoke: Invoke) -> None:
    result = invoke("connect", "udp:db:53", URL)
    assert result.exit_code == 2
    assert "standard input is a stream of bytes, which UDP has not" in result.stderr


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
        ("/tmp/a.sock:db", None),
        ("wss://x:1", None),
        ("1:db:1;proxy=v3", 7),
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
        (
            [URL],
            "nothing to forward: give at least one -L, -R, -D or --http-proxy\nexpected: -L [BIND:]PORT:HOST:HOSTPORT",
        ),
        ([*FORWARD], "there is no profile `default`"),
        ([*FORWARD, "--profile", "work"], "there is no profile `work`"),
        (["-R", "1080", "--dynamic-login", "x"], "--dynamic-login is for -D and --http-proxy, and there is neither"),
        ([*FORWARD, "--profile", "../x"], "--profile: this cannot be a name"),
        ([*FORWARD, URL, "--sni", "a:443"], "--sni: a name without a port is wanted here\n    a:443\n     ^"),
        ([*FORWARD, "wss://tunnel.example.org"], "the login URL has no token"),
        ([*FORWARD, "https://tunnel.example.org"], "did you mean wss://?"),
        ([*FORWARD, "5432:db:5432"], "a login URL begins with wss://"),
        ([*FORWARD, URL, "another"], "a login URL begins with wss://"),
        ([*FORWARD, URL, "wss://other.example.org"], "the login URL has no token"),
        ([*FORWARD, URL, "--proxy", "proxy:3128"], "--proxy: a proxy's URL begins with http://"),
        ([*FORWARD, URL, "--proxy", "http://ann:hunter2@pro xy"], "    http://***@pro xy"),
        ([*FORWARD, URL, "--header", "X-Team"], "--header: a colon is missing"),
        ([*FORWARD, URL, "--header", "X Team: a"], "--header: not a name of a header field"),
        ([*FORWARD, URL, "--header", "X: a\r\nY: b"], "--header: the value of X has a control character"),
        ([*FORWARD, URL, "--header", "Upgrade: h2c"], "--header: Upgrade belongs to the handshake"),
        ([*FORWARD, URL, "--header", "Sec-WebSocket-Key: x"], "belongs to the handshake"),
        ([*FORWARD, URL, "--header", "authorization: x"], "carries the token"),
        (["-L", "1:ws-raw", URL, "--header", "Authorization: x"], "carries the token"),
        (
            ["-L", "1:ws-raw", "ws://[::1]", *["--header", "Authorization: x"] * 2],
            "Authorization is given more than once",
        ),
        ([*FORWARD, URL, "--header", "Host: a b"], "--header: not a host"),
        ([*FORWARD, URL, "--header", "Host: a", "--header", "host: b"], "Host is given more than once"),
        ([*FORWARD, URL, "--sni", "a:443"], "--sni: "),
        ([*FORWARD, f"ws://{TOKEN}@127.0.0.1/", "--sni", "a"], "--sni does nothing with a ws:// URL"),
        ([*FORWARD, URL, "--pin", "abc"], "--pin: the pin is malformed"),
        ([*FORWARD, URL, "--pin", "00" * 31], "--pin: the pin is malformed"),
        ([*FORWARD, URL, "--idle-links", "0"], "0 is not in the range 1<=x<=64"),
        ([*FORWARD, URL, "--idle-links", "65"], "65 is not in the range 1<=x<=64"),
        ([*FORWARD, URL, "--udp-timeout", "0"], "--udp-timeout: one second at least"),
        ([*FORWARD, URL, "--udp-timeout", "x"], "--udp-timeout: not a time"),
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
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 3
    assert stderr.startswith("wstunnel: error: ")
    assert "wstunnel invite" in stderr
    assert TOKEN not in stderr


@pytest.mark.parametrize("fragment", ["", f"#sha256={PIN.hex()}"])
def test_a_server_that_cannot_prove_who_it_is(program: Program, server: Any, fragment: str) -> None:
    _, port = server()
    environment = {**os.environ, "WSTUNNEL_URL": f"wss://{TOKEN}@127.0.0.1:{port}/{fragment}"}
    process = program("-m", "wstunnel", "client", "-q", "-L", "0:a:1", env=environment)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.startswith("wstunnel: error: ")
    assert "Traceback" not in stderr


@pytest.mark.parametrize("flags", [[], ["--exit-on-forward-failure"]])
def test_a_port_in_use(program: Program, flags: list[str]) -> None:
    environment = {**os.environ, "WSTUNNEL_URL": f"ws://{TOKEN}@127.0.0.1:9/"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = program("-m", "wstunnel", "client", "-L", f"{port}:a:1", *flags, env=environment)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    [line] = stderr.splitlines()
    assert line.startswith("wstunnel: error: ")
    assert str(port) in line
    assert "in use" in line


class TestWayOut:
    """Proxies, headers, names, and several servers."""

    OTHER = URL.replace("tunnel", "other")

    def config(self, invoke: Invoke, captured: Captured, *arguments: str) -> ClientConfig:
        result = invoke("client", *FORWARD, *arguments)
        assert result.exit_code == 0, result.stderr
        return captured[0][0]

    def test_flags(self, invoke: Invoke, captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WSTUNNEL_URL", URL)
        arguments = ("--header", "X-Team:  blue", "--header", "Host: [::1]:8443", "--sni", "cdn.example.org", "-6")
        config = self.config(invoke, captured, *arguments, "--proxy", "socks5://[::1]")
        assert config.headers == (("X-Team", "blue"), ("Host", "[::1]:8443"))
        assert "blue" not in repr(config)
        assert (config.server_name, config.ip_version) == ("cdn.example.org", 6)
        assert config.proxies is not None
        assert str(config.proxies.choose(config.url)) == "socks5://[::1]:1080"

    def test_of_both_families_the_last_one_counts(self, invoke: Invoke, captured: Captured) -> None:
        assert self.config(invoke, captured, URL, "-6", "-4").ip_version == 4

    @pytest.mark.parametrize("name", ["10.0.0.1", "::1", "Tunnel.example.org"])
    def test_names_for_tls(self, invoke: Invoke, captured: Captured, name: str) -> None:
        assert self.config(invoke, captured, URL, "--sni", name).server_name == name

    def test_the_environment(self, invoke: Invoke, captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HTTPS_PROXY", "http://ann:hunter2@proxy:3128")
        config = self.config(invoke, captured, URL)
        assert config.proxies is not None
        assert str(config.proxies.choose(config.url)) == "http://***@proxy:3128"
        assert "hunter2" not in repr(config)
        captured.clear()
        config = self.config(invoke, captured, URL, "--proxy", "none")
        assert config.proxies is not None
        assert config.proxies.choose(config.url) is None

    def test_a_broken_variable_is_named(
        self, invoke: Invoke, captured: Captured, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTPS_PROXY", "http://ann:hunter2@")
        result = invoke("client", *FORWARD, URL)
        assert result.exit_code == 2
        assert "in HTTPS_PROXY: the host is missing" in result.stderr
        assert "hunter2" not in result.stderr

    def test_a_password_among_the_arguments_is_warned_about(
        self, invoke: Invoke, captured: Captured, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WSTUNNEL_URL", URL)
        result = invoke("client", *FORWARD, "--proxy", "http://ann:hunter2@proxy")
        assert (result.exit_code, result.stderr.count("\n")) == (0, 1)
        assert "the proxy's password is among this command's arguments" in result.stderr
        assert "hunter2" not in result.stderr

    def test_a_query_among_the_arguments_is_warned_about(
        self, invoke: Invoke, captured: Captured, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = "wss://tunnel.example.org/?token=hunter22"
        raw = ("client", "-L", "5432:ws-raw")
        result = invoke(*raw, url)
        assert (result.exit_code, result.stderr.count("\n")) == (0, 1)
        assert "the URL's query, which may be a secret, is among this command's arguments" in result.stderr
        assert "hunter22" not in result.stderr
        assert invoke(*raw, "wss://tunnel.example.org/").stderr == ""
        monkeypatch.setenv("WSTUNNEL_URL", url)
        result = invoke(*raw)
        assert (result.exit_code, result.stderr) == (0, "")

    @pytest.mark.parametrize("name", ["Authorization", "cookie", "Proxy-Authorization"])
    def test_a_header_with_a_secret_is_warned_about(self, invoke: Invoke, captured: Captured, name: str) -> None:
        raw = ("client", "-L", "5432:ws-raw", "wss://tunnel.example.org/")
        result = invoke(*raw, "--header", f"{name}: Basic hunter22")
        assert (result.exit_code, result.stderr.count("\n")) == (0, 1)
        assert "a secret is among this command's arguments" in result.stderr
        assert f"header={name}" in result.stderr and "hunter22" not in result.stderr
        assert invoke(*raw, "--header", "X-Gate: open").stderr == ""

    def test_several_servers(self, invoke: Invoke, captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
        config = self.config(invoke, captured, URL, self.OTHER)
        assert [url.host.partition(".")[0] for url in (config.url, *config.fallbacks)] == ["tunnel", "other"]
        captured.clear()
        monkeypatch.setenv("WSTUNNEL_URL", f" {self.OTHER}\n{URL} ")
        config = self.config(invoke, captured)
        assert [url.host.partition(".")[0] for url in (config.url, *config.fallbacks)] == ["other", "tunnel"]

    def test_an_authority_for_the_proxy(self, invoke: Invoke, captured: Captured) -> None:
        """--ca has a use without TLS to the server, or with a pin."""
        plain = f"ws://{TOKEN}@127.0.0.1/"
        assert self.config(invoke, captured, plain, "--ca", "ca.pem", "--proxy", "https://proxy").ca == Path("ca.pem")
        result = invoke("client", *FORWARD, URL, "--ca", "ca.pem", "--pin", PIN.hex(), "--proxy", "https://proxy")
        assert "--ca is not used" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "warned"),
    [
        (["-D", "1080", "--http-proxy", "[::1]:3128", "-R", "1080", "-D", "127.0.0.2:1080"], []),
        (["-D", "*:1080"], ["whoever reaches this port can use the proxy: --dynamic-login"]),
        (["--http-proxy", "192.0.2.1:3128"], ["whoever reaches this port can use the proxy: --dynamic-login"]),
        (["-R", "*:1080"], ["whoever reaches this port of the server can go out through this machine"]),
        (["-L", "*:80:web:80", "-R", "*:80:web:80"], []),
    ],
)
def test_a_proxy_for_everybody_is_told(
    invoke: Invoke, captured: Captured, monkeypatch: pytest.MonkeyPatch, arguments: list[str], warned: list[str]
) -> None:
    monkeypatch.setenv("WSTUNNEL_URL", URL)
    found = invoke("client", *arguments).stderr.splitlines()
    assert len(found) == len(warned) and all(words in line for words, line in zip(warned, found, strict=True))


def test_a_proxy_for_those_who_know_the_password(
    invoke: Invoke, captured: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WSTUNNEL_URL", URL)
    login = tmp_path / "login"
    login.write_text("me:secret\n")
    assert invoke("client", "-D", "*:1080", "--dynamic-login", str(login)).stderr == ""
