"""Who may connect: tokens, login URLs, and the server's users.

    wss://TOKEN@tunnel.example.org/#sha256=PIN          the usual login URL
    wss://TOKEN@[2001:db8::1]:8443/t#sha256=A&sha256=B  IPv6 in brackets, a path, two pins (the key is about to change)
    wss://TOKEN@tunnel.example.org/                     no pin: the certificate is verified by the system's trust store
    ws://TOKEN@127.0.0.1:8080/                          a server with --plain

The port is 443 for `wss`, 80 for `ws`. TOKEN is 43 base64url characters; PIN the SHA-256 of the server's public key, as
base64url without padding or as hex. Neither the token nor what follows `#` ever goes out in a request line.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import os
import re
import stat
import time
from dataclasses import dataclass
from hmac import compare_digest
from typing import TYPE_CHECKING, Final, Literal

from wstunnel import logs
from wstunnel.errors import LocalError, UsageError
from wstunnel.state import PrivateDirectory, raise_local, read_regular, reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

URL_GRAMMAR: Final = "wss://TOKEN@HOST[:PORT][/PATH][#sha256=PIN[&sha256=PIN…]], or ws://… for a server with --plain"
HOST_GRAMMAR: Final = "HOST[:PORT], an IPv6 address in brackets"
USER_GRAMMAR: Final = "1 to 64 of A-Z a-z 0-9 . _ -, not beginning with . or -"
DEFAULT_PORTS: Final = {"wss": 443, "ws": 80}
TOKEN_BYTES: Final = 32
PIN_BYTES: Final = 32
RACY_NANOSECONDS: Final = 2_000_000_000
"""A file changed less than this before it was read is read again: a second change within one tick of the file system's
clock (4 ms on Linux, 2 s on FAT) would leave the same time and size."""

_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{43}")
_USER_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_USER_LINE: Final = re.compile(r"sha256:([0-9A-Fa-f]{64})(?:\s.*)?")
_LABEL: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
# RFC 3986 §3.3 and §3.4: pchar and "/", in a query "?" as well.
_PATH: Final = re.compile(r"/(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*")
_QUERY: Final = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*")
_SECRET_LOOKING: Final = re.compile(r"[\w+=-]{24,}")

_log = logs.logger("auth")


class Token:
    """A secret of 256 random bits as 43 base64url characters. Shows itself to nobody but callers of `reveal`."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        """Use `new` or `parse`."""
        self._text = text

    @classmethod
    def new(cls, random_bytes: Callable[[int], bytes] = os.urandom) -> Token:
        """Make a token out of 32 random bytes."""
        return cls(_base64url(random_bytes(TOKEN_BYTES)))

    @classmethod
    def parse(cls, text: str) -> Token:
        """Take a token as given.

        Raises:
            UsageError: not 43 base64url characters. The message does not show the text.
        """
        if not _TOKEN.fullmatch(text):
            found = f"{len(text)} characters" if len(text) != 43 else "another character among them"
            raise UsageError(f"the token is malformed: it has 43 characters of A-Z a-z 0-9 - _, here are {found}")
        return cls(text)

    def reveal(self) -> str:
        """The secret itself."""
        return self._text

    def digest(self) -> bytes:
        """SHA-256 of the text: what the server keeps. The token is random, so it needs neither salt nor a slow hash."""
        return hashlib.sha256(self._text.encode()).digest()

    def __repr__(self) -> str:
        return "Token(***)"

    def __str__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Token) and compare_digest(self._text, other._text)

    def __hash__(self) -> int:
        return hash(self.digest())


@dataclass(frozen=True, slots=True, repr=False)
class LoginUrl:
    """Where a server is, how to know it, and the secret that it knows its user by.

    Args:
        scheme: `wss`, or `ws` without TLS.
        host: a name in ASCII, or an address without brackets.
        port: 1 to 65535.
        path: begins with `/`; without query.
        token: `None` where the URL has none.
        pins: SHA-256 digests (32 bytes each) of public keys; with any, the pins alone decide whom to trust.
        query: of an endpoint of another program, as it goes out behind `?`; a URL with a token has none. websockify
            takes its own tokens there, so it is not shown.
    """

    scheme: Literal["wss", "ws"]
    host: str
    port: int
    path: str = "/"
    token: Token | None = None
    pins: tuple[bytes, ...] = ()
    query: str = ""

    @property
    def authority(self) -> str:
        """`HOST[:PORT]` as in a Host header: brackets around IPv6, no default port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def reveal(self) -> str:
        """The whole URL, with the token. `parse_login_url` of it gives this value again."""
        return self._text("" if self.token is None else self.token.reveal() + "@", self.query)

    @property
    def resource(self) -> str:
        """What is asked for: the path, and the query if there is one."""
        return f"{self.path}?{self.query}" if self.query else self.path

    def require_token(self) -> Token:
        """The token, for callers that cannot do without.

        Raises:
            UsageError: the URL has none.
        """
        if self.token is None:
            # Masked: of a URL that was cut in the token, the token's beginning passes for the host.
            text, position = _masked(str(self), len(self.scheme) + 3)
            raise UsageError(
                "the login URL has no token: take the whole URL that `wstunnel invite` printed on the server",
                text=text,
                position=position,
                grammar=URL_GRAMMAR,
            )
        return self.token

    def __str__(self) -> str:
        return self._text("" if self.token is None else "***@", "***" if self.query else "")

    def __repr__(self) -> str:
        return f"LoginUrl({str(self)!r})"

    def _text(self, user: str, query: str) -> str:
        pins = "&".join("sha256=" + _base64url(pin) for pin in self.pins)
        behind = (f"?{query}" if query else "") + (f"#{pins}" if pins else "")
        return f"{self.scheme}://{user}{self.authority}{self.path}{behind}"


