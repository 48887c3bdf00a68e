"""`python -m wstunnel.cli.demo_child ARGUMENTS…`: a command of the demo, that ends when the demo's process ends.

The demo holds the other end of this process's stdin and never writes. However the demo dies, also by SIGKILL, the
kernel closes that end. PR_SET_PDEATHSIG would be Linux only, and acts when the parent's *thread* ends.
"""

from __future__ import annotations

import os
import sys
import threading

from wstunnel.cli import main

ORPHANED = 1
"""Exit code of a child whose parent has gone."""


def leave_with_parent() -> None:
    """Start a thread that ends this process as soon as stdin is closed."""
    threading.Thread(target=_watch, name="parent", daemon=True).start()


def _watch() -> None:
    while os.read(0, 64):
        pass
    os._exit(ORPHANED)


if __name__ == "__main__":
    leave_with_parent()
    main(sys.argv[1:])
