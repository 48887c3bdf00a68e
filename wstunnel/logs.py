"""Log lines for people and for machines, on the standard library's `logging`, below the logger `wstunnel`.

    2026-11-22T19:00:01Z stream opened stream=5f3a9c01 target=tcp:db:5432   text, on a terminal or in a file
    <4>warning: slow resolver name="db 1"                                   text, when systemd's journal reads stderr
    {"time":"2026-11-22T19:00:01.042Z","level":"info","logger":"server","message":"stream opened","fields":{...}}

What peers send is escaped and cut, so that a log line is one line and cannot steer a terminal. Writing never raises,
and does not wait for the reader of a terminal, a pipe or a socket: a line that stderr does not take is dropped, and the
next one that gets through says how many were lost.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import select
import stat
import sys
import time
import weakref
from typing import TYPE_CHECKING, Final, Literal, TextIO

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

VALUE_CHARACTERS: Final = 256
"""Longest value in a line: room for a host name (253), and a peer cannot fill the disk with one header."""
MESSAGE_CHARACTERS: Final = 1024
"""Longest message. Ours are short; those that quote an error of the system or of a library may not be."""
TRACEBACK_LINES: Final = 100
"""Most lines of a traceback, from its end: a recursion error has a thousand."""

_LEVEL_NAMES: Final = {logging.DEBUG: "debug", logging.INFO: "info", logging.WARNING: "warning", logging.ERROR: "error"}
# sd-daemon(3): the syslog priorities that the journal reads from "<N>" at the start of a line.
_PRIORITIES: Final = {logging.DEBUG: "<7>", logging.INFO: "<6>", logging.WARNING: "<4>", logging.ERROR: "<3>"}
_ROOT: Final = "wstunnel"
# Visible ASCII that needs neither `escape` nor quotes in a value.
_PLAIN_BYTES: Final = bytes(code for code in range(0x21, 0x7F) if chr(code) not in '"\\=')


def escape(text: str, limit: int = VALUE_CHARACTERS) -> str:
    r"""Make a peer's text safe for one line of a terminal or a log.

    Everything that Python calls not printable (controls, ESC, newlines, bidirectional and zero-width characters, lone
    surrogates) becomes `\xNN`, `\uNNNN` or `\UNNNNNNNN`, and a backslash `\\`, so that no two texts look the same.

    Args:
        text: anything.
        limit: most characters of the result; a longer one ends in `…`.
    """
    if len(text) <= limit and text.isprintable() and "\\" not in text:
        return text
    parts: list[str] = []
    length = 0
    for character in text:
        part = _escaped(character)
        length += len(part)
        if length > limit:
            # Drop whole characters until the mark fits: half an escape would read as something else.
            while length >= limit and parts:
                length -= len(part)
                part = parts.pop()
            return "".join([*parts, part if length < limit else "", "…"])
        parts.append(part)
    return "".join(parts)


def _escaped(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if character.isprintable():
        return character
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def hash_id(stream_id: str) -> str:
    """Eight hex digits that stand for an id in the log. An id itself lets its reader resume the stream."""
    return hashlib.sha256(stream_id.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def whither(target: str, bind: str) -> dict[str, object]:
    """Fields for a log line: what is dialled, as far as this end knows, and where a reverse forward accepted it."""
    return {name: text for name, text in (("target", target), ("bind", bind)) if text}


class _Message:
    """What `Log` hands to `logging`: text and fields apart. `str()` is the line without time, for any handler."""

    __slots__ = ("bare", "fields", "text")

    def __init__(self, text: str, fields: Mapping[str, object], bare: bool) -> None:
        self.text = text
        self.fields = fields
        self.bare = bare

    def __str__(self) -> str:
        line = escape(self.text, MESSAGE_CHARACTERS)
        return line if self.bare or not self.fields else line + _text_fields(self.fields)


def _text_fields(fields: Mapping[str, object]) -> str:
    """` name=value` for each. Looking once at the whole costs less than looking at each value, and most are plain."""
    text = "".join(
        [
            f" {name}={value if type(value) is str or type(value) is int else _text_value(value)}"
            for name, value in fields.items()
        ]
    )
    if (
        len(text) <= VALUE_CHARACTERS
        and text.isascii()
        # One space and one `=` for each field and nothing else to be escaped: so the values have none of it.
        and text.encode().translate(None, _PLAIN_BYTES) == b" =" * len(fields)
        and "= " not in text
        and text[-1] != "="
    ):
        return text
    return "".join([f" {name}={_text_value(value)}" for name, value in fields.items()])


def _text_value(value: object) -> str:
    kind = type(value)
    if kind is int:
        return str(value)
    if kind is float:
        return str(round(value, 3))  # type: ignore[call-overload]  # `kind` says that it is a float
    text = escape(_plain(value))
    if text == "" or " " in text or '"' in text or "=" in text:
        return '"' + text.replace('"', '\\"') + '"'
    return text


def _json_value(value: object) -> object:
    kind = type(value)
    if kind is int or kind is bool or value is None or (kind is float and math.isfinite(value)):  # type: ignore[arg-type]
        return value
    # No `escape` here: JSON has escapes of its own, and a program that reads the line gets the true value.
    text = _plain(value)
    return text if len(text) <= VALUE_CHARACTERS else text[: VALUE_CHARACTERS - 1] + "…"


def _plain(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray):
        return value.decode("utf-8", "backslashreplace")
    if value is None or isinstance(value, bool):
        return "-" if value is None else str(value).lower()
    return str(value)


class Log:
    """A named source of log lines. Make it with `logger`; keep it at module level.

    Each method takes one fixed message and keyword fields; fields may hold what peers sent. None of them raises.
    """

    __slots__ = ("_logger", "_root")

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._root = logging.getLogger(_ROOT)

    def debug(self, message: str, /, **fields: object) -> None:
        """For whoever looks for a fault: shown with `-v`."""
        if self._logger.isEnabledFor(logging.DEBUG):
            self._emit(logging.DEBUG, message, fields)

    def info(self, message: str, /, **fields: object) -> None:
        """What happened: shown unless `-q`."""
        if self._logger.isEnabledFor(logging.INFO):
            self._emit(logging.INFO, message, fields)

    def warning(self, message: str, /, **fields: object) -> None:
        """Something is not as it should be, and goes on: shown unless `-qq`."""
        if self._logger.isEnabledFor(logging.WARNING):
            self._emit(logging.WARNING, message, fields)

    def error(self, message: str, /, **fields: object) -> None:
        """Something failed: always shown."""
        if self._logger.isEnabledFor(logging.ERROR):
            self._emit(logging.ERROR, message, fields)

    def exception(self, message: str, /, **fields: object) -> None:
        """Like `error`, with the traceback of the exception being handled: for faults of this program only."""
        if self._logger.isEnabledFor(logging.ERROR):
            self._emit(logging.ERROR, message, fields, exc_info=sys.exc_info())

    def announce(self, message: str, /, **fields: object) -> None:
        """A line that people and scripts wait for (`listening 127.0.0.1:5432 -> tcp:db:5432`): shown unless `-q`.

        As text it is the bare message, without time and fields; as JSON it is a line like any other.
        """
        if self._logger.isEnabledFor(logging.INFO):
            self._emit(logging.INFO, message, fields, bare=True)

    def _emit(
        self, level: int, message: str, fields: Mapping[str, object], bare: bool = False, exc_info: object = None
    ) -> None:
        logger = self._logger
        line = _Message(message, fields, bare)
        own = self._only_handler()
        if own is not None:
            own.take(time.time(), level, logger.name, line, exc_info)
            return
        # `logging`'s own entry would walk the stack for the caller's line, which costs more than all the rest.
        logger.handle(
            logger.makeRecord(
                logger.name,
                level,
                "",
                0,
                line,
                (),
                exc_info,  # type: ignore[arg-type]  # None or what sys.exc_info() returned
            )
        )

    def _only_handler(self) -> _Handler | None:
        """The handler of `configure`, if nobody else could see a record: making one costs as much as the whole line."""
        logger, root = self._logger, self._root
        handlers = root.handlers
        if len(handlers) != 1 or type(handlers[0]) is not _Handler or root.propagate:
            return None
        own = handlers[0]
        if own.filters or own.level or logger.filters or logger.handlers:
            return None
        return own if logger.parent is root and logger.propagate else None


def logger(name: str) -> Log:
    """The log of one part of the program, `wstunnel.NAME` to `logging`. Nothing is read or set up by this call."""
    return Log(logging.getLogger(f"{_ROOT}.{name}"))


def configure(
    *,
    verbosity: int,
    format: Literal["text", "json"],  # noqa: A002  # the name of the flag
    stream: TextIO | None = None,
    environ: Mapping[str, str],
) -> None:
    """Send the log to `stream`. Only the command line calls this; called again, it replaces what it did before.

    Args:
        verbosity: number of `-v` less number of `-q`: 1 and more debug, 0 info, -1 warnings, -2 and less errors only.
        format: `text` or `json`, one object a line.
        stream: `None` means `sys.stderr` as it is now; the caller goes on owning it.
        environ: `JOURNAL_STREAM` in it tells whether the journal reads the stream.
    """
    target = sys.stderr if stream is None else stream
    root = logging.getLogger(_ROOT)
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    level = {0: logging.INFO, -1: logging.WARNING}.get(verbosity, logging.DEBUG if verbosity > 0 else logging.ERROR)
    root.setLevel(level)
    root.propagate = False
    # Python sets sys.stderr to None when the program was started with descriptor 2 closed.
    if target is None:
        root.addHandler(logging.NullHandler())
        return
    shape = _JsonFormat() if format == "json" else _TextFormat(journal=_is_journal(target, environ))
    root.addHandler(_Handler(target, shape.line))


def _is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """systemd.exec(5), JOURNAL_STREAM: device and inode, to be compared with the descriptor's own."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class _TextFormat:
    def __init__(self, *, journal: bool) -> None:
        self._journal = journal
        self._clock = _Clock()

    def line(self, created: float, level: int, _source: str, message: _Message, exc_info: object) -> str:
        line = str(message)
        if level >= logging.WARNING:
            line = ("error: " if level >= logging.ERROR else "warning: ") + line
        if not self._journal and not message.bare:
            line = f"{self._clock.seconds(created)}Z {line}"
        prefix = _PRIORITIES.get(level, "<6>") if self._journal else ""
        if exc_info is None:
            return prefix + line
        lines = [line, *("    " + escape(each) for each in _traceback(exc_info))]
        return "\n".join([prefix + each for each in lines])