def parse_login_url(text: str) -> LoginUrl:
    """Read a login URL; space around it is ignored. A missing token is allowed, see `LoginUrl.require_token`.

    Raises:
        UsageError: with the text, in which everything that may be a token is masked, and a caret at the part at fault.
    """
    text = text.strip()
    try:
        return _login_url(text)
    except UsageError as error:
        masked, position = _masked(text, error.position)
        # `from None`: the first error's text shows the token.
        raise UsageError(error.message, text=masked, position=position, grammar=URL_GRAMMAR) from None


def _login_url(text: str) -> LoginUrl:
    scheme, start = _scheme(text)
    hash_at = text.find("#", start)
    before = text if hash_at < 0 else text[:hash_at]
    path_at = min((i for i in (before.find(c, start) for c in "/?") if i >= 0), default=len(before))
    at = before.rfind("@", start, path_at)
    token = None
    if at >= 0:
        try:
            token = Token.parse(text[start:at])
        except UsageError as error:
            raise UsageError(error.message, position=start) from None
    elif "@" in before[path_at:]:
        # It might be a path with an "@". More likely it is a token in plain base64, and half of it would go to the DNS.
        raise UsageError(
            "the token is malformed: it has no / and no ? (an @ in the path is written %40)", position=start
        )
    elif _TOKEN.fullmatch(text[start:path_at].partition(":")[0]):
        raise UsageError("the host is missing: this is a token, and @HOST comes after it", position=start)
    host_at = at + 1 if at >= 0 else start
    try:
        host, port = parse_host_port(text[host_at:path_at])
    except UsageError as error:
        raise UsageError(error.message, position=host_at + error.position) from None
    path, question, query = before[path_at:].partition("?")
    query_at = path_at + len(path) + len(question)
    if question and token is not None:
        raise UsageError("a login URL has no query", position=query_at - 1)
    path = path or "/"
    for name, text_of, grammar, begin in (("path", path, _PATH, path_at), ("query", query, _QUERY, query_at)):
        matched = grammar.match(text_of)
        if matched is None or matched.end() != len(text_of):
            wrong = 0 if matched is None else matched.end()
            which = "this character may not stand in a path"
            if name == "query":  # which is not shown: the caret could not tell
                which = f"character {wrong + 1} of the query may not stand there"
            raise UsageError(f"{which}: write it as %XX", position=begin + wrong)
    pins = () if hash_at < 0 else _pins(text, hash_at + 1)
    if pins and scheme == "ws":
        raise UsageError("a ws:// URL has no certificate to pin: use wss://, or leave the # part out", position=hash_at)
    return LoginUrl(scheme, host, DEFAULT_PORTS[scheme] if port is None else port, path, token, pins, query)


def _scheme(text: str) -> tuple[Literal["wss", "ws"], int]:
    name, separator, _ = text.partition("://")
    match name.lower() if separator else "":
        case "wss":
            return "wss", len("wss://")
        case "ws":
            return "ws", len("ws://")
        case "https":
            raise UsageError("a login URL begins with wss://, not https://: did you mean wss://?")
        case "http":
            raise UsageError("a login URL begins with ws:// or wss://, not http://: did you mean ws://?")
    raise UsageError("a login URL begins with wss:// (or ws:// for a server with --plain)")


