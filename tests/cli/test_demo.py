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
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio

from tests.cli.conftest import ROOT, Invoke, Program
from wstunnel.cli import demo, demo_screen
from wstunnel.cli.demo_load import Latency, Load, Progress, Transfer
from wstunnel.cli.demo_relay import Cut
from wstunnel.errors import LocalError

if TYPE_CHECKING:
    from wstunnel.cli.demo_processes import Child

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
HALF = RUN.format(transfer=1 << 26, round_trips=1 << 40)
"""Comes to its cuts, and never to an end."""
CHANGED = """
from wstunnel.cli.demo_processes import Processes
_start = Processes.start
def start(self, name, module, *arguments, environment=None):
{change}
    return _start(self, name, module, *arguments, environment=environment)
Processes.start = start
"""
FORGETFUL = CHANGED.format(change="    arguments += ('--resume-window', '0') * (name == 'client')") + SMALL
"""The client whose links are cut keeps no stream."""
PAST = CHANGED.format(change="    environment = environment and vars(start).setdefault('first', environment)") + SMALL
"""The second client goes where the first one goes: past the relay."""
PROCESSES = {"target", "server", "relay", "direct-client", "client"}
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
    """The pids of a demo's processes, by the names that it calls them by."""
    found: dict[str, int] = {}
    for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        try:
            words = Path(f"/proc/{number}/cmdline").read_text().split("\0")
        except OSError:
            continue
        if "-m" in words:
            module, argument = words[words.index("-m") + 1 :][:2]
            name = argument if module.endswith("_child") else module.rpartition("_")[2]
            found["direct-client" if name == "client" and "direct-client" not in found else name] = int(number)
    return found


def running(process: subprocess.Popen[str]) -> dict[str, int]:
    """The same, once all of them run."""
    found = wait_until(lambda: len(found := children(process.pid)) == len(PROCESSES) and found)
    assert set(found) == PROCESSES
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
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert "\x1b" not in stdout
    assert "\r" not in stdout
    for label in ("up", "down"):
        assert re.findall(rf"^{label} +(\d+) %", stdout, re.M) == ["25", "50", "75", "100"]
        # Between which steps depends on what is on its way: of so short a transfer, perhaps all.
        cut = rf"^{label} +cut \d+ connections at 4 MiB \.\.\. went on after \d+\.\d\d s$"
        assert len(re.findall(cut, stdout, re.M)) == 1
        sent = re.findall(rf"^{label} +sent +SHA-256 ({SHA})$", stdout, re.M)
        arrived = re.findall(rf"^{label} +arrived +SHA-256 ({SHA})  verified$", stdout, re.M)
        assert len(sent) == 1
        assert sent == arrived
    for row in (
        "throughput up",
        "throughput down",
        "pause after a cut",
        "echo of 64 bytes",
        "opens",
        "Between two machines:",
    ):
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
    for label in ("up", "down"):
        assert re.search(rf"{label} +\[#*-*\] +\d+%  cut \d+ links", text)
        assert re.search(rf"^{label} +cut \d+ connections at 4 MiB \.\.\. went on after \d+\.\d\d s", text, re.M)


def test_arguments_hold_no_secret(start: Demo) -> None:
    process = start(LONG)
    pids = running(process)
    for pid in pids.values():
        assert "@" not in Path(f"/proc/{pid}/cmdline").read_text()
    for name in ("client", "direct-client"):
        assert "WSTUNNEL_URL=wss://" in Path(f"/proc/{pids[name]}/environ").read_text()


