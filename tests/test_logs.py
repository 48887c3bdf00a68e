"""logs.py: lines as text and JSON, escaping, levels, the journal, and a stderr that does not take them."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wstunnel import logs

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d"
log = logs.logger("test")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    root = logging.getLogger("wstunnel")
    root.handlers.clear()
    root.setLevel(logging.NOTSET)
    root.propagate = True


def configured(verbosity: int = 0, format: str = "text", environ: dict[str, str] | None = None) -> io.StringIO:  # noqa: A002  # as the flag
    stream = io.StringIO()
    logs.configure(verbosity=verbosity, format=format, stream=stream, environ=environ or {})  # type: ignore[arg-type]
    return stream


VALUES = st.one_of(
    st.text(alphabet='ab:/ ="\\\n\x7fé', max_size=5),
    st.text(max_size=5),
    st.just("x" * 257),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.binary(max_size=3),
    st.sampled_from(["", "\udc80", "\x7f", 1 << 70, -(1 << 70)]),
)


def shown_alone(value: object) -> str:
    if type(value) is float:
        return str(round(value, 3))
    if value is None or isinstance(value, bool):
        return {None: "-", True: "true", False: "false"}[value]
    text = logs.escape(value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value))
    return '"' + text.replace('"', '\\"') + '"' if not text or set(text) & set(' "=') else text


class TestText:
    def test_a_line_has_time_message_and_fields(self) -> None:
        stream = configured()
        log.info("stream opened", stream="5f3a", target="tcp:db:5432", bytes=12, seconds=1.23456, known=True, peer=None)
        assert re.fullmatch(
            TIME + r"Z stream opened stream=5f3a target=tcp:db:5432 bytes=12 seconds=1\.235 known=true peer=-\n",
            stream.getvalue(),
        )

    def test_warnings_and_errors_say_so(self) -> None:
        stream = configured()
        log.warning("slow")
        log.error("broken")
        assert re.fullmatch(f"{TIME}Z warning: slow\n{TIME}Z error: broken\n", stream.getvalue())

    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            ("plain", "plain"),
            ("", '""'),
            ("two words", '"two words"'),
            ('say "hi"', r'"say \"hi\""'),
            ("a=b", '"a=b"'),
            ("back\\slash", r"back\\slash"),
            ("line\nbreak", r"line\x0abreak"),
            ("\x1b[31m", r"\x1b[31m"),
            ("\u202egnp", r"\u202egnp"),
            ("\U000e0001", r"\U000e0001"),
            ("\udc80", r"\udc80"),
            ("é漢", "é漢"),
            (b"\xff\x00", r"\\xff\x00"),
            (ValueError("no\r"), r"no\x0d"),
        ],
    )
    def test_values_are_quoted_and_escaped(self, value: object, shown: str) -> None:
        stream = configured()
        log.info("m", v=value)
        assert stream.getvalue().rstrip("\n").endswith(f"Z m v={shown}")

    def test_a_message_is_escaped_too(self) -> None:
        stream = configured()
        log.info("peer said \n2026 forged")
        assert stream.getvalue().endswith(r"peer said \x0a2026 forged" + "\n")

    def test_announce_is_bare(self) -> None:
        stream = configured()
        log.announce("listening 127.0.0.1:5432 -> tcp:db:5432", port=5432)
        assert stream.getvalue() == "listening 127.0.0.1:5432 -> tcp:db:5432\n"

    def test_exception_shows_the_traceback_indented_and_escaped(self) -> None:
        stream = configured()
        try:
            raise ValueError("bad \x1b")
        except ValueError:
            log.exception("handler failed", link=1)
        first, *rest = stream.getvalue().splitlines()
        assert first.endswith("Z error: handler failed link=1")
        assert rest[0] == "    Traceback (most recent call last):"
        assert rest[-1] == r"    ValueError: bad \x1b"
        assert all(line.startswith("    ") for line in rest)

    def test_a_long_traceback_is_cut(self) -> None:
        stream = configured()

        def deeper(depth: int) -> None:
            if depth % 2:
                deeper(depth - 1)
            elif depth:
                for _ in range(1):
                    deeper(depth - 1)
            else:
                raise ValueError("deep")

        try:
            deeper(400)
        except ValueError:
            log.exception("failed")
        lines = stream.getvalue().splitlines()
        assert len(lines) == 1 + logs.TRACEBACK_LINES
        assert lines[-1] == "    ValueError: deep"

    def test_records_of_plain_logging_are_shown_as_well(self) -> None:
        stream = configured()
        logging.getLogger("wstunnel.other").warning("from %s\n", "elsewhere")
        assert stream.getvalue().endswith(r"Z warning: from elsewhere\x0a" + "\n")

    def test_other_handlers_get_the_whole_text(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "wstunnel"):
            log.info("opened", stream="x y")
        assert caplog.messages == ['opened stream="x y"']

    @given(st.dictionaries(st.from_regex("[a-z_]{1,8}", fullmatch=True), VALUES, max_size=4))
    def test_each_value_looks_as_if_it_were_alone(self, fields: dict[str, object]) -> None:
        """Values that need nothing are looked at together, and none may hide in another."""
        stream = configured()
        log.info("m", **fields)
        alone = [f" {name}={shown_alone(value)}" for name, value in fields.items()]
        assert stream.getvalue().split("Z ", 1)[1] == "m" + "".join(alone) + "\n"


class TestEscape:
    @given(st.text(), st.integers(2, 40))
    def test_is_printable_and_within_the_limit(self, text: str, limit: int) -> None:
        shown = logs.escape(text, limit)
        assert shown.isprintable()
        assert len(shown) <= limit

    @given(st.text(max_size=12), st.text(max_size=12))
    def test_no_two_texts_look_the_same(self, one: str, two: str) -> None:
        assert (logs.escape(one) == logs.escape(two)) == (one == two)

    def test_what_fits_is_whole(self) -> None:
        assert logs.escape("x" * 256) == "x" * 256
        assert logs.escape("\n" * 64) == r"\x0a" * 64

    def test_what_does_not_fit_is_cut_between_escapes(self) -> None:
        assert logs.escape("x" * 257) == "x" * 255 + "…"
        assert logs.escape("\n" * 65) == r"\x0a" * 63 + "…"
        assert logs.escape("a" + "\n" * 2, 8) == r"a\x0a…"
        assert logs.escape("x" * 100_000_000, 4) == "xxx…"
        assert logs.escape("\n", 2) == "…"

    def test_long_values_are_cut_in_both_formats(self) -> None:
        for format_ in ("text", "json"):
            stream = configured(format=format_)
            log.info("m" * 2000, v="v" * 1000)
            assert "v" * 255 + ("…" if format_ == "text" else r"\u2026") in stream.getvalue()
            assert "v" * 256 not in stream.getvalue()
            assert "m" * 1023 in stream.getvalue()
            assert "m" * 1024 not in stream.getvalue()


class TestJson:
    def test_one_object_a_line(self) -> None:
        stream = configured(format="json")
        log.info("opened", stream="a\x1b\u202e\x7f", n=1, f=1.5, b=True, none=None, nan=float("nan"), e=OSError("x"))
        text = stream.getvalue()
        assert text.isascii()
        assert text[:-1].isprintable()
        line = json.loads(text)
        assert re.fullmatch(TIME + r"\.\d{3}Z", line.pop("time"))
        assert line == {
            "level": "info",
            "logger": "test",
            "message": "opened",
            "fields": {
                "stream": "a\x1b\u202e\x7f",
                "n": 1,
                "f": 1.5,
                "b": True,
                "none": None,
                "nan": "nan",
                "e": "x",
            },
        }

    @given(st.dictionaries(st.text(max_size=4), VALUES, max_size=4), st.text(max_size=4))
    def test_any_value_is_printable_ascii_and_comes_back(self, fields: dict[str, object], message: str) -> None:
        stream = configured(format="json")
        log.info(message, **fields)
        text = stream.getvalue()
        assert text.isascii()
        assert text[:-1].isprintable()
        line = json.loads(text)
        assert line["message"] == message
        assert list(line["fields"]) == list(fields)
        for name, value in fields.items():
            expected = value
            if isinstance(value, bytes):
                expected = value.decode("utf-8", "backslashreplace")
            elif isinstance(value, float) and not math.isfinite(value):
                expected = str(value)
            elif value == "x" * 257:
                expected = "x" * 255 + "…"
            assert line["fields"][name] == expected
            assert type(line["fields"][name]) is type(expected)

    @pytest.mark.parametrize(
        ("value", "shown"),
        [("\x7f", r'"\u007f"'), ("\udc80", r'"\udc80"'), ("é", r'"\u00e9"'), (1 << 70, "1180591620717411303424")],
    )
    def test_what_the_quick_encoder_cannot_do(self, value: object, shown: str) -> None:
        stream = configured(format="json")
        log.info("m", v=value)
        assert stream.getvalue().endswith(f'"fields":{{"v":{shown}}}}}\n')

    def test_a_subclass_of_str_is_its_text(self) -> None:
        class Word(str):
            __slots__ = ()

        stream = configured(format="json")
        log.info("m", v=Word("w"))
        assert json.loads(stream.getvalue())["fields"] == {"v": "w"}

    def test_announce_and_levels(self) -> None:
        stream = configured(1, "json")
        log.announce("up", port=1)
        log.debug("d")
        log.warning("w")
        log.error("e")
        logging.getLogger("wstunnel.other").critical("c %d", 1)
        lines = [json.loads(line) for line in stream.getvalue().splitlines()]
        assert [(line["level"], line["message"]) for line in lines] == [
            ("info", "up"),
            ("debug", "d"),
            ("warning", "w"),
            ("error", "e"),
            ("critical", "c 1"),
        ]
        assert lines[0]["fields"] == {"port": 1}

    def test_exception_has_its_traceback(self) -> None:
        stream = configured(format="json")
        try:
            raise ValueError("bad")
        except ValueError:
            log.exception("failed")
        line = json.loads(stream.getvalue())
        assert line["traceback"].startswith("Traceback")
        assert line["traceback"].endswith("\nValueError: bad")

    def test_exception_without_one_is_an_error(self) -> None:
        stream = configured(format="json")
        log.exception("failed")
        assert "traceback" not in json.loads(stream.getvalue())


class TestLevels:
    @pytest.mark.parametrize(
        ("verbosity", "shown"),
        [
            (2, "dinwe"),
            (1, "dinwe"),
            (0, "inwe"),
            (-1, "we"),
            (-2, "e"),
            (-3, "e"),
        ],
    )
    def test_v_and_q(self, verbosity: int, shown: str) -> None:
        stream = configured(verbosity)
        log.debug("d")
        log.info("i")
        log.announce("n")
        log.warning("w")
        log.error("e")
        assert "".join(line[-1] for line in stream.getvalue().splitlines()) == shown

    def test_exception_is_shown_always(self) -> None:
        stream = configured(-9)
        log.exception("x")
        assert stream.getvalue().endswith("error: x\n")

    def test_exception_can_be_off(self) -> None:
        stream = configured()
        logging.getLogger("wstunnel").setLevel(logging.CRITICAL)
        log.exception("x")
        log.error("x")
        assert stream.getvalue() == ""

    def test_configured_again_replaces(self) -> None:
        first = configured()
        second = configured()
        log.info("once")
        assert first.getvalue() == ""
        assert second.getvalue().count("once") == 1


class TestWhoElseListens:
    """A line becomes a record of `logging` only if somebody besides our own handler could see it."""

    @pytest.fixture
    def source(self) -> Iterator[logging.Logger]:
        logger = logging.getLogger("wstunnel.test")
        yield logger
        logger.handlers.clear()
        logger.filters.clear()
        logger.propagate = True
        logger.disabled = False
        logger.setLevel(logging.NOTSET)

    def test_nobody(self) -> None:
        def refused(*_: object, **__: object) -> logging.LogRecord:
            raise AssertionError("a record was made")

        stream = configured()
        factory = logging.getLogRecordFactory()
        logging.setLogRecordFactory(refused)
        try:
            log.info("m", v=1)
        finally:
            logging.setLogRecordFactory(factory)
        assert stream.getvalue().endswith("Z m v=1\n")

    @pytest.mark.parametrize("name", ["wstunnel", "wstunnel.test"])
    def test_another_handler_gets_it_too(self, source: logging.Logger, name: str) -> None:
        stream, other = configured(), io.StringIO()
        logging.getLogger(name).addHandler(logging.StreamHandler(other))
        log.info("m", v="x y")
        assert stream.getvalue().endswith('Z m v="x y"\n')
        assert other.getvalue() == 'm v="x y"\n'

    def test_the_root_of_all_logs_gets_it_if_asked(self, caplog: pytest.LogCaptureFixture) -> None:
        stream = configured()
        log.info("apart")
        logging.getLogger("wstunnel").propagate = True
        log.info("shared")
        assert caplog.messages == ["shared"]
        assert stream.getvalue().count("\n") == 2

    @pytest.mark.parametrize("where", ["source", "handler"])
    def test_filters_are_asked(self, source: logging.Logger, where: str) -> None:
        stream = configured()
        asked = source if where == "source" else logging.getLogger("wstunnel").handlers[0]
        asked.addFilter(lambda record: "secret" not in record.getMessage())
        log.info("secret")
        log.info("known")
        assert re.fullmatch(f"{TIME}Z known\n", stream.getvalue())

    def test_the_handlers_own_level_counts(self) -> None:
        stream = configured()
        logging.getLogger("wstunnel").handlers[0].setLevel(logging.WARNING)
        log.info("i")
        log.warning("w")
        assert re.fullmatch(f"{TIME}Z warning: w\n", stream.getvalue())

    def test_one_source_can_be_turned_off(self, source: logging.Logger) -> None:
        stream = configured()
        source.propagate = False
        source.addHandler(logging.NullHandler())
        log.error("e")
        source.handlers.clear()
        source.propagate = True
        source.disabled = True
        log.error("e")
        assert stream.getvalue() == ""

    def test_a_logger_between_is_not_passed_over(self) -> None:
        stream = configured()
        between = logging.getLogger("wstunnel.between")
        below = logs.logger("between.below")
        other = io.StringIO()
        between.addHandler(logging.StreamHandler(other))
        below.info("m")
        between.handlers.clear()
        assert other.getvalue() == "m\n"
        assert stream.getvalue().endswith("Z m\n")


class TestJournal:
    def stream(self, tmp_path: os.PathLike[str]) -> TextIO:
        return open(os.path.join(tmp_path, "log"), "w+", encoding="utf-8")

    def test_priority_instead_of_time(self, tmp_path: os.PathLike[str]) -> None:
        with self.stream(tmp_path) as stream:
            status = os.fstat(stream.fileno())
            environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
            logs.configure(verbosity=1, format="text", stream=stream, environ=environ)
            log.debug("d")
            log.info("i", a=1)
            log.announce("n")
            log.warning("w")
            try:
                raise ValueError
            except ValueError:
                log.exception("e")
            stream.seek(0)
            lines = stream.read().splitlines()
        assert lines[:5] == ["<7>d", "<6>i a=1", "<6>n", "<4>warning: w", "<3>error: e"]
        assert lines[5] == "<3>    Traceback (most recent call last):"

    def test_another_stream_is_not_the_journal(self, tmp_path: os.PathLike[str]) -> None:
        with self.stream(tmp_path) as stream:
            logs.configure(verbosity=0, format="text", stream=stream, environ={"JOURNAL_STREAM": "1:2"})
            log.info("i")
            stream.seek(0)
            assert re.fullmatch(f"{TIME}Z i\n", stream.read())

    def test_a_stream_in_memory_is_not_the_journal(self) -> None:
        stream = configured(environ={"JOURNAL_STREAM": "1:2"})
        log.info("i")
        assert stream.getvalue().endswith("Z i\n")


class Pipe:
    """A pipe of two pages whose writing end is a text stream, as stderr is."""

    def __init__(self, *, blocking: bool) -> None:
        self.reader, writer = os.pipe()
        self.size = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 8192)
        os.set_blocking(writer, blocking)
        self.stream = open(writer, "w", encoding="utf-8")  # noqa: SIM115  # closed by the fixture
        logs.configure(verbosity=0, format="text", stream=self.stream, environ={})

    def fill(self) -> None:
        os.write(self.stream.fileno(), b"#" * (self.size - 1) + b"\n")

    def read(self) -> str:
        return os.read(self.reader, 1 << 20).decode()

    def close(self) -> None:
        self.stream.close()
        os.close(self.reader)


@pytest.fixture(params=[False, True], ids=["non-blocking", "blocking"])
def pipe(request: pytest.FixtureRequest) -> Iterator[Pipe]:
    made = Pipe(blocking=request.param)
    yield made
    made.close()


class TestStderrThatFails:
    def test_a_full_pipe_loses_lines_and_says_so_later(self, pipe: Pipe) -> None:
        pipe.fill()
        log.info("lost 1")
        log.info("lost 2")
        assert pipe.read() == "#" * 8191 + "\n"
        log.info("seen")
        log.info("again")
        assert re.fullmatch(
            f"{TIME}Z warning: log lines were lost: nobody took them lines=2\n{TIME}Z seen\n{TIME}Z again\n",
            pipe.read(),
        )

    def test_a_line_taken_in_part_is_finished_first(self) -> None:
        pipe = Pipe(blocking=False)
        log.info("long", **{f"field_{number}": "x" * 256 for number in range(40)})
        first = pipe.read()
        assert len(first) == pipe.size
        log.info("next")
        first_line, second_line, end = (first + pipe.read()).split("\n")
        assert first_line.endswith("field_39=" + "x" * 256)
        assert re.fullmatch(f"{TIME}Z next", second_line)
        assert end == ""
        pipe.close()

    def test_full_between_question_and_write(self, pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(_descriptor: int, _data: bytes) -> int:
            raise BlockingIOError

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            log.info("lost")
        log.info("seen")
        assert " lines=1\n" in pipe.read()

    def test_a_broken_pipe_is_ignored(self) -> None:
        pipe = Pipe(blocking=True)
        os.close(pipe.reader)
        for _ in range(3):
            log.error("nobody reads this")
        pipe.stream.close()

    def test_a_closed_stream_is_ignored(self) -> None:
        pipe = Pipe(blocking=True)
        pipe.close()
        log.error("nobody reads this")
        configured().close()
        log.error("nor this")

    def test_a_value_that_cannot_be_shown_is_ignored(self) -> None:
        class Bad:
            def __str__(self) -> str:
                raise RuntimeError

        stream = configured()
        log.error("x", v=Bad())
        assert stream.getvalue() == ""

    def test_no_stderr_at_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stderr", None)
        logs.configure(verbosity=0, format="text", environ={})
        log.error("x")

    def test_stderr_is_the_default(self, capsys: pytest.CaptureFixture[str]) -> None:
        logs.configure(verbosity=0, format="text", environ={})
        log.error("x")
        assert capsys.readouterr().err.endswith("error: x\n")

    def test_a_program_ends_well_when_nobody_reads(self) -> None:
        """Through Python's own buffer the exit status would be 120."""
        program = (
            "from wstunnel import logs; logs.configure(verbosity=0, format='text', environ={});"
            "[logs.logger('x').info('line') for _ in range(1000)]; print('done')"
        )
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=writer, check=False)
        os.close(writer)
        assert (done.returncode, done.stdout) == (0, b"done\n")


