"""The demo's processes: what happens when they die, dawdle, or are left alone."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import trio

import wstunnel
from tests.cli.conftest import ROOT
from wstunnel.cli import demo_processes
from wstunnel.cli.demo_processes import Child, Processes
from wstunnel.errors import LocalError

MODULE = """
import os, signal, sys, time
exec(sys.argv[1])
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary directories go, and a module `scripted` that the demo's Python can run."""
    directory = tmp_path / "tmp"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    (tmp_path / "scripted.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return directory


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def said(child: Child) -> str | None:
    """What it wrote, once that is a whole line: unbuffered, Python writes the end of a line by itself."""
    return child.stdout if child.stdout.endswith("\n") else None


async def test_everything_goes_when_it_is_left(temporary: Path) -> None:
    async with Processes() as processes:
        child = processes.start("sleeper", "scripted", "print('up', flush=True); time.sleep(60)")
        assert await processes.ready(child, lambda: said(child)) == "up\n"
        assert [path.name for path in temporary.iterdir()] == [processes.directory.name]
        assert processes.directory.name.startswith("wstunnel-demo-")
        assert processes.directory.stat().st_mode & 0o777 == 0o700
    assert not alive(child.process.pid)
    assert child.process.returncode == -signal.SIGTERM
    assert list(temporary.iterdir()) == []


async def test_everything_goes_when_it_is_cancelled(temporary: Path) -> None:
    with trio.CancelScope() as scope:
        async with Processes() as processes:
            child = processes.start("sleeper", "scripted", "time.sleep(60)")
            scope.cancel()
            await processes.watch()
    assert not alive(child.process.pid)
    assert list(temporary.iterdir()) == []


async def test_a_process_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_processes, "END_SECONDS", 0.05)
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    async with Processes() as processes:
        child = processes.start("sleeper", "scripted", code)
        await processes.ready(child, lambda: child.stdout or None)
    assert child.process.returncode == -signal.SIGKILL


async def test_a_process_that_dies_while_waited_for_is_named_with_its_last_words() -> None:
    code = "print(*range(20), sep='\\n', file=sys.stderr); sys.exit(3)"
    with pytest.raises(LocalError) as caught:
        async with Processes() as processes:
            child = processes.start("server", "scripted", code)
            await processes.ready(child, lambda: None)
    first, *tail = str(caught.value).splitlines()
    assert first == "the demo's server ended with exit code 3; it said last:"
    assert tail == [f"    {number}" for number in range(10, 20)]


async def test_a_process_that_is_killed_is_seen_by_the_watch() -> None:
    with pytest.raises(LocalError, match="the demo's client was killed by signal 9, without a word"):
        async with Processes() as processes:
            child = processes.start("client", "scripted", "time.sleep(60)")
            child.process.kill()
            await processes.watch()


async def test_a_process_is_told_a_line() -> None:
    async with Processes() as processes:
        child = processes.start("relay", "scripted", "print(input(), flush=True); time.sleep(60)")
        child.tell("4711")
        assert await processes.ready(child, lambda: said(child)) == "4711\n"


async def test_a_process_that_has_ended_is_told_nothing() -> None:
    with pytest.raises(LocalError, match="the demo's relay has ended; it said last:\n    going"):
        async with Processes() as processes:
            child = processes.start("relay", "scripted", "print('going', file=sys.stderr)")
            child.process.wait()
            child.tell("4711")


async def test_a_process_that_dawdles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_processes, "READY_SECONDS", 0.05)
    with pytest.raises(LocalError, match="the demo's target was not ready within 0 s"):
        async with Processes() as processes:
            child = processes.start("target", "scripted", "time.sleep(60)")
            await processes.ready(child, lambda: None)


async def test_the_environment_leads_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in demo_processes.FOREIGN:
        monkeypatch.setenv(name, "somebody else's")
    code = "print(sorted(os.environ.items()), os.getpgid(0) == os.getpid(), flush=True); time.sleep(60)"
    async with Processes() as processes:
        child = processes.start("one", "scripted", code, environment={"WSTUNNEL_URL": "its own"})
        text = await processes.ready(child, lambda: child.stdout if "\n" in child.stdout else None)
        assert "somebody else's" not in text
        assert "('WSTUNNEL_URL', 'its own')" in text
        assert f"('XDG_STATE_HOME', '{processes.directory}/state')" in text
        assert f"('XDG_CONFIG_HOME', '{processes.directory}/config')" in text
        assert text.endswith("True\n")


@pytest.mark.parametrize("installed", [False, True])
def test_an_installed_package_is_found_without_help(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setattr("site.getsitepackages", lambda: [str(ROOT)] if installed else [])
    processes = Processes()
    processes.directory = Path("/nowhere")
    assert processes._environment().get("PYTHONPATH") == (None if installed else str(ROOT))
    assert Path(wstunnel.__file__).parent.parent == ROOT


async def test_a_python_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(LocalError, match="cannot start the demo's server: No such file"):
        async with Processes() as processes:
            processes.start("server", "scripted")


async def test_no_place_for_a_temporary_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(LocalError, match="cannot make a temporary directory: No such file"):
        async with Processes():
            pass
