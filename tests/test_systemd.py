"""systemd.py: notifications over a real socket; and the units, judged by systemd's own tools."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from wstunnel import systemd

UNITS = Path(__file__).parent.parent / "systemd"
NAMES = ("wstunnel-server.service", "wstunnel-client@.service")
PROGRAM = "/usr/local/bin/wstunnel"
MOST_EXPOSURE = 2.0


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@wstunnel-test-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind("\0" + name[1:] if name.startswith("@") else name)
        channel.settimeout(5)
        yield channel, name


class TestNotify:
    def test_lines_go_out_as_one_datagram(self, manager: tuple[socket.socket, str]) -> None:
        channel, name = manager
        assert systemd.notify("READY=1", "STATUS=3 links, é", environ={"NOTIFY_SOCKET": name})
        assert channel.recv(4096) == "READY=1\nSTATUS=3 links, é".encode()

    def test_a_line_break_cannot_add_an_assignment(self, manager: tuple[socket.socket, str]) -> None:
        channel, name = manager
        assert systemd.notify("STATUS=x\nMAINPID=1\r\nSTOPPING=1", environ={"NOTIFY_SOCKET": name})
        assert channel.recv(4096) == b"STATUS=x MAINPID=1 STOPPING=1"

    @pytest.mark.parametrize(
        "environ",
        [
            {},
            {"NOTIFY_SOCKET": ""},
            {"NOTIFY_SOCKET": "relative"},
            {"NOTIFY_SOCKET": "vsock:2:1"},
            {"NOTIFY_SOCKET": "/nowhere/notify"},
            {"NOTIFY_SOCKET": "/" + "x" * 200},
            {"NOTIFY_SOCKET": "/null\0byte"},
        ],
    )
    def test_without_a_manager_nothing_happens(self, environ: dict[str, str]) -> None:
        assert not systemd.notify("READY=1", environ=environ)

    def test_nothing_to_say(self, manager: tuple[socket.socket, str]) -> None:
        assert not systemd.notify(environ={"NOTIFY_SOCKET": manager[1]})

    def test_a_manager_that_does_not_read_is_given_up(
        self, manager: tuple[socket.socket, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(systemd, "NOTIFY_SECONDS", 0.001)
        # The queue of a datagram socket is finite (net.unix.max_dgram_qlen, 10 to 512), so one of these finds it full.
        results = [systemd.notify("STATUS=x", environ={"NOTIFY_SOCKET": manager[1]}) for _ in range(2000)]
        assert results[0]
        assert not results[-1]

    def test_a_lone_surrogate_does_not_raise(self, manager: tuple[socket.socket, str]) -> None:
        channel, name = manager
        assert systemd.notify("STATUS=\udc80", environ={"NOTIFY_SOCKET": name})
        assert channel.recv(4096) == b"STATUS=?"


@pytest.fixture
def analyze() -> str:
    found = shutil.which("systemd-analyze")
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail("systemd-analyze is not installed, and CI must not skip it")
        pytest.skip("systemd-analyze is not installed")
    return found


def installed(unit: str, directory: Path) -> Path:
    """A copy of the unit whose program exists on this machine."""
    text = (UNITS / unit).read_text(encoding="utf-8")
    assert f"ExecStart={PROGRAM} " in text
    copy = directory / unit
    copy.write_text(text.replace(PROGRAM, sys.executable), encoding="utf-8")
    return copy


@pytest.mark.parametrize("unit", NAMES)
class TestUnits:
    def test_verify_has_nothing_to_say(self, analyze: str, unit: str, tmp_path: Path) -> None:
        done = subprocess.run([analyze, "verify", installed(unit, tmp_path)], capture_output=True, text=True)
        # An unknown directive is only a warning: status 0, and a line on stderr.
        assert (done.returncode, done.stdout + done.stderr) == (0, "")

    def test_exposure_is_low(self, analyze: str, unit: str, tmp_path: Path) -> None:
        command = [analyze, "security", "--offline=true", "--no-pager", f"--threshold={MOST_EXPOSURE * 10:.0f}"]
        done = subprocess.run([*command, installed(unit, tmp_path)], capture_output=True, text=True)
        overall = [line for line in done.stdout.splitlines() if "Overall exposure level" in line]
        assert overall, done.stdout + done.stderr
        assert done.returncode == 0, overall[0]
        assert float(overall[0].partition("service: ")[2].split()[0]) <= MOST_EXPOSURE

    def test_starts_and_stops_as_the_program_does(self, unit: str) -> None:
        lines = (UNITS / unit).read_text(encoding="utf-8").splitlines()
        role = "server" if "server" in unit else "client"
        for line in (
            "Type=notify",
            "NotifyAccess=main",
            "DynamicUser=yes",
            f"ExecStart={PROGRAM} {role} $WSTUNNEL_{role.upper()}_ARGS",
            "Restart=on-failure",
            "RestartPreventExitStatus=2 3",
            "TimeoutStopSec=10",
        ):
            assert line in lines


def test_only_the_server_has_a_capability_and_state() -> None:
    server, client = ((UNITS / unit).read_text(encoding="utf-8").splitlines() for unit in NAMES)
    assert "CapabilityBoundingSet=CAP_NET_BIND_SERVICE" in server
    assert "AmbientCapabilities=CAP_NET_BIND_SERVICE" in server
    assert "StateDirectory=wstunnel" in server
    assert "CapabilityBoundingSet=" in client
    assert not [line for line in client if line.startswith("AmbientCapabilities")]
    assert "EnvironmentFile=/etc/wstunnel/client-%i.env" in client
