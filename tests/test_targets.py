"""The TARGET grammar: what is read, what is refused, and where the message points."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wstunnel.errors import UsageError
from wstunnel.targets import (
    TEXT_CHARACTERS,
    Part,
    Target,
    address_family,
    join_host_port,
    parse_host_port,
    parse_port_range,
    parse_target,
)


@pytest.mark.parametrize(
    ("text", "target", "canonical"),
    [
        ("db:5432", Target("tcp", "db", 5432, ""), "tcp:db:5432"),
        ("tcp:db:5432", Target("tcp", "db", 5432, ""), "tcp:db:5432"),
        ("DB.Example.COM:1", Target("tcp", "db.example.com", 1, ""), "tcp:db.example.com:1"),
        ("db.:65535", Target("tcp", "db.", 65535, ""), "tcp:db.:65535"),
        ("my_host-1:80", Target("tcp", "my_host-1", 80, ""), "tcp:my_host-1:80"),
        ("10.0.0.5:22", Target("tcp", "10.0.0.5", 22, ""), "tcp:10.0.0.5:22"),
        ("[::1]:22", Target("tcp", "::1", 22, ""), "tcp:[::1]:22"),
        ("tcp:[0:0::0001]:22", Target("tcp", "::1", 22, ""), "tcp:[::1]:22"),
        ("[FD00::A]:22", Target("tcp", "fd00::a", 22, ""), "tcp:[fd00::a]:22"),
        ("[::FFFF:1.2.3.4]:22", Target("tcp", "::ffff:1.2.3.4", 22, ""), "tcp:[::ffff:1.2.3.4]:22"),
        ("udp:9.9.9.9:53", Target("udp", "9.9.9.9", 53, ""), "udp:9.9.9.9:53"),
        ("udp:[fd00::1]:53", Target("udp", "fd00::1", 53, ""), "udp:[fd00::1]:53"),
        ("tcp:tcp:22", Target("tcp", "tcp", 22, ""), "tcp:tcp:22"),
        ("unix:/run/app.sock", Target("unix", "", 0, "/run/app.sock"), "unix:/run/app.sock"),
        ("unix:/run/a:b c", Target("unix", "", 0, "/run/a:b c"), "unix:/run/a:b c"),
        ("bücher.example:80", Target("tcp", "xn--bcher-kva.example", 80, ""), "tcp:xn--bcher-kva.example:80"),
        ("BÜCHER.example.:80", Target("tcp", "xn--bcher-kva.example.", 80, ""), "tcp:xn--bcher-kva.example.:80"),
        # Nameprep makes an address of full-width digits and ideographic stops: an address it is.
        ("１６９。254.169.254:80", Target("tcp", "169.254.169.254", 80, ""), "tcp:169.254.169.254:80"),
    ],
)
def test_reads_a_target_and_writes_it_canonically(text: str, target: Target, canonical: str) -> None:
    assert parse_target(text) == target
    assert str(target) == canonical
    assert parse_target(canonical) == target


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("", 0, "host and the port are missing"),
        ("db", 2, "port is missing"),
        ("tcp:", 4, "host and the port are missing"),
        ("tcp:22", 6, "port is missing"),
        ("db:", 3, "port is missing"),
        (":22", 0, "host is missing"),
        ("udp::53", 4, "host is missing"),
        ("db:0", 3, "1 to 65535"),
        ("db:65536", 3, "1 to 65535"),
        ("db:022", 3, "1 to 65535"),
        ("db:+22", 3, "1 to 65535"),
        ("db: 22", 3, "1 to 65535"),
        ("db:22 ", 3, "1 to 65535"),
        ("db:22\n", 3, "1 to 65535"),
        ("db:٢٢", 3, "1 to 65535"),
        ("db:ssh", 3, "1 to 65535"),
        ("db:999999999999", 3, "1 to 65535"),
        ("::1:22", 0, "brackets"),
        ("fe80::1%eth0:22", 0, "brackets"),
        ("a:b:22", 1, "colon too many"),
        ("TCP:db:22", 3, "colon too many"),
        ("[::1:22", 0, "not closed"),
        ("[::1]22", 5, "after the bracket"),
        ("[::1]", 5, "port is missing"),
        ("[]:22", 1, "not an IPv6 address"),
        ("[db]:22", 1, "not an IPv6 address"),
        ("[10.0.0.5]:22", 1, "not an IPv6 address"),
        ("[::1::]:22", 1, "not an IPv6 address"),
        ("[fe80::1%eth0]:22", 8, "zone id"),
        ("db one:22", 2, "' '"),
        ("db\x00:22", 2, "'\\x00'"),
        ("db\x1b[0m:22", 2, "'\\x1b'"),
        ("tcp:u@db:22", 5, "'@'"),
        ("*:22", 0, "'*'"),
        ("db%eth0:22", 2, "'%'"),
        ("a..b:22", 0, "empty part"),
        (".:22", 0, "empty part"),
        (".a:22", 0, "empty part"),
        ("a" * 64 + ":22", 0, "at most 63"),
        ("a" * 63 + "." + "b" * 63 + "." + "c" * 63 + "." + "d" * 62 + ":22", 0, "at most 253"),
        ("bü" + "x" * 70 + ":22", 0, "international"),
        ("ü／x:22", 0, "international"),  # a full-width slash becomes '/'
        ("ü\ud800:22", 0, "international"),
        ("ü\u200e:22", 0, "international"),
        ("tcp://db:22", 4, "URL"),
        ("http://db:22", 5, "URL"),
        ("unix:run/app", 5, "starts with '/'"),
        ("unix:", 5, "starts with '/'"),
        ("unix:/run/\x00", 10, "printed"),
        ("unix:/run/../etc", 10, "'..'"),
        ("unix:/run/./x", 10, "'..'"),
        ("unix:/run//x", 10, "'//'"),
        ("unix:/run/", 10, "final '/'"),
        ("unix:/" + "x" * 107, 5, "107 bytes"),
    ],
)
def test_refuses_and_points_at_the_part(text: str, position: int, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_target(text)
    assert message in caught.value.message
    assert caught.value.position == position
    assert caught.value.text == text
    assert caught.value.grammar is not None
    assert "[::1]:22" in caught.value.grammar


def test_longest_name_and_path_are_taken() -> None:
    name = "a" * 63 + "." + "b" * 63 + "." + "c" * 63 + "." + "d" * 61
    assert parse_target(f"{name}:1").host == name
    assert parse_target(f"{name}.:1").host == name + "."
    assert parse_target("unix:/" + "x" * 106).path == "/" + "x" * 106


def test_length_is_checked_before_anything_else() -> None:
    with pytest.raises(UsageError, match="at most 1024") as caught:
        parse_target("a" * (TEXT_CHARACTERS + 1))
    assert caught.value.text is None, "a peer's megabyte is not repeated"
    with pytest.raises(UsageError, match="port is missing"):
        parse_target("a" * TEXT_CHARACTERS)


@given(st.text(max_size=60))
def test_any_text_gives_a_stable_target_or_a_usage_error(text: str) -> None:
    try:
        target = parse_target(text)
    except UsageError as error:
        assert 0 <= error.position <= len(text)
        return
    assert parse_target(str(target)) == target


@given(
    st.sampled_from(["", "tcp:", "udp:"]),
    st.text(st.sampled_from("aZ0.-_:[]%ü／x"), max_size=12),
    st.integers(-1, 65537),
)
def test_anything_like_a_target_gives_a_checked_one_or_a_usage_error(kind: str, host: str, port: int) -> None:
    try:
        target = parse_target(f"{kind}{host}:{port}")
    except UsageError:
        return
    assert parse_target(str(target)) == target
    assert target.host.isascii()
    assert not set(target.host) & set("[]%/ ")
    assert 1 <= target.port <= 65535


@given(st.ip_addresses(), st.integers(1, 65535))
def test_every_address_is_read_as_itself(address: object, port: int) -> None:
    target = parse_target(join_host_port(str(address), port))
    family = address_family(target.host)
    assert family is not None
    assert socket.inet_pton(family, target.host) == address.packed  # type: ignore[attr-defined]


@pytest.mark.parametrize("host", ["127.1", "0x7f.1", "2130706433", "0177.0.0.1", "127.0.0.1.", "1.2.3.4.5"])
def test_numeric_oddities_stay_names_for_the_resolver(host: str) -> None:
    assert parse_target(f"{host}:22").host == host
    assert address_family(host) is None


@pytest.mark.parametrize(
    ("host", "family"),
    [
        ("127.0.0.1", socket.AF_INET),
        ("::1", socket.AF_INET6),
        ("db", None),
        ("", None),
        ("\x00", None),
        ("\ud800", None),
        ("fe80::1%lo", None),
    ],
)
def test_address_family(host: str, family: socket.AddressFamily | None) -> None:
    assert address_family(host) == family


class TestHostPort:
    @pytest.mark.parametrize(
        ("text", "default", "expected"),
        [
            ("db:22", None, ("db", 22)),
            ("db:22", 443, ("db", 22)),
            ("db", 443, ("db", 443)),
            ("[::1]", 443, ("::1", 443)),
            ("[::1]:8443", 443, ("::1", 8443)),
            ("tcp:22", None, ("tcp", 22)),
        ],
    )
    def test_reads(self, text: str, default: int | None, expected: tuple[str, int]) -> None:
        assert parse_host_port(text, default_port=default) == expected

    @pytest.mark.parametrize(
        ("text", "default", "position"),
        [
            ("db", None, 2),
            ("db:", 443, 3),
            ("::1", 443, 0),
            ("fe80::1", 443, 0),
            ("", 443, 0),
            ("db:x", None, 3),
            ("unix:/x", 443, 5),
            ("x" * 1025, 443, 0),
        ],
    )
    def test_refuses(self, text: str, default: int | None, position: int) -> None:
        with pytest.raises(UsageError) as caught:
            parse_host_port(text, default_port=default)
        assert caught.value.position == position

    def test_join_puts_brackets_round_ipv6_only(self) -> None:
        assert join_host_port("::1", 22) == "[::1]:22"
        assert join_host_port("db", 22) == "db:22"


@pytest.mark.parametrize(("text", "expected"), [("80", (80, 80)), ("80-80", (80, 80)), ("80-90", (80, 90))])
def test_port_range(text: str, expected: tuple[int, int]) -> None:
    assert parse_port_range(Part.whole(text, "")) == expected


@pytest.mark.parametrize(("text", "position"), [("90-80", 0), ("80-", 3), ("-80", 0), ("1-2-3", 2), ("0-5", 0)])
def test_port_range_refuses(text: str, position: int) -> None:
    with pytest.raises(UsageError) as caught:
        parse_port_range(Part.whole(text, ""))
    assert caught.value.position == position


def test_a_message_shows_a_caret_under_the_fault() -> None:
    with pytest.raises(UsageError) as caught:
        parse_target("tcp:db:0")
    assert str(caught.value).splitlines()[1:3] == ["    tcp:db:0", "           ^"]
