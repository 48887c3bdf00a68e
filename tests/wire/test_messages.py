"""wire/messages.py: every type, every field's range, and that nothing a peer writes gets past as another error."""

from __future__ import annotations

import json
import sys
import typing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wstunnel.errors import ProtocolError
from wstunnel.limits import MESSAGE_BRACKETS, MESSAGE_BYTES, NUMBER_MAX, RESUME_WINDOW_SECONDS
from wstunnel.wire import messages
from wstunnel.wire.frames import encode_close
from wstunnel.wire.messages import (
    Ack,
    AnyMessage,
    Bye,
    Detached,
    Drain,
    Eof,
    Gone,
    Hello,
    Listen,
    Listening,
    Message,
    Need,
    Open,
    Opened,
    Ping,
    Pong,
    Reset,
    Resume,
    Resumed,
    Unlisten,
    Welcome,
    decode,
    encode,
)

ID = "0123456789abcdefghijkA"
OTHER_ID = "ABCDEFGHIJKLMNOPQRST-_"
TYPES: tuple[type[Message], ...] = typing.get_args(AnyMessage)
reproducible = settings(derandomize=True, deadline=None)

# Each type once with the fewest keys and once with all, and the text that stands on the wire.
WIRE: list[tuple[Message, str]] = [
    (
        Hello(version=1, session=ID, role="control"),
        '{"type":"hello","version":1,"session":"0123456789abcdefghijkA","role":"control"}',
    ),
    (
        Hello(version=1, session=ID, role="reverse", agent="a", resume_window=0, features=["resume"]),
        '{"type":"hello","version":1,"session":"0123456789abcdefghijkA","role":"reverse","agent":"a",'
        '"resume_window":0,"features":["resume"]}',
    ),
    (
        Welcome(version=1, server=ID, boot=OTHER_ID),
        '{"type":"welcome","version":1,"server":"0123456789abcdefghijkA","boot":"ABCDEFGHIJKLMNOPQRST-_"}',
    ),
    (
        Welcome(
            version=1,
            server=ID,
            boot=ID,
            known=True,
            resume_window=300,
            keepalive=25,
            idle_links=4,
            features=["drain"],
        ),
        '{"type":"welcome","version":1,"server":"0123456789abcdefghijkA","boot":"0123456789abcdefghijkA","known":true,'
        '"resume_window":300,"keepalive":25,"idle_links":4,"features":["drain"]}',
    ),
    (Open(n=1, stream=ID), '{"type":"open","n":1,"stream":"0123456789abcdefghijkA"}'),
    (
        Open(n=1, stream=ID, target="tcp:db:5432", forward="f", peer="[::1]:9"),
        '{"type":"open","n":1,"stream":"0123456789abcdefghijkA","target":"tcp:db:5432","forward":"f","peer":"[::1]:9"}',
    ),
    (Opened(n=1), '{"type":"opened","n":1}'),
    (Opened(n=1, address="10.0.0.5:5432"), '{"type":"opened","n":1,"address":"10.0.0.5:5432"}'),
    (Ack(n=1, consumed=0, limit=262144), '{"type":"ack","n":1,"consumed":0,"limit":262144}'),
    (Eof(n=1, total=0), '{"type":"eof","n":1,"total":0}'),
    (Reset(n=1, code="refused"), '{"type":"reset","n":1,"code":"refused"}'),
    (Reset(n=1, code="reset", message="é"), '{"type":"reset","n":1,"code":"reset","message":"é"}'),
    (
        Resume(n=2, stream=ID, epoch=1, received=3, consumed=2, limit=9),
        '{"type":"resume","n":2,"stream":"0123456789abcdefghijkA","epoch":1,"received":3,"consumed":2,"limit":9}',
    ),
    (
        Resume(n=2, stream=ID, epoch=1, received=3, consumed=2, limit=9, opened=""),
        '{"type":"resume","n":2,"stream":"0123456789abcdefghijkA","epoch":1,"received":3,"consumed":2,"limit":9,"opened":""}',
    ),
    (
        Resumed(n=2, received=3, consumed=2, limit=9, opened="10.0.0.5:1"),
        '{"type":"resumed","n":2,"received":3,"consumed":2,"limit":9,"opened":"10.0.0.5:1"}',
    ),
    (Gone(outcome="unknown", n=2), '{"type":"gone","outcome":"unknown","n":2}'),
    (
        Gone(outcome="reset", stream=ID, code="timeout", message="m"),
        '{"type":"gone","outcome":"reset","stream":"0123456789abcdefghijkA","code":"timeout","message":"m"}',
    ),
    (Detached(streams=[ID]), '{"type":"detached","streams":["0123456789abcdefghijkA"]}'),
    (Listen(forward="f", bind="127.0.0.1:80"), '{"type":"listen","forward":"f","bind":"127.0.0.1:80"}'),
    (Listening(forward="f", address="127.0.0.1:80"), '{"type":"listening","forward":"f","address":"127.0.0.1:80"}'),
    (
        Listening(forward="f", code="forbidden", message="m"),
        '{"type":"listening","forward":"f","code":"forbidden","message":"m"}',
    ),
    (Unlisten(forward="f"), '{"type":"unlisten","forward":"f"}'),
    (Need(links=3), '{"type":"need","links":3}'),
    (Ping(number=NUMBER_MAX), '{"type":"ping","number":9007199254740991}'),
    (Pong(number=0), '{"type":"pong","number":0}'),
    (Drain(deadline=30), '{"type":"drain","deadline":30}'),
    (Bye(), '{"type":"bye"}'),
]


