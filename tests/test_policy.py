"""Who may dial what: rules, the default, and the addresses that only an exact rule allows."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wstunnel.errors import UsageError
from wstunnel.forwards import parse_reverse
from wstunnel.policy import (
    NameVerdict,
    Policy,
    denial,
    exactly,
    listen_rule_for,
    may_listen,
    parse_listen_rule,
    parse_rule,
)
from wstunnel.targets import parse_target


def policy(
    *rules: str, own: Iterable[tuple[str, int]] = (), is_local: Callable[[str], bool] = lambda ip: ip == "10.0.0.1"
) -> Policy:
    return Policy([parse_rule(rule) for rule in rules], own_sockets=own, is_local=is_local)


def permits(subject: Policy, target: str, ip: str) -> bool:
    return subject.permits(parse_target(target), ip)


METADATA = ["169.254.169.254", "fd00:ec2::254", "168.63.129.16", "100.100.100.200", "192.0.0.192", "fd20:ce::254"]
SPECIAL = [
    *METADATA,
    "169.254.0.1",
    "169.254.255.255",
    "fe80::1",
    "febf::1",
    "224.0.0.1",
    "239.255.255.255",
    "ff02::1",
    "255.255.255.255",
]
WRAPPED_METADATA = [
    "::ffff:169.254.169.254",
    "::ffff:a9fe:a9fe",
    "64:ff9b::169.254.169.254",
    "64:ff9b:1::169.254.169.254",
    "64:ff9b:1:2:3:4:a9fe:a9fe",
    "2002:a9fe:a9fe::1",
    "::169.254.169.254",
    "::ffff:0:169.254.169.254",
    "::ffff:168.63.129.16",
    "64:ff9b::168.63.129.16",
    "2002:a83f:8110::",
]
WRAPPED = [*WRAPPED_METADATA, "::ffff:224.0.0.1", "64:ff9b::e000:1", "::ffff:255.255.255.255"]
ORDINARY = ["10.0.0.5", "127.0.0.1", "::1", "0.0.0.0", "::", "8.8.8.8", "2001:db8::1", "fd00::1", "64:ff9b::8.8.8.8"]


class TestDefault:
    @pytest.mark.parametrize("ip", [*ORDINARY, "169.253.255.255", "169.255.0.0", "223.255.255.255", "fec0::1"])
    @pytest.mark.parametrize("kind", ["tcp", "udp"])
    def test_ordinary_addresses(self, kind: str, ip: str) -> None:
        assert permits(policy(), f"{kind}:db:5432", ip)

    @pytest.mark.parametrize("ip", SPECIAL + WRAPPED)
    def test_special_addresses(self, ip: str) -> None:
        assert not permits(policy(), "db:80", ip)
        assert not permits(policy(), "udp:db:80", ip)

    def test_a_zone_id_hides_nothing(self) -> None:
        assert not permits(policy(), "db:80", "fe80::1%eth0")

    def test_unix(self) -> None:
        assert policy().names(parse_target("unix:/run/x")) is NameVerdict.REFUSED

    def test_names_wait_for_their_addresses(self) -> None:
        assert policy().names(parse_target("db:80")) is NameVerdict.BY_ADDRESS

    @pytest.mark.parametrize(
        ("target", "verdict"),
        [
            ("10.0.0.5:80", NameVerdict.ALLOWED),
            ("169.254.169.254:80", NameVerdict.REFUSED),
            ("[::ffff:169.254.169.254]:80", NameVerdict.REFUSED),
            ("[64:ff9b::a9fe:a9fe]:80", NameVerdict.REFUSED),
        ],
    )
    def test_literals_are_judged_at_once(self, target: str, verdict: NameVerdict) -> None:
        assert policy().names(parse_target(target)) is verdict

    def test_garbage_is_not_an_address(self) -> None:
        with pytest.raises(ValueError, match="garbage"):
            permits(policy(), "db:80", "garbage")


class TestRules:
    @pytest.mark.parametrize(
        ("rule", "target", "ip", "expected"),
        [
            # names, as asked
            ("db:5432", "db:5432", "10.0.0.5", True),
            ("DB:5432", "Db:5432", "10.0.0.5", True),
            ("db.:5432", "db:5432", "10.0.0.5", True),
            ("db:5432", "db.:5432", "10.0.0.5", True),
            ("db:5432", "db2:5432", "10.0.0.5", False),
            ("db:5432", "10.0.0.5:5432", "10.0.0.5", False),
            ("bücher.example:80", "xn--bcher-kva.example:80", "10.0.0.5", True),
            # wildcards
            ("*.example.com:443", "a.example.com:443", "10.0.0.5", True),
            ("*.Example.com:443", "a.b.EXAMPLE.com.:443", "10.0.0.5", True),
            ("*.example.com:443", "example.com:443", "10.0.0.5", False),
            ("*.example.com:443", "badexample.com:443", "10.0.0.5", False),
            # any host
            ("*:443", "a:443", "10.0.0.5", True),
            ("*:443", "10.0.0.5:443", "10.0.0.5", True),
            ("*:*", "udp:[::1]:1", "::1", True),
            # addresses, as resolved
            ("10.0.0.5:22", "10.0.0.5:22", "10.0.0.5", True),
            ("10.0.0.5:22", "db:22", "10.0.0.5", True),
            ("10.0.0.5:22", "db:22", "::ffff:10.0.0.5", True),
            ("10.0.0.5:22", "db:22", "10.0.0.6", False),
            ("10.0.0.5:22", "127.1:22", "127.0.0.1", False),
            ("[::1]:22", "db:22", "::1", True),
            ("[::ffff:10.0.0.5]:22", "db:22", "10.0.0.5", True),
            ("10.0.0.0/8:*", "db:22", "10.255.255.255", True),
            ("10.0.0.0/8:*", "db:22", "11.0.0.0", False),
            ("10.0.0.0/8:*", "db:22", "2001:db8::1", False),
            ("10.0.0.0/8:*", "db:22", "64:ff9b::10.0.0.5", True),
            ("10.0.0.0/8:*", "db:22", "2002:a00:5::1", False),
            ("0.0.0.0/0:*", "db:22", "8.8.8.8", True),
            ("[fd00::/8]:*", "db:22", "fd12::1", True),
            ("[fd00::/8]:*", "db:22", "fe12::1", False),
            ("[::/0]:*", "db:22", "64:ff9b::8.8.8.8", True),
            ("[::/0]:*", "db:22", "::ffff:10.0.0.5", False),
            ("[::ffff:10.0.0.0/104]:*", "db:22", "10.0.0.5", True),
            # kinds
            ("tcp:db:1", "tcp:db:1", "10.0.0.5", True),
            ("tcp:db:1", "udp:db:1", "10.0.0.5", False),
            ("udp:db:1", "udp:db:1", "10.0.0.5", True),
            ("udp:db:1", "tcp:db:1", "10.0.0.5", False),
            ("db:1", "udp:db:1", "10.0.0.5", True),
            # ports
            ("db:80-90", "db:79", "10.0.0.5", False),
            ("db:80-90", "db:80", "10.0.0.5", True),
            ("db:80-90", "db:90", "10.0.0.5", True),
            ("db:80-90", "db:91", "10.0.0.5", False),
            ("db:80", "db:81", "10.0.0.5", False),
            ("db:*", "db:65535", "10.0.0.5", True),
            ("10.0.0.0/8:80", "db:81", "10.0.0.5", False),
            ("unix:/run/*", "db:81", "10.0.0.5", False),
        ],
    )
    def test_one_rule(self, rule: str, target: str, ip: str, expected: bool) -> None:
        assert permits(policy(rule), target, ip) is expected

    @pytest.mark.parametrize(
        ("rules", "target", "verdict"),
        [
            (["db:5432"], "db:5432", NameVerdict.ALLOWED),
            (["*:5432"], "db:5432", NameVerdict.ALLOWED),
            (["10.0.0.0/8:5432", "db:5432"], "db:5432", NameVerdict.ALLOWED),
            (["10.0.0.0/8:5432"], "db:5432", NameVerdict.BY_ADDRESS),
            (["10.0.0.0/8:5432", "other:5432"], "db:5432", NameVerdict.BY_ADDRESS),
            (["10.0.0.0/8:22", "other:5432", "udp:*:*"], "db:5432", NameVerdict.REFUSED),
            (["10.0.0.0/8:22"], "10.0.0.5:22", NameVerdict.ALLOWED),
            (["10.0.0.0/8:22"], "11.0.0.5:22", NameVerdict.REFUSED),
            (["localhost:22"], "127.0.0.1:22", NameVerdict.REFUSED),
            (["10.0.0.0/8:22"], "unix:/x", NameVerdict.REFUSED),
            (["unix:/x"], "unix:/x", NameVerdict.ALLOWED),
        ],
    )
    def test_names(self, rules: list[str], target: str, verdict: NameVerdict) -> None:
        assert policy(*rules).names(parse_target(target)) is verdict

    def test_any_of_several_rules_is_enough(self) -> None:
        subject = policy("a:1", "10.0.0.0/8:2", "b:3")
        assert permits(subject, "b:3", "1.2.3.4")
        assert permits(subject, "b:2", "10.2.3.4")
        assert not permits(subject, "b:1", "10.2.3.4")

    @pytest.mark.parametrize(
        ("rule", "target", "expected"),
        [
            ("unix:/run/app.sock", "unix:/run/app.sock", True),
            ("unix:/run/*.sock", "unix:/run/app.sock", True),
            ("unix:/run/*", "unix:/run/app/sock", False),
            ("unix:/run/*/sock", "unix:/run/app/sock", True),
            ("unix:/run/*", "unix:/runner", False),
            ("*:*", "unix:/run/app.sock", False),
        ],
    )
    def test_unix_globs(self, rule: str, target: str, expected: bool) -> None:
        assert permits(policy(rule), target, "") is expected


class TestSpecialAddresses:
    @pytest.mark.parametrize("ip", SPECIAL + WRAPPED)
    @pytest.mark.parametrize("rule", ["*:*", "db:80", "*.example:*", "0.0.0.0/0:*", "[::/0]:*"])
    def test_no_wide_rule_and_no_name_allows_them(self, rule: str, ip: str) -> None:
        assert not permits(policy(rule), "db:80", ip)
        assert not permits(policy(rule), "db.example:80", ip)

    @pytest.mark.parametrize("ip", SPECIAL)
    def test_a_network_of_one_is_still_a_network(self, ip: str) -> None:
        rule = f"[{ip}/128]:*" if ":" in ip else f"{ip}/32:*"
        assert not permits(policy(rule), "db:80", ip)

    @pytest.mark.parametrize("ip", SPECIAL)
    def test_a_rule_that_names_one_allows_it(self, ip: str) -> None:
        literal = f"[{ip}]:80" if ":" in ip else f"{ip}:80"
        subject = policy(f"tcp:{literal}")
        assert permits(subject, literal, ip)
        assert permits(subject, "db:80", ip)
        assert not permits(subject, f"udp:{literal}", ip)
        assert not permits(subject, literal.replace(":80", ":81"), ip)
        assert all(not permits(subject, "db:80", other) for other in SPECIAL if other != ip)

    def test_mapped_is_the_same_address_and_translated_is_not(self) -> None:
        subject = policy("169.254.169.254:80")
        assert permits(subject, "db:80", "::ffff:169.254.169.254")
        assert not permits(subject, "db:80", "64:ff9b::169.254.169.254")
        assert permits(policy("[64:ff9b::a9fe:a9fe]:80"), "db:80", "64:ff9b::169.254.169.254")

    @given(st.ip_addresses(v=4))
    def test_mapped_addresses_fare_as_the_ipv4_ones(self, address: object) -> None:
        for subject in (policy(), policy("10.0.0.0/8:*", f"{address}:1")):
            for port in (1, 2):
                target = f"db:{port}"
                assert permits(subject, target, f"::ffff:{address}") == permits(subject, target, str(address))


class TestOwnSockets:
    @pytest.mark.parametrize("rule", [None, "*:*", "db:443", "127.0.0.1:443", "10.0.0.1:443", "[::1]:443"])
    @pytest.mark.parametrize("own", ["0.0.0.0", "::"])
    @pytest.mark.parametrize(
        "ip",
        [
            "127.0.0.1",
            "127.9.9.9",
            "::1",
            "0.0.0.0",
            "::",
            "10.0.0.1",
            "::ffff:127.0.0.1",
            "::ffff:0.0.0.0",
            "::ffff:10.0.0.1",
            "64:ff9b::10.0.0.1",
            "2002:a00:1::",
        ],
    )
    def test_a_wildcard_socket_is_on_every_local_address(self, rule: str | None, own: str, ip: str) -> None:
        subject = policy(*([rule] if rule else []), own=[(own, 443)])
        assert not permits(subject, "db:443", ip)

    def test_other_ports_and_machines_are_left_alone(self) -> None:
        subject = policy(own=[("0.0.0.0", 443), ("::", 8443)])
        assert permits(subject, "db:444", "127.0.0.1")
        assert permits(subject, "db:443", "10.0.0.2")

    def test_a_socket_on_one_address(self) -> None:
        subject = policy(own=[("127.0.0.1", 443), ("fd00::1", 444)])
        for ip, port, expected in [
            ("127.0.0.1", 443, False),
            ("0.0.0.0", 443, False),
            ("::ffff:127.0.0.1", 443, False),
            ("127.0.0.2", 443, True),
            ("10.0.0.1", 443, True),
            ("::1", 443, True),
            ("127.0.0.1", 444, True),
            ("fd00::1", 444, False),
        ]:
            assert permits(subject, f"db:{port}", ip) is expected, (ip, port)

    def test_the_ipv6_unspecified_address_is_the_ipv6_loopback(self) -> None:
        subject = policy(own=[("::1", 443)])
        assert not permits(subject, "db:443", "::")
        assert permits(subject, "db:443", "0.0.0.0")

    def test_an_own_literal_is_refused_before_anything_else(self) -> None:
        assert policy(own=[("::", 443)]).names(parse_target("127.0.0.1:443")) is NameVerdict.REFUSED

    def test_interfaces_are_asked_about_only_when_it_matters(self) -> None:
        def must_not_be_asked(ip: str) -> bool:
            raise AssertionError(ip)

        subject = policy(own=[("0.0.0.0", 443), ("10.0.0.9", 444)], is_local=must_not_be_asked)
        assert permits(subject, "db:444", "10.0.0.2")
        assert not permits(subject, "db:443", "127.0.0.1")


class TestReasons:
    def test_the_client_hears_what_it_said(self) -> None:
        assert denial(parse_target("db:5432")) == "the server's policy does not allow tcp:db:5432"

    @pytest.mark.parametrize(
        ("rules", "target", "ip", "words"),
        [
            ([], "db:80", "169.254.169.254", "169.254.169.254 is a cloud's metadata address"),
            ([], "db:80", "64:ff9b::a9fe:1", "64:ff9b::a9fe:1 stands for 169.254.0.1, a link-local address"),
            ([], "db:443", "::1", "[::1]:443 is a socket of this server itself"),
            (["a:1"], "db:80", "10.0.0.5", "no --allow rule matches tcp:db:80 at 10.0.0.5"),
            ([], "unix:/x", "", "no --allow rule matches unix:/x"),
        ],
    )
    def test_the_log_hears_the_rest(self, rules: list[str], target: str, ip: str, words: str) -> None:
        reason = policy(*rules, own=[("::", 443)]).refusal(parse_target(target), ip)
        assert reason is not None
        assert words in reason


@pytest.mark.parametrize(
    ("rule", "position", "message"),
    [
        ("", 0, "port is missing; ':*' is any port"),
        ("*", 1, "port is missing; ':*' is any port"),
        ("db", 2, "port is missing"),
        ("tcp:db", 6, "port is missing"),
        ("db:", 3, "port is missing"),
        ("db:**", 3, "1 to 65535"),
        ("db:0", 3, "1 to 65535"),
        ("db:90-80", 3, "backwards"),
        ("db:80,90", 3, "1 to 65535"),
        (":80", 0, "host is missing"),
        ("**:80", 0, "'*'"),
        ("a.*.com:80", 2, "'*'"),
        ("*.*.com:80", 2, "'*'"),
        ("*.:80", 2, "host is missing"),
        ("*.0.0.1:80", 0, "full"),
        ("*.[::1]:80", 0, "full"),
        ("127.1:80", 0, "full"),
        ("2130706433:80", 0, "full"),
        ("0x7f.1:80", 0, "full"),
        ("x.0x7f:80", 0, "full"),
        ("10.0.0.5.:80", 0, "full"),
        ("::1:80", 0, "brackets"),
        ("fd00::/8:80", 0, "brackets"),
        ("[fe80::1%eth0]:80", 8, "zone id"),
        ("[fd00::]/8:80", 8, "after the bracket"),
        ("[fd00::/8:80", 0, "not closed"),
        ("[10.0.0.0/8]:80", 1, "not the address of a network"),
        ("db/8:80", 0, "not the address of a network"),
        ("127.1/8:80", 0, "not the address of a network"),
        ("10.0.0.1/8:80", 0, "the network is 10.0.0.0/8"),
        ("[fd00::1/8]:80", 1, "the network is fd00::/8"),
        ("10.0.0.0/33:80", 9, "0 to 32"),
        ("[fd00::/129]:80", 8, "0 to 128"),
        ("10.0.0.0/:80", 9, "0 to 32"),
        ("10.0.0.0/-1:80", 9, "0 to 32"),
        ("10.0.0.0/255.0.0.0:80", 9, "0 to 32"),
        ("10.0.0.0/٨:80", 9, "0 to 32"),
        ("10.0.0.0/8/8:80", 9, "0 to 32"),
        ("http://db:80", 5, "URL"),
        ("unix:run/*", 5, "starts with '/'"),
        ("unix:/run/../*", 10, "'..'"),
    ],
)
def test_rules_that_are_refused(rule: str, position: int, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_rule(rule)
    assert message in caught.value.message
    assert caught.value.position == position
    assert "10.0.0.0/8:*" in str(caught.value)


def test_rules_compare_by_value_for_a_frozen_configuration() -> None:
    assert parse_rule("DB:80") == parse_rule("db:80-80")
    assert len({parse_rule("10.0.0.0/8:*"), parse_rule("10.0.0.0/8:1-65535")}) == 1


@given(st.text(st.sampled_from("1a:.-[]*/tcp%ü "), max_size=24))
def test_any_text_gives_a_rule_or_a_usage_error(text: str) -> None:
    try:
        rule = parse_rule(text)
    except UsageError as error:
        assert 0 <= error.position <= len(text)
        return
    assert 1 <= rule.low <= rule.high <= 65535


class TestExactly:
    """A rule for what a user named at this end."""

    @pytest.mark.parametrize(
        ("text", "other"),
        [
            ("unix:/run/a[1]*?.sock", "unix:/run/a1xy.sock"),
            ("tcp:db:5432", "tcp:db:5433"),
            ("tcp:db:5432", "tcp:db2:5432"),
            ("tcp:169.254.169.254:80", "tcp:169.254.169.253:80"),
            ("udp:db:53", "tcp:db:53"),
        ],
    )
    def test_it_allows_that_target_and_no_other(self, text: str, other: str) -> None:
        policy = Policy((exactly(parse_target(text)),), own_sockets=(), is_local=lambda _: False)
        assert policy.names(parse_target(text)) is NameVerdict.ALLOWED
        assert policy.names(parse_target(other)) is NameVerdict.REFUSED


class TestListenRules:
    @pytest.mark.parametrize(
        ("rule", "covered", "refused"),
        [
            (
                "8080",
                ["8080:h:1", "127.0.0.1:8080:h:1"],
                ["8081:h:1", "*:8080:h:1", "[::1]:8080:h:1", "0:h:1", "/x:h:1"],
            ),
            ("8000-8010", ["8000:h:1", "8010"], ["7999:h:1", "8011"]),
            ("*", ["1:h:1", "65535", "0:h:1"], ["*:1:h:1", "localhost:1:h:1", "/x:h:1"]),
            ("localhost:*", ["localhost:1:h:1", "[::1]:1:h:1", "1:h:1"], ["*:1:h:1", "10.0.0.1:1:h:1"]),
            ("[::1]:1-2", ["[::1]:2:h:1"], ["1:h:1", "localhost:1:h:1"]),
            ("10.0.0.1:80", ["10.0.0.1:80:h:1"], ["80:h:1", "*:80:h:1"]),
            ("*:80", ["*:80:h:1", "80:h:1", "[::1]:80:h:1"], ["*:81:h:1", "*:0:h:1"]),
            ("unix:/run/t/*.sock", ["/run/t/a.sock:h:1"], ["/run/t/a:h:1", "/run/t/b/a.sock:h:1", "1:h:1"]),
        ],
    )
    def test_what_a_rule_covers(self, rule: str, covered: list[str], refused: list[str]) -> None:
        rules = [parse_listen_rule(rule)]
        assert [spec for spec in (*covered, *refused) if may_listen(rules, parse_reverse(spec)[0])] == covered

    def test_without_rules_nothing_may_be_had(self) -> None:
        assert not may_listen([], parse_reverse("8080:h:1")[0])

    @pytest.mark.parametrize(
        ("text", "position"),
        [("", 0), ("x", 0), ("db:80", 0), ("0", 0), ("9-1", 0), ("[::1]", 0), ("1:2:3", None), ("unix:x", 5)],
    )
    def test_mistakes_point_at_the_part(self, text: str, position: int | None) -> None:
        with pytest.raises(UsageError) as caught:
            parse_listen_rule(text)
        assert position is None or caught.value.position == position
        assert "[ADDR:]PORT" in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ("8080:web:80", "127.0.0.1:8080"),
        ("1080", "127.0.0.1:1080"),
        ("0:web:80", "'127.0.0.1:*'"),
        ("*:8080:web:80", "'*:8080'"),
        ("[::1]:8080:web:80", "'[::1]:8080'"),
        ("localhost:8080:web:80", "localhost:8080"),
        ("/run/a b.sock:web:80", "'unix:/run/a b.sock'"),
        ("/run/a[1]*?.sock:web:80", "'unix:/run/a[[]1][*][?].sock'"),
    ],
)
def test_the_rule_that_an_operator_is_told_of_is_one_and_is_enough(spec: str, rule: str) -> None:
    (forward,) = parse_reverse(spec)
    assert listen_rule_for(forward) == rule
    (typed,) = shlex.split(rule)
    assert may_listen([parse_listen_rule(typed)], forward)
