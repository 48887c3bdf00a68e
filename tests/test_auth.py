"""auth.py: tokens that do not show, login URLs, and the server's users."""

from __future__ import annotations

import base64
import copy
import errno
import hashlib
import hmac
import logging
import os
import re
import stat
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wstunnel import auth
from wstunnel.auth import LoginUrl, Token, Users, check_user_name, parse_host_port, parse_login_url, parse_pin
from wstunnel.errors import LocalError, UsageError

SECRET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNO-_"
TOKEN = Token.parse(SECRET)
OTHER = Token.new(lambda count: b"o" * count)
PIN = bytes(range(32))
PIN_TEXT = base64.urlsafe_b64encode(PIN).rstrip(b"=").decode()
FULL = f"wss://{SECRET}@tunnel.example.org:8443/t/x#sha256={PIN_TEXT}"


class TestToken:
    def test_new_is_32_random_bytes_in_base64url(self) -> None:
        asked: list[int] = []

        def random(count: int) -> bytes:
            asked.append(count)
            return b"\xff" * count

        assert Token.new(random).reveal() == "_" * 42 + "8"
        assert asked == [32]
        assert Token.new() != Token.new()
        assert Token.parse(Token.new().reveal()).reveal()

    def test_digest_is_of_the_text(self) -> None:
        assert TOKEN.digest() == hashlib.sha256(SECRET.encode()).digest()

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "short",
            SECRET[:-1],
            SECRET + "A",
            SECRET[:-1] + "+",
            SECRET[:-1] + "é",
            SECRET + "\n",
            SECRET[:-1] + "=",
        ],
    )
    def test_malformed(self, text: str) -> None:
        with pytest.raises(UsageError, match="the token is malformed: it has 43 characters") as caught:
            Token.parse(text)
        assert SECRET[:8] not in str(caught.value)

    def test_does_not_show(self) -> None:
        shown = [str(TOKEN), repr(TOKEN), f"{TOKEN}", f"{TOKEN!r:>50}", "%s" % TOKEN, repr([TOKEN])]  # noqa: UP031  # that form too
        assert not [text for text in shown if SECRET[:8] in text]
        assert TOKEN.reveal() == SECRET

    def test_equality(self) -> None:
        assert Token.parse(SECRET) == TOKEN
        assert len({Token.parse(SECRET), TOKEN, OTHER}) == 2
        assert TOKEN != OTHER
        assert TOKEN != SECRET
        assert copy.deepcopy(TOKEN) == TOKEN