def document(kind: type[Message]) -> dict[str, object]:
    """A right message of that type, with every key of its fullest example."""
    full = max((text for message, text in WIRE if type(message) is kind), key=len)
    return dict(json.loads(full))


def refused(data: bytes) -> str:
    """Assert that `data` is a protocol error with code 1002 that fits a close frame; returns its text."""
    with pytest.raises(ProtocolError) as raised:
        decode(data)
    assert raised.value.code == 1002
    text = str(raised.value)
    assert text and "\n" not in text
    encode_close(raised.value.code, text)
    return text


class TestOnTheWire:
    @pytest.mark.parametrize(("message", "text"), WIRE, ids=lambda value: type(value).__name__)
    def test_exact_text_and_back(self, message: Message, text: str) -> None:
        assert encode(message).decode() == text
        assert decode(text.encode()) == message
        assert decode(bytearray(text.encode())) == message

    def test_every_type_of_the_protocol_has_an_example(self) -> None:
        assert {type(message) for message, _ in WIRE} == set(TYPES)
        assert {json.loads(text)["type"] for _, text in WIRE} == {
            *("hello", "welcome", "open", "opened", "ack", "eof", "reset", "resume", "resumed", "gone", "detached"),
            *("listen", "listening", "unlisten", "need", "ping", "pong", "drain", "bye"),
        }

    def test_this_version(self) -> None:
        assert messages.SUBPROTOCOL == "wstunnel.1"
        assert messages.VERSION == 1
        assert messages.FEATURES == ("resume", "drain", "reverse", "udp")

    @pytest.mark.parametrize("kind", TYPES)
    def test_unknown_keys_are_ignored(self, kind: type[Message]) -> None:
        known = document(kind)
        more = {"later": {"a": [1, 2.5, None, True, "x"]}, **known, "also": 10**400, "": None}
        assert decode(json.dumps(more).encode()) == decode(json.dumps(known).encode())

    def test_a_hello_that_says_nothing_of_a_window_asks_for_five_minutes(self) -> None:
        hello = decode(b'{"type":"hello","version":1,"session":"0123456789abcdefghijkA","role":"control"}')
        assert isinstance(hello, Hello)
        assert hello.resume_window == RESUME_WINDOW_SECONDS == 300

    def test_spelling_is_free_where_json_is(self) -> None:
        assert decode(b' { "number" : 7 , "type" : "p\\u0069ng" }\r\n\t') == Ping(number=7)
        assert decode(b'{"type":"ping","number":-0}') == Ping(number=0)
        assert decode(b'{"type":"reset","n":1,"code":"x","message":"\\ud83d\\ude00"}').message == "\U0001f600"  # type: ignore[union-attr]

    def test_defaults_are_not_shared(self) -> None:
        first = decode(b'{"type":"hello","version":1,"session":"0123456789abcdefghijkA","role":"control"}')
        second = decode(b'{"type":"hello","version":1,"session":"0123456789abcdefghijkA","role":"control"}')
        assert isinstance(first, Hello)
        assert isinstance(second, Hello)
        first.features.append("x")
        assert second.features == []