@pytest.mark.parametrize(
    ("started", "number", "code"),
    [
        (1, signal.SIGINT, 130),
        (2, signal.SIGINT, 130),
        (3, signal.SIGINT, 130),
        (4, signal.SIGINT, 130),
        (5, signal.SIGINT, 130),
        (1, signal.SIGTERM, 143),
        (2, signal.SIGHUP, 129),
    ],
)
def test_a_signal_while_starting(start: Demo, temporary: Path, number: int, code: int, started: int) -> None:
    process = start(LONG)
    pids = wait_until(lambda: len(found := children(process.pid)) >= started and found)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (code, "")
    assert all(gone(pid) for pid in pids.values())
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("plan", "line", "number"),
    [
        (FINE, "up ", signal.SIGINT),
        (FINE, "up ", signal.SIGTERM),
        (HALF, "up    cut ", signal.SIGINT),
        (HALF, "down  cut ", signal.SIGINT),
    ],
)
def test_a_signal_in_the_middle_of_a_transfer(
    start: Demo, temporary: Path, plan: str, line: str, number: signal.Signals
) -> None:
    process = start(plan)
    assert process.stdout is not None
    assert any(said.startswith(line) for said in process.stdout)
    pids = running(process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (demo.EXIT_CODES[number], "")
    assert all(gone(pid) for pid in pids.values())
    assert list(temporary.iterdir()) == []


def test_two_interrupts(start: Demo, temporary: Path) -> None:
    process = start(LONG)
    pids = running(process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) in (130, 143)  # both may be pending at once
    assert all(gone(pid) for pid in pids.values())
    assert list(temporary.iterdir()) == []


def test_children_end_when_the_demo_is_killed(start: Demo) -> None:
    process = start(LONG)
    pids = running(process)
    process.kill()
    for pid in pids.values():
        wait_until(partial(gone, pid))


@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_a_child_that_dies_is_named(start: Demo, temporary: Path, name: str) -> None:
    process = start(LONG)
    pids = running(process)
    os.kill(pids[name], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.startswith(f"wstunnel: error: the demo's {name} was killed by signal 9")
    assert "Traceback" not in stderr
    assert list(temporary.iterdir()) == []


def test_a_stream_that_is_lost_in_the_cut_is_an_error(start: Demo, temporary: Path) -> None:
    process = start(FORGETFUL)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.match(
        r"wstunnel: error: the stream did not outlive the cut of its connection: the demo failed \(up\): ", stderr
    )
    assert "verified" not in stdout
    assert "went on" not in stdout
    assert list(temporary.iterdir()) == []


def test_a_cut_that_hits_nothing_is_an_error(start: Demo, temporary: Path) -> None:
    process = start(PAST)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.startswith("wstunnel: error: the connection of the stream was not cut (up), so this shows nothing")
    assert stdout.count("verified") == 1
    assert list(temporary.iterdir()) == []


def test_a_reader_that_goes_away(start: Demo, temporary: Path) -> None:
    reader, writer = os.pipe()
    process = start(SMALL, stdout=writer)
    os.close(writer)
    os.close(reader)
    _, stderr = process.communicate(timeout=60)
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


class Obedient:
    """A relay that says at once what became of each order."""

    def __init__(self, said: str = "cut 14 1\non 0.210\n") -> None:
        self.stdout = ""
        self.orders: list[str] = []
        self._said = said

    def tell(self, line: str) -> None:
        self.orders.append(line)
        self.stdout += self._said


async def transferred(said: str, transfer: Callable[[int], Transfer]) -> tuple[Transfer, Cut]:
    relay = cast("Child", Obedient(said))
    return await demo._transferred("up", 8 << 20, transfer, relay, Progress())


def arrives(total: int) -> Transfer:
    return Transfer(total, 0.1, b"a" * 32, b"a" * 32)


def breaks(_total: int) -> Transfer:
    raise ConnectionResetError(104, "Connection reset by peer")


async def test_a_difference_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    load = Differing(("", 0), progress)
    relay = Obedient()
    with pytest.raises(LocalError, match="not what was sent"):
        await demo._measure(demo.Plan(), load, load, cast("Child", relay), progress)
    stdout = capsys.readouterr().out
    assert f"down  arrived SHA-256 {(b'b' * 32).hex()}  DIFFERENT" in stdout
    assert stdout.count("verified") == 1
    assert "throughput" not in stdout
    assert relay.orders == [str(128 << 20)] * 2


async def test_the_cut_of_this_transfer_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    relay = Obedient()
    relay.stdout = "listening 1\ncut 3 1\non 9.000\n"  # of an earlier transfer
    done, cut = await demo._transferred("up", 8 << 20, arrives, cast("Child", relay), Progress())
    assert done.verified
    assert cut == Cut(14, 1, 0.21)
    assert "up    cut 14 connections at 4 MiB ... went on after 0.21 s\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("", "was not cut"),
        ("cut 0 0\n", "was not cut"),
        ("cut 13 0\non 0.210\n", "was not cut"),
        ("cut 14 1\n", "no data came over a new connection"),
    ],
)
async def test_a_cut_that_shows_nothing(said: str, error: str) -> None:
    with pytest.raises(LocalError, match=error):
        await transferred(said, arrives)


