"""The click group. A command's module is imported when that command is asked for, so `--version` loads none of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import click

from wstunnel import __version__
from wstunnel.cli import reports

COMMANDS = ("server", "invite", "login", "profiles", "client", "connect", "check", "demo")
"""In the order in which a newcomer needs them. Each is the object `NAME` of the module `wstunnel.cli.NAME`."""


class LazyGroup(click.Group):
    """A group that imports a command on first use, and turns every failure into one message and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"wstunnel.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)  # a typo in COMMANDS, found by the first test
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as error:  # click suggests from commands that are loaded, and none is
            raise click.NoSuchCommand(error.command_name, possibilities=COMMANDS, ctx=ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:  # the border of the program: past it there would be a traceback
            raise click.exceptions.Exit(
                reports.failure(error, reports.verbosity(ctx), ctx.meta.get(reports.LOG_FORMAT, "text"))
            ) from None

    def main(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Any:
        """As `click.Command.main`, in the program's own words. Always exits."""
        kwargs["standalone_mode"] = False
        try:
            code = super().main(args, *rest, **kwargs)
        except click.ClickException as error:
            reports.usage(error, sys.argv[1:] if args is None else args)
            code = error.exit_code
        except click.Abort:  # end of input at a prompt
            reports.complain("aborted")
            code = 1
        except OSError as error:  # click's own output, such as --version on a full disk
            code = reports.unwritten(error)
        sys.exit(code or 0)


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
    On the reachable machine:
      wstunnel server --port 443
      wstunnel invite --host tunnel.example.org

    \b
    On the client machine:
      wstunnel login 'wss://...'
      wstunnel client -L 5432:db:5432

    \b
    On this machine alone, to see it work:
      wstunnel demo
    """,
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def wstunnel() -> None:
    """Carry TCP streams through one HTTP-friendly port, as WebSocket connections."""
