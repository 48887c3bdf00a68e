"""Hosts as proxies' protocols carry them: the same canonical texts as everywhere else."""

from __future__ import annotations

import socket
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wstunnel.errors import UsageError
from wstunnel.targets import parse_target
from wstunnel.wire.addresses import (
    pack_address,
    parse_host,
    unmapped,
    unmapped_network,
    unpack_address,
    url_address,
)


class TestPacked:
    @given(st.binary(min_size=4, max_size=4))
    def test_ipv4(self, packed: bytes) -> None:
        text = socket.inet_ntop(socket.AF_INET, packed)
        assert unpack_address(packed) == text
        assert pack_address(text) == packed

    @given(st.lists(st.sampled_from([0, 0, 1, 0xFFFF, 0x102, 0xABCD]), min_size=8, max_size=8))
    @example([0, 0, 0, 0, 0, 0xFFFF, 0x0102, 0x0304])
    @example([0, 0, 0, 0, 0, 0xFFFF, 0, 0])
    @example([0, 0, 0, 0, 0, 0, 1, 0])
    @example([0, 0, 0, 0, 0, 0, 0, 1])
    @example([0, 0, 0, 0, 0, 0, 0, 0])
    @example([1, 0, 0, 0, 0, 0xFFFF, 0x0102, 0x0304])
    @example([1, 0, 1, 1, 0, 1, 0, 0])
    def test_ipv6(self, groups: list[int]) -> None:
        packed = b"".join(group.to_bytes(2, "big") for group in groups)
        text = socket.inet_ntop(socket.AF_INET6, packed)
        assert unpack_address(packed) == text
        assert pack_address(text) == packed

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("::ffff:127.0.0.1", "::ffff:7f00:1"),
            ("::ffff:0.0.0.0", "::ffff:0:0"),
            ("::1.2.3.4", "::102:304"),
            ("::", "::"),
            ("1:0:0:2:0:0:0:3", "1:0:0:2::3"),
            ("1:0:2:3:4:5:6:7", "1:0:2:3:4:5:6:7"),
        ],
    )
    def test_as_browsers_write_it(self, text: str, shown: str) -> None:
        """The first longest run of two zeros or more is left out, and nothing has dots."""
        assert url_address(socket.inet_pton(socket.AF_INET6, text)) == shown

    @pytest.mark.parametrize(
        "text", ["", "a", "localhost", "1.2.3", "1.2.3.256", "01.2.3.4", "::g", "fe80::1%eth0", "[::1]", "1.2.3.4:5"]
    )
    def test_anything_else_is_none(self, text: str) -> None:
        assert pack_address(text) is None


class TestHosts:
    @pytest.mark.parametrize(
        ("text", "host"),
        [
            ("Example.ORG", "example.org"),
            ("example.org.", "example.org."),
            ("db_1", "db_1"),
            ("127.1", "127.1"),
            ("1.2.3.4", "1.2.3.4"),
            ("::1", "::1"),
            ("[2001:DB8:0::1]", "2001:db8::1"),
            ("::ffff:1.2.3.4", "::ffff:1.2.3.4"),
            ("a" * 63 + ".b", "a" * 63 + ".b"),
            (("a" * 49 + ".") * 5 + "abc.", ("a" * 49 + ".") * 5 + "abc."),
        ],
    )
    def test_right(self, text: str, host: str) -> None:
        assert parse_host(text) == host

    @pytest.mark.parametrize(
        "text",
        [
            *("", ".", "a..b", ".a", "a b", "a/b", "a@b", "a:b", "[a]", "[1.2.3.4]", "[::1", "::1]", "[]", "a\0b"),
            *("fe80::1%eth0", "[fe80::1%1]", "b\xfccher", "\u212a", "a" * 64, ("a" * 49 + ".") * 5 + "abcd", "a\n"),
        ],
    )
    def test_wrong(self, text: str) -> None:
        assert parse_host(text) is None

    @given(st.text(st.sampled_from("aZ0.-_:[]%/\u00e4 "), max_size=20) | st.ip_addresses().map(str))
    def test_as_targets_have_it(self, text: str) -> None:
        """What is a host here is the same host in a target, and nothing more is."""
        host = parse_host(text)
        if host is None:
            return
        bracketed = text if ":" not in text or text.startswith("[") else f"[{text}]"
        assert parse_target(f"tcp:{bracketed}:1").host == host

    @given(st.text(st.sampled_from("aZ0.-_:[]%/ "), max_size=12))
    def test_what_targets_have(self, text: str) -> None:
        try:
            host = parse_target(f"tcp:{text}:1").host
        except UsageError:
            return
        assert parse_host(text) == host


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"), ("::ffff:10.0.0.5/128", "10.0.0.5/32"), ("::ffff:0:0/96", "0.0.0.0/0"),
        ("::ffff:0:0/95", None), ("::/0", None), ("fd00::/8", None), ("10.0.0.0/8", None),
    ],
)  # fmt: skip
def test_networks_of_mapped_addresses_are_ipv4(network: str, expected: str | None) -> None:
    given = ip_network(network, strict=False)
    assert unmapped_network(given) == (given if expected is None else ip_network(expected))


@pytest.mark.parametrize(
    ("address", "expected"), [("::ffff:10.0.0.5", "10.0.0.5"), ("10.0.0.5", "10.0.0.5"), ("::a00:5", "::a00:5")]
)
def test_mapped_addresses_are_ipv4(address: str, expected: str) -> None:
    assert unmapped(ip_address(address)) == ip_address(expected)
