"""`wstunnel profiles`: which login URLs are saved here."""

from __future__ import annotations

import os
import sys

import click

from wstunnel.cli import options, reports
from wstunnel.errors import LocalError

BROKEN = "cannot be used"


@click.command(
    epilog="""\b
    Example:
      $ wstunnel profiles
      * default  wss://***@tunnel.example.org/#sha256=PIN
        work     wss://***@work.example.org:8443/

    The star marks the one that `wstunnel client` takes unless told otherwise.
    """
)
@options.verbosity
def profiles() -> int:
    """List the saved profiles, without their tokens."""
    from wstunnel.profiles import DEFAULT_PROFILE, URL_VARIABLE, list_profiles, load_profile

    names = list_profiles(os.environ)
    if not names:
        reports.tell("There are no profiles yet. `wstunnel login` saves one.")
    width = max(map(len, names), default=0)
    broken = []
    for name in names:
        try:
            shown = str(load_profile(name, os.environ))
        except LocalError as error:
            broken.append(str(error))
            shown = BROKEN
        star = "*" if name == DEFAULT_PROFILE else " "
        reports.say(f"{star} {name:<{width}}  {shown}")
    if os.environ.get(URL_VARIABLE, "").strip() and sys.stderr.isatty():
        reports.tell(f"{URL_VARIABLE} is set: `wstunnel client` takes it before the profile `{DEFAULT_PROFILE}`.")
    for message in broken:
        reports.complain(message)
    return 1 if broken else 0
