"""The SPEC grammar of -L: every form, and a message with a caret for every habit that is not one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wstunnel.errors import UsageError
from wstunnel.forwards import RANGE_PORTS, Forward, parse_forward
from wstunnel.targets import Target


def tcp(host: str, port: int) -> Target:
    return Target("tcp", host, port, "")


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
    ],
)
def test_reads_one(spec: str, forward: Forward) -> None:
    assert parse_forward(spec) == (forward,)


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
        # not yet
        ("5432:db:5432/udp", 12, "UDP is not supported yet in -L"),
        ("5432:/run/x.sock", 5, "Unix sockets are not supported yet in -L"),
        ("/run/x.sock:db:5432", 0, "Unix sockets are not supported yet in -L"),
        ("5432:unix:/run/x.sock", 10, "Unix sockets are not supported yet in -L"),
        ("5432:db:5432;proxy=v2", 12, "PROXY headers are not supported yet in -L"),
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