async def test_a_stream_that_breaks_in_the_cut(autojump_clock: trio.testing.MockClock) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await transferred("cut 14 1\n", breaks)
    (error,) = caught.value.exceptions
    assert str(error).startswith("the stream did not outlive the cut of its connection: the demo failed (up): ")


@pytest.mark.parametrize("said", ["", "cut 14 1\non 0.210\n"])
async def test_a_stream_that_breaks_at_another_time(said: str, autojump_clock: trio.testing.MockClock) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await transferred(said, breaks)
    (error,) = caught.value.exceptions
    assert str(error).startswith("the demo failed (up): ")


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
            display.show(done, None)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["up", f"{percent}", "%", f"{percent}", "MiB"] for percent in (25, 50, 75, 100)
    ]


@pytest.mark.parametrize("done", [45 << 20, 50 << 20, 80 << 20, 100 << 20])
def test_the_cut_stands_after_its_half_in_a_pipe(done: int, capsys: pytest.CaptureFixture[str]) -> None:
    with demo_screen.ProgressDisplay("up", 100 << 20) as display:
        display.show(40 << 20, Cut(14, 1, None))
        display.show(done, Cut(14, 1, 0.21))
        display.show(100 << 20, Cut(14, 1, 0.21))
    lines = [line.removeprefix("up").strip() for line in capsys.readouterr().out.splitlines()]
    cut = "cut 14 connections at 50 MiB ... went on after 0.21 s"
    steps = [" ".join(line.split()[:2]) for line in lines if line != cut]
    assert steps == ["25 %", "50 %", "75 %", "100 %"]
    assert lines.count(cut) == 1
    assert lines.index(cut) == (1 if done < 50 << 20 else 2)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    transfer = Transfer(256 << 20, 0.75, b"a", b"a")
    up, down = (transfer, Cut(14, 1, 0.25)), (transfer, Cut(13, 1, 0.5))
    demo_screen.report_summary(up, down, Latency([0.0001] * 200), 1850.4)
    out = capsys.readouterr().out
    assert "throughput up       537 MB/s  (256 MiB in 0.50 s, through the relay, the pause apart)\n" in out
    assert "throughput down     1,074 MB/s  (256 MiB in 0.25 s, through the relay, the pause apart)\n" in out
    assert "pause after a cut   0.25 s up, 0.50 s down  (14 and 13 reset, nothing lost)\n" in out
    assert "echo of 64 bytes    100 µs p50, 100 µs p99" in out
    assert "opens               1,850 a second" in out
    assert sys.stdout is not None


def test_without_standard_output_there_is_nothing_to_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """`wstunnel demo >&-`: descriptor 1 was closed, and Python has no stdout."""
    monkeypatch.setattr(sys, "stdout", None)
    with demo_screen.ProgressDisplay("up", 100 << 20) as display:
        display.show(100 << 20, None)
