"""How many sockets the process may hold."""

from __future__ import annotations


def raise_limit() -> None:
    """Raise the soft limit of open descriptors to the hard one: a tunnelled stream takes two at each end."""
    try:
        import resource
    except ImportError:  # pragma: no cover  # Windows has no such limit
        return
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):  # pragma: no cover  # macOS refuses RLIM_INFINITY: the soft limit stays
        pass
