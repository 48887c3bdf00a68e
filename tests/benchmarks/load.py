"""The compiled driver, target and path of `load.c`: built, run, and read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

SOURCE = Path(__file__).with_name("load.c")
BUILD_SECONDS = 120.0
ANSWER_SECONDS = 240.0
"""For a command of the driver: `load` itself gives up after 60 s without a byte."""


class LoadError(Exception):
    """The driver, the target or the path failed; the message is what it said."""


def namespaced(namespace: str | None, command: Sequence[str]) -> list[str]:
    """The command as run inside a network namespace; `ip netns exec` becomes it, with the same process id."""
    return [*(["ip", "netns", "exec", namespace] if namespace else []), *command]


class Load:
    """The program. `directory` gets the binary; whoever made it removes it.

    Raises:
        LoadError: there is no C compiler, or it fails.
    """

    def __init__(self, directory: Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            raise LoadError("no C compiler: cc is not installed")
        self.program = str(directory / "load")
        flags = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror"]
        done = subprocess.run(
            [compiler, *flags, "-o", self.program, str(SOURCE)], capture_output=True, text=True, timeout=BUILD_SECONDS
        )
        if done.returncode:
            raise LoadError(f"cc: {done.stderr}")

    def run(self, *arguments: str | float, namespace: str | None = None) -> dict[str, Any]:
        """Run a command to its end. Returns what it printed; `LoadError` if it failed or took too long."""
        command = namespaced(namespace, [self.program, *map(str, arguments)])
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ANSWER_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise LoadError(f"{arguments[0]}: no answer within {ANSWER_SECONDS:g} s") from error
        if done.returncode:
            raise LoadError(f"{arguments[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def start(self, *arguments: str | float, namespace: str | None = None) -> Running:
        """Start a command that runs until its stdin ends."""
        return Running(namespaced(namespace, [self.program, *map(str, arguments)]))


class Running:
    """A target, a path or a set of streams that are held. Leaving ends it.

    Attributes:
        first: what it said when it was up.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            self.first = self.answer()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        for stream in (process.stdin, process.stdout, process.stderr):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                pass  # it has ended already
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def tell(self, line: str) -> dict[str, Any]:
        """Send it a line; returns its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self.answer()

    def finish(self) -> dict[str, Any]:
        """End its stdin; returns the last that it said."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line. `LoadError` if there is none."""
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            raise LoadError(self._process.stderr.read().strip() or "it ended and said nothing")
        answer: dict[str, Any] = json.loads(line)
        return answer
