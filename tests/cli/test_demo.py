"""`wstunnel demo`, whole: small transfers through real processes, and every way of ending it early."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.cli.conftest import ROOT, Invoke, Program
from wstunnel.cli import demo, demo_screen
from wstunnel.cli.demo_load import Latency, Load, Progress, Transfer
from wstunnel.errors import LocalError

RUN = """
import sys
from wstunnel.cli import demo, main
demo.Plan.__init__.__defaults__ = ({transfer}, {round_trips}, 0.05)
main(["demo"])
"""
SMALL = RUN.format(transfer=8 << 20, round_trips=50)
LONG = RUN.format(transfer=1 << 50, round_trips=50)
FINE = LONG.replace("main([", "from wstunnel.cli import demo_screen; demo_screen.STEPS = 1 << 28; main([")
"""A line of progress every 4 MiB."""
SHA = "[0-9a-f]{64}"

Demo = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """The demo's TMPDIR, which must be empty afterwards."""
    directory = tmp_path / "tmp"
    directory.mkdir()
    return directory


@pytest.fixture
def start(program: Program, temporary: Path) -> Demo:
    """Start a demo."""

    def start(code: str, **keywords: object) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
        return program("-c", code, env=environment, cwd=temporary, **keywords)

    return start


def children(pid: int) -> dict[str, int]:
    """The pids of a process's children, by the module that each runs and its first argument."""
    found = {}
    for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        try:
            words = Path(f"/proc/{number}/cmdline").read_text().split("\0")
        except OSError:
            continue
        if "-m" in words:
            found[words[words.index("-m") + 2] or "target"] = int(number)
    return found


def wait_until(condition: Callable[[], Any]) -> Any:
    """Poll a condition that another process brings about; pytest's own time-out bounds it."""
    while not (found := condition()):
        time.sleep(0.01)
    return found


