"""The server's state directory, and files that only their owner may read.

STATE/
  server.json       what the server last announced: scheme, port, path, pins
  server.lock       which server runs: locked as long as it does
  server.crt        its own certificate, when none was given (tls.py)
  server.key
  users/NAME        hashes of the tokens of one user (auth.py)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from wstunnel.errors import LocalError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import NoReturn, Self

ANNOUNCEMENT_NAME: Final = "server.json"
CLAIM_NAME: Final = "server.lock"
PRIVATE_FILE_BYTES: Final = 256 * 1024
"""Longest file that is read: two thousand tokens of one user. Other files here are far shorter."""
LOCK_SECONDS: Final = 2.0
"""How long another process may hold a directory: it writes one or two small files meanwhile."""

_LOCK_RETRY_SECONDS: Final = 0.02


def home_directory(environ: Mapping[str, str], variable: str, default: str) -> Path:
    """A base directory of the XDG specification.

    Args:
        environ: the environment of the process.
        variable: such as `XDG_STATE_HOME`. "All paths must be absolute. If an implementation encounters a relative path
            […] it should consider the path invalid and ignore it."
        default: the path below the home directory when the variable is not set, such as `.local/state`.

    Raises:
        LocalError: this user has no home directory.
    """
    value = environ.get(variable, "")
    if value.startswith("/"):
        return Path(value)
    home = environ.get("HOME", "")
    if home.startswith("/"):
        return Path(home, default)
    try:
        return Path.home() / default
    except RuntimeError as error:
        raise LocalError(f"this user has no home directory: set HOME or {variable}") from error


def state_directory(flag: Path | None, environ: Mapping[str, str]) -> Path:
    """Find the state directory, and make it (mode 0700) if it is not there.

    The flag, else the first of systemd's `STATE_DIRECTORY` (systemd.exec(5): separated by colons), else
    `$XDG_STATE_HOME/wstunnel`, else `~/.local/state/wstunnel`.

    Raises:
        LocalError: it cannot be made or entered; says why, and names `--state-dir`.
    """
    given = environ.get("STATE_DIRECTORY", "").split(":", 1)[0]
    if flag is not None:
        path = flag
    elif given:
        path = Path(given)
    else:
        try:
            path = home_directory(environ, "XDG_STATE_HOME", ".local/state") / "wstunnel"
        except LocalError as error:
            raise LocalError(f"{error}, or name a directory with --state-dir") from error
    try:
        PrivateDirectory.open(path, create=True).close()
    except PermissionError as error:
        raise LocalError(
            f"the state directory {path} may not be used by this user: run it as the user of the server, or with sudo, "
            "or name another directory with --state-dir"
        ) from error
    except OSError as error:
        raise LocalError(
            f"the state directory {path} cannot be used: {reason(error)}; name another one with --state-dir"
        ) from error
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What a server says about itself to `wstunnel invite`.

    Args:
        scheme: `wss`, or `ws` for `--plain`.
        port: the port that it listens on; `None` when it listens on Unix sockets only.
        path: the path of the tunnel endpoint.
        pins: SHA-256 digests (32 bytes each) of the public keys that clients are to trust; empty when the certificate
            is verified by other means, or there is none.
    """

    scheme: Literal["wss", "ws"]
    port: int | None
    path: str
    pins: tuple[bytes, ...] = ()


def write_announcement(directory: Path, announcement: Announcement) -> None:
    """Replace `server.json` in the state directory, atomically. A reader sees the old one or the new one, whole.

    Raises:
        LocalError: the directory may not be written, or the disk is full.
    """
    document = {
        "scheme": announcement.scheme,
        "port": announcement.port,
        "path": announcement.path,
        "pins": [pin.hex() for pin in announcement.pins],
    }
    path = directory / ANNOUNCEMENT_NAME
    try:
        with PrivateDirectory.open(directory) as private:
            private.write(path.name, (json.dumps(document) + "\n").encode())
    except OSError as error:
        raise_local(error, path, "written")