class TestNumbers:
    """0…2^53-1, JavaScript's; counts from 1."""

    FIELDS: typing.ClassVar = [
        (kind, field, 1 if hint == messages.Count else 0)
        for kind in TYPES
        for field, hint in typing.get_type_hints(kind, include_extras=True).items()
        if hint in (messages.Number, messages.Count)
    ]

    def test_which_fields_are_numbers(self) -> None:
        assert {(kind.__name__, field) for kind, field, least in self.FIELDS if least} == {
            *((kind.__name__, "n") for kind in (Open, Opened, Ack, Eof, Reset, Resume, Resumed)),
            ("Resume", "epoch"),
        }
        assert len(self.FIELDS) == 30

    @pytest.mark.parametrize(("kind", "field", "least"), FIELDS)
    def test_ends_of_the_range(self, kind: type[Message], field: str, least: int) -> None:
        for number in (least, 1, NUMBER_MAX):
            message = decode(json.dumps({**document(kind), field: number}).encode())
            assert getattr(message, field) == number
        for number in (least - 1, -1, 2**53, 2**63, 2**64, -(2**63)):
            refused(json.dumps({**document(kind), field: number}).encode())

    @pytest.mark.parametrize(("kind", "field", "least"), FIELDS)
    def test_nothing_else_is_a_number(self, kind: type[Message], field: str, least: int) -> None:
        text = json.dumps({**document(kind), field: "HERE"})
        digits = "9" * 400
        others = [digits, "-" + digits, "0." + digits, "1.0", "1e2", "1e400", "1E+2", "-0.0", "true", "false", "null"]
        for other in [*others, '"1"', '""', "[]", "[1]", "{}", "NaN", "Infinity", "01", "+1", "0x1", "1_0", ".5", "1."]:
            refused(text.replace('"HERE"', other).encode())


class TestTexts:
    @pytest.mark.parametrize(
        ("kind", "field"),
        [
            *((Hello, "session"), (Welcome, "server"), (Welcome, "boot"), (Open, "stream"), (Resume, "stream")),
            (Gone, "stream"),
        ],
    )
    def test_ids_are_22_base64url_characters(self, kind: type[Message], field: str) -> None:
        for right in ("A" * 22, "-" * 22, "_" * 22, "0" * 22, OTHER_ID):
            assert getattr(decode(json.dumps({**document(kind), field: right}).encode()), field) == right
        wrong = [
            "",
            "A" * 21,
            "A" * 23,
            "A" * 20 + "==",
            "A" * 21 + "+",
            "A" * 21 + "/",
            "A" * 21 + "\n",
            "A" * 22 + "\n",
        ]
        wrong += [" " + "A" * 21, "é" * 22, "٣" * 22, "\n" + "A" * 22]  # Arabic digits are meant
        for text in wrong:
            refused(json.dumps({**document(kind), field: text}).encode())
        refused(json.dumps({**document(kind), field: 22}).encode())

    @pytest.mark.parametrize(
        ("kind", "field", "longest"),
        [
            (kind, field, 1024 if messages.Text in (hint, *typing.get_args(hint)) else 64)
            for kind in TYPES
            for field, hint in typing.get_type_hints(kind, include_extras=True).items()
            if {messages.Text, messages.Name} & {hint, *typing.get_args(hint)} and hint != messages.Features
        ],
    )
    def test_lengths(self, kind: type[Message], field: str, longest: int) -> None:
        for character in ("x", "é", "\U0001f600"):
            right = json.dumps({**document(kind), field: character * longest}).encode()
            assert getattr(decode(right), field) == character * longest
            refused(json.dumps({**document(kind), field: character * (longest + 1)}).encode())
        refused(json.dumps({**document(kind), field: 1}).encode())

    def test_features(self) -> None:
        right = {**document(Hello), "features": ["x" * 64] * 64}
        assert decode(json.dumps(right).encode()).features == ["x" * 64] * 64  # type: ignore[union-attr]
        for wrong in (["x"] * 65, ["x" * 65], [1], "x", None):
            refused(json.dumps({**right, "features": wrong}).encode())

    def test_detached(self) -> None:
        most = Detached(streams=[ID] * 256, epochs=[NUMBER_MAX] * 256)
        assert decode(encode(most)) == most
        refused(encode(Detached(streams=[ID] * 257)))
        refused(encode(Detached(streams=[ID], epochs=[0] * 257)))
        refused(encode(Detached(streams=[ID], epochs=[-1])))
        refused(b'{"type":"detached","streams":["short"]}')

    def test_choices(self) -> None:
        for role in ("control", "forward", "reverse"):
            assert decode(json.dumps({**document(Hello), "role": role}).encode()).role == role  # type: ignore[union-attr]
        refused(json.dumps({**document(Hello), "role": "Control"}).encode())
        for outcome in ("finished", "reset", "unknown", "stale"):
            assert decode(json.dumps({"type": "gone", "outcome": outcome}).encode()).outcome == outcome  # type: ignore[union-attr]
        refused(b'{"type":"gone","outcome":"lost"}')
        refused(json.dumps({**document(Welcome), "known": 1}).encode())