class _JsonFormat:
    def __init__(self) -> None:
        import msgspec  # the commands without a tunnel have logs, and would load it for nothing

        self._clock = _Clock()
        self._encode = msgspec.json.Encoder().encode
        # ensure_ascii: whatever a peer sent, the line is printable ASCII.
        self._encode_all = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode

    def line(self, created: float, level: int, source: str, message: _Message, exc_info: object) -> str:
        text = message.text
        line: dict[str, object] = {
            "time": f"{self._clock.seconds(created)}.{int(created % 1 * 1000):03d}Z",
            "level": _LEVEL_NAMES.get(level) or logging.getLevelName(level).lower(),
            "logger": source.removeprefix(_ROOT + "."),
            "message": text if len(text) <= MESSAGE_CHARACTERS else text[: MESSAGE_CHARACTERS - 1] + "…",
            "fields": {
                name: value if type(value) is str and len(value) <= VALUE_CHARACTERS else _json_value(value)
                for name, value in message.fields.items()
            },
        }
        traceback = _traceback(exc_info)
        if traceback:
            line["traceback"] = "\n".join(traceback)
        # It takes a fifth of the other's time, but leaves DEL and what is not ASCII as they are, and refuses lone
        # surrogates and subclasses of `str`.
        try:
            data = self._encode(line)
        except (TypeError, ValueError):
            return self._encode_all(line)
        return data.decode("ascii") if data.isascii() and b"\x7f" not in data else self._encode_all(line)


