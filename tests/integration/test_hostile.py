"""Strangers and broken peers against a real server: each gets the right answer, and nobody else notices."""

from __future__ import annotations

import json
import re
import select
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from . import raw
from .process import wait_until
from .raw import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, RawConnection, RawLink, frame, hello, upgrade_head
from .sockets import Echo, Listener, pattern, read_exactly
from .tunnel import Client, Server

if TYPE_CHECKING:
    from collections.abc import Iterator

PROTOCOL_ERROR, INVALID_DATA, POLICY, TOO_BIG = 1002, 1007, 1008, 1009


@pytest.fixture(scope="module")
def echo() -> Iterator[Echo]:
    with Echo() as running:
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Plain, so that each byte is the test's own."""
    with Server(tmp_path_factory.mktemp("server"), plain=True) as running:
        yield running


@pytest.fixture(scope="module")
def good_stream(server: Server, echo: Echo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[socket.socket]:
    """One stream of a good client, the same for all tests: it must live through every one of them."""
    directory = tmp_path_factory.mktemp("client")
    with Client(directory, server.invitation.url, [echo.address]) as client, client.connect(echo.address) as app:
        yield app


@pytest.fixture(autouse=True)
def bystander(server: Server, good_stream: socket.socket) -> Iterator[None]:
    """The good stream works before and after each test, and the server has written no traceback."""
    _echo(good_stream)
    yield
    _echo(good_stream)
    print(server.tail())
    assert server.running
    assert "Traceback" not in server.stderr


@pytest.fixture
def link(server: Server) -> Iterator[RawLink]:
    """A link that has said hello."""
    with RawLink(server.port, server.invitation.token) as opened:
        yield opened


def _echo(stream: socket.socket) -> None:
    data = pattern(10_000, time.monotonic_ns() & 0xFFFF)
    stream.sendall(data)
    assert read_exactly(stream, len(data)) == data


def _refused(port: int, request: bytes) -> raw.Head:
    """Send a head that must be refused. The answer must say that the connection closes, and it must close."""
    with RawConnection(port) as connection:
        connection.send(request)
        head = connection.read_head()
        assert "close" in head.fields["connection"].lower().split(", ")
        body = connection.read_to_end()
        assert len(body) == int(head.fields.get("content-length", len(body)))
        return head


def _closed(link: RawLink, *codes: int) -> None:
    """The link is closed with one of `codes` and a reason."""
    code, reason = link.read_close()
    assert code in codes, f"closed with {code}: {reason}"
    assert reason


class TestHead:
    """RFC 9112 and RFC 6455 §4.2.1, before anybody is authenticated."""

    @pytest.mark.parametrize(
        "garbage",
        [
            pytest.param(b"\x00\x01\x02\x03 nonsense\r\n\r\n", id="binary"),
            pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), id="tls-client-hello"),
            pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", id="ssh"),
            pytest.param(b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", id="two-spaces"),
            pytest.param(b"GET / HTTP/1.1\nHost: a\n\n", id="bare-line-feeds"),
            pytest.param(b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", id="space-before-colon"),
            pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", id="folded"),
        ],
    )
    def test_garbage(self, server: Server, garbage: bytes) -> None:
        assert _refused(server.port, garbage).status == 400

    @pytest.mark.parametrize(
        ("add", "drop", "status"),
        [
            pytest.param("Host: other\r\n", "", 400, id="two-hosts"),
            pytest.param("", "Host", 400, id="no-host"),
            pytest.param("Content-Length: 5\r\n", "", 400, id="content-length"),
            pytest.param("Transfer-Encoding: chunked\r\n", "", 400, id="transfer-encoding"),
            pytest.param("", "Sec-WebSocket-Key", 400, id="no-key"),
            pytest.param("Sec-WebSocket-Version: 8\r\n", "Sec-WebSocket-Version", 426, id="old-version"),
            pytest.param("", "Upgrade", 426, id="no-upgrade"),
            pytest.param("Sec-WebSocket-Protocol: chat\r\n", "Sec-WebSocket-Protocol", 400, id="other-subprotocol"),
            pytest.param("Origin: http://evil.example\r\n", "", 403, id="browser"),
            pytest.param("X-Padding: %s\r\n" % ("x" * 17_000), "", 431, id="long-field"),
            pytest.param("".join(f"X-{index}: y\r\n" for index in range(70)), "", 431, id="many-fields"),
        ],
    )
    def test_bad_upgrade(self, server: Server, add: str, drop: str, status: int) -> None:
        request = upgrade_head(server.port, server.invitation.token, add=add, drop=drop)
        assert _refused(server.port, request).status == status

    def test_long_target(self, server: Server) -> None:
        request = upgrade_head(server.port, server.invitation.token, path="/" + "x" * 20_000)
        assert _refused(server.port, request).status in (414, 431)

    def test_an_answer_reaches_a_stranger_who_is_still_sending(self, server: Server) -> None:
        # Closing with unread input resets the connection and destroys the answer on its way.
        with RawConnection(server.port) as connection:
            connection.send(b"GET / HTTP/1.1\r\nX: " + b"x" * 200_000)
            assert connection.read_head().status == 431

    @pytest.mark.parametrize("path", ["/other", "//", "/..", "/?"])
    def test_other_path(self, server: Server, path: str) -> None:
        request = upgrade_head(server.port, server.invitation.token, path=path)
        with RawConnection(server.port) as connection:
            connection.send(request)
            # "/?" is the path "/" with an empty query; the rest is nothing that this server has.
            assert connection.read_head().status == (101 if path == "/?" else 404)

    @pytest.mark.parametrize(
        "credentials",
        [
            pytest.param("Authorization: Bearer " + "A" * 43 + "\r\n", id="well-formed"),
            pytest.param("Authorization: Bearer short\r\n", id="short"),
            pytest.param("Authorization: Basic dXNlcjpwYXNz\r\n", id="basic"),
            pytest.param("", id="none"),
        ],
    )
    def test_wrong_token(self, server: Server, good_stream: socket.socket, credentials: str) -> None:
        request = upgrade_head(server.port, "", drop="Authorization", add=credentials)
        head = _refused(server.port, request)
        assert head.status == 401
        assert head.fields["www-authenticate"].lower().startswith("bearer")
        _echo(good_stream)

    def test_a_token_that_is_not_ascii(self, server: Server) -> None:
        # Comparing it in constant time raises TypeError in Python, unless somebody thought of it.
        add = "Authorization: Bearer \xe9\xe8" + "A" * 41 + "\r\n"
        assert _refused(server.port, upgrade_head(server.port, "", drop="Authorization", add=add)).status in (400, 401)

    def test_two_tokens(self, server: Server) -> None:
        add = f"Authorization: Bearer {server.invitation.token}\r\n"
        assert _refused(server.port, upgrade_head(server.port, "A" * 43, add=add)).status in (400, 401)

    def test_the_token_is_in_no_log(self, server: Server) -> None:
        wrong = "B" * 43
        _refused(server.port, upgrade_head(server.port, wrong))
        with RawLink(server.port, server.invitation.token):
            pass
        for log in (server.stderr, server.stdout):
            assert wrong not in log
            assert server.invitation.token not in log

    def test_strangers_who_take_too_long_are_given_up(self, server: Server, good_stream: socket.socket) -> None:
        """One byte a second, silence, and an upgrade without a hello, side by side: each has 10 s."""
        request = upgrade_head(server.port, server.invitation.token)
        started = time.monotonic()
        with (
            RawConnection(server.port) as slow,
            RawConnection(server.port) as silent,
            RawLink(server.port, server.invitation.token, role=None) as mute,
        ):
            slow.socket.settimeout(1.0)
            answer = b""
            for byte in request:  # each one is progress, which must not count
                slow.send(bytes([byte]))
                try:
                    answer = slow.socket.recv(65536)
                    break
                except TimeoutError:
                    _echo(good_stream)
                assert time.monotonic() - started < 25, "the server still waits"
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert time.monotonic() - started > 5, "given up before the deadline"
            answer = silent.read_to_end()
            assert answer == b"" or answer.startswith(b"HTTP/1.1 408 ")
            code, _ = mute.read_close()
            assert code in (PROTOCOL_ERROR, POLICY)

    def test_many_strangers_at_once(self, server: Server, good_stream: socket.socket) -> None:
        strangers = [RawConnection(server.port) for _ in range(100)]
        try:
            for stranger in strangers:
                stranger.send(b"GET / HT")
            _echo(good_stream)
            with RawLink(server.port, server.invitation.token):
                pass
        finally:
            for stranger in strangers:
                stranger.socket.close()


class TestFrames:
    """RFC 6455 §5 to §8: fail the connection with the code that the section gives."""

    @pytest.mark.parametrize(
        ("data", "code"),
        [
            pytest.param(frame(TEXT, b"{}", masked=False), PROTOCOL_ERROR, id="unmasked-text"),
            pytest.param(frame(BINARY, b"data", masked=False), PROTOCOL_ERROR, id="unmasked-binary"),
            pytest.param(frame(PING, b"a", masked=False), PROTOCOL_ERROR, id="unmasked-ping"),
            pytest.param(frame(PING, b"half", fin=False), PROTOCOL_ERROR, id="fragmented-ping"),
            pytest.param(frame(CLOSE, b"\x03\xe8", fin=False), PROTOCOL_ERROR, id="fragmented-close"),
            pytest.param(frame(PING, bytes(126)), PROTOCOL_ERROR, id="long-ping"),
            pytest.param(frame(PONG, bytes(65536)), PROTOCOL_ERROR, id="oversized-pong"),
            pytest.param(frame(TEXT, b"\xff\xfe{}"), INVALID_DATA, id="not-utf-8"),
            pytest.param(frame(TEXT, b'{"type":"\xed\xa0\x80"}'), INVALID_DATA, id="surrogate"),
            pytest.param(frame(TEXT, b"\xc3", fin=False) + frame(CONTINUATION, b"("), INVALID_DATA, id="split-utf-8"),
            pytest.param(frame(CONTINUATION, b"x"), PROTOCOL_ERROR, id="continuation-of-nothing"),
            pytest.param(frame(TEXT, b"{", fin=False) + frame(TEXT, b"}"), PROTOCOL_ERROR, id="text-inside-text"),
            pytest.param(frame(TEXT, b"{}", reserved=4), PROTOCOL_ERROR, id="rsv1"),
            pytest.param(frame(BINARY, b"{}", reserved=1), PROTOCOL_ERROR, id="rsv3"),
            pytest.param(frame(0x3, b"x"), PROTOCOL_ERROR, id="reserved-opcode"),
            pytest.param(frame(0xB, b"x"), PROTOCOL_ERROR, id="reserved-control-opcode"),
            pytest.param(b"\x81\xfe\x00\x05" + raw.mask(b"12345"), PROTOCOL_ERROR, id="length-not-minimal-16"),
            pytest.param(b"\x82\xff" + bytes(7) + b"\xc8" + raw.mask(bytes(200)), PROTOCOL_ERROR, id="not-minimal-64"),
            pytest.param(b"\x82\xff" + b"\xff" * 8 + b"key!", PROTOCOL_ERROR, id="length-beyond-63-bits"),
            pytest.param(frame(CLOSE, b"\x03"), PROTOCOL_ERROR, id="close-of-one-byte"),
            pytest.param(frame(CLOSE, (1005).to_bytes(2, "big")), PROTOCOL_ERROR, id="close-1005"),
            pytest.param(frame(CLOSE, (2999).to_bytes(2, "big")), PROTOCOL_ERROR, id="close-2999"),
            pytest.param(frame(CLOSE, b"\x03\xe8\xff\xff"), INVALID_DATA, id="close-reason-not-utf-8"),
        ],
    )
    def test_broken_frame(self, link: RawLink, good_stream: socket.socket, data: bytes, code: int) -> None:
        link.send(data)
        _echo(good_stream)
        _closed(link, code)

    @pytest.mark.parametrize("answers", [True, False])
    def test_a_failed_connection_ends(self, link: RawLink, answers: bool) -> None:
        """RFC 6455 §7.1.7, whether the peer plays its part in it or not; cleanly, so that the code is not lost."""
        link.send(frame(TEXT, b"nonsense"))
        _closed(link, PROTOCOL_ERROR)
        if answers:
            link.send(frame(CLOSE, PROTOCOL_ERROR.to_bytes(2, "big")))
        assert link.read_to_end() == b""

    def test_byte_by_byte(self, link: RawLink) -> None:
        for byte in frame(TEXT, json.dumps({"type": "ping", "number": 7}).encode()):
            link.send(bytes([byte]))
        assert link.read_message() == {"type": "pong", "number": 7}

    def test_good_peers_get_good_answers(self, link: RawLink) -> None:
        """So that the closes above are not what any peer would get."""
        link.send(frame(PING, b"are you there"))
        assert link.read_frame_of_interest() == (PONG, b"are you there")
        text = json.dumps({"type": "ping", "number": 2**53 - 1}).encode()
        link.send(frame(TEXT, text[:5], fin=False) + frame(PING, b"between") + frame(CONTINUATION, text[5:]))
        answers = sorted([link.read_frame_of_interest(), link.read_frame_of_interest()])
        assert answers[0][0] == TEXT
        assert json.loads(answers[0][1]) == {"type": "pong", "number": 2**53 - 1}
        assert answers[1] == (PONG, b"between")
        link.send(frame(CLOSE, (1000).to_bytes(2, "big") + b"done"))
        assert link.read_close()[0] == 1000
        assert link.read_to_end() == b""


def _text(**message: Any) -> bytes:
    return frame(TEXT, json.dumps(message).encode())


def _open(*, n: int, stream: str = "") -> bytes:
    return _text(type="open", n=n, stream=stream or raw.new_id(), target="tcp:127.0.0.1:1")


_RESUMED = _text(type="resumed", n=1, received=0, consumed=0, limit=0)


class TestMessages:
    """The tunnel protocol: what is out of place closes that link with 1002, and nothing else."""

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(frame(BINARY, b"data"), id="data"),
            pytest.param(_text(type="ping", number=1), id="ping"),
            pytest.param(_open(n=1), id="open"),
            pytest.param(_text(**hello(version=2**60)), id="version-out-of-range"),
            pytest.param(_text(**hello(session="short")), id="session-id"),
            pytest.param(_text(**hello(role="observer")), id="role"),
            pytest.param(_text(**hello(features="all")), id="features"),
        ],
    )
    def test_instead_of_hello(self, server: Server, good_stream: socket.socket, data: bytes) -> None:
        with RawLink(server.port, server.invitation.token, role=None) as link:
            link.send(data)
            _echo(good_stream)
            _closed(link, PROTOCOL_ERROR)

    @pytest.mark.parametrize(
        "payload",
        [
            pytest.param(b"", id="empty"),
            pytest.param(b"hello", id="not-json"),
            pytest.param(b"[]", id="array"),
            pytest.param(b'{"n":1}', id="no-type"),
            pytest.param(b'{"type":"surprise"}', id="unknown-type"),
            pytest.param(b'{"type":["ping"]}', id="type-not-a-string"),
            pytest.param(b'{"type":"ping","number":' + b"[" * 1100 + b"]" * 1100 + b"}", id="nested-1100-deep"),
            pytest.param(b'{"type":"ping","number":1,"x":' + b"[" * 1100 + b"]" * 1100 + b"}", id="nested-in-unknown"),
            pytest.param(b'{"type":"ping","number":1,"x":' + b'{"a":' * 1100 + b"1" + b"}" * 1101, id="nested-objects"),
            pytest.param(b'{"type":"ping","number":' + b"9" * 400 + b"}", id="400-digits"),
            pytest.param(b'{"type":"ping","number":9007199254740992}', id="beyond-javascript"),
            pytest.param(b'{"type":"ping","number":-1}', id="negative"),
            pytest.param(b'{"type":"ping","number":1.5}', id="fraction"),
            pytest.param(b'{"type":"ping","number":1e400}', id="infinite"),
            pytest.param(b'{"type":"ping","number":true}', id="boolean"),
            pytest.param(b'{"type":"ping"}', id="field-missing"),
            pytest.param(b'{"type":"ping","number":1}{"type":"ping","number":2}', id="two-in-one"),
        ],
    )
    def test_malformed(self, link: RawLink, good_stream: socket.socket, payload: bytes) -> None:
        link.send(frame(TEXT, payload))
        _echo(good_stream)
        _closed(link, PROTOCOL_ERROR)

    def test_too_long(self, link: RawLink) -> None:
        link.send(frame(TEXT, b'{"type":"ping","number":1,"x":"' + b"x" * 17_000 + b'"}'))
        _closed(link, PROTOCOL_ERROR, TOO_BIG)

    def test_too_long_in_pieces_that_never_end(self, link: RawLink) -> None:
        link.send(frame(TEXT, b"x" * 10_000, fin=False) + frame(CONTINUATION, b"x" * 10_000, fin=False))
        _closed(link, PROTOCOL_ERROR, TOO_BIG)

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(frame(BINARY, b"data"), id="data-without-stream"),
            pytest.param(_text(**hello()), id="second-hello"),
            pytest.param(_text(type="welcome", version=1, server=raw.new_id(), boot=raw.new_id()), id="welcome"),
            pytest.param(_text(type="opened", n=1, address="x"), id="opened"),
            pytest.param(_text(type="ack", n=1, consumed=0, limit=0), id="ack"),
            pytest.param(_text(type="eof", n=1, total=0), id="eof"),
            pytest.param(_text(type="reset", n=1, code="internal"), id="reset"),
            pytest.param(_open(n=2), id="open-skips-a-count"),
            pytest.param(_open(n=0), id="open-counts-0"),
            pytest.param(_open(n=1, stream="../../etc"), id="open-bad-id"),
            pytest.param(_text(type="bye"), id="bye-on-a-forward-link"),
            pytest.param(_RESUMED, id="resumed"),
        ],
    )
    def test_out_of_state(self, link: RawLink, good_stream: socket.socket, data: bytes) -> None:
        link.send(data)
        _echo(good_stream)
        _closed(link, PROTOCOL_ERROR)

    def test_open_on_the_control_link(self, server: Server, echo: Echo) -> None:
        with RawLink(server.port, server.invitation.token, role="control") as link:
            link.send_message(type="open", n=1, stream=raw.new_id(), target=f"tcp:{echo.address}")
            _closed(link, PROTOCOL_ERROR)

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(_text(type="opened", n=1, address="x"), id="opened-by-the-ingress"),
            pytest.param(_text(type="ack", n=1, consumed=1, limit=300_000), id="ack-of-what-was-not-sent"),
            pytest.param(_text(type="ack", n=2, consumed=0, limit=300_000), id="ack-for-a-later-stream"),
            pytest.param(
                _text(type="ack", n=1, consumed=0, limit=300_000) + _text(type="ack", n=1, consumed=0, limit=299_999),
                id="limit-falls",
            ),
            pytest.param(_text(type="eof", n=1, total=1), id="eof-beyond-what-came"),
            pytest.param(frame(BINARY, b"four") + _text(type="eof", n=1, total=3), id="eof-before-what-came"),
            pytest.param(_text(type="eof", n=1, total=0) + frame(BINARY, b"late"), id="data-after-eof"),
            pytest.param(_text(type="eof", n=1, total=0) * 2, id="two-eofs"),
            pytest.param(_open(n=2), id="open-while-busy"),
        ],
    )
    def test_on_an_open_stream(self, link: RawLink, good_stream: socket.socket, data: bytes) -> None:
        with Listener() as listener:
            link.open(f"tcp:{listener.address}")
            with listener.accept() as target:
                link.send(data)
                _echo(good_stream)
                _closed(link, PROTOCOL_ERROR)
                # The stream had no other link: its target must not wait for ever. A FIN alone would not tell it; and
                # after one, recv() shows no reset any more, but poll() does.
                ended = select.poll()
                ended.register(target, 0)
                assert ended.poll(30_000), "the target's connection still stands"
                assert ended.poll(0)[0][1] & select.POLLERR, "the target's connection was closed, not reset"

    def test_consumed_falls(self, link: RawLink) -> None:
        with Listener() as listener:
            link.open(f"tcp:{listener.address}")
            link.send_message(type="ack", n=1, consumed=0, limit=300_000)
            with listener.accept() as target:
                target.sendall(b"0123456789")
                assert link.read_data() == b"0123456789"
                link.send_message(type="ack", n=1, consumed=10, limit=300_000)
                link.send_message(type="ack", n=1, consumed=9, limit=300_000)
                _closed(link, PROTOCOL_ERROR)

    def test_data_past_the_limit(self, link: RawLink, good_stream: socket.socket) -> None:
        # Nobody reads at the target: once the sockets' buffers are full the credit no longer grows.
        with Listener() as listener:
            link.open(f"tcp:{listener.address}")
            with listener.accept():
                link.socket.settimeout(10)
                try:
                    for _ in range(2000):
                        link.send(frame(BINARY, bytes(65536)))
                except (ConnectionResetError, BrokenPipeError):
                    pass  # it closed while this side still sent; the code is in what came before
                _echo(good_stream)
                code, reason = link.read_close()
                assert code == PROTOCOL_ERROR
                assert re.search(r"limit|credit", reason)

    def test_unknown_keys_are_ignored(self, link: RawLink) -> None:
        link.send_message(type="ping", number=3, later={"version": [1, 2]})
        assert link.read_message() == {"type": "pong", "number": 3}

    def test_an_older_count_is_ignored(self, link: RawLink, echo: Echo) -> None:
        link.open(f"tcp:{echo.address}")
        link.send_message(type="reset", n=1, code="internal")
        while link.read_message()["type"] != "reset":
            pass
        link.open(f"tcp:{echo.address}", n=2)
        link.send_message(type="ack", n=1, consumed=99, limit=1)  # late, of the stream before
        link.send_message(type="ack", n=2, consumed=0, limit=300_000)
        link.send(frame(BINARY, b"still there"))
        assert link.read_data() == b"still there"

    def test_a_flood_of_pings_holds_no_memory(self, server: Server, link: RawLink, good_stream: socket.socket) -> None:
        # One pending pong at most: whoever asks without reading is answered late or cut off, not remembered.
        _echo(good_stream)
        before = server.resident_bytes()
        link.socket.settimeout(2)
        try:
            for _ in range(100):
                link.send(frame(PING, bytes(125)) * 1000)
            for _ in range(20):
                link.send(_text(type="ping", number=1) * 1000)
        except (TimeoutError, ConnectionResetError, BrokenPipeError):
            pass  # blocked or cut off: both are bounds
        _echo(good_stream)
        # As objects these pongs would be 17 MB and more.
        assert server.resident_bytes() - before < 8 << 20

    def test_streams_whose_links_vanish_leave_nothing_behind(self, server: Server, echo: Echo) -> None:
        settled = server.descriptors()
        for _ in range(100):
            with RawLink(server.port, server.invitation.token) as link:
                link.send_message(type="open", n=1, stream=raw.new_id(), target=f"tcp:{echo.address}")
                link.send(frame(BINARY, b"and gone"))
        wait_until(lambda: server.descriptors() <= settled, "the server to close what they held")