class TestLoginUrl:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (FULL, LoginUrl("wss", "tunnel.example.org", 8443, "/t/x", TOKEN, (PIN,))),
            (f"wss://{SECRET}@h", LoginUrl("wss", "h", 443, "/", TOKEN)),
            (f"ws://{SECRET}@h", LoginUrl("ws", "h", 80, "/", TOKEN)),
            (f"  WSS://{SECRET}@h/\n", LoginUrl("wss", "h", 443, "/", TOKEN)),
            ("wss://h", LoginUrl("wss", "h", 443)),
            ("ws://127.0.0.1:8080/", LoginUrl("ws", "127.0.0.1", 8080)),
            (f"wss://{SECRET}@[2001:db8::1]", LoginUrl("wss", "2001:db8::1", 443, "/", TOKEN)),
            (f"wss://{SECRET}@[::1]:1/p", LoginUrl("wss", "::1", 1, "/p", TOKEN)),
            ("wss://[fe80::1%eth0]:65535", LoginUrl("wss", "fe80::1%eth0", 65535)),
            ("wss://a_b-c.d.:443/%2F:;=~!$&'()*+,", LoginUrl("wss", "a_b-c.d.", 443, "/%2F:;=~!$&'()*+,")),
            ("wss://bücher.example/", LoginUrl("wss", "xn--bcher-kva.example", 443)),
            ("ws://h:6080/?token=a%20b&x=/?", LoginUrl("ws", "h", 6080, query="token=a%20b&x=/?")),
            (f"wss://h?q#sha256={PIN.hex()}", LoginUrl("wss", "h", 443, pins=(PIN,), query="q")),
            ("wss://h/p?", LoginUrl("wss", "h", 443, "/p")),
            (f"wss://{SECRET}@h/a@b", LoginUrl("wss", "h", 443, "/a@b", TOKEN)),
            (f"wss://h#sha256={PIN.hex()}", LoginUrl("wss", "h", 443, pins=(PIN,))),
            (f"wss://h/#sha256={PIN.hex().upper()}", LoginUrl("wss", "h", 443, pins=(PIN,))),
            (f"wss://h/#sha256={PIN_TEXT}&sha256={'00' * 32}", LoginUrl("wss", "h", 443, pins=(PIN, bytes(32)))),
            (f"wss://h/#sha256={PIN_TEXT}&sha256={PIN.hex()}", LoginUrl("wss", "h", 443, pins=(PIN,))),
        ],
    )
    def test_parses(self, text: str, expected: LoginUrl) -> None:
        assert parse_login_url(text) == expected
        assert parse_login_url(expected.reveal()) == expected

    def test_reveal_gives_the_whole_url_and_str_does_not(self) -> None:
        url = parse_login_url(FULL)
        assert url.reveal() == FULL
        assert str(url) == f"wss://***@tunnel.example.org:8443/t/x#sha256={PIN_TEXT}"
        assert repr(url) == f"LoginUrl({str(url)!r})"
        assert f"{url}" == str(url)
        bare = parse_login_url("ws://h:80")
        assert (bare.reveal(), str(bare)) == ("ws://h/", "ws://h/")

    def test_a_query_may_hold_a_secret(self) -> None:
        url = parse_login_url("ws://h/p?token=hunter22")
        assert (str(url), url.resource) == ("ws://h/p?***", "/p?token=hunter22")
        assert parse_login_url("ws://h/p").resource == "/p"
        with pytest.raises(UsageError) as caught:
            url.require_token()
        assert "hunter22" not in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("ws://h/?token=hunter22 x", "ws://h/?***"),
            ("ws://h/a b?token=hunter22", "ws://h/a b?***"),
            ("ws://h:x/?token=hunter22", "ws://h:x/?***"),
            ("ws://h/?token=a@hunter22", "ws://***@***"),
            ("ws://h?token=hunter22é#sha256=x", "ws://h?***#sha256=x"),
            ("wss://h/?token=hunter22#sha256=x", "wss://h/?***#sha256=x"),
            (f"ws://{'h' * 24}.x:y?token=hunter22", "ws://***.x:y?***"),
            ("ws://a?hunter22@h:x/?token=hunter22", "ws://***@***"),
            ("ws://?token=hunter22", "ws://?***"),
        ],
    )
    def test_a_mistake_does_not_show_it(self, text: str, shown: str) -> None:
        with pytest.raises(UsageError) as caught:
            parse_login_url(text)
        assert caught.value.text == shown
        assert 0 <= caught.value.position <= len(shown)
        assert "hunter22" not in str(caught.value)

    def test_authority(self) -> None:
        assert LoginUrl("wss", "::1", 443).authority == "[::1]"
        assert LoginUrl("ws", "h", 443).authority == "h:443"

    def test_require_token(self) -> None:
        assert parse_login_url(FULL).require_token() == TOKEN
        with pytest.raises(UsageError, match="no token: take the whole URL that `wstunnel invite` printed"):
            parse_login_url("wss://h").require_token()

    @pytest.mark.parametrize(
        ("text", "message", "at"),
        [
            ("", "begins with wss://", 0),
            ("h:443", "begins with wss://", 0),
            ("wss:h", "begins with wss://", 0),
            ("tcp://h", "begins with wss://", 0),
            ("https://h", "did you mean wss://?", 0),
            ("HTTP://h", "did you mean ws://?", 0),
            ("wss://", "the host is missing", 6),
            ("wss:///p", "the host is missing", 6),
            ("wss://:443", "the host is missing", 6),
            ("wss://h:", "a port is a number from 1 to 65535", 8),
            ("wss://h:0", "a port is a number", 8),
            ("wss://h:65536", "a port is a number", 8),
            ("wss://h:" + "9" * 5000, "a port is a number", 8),
            ("wss://h:4x", "a port is a number", 8),
            ("wss://h:٤٤٣", "a port is a number", 8),
            ("wss://h:+1", "a port is a number", 8),
            ("wss://2001:db8::1", "an IPv6 address stands in brackets", 6),
            ("wss://[2001:db8::1", "the bracket of the IPv6 address is not closed", 18),
            ("wss://[h]", "this is not an IPv6 address", 7),
            ("wss://[127.0.0.1]", "this is not an IPv6 address", 7),
            ("wss://[::1]x", "only :PORT may follow the bracket", 11),
            ("wss://256.0.0.1", "this is not an IPv4 address", 6),
            ("wss://1.2.3", "this is not an IPv4 address", 6),
            ("wss://a b", "this is not a host name", 6),
            ("wss://-a", "this is not a host name", 6),
            ("wss://a..b", "this is not a host name", 6),
            ("wss://" + "a." * 127, "this is not a host name", 6),
            ("wss://é" + "é" * 99, "this is not a host name", 6),
            ("wss://h/a@b", "the token is malformed: it has no /", 6),
            ("wss://" + "h" * 43, "the host is missing: this is a token", 6),
            (f"wss://{'A' * 43}@h?q", "a login URL has no query", 11),
            (f"wss://{'A' * 43}@h/p?q", "a login URL has no query", 13),
            ("wss://h/p?a b", "character 2 of the query may not stand there: write it as %XX", 10),
            ("wss://h?é", "character 1 of the query may not stand there: write it as %XX", 8),
            ("wss://h/a b", "write it as %XX", 9),
            ("wss://h/%zz", "write it as %XX", 8),
            ("wss://h/é", "write it as %XX", 8),
            ("wss://h/#", "nothing follows the #: the URL was cut off", 9),
            ("wss://h#md5=x", "only sha256=PIN may follow the #", 8),
            ("wss://h#sha256", "the pin is malformed", 15),
            (
                "wss://h#sha256=abc",
                "the pin is malformed: it has 43 base64url characters or 64 hex digits, here are 3",
                15,
            ),
            ("wss://h#sha256=abc&", "the pin is malformed", 15),
            (f"ws://h#sha256={PIN_TEXT}", "a ws:// URL has no certificate to pin", 6),
        ],
    )
    def test_mistakes_are_pointed_at(self, text: str, message: str, at: int) -> None:
        with pytest.raises(UsageError, match=re.escape(message)) as caught:
            parse_login_url(text)
        assert caught.value.position == at
        assert caught.value.grammar == auth.URL_GRAMMAR

    def test_the_second_pin_is_pointed_at(self) -> None:
        text = f"wss://h#sha256={PIN_TEXT}&sha256=x"
        with pytest.raises(UsageError) as caught:
            parse_login_url(text)
        shown = str(caught.value).splitlines()
        assert shown[1] == "    wss://h#***&sha256=x"
        assert shown[1][shown[2].index("^")] == "x"

    def test_the_caret_is_right_after_a_masked_token(self) -> None:
        with pytest.raises(UsageError) as caught:
            parse_login_url(f"wss://{SECRET}@h:x/")
        assert str(caught.value).splitlines()[1:3] == ["    wss://***@h:x/", "                ^"]

    @pytest.mark.parametrize(
        "text",
        [
            f"wss://{SECRET}@h:x",
            f"wss://{SECRET}A@h",
            f"wss://{SECRET[:-1]}@h",
            f"wss://{SECRET[:-1]}+@h",
            f"wss://{SECRET[:20]}/{SECRET[21:]}@h",
            f"wss://{SECRET[:20]}?{SECRET[21:]}@h",
            f"wss://{SECRET[:20]}#{SECRET[21:]}@h",
            f"wss://user:{SECRET}@h",
            f"wss://{SECRET}@{SECRET}@h",
            f"https://{SECRET}@h",
            f"wss:{SECRET}@h",
            f"wss//{SECRET}@h",
            f"{SECRET}@h",
            SECRET,
            f"'wss://{SECRET}@h'",
            f"wss://{SECRET}@",
            f"wss://{SECRET}",
            f"wss://{SECRET}:443/",
            f"wss://{SECRET[:30]}",
            f"wss://h/?token={SECRET}",
            f"wss://h/{SECRET} x",
            f"wss://h#{SECRET}",
            f"wss://h#token={SECRET}",
            f"wss://h/#sha256={SECRET[:-1]}",
        ],
    )
    def test_no_error_shows_the_token(self, text: str) -> None:
        """Every text here is malformed, or has the token where a host, a path or a pin belongs."""
        try:
            parse_login_url(text).require_token()
        except UsageError as error:
            everything = str(error) + repr(error.args) + "".join(traceback.format_exception(error))
        else:
            pytest.fail("this is no good login URL")
        # The parts of the test's own source that a traceback shows have no secret in them.
        assert SECRET[:6] not in everything
        assert SECRET[-6:] not in everything

    @given(st.text(alphabet="wsht:/@[]#?&=%.-é 0aA", max_size=30))
    def test_any_text_is_parsed_or_is_a_usage_error(self, text: str) -> None:
        for scheme in ("", "wss://", f"wss://{SECRET}@"):
            try:
                url = parse_login_url(scheme + text)
            except UsageError as error:
                assert error.text is not None
                assert 0 <= error.position <= len(error.text)
                assert SECRET not in str(error)
            else:
                assert parse_login_url(url.reveal()) == url

    def test_host_and_port_for_invite(self) -> None:
        assert parse_host_port("h") == ("h", None)
        assert parse_host_port("[::1]:8443") == ("::1", 8443)
        with pytest.raises(UsageError) as caught:
            parse_host_port("h:x")
        assert (caught.value.text, caught.value.position, caught.value.grammar) == ("h:x", 2, auth.HOST_GRAMMAR)

    def test_a_pin_with_a_mistyped_last_character(self) -> None:
        assert parse_pin("A" * 43) == bytes(32)
        with pytest.raises(UsageError, match="the pin is malformed"):
            parse_pin("A" * 42 + "B")