FLOOD = (
    "from wstunnel import logs; logs.configure(verbosity=0, format='text', environ={});"
    "[logs.logger('x').info('line', value='x' * 250) for _ in range(2000)]; print('done')"
)


@pytest.mark.parametrize("kind", ["terminal", "pipe", "socket"])
def test_a_reader_that_stops_does_not_stop_the_program(kind: str) -> None:
    if kind == "terminal":
        reader, writer = os.openpty()
    elif kind == "pipe":
        reader, writer = os.pipe()
        os.write(writer, b"#" * 61_441)  # the last page is free but for a byte: ready, with less room than the line
    else:
        reader, writer = (end.detach() for end in socket.socketpair())
    try:
        done = subprocess.run(
            [sys.executable, "-c", FLOOD], stdout=subprocess.PIPE, stderr=writer, check=False, timeout=60
        )
        assert (done.returncode, done.stdout) == (0, b"done\n")
        assert os.get_blocking(writer)  # it is shared with others
        assert os.read(reader, 65536)
    finally:
        os.close(reader)
        os.close(writer)


def test_the_handler_closes_what_it_opened() -> None:
    pipe = Pipe(blocking=True)
    log.info("seen")
    pipe.stream.close()
    configured()
    assert pipe.read().endswith("Z seen\n")
    assert pipe.read() == ""  # the end: no other descriptor of the pipe is open
    os.close(pipe.reader)