def parse_host_port(text: str) -> tuple[str, int | None]:
    """Read `HOST[:PORT]`, as in a login URL and in `invite --host`.

    Returns:
        The host (an address without brackets; a name outside ASCII in its IDNA form) and the port, `None` if none is
        given.

    Raises:
        UsageError: with a caret at the part at fault.
    """
    if text.startswith("["):
        end = text.find("]")
        if end < 0:
            raise _host_error("the bracket of the IPv6 address is not closed", text, len(text))
        host = text[1:end]
        if not _is_address(host, 6):
            raise _host_error("this is not an IPv6 address", text, 1)
        rest = end + 1
        if text[rest : rest + 1] not in ("", ":"):
            raise _host_error("only :PORT may follow the bracket", text, rest)
    else:
        if text.count(":") > 1:
            raise _host_error("an IPv6 address stands in brackets: [2001:db8::1]:443", text, 0)
        rest = text.find(":") if ":" in text else len(text)
        host = _host_name(text, rest)
    if rest == len(text):
        return host, None
    port = text[rest + 1 :]
    if not (port.isascii() and port.isdigit()) or len(port) > 5 or not 1 <= int(port) <= 65535:
        raise _host_error("a port is a number from 1 to 65535", text, rest + 1)
    return host, int(port)


def _host_name(text: str, end: int) -> str:
    host = text[:end]
    if not host:
        raise _host_error("the host is missing", text, 0)
    if not host.isascii():
        try:
            host = host.encode("idna").decode()
        except UnicodeError:
            raise _host_error("this is not a host name", text, 0) from None
    if re.fullmatch(r"[0-9.]+", host):
        if not _is_address(host, 4):
            raise _host_error("this is not an IPv4 address", text, 0)
        return host
    # RFC 1035 §2.3.4: 63 octets a label, 255 a name (253 as text). The dot at the end stands for the root.
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in host.removesuffix(".").split(".")):
        raise _host_error("this is not a host name", text, 0)
    return host


def _host_error(message: str, text: str, position: int) -> UsageError:
    return UsageError(message, text=text, position=position, grammar=HOST_GRAMMAR)


def _is_address(text: str, version: int) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(text).version == version
    except ValueError:
        return False


def _pins(text: str, start: int) -> tuple[bytes, ...]:
    if start == len(text):
        raise UsageError("nothing follows the #: the URL was cut off", position=start)
    pins: list[bytes] = []
    for part in text[start:].split("&"):
        name, _, value = part.partition("=")
        if name != "sha256":
            raise UsageError("only sha256=PIN may follow the #", position=start)
        try:
            pin = parse_pin(value)
        except UsageError as error:
            raise UsageError(error.message, position=start + len("sha256=")) from None
        if pin not in pins:
            pins.append(pin)
        start += len(part) + 1
    return tuple(pins)


def parse_pin(text: str) -> bytes:
    """Read the SHA-256 of a public key: 43 base64url characters or 64 hex digits, as in `--pin`. Returns 32 bytes.

    Raises:
        UsageError: it is neither.
    """
    if re.fullmatch(r"[0-9A-Fa-f]{64}", text):
        return bytes.fromhex(text)
    if _TOKEN.fullmatch(text):
        pin = base64.urlsafe_b64decode(text + "=")
        # The last character has two bits to spare. Where they are set, a character was mistyped.
        if _base64url(pin) == text:
            return pin
    raise UsageError(
        f"the pin is malformed: it has 43 base64url characters or 64 hex digits, here are {len(text)} characters",
        text=text,
        grammar="43 base64url characters or 64 hex digits",
    )


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _query_span(text: str, start: int) -> tuple[int, int]:
    """From where to where the query of a URL reaches, whose host begins at `start`; an empty span if there is none."""
    end = text.find("#", start)
    if end < 0:
        end = len(text)
    question = text.find("?", start, end)
    return (end, end) if question < 0 else (question + 1, end)


def _masked(text: str, position: int) -> tuple[str, int]:
    """Replace what may be a token by `***`, wherever a slip has put it, and move a position along.

    That is all before the last `@`, a query, and any run long enough to be most of a token. A pin may go too; no harm.
    """
    start = text.find("://") + 3 if "://" in text else 0
    at = text.rfind("@")
    spans = [(start, at)] if at >= start else []
    rest = max(at + 1, start)
    query, end = _query_span(text, start)
    if query < end and rest < end:
        query = max(query, rest)  # an @ within it
        spans += [match.span() for match in _SECRET_LOOKING.finditer(text, rest, query)]
        spans.append((query, end))
        rest = end
    spans += [match.span() for match in _SECRET_LOOKING.finditer(text, rest)]
    parts: list[str] = []
    done = shown = 0
    moved: int | None = None
    for begin, end in spans:
        if moved is None and position < end:
            moved = shown + min(position, begin) - done
        parts += [text[done:begin], "***"]
        shown += begin - done + 3
        done = end
    parts.append(text[done:])
    return "".join(parts), shown + position - done if moved is None else moved


