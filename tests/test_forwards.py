"""The SPEC grammar of -L: every form, and a message with a caret for every habit that is not one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wstunnel.errors import UsageError
from wstunnel.forwards import (
    RANGE_PORTS,
    Forward,
    listen_text,
    merge_dynamic,
    parse_dynamic,
    parse_forward,
    parse_listen,
    parse_reverse,
)
from wstunnel.targets import Target


def unix(path: str) -> Target:
    return Target("unix", "", 0, path)


def tcp(host: str, port: int) -> Target:
    return Target("tcp", host, port, "")


def udp(host: str, port: int) -> Target:
    return Target("udp", host, port, "")


@pytest.mark.parametrize(
    ("spec", "forward"),
    [
        ("5432:db:5432", Forward("127.0.0.1", 5432, tcp("db", 5432))),
        ("0:db:5432", Forward("127.0.0.1", 0, tcp("db", 5432))),
        ("127.0.0.2:5432:db:5433", Forward("127.0.0.2", 5432, tcp("db", 5433))),
        ("0.0.0.0:5432:db:5433", Forward("0.0.0.0", 5432, tcp("db", 5433))),
        ("*:5432:db:5432", Forward("*", 5432, tcp("db", 5432))),
        (":5432:db:5432", Forward("*", 5432, tcp("db", 5432))),
        ("*:0:db:5432", Forward("*", 0, tcp("db", 5432))),
        ("localhost:5432:db:5432", Forward("localhost", 5432, tcp("db", 5432))),
        ("LocalHost:5432:db:5432", Forward("localhost", 5432, tcp("db", 5432))),
        ("[::1]:5432:[FD00::5]:5432", Forward("::1", 5432, tcp("fd00::5", 5432))),
        ("5432:[::1]:5432", Forward("127.0.0.1", 5432, tcp("::1", 5432))),
        ("[0::0]:1:db:65535", Forward("::", 1, tcp("db", 65535))),
        ("5432:Bücher.example:5432", Forward("127.0.0.1", 5432, tcp("xn--bcher-kva.example", 5432))),
        ("8000-8000:db:9000", Forward("127.0.0.1", 8000, tcp("db", 9000))),
        ("5432:80:5432", Forward("127.0.0.1", 5432, tcp("80", 5432))),
        ("5432:/run/x.sock", Forward("127.0.0.1", 5432, unix("/run/x.sock"))),
        ("5432:unix:/run/x.sock", Forward("127.0.0.1", 5432, unix("/run/x.sock"))),
        ("[::1]:5432:/run/udp", Forward("::1", 5432, unix("/run/udp"))),
        ("5353:9.9.9.9:53/udp", Forward("127.0.0.1", 5353, udp("9.9.9.9", 53), udp=True)),
        ("*:5353:[::1]:53/udp", Forward("*", 5353, udp("::1", 53), udp=True)),
        ("/run/x.sock:db:5432", Forward("", 0, tcp("db", 5432), path="/run/x.sock")),
        ("/run/x.sock:[::1]:5432;mode=0660", Forward("", 0, tcp("::1", 5432), path="/run/x.sock", mode=0o660)),
        ("/a:/b;mode=666;proxy=v1", Forward("", 0, unix("/b"), path="/a", mode=0o666, proxy=1)),
        ("5432:db:5432;proxy=v2", Forward("127.0.0.1", 5432, tcp("db", 5432), proxy=2)),
        ("5900:ws-raw", Forward("127.0.0.1", 5900, raw=True)),
        ("*:0:ws-raw", Forward("*", 0, raw=True)),
        ("/run/x.sock:ws-raw;mode=666", Forward("", 0, path="/run/x.sock", mode=0o666, raw=True)),
    ],
)
def test_reads_one(spec: str, forward: Forward) -> None:
    assert parse_forward(spec) == (forward,)


@pytest.mark.parametrize(
    ("spec", "offset", "message"),
    [
        ("/run/x.sock:db:53/udp", 17, "UDP has no Unix sockets here"),
        ("53:db:53/udp;proxy=v1", 12, "a PROXY header goes before a TCP stream, not UDP"),
        ("53:db/udp", 9, "the target's port is missing"),
        ("53:db:x/udp", 6, "1 to 65535"),
    ],
)
def test_what_udp_has_not(spec: str, offset: int, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        parse_forward(spec)
    assert raised.value.position == offset


def test_ranges_of_udp() -> None:
    forwards = parse_forward("5000-5002:db:53-55/udp")
    assert [(forward.port, str(forward.target), forward.kind) for forward in forwards] == [
        (5000, "udp:db:53", "udp"),
        (5001, "udp:db:54", "udp"),
        (5002, "udp:db:55", "udp"),
    ]
    assert str(forwards[0]) == "127.0.0.1:5000 -> udp:db:53"
    assert parse_listen(listen_text(forwards[0])).udp


@pytest.mark.parametrize("spec", ["5900:ws-raw/udp", "5900:ws-raw;proxy=v2", "/run/x.sock:ws-raw;proxy=v1"])
def test_ws_raw_is_for_streams_and_has_no_header(spec: str) -> None:
    with pytest.raises(UsageError, match="ws-raw takes"):
        parse_forward(spec)


def test_ws_raw_has_no_place_at_the_server() -> None:
    with pytest.raises(UsageError, match="for -L only"):
        parse_reverse("5900:ws-raw")


@pytest.mark.parametrize("bind", ["", "[::1]:", "*:"])
def test_a_range_gives_one_forward_a_port_in_order(bind: str) -> None:
    forwards = parse_forward(f"{bind}8000-8010:host:9000-9010")
    assert [(forward.port, forward.target) for forward in forwards] == [
        (8000 + i, tcp("host", 9000 + i)) for i in range(11)
    ]
    assert {forward.bind for forward in forwards} == {{"": "127.0.0.1", "[::1]:": "::1", "*:": "*"}[bind]}


def test_the_longest_range_is_taken_and_one_more_is_not() -> None:
    assert len(parse_forward(f"1001-{1000 + RANGE_PORTS}:h:2001-{2000 + RANGE_PORTS}")) == RANGE_PORTS
    with pytest.raises(UsageError, match="at most 1024 ports"):
        parse_forward(f"1001-{1001 + RANGE_PORTS}:h:2001-{2001 + RANGE_PORTS}")


def test_addresses_to_listen_on() -> None:
    assert parse_forward("*:1:h:1")[0].addresses == ("0.0.0.0", "::")
    assert parse_forward("localhost:1:h:1")[0].addresses == ("127.0.0.1", "::1")
    assert parse_forward("[::1]:1:h:1")[0].addresses == ("::1",)


def test_text_of_a_forward() -> None:
    assert str(parse_forward("[::1]:1:[::2]:3")[0]) == "[::1]:1 -> tcp:[::2]:3"


@pytest.mark.parametrize(
    ("spec", "position", "message"),
    [
        # ssh's habits, and things left out
        ("", 0, "nothing given"),
        ("5432", 4, "target is missing"),
        ("5432:5432", 5, "target's HOST is missing"),
        ("host:5432", 0, "port to listen on is missing"),
        ("host", 0, "port to listen on is missing"),
        ("5432:db", 7, "target's port is missing"),
        ("5432:db:", 8, "port is missing"),
        ("127.0.0.1:5432:db", 17, "target's port is missing"),
        ("127.0.0.1:5432:5432", 15, "target's HOST is missing"),
        ("[::1]:5432:db", 13, "target's port is missing"),
        ("5432::5432", 5, "host is missing"),
        ("db:x:5432", 0, "1 to 65535"),
        # too much
        ("127.0.0.1:5432:db:5432:1", 23, "field too many"),
        ("5432:::1:5432", 9, "field too many"),
        # ports
        ("65536:db:1", 0, "1 to 65535"),
        ("5432:db:0", 8, "1 to 65535"),
        ("5432:db:65536", 8, "1 to 65535"),
        ("-1:db:1", 0, "port is missing"),
        ("*:x:db:1", 2, "1 to 65535"),
        # ranges
        ("8000-8010:h:8000", 12, "11 ports here, 1 port at the target"),
        ("8000:h:8000-8010", 7, "1 port here, 11 ports at the target"),
        ("0:h:8000-8010", 4, "1 port here, 11 ports at the target"),
        ("8000-8010:h:8000-8009", 12, "ranges differ"),
        ("8010-8000:h:8000-8010", 0, "backwards"),
        ("0-5:h:0-5", 0, "port 0"),
        ("0-0:h:5", 0, "port 0"),
        ("8000-:h:8000", 5, "port is missing"),
        # binds
        ("db:5432:db:5432", 0, "BIND is an IP address"),
        ("127.1:5432:db:5432", 0, "BIND is an IP address"),
        ("[::1:5432:db:5432", 0, "bracket is not closed"),
        ("[fe80::1%lo]:5432:db:5432", 8, "zone id"),
        ("[127.0.0.1]:5432:db:5432", 1, "not an IPv6 address"),
        # targets
        ("5432:d b:5432", 6, "' '"),
        ("5432:*:5432", 5, "'*'"),
        ("5432:[::1]x:5432", 5, "not closed"),
        ("5432:http://db:80", 9, "URL"),
        # Unix sockets
        ("5432:/run/../x.sock", 10, "without '//'"),
        ("/run/x.sock", 11, "the target is missing"),
        ("/run/x.sock:db", 14, "target's port is missing"),
        ("/run/x.sock:db:5432:1", 20, "field too many"),
        ("8000-8001:/run/x.sock", 10, "not to one Unix socket"),
        ("/run/x.sock:8000:/run/y.sock", 17, "1 to 65535"),
        # options
        ("5432:db:5432;proxy=v3", 13, "after ';' comes proxy=v1"),
        ("5432:db:5432;", 13, "after ';' comes proxy=v1"),
        ("/x:db:5432;proxy=v1;mode=9", 20, "after ';' comes proxy=v1"),
        ("5432:db:5432;mode=600", 12, "mode is for a Unix socket"),
    ],
)
def test_refuses_and_points_at_the_part(spec: str, position: int, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_forward(spec)
    assert message in caught.value.message
    assert caught.value.position == position
    assert "[BIND:]PORT:HOST:HOSTPORT" in str(caught.value)


def test_a_long_spec_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="too long"):
        parse_forward("1:" + "a" * 1024)


@given(st.text(st.sampled_from("1a:.-[]*/;%ü "), max_size=24))
def test_any_text_gives_forwards_or_a_usage_error(spec: str) -> None:
    try:
        forwards = parse_forward(spec)
    except UsageError as error:
        assert 0 <= error.position <= len(spec)
        return
    assert 1 <= len(forwards) <= RANGE_PORTS


# --- dynamic and reverse --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "bind", "port"),
    [("1080", "127.0.0.1", 1080), ("0", "127.0.0.1", 0), ("*:1080", "*", 1080), ("[::1]:1080", "::1", 1080)],
)
def test_a_dynamic_forward_has_a_place_and_no_target(spec: str, bind: str, port: int) -> None:
    assert parse_dynamic(spec, "http") == Forward(bind, port, speaks=("http",))
    assert parse_reverse(spec) == (Forward(bind, port, speaks=("socks",)),)


@pytest.mark.parametrize(
    ("spec", "position", "message"),
    [
        ("1080:db:80", 8, "application names the target"),
        ("x", 0, "1 to 65535"),
        ("1080-1081", 0, "one port only"),
        ("db:1080", 0, "BIND is an IP address"),
    ],
)
def test_a_dynamic_forward_refuses(spec: str, position: int, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_dynamic(spec, "socks")
    assert caught.value.position == position
    assert "[BIND:]PORT" in str(caught.value)


def test_a_reverse_forward_reads_as_a_local_one() -> None:
    assert parse_reverse("*:8000-8001:web:80-81;proxy=v1") == parse_forward("*:8000-8001:web:80-81;proxy=v1")
    with pytest.raises(UsageError, match="target's port is missing") as caught:
        parse_reverse("8080:web")
    assert "alone for a SOCKS proxy" in str(caught.value)


def test_the_same_port_as_both_proxies_is_one_that_tells_them_apart() -> None:
    forwards = (parse_dynamic("1080", "socks"), parse_dynamic("1081", "http"), parse_dynamic("1080", "http"))
    assert merge_dynamic(forwards) == (
        Forward("127.0.0.1", 1080, speaks=("socks", "http")),
        Forward("127.0.0.1", 1081, speaks=("http",)),
    )
    assert [forward.whither for forward in merge_dynamic(forwards)] == ["SOCKS/HTTP proxy", "HTTP proxy"]


def test_two_free_ports_are_two() -> None:
    both = (parse_dynamic("0", "socks"), parse_dynamic("0", "http"))
    assert merge_dynamic(both) == both


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("8080:web:80", "tcp:127.0.0.1:8080"),
        ("*:0:web:80;proxy=v2", "tcp:*:0"),
        ("[::1]:8080:/run/x", "tcp:[::1]:8080"),
        ("/run/x:web:80;mode=660", "unix:/run/x;mode=660"),
        ("localhost:1080", "socks:localhost:1080"),
    ],
)
def test_what_the_server_is_asked_for_says_where_and_not_where_to(spec: str, text: str) -> None:
    forward = parse_reverse(spec)[0]
    assert listen_text(forward) == text
    heard = parse_listen(text)
    assert (heard.kind, heard.where, heard.mode, heard.speaks) == (
        forward.kind, forward.where, forward.mode, forward.speaks,
    )  # fmt: skip
    assert heard.target is None


@pytest.mark.parametrize(
    "text", ["", "8080", "tcp:8080", "sctp:*:1", "tcp:x:1", "tcp:*:1-2", "unix:x", "unix:/x;mode=9", "tcp:*:1:db:1"]
)
def test_a_peers_place_is_refused_where_it_is_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_listen(text)


@given(st.text(st.sampled_from("tcpsocksudpunix1:/;mode=.*[]- "), max_size=32))
def test_any_place_of_a_peer_is_read_or_a_usage_error(text: str) -> None:
    try:
        forward = parse_listen(text)
    except UsageError:
        return
    assert parse_listen(listen_text(forward)) == forward