def _traceback(exc_info: object) -> list[str]:
    if not isinstance(exc_info, tuple) or exc_info[0] is None:
        return []
    text = logging.Formatter().formatException(exc_info)
    return text.splitlines()[-TRACEBACK_LINES:]


class _Clock:
    """RFC 3339 in UTC, formatted once a second: that is a third of the cost of a line."""

    __slots__ = ("_second", "_text")

    def __init__(self) -> None:
        self._second = -1
        self._text = ""

    def seconds(self, timestamp: float) -> str:
        second = int(timestamp)
        if second != self._second:
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = second
        return self._text


class _Handler(logging.Handler):
    """Writes whole lines straight to the stream's descriptor, past Python's buffers.

    What a full or broken stderr left in a buffer would be raised at the next write, and again at exit (status 120).
    Each line is written at once: gathering them would save a fifth of a line's cost, and a killed process would lose
    the lines that tell why.

    A terminal or a pipe is opened once more, without waiting: the stream's own descriptor is shared with other programs
    (the shell), which would be surprised to find it non-blocking. Where that cannot be done (no /proc, or a terminal of
    another user), the descriptor is asked before each small piece. Only files are written as they are.
    """

    def __init__(self, stream: TextIO, line: Callable[[float, int, str, _Message, object], str]) -> None:
        super().__init__()
        self._stream = stream
        self._line = line
        self._rest = b""
        self._lost = 0
        self._poll = select.poll()
        self._descriptor = -1
        self._writer = -1
        self._never_waits = False
        self._socket: socket.socket | None = None
        self._release: weakref.finalize[..., _Handler] | None = None

    def close(self) -> None:
        """Give up what was opened here; the stream stays its owner's. May be called again."""
        self._give_up()
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.msg
        try:
            if not isinstance(message, _Message):
                message = _Message(record.getMessage(), {}, False)
            self._write(record.created, record.levelno, record.name, message, record.exc_info)
        except Exception:
            # A log line is never worth an error: not a stream that was closed, nor a value whose str() raises.
            self._lost += 1

    def take(self, created: float, level: int, source: str, message: _Message, exc_info: object) -> None:
        """`handle` for a line that never was a record."""
        with self.lock:  # type: ignore[union-attr]  # made by logging.Handler
            try:
                self._write(created, level, source, message, exc_info)
            except Exception:
                self._lost += 1  # as in `emit`

    def _write(self, created: float, level: int, source: str, message: _Message, exc_info: object) -> None:
        line = self._line(created, level, source, message, exc_info) + "\n"
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError, AttributeError):
            # A stream in memory, as tests and embedders have; a closed one raises again and the line is lost.
            self._stream.write(line)
            self._stream.flush()
            return
        if self._lost:
            line = self._loss(created) + line
        data = self._rest + line.encode(getattr(self._stream, "encoding", None) or "utf-8", "backslashreplace")
        if descriptor != self._descriptor:
            self._adopt(descriptor)
        written = self._send(data)
        # What a full non-blocking pipe did not take comes first next time, so that lines stay whole.
        self._rest = data[written:]
        self._lost = 0

    def _loss(self, created: float) -> str:
        message = _Message("log lines were lost: nobody took them", {"lines": self._lost}, False)
        return self._line(created, logging.WARNING, f"{_ROOT}.logs", message, None) + "\n"

    def _give_up(self) -> None:
        if self._release is not None:
            self._release()
            self._release = None
        self._descriptor = self._writer = -1
        self._socket = None
        self._never_waits = False

    def _adopt(self, descriptor: int) -> None:
        self._give_up()
        mode = os.fstat(descriptor).st_mode
        self._writer = descriptor
        if stat.S_ISSOCK(mode):
            import socket

            # Its own number, which nobody closes meanwhile; MSG_DONTWAIT does not change what is shared.
            self._socket = socket.socket(fileno=os.dup(descriptor))
            self._release = weakref.finalize(self, self._socket.close)
        elif os.get_blocking(descriptor) and (stat.S_ISFIFO(mode) or os.isatty(descriptor)):
            # A pager that nobody scrolls, or a terminal stopped with ^S, must not stop the tunnels.
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            with contextlib.suppress(OSError):
                self._writer = os.open(f"/proc/self/fd/{descriptor}", flags)
                self._release = weakref.finalize(self, os.close, self._writer)
                self._never_waits = True
        elif stat.S_ISREG(mode):
            self._never_waits = True
        self._poll = select.poll()
        self._poll.register(self._writer, select.POLLOUT)
        self._descriptor = descriptor

    def _send(self, data: bytes) -> int:
        """Write what goes without waiting, and tell how much it was; an error only if it was nothing."""
        if self._socket is not None:
            import socket

            return self._socket.send(data, socket.MSG_DONTWAIT)
        if self._never_waits:
            return os.write(self._writer, data)
        if not self._poll.poll(0):
            raise BlockingIOError
        if not os.get_blocking(self._writer):
            return os.write(self._writer, data)
        # pipe(7): a pipe that is ready has room for PIPE_BUF bytes.
        written = os.write(self._writer, data[: select.PIPE_BUF])
        while written < len(data) and self._poll.poll(0):
            written += os.write(self._writer, data[written : written + select.PIPE_BUF])
        return written