def test_a_full_socket_loses_lines_and_says_so_later() -> None:
    reader, writer = socket.socketpair()
    with reader, open(writer.detach(), "w", encoding="utf-8") as stream:
        logs.configure(verbosity=0, format="text", stream=stream, environ={})
        root = logging.getLogger("wstunnel")
        while not root.handlers[0]._lost:  # type: ignore[attr-defined]  # what a socket holds is the system's matter
            log.info("m", v="x" * 250)
        log.info("lost as well")
        drained(reader)
        log.info("seen")
        assert re.search(
            r"Z warning: log lines were lost: nobody took them lines=2\n" + TIME + "Z seen\n$", drained(reader)
        )
        assert os.get_blocking(stream.fileno())
        stream.close()
        configured()
        assert reader.recv(1) == b""  # the end: no other descriptor of the socket is open


def drained(reader: socket.socket) -> str:
    data = b""
    try:
        while True:
            data += reader.recv(1 << 20, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return data.decode()


def test_a_line_costs_no_question_where_writing_cannot_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file, and a pipe that was opened once more: one system call a line."""
    pipe = Pipe(blocking=True)
    with open(tmp_path / "log", "w", encoding="utf-8") as stream:
        for target in (pipe.stream, stream):
            logs.configure(verbosity=0, format="text", stream=target, environ={})
            log.info("first")
            with monkeypatch.context() as patch:
                for name in ("fstat", "get_blocking", "open", "isatty"):
                    patch.setattr(os, name, refuse)
                patch.setattr(logging.getLogger("wstunnel").handlers[0], "_poll", None)
                log.info("second")
    assert pipe.read().endswith("Z second\n")
    assert (tmp_path / "log").read_text().endswith("Z second\n")
    configured()
    pipe.close()


def refuse(*_: object) -> object:
    raise AssertionError("asked")


def test_without_proc_a_long_line_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipe(blocking=True)

    def refused(*_: object) -> int:
        raise FileNotFoundError

    monkeypatch.setattr(os, "open", refused)
    os.write(pipe.stream.fileno(), b"#" * 4096)
    log.info("long", **{f"field_{number}": "x" * 256 for number in range(24)})
    first = pipe.read()
    assert len(first) == pipe.size
    log.info("next")
    lines = (first[4096:] + pipe.read()).splitlines()
    assert lines[0].endswith("field_23=" + "x" * 256)
    assert lines[1].endswith("Z next")
    pipe.close()


def test_without_proc_a_full_pipe_is_not_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipe(blocking=True)

    def refused(*_: object) -> int:
        raise FileNotFoundError

    monkeypatch.setattr(os, "open", refused)
    pipe.fill()
    written: list[bytes] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda _descriptor, data: written.append(data))
        log.info("lost")
    assert written == []  # it would have waited
    pipe.read()
    log.info("seen")
    assert " lines=1\n" in pipe.read()
    pipe.close()


def test_hash_id_hides_the_id() -> None:

    assert logs.hash_id("a") == "ca978112"
    assert logs.hash_id("\udc80") != logs.hash_id("\udc81")