class TestRefused:
    @pytest.mark.parametrize(
        "data",
        [
            *(b"", b" ", b"null", b"1", b'"hello"', b"[]", b"{}", b"{", b"[[]]", b'{"type"}', b"\x00"),
            *(b'{"type":null}', b'{"type":1}', b'{"type":["ping"]}', b'{"type":""}', b'{"type":"nope"}'),
            *(b'{"type":"Ping","number":1}', b'{"type":"ping "}', b'{"type":"message"}', b'{"Type":"bye"}'),
            *(b'{"type":"bye"}{"type":"bye"}', b'{"type":"bye"},', b'{"type":"bye",}', b"{'type':'bye'}"),
            *(b'[{"type":"bye"}]', b'{"type":"ping","number":1,"type":"pong"}', b'{"type":"ping"}'),
            b'\xef\xbb\xbf{"type":"bye"}',  # RFC 8259 §8.1: no byte order mark
            b'{"type":"reset","n":1,"code":"x","message":"\\ud800"}',  # half a surrogate pair
            b'{"type":"reset","n":1,"code":"x","message":"\n"}',  # a control character that is not escaped
            b'{"type":"reset","n":1,"code":"x","message":"\\x"}',
            b'{"type":"bye","later":NaN}',
            b'{"type":"bye","later":01}',
        ],
    )
    def test_not_a_message(self, data: bytes) -> None:
        refused(data)

    @pytest.mark.parametrize("kind", TYPES)
    def test_required_keys(self, kind: type[Message]) -> None:
        required = [field.name for field in msgspec.structs.fields(kind) if field.required]
        whole = document(kind)
        for key in ("type", *required):
            assert key in refused(json.dumps({k: v for k, v in whole.items() if k != key}).encode())
        for key in required:
            refused(json.dumps({**whole, key: None}).encode())

    def test_at_most_16_kib(self) -> None:
        text = b'{"type":"bye"}'
        assert decode(text.ljust(MESSAGE_BYTES)) == Bye()
        assert str(MESSAGE_BYTES) in refused(text.ljust(MESSAGE_BYTES + 1))

    def test_at_most_256_brackets_nested_or_not(self) -> None:
        """They bound the depth before anything is decoded; the braces of the message itself count."""
        inner = MESSAGE_BRACKETS - 1
        for later in (
            b"[" * inner + b"]" * inner,
            b"[" + b",".join([b"{}"] * (inner - 1)) + b"]",
            b'"%s"' % (b"[" * inner),
        ):
            assert decode(b'{"type":"bye","later":' + later + b"}") == Bye()
        for later in (b"[" * (inner + 1) + b"]" * (inner + 1), b"[" + b",".join([b"{}"] * inner) + b"]"):
            assert "nested" in refused(b'{"type":"bye","later":' + later + b"}")

    @pytest.mark.parametrize(
        "deep", [b"[" * 1100 + b"]" * 1100, b'{"a":' * 1100 + b"1" + b"}" * 1100], ids=["arrays", "objects"]
    )
    @pytest.mark.parametrize("recursion_limit", [1000, 5000])
    def test_nested_1100_deep(self, deep: bytes, recursion_limit: int) -> None:
        """Whatever the interpreter would stand: 3.12 and 3.13 decode this depth at their default limits."""
        before = sys.getrecursionlimit()
        sys.setrecursionlimit(recursion_limit)
        try:
            refused(b'{"type":"ping","number":1,"later":' + deep + b"}")
            refused(b'{"type":"ping","number":' + deep + b"}")
            refused(deep)
        finally:
            sys.setrecursionlimit(before)

    def test_the_reason_is_short_whatever_the_peer_wrote(self) -> None:
        assert len(refused(json.dumps({"type": "x" * 1000}).encode())) <= 120
        assert len(refused(json.dumps({"type": "\U0001f600" * 1000}).encode())) <= 120


