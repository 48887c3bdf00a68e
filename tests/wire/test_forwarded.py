"""wire/forwarded.py: the words of proxies about whom they pass on."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wstunnel.errors import ProtocolError
from wstunnel.wire.addresses import unpack_address
from wstunnel.wire.forwarded import Hop, forwarded, x_forwarded_for

IPV4, IPV6 = "203.0.113.7", "2001:db8::7"
ADDRESSES = st.ip_addresses().map(lambda address: unpack_address(address.packed))
PORTS = st.integers(0, 65535)


class TestXForwardedFor:
    @pytest.mark.parametrize(
        ("field", "hops"),
        [
            (IPV4, [Hop(IPV4)]),
            (IPV6, [Hop(IPV6)]),
            ("2001:DB8:0::7", [Hop(IPV6)]),
            (f"[{IPV6}]", [Hop(IPV6)]),
            (f"{IPV4}:5000", [Hop(IPV4, 5000)]),
            (f"[{IPV6}]:5000", [Hop(IPV6, 5000)]),
            ("::ffff:203.0.113.7", [Hop("::ffff:203.0.113.7")]),
            (f"{IPV4}, {IPV6} ,\t10.0.0.1", [Hop(IPV4), Hop(IPV6), Hop("10.0.0.1")]),
            (f"unknown, {IPV4}", [Hop(None), Hop(IPV4)]),
            ("Unknown", [Hop(None)]),
            (f",, {IPV4},", [Hop(IPV4)]),
            ("", []),
            (" , ", []),
        ],
    )
    def test_one_field(self, field: str, hops: list[Hop]) -> None:
        assert x_forwarded_for([field]) == hops

    def test_several_fields_are_one_list(self) -> None:
        assert x_forwarded_for([f"{IPV4}, 10.0.0.1", IPV6]) == [Hop(IPV4), Hop("10.0.0.1"), Hop(IPV6)]
        assert x_forwarded_for([]) == []

    @pytest.mark.parametrize(
        "field",
        [
            "example.org", "203.0.113", "203.0.113.256", "203.0.113.07", "203.0.113.7 10.0.0.1", "203.0.113.7:",
            "203.0.113.7:65536", "203.0.113.7:123456", "203.0.113.7:http", "203.0.113.7:-1", "[203.0.113.7]",
            "2001:db8::7::1", "2001:db8::7%eth0", "[2001:db8::7", "[2001:db8::7]5000", "[2001:db8::7]:", "[]", "[",
            '"203.0.113.7"', "for=203.0.113.7", "203.0.113.7;10.0.0.1", "\u0662\u0660.0.0.1", "203.0.113.7:\u0665",
        ],
    )  # fmt: skip
    def test_malformed(self, field: str) -> None:
        for text in (field, f"{IPV4}, {field}", f"{field}, {IPV4}"):
            with pytest.raises(ProtocolError):
                x_forwarded_for([text])

    @given(ADDRESSES, PORTS)
    def test_what_proxies_write(self, host: str, port: int) -> None:
        assert x_forwarded_for([host]) == [Hop(host)]
        with_port = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        assert x_forwarded_for([with_port]) == [Hop(host, port)]


class TestRfc7239:
    @pytest.mark.parametrize(
        ("field", "hops"),
        [
            # §4
            ('for="_gazonk"', [Hop(None)]),
            ('For="[2001:db8:cafe::17]:4711"', [Hop("2001:db8:cafe::17", 4711)]),
            ("for=192.0.2.60;proto=http;by=203.0.113.43", [Hop("192.0.2.60")]),
            ("for=192.0.2.43, for=198.51.100.17", [Hop("192.0.2.43"), Hop("198.51.100.17")]),
            # §6
            ("for=_hidden, for=_SEVKISEK", [Hop(None), Hop(None)]),
            ('for="192.0.2.43:47011"', [Hop("192.0.2.43", 47011)]),
            ('for="192.0.2.43:_secret"', [Hop("192.0.2.43")]),
            ('for="unknown:80"', [Hop(None)]),
            ("for=UNKNOWN", [Hop(None)]),
            # §7.1: a list may be in several lines, and have empty members
            ('for=192.0.2.43,for="[2001:db8::17]",for=unknown', [Hop("192.0.2.43"), Hop("2001:db8::17"), Hop(None)]),
            ("", []),
            (" ,;, ;;", []),
            ("proto=https", [Hop(None)]),
            (";for=192.0.2.1;", [Hop("192.0.2.1")]),
            ("proto=https ; for=192.0.2.1\t, for=192.0.2.2", [Hop("192.0.2.1"), Hop("192.0.2.2")]),
            # Commas, semicolons and quotation marks inside a quoted string
            (r'host="a,b;for=10.0.0.1\"";for=192.0.2.1', [Hop("192.0.2.1")]),
            (r'for="\1\92.0.2.1"', [Hop("192.0.2.1")]),
        ],
    )  # fmt: skip
    def test_one_field(self, field: str, hops: list[Hop]) -> None:
        assert forwarded([field]) == hops

    def test_several_fields_are_one_list(self) -> None:
        assert forwarded(["for=192.0.2.1", 'for="[::1]"']) == [Hop("192.0.2.1"), Hop("::1")]

    def test_a_quotation_mark_that_is_left_open_does_not_reach_into_the_next_field(self) -> None:
        with pytest.raises(ProtocolError):
            forwarded(['for=192.0.2.1;x="', '";for=192.0.2.2'])

    @pytest.mark.parametrize(
        "field",
        [
            "192.0.2.1", "for", "for=", "for =192.0.2.1", "for= 192.0.2.1", "=192.0.2.1", 'for="192.0.2.1', 'for="a\\',
            "for=192.0.2.1 by=192.0.2.2", "for=192.0.2.1;for=192.0.2.2", "for=192.0.2.1;FOR=192.0.2.1",
            "for=192.0.2.1:80", "for=[2001:db8::7]", 'for="2001:db8::7"', 'for="[192.0.2.1]"', "for=example",
            'for="192.0.2.1:"', 'for="192.0.2.1:65536"', 'for="192.0.2.1:a"', 'for="_"', 'for=""', 'for="[::1"',
            'for="[::1]80"', 'for=192.0.2.1"', 'for="192.0.2.1"x', "for=192.0.2.1\x00", 'for="192.0.2.1\x7f"',
        ],
    )  # fmt: skip
    def test_malformed(self, field: str) -> None:
        for text in (field, f"for=192.0.2.9, {field}", f"{field}, for=192.0.2.9"):
            with pytest.raises(ProtocolError):
                forwarded([text])

    @given(st.lists(st.tuples(ADDRESSES, st.none() | PORTS), max_size=5))
    def test_what_proxies_write(self, nodes: list[tuple[str, int | None]]) -> None:
        texts = []
        for host, port in nodes:
            node = f"[{host}]" if ":" in host else host
            texts.append(f'for="{node}"' if port is None else f'proto=http;for="{node}:{port}"')
        assert forwarded([", ".join(texts)]) == [Hop(*node) for node in nodes]
        assert forwarded(texts) == [Hop(*node) for node in nodes]


PIECES = st.lists(
    st.sampled_from(
        ["for", "FOR=", "=", '"', "\\", ";", ",", " ", "[", "]", ":", "::1", "192.0.2.1", "unknown", "_x", "80", "é"]
    )
    | st.characters(max_codepoint=255),
    max_size=12,
).map("".join)


@given(st.lists(PIECES, max_size=3))
def test_whatever_comes_hops_are_addresses_or_nothing(fields: list[str]) -> None:
    for read in (x_forwarded_for, forwarded):
        try:
            hops = read(fields)
        except ProtocolError:
            continue
        for host, port in hops:
            assert port is None or (host is not None and 0 <= port <= 65535)
            assert host is None or unpack_address(ip_address(host).packed) == host


def test_16_KiB_of_the_worst_take_no_longer_than_their_bytes() -> None:
    """Nothing in the grammar backtracks: these would take for ever if it did."""
    for field in ('for="' + "\\a" * 8000, 'for="' + "a" * 16000, "a" * 16000, ";" * 16000, "for=a;" * 2, '"' * 16000):
        with pytest.raises(ProtocolError):
            forwarded([field + "\x00"])
        with pytest.raises(ProtocolError):
            x_forwarded_for([field])