def gone(pid: int) -> bool:
    """Whether a process, perhaps not our child, has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_the_plan_is_what_the_help_says() -> None:
    assert demo.Plan() == demo.Plan(transfer_bytes=256 << 20, round_trips=2000, opens_seconds=1.0)


def test_in_a_pipe(start: Demo, temporary: Path) -> None:
    process = start(SMALL)
    stdout, stderr = process.communicate(timeout=50)
    assert (process.returncode, stderr) == (0, "")
    assert "\x1b" not in stdout
    assert "\r" not in stdout
    for label in ("up", "down"):
        assert re.findall(rf"^{label} +(\d+) %", stdout, re.M) == ["25", "50", "75", "100"]
        sent = re.findall(rf"^{label} +sent +SHA-256 ({SHA})$", stdout, re.M)
        arrived = re.findall(rf"^{label} +arrived +SHA-256 ({SHA})  verified$", stdout, re.M)
        assert len(sent) == 1
        assert sent == arrived
    for row in ("throughput up", "throughput down", "echo of 64 bytes", "opens", "Between two machines:"):
        assert re.search(rf"^{row}", stdout, re.M)
    assert list(temporary.iterdir()) == []


def test_on_a_terminal(start: Demo, temporary: Path) -> None:
    master, slave = pty.openpty()
    process = start(SMALL, stdout=slave)
    os.close(slave)
    shown = b""
    while select.select([master], [], [], 50)[0]:
        try:
            data = os.read(master, 65536)
        except OSError:  # EIO: closed at the other end
            break
        shown += data
    os.close(master)
    assert process.wait(30) == 0
    text = shown.decode()
    assert re.search(r"up +\[#+", text)
    assert "100%" in text
    assert text.count("\x1b[?25l") > 0
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
    assert text.count("verified") == 2


def test_arguments_hold_no_secret(start: Demo) -> None:
    process = start(LONG)
    pids = wait_until(lambda: len(found := children(process.pid)) == 3 and found)
    assert set(pids) == {"target", "server", "client"}
    for pid in pids.values():
        assert "@" not in Path(f"/proc/{pid}/cmdline").read_text()
    assert "WSTUNNEL_URL=wss://" in Path(f"/proc/{pids['client']}/environ").read_text()


@pytest.mark.parametrize(
    ("started", "number", "code"),
    [
        (1, signal.SIGINT, 130),
        (2, signal.SIGINT, 130),
        (3, signal.SIGINT, 130),
        (1, signal.SIGTERM, 143),
        (2, signal.SIGHUP, 129),
    ],
)
def test_a_signal_while_starting(start: Demo, temporary: Path, number: int, code: int, started: int) -> None:
    process = start(LONG)
    pids = wait_until(lambda: len(found := children(process.pid)) >= started and found)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (code, "")
    assert all(gone(pid) for pid in pids.values())
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_of_a_transfer(start: Demo, temporary: Path, number: int, code: int) -> None:
    process = start(FINE)
    assert process.stdout is not None
    assert any(line.startswith("up ") for line in process.stdout)
    pids = children(process.pid)
    assert len(pids) == 3
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (code, "")
    assert all(gone(pid) for pid in pids.values())
    assert list(temporary.iterdir()) == []


def test_two_interrupts(start: Demo, temporary: Path) -> None:
    process = start(LONG)
    pids = wait_until(lambda: len(found := children(process.pid)) == 3 and found)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) in (130, 143)  # both may be pending at once
    assert all(gone(pid) for pid in pids.values())
    assert list(temporary.iterdir()) == []


def test_children_end_when_the_demo_is_killed(start: Demo) -> None:
    process = start(LONG)
    pids = wait_until(lambda: len(found := children(process.pid)) == 3 and found)
    process.kill()
    for pid in pids.values():
        wait_until(partial(gone, pid))


@pytest.mark.parametrize("name", ["server", "client", "target"])
def test_a_child_that_dies_is_named(start: Demo, temporary: Path, name: str) -> None:
    process = start(LONG)
    pids = wait_until(lambda: len(found := children(process.pid)) == 3 and found)
    os.kill(pids[name], signal.SIGKILL)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert stderr.startswith(f"wstunnel: error: the demo's {name} was killed by signal 9")
    assert "Traceback" not in stderr
    assert list(temporary.iterdir()) == []


def test_a_reader_that_goes_away(start: Demo, temporary: Path) -> None:
    reader, writer = os.pipe()
    process = start(SMALL, stdout=writer)
    os.close(writer)
    os.close(reader)
    _, stderr = process.communicate(timeout=50)
    assert (process.returncode, stderr) == (1, "")
    assert list(temporary.iterdir()) == []


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "port"),
    [
        ("", None),
        ("2026-01-01T00:00:00Z connected server=x\n", None),
        ("listening 127.0.0.1:4", None),
        ("listening 127.0.0.1:40123 -> tcp:127.0.0.1:1", None),
        ("a\nlistening 127.0.0.1:40123 -> tcp:127.0.0.1:1\nb", 40123),
    ],
)
def test_announced_port(log: str, port: int | None) -> None:
    assert demo.announced_port(log) == port


class Differing(Load):
    """A load whose download arrives changed."""

    def first_echo(self) -> None:
        pass

    def upload(self, total: int) -> Transfer:
        return Transfer(total, 0.1, b"a" * 32, b"a" * 32)

    def download(self, total: int) -> Transfer:
        return Transfer(total, 0.1, b"a" * 32, b"b" * 32)


async def test_a_difference_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    with pytest.raises(LocalError, match="not what was sent"):
        await demo._measure(demo.Plan(), Differing(("", 0), progress), progress)
    stdout = capsys.readouterr().out
    assert f"down  arrived SHA-256 {(b'b' * 32).hex()}  DIFFERENT" in stdout
    assert stdout.count("verified") == 1
    assert "throughput" not in stdout


async def test_a_stream_that_breaks_is_an_error(autojump_clock: trio.testing.MockClock) -> None:
    def broken() -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(LocalError, match=r"the demo failed \(up\): .*Connection reset by peer"):
        await demo._in_thread("up", broken)


async def test_a_demo_in_this_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    await demo._demonstrate(demo.Plan(transfer_bytes=4 << 20, round_trips=20, opens_seconds=0.01))
    assert capsys.readouterr().out.count("verified") == 2


async def test_a_shutdown_ends_the_role() -> None:
    shutdown = trio.Event()
    shutdown.set()
    await demo._role(demo.Plan(), shutdown=shutdown, task_status=trio.TASK_STATUS_IGNORED)


def test_the_command_runs_the_plan(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[demo.Plan] = []
    monkeypatch.setattr(demo, "run", plans.append)
    assert invoke("demo").exit_code == 0
    assert plans == [demo.Plan()]


def test_progress_in_a_pipe_never_repeats_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    with demo_screen.ProgressDisplay("up", 100 << 20) as display:
        for done in (0, 24 << 20, 60 << 20, 60 << 20, 99 << 20, 100 << 20, 100 << 20):
            display.show(done)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["up", f"{percent}", "%", f"{percent}", "MiB"] for percent in (25, 50, 75, 100)
    ]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    transfer = Transfer(256 << 20, 0.5, b"a", b"a")
    demo_screen.report_summary(transfer, transfer, Latency([0.0001] * 200), 1850.4)
    out = capsys.readouterr().out
    assert "throughput up       537 MB/s  (256 MiB in 0.50 s)" in out
    assert "echo of 64 bytes    100 µs p50, 100 µs p99" in out
    assert "opens               1,850 a second" in out
    assert sys.stdout is not None
