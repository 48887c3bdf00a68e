"""What the service manager is told: sd_notify(3), without libsystemd."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

NOTIFY_SECONDS: Final = 1.0
"""How long a busy service manager is waited for. It queues 512 messages, so in practice never."""


def notify(*lines: str, environ: Mapping[str, str]) -> bool:
    """Send one notification to the socket that `NOTIFY_SOCKET` names, if it names one. Never raises.

    Args:
        lines: assignments such as `READY=1`, `STOPPING=1`, `STATUS=3 links`. A line break inside one becomes a space,
            so that text from elsewhere cannot add an assignment.
        environ: the environment of the process.

    Returns:
        Whether the service manager took it. `False` outside systemd, too.
    """
    name = environ.get("NOTIFY_SOCKET", "")
    # sd_notify(3): an absolute path, or "@" for the abstract namespace. Others (vsock) are for virtual machines.
    if not lines or not name.startswith(("/", "@")):
        return False
    address = "\0" + name[1:] if name.startswith("@") else name
    message = "\n".join(" ".join(line.splitlines()) for line in lines)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.settimeout(NOTIFY_SECONDS)
            channel.connect(address)
            channel.sendall(message.encode("utf-8", "replace"))
    except (OSError, ValueError):
        return False
    return True
