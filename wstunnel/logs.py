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
    from collections.abc import Mapping

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


class _Message:
    """What `Log` hands to `logging`: text and fields apart. `str()` is for handlers that are not ours."""

    __slots__ = ("bare", "fields", "text")

    def __init__(self, text: str, fields: Mapping[str, object], bare: bool) -> None:
        self.text = text
        self.fields = fields
        self.bare = bare

    def __str__(self) -> str:
        line = escape(self.text, MESSAGE_CHARACTERS)
        if self.fields and not self.bare:
            line += "".join([f" {name}={_text_value(value)}" for name, value in self.fields.items()])
        return line


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

    __slots__ = ("_logger",)

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

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
        # `logging`'s own entry would walk the stack for the caller's line, which costs more than all the rest.
        self._logger.handle(
            self._logger.makeRecord(
                self._logger.name,
                level,
                "",
                0,
                _Message(message, fields, bare),
                (),
                exc_info,  # type: ignore[arg-type]  # None or what sys.exc_info() returned
            )
        )


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
    own: logging.Handler = _Handler(target)
    own.setFormatter(_JsonFormatter() if format == "json" else _TextFormatter(journal=_is_journal(target, environ)))
    root.addHandler(own)


def _is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """systemd.exec(5), JOURNAL_STREAM: device and inode, to be compared with the descriptor's own."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class _TextFormatter(logging.Formatter):
    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal
        self._clock = _Clock()

    def format(self, record: logging.LogRecord) -> str:
        message = record.msg
        line = str(message) if isinstance(message, _Message) else escape(record.getMessage(), MESSAGE_CHARACTERS)
        if record.levelno >= logging.ERROR:
            line = "error: " + line
        elif record.levelno >= logging.WARNING:
            line = "warning: " + line
        if not self._journal and not (isinstance(message, _Message) and message.bare):
            line = f"{self._clock.seconds(record.created)}Z {line}"
        lines = [line, *("    " + escape(each) for each in _traceback(record))]
        prefix = _PRIORITIES.get(record.levelno, "<6>") if self._journal else ""
        return "\n".join([prefix + each for each in lines])


class _JsonFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__()
        self._clock = _Clock()
        # ensure_ascii: whatever a peer sent, the line is printable ASCII.
        self._encode = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode

    def format(self, record: logging.LogRecord) -> str:
        message = record.msg
        text = message.text if isinstance(message, _Message) else record.getMessage()
        fields = message.fields if isinstance(message, _Message) else {}
        line: dict[str, object] = {
            "time": f"{self._clock.seconds(record.created)}.{int(record.created % 1 * 1000):03d}Z",
            "level": _LEVEL_NAMES.get(record.levelno, record.levelname.lower()),
            "logger": record.name.removeprefix(_ROOT + "."),
            "message": text if len(text) <= MESSAGE_CHARACTERS else text[: MESSAGE_CHARACTERS - 1] + "…",
            "fields": {name: _json_value(value) for name, value in fields.items()},
        }
        traceback = _traceback(record)
        if traceback:
            line["traceback"] = "\n".join(traceback)
        return self._encode(line)


def _traceback(record: logging.LogRecord) -> list[str]:
    if not record.exc_info or record.exc_info[0] is None:
        return []
    text = logging.Formatter().formatException(record.exc_info)
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

    A terminal or a pipe is opened once more, without waiting: the stream's own descriptor is shared with other programs
    (the shell), which would be surprised to find it non-blocking. Where that cannot be done (no /proc, or a terminal of
    another user), the descriptor is asked before each small piece. Only files are written as they are.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._rest = b""
        self._lost = 0
        self._poll = select.poll()
        self._descriptor = -1
        self._writer = -1
        self._is_socket = False
        self._release: weakref.finalize[[int], _Handler] | None = None

    def close(self) -> None:
        """Give up what was opened here; the stream stays its owner's. May be called again."""
        if self._release is not None:
            self._release()
        self._descriptor = self._writer = -1
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(record)
        except Exception:
            # A log line is never worth an error: not a stream that was closed, nor a value whose str() raises.
            self._lost += 1

    def _write(self, record: logging.LogRecord) -> None:
        line = self.format(record) + "\n"
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError, AttributeError):
            # A stream in memory, as tests and embedders have; a closed one raises again and the line is lost.
            self._stream.write(line)
            self._stream.flush()
            return
        if self._lost:
            line = f"{self.format(_lost_record(self._lost))}\n{line}"
        data = self._rest + line.encode(getattr(self._stream, "encoding", None) or "utf-8", "backslashreplace")
        if descriptor != self._descriptor:
            self._adopt(descriptor)
        if not self._poll.poll(0):
            self._lost += 1
            return
        written = self._send(data)
        # What a full non-blocking pipe did not take comes first next time, so that lines stay whole.
        self._rest = data[written:]
        self._lost = 0

    def _adopt(self, descriptor: int) -> None:
        if self._release is not None:
            self._release()
            self._release = None
        status = os.fstat(descriptor)
        self._is_socket = stat.S_ISSOCK(status.st_mode)
        self._writer = descriptor
        if os.get_blocking(descriptor) and (stat.S_ISFIFO(status.st_mode) or os.isatty(descriptor)):
            # A pager that nobody scrolls, or a terminal stopped with ^S, must not stop the tunnels.
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            with contextlib.suppress(OSError):
                self._writer = os.open(f"/proc/self/fd/{descriptor}", flags)
                self._release = weakref.finalize(self, os.close, self._writer)
        self._poll = select.poll()
        self._poll.register(self._writer, select.POLLOUT)
        self._descriptor = descriptor

    def _send(self, data: bytes) -> int:
        """Write what goes without waiting, and tell how much it was; an error only if it was nothing."""
        if self._is_socket:
            import socket

            with socket.socket(fileno=os.dup(self._writer)) as own:
                return own.send(data, socket.MSG_DONTWAIT)
        if stat.S_ISREG(os.fstat(self._writer).st_mode) or not os.get_blocking(self._writer):
            return os.write(self._writer, data)
        # pipe(7): a pipe that is ready has room for PIPE_BUF bytes.
        written = os.write(self._writer, data[: select.PIPE_BUF])
        while written < len(data) and self._poll.poll(0):
            written += os.write(self._writer, data[written : written + select.PIPE_BUF])
        return written


def _lost_record(count: int) -> logging.LogRecord:
    message = _Message("log lines were lost: nobody took them", {"lines": count}, False)
    return logging.LogRecord(f"{_ROOT}.logs", logging.WARNING, "", 0, message, (), None)