class TestAnything:
    @given(st.binary(max_size=200))
    @reproducible
    def test_bytes(self, data: bytes) -> None:
        try:
            message = decode(data)
        except ProtocolError as error:
            assert error.code == 1002  # most examples raise, and nothing else may be raised
        else:
            assert decode(encode(message)) == message

    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=5,
    )
    keys = st.sampled_from(sorted({field.name for kind in TYPES for field in msgspec.structs.fields(kind)}))

    @given(st.sampled_from(TYPES), st.dictionaries(keys, values | st.just(ID), max_size=4))
    @reproducible
    def test_objects(self, kind: type[Message], changes: dict[str, object]) -> None:
        try:
            message = decode(json.dumps({**document(kind), **changes}).encode())
        except ProtocolError as error:
            assert error.code == 1002  # as above
        else:
            assert type(message) is kind
            assert decode(encode(message)) == message


class TestPingsAsWeSpellThem:
    """Read and written without JSON: idle links send nothing else."""

    @given(st.integers(0, NUMBER_MAX))
    @settings(derandomize=True)
    def test_are_written_as_by_the_encoder(self, number: int) -> None:
        assert messages.encode_ping(number) == messages.encode(Ping(number=number))
        assert messages.encode_pong(number) == messages.encode(Pong(number=number))

    @pytest.mark.parametrize("kind", [Ping, Pong])
    @pytest.mark.parametrize("number", [0, 1, 9, 10, 101, 10**15 - 1])
    def test_are_read(self, kind: type[Message], number: int) -> None:
        message = kind(number=number)
        assert messages.decode_ping(messages.encode(message)) == message == decode(messages.encode(message))

    @pytest.mark.parametrize(
        "number", ["", "-1", "+1", "01", "00", "1.0", "1e3", "1_0", " 1", "1 ", "٣", "1,", '1,"x":2', str(10**15)]
    )
    def test_other_numbers_are_left_to_the_decoder(self, number: str) -> None:
        assert messages.decode_ping(f'{{"type":"ping","number":{number}}}'.encode()) is None

    @given(st.sampled_from([Ping(number=12), Pong(number=0)]), st.integers(0, 40), st.binary(max_size=2))
    @settings(derandomize=True)
    def test_never_read_otherwise_than_by_the_decoder(self, message: Message, at: int, new: bytes) -> None:
        data = messages.encode(message)
        data = data[:at] + new + data[at + 1 :]
        got = messages.decode_ping(data)
        assert got is None or got == decode(data)

    def test_other_messages_and_spellings_are_left_to_the_decoder(self) -> None:
        for text in ('{"number":1,"type":"ping"}', '{"type":"pang","number":1}', '{"type":"ping","number":1]', "1", ""):
            assert messages.decode_ping(text.encode()) is None
