"""Roles and signals. SIGUSR1 and SIGUSR2 stand for the real ones here; those go to a process of its own."""

from __future__ import annotations

import os
import signal
from typing import Any

import click
import pytest
import trio

from tests.cli.conftest import Program
from wstunnel import limits
from wstunnel.cli import running
from wstunnel.cli.reports import UnexpectedError
from wstunnel.errors import LocalError

CODES = {signal.SIGUSR1: 7, signal.SIGUSR2: 8}


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_a_role_that_returns() -> None:
    async def role(*, shutdown: trio.Event, task_status: trio.TaskStatus[Any]) -> None:
        task_status.started("anything")
        assert not shutdown.is_set()

    assert running.run(role, CODES) == 0


def test_a_role_s_own_exit_code() -> None:
    async def role(*, shutdown: trio.Event, task_status: trio.TaskStatus[Any]) -> int:
        return 5

    assert running.run(role, CODES) == 5


@pytest.mark.parametrize(("number", "code"), CODES.items())
def test_a_signal_asks_for_an_orderly_end(number: int, code: int) -> None:
    orderly = False

    async def role(*, shutdown: trio.Event, task_status: trio.TaskStatus[Any]) -> int:
        nonlocal orderly
        send(number)
        await shutdown.wait()
        await trio.sleep(0)  # not cancelled
        orderly = True
        return 5

    assert running.run(role, CODES) == code
    assert orderly


def test_a_hangup_that_is_ignored_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """`nohup wstunnel client …`: the terminal may go."""

    async def role(*, shutdown: trio.Event, task_status: trio.TaskStatus[Any]) -> int:
        send(signal.SIGHUP)
        send(signal.SIGUSR1)
        await shutdown.wait()
        return 0

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert running.run(role, {signal.SIGHUP: 9, **CODES}) == CODES[signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_cancels_and_the_first_decides_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STOP_SECONDS", 3600.0)  # so that nothing but the signal cancels
    cancelled = False

    async def role(*, shutdown: trio.Event, task_status: trio.TaskStatus[Any]) -> None:
        nonlocal cancelled
        send(signal.SIGUSR2)
        await shutdown.wait()
        send(signal.SIGUSR1)
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            cancelled = True
            raise

    assert running.run(role, CODES) == 8
    assert cancelled


def test_a_role_that_does_not_stop_in_time_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STOP_SECONDS", running.LEAVE_SECONDS + 0.01)

    async def role(*, shutdown: trio.Event, task_status: trio.TaskStatus[Any]) -> None:
        send(signal.SIGUSR1)
        await trio.sleep_forever()

    assert running.run(role, CODES) == 7


def test_the_whole_stop_fits_into_its_limit() -> None:
    assert 0 < running.LEAVE_SECONDS < limits.STOP_SECONDS / 2


def test_an_error_of_the_tree_comes_out_of_its_groups() -> None:
    async def role(*, shutdown: trio.Event, task_status: trio.TaskStatus[Any]) -> None:
        async with trio.open_nursery():
            raise LocalError("port 443 is in use")

    with pytest.raises(LocalError, match="port 443 is in use"):
        running.run(role, CODES)


def test_an_error_after_a_signal_is_still_an_error() -> None:
    async def role(*, shutdown: trio.Event, task_status: trio.TaskStatus[Any]) -> None:
        send(signal.SIGUSR1)
        await shutdown.wait()
        raise LocalError("cannot write")

    with pytest.raises(LocalError, match="cannot write"):
        running.run(role, CODES)


def test_a_wish_to_exit_passes() -> None:
    async def role(*, shutdown: trio.Event, task_status: trio.TaskStatus[Any]) -> None:
        async with trio.open_nursery():
            raise click.exceptions.Exit(9)

    with pytest.raises(click.exceptions.Exit) as caught:
        running.run(role, CODES)
    assert caught.value.exit_code == 9


def test_anything_else_is_unexpected() -> None:
    async def role(*, shutdown: trio.Event, task_status: trio.TaskStatus[Any]) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(UnexpectedError) as caught:
        running.run(role, CODES)
    assert isinstance(caught.value.__cause__, BrokenPipeError)


def test_the_handler_of_sigint_is_as_before() -> None:
    async def role(*, shutdown: trio.Event, task_status: trio.TaskStatus[Any]) -> None:
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler

    before = signal.getsignal(signal.SIGINT)
    running.run(role, CODES)
    assert signal.getsignal(signal.SIGINT) is before


STUBBORN = """
import signal, trio
from wstunnel.cli import running
async def role(*, shutdown, task_status):
    with trio.CancelScope(shield=True):
        print("up", flush=True)
        await shutdown.wait()
        print("asked", flush=True)
        await trio.sleep_forever()
running.run(role, {signal.SIGTERM: 0, signal.SIGINT: 130})
"""
BEFORE_TRIO = """
import os, signal, trio
from wstunnel.cli import running
trio.run = lambda *arguments: os.kill(os.getpid(), signal.SIGINT)
running.run(None, {})
"""


def test_a_third_signal_leaves_even_a_stuck_role(program: Program) -> None:
    process = program("-c", STUBBORN)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGTERM)  # the first was taken, as "asked" shows: of one kind, two could merge into one
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM), stderr  # whichever was seen third
    assert stderr == ""


def test_an_interrupt_just_before_trio_starts(program: Program) -> None:
    process = program("-c", BEFORE_TRIO)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130
