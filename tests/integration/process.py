"""One child process of a test: started with its output in files, waited for by deadline, ended by its own pid."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

START_SECONDS = 60.0
"""For a process to say that it is up: a start takes half a second, on a loaded machine many."""
STOP_SECONDS = 30.0
"""For a process to end after its signal, before the test fails and it is killed."""
POLL_SECONDS = 0.02
TAIL_LINES = 25

DEFECTS = re.compile(r"Traceback \(most recent call last\)|was never awaited|Exception ignored in")
"""What no program of ours may ever write, whatever its peers do."""


def wait_until(condition: Callable[[], bool], what: str, *, within: float = START_SECONDS) -> None:
    """Poll `condition` until it is true.

    Args:
        condition: called every 20 ms; what it raises goes through.
        what: named in the failure.
        within: seconds until the test fails.

    Raises:
        AssertionError: it was not true in time.
    """
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {within:g} s in vain for {what}")
        time.sleep(POLL_SECONDS)


class Process:
    """A child with stdout and stderr in files of `directory`, so that it never blocks on a pipe nobody reads.

    Use as a context manager: leaving stops it with `stop_signal`, and fails if it does not end, ends with a code not
    in `exit_codes` or wrote a traceback. A process that the test already ended is only examined. The log's end is
    printed, which pytest shows of failed tests.

    Args:
        name: unique in `directory`; names the log files.
        argv: program and arguments.
        directory: where the logs go.
        env: the whole environment; None means that of the test.
        stop_signal: what ends it in order.
        exit_codes: those that count as an orderly end after `stop_signal`.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str | Path],
        *,
        directory: Path,
        env: Mapping[str, str] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        exit_codes: Collection[int] = (0,),
    ) -> None:
        self.name = name
        self.argv = [str(part) for part in argv]
        self.stdout_file = directory / f"{name}.out"
        self.stderr_file = directory / f"{name}.err"
        self._directory = directory
        self._env = env
        self._stop_signal = stop_signal
        self._exit_codes = exit_codes
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.stdout_file.open("wb") as stdout, self.stderr_file.open("wb") as stderr:
            self._process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=self._env,
                cwd=self._directory,
                start_new_session=True,  # a Ctrl-C at the terminal is the test's to pass on
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        problem = None
        try:
            if self.running:
                code = self.stop(self._stop_signal)
                if code not in self._exit_codes:
                    problem = f"{self.name} ended with {code} after {self._stop_signal.name}: {self.tail()}"
        except AssertionError as failure:
            problem = str(failure)
        finally:
            self._kill_now()
        found = DEFECTS.search(self.stderr)
        if found:
            problem = f"{self.name} wrote {found[0]!r} to stderr: {self.tail()}"
        print(self.tail())
        if problem and kind is None:  # else the test's own failure is the one to see
            raise AssertionError(problem)

    @property
    def pid(self) -> int:
        return self._started.pid

    @property
    def running(self) -> bool:
        return self._started.poll() is None

    @property
    def stdout(self) -> str:
        """All that it wrote to stdout so far."""
        return self.stdout_file.read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        """All that it wrote to stderr so far."""
        return self.stderr_file.read_text(encoding="utf-8", errors="replace")

    def tail(self) -> str:
        """The last lines of both outputs, headed by the command, for a failure's message."""
        parts = [f"$ {' '.join(self.argv)}"]
        for title, text in (("stdout", self.stdout), ("stderr", self.stderr)):
            if text:
                parts += [f"-- {title} of {self.name}", *text.splitlines()[-TAIL_LINES:]]
        return "\n".join(parts)

    def wait_for_line(self, pattern: str, *, within: float = START_SECONDS, after: int = 0) -> re.Match[str]:
        """Wait until stderr has a line in which `pattern` is found.

        Args:
            pattern: a regular expression, searched in one line at a time.
            within: seconds until the test fails.
            after: index into `stderr` at which to begin (an earlier `len(process.stderr)`).

        Raises:
            AssertionError: it ended first, or the time was over; with the end of its log.
        """
        expression = re.compile(pattern)
        deadline = time.monotonic() + within
        while True:
            running = self.running  # before the log is read, so that its last words are seen
            text = self.stderr[after:]
            if running:
                text = text[: text.rfind("\n") + 1]  # the rest of a line is still to come
            for line in text.splitlines():
                if match := expression.search(line):
                    return match
            if not running:
                raise AssertionError(
                    f"{self.name} ended with {self._started.returncode} without {pattern!r}: {self.tail()}"
                )
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.name} wrote no {pattern!r} in {within:g} s: {self.tail()}")
            time.sleep(POLL_SECONDS)

    def send(self, signum: signal.Signals) -> None:
        """Send a signal to this process alone."""
        self._started.send_signal(signum)

    def wait(self, *, within: float = STOP_SECONDS) -> int:
        """Wait for its end. Returns the exit code; raises AssertionError, and kills it, when the time is over."""
        try:
            return self._started.wait(within)
        except subprocess.TimeoutExpired:
            self._kill_now()
            raise AssertionError(f"{self.name} still ran after {within:g} s: {self.tail()}") from None

    def stop(self, signum: signal.Signals, *, within: float = STOP_SECONDS) -> int:
        """Send `signum` and wait for the end. Returns the exit code."""
        self.send(signum)
        return self.wait(within=within)

    def kill(self) -> None:
        """End it with SIGKILL, as a crash would."""
        self._kill_now()

    def descriptors(self) -> int:
        """How many descriptors it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def resident_bytes(self) -> int:
        """Its resident memory."""
        with open(f"/proc/{self.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @property
    def _started(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, f"{self.name} was not started"
        return self._process

    def _kill_now(self) -> None:
        if self.running:
            self._started.kill()
        self._started.wait()
