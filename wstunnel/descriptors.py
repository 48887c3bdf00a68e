"""How many sockets the process may hold."""

from __future__ import annotations

from wstunnel import limits

UNKNOWN = 8192
"""Where the system does not say: what Windows allows a C program."""


def raise_limit() -> int:
    """Raise the soft limit of open descriptors to the hard one: a tunnelled stream takes two at each end.

    Returns the limit that holds now.
    """
    try:
        import resource
    except ImportError:  # pragma: no cover  # Windows has no such limit
        return UNKNOWN
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):  # pragma: no cover  # macOS refuses RLIM_INFINITY: the soft limit stays
        pass
    return UNKNOWN if hard == resource.RLIM_INFINITY else hard


def most_handshakes(descriptors: int) -> int:
    """How many connections may be there that have not said yet who they are or what they want."""
    return min(limits.HANDSHAKES, descriptors // limits.HANDSHAKES_DIVISOR)
