"""`wstunnel server`: flags to configuration, and the program's answers to a machine that will not."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import ROOT, Invoke, Program
from wstunnel import limits
from wstunnel.cli import running
from wstunnel.config import ServerConfig
from wstunnel.tls import ensure_certificate

Captured = list[tuple[ServerConfig, dict[signal.Signals, int]]]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Captured:
    """What would have been run."""
    calls: Captured = []

    def run(role: Any, exit_codes: dict[signal.Signals, int]) -> int:
        from wstunnel.server import run as serve

        assert role.func is serve
        calls.append((*role.args, exit_codes))
        return 0

    monkeypatch.setattr(running, "run", run)
    return calls


def test_defaults(invoke: Invoke, captured: Captured, home: Path) -> None:
    assert invoke("server").exit_code == 0
    [(config, exit_codes)] = captured
    assert config == ServerConfig(port=443, state_dir=home / "state" / "wstunnel")
    assert exit_codes == {signal.SIGTERM: 0, signal.SIGINT: 0}


def test_every_flag(invoke: Invoke, captured: Captured, tmp_path: Path) -> None:
    flags = "--port 0 --bind 127.0.0.1 --bind [::1] --bind ::1 --path /t --cert c.pem --key k.pem --allow db:5432"
    result = invoke("server", *flags.split(), "--allow", "10.0.0.0/8:*", "--state-dir", str(tmp_path / "s"), "-vv")
    assert result.exit_code == 0, result.stderr
    [(config, _)] = captured
    assert (config.port, config.bind, config.path, config.plain) == (0, ("127.0.0.1", "::1"), "/t", False)
    assert (config.cert, config.key) == (Path("c.pem"), Path("k.pem"))
    assert [rule.host or str(rule.network) for rule in config.allow] == ["db", "10.0.0.0/8"]
    assert config.state_dir == tmp_path / "s"


def test_unix_sockets_and_proxies_in_front(invoke: Invoke, captured: Captured) -> None:
    flags = "--bind unix:/run/a;mode=666 --bind unix:/run/b --proxy-protocol 10.0.0.5 --proxy-protocol unix"
    result = invoke("server", *flags.split(), "--trust-proxy", "fd00::/8", "--trust-proxy", "127.0.0.1")
    assert result.exit_code == 0, result.stderr
    [(config, _)] = captured
    assert (config.bind, config.bind_unix) == ((), (("/run/a", 0o666), ("/run/b", 0o600)))
    assert config.proxy_protocol == (ip_network("10.0.0.5"), None)
    assert config.trust_proxy == (ip_network("fd00::/8"), ip_network("127.0.0.1"))
    assert invoke("server", "--bind", "unix:/run/a", "--bind", "::1", "--port", "9").exit_code == 0
    [_, (config, _)] = captured
    assert (config.bind, config.bind_unix, config.port) == (("::1",), (("/run/a", 0o600),), 9)


def test_udp_timeout(invoke: Invoke, captured: Captured) -> None:
    assert invoke("server", "--udp-timeout", "5m", "--allow", "udp:*:53").exit_code == 0
    [(config, _)] = captured
    assert config.udp_timeout == 300
    assert config.allow[0].kinds == ("udp",)


def test_plain_endpoints(invoke: Invoke, captured: Captured) -> None:
    flags = "--endpoint /db=db:5432 --endpoint /x=unix:/run/x --endpoint-auth none --endpoint-text"
    origins = "--allow-origin https://App.example:443/ --allow-origin http://localhost:3000"
    result = invoke("server", *flags.split(), *origins.split())
    assert result.exit_code == 0, result.stderr
    [(config, _)] = captured
    assert [str(endpoint) for endpoint in config.endpoints] == ["/db=tcp:db:5432", "/x=unix:/run/x"]
    assert (config.endpoint_auth, config.endpoint_text) == ("none", True)
    assert config.allow_origins == ("https://app.example", "http://localhost:3000")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--endpoint", "/=a:1"], "--endpoint: the path / is the tunnel's (--path) already"),
        (["--endpoint", "/a=a:1", "--endpoint", "/a=b:1"], "--endpoint: the path /a is an endpoint's already"),
        (["--endpoint", "/a=b"], "--endpoint: the port is missing\n    /a=b\n        ^\nexpected: /PATH=[tcp:]HOST"),
        (["--allow-origin", "app.example"], "--allow-origin: an origin begins with a scheme and '://'\n    app."),
        (["--allow-origin", "https://a.example"], "--allow-origin is for endpoints, and there is none"),
        (["--endpoint-text"], "--endpoint-text is for endpoints, and there is none"),
        (["--endpoint-auth", "none"], "--endpoint-auth is for endpoints, and there is none"),
    ],
)
def test_endpoints_that_cannot_be(invoke: Invoke, captured: Captured, arguments: list[str], message: str) -> None:
    result = invoke("server", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not captured


def test_plain(invoke: Invoke, captured: Captured) -> None:
    assert invoke("server", "--plain", "--log-format", "json").exit_code == 0
    assert captured[0][0].plain


def test_the_state_directory_of_systemd(
    invoke: Invoke, captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "var"))
    assert invoke("server").exit_code == 0
    assert captured[0][0].state_dir == tmp_path / "var"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "65536"], "65536 is not in the range 0<=x<=65535"),
        (["--port", "-1"], "-1 is not in the range"),
        (["--port", "http"], "'http' is not a valid"),
        (["--bind", "localhost"], "--bind: not an IP address\n    localhost\n    ^\nexpected: an IP address"),
        (["--bind", "1.2.3.4:80"], "--bind: an address without a port is wanted here\n    1.2.3.4:80\n           ^\n"),
        (["--bind", "[::1]:80"], "--bind: an address without a port is wanted here\n    [::1]:80\n         ^\n"),
        (["--bind", "unix:run/x"], "--bind: the path of a socket starts with '/'\n    unix:run/x\n         ^\n"),
        (["--bind", "unix:/x;mode=9"], "--bind: after ';' comes mode=600"),
        (["--bind", "unix:/x", "--bind", "unix:/x;mode=666"], "--bind: one Unix socket is named twice"),
        (["--bind", "unix:/x", "--port", "443"], "--port is for TCP, and --bind names Unix sockets only"),
        (["--proxy-protocol", "10.0.0.1/8"], "--proxy-protocol: bits are set beyond the prefix; meant is 10.0.0.0/8?"),
        (["--trust-proxy", "nginx"], "--trust-proxy: neither an IP address nor a network\n    nginx\n"),
        (["--path", "tunnel"], "--path: a path begins with '/'\n    tunnel\n    ^\nexpected: an absolute path"),
        (["--path", "/a b"], "--path: not a character of a URL's path\n    /a b\n      ^\nexpected: an absolute path"),
        (["--path", "/a?b"], "--path: not a character of a URL's path\n    /a?b\n      ^"),
        (["--cert", "c"], "--cert needs --key"),
        (["--key", "k"], "--key needs --cert"),
        (["--plain", "--cert", "c", "--key", "k"], "--plain speaks no TLS"),
        (["--allow", "db"], "--allow: "),
        (["--allow", "db:0"], "--allow: "),
        (["--allow", ""], "--allow: "),
        (["--log-format", "xml"], "'xml' is not one of 'text', 'json'"),
    ],
)
def test_mistakes(invoke: Invoke, captured: Captured, arguments: list[str], message: str) -> None:
    result = invoke("server", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("wstunnel: error: ")
    assert message in result.stderr
    assert captured == []


def test_an_allow_rule_s_mistake_shows_the_grammar(invoke: Invoke, captured: Captured) -> None:
    from wstunnel.policy import GRAMMAR

    result = invoke("server", "--allow", "db:http")
    assert result.exit_code == 2
    assert "    db:http\n       ^\n" in result.stderr
    assert f"expected: {GRAMMAR}" in result.stderr


def test_an_unusable_state_directory(invoke: Invoke, captured: Captured, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = invoke("server", "--state-dir", str(tmp_path / "file" / "below"))
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "--state-dir" in result.stderr


# --- as a program -----------------------------------------------------------------------------------------------------


def failed(process: subprocess.Popen[str]) -> str:
    """The one line of a program that failed with exit code 1."""
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    assert stdout == ""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("wstunnel: error: ")
    return lines[0]


@pytest.mark.parametrize("flags", [[], ["--plain"]])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_with_0(server: Any, number: signal.Signals, flags: list[str]) -> None:
    process, port = server(*flags)
    with socket.create_connection(("127.0.0.1", port)):  # a stranger who says nothing must not hold it up
        process.send_signal(number)
        process.communicate(timeout=limits.STOP_SECONDS + 5)
    assert process.returncode == 0


def test_a_port_in_use(program: Program, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = ("--bind", "127.0.0.1", "--port", str(port), "--state-dir", str(tmp_path / "s"))
        line = failed(program("-m", "wstunnel", "server", *flags))
    assert str(port) in line
    assert "in use" in line


@pytest.mark.parametrize(("wrong", "named"), [("--cert", "missing.pem"), ("--key", "missing.pem")])
def test_a_missing_certificate_or_key(program: Program, tmp_path: Path, wrong: str, named: str) -> None:
    cert, key = ensure_certificate(tmp_path, names=("localhost",))
    flags = {"--cert": str(cert), "--key": str(key), wrong: str(tmp_path / named)}
    arguments = [word for pair in flags.items() for word in pair]
    state = ("--state-dir", str(tmp_path / "s"), "--bind", "127.0.0.1", "--port", "0")
    line = failed(program("-m", "wstunnel", "server", *arguments, *state))
    assert named in line


def test_a_state_directory_of_somebody_else(program: Program, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = failed(program("-m", "wstunnel", "server", "--state-dir", str(tmp_path / "file")))
    assert "--state-dir" in line


# --- without root's rights --------------------------------------------------------------------------------------------


@pytest.fixture
def nobody(tmp_path: Path) -> Iterator[tuple[list[str], Path]]:
    """A prefix that runs a command as `nobody`, and a directory where that user may write."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("setpriv is not installed")
    user = pwd.getpwnam("nobody")
    # pytest's own directories are for root alone, and so may be the interpreter's.
    directory = Path(tmp_path.anchor) / "tmp" / f"wstunnel-test-{os.getpid()}-{time.monotonic_ns()}"
    directory.mkdir()
    os.chown(directory, user.pw_uid, user.pw_gid)
    prefix = [setpriv, f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--inh-caps=-all"]
    yield [*prefix, "--bounding-set=-all"], directory
    shutil.rmtree(directory)


def run_as(nobody: tuple[list[str], Path], python: str, *flags: str) -> subprocess.CompletedProcess[str]:
    prefix, directory = nobody
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(directory)}
    command = [*prefix, python, "-m", "wstunnel", "server", "--state-dir", str(directory / "s"), *flags]
    return subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, timeout=60)