class Claim:
    """Shows other servers that one runs with this state directory: by a lock, which no crash leaves behind.

    It forbids nothing. Two servers may share their users; but only one of them is named by `wstunnel invite`. Release
    it once the server listens no more: the next one may start while the last connections end.

    Args:
        directory: the state directory.
        port: that the server listens on; None if on Unix sockets only.

    Attributes:
        other: the server that has the directory already, as in `pid 12, port 443`; None if there is none, and the claim
            is this one's.

    Raises:
        LocalError: the directory may not be written.
    """

    def __init__(self, directory: Path, port: int | None) -> None:
        self.other: str | None = None
        self._descriptor = -1
        try:
            with PrivateDirectory.open(directory) as private:
                self._descriptor = private.open_kept(CLAIM_NAME)
            self._take(f"pid {os.getpid()}, " + ("Unix sockets" if port is None else f"port {port}"))
        except OSError as error:
            self.release()
            raise_local(error, directory / CLAIM_NAME, "written")

    def _take(self, words: str) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = read_regular(self._descriptor)[1].decode("utf-8", "replace").strip()
            self.other = said or "which has only begun to start"
            self.release()
        except OSError:
            self.release()  # a file system without locks, where nothing can be known of others
        else:
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"{words}\n".encode())

    def release(self) -> None:
        """May be called again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def read_announcement(directory: Path) -> Announcement | None:
    """What the server that uses this state directory last announced; `None` if none ever did.

    Raises:
        LocalError: the file may not be read by this user, or is not what `write_announcement` writes.
    """
    path = directory / ANNOUNCEMENT_NAME
    try:
        with PrivateDirectory.open(directory) as private:
            data = private.read(path.name)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise_local(error, path, "read")
    if data is None:
        return None
    try:
        return _announcement(json.loads(data))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LocalError(
            f"{path} is malformed ({type(error).__name__}: {error}): delete it and restart the server"
        ) from error


def _announcement(document: dict[str, object]) -> Announcement:
    scheme, port, path, pins = (document[key] for key in ("scheme", "port", "path", "pins"))
    if scheme not in ("wss", "ws"):
        raise ValueError("scheme is neither wss nor ws")
    if port is not None and (type(port) is not int or not 1 <= port <= 65535):
        raise ValueError("port is not a number from 1 to 65535")
    if not isinstance(path, str) or not path.startswith("/") or not path.isascii() or not path.isprintable():
        raise ValueError("path is not a path")
    if not isinstance(pins, list):
        raise TypeError("pins is not a list")
    digests = tuple(bytes.fromhex(pin) for pin in pins)
    if any(len(digest) != 32 for digest in digests):
        raise ValueError("a pin is not 64 hex digits")
    return Announcement(scheme="wss" if scheme == "wss" else "ws", port=port, path=path, pins=digests)


def reason(error: OSError) -> str:
    """The system's words for an error, for a message that already names the file."""
    return (error.strerror or str(error)).lower()


def raise_local(error: OSError, path: Path, verb: str) -> NoReturn:
    """Translate an error of the system about one of the server's files.

    Args:
        error: what the system said.
        path: the file or directory.
        verb: what was to be done with it, such as `read`, `written`.

    Raises:
        LocalError: always; names the path, the reason, and what to do when it is about permission.
    """
    if isinstance(error, PermissionError):
        raise LocalError(
            f"{path} may not be {verb} by this user: run it as the user to whom it belongs, or with sudo"
        ) from error
    if error.errno == errno.ELOOP:
        raise LocalError(f"{path} is a symbolic link, which is not followed here: put the file itself there") from error
    raise LocalError(f"{path} cannot be {verb}: {reason(error)}") from error


