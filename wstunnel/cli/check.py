"""`wstunnel check`: what is in the way, as text or JSON, and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from wstunnel.cli import options, reach, reports
from wstunnel.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import trio

    from wstunnel.auth import LoginUrl
    from wstunnel.check_report import Report
    from wstunnel.config import ClientConfig
    from wstunnel.upstream import Proxies

IDLE_DEFAULT = "3m"
IDLE_SECONDS_MAX = 3600
"""A server keeps quiet no longer."""


def _parse_idle(text: str) -> int:
    if "://" in text:
        raise UsageError("this is a URL: put it before --idle, or say --idle 3m", grammar=options.DURATION_GRAMMAR)
    seconds = options.parse_duration_of_some(text)
    if seconds > IDLE_SECONDS_MAX:
        raise UsageError("longer than an hour", text=text, position=0, grammar=options.DURATION_GRAMMAR)
    return seconds


@click.command(
    epilog="""\b
    Examples:
      wstunnel check
      wstunnel check --idle 5m                   # and how long may a connection be silent?
      wstunnel check --json | jq '.steps[] | select(.ok | not)'

    Exit code 0 if all is well, 1 if something is not, 3 if the server refused.
    """
)
@click.argument("urls", metavar="[URL]...", nargs=-1)
@click.option(
    "--idle",
    type=options.Parsed("TIME", _parse_idle),
    is_flag=False,
    flag_value=IDLE_DEFAULT,
    help="Find out which idle timeout the way has, up to TIME. Takes as long.  [default: 3m if TIME is left out]",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a server, a line each, on stdout.")
@reach.flags
@options.verbosity
@click.pass_context
def check(
    ctx: click.Context,
    /,
    *,
    urls: tuple[str, ...],
    idle: int | None,
    as_json: bool,
    proxies: Proxies | None,
    **server: Any,
) -> int:
    """Say layer by layer what works on the way to a server.

    Each with the evidence and, where something does not work, what to do about it.
    """
    from wstunnel import logs
    from wstunnel.cli import running

    # Whether the layers work is what is told; of the log only what is wrong with the command line.
    logs.configure(verbosity=reports.verbosity(ctx) - 1, format="text", environ=os.environ)
    config = reach.configure(urls, proxies=proxies, **server)
    role = partial(_run, config, given=proxies, idle=idle, as_json=as_json)
    return running.run(role, {signal.SIGINT: 130, signal.SIGTERM: 143})


def why(url: LoginUrl, config: ClientConfig, given: Proxies | None, environ: Mapping[str, str]) -> str:
    """Why that proxy, or none: what a user would have to change."""
    from wstunnel.upstream import variable_set

    assert config.proxies is not None  # `reach.configure` always decides
    if given is not None:
        return "--proxy none" if given.wss is None else "--proxy"
    name = variable_set(environ, url.scheme)
    if name is None:
        return "neither --proxy nor a variable of the environment names one"
    return name if config.proxies.choose(url) is not None else f"NO_PROXY takes this server out of {name}"


async def _run(
    config: ClientConfig,
    *,
    given: Proxies | None,
    idle: int | None,
    as_json: bool,
    shutdown: trio.Event,
    task_status: trio.TaskStatus[None],
) -> int:
    """Each server in turn, until `shutdown`. Returns the exit code: the gravest."""
    import trio

    from wstunnel.check import Check, secrets_of
    from wstunnel.check_report import Layout, Report
    from wstunnel.tls_relay import Relays

    layout = Layout(getattr(sys.stdout, "encoding", None) or "ascii")
    reports_made: list[Report] = []

    async def leave_early() -> None:
        await shutdown.wait()
        scope.cancel()

    relays = Relays()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leave_early)
            await nursery.start(relays.run)
            task_status.started()
            for url in (config.url, *config.fallbacks):
                report = Report(
                    str(replace(url, token=None, pins=())),
                    secrets_of(config, url),
                    (lambda _step: None) if as_json else lambda step: reports.say(layout.step(step)),
                )
                reports_made.append(report)
                if not as_json:
                    reports.say(layout.heading(report))
                reason = why(url, config, given, os.environ)
                try:
                    await Check(config, url, why=reason, report=report, relays=relays, idle=idle).run()
                finally:
                    reports.say(report.as_json() if as_json else layout.summary(report))
            nursery.cancel_scope.cancel()
    return max((report.exit_code for report in reports_made), default=1)