@pytest.fixture
def python(nobody: tuple[list[str], Path]) -> str:
    """An interpreter that `nobody` may run."""
    import sys

    prefix, _ = nobody
    probe = subprocess.run(
        [*prefix, sys.executable, "-c", "import trio, wstunnel"], cwd=ROOT, capture_output=True, text=True
    )
    if probe.returncode:
        pytest.skip(f"user nobody cannot run this Python: {probe.stderr.strip()[-200:]}")
    return sys.executable


def one_line(finished: subprocess.CompletedProcess[str]) -> str:
    assert finished.returncode == 1, finished.stderr
    [line] = finished.stderr.splitlines()
    assert line.startswith("wstunnel: error: ")
    return line


def test_no_permission_for_443(nobody: tuple[list[str], Path], python: str) -> None:
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 443:
        pytest.skip("everybody may bind port 443 here (net.ipv4.ip_unprivileged_port_start)")
    line = one_line(run_as(nobody, python, "--bind", "127.0.0.1"))
    assert "443" in line
    assert "permi" in line


def test_an_unreadable_key(nobody: tuple[list[str], Path], python: str, tmp_path: Path) -> None:
    _, directory = nobody
    made, secret = ensure_certificate(tmp_path, names=("localhost",))
    cert, key = Path(shutil.copy(made, directory / "cert.pem")), Path(shutil.copy(secret, directory / "key.pem"))
    cert.chmod(0o644)
    key.chmod(0o600)  # root's
    line = one_line(
        run_as(nobody, python, "--bind", "127.0.0.1", "--port", "0", "--cert", str(cert), "--key", str(key))
    )
    assert "key.pem" in line