class Clock:
    """The present for `Users`. Files are made now, so a time well after makes them old."""

    def __init__(self) -> None:
        self.late = True

    def __call__(self) -> int:
        return 4_102_444_800_000_000_000 if self.late else 0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def users(tmp_path: Path, clock: Clock) -> Users:
    return Users(tmp_path, now_ns=clock)


def line(token: Token) -> str:
    return f"sha256:{token.digest().hex()}"


class TestUsers:
    def test_nobody_at_first(self, users: Users) -> None:
        assert users.empty()
        assert users.authenticate(SECRET) is None

    def test_a_token_lets_its_user_in(self, users: Users, tmp_path: Path) -> None:
        users.add_token("alice", TOKEN)
        users.add_token("bob", OTHER)
        assert not users.empty()
        assert users.authenticate(SECRET) == "alice"
        assert users.authenticate(OTHER.reveal()) == "bob"
        assert users.authenticate(Token.new().reveal()) is None
        for text in ("", "x", SECRET + "\n", SECRET[:-1] + "é", "*" * 43):
            assert users.authenticate(text) is None
        assert stat.S_IMODE((tmp_path / "users").stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "users/alice").stat().st_mode) == 0o600

    def test_only_hashes_are_kept(self, users: Users, tmp_path: Path) -> None:
        users.add_token("alice", TOKEN)
        assert (tmp_path / "users/alice").read_text().splitlines() == [
            "# tokens of alice: delete a line to revoke one",
            f"{line(TOKEN)} 2100-01-01",
        ]

    def test_several_tokens_a_user(self, users: Users) -> None:
        users.add_token("alice", TOKEN)
        users.add_token("alice", OTHER)
        assert users.authenticate(SECRET) == users.authenticate(OTHER.reveal()) == "alice"

    @pytest.mark.parametrize("before", ["", "# mine", "# mine\n", "\n\n# mine\n"])
    def test_what_is_in_the_file_stays(self, users: Users, tmp_path: Path, before: str) -> None:
        (tmp_path / "users").mkdir()
        (tmp_path / "users/alice").write_text(before)
        users.add_token("alice", TOKEN)
        kept = before + "\n" if before and not before.endswith("\n") else before
        assert (tmp_path / "users/alice").read_text() == f"{kept}{line(TOKEN)} 2100-01-01\n"
        assert users.authenticate(SECRET) == "alice"

    def test_every_form_of_line(self, users: Users, tmp_path: Path) -> None:
        (tmp_path / "users").mkdir()
        (tmp_path / "users/alice").write_text(
            f"\ufeff# a comment, a blank line, CRLF, capitals, words at the end\n\r\n  {line(TOKEN)}\r\n"
            f"sha256:{OTHER.digest().hex().upper()} 2026-11-22 # the laptop\n".replace("\ufeff", "")
        )
        assert users.authenticate(SECRET) == users.authenticate(OTHER.reveal()) == "alice"

    def test_every_hash_is_compared_in_constant_time(self, users: Users, monkeypatch: pytest.MonkeyPatch) -> None:
        for number in range(5):
            users.add_token(f"user{number}", Token.new())
        users.add_token("user0", TOKEN)
        compared: list[bytes] = []

        def counting(one: bytes, two: bytes) -> bool:
            compared.append(one)
            return hmac.compare_digest(one, two)

        monkeypatch.setattr(auth, "compare_digest", counting)
        assert users.authenticate(SECRET) == "user0"
        assert len(set(compared)) == 6

    @pytest.mark.parametrize("name", ["a", "A-b_c.d9", "x" * 64, "_"])
    def test_names(self, users: Users, name: str) -> None:
        users.add_token(name, TOKEN)
        assert users.authenticate(SECRET) == name

    @pytest.mark.parametrize("name", ["", ".", "..", ".a", "-a", "a/b", "../a", "a b", "é", "x" * 65, "a\n", "a\0"])
    def test_wrong_names(self, users: Users, tmp_path: Path, name: str) -> None:
        with pytest.raises(UsageError, match="this cannot be a name"):
            users.add_token(name, TOKEN)
        with pytest.raises(UsageError):
            check_user_name(name)
        assert list(tmp_path.iterdir()) == []


