"""Unix sockets: bind, with the mode of the file, and what a crash left behind cleared away."""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from wstunnel.errors import LocalError

if sys.platform != "win32":
    import fcntl

LOCK_TRIES = 20
LOCK_PAUSE_SECONDS = 0.01
"""Between tries. A program like this one holds the lock for less. Another's, as systemd-tmpfiles' users hold it, is not
waited for: this blocks the whole process."""


@dataclass(frozen=True, slots=True)
class SocketFile:
    """The file that a bound socket has made."""

    path: str
    device: int
    inode: int

    def remove(self) -> None:
        """Remove it, unless it is another program's by now."""
        try:
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == (self.device, self.inode):
                Path(self.path).unlink()
        except OSError:
            pass  # it is gone, or the directory is

    def permit(self, mode: int) -> None:
        """Change its permissions, unless it is another program's by now.

        Raises:
            LocalError: the system does not let us.
        """
        try:
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == (self.device, self.inode):
                os.chmod(self.path, mode)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise LocalError(f"cannot listen on {self.path} with mode {mode:o}: {error.strerror}") from error

    def is_at(self, path: str) -> bool:
        """Whether `path` leads to it, by symbolic links or not."""
        try:
            found = os.stat(path)
        except (OSError, ValueError):  # ValueError: a NUL inside
            return False
        return (found.st_dev, found.st_ino) == (self.device, self.inode)


def bind(path: str, mode: int) -> tuple[socket.socket, SocketFile]:
    """Bind a non-blocking socket to `path`, and listen: one that does not looks as if its program had been killed.

    A socket file that nobody listens on any more is replaced. Of two programs that try at once one succeeds.

    Args:
        path: absolute.
        mode: permissions of the file, as chmod has them. At no time has it more.

    Returns:
        the listening socket, which the caller closes, and its file, which the caller removes before.

    Raises:
        LocalError: somebody listens there, it is no socket, or the directory does not let us.
    """
    if not hasattr(socket, "AF_UNIX"):
        raise LocalError(f"cannot listen on {path}: this system has no Unix sockets")
    with _alone(path):
        _clear(path)
        return _listen(path, mode)


@contextmanager
def _alone(path: str) -> Iterator[None]:
    """Keep other programs like this one from clearing and binding in the same directory, as far as it can be locked."""
    if sys.platform == "win32":  # pragma: no cover  # no Unix sockets there
        yield
        return
    try:
        directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # missing, of which bind says more; or not readable, and without a lock it is as before
        yield
        return
    try:
        for _ in range(LOCK_TRIES):
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(LOCK_PAUSE_SECONDS)
            except OSError:
                break  # a file system without locks
        yield
    finally:
        os.close(directory)


def _listen(path: str, mode: int) -> tuple[socket.socket, SocketFile]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        before = os.umask(0o777 & ~mode)
        try:
            sock.bind(path)
        finally:
            os.umask(before)
        os.chmod(path, mode)  # a default ACL of the directory may have taken some away
        made = os.lstat(path)
        sock.listen()
    except OSError as error:
        sock.close()
        raise _cannot(path, error) from error
    return sock, SocketFile(path, made.st_dev, made.st_ino)


def _clear(path: str) -> None:
    """Remove a socket that nobody listens on.

    Raises:
        LocalError: somebody does, or it is something else.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _cannot(path, error) from error
    if not stat.S_ISSOCK(found.st_mode):
        raise LocalError(
            f"cannot listen on {path}: there is a file that is no socket; remove it or choose another path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        answer = probe.connect_ex(path)
    if answer in (0, errno.EAGAIN, errno.EINPROGRESS):
        raise LocalError(f"cannot listen on {path}: another program listens there (ss -lxp tells which)")
    if answer != errno.ECONNREFUSED:
        raise _cannot(path, OSError(answer, os.strerror(answer)))
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise _cannot(path, error) from error


def _cannot(path: str, error: OSError) -> LocalError:
    if error.errno == errno.EADDRINUSE:
        return LocalError(f"cannot listen on {path}: another program was faster")
    if error.errno == errno.ENOENT:
        return LocalError(f"cannot listen on {path}: its directory does not exist")
    return LocalError(f"cannot listen on {path}: {error.strerror}")