_PASSING: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EAGAIN, errno.ENOBUFS, errno.ESTALE, errno.ETIMEDOUT}
)
"""Errors of a moment or of the machine. A token that they hide must not be refused: its client would leave for good."""


@dataclass(frozen=True, slots=True)
class _UserFile:
    """What one user's file said. `signature` is `None` if it must be read again, see `RACY_NANOSECONDS`."""

    signature: tuple[int, ...] | None
    digests: tuple[bytes, ...]
    reported: frozenset[tuple[int, str]]


class Users:
    """The server's users: a file each in `users/` of the state directory, a line for each of its tokens.

        # tokens of alice: delete a line to revoke one
        sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 2026-11-22

    What stands after the hash is for people. Changes count at once: each call looks at the times of the files (about
    2 µs a user) and reads what changed. What cannot be read gives nobody access, is logged once, and stops nothing; but
    what cannot be read only now (the process is out of descriptors, the disk fails) counts as it was last read.

    Args:
        directory: the state directory.
        now_ns: the clock that stamps files, in nanoseconds since 1970.
    """

    def __init__(self, directory: Path, *, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._directory = directory / "users"
        self._prefix = f"{self._directory}/"
        self._now_ns = now_ns
        self._signature: tuple[int, ...] | None = None
        self._files: dict[str, _UserFile] = {}
        self._names: tuple[str, ...] = ()
        self._tokens: tuple[tuple[bytes, str], ...] = ()
        self._reported: set[tuple[str, str]] = set()
        self._unread: tuple[str, OSError] | None = None

    def authenticate(self, token_text: str) -> str | None:
        """The user whose token this is; `None` for everything else, malformed text included.

        The digest is compared with every one there is, in constant time each.

        Raises:
            LocalError: the token is not known, but something could not be read now, where it may stand.
        """
        try:
            digest = Token.parse(token_text).digest()
        except UsageError:
            return None
        self._refresh()
        found: str | None = None
        for known, name in self._tokens:
            if compare_digest(known, digest):
                found = name
        if found is None and self._unread is not None:
            name, error = self._unread
            raise LocalError(
                f"{self._directory / name} cannot be read at the moment, so whether the token is known cannot be said: "
                f"{reason(error)}"
            ) from error
        return found

    def empty(self) -> bool:
        """Whether no user has a token, so that nobody can connect. `False` if that cannot be read at the moment."""
        self._refresh()
        return not self._tokens and self._unread is None

    def add_token(self, name: str, token: Token) -> None:
        """Let `token` in as user `name`, beside the tokens that it has. Only the hash is kept.

        A server that is running sees it at once. Calls at the same time from several processes all count.

        Raises:
            UsageError: not a user's name.
            LocalError: the directory may not be written by this user, or the disk is full.
        """
        check_user_name(name)
        path = self._directory / name
        day = time.strftime("%Y-%m-%d", time.gmtime(self._now_ns() // 1_000_000_000))
        line = f"sha256:{token.digest().hex()} {day}\n"
        try:
            with PrivateDirectory.open(self._directory, create=True, follow=False, lock=True) as private:
                before = private.read(name)
                if before is None:
                    before = f"# tokens of {name}: delete a line to revoke one\n".encode()
                elif before and not before.endswith(b"\n"):
                    before += b"\n"
                private.write(name, before + line.encode())
        except NotADirectoryError as error:
            raise LocalError(f"{self._directory} is not a directory, or is a symbolic link: move it away") from error
        except OSError as error:
            raise_local(error, path, "written")

    def remove_token(self, name: str, token: Token) -> None:
        """Take back what `add_token` did. Nothing happens if the user has no such token.

        Raises:
            UsageError: not a user's name.
            LocalError: the directory may not be written by this user, or the disk is full.
        """
        check_user_name(name)
        entry = f"sha256:{token.digest().hex()}".encode()
        try:
            with PrivateDirectory.open(self._directory, follow=False, lock=True) as private:
                before = private.read(name) or b""
                after = b"".join(line for line in before.splitlines(keepends=True) if not line.startswith(entry))
                if after != before:
                    private.write(name, after)
        except OSError as error:
            raise_local(error, self._directory / name, "written")

    def _refresh(self) -> None:
        now = self._now_ns()
        self._unread = None
        changed = self._refresh_names(now)
        files: dict[str, _UserFile] = {}
        for name in self._names:
            known = self._files.get(name)
            try:
                current = _signature(os.stat(self._prefix + name))
                if known is None or known.signature != current:
                    known = self._read(name, known, now)
                    changed = True
            except FileNotFoundError:
                changed = True
                continue
            except OSError as error:
                if self._passing(name, error):
                    if known is not None:
                        files[name] = known
                    continue
                self._report(name, f"{type(error).__name__}: {reason(error)}")
                changed = True
                continue
            files[name] = known
        self._files = files
        if changed:
            self._tokens = tuple((digest, name) for name, file in files.items() for digest in file.digests)

    def _refresh_names(self, now: int) -> bool:
        try:
            status = os.stat(self._directory)
            current = _signature(status)
            if current == self._signature:
                return False
            entries = sorted(entry for entry in os.listdir(self._directory) if not entry.startswith("."))
        except OSError as error:
            if self._passing("", error):
                return False
            if not isinstance(error, FileNotFoundError):
                self._report("", f"{type(error).__name__}: {reason(error)}")
            self._names, self._signature = (), None
            return True
        self._warn_if_writable(self._directory, status)
        with contextlib.suppress(OSError):  # a state directory that may be entered but not looked at
            self._warn_if_writable(self._directory.parent, os.stat(self._directory.parent))
        for entry in entries:
            if not _USER_NAME.fullmatch(entry):
                self._report(entry, f"not a user's name ({USER_GRAMMAR})")
        self._names = tuple(entry for entry in entries if _USER_NAME.fullmatch(entry))
        self._signature = None if _racy(current, now) else current
        return True

    def _read(self, name: str, known: _UserFile | None, now: int) -> _UserFile:
        # O_NONBLOCK: opening a named pipe would wait for its other end.
        descriptor = os.open(self._prefix + name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status, data = read_regular(descriptor)
        finally:
            os.close(descriptor)
        signature = _signature(status)
        digests: list[bytes] = []
        malformed: set[tuple[int, str]] = set()
        for number, line in _lines(data):
            matched = _USER_LINE.fullmatch(line)
            if matched is None:
                malformed.add((number, line))
            else:
                digests.append(bytes.fromhex(matched[1]))
        for number, _ in sorted(malformed - (frozenset() if known is None else known.reported)):
            # Not the line itself: somebody may have put the token there instead of its hash.
            _log.warning(
                "skipped a malformed line of a user's file",
                file=self._directory / name,
                line=number,
                expected="sha256:HEX DATE",
            )
        return _UserFile(None if _racy(signature, now) else signature, tuple(digests), frozenset(malformed))

    def _passing(self, name: str, error: OSError) -> bool:
        """Whether an error says nothing about the file, so that what was read before still counts."""
        if error.errno not in _PASSING:
            return False
        self._unread = (name, error)
        problem = f"{type(error).__name__}: {reason(error)}"
        if (name, problem) not in self._reported:
            self._reported.add((name, problem))
            _log.error("cannot read the users now: those last read count", file=self._directory / name, reason=problem)
        return True

    def _warn_if_writable(self, path: Path, status: os.stat_result) -> None:
        """Say once if others than this user (and root) can put files into a directory that decides who is let in."""
        problems: list[str] = []
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            problems.append("others may write here, and so let themselves in: chmod go-w")
        # Root runs `wstunnel invite` in the directory of the server's user.
        if os.geteuid() != 0 and status.st_uid not in (0, os.geteuid()):
            problems.append("another user owns this directory, and so decides who is let in: chown it")
        for problem in problems:
            if (str(path), problem) not in self._reported:
                self._reported.add((str(path), problem))
                _log.warning(problem, directory=path)

    def _report(self, name: str, problem: str) -> None:
        if (name, problem) not in self._reported:
            self._reported.add((name, problem))
            _log.warning("skipped in the users' directory", file=self._directory / name, reason=problem)


def check_user_name(name: str) -> None:
    """Raise `UsageError` unless this may be the name of a user (or of a profile): it becomes the name of a file."""
    if not _USER_NAME.fullmatch(name):
        raise UsageError("this cannot be a name", text=name, grammar=USER_GRAMMAR)


def _lines(data: bytes) -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(data.split(b"\n"), 1):
        line = raw.decode("utf-8", "backslashreplace").strip()
        if line and not line.startswith("#"):
            yield number, line


def _signature(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _racy(signature: tuple[int, ...], now: int) -> bool:
    return max(signature[2:]) > now - RACY_NANOSECONDS