class PrivateDirectory:
    """An open directory whose files are only their owner's: directories 0700, files 0600, replaced atomically.

    Work goes through the directory's descriptor and follows no symbolic link below it. `wstunnel invite` runs as root
    in a directory that belongs to the server's user: a link put there by a seized server must not make root read or
    write elsewhere. For the same command, what root makes is given to the owner of the directory, who could not read it
    otherwise.

    All methods raise `OSError`, but for the lock; the caller translates. Close it, or use it in a `with` statement.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: Path, *, create: bool = False, follow: bool = True, lock: bool = False) -> Self:
        """Open a directory.

        Args:
            path: the directory.
            create: make it, and what is missing above it, if it is not there.
            follow: whether its last component may be a symbolic link, as systemd's `/var/lib/NAME` is.
            lock: wait up to `LOCK_SECONDS` until no other process holds it locked, then hold it until `close`.

        Raises:
            LocalError: another process holds the lock.
        """
        made = create and _make(path)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
        private = cls(os.open(path, flags))
        try:
            if made:
                _give(private._descriptor, os.stat(path.parent))
            if lock:
                _lock(private._descriptor, path)
        except BaseException:
            private.close()
            raise
        return private

    def close(self) -> None:
        """Give up the descriptor and the lock. May be called again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, name: str) -> bytes | None:
        """The content of a file; `None` if there is no such file. `OSError` too if it is long or not a regular file."""
        status_and_data = self.read_with_status(name)
        return None if status_and_data is None else status_and_data[1]

    def read_with_status(self, name: str) -> tuple[os.stat_result, bytes] | None:
        """As `read`, with the status that the file had when it was read."""
        try:
            with _opened(name, os.O_RDONLY | os.O_NOFOLLOW, self._descriptor) as descriptor:
                return read_regular(descriptor)
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Replace a file, mode 0600, so that after a crash there is the old content or the new one, whole."""
        temporary = f".{name}.{os.urandom(6).hex()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:
            with _opened(temporary, flags, self._descriptor) as descriptor:
                _give(descriptor, os.fstat(self._descriptor))
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            os.rename(temporary, name, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self._descriptor)
            raise
        with contextlib.suppress(OSError):
            # Some file systems have no fsync for directories; the rename stays atomic without.
            os.fsync(self._descriptor)

    def open_kept(self, name: str) -> int:
        """Open a file to read and write, and make it if it is not there. The descriptor is the caller's."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(name, flags, 0o600, dir_fd=self._descriptor)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            if status.st_uid == os.geteuid():  # a file of somebody else has its owner already
                _give(descriptor, os.fstat(self._descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def names(self) -> list[str]:
        """The names of all entries, sorted, but those that begin with a dot: temporary files do."""
        return sorted(name for name in os.listdir(self._descriptor) if not name.startswith("."))


def read_regular(descriptor: int) -> tuple[os.stat_result, bytes]:
    """The status and whole content of an open regular file. Not closed here.

    Raises:
        OSError: not a regular file (a pipe would block for ever), or longer than `PRIVATE_FILE_BYTES`.
    """
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    data = b""
    while chunk := os.read(descriptor, PRIVATE_FILE_BYTES + 1 - len(data)):
        data += chunk
        if len(data) > PRIVATE_FILE_BYTES:
            raise OSError(errno.EFBIG, f"longer than {PRIVATE_FILE_BYTES} bytes")
    return status, data


@contextlib.contextmanager
def _opened(name: str, flags: int, directory: int) -> Iterator[int]:
    # O_NONBLOCK: opening a named pipe would wait for its other end. It means nothing to regular files.
    descriptor = os.open(name, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600, dir_fd=directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    # Not LOCK_EX alone: whoever may open the directory could hold the server up for ever.
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                raise LocalError(
                    f"the directory {path} is locked by another process: try again, or see who has it with "
                    f"`fuser -v {path}`"
                ) from error
            time.sleep(_LOCK_RETRY_SECONDS)
        else:
            return


def _make(path: Path) -> bool:
    """Make a directory, mode 0700, and its parents; tells whether this call made it."""
    try:
        path.mkdir(mode=0o700)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError:
        return False
    return True


def _give(descriptor: int, parent: os.stat_result) -> None:
    if os.geteuid() == 0 and parent.st_uid != 0:
        os.fchown(descriptor, parent.st_uid, parent.st_gid)
