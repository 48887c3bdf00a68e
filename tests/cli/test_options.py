"""Shared flags and their grammars."""

from __future__ import annotations

import click
import pytest

from wstunnel.cli import options, reports
from wstunnel.errors import UsageError


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("[::1]", "::1"), ("0:0::1", "::1"), ("fe80::1%eth0", "fe80::1%eth0")],
)
def test_bind(text: str, address: str) -> None:
    assert options.parse_bind(text) == address


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("unix:/run/x.sock", ("/run/x.sock", 0o600)),
        ("unix:/run/x.sock;mode=666", ("/run/x.sock", 0o666)),
        ("unix:/run/x.sock;mode=0660", ("/run/x.sock", 0o660)),
        ("unix:/x", ("/x", 0o600)),
    ],
)
def test_bind_to_a_unix_socket(text: str, place: tuple[str, int]) -> None:
    assert options.parse_bind(text) == place


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("unix:", 5),
        ("unix:x", 5),
        ("unix:/a/../b", 8),
        ("unix:/x;", 8),
        ("unix:/x;mode=", 8),
        ("unix:/x;mode=999", 8),
        ("unix:/x;mode=66", 8),
        ("unix:/x;proxy=v1", 8),
        ("unix:/x;mode=600;mode=666", 8),
        ("unix:/" + 107 * "x", 5),
    ],
)
def test_bind_to_no_unix_socket(text: str, position: int) -> None:
    with pytest.raises(UsageError) as caught:
        options.parse_bind(text)
    assert (caught.value.position, caught.value.grammar) == (position, options.BIND_GRAMMAR)


@pytest.mark.parametrize("text", ["", "localhost", "127.1", "1.2.3.4:80", "[::1", "[]", "*", "/x"])
def test_bind_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        options.parse_bind(text)
    assert caught.value.grammar == options.BIND_GRAMMAR


@pytest.mark.parametrize("text", ["/", "/tunnel", "/a/b.c~d_e-f", "/%20x", "/a:b@c;d=e!$&'()*+,"])
def test_path(text: str) -> None:
    assert options.parse_path(text) == text


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("", 0),
        ("tunnel", 0),
        ("/a b", 2),
        ("/a?b", 2),
        ("/#", 1),
        ("/é", 1),
        ("/\n", 1),
        ("/a%2", 2),
        ("/[", 1),
        ("/\x7f", 1),
    ],
)
def test_path_refused(text: str, position: int) -> None:
    with pytest.raises(UsageError) as caught:
        options.parse_path(text)
    assert caught.value.position == position
    assert caught.value.grammar == options.PATH_GRAMMAR


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("90", 90),
        ("90s", 90),
        ("5m", 300),
        ("1h", 3600),
        ("1h30m", 5400),
        ("2h5", 7205),
        ("1d", 86400),
        ("1d2h3m4s", 93784),
        ("007m", 420),
        ("7d", 7 * 86400),
        ("604800", 7 * 86400),
    ],
)
def test_duration(text: str, seconds: int) -> None:
    assert options.parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("", 0),
        ("m", 0),
        ("-1", 0),
        (" 5m", 0),
        ("5m ", 2),
        ("5 m", 1),
        ("1.5h", 1),
        ("5min", 2),
        ("5M", 1),
        ("1h 30m", 2),
        ("90x", 2),
        ("5m\n", 2),
        ("\u0665m", 0),  # ARABIC-INDIC DIGIT FIVE
    ],
)
def test_duration_refused(text: str, position: int) -> None:
    with pytest.raises(UsageError, match=r"^not a time") as caught:
        options.parse_duration(text)
    assert caught.value.position == position
    assert caught.value.grammar == options.DURATION_GRAMMAR


@pytest.mark.parametrize("text", ["8d", "604801", "6d24h1s", "999999999d"])
def test_duration_of_more_than_a_week(text: str) -> None:
    with pytest.raises(UsageError, match=r"^longer than a week") as caught:
        options.parse_duration(text)
    assert caught.value.grammar == options.DURATION_GRAMMAR


@pytest.mark.parametrize(("text", "seconds"), [("300", 300), ("5m", 300), ("1h", 3600)])
def test_the_flag_takes_a_duration(text: str, seconds: int) -> None:
    parameter = click.Option(["--resume-window"])
    assert options.DURATION.convert(text, parameter, None) == seconds


def test_the_flag_s_error_names_it() -> None:
    parameter = click.Option(["--resume-window"])
    with pytest.raises(UsageError, match="--resume-window") as caught:
        options.DURATION.convert("soon", parameter, None)
    assert caught.value.grammar == options.DURATION_GRAMMAR


def test_an_argument_s_error_has_no_flag() -> None:
    parameter = click.Argument(["bind"])
    with pytest.raises(UsageError, match=r"^not an IP address"):
        options.BIND.convert("x", parameter, None)


@pytest.mark.parametrize(
    ("arguments", "level"),
    [
        ([], 0),
        (["-v"], 1),
        (["-vv"], 2),
        (["-q"], -1),
        (["-v", "-q"], 0),
        (["-qq"], -2),
        (["--verbose", "-v", "--quiet"], 1),
    ],
)
def test_verbosity(arguments: list[str], level: int) -> None:
    seen: list[int] = []

    @click.command()
    @options.logging
    @click.pass_context
    def command(ctx: click.Context, log_format: str) -> None:
        assert log_format == "text"
        seen.append(reports.verbosity(ctx))

    command.main(arguments, standalone_mode=False)
    assert seen == [level]