class TestChangesCountAtOnce:
    def test_a_new_user_and_a_new_token(self, users: Users, tmp_path: Path) -> None:
        assert users.empty()
        invite = Users(tmp_path)
        invite.add_token("alice", TOKEN)
        assert users.authenticate(SECRET) == "alice"
        invite.add_token("bob", OTHER)
        assert users.authenticate(OTHER.reveal()) == "bob"

    def test_a_line_deleted(self, users: Users, tmp_path: Path) -> None:
        users.add_token("alice", TOKEN)
        users.add_token("alice", OTHER)
        assert users.authenticate(SECRET) == "alice"
        (tmp_path / "users/alice").write_text(line(OTHER))
        assert users.authenticate(SECRET) is None
        assert users.authenticate(OTHER.reveal()) == "alice"

    def test_a_file_deleted(self, users: Users, tmp_path: Path) -> None:
        users.add_token("alice", TOKEN)
        assert users.authenticate(SECRET) == "alice"
        (tmp_path / "users/alice").unlink()
        assert users.authenticate(SECRET) is None
        assert users.empty()

    def test_a_file_deleted_between_list_and_read(
        self, users: Users, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        users.add_token("alice", TOKEN)
        users.add_token("bob", OTHER)
        names = os.listdir(tmp_path / "users")
        (tmp_path / "users/alice").unlink()
        monkeypatch.setattr(os, "listdir", lambda _: names)
        assert users.authenticate(SECRET) is None
        assert users.authenticate(OTHER.reveal()) == "bob"

    def test_the_directory_deleted(self, users: Users, tmp_path: Path) -> None:
        users.add_token("alice", TOKEN)
        assert not users.empty()
        (tmp_path / "users/alice").unlink()
        (tmp_path / "users").rmdir()
        assert users.authenticate(SECRET) is None
        assert users.empty()

    def test_a_change_within_one_tick_of_the_clock(
        self, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Same size, same times, same inode: only reading again tells. So what has just changed is read again."""
        clock.late = False
        users = Users(tmp_path, now_ns=clock)
        users.add_token("alice", TOKEN)
        path = tmp_path / "users/alice"
        assert users.authenticate(SECRET) == "alice"
        frozen = os.stat(path)
        path.write_text(path.read_text().replace(TOKEN.digest().hex(), OTHER.digest().hex()))
        real = os.stat

        def stat_of_the_past(target: str | Path) -> os.stat_result:
            return frozen if str(target) == str(path) else real(target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", stat_of_the_past)
            assert users.authenticate(SECRET) is None
            assert users.authenticate(OTHER.reveal()) == "alice"

    def test_a_new_user_within_one_tick_of_the_clock(
        self, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock.late = False
        users = Users(tmp_path, now_ns=clock)
        users.add_token("alice", TOKEN)
        assert users.authenticate(SECRET) == "alice"
        directory = tmp_path / "users"
        frozen, real = os.stat(directory), os.stat
        users.add_token("bob", OTHER)

        def stat_of_the_past(target: str | Path) -> os.stat_result:
            return frozen if str(target) == str(directory) else real(target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", stat_of_the_past)
            assert users.authenticate(OTHER.reveal()) == "bob"

    def test_nothing_is_read_while_nothing_changes(
        self, users: Users, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(20):
            users.add_token(f"user{number}", Token.new())
        users.add_token("alice", TOKEN)
        assert users.authenticate(SECRET) == "alice"
        looked: list[str] = []
        real = os.stat

        def counted(path: str | Path) -> os.stat_result:
            looked.append(str(path))
            return real(path)

        monkeypatch.setattr(os, "stat", counted)
        monkeypatch.setattr(os, "open", None)
        monkeypatch.setattr(os, "listdir", None)
        assert users.authenticate(SECRET) == "alice"
        assert len(looked) == len(set(looked)) == 22
        assert str(tmp_path / "users") in looked

    def test_invitations_at_the_same_time_all_count(self, tmp_path: Path) -> None:
        program = (
            "import sys, pathlib; from wstunnel.auth import Token, Users\n"
            "users = Users(pathlib.Path(sys.argv[1]))\n"
            "for _ in range(20):\n    token = Token.new(); users.add_token('alice', token); print(token.reveal())"
        )
        running = [
            subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        tokens = [token for process in running for token in process.communicate()[0].split()]
        assert len(tokens) == 60
        users = Users(tmp_path)
        assert {users.authenticate(token) for token in tokens} == {"alice"}


class TestFilesThatAreWrong:
    @pytest.fixture(autouse=True)
    def _logged(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.WARNING, "wstunnel")

    @pytest.mark.parametrize("late", [True, False])
    def test_a_malformed_line_is_skipped_and_logged_once(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, clock: Clock, late: bool
    ) -> None:
        clock.late = late
        users = Users(tmp_path, now_ns=clock)
        path = tmp_path / "users/alice"
        path.parent.mkdir()
        path.write_bytes(f"# ok\n{SECRET}\n{line(TOKEN)}\nsha256:12\n\xff\n".encode("latin-1"))
        for _ in range(3):
            assert users.authenticate(SECRET) == "alice"
        assert len(caplog.messages) == 3
        for number, message in zip((2, 4, 5), caplog.messages, strict=True):
            assert f"file={path} line={number} " in message
            assert SECRET not in message
        with path.open("a") as file:
            file.write("another\n")
        assert users.authenticate(SECRET) == "alice"
        assert len(caplog.messages) == 4
        assert " line=6 " in caplog.messages[3]

    def test_what_is_no_user_is_logged_once(
        self, users: Users, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        directory = tmp_path / "users"
        directory.mkdir()
        for name in ("alice~", ".alice.swp"):
            (directory / name).write_text(line(TOKEN))
        (directory / "subdirectory").mkdir()
        os.mkfifo(directory / "pipe")
        (directory / "huge").write_bytes(b"#" * 300_000)
        (directory / "loop").symlink_to("loop")
        for _ in range(3):
            assert users.authenticate(SECRET) is None
        assert users.empty()
        logged = sorted(re.sub(r".*/(\S+).*", r"\1", message) for message in caplog.messages)
        assert logged == ["alice~", "huge", "loop", "pipe", "subdirectory"]

    def test_a_file_that_may_not_be_read(
        self, users: Users, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        users.add_token("alice", TOKEN)
        users.add_token("bob", OTHER)
        real = os.open

        def refuse(path: str, *arguments: int, **options: int) -> int:
            if str(path).endswith("alice"):
                raise PermissionError(13, "Permission denied")
            return real(path, *arguments, **options)

        monkeypatch.setattr(os, "open", refuse)
        for _ in range(2):
            assert users.authenticate(SECRET) is None
            assert users.authenticate(OTHER.reveal()) == "bob"
        assert caplog.messages == [
            f'skipped in the users\' directory file={tmp_path}/users/alice reason="PermissionError: permission denied"'
        ]

    def test_a_directory_that_may_not_be_read_lets_nobody_in(
        self, users: Users, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        users.add_token("alice", TOKEN)
        assert users.authenticate(SECRET) == "alice"

        def refuse(_: object) -> os.stat_result:
            raise PermissionError(13, "Permission denied")

        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", refuse)
            assert users.authenticate(SECRET) is None
            assert users.empty()
        assert len(caplog.messages) == 1
        assert users.authenticate(SECRET) == "alice"

    def test_users_may_be_links(self, users: Users, tmp_path: Path) -> None:
        """Secrets that an orchestrator mounts are."""
        (tmp_path / "users").mkdir()
        (tmp_path / "elsewhere").write_text(line(TOKEN))
        (tmp_path / "users/alice").symlink_to("../elsewhere")
        assert users.authenticate(SECRET) == "alice"
        (tmp_path / "elsewhere").write_text("")
        assert users.authenticate(SECRET) is None

    def test_adding_follows_no_link(self, users: Users, tmp_path: Path) -> None:
        """`invite` runs as root in a directory of the server's user."""
        (tmp_path / "users").mkdir()
        (tmp_path / "shadow").write_text("root:secret")
        (tmp_path / "users/alice").symlink_to("../shadow")
        with pytest.raises(LocalError, match="is a symbolic link"):
            users.add_token("alice", TOKEN)
        (tmp_path / "users/alice").unlink()
        (tmp_path / "users").rename(tmp_path / "moved")
        (tmp_path / "users").symlink_to("moved")
        with pytest.raises(LocalError, match="symbolic link"):
            users.add_token("alice", TOKEN)
        assert list((tmp_path / "moved").iterdir()) == []

    def test_adding_without_permission(self, users: Users, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> int:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(
            LocalError, match="users/alice may not be written by this user: run it as the user to whom it belongs"
        ):
            users.add_token("alice", TOKEN)


class TestUsersThatCannotBeReadNow:
    def test_known_tokens_stay_and_others_are_not_denied(
        self, users: Users, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        users.add_token("alice", TOKEN)
        assert users.authenticate(SECRET) == "alice"
        Users(tmp_path).add_token("alice", OTHER)
        Users(tmp_path).add_token("bob", OTHER)

        def full(*_: object, **__: object) -> int:
            raise OSError(errno.EMFILE, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", full)
            patch.setattr(os, "listdir", full)
            assert users.authenticate(SECRET) == "alice"
            with pytest.raises(LocalError, match=r"cannot be read at the moment.*too many open files"):
                users.authenticate(OTHER.reveal())
            assert not users.empty()
        assert users.authenticate(OTHER.reveal()) == "bob"
        assert users.authenticate(Token.new().reveal()) is None

    def test_without_a_last_state_nobody_is_denied(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        Users(tmp_path).add_token("alice", TOKEN)
        users = Users(tmp_path)

        def failing(*_: object, **__: object) -> int:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", failing)
            with pytest.raises(LocalError):
                users.authenticate(SECRET)
            assert not users.empty()
        assert users.authenticate(SECRET) == "alice"

    @pytest.mark.parametrize("name", ["users", "."])
    def test_a_directory_that_others_may_write_is_reported_once(
        self, users: Users, tmp_path: Path, caplog: pytest.LogCaptureFixture, clock: Clock, name: str
    ) -> None:
        users.add_token("alice", TOKEN)
        assert users.authenticate(SECRET) == "alice"
        assert caplog.text == ""
        (tmp_path / name).chmod(0o777)
        users = Users(tmp_path, now_ns=clock)
        clock.late = False  # read again each time
        assert users.authenticate(SECRET) == "alice"
        assert users.authenticate(SECRET) == "alice"
        assert caplog.text.count("others may write here") == 1

    def test_a_directory_of_another_user_is_reported(
        self, users: Users, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        users.add_token("alice", TOKEN)
        monkeypatch.setattr(os, "geteuid", lambda: 4712)
        os.chown(tmp_path, 4711, -1) if os.getuid() == 0 else pytest.skip("only root can give a directory away")
        assert users.authenticate(SECRET) == "alice"
        assert "another user owns this directory" in caplog.text
