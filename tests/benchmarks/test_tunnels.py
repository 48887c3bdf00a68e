"""Tunnels from command lines: what is wrong with one is said, and what was started ends."""

from __future__ import annotations

import shlex
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.benchmarks.tunnels import LOOPBACK, Commands, Program, TunnelError, family, fill, listens, ours, start
from tests.integration.process import wait_until
from tests.integration.sockets import unused_port

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.benchmarks.load import Load

SERVER = "other server {server_port}"
CLIENT = "other client {server_port} {listen_port} {target_port}"
PYTHON = shlex.quote(sys.executable)
SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]


class TestCommands:
    @pytest.mark.parametrize("name", ["other", "other-ws", "other-wss-pool", "other2"])
    def test_names(self, name: str) -> None:
        assert Commands(name, SERVER, CLIENT).name == name

    @pytest.mark.parametrize("name", ["", "direct", "Other", "other ws", "-ws", "other-", "../other"])
    def test_wrong_names(self, name: str) -> None:
        with pytest.raises(ValueError, match="is not a tunnel's name"):
            Commands(name, SERVER, CLIENT)

    @pytest.mark.parametrize(
        ("server", "client", "complaint"),
        [
            ("other", CLIENT, "server's command lacks {server_port}"),
            (SERVER, "other {listen_port} {target_port}", "client's command lacks {server_port}"),
            (SERVER, "other {server_port}", "client's command lacks {listen_port}, {target_port}"),
            (SERVER + " {port}", CLIENT, "{port} in the server's command is no placeholder"),
            (SERVER, CLIENT + " '", "client's command: No closing quotation"),
        ],
    )
    def test_wrong_commands(self, server: str, client: str, complaint: str) -> None:
        with pytest.raises(ValueError) as caught:  # the text is compared
            Commands("other", server, client)
        assert complaint in str(caught.value)

    def test_the_version_is_asked_of_the_servers_program(self) -> None:
        assert Commands("other", SERVER, CLIENT).version_command == ["other", "--version"]
        assert ours("ws").version_command == [sys.executable, "-m", "wstunnel", "--version"]

    def test_ours(self) -> None:
        assert [ours("ws").name, ours("wss").name] == ["ours-ws", "ours-wss"]
        assert "--plain" in ours("ws").server
        assert "--plain" not in ours("wss").server

    def test_what_is_filled_in_is_one_word(self) -> None:
        values: dict[str, str | int] = {"server_host": "a b", "server_port": 5}
        assert fill("'x y' {server_host}:{server_port} --z", values) == ["x y", "a b:5", "--z"]


class TestStart:
    def test_a_tunnel_that_works(
        self, load: Load, target: str, tmp_path: Path, forwarding: Callable[..., Commands]
    ) -> None:
        with ExitStack() as stack:
            tunnel = start(forwarding(), load, tmp_path / "fake", stack, place=LOOPBACK, target=target)
            done = load.run("bulk", "--to", tunnel.address, "--direction", "up", "--bytes", 1 << 20, "--verify")
            assert done["bytes"] == 1 << 20
            assert tunnel.cpu() > 0
            assert min(side.memory() for side in (tunnel.client, tunnel.server)) > 1 << 20
            pids = [tunnel.client.pid, tunnel.server.pid]
            tunnel.check()
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]

    def test_what_prepare_prints_reaches_the_client(
        self, load: Load, target: str, tmp_path: Path, forwarding: Callable[..., Commands]
    ) -> None:
        commands = forwarding(
            prepare="echo {target_port}",
            client=f"{PYTHON} -m tests.benchmarks.forwarder client {{listen_port}} {{prepared}} '' {{target_port}}",
        )
        with ExitStack() as stack:
            start(commands, load, tmp_path / "fake", stack, place=LOOPBACK, target=target)

    @pytest.mark.parametrize(
        "broken",
        [
            {"server": f"{PYTHON} -c 'import sys; sys.exit(\"no such luck\")' {{server_port}}"},
            {"client": f"{PYTHON} -c 'import sys; sys.exit(\"no such luck\")' {CLIENT}"},
        ],
    )
    def test_a_side_that_ends_says_why(
        self, load: Load, target: str, tmp_path: Path, forwarding: Callable[..., Commands], broken: dict[str, str]
    ) -> None:
        commands = forwarding(**broken)
        with (
            ExitStack() as stack,
            pytest.raises(TunnelError, match=f"{min(broken)} ended .* 1: no such luck"),
        ):
            start(commands, load, tmp_path / "fake", stack, place=LOOPBACK, target=target)

    def test_a_program_that_is_not_there(
        self, load: Load, target: str, tmp_path: Path, forwarding: Callable[..., Commands]
    ) -> None:
        commands = forwarding(server="/nowhere/other {server_port}")
        with ExitStack() as stack, pytest.raises(TunnelError, match="No such file"):
            start(commands, load, tmp_path / "fake", stack, place=LOOPBACK, target=target)

    def test_a_tunnel_through_which_nothing_comes(
        self,
        load: Load,
        target: str,
        tmp_path: Path,
        forwarding: Callable[..., Commands],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("tests.benchmarks.tunnels.READY_SECONDS", 1)
        commands = forwarding(fault="deaf")
        with ExitStack() as stack, pytest.raises(TunnelError, match="no stream worked in time"):
            start(commands, load, tmp_path / "fake", stack, place=LOOPBACK, target=target)


class TestPrograms:
    def test_a_program_ends_with_what_it_started(self, tmp_path: Path) -> None:
        inner = shlex.join(SLEEPER)
        with Program("it", ["sh", "-c", f"{inner} & wait"], tmp_path / "log", tmp_path) as program:
            wait_until(lambda: len(family(program.pid)) == 2, "the child")
            pids = family(program.pid)
        # Orphans are reaped by init, in its own time.
        wait_until(lambda: not [pid for pid in pids if _alive(pid)], "the end of both")

    def test_whether_a_port_is_listened_on(self, tmp_path: Path) -> None:
        port = unused_port()
        with Program("it", SLEEPER, tmp_path / "log", tmp_path) as program:
            assert not listens(program.pid, port)
            with socket.create_server(("127.0.0.1", port)):
                assert listens(program.pid, port)


def _alive(pid: int) -> bool:
    """Whether it runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
