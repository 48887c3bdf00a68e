"""The documentation against the code: what can be compared is compared."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
import msgspec
import pytest

from wstunnel import forwards, limits, liveness, logs, pace, policy, reverse_client, reverse_server
from wstunnel.cli import running
from wstunnel.cli.group import COMMANDS, wstunnel
from wstunnel.config import ServerConfig
from wstunnel.dial import _MOST_TELLING
from wstunnel.endpoints import udp
from wstunnel.errors import UsageError
from wstunnel.pool import SURPLUS_SECONDS
from wstunnel.server import TAKE_OVER_SECONDS
from wstunnel.server_session import DETACHED_IDS, REVERSE_LINKS
from wstunnel.wire import datagrams, handshake, messages
from wstunnel.wire.credit import Budget
from wstunnel.wire.http1 import RequestReader
from wstunnel.wire.masking import MaskKeys
from wstunnel.wire.messages import Hello, Open, Resume, Welcome
from wstunnel.wire.protocol import LinkProtocol, StreamState
from wstunnel.wire.states import EXCHANGE, EXPECTED, Exchange

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PARTS = ("_build", "changelog.d", "results.md")  # what is no page: built, or included in one
PAGES = sorted(path for path in DOCS.rglob("*.md") if not set(PARTS) & set(path.parts))
PACKAGE = Path(limits.__file__).parent  # CI tests the installed one
SOURCES = sorted(PACKAGE.rglob("*.py"))
PROTOCOL = DOCS / "reference" / "protocol.md"
TROUBLESHOOT = DOCS / "how-to" / "troubleshoot.md"
LIMITS = DOCS / "reference" / "limits.md"
COMMAND_LINE = DOCS / "reference" / "command-line.md"


def section(page: Path, heading: str) -> str:
    """The text below a heading, up to the next heading of the same or a higher level."""
    text = page.read_text()
    found = re.search(rf"^(#+) {re.escape(heading)}\n", text, re.MULTILINE)
    assert found, f"{page.name} has no heading {heading!r}"
    rest = text[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def rows(text: str) -> list[list[str]]:
    """The cells of every table row, heads and rules left out."""
    table = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")
    ]
    rules = {index for index, row in enumerate(table) if set("".join(row)) <= set("-| :")}
    return [row for index, row in enumerate(table) if index not in rules and index + 1 not in rules]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# --- README ---------------------------------------------------------------------------------------------------------


def test_readme_has_exactly_the_two_marked_commands() -> None:
    text = README.read_text()
    marked = dict(re.findall(r"^<!-- (demo|test) -->\n```bash\n(.+)\n```$", text, re.MULTILINE))
    assert marked == {
        "demo": "python3 -m venv .venv && .venv/bin/pip install -q . && .venv/bin/wstunnel demo",
        "test": "python3 -m venv .venv && .venv/bin/pip install -q '.[all,test]' && .venv/bin/python -m pytest",
    }
    assert text.count("```bash") == 2
    assert text.count("<!--") == 2


def test_readme_maps_every_module() -> None:
    shown = section(README, "Map of the source")
    for path in SOURCES:
        if path.name not in ("__init__.py", "__main__.py"):
            name = path.relative_to(PACKAGE).as_posix()
            assert f"`{name}`" in shown, f"the README's map lacks {name}"
    for name in re.findall(r"`([a-z0-9_/]+\.py)`", shown.replace("`tests/test_map.py`", "")):
        assert (PACKAGE / name).exists(), f"the README's map has {name}, which is gone"


def test_readme_lists_every_command() -> None:
    assert [code(row[0])[0].split()[1] for row in rows(section(README, "Commands"))] == list(COMMANDS)


# --- links ----------------------------------------------------------------------------------------------------------


def slugs(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {
        re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in slugs(path), f"{page.name} links to {target}, which has no such heading"


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = set(re.findall(r"^([\w/-]+)$", (DOCS / "index.md").read_text(), re.MULTILINE))
    assert listed == {path.relative_to(DOCS).with_suffix("").as_posix() for path in PAGES} - {"index"}


# --- limits ---------------------------------------------------------------------------------------------------------


def shown_number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def test_limits_page_lists_every_constant_with_its_value() -> None:
    found = {code(row[0])[0]: row[1] for row in rows(LIMITS.read_text()) if "." not in row[0]}
    constants = {name: shown_number(value) for name, value in vars(limits).items() if name.isupper()}
    assert found == constants


def test_limits_page_is_right_about_constants_elsewhere() -> None:
    found = [(code(row[0])[0], row[1]) for row in rows(LIMITS.read_text()) if "." in row[0]]
    assert found
    for name, shown in found:
        module, _, constant = name.rpartition(".")
        assert shown == shown_number(getattr(importlib.import_module(f"wstunnel.{module}"), constant)), name


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_command_line_page_lists_every_flag_and_no_other(name: str) -> None:
    command = wstunnel.get_command(click.Context(wstunnel), name)
    assert command is not None
    flags = {flag for param in command.params if isinstance(param, click.Option) for flag in param.opts}
    text = section(COMMAND_LINE, f"wstunnel {name}") + section(COMMAND_LINE, "Flags of every command")
    found = {flag.split()[0] for row in rows(text) for flag in code(row[0]) if flag.startswith("-")}
    assert found == flags | {"-h", "--help"}


def test_command_line_page_names_every_variable() -> None:
    read: set[str] = set()
    for path in SOURCES:
        read |= set(re.findall(r"environ(?:\.get\(|\[)\s*\"([A-Z_]+)\"", path.read_text()))
        read |= set(re.findall(r"home_directory\(environ, \"([A-Z_]+)\"", path.read_text()))
    read -= {"PYTHONPATH"}  # Python's own, which the demo hands on
    text = section(COMMAND_LINE, "Environment")
    assert {"HOME", "STATE_DIRECTORY", "XDG_STATE_HOME", "XDG_CONFIG_HOME"} <= read
    for name in read | {"WSTUNNEL_URL"}:
        assert f"`{name}`" in text, name


# --- commands in the text -------------------------------------------------------------------------------------------

PLACEHOLDERS = {"%h": "host", "%p": "22", "SHA256": "A" * 43}


def filled(words: list[str]) -> list[str]:
    """A command's arguments, with something in place of what the reader puts in."""
    return [re.sub("|".join(PLACEHOLDERS), lambda part: PLACEHOLDERS[part[0]], word) for word in words]


def shell_lines(text: str) -> Iterator[str]:
    """What a page has its reader type: lines of code blocks behind a prompt, and pieces of code within the text."""
    blocks = "".join(re.findall(r"^```(?:console|bash|text)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    for line in blocks.replace("\\\n", " ").splitlines():
        if typed := re.match(r"(?:\w+)?\$ (.+)|\s+(ProxyCommand wstunnel .+)", line):
            yield typed[1] or typed[2]
    for piece in code(re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)):
        if not re.fullmatch(r"wstunnel \w+", piece):  # a command's name, not the whole of it
            yield piece


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every `wstunnel …` in a page. One that is quoted whole, as ssh's ProxyCommand is, counts too."""
    for line in shell_lines(text):
        if "wstunnel " not in line or "…" in line.replace("…@", "").split("#")[0]:
            continue  # what is left out cannot be looked at
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|<>&")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in (*lexer, "|"):
            if "wstunnel " in word:  # ProxyCommand='wstunnel connect %h:%p'
                yield word[word.index("wstunnel ") :].split()[1:]
            elif word[0] not in "|<>&":
                words.append(word)
            elif words:
                while words[1:] and (words[0] == "sudo" or re.match(r"[A-Z_]+=", words[0])):
                    words = words[1:]
                if words[0].split("/")[-1] == "wstunnel":
                    yield words[1:]
                words = []


def test_commands_are_found_in_every_dress() -> None:
    page = """Say `wstunnel client -D 1080`, not `-D`.

```console
there$ sudo wstunnel server --port 443    # as root
$ wstunnel invite --host localhost | wstunnel login
$ WSTUNNEL_URL=x .venv/bin/wstunnel client \\
      -L '*:1:db:1'
listening 127.0.0.1:1 -> wstunnel is not typed here
$ ssh -o ProxyCommand='wstunnel connect %h:%p' host
```
"""
    assert [" ".join(words) for words in commands(page)] == [
        "server --port 443",
        "invite --host localhost",
        "login",
        "client -L *:1:db:1",
        "connect %h:%p",
        "client -D 1080",
    ]


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_in_the_text_are_understood(page: Path) -> None:
    """Each is parsed as the program does it: the flags exist, and their values have the right grammar."""
    for words in commands(page.read_text()):
        name, *arguments = filled(words)
        command = wstunnel.get_command(click.Context(wstunnel), name)
        assert command is not None or name == "--version", f"{page.name}: wstunnel {' '.join(words)}"
        if command is None:
            continue
        try:
            # click keeps in the command what `-h` is, as its first context has it.
            command.make_context(name, arguments, parent=click.Context(wstunnel, **wstunnel.context_settings))
        except click.exceptions.Exit:  # --help
            continue
        except (click.ClickException, UsageError) as error:
            pytest.fail(f"{page.name}: wstunnel {' '.join(words)}: {error}")


COME_FROM = DOCS / "how-to" / "come-from-another-tool.md"


def test_page_for_those_who_come_from_elsewhere_has_a_command_in_each_row() -> None:
    tools = re.findall(r"^## From (.+)$", COME_FROM.read_text(), re.MULTILINE)
    assert tools == ["ssh", "chisel", "erebe's wstunnel", "frp", "gost", "websockify"]
    for tool in tools:
        for row in rows(section(COME_FROM, f"From {tool}")):
            assert "wstunnel " in row[1] or not code(row[1]), row


def context(words: list[str]) -> click.Context:
    """What the program makes of a command's arguments."""
    name, *arguments = filled(words)
    command = wstunnel.get_command(click.Context(wstunnel), name)
    assert command is not None
    return command.make_context(name, arguments, parent=click.Context(wstunnel, **wstunnel.context_settings))


def commands_of_rows(page: Path) -> Iterator[tuple[list[str], list[list[str]]]]:
    for row in rows(page.read_text()):
        yield row, list(commands(row[1]))


def test_each_server_of_that_page_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As far as a configuration; each endpoint is served as websockify would."""
    made: list[ServerConfig] = []
    monkeypatch.setattr(running, "run", lambda role, _codes: made.append(*role.args))
    monkeypatch.setattr(logs, "configure", lambda **_: None)
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    for row, found in commands_of_rows(COME_FROM):
        for words in found:
            if words[0] == "server":
                made.clear()
                server = context(words)
                server.command.invoke(server)
                [config] = made
                if config.endpoints:
                    assert config.endpoint_auth == "none" and config.allow_origins, row
                    assert config.plain == ("--cert" not in row[0]), row
                    assert config.plain or config.cert is not None, row


def test_what_that_page_has_a_server_allow_lets_its_client_listen() -> None:
    checked = 0
    for row, found in commands_of_rows(COME_FROM):
        shown = [(words[0], context(words).params) for words in found]
        rules = [rule for name, params in shown if name == "server" for rule in params["allow_listen"]]
        wanted = [each for name, params in shown if name == "client" for each in params["reverse_forwards"]]
        if rules and wanted:
            assert all(policy.may_listen(rules, forward) for forward in chain.from_iterable(wanted)), row
            checked += 1
    assert checked >= 5


# --- messages -------------------------------------------------------------------------------------------------------


def test_troubleshooting_quotes_what_the_program_says() -> None:
    nodes = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))]
    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
    strings = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    said = "\n".join(str(node.value) for node in strings if node not in docstrings)
    for row in rows(TROUBLESHOOT.read_text()):
        for quoted in code(row[0]):
            for piece in quoted.removeprefix("reason=").split("…"):
                words = piece.strip(" :;,()")
                assert words in said, f"nobody says {words!r} any more"


# --- the protocol ---------------------------------------------------------------------------------------------------

KINDS = messages.AnyMessage.__args__  # type: ignore[attr-defined]
TYPES: dict[Any, str] = {
    messages.Number: "number",
    messages.Count: "count",
    messages.Id: "id",
    messages.Text: "text",
    messages.Name: "name",
    messages.Features: "names",
    messages.Ids: "ids",
    messages.Numbers: "numbers",
    messages.LinkRole: "role",
    messages.Outcome: "outcome",
    bool: "boolean",
}


def type_word(hint: Any) -> str:
    if hint in TYPES:
        return TYPES[hint]
    return next(TYPES[part] for part in get_args(hint) if part in TYPES)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_protocol_page_has_every_message_and_field(kind: type[msgspec.Struct]) -> None:
    hints = get_type_hints(kind, include_extras=True)
    fields = {
        field.name: (type_word(hints[field.name]), "required" if field.required else "optional")
        for field in msgspec.structs.fields(kind)
    }
    text = section(PROTOCOL, f"`{kind.__name__.lower()}`")
    assert {code(row[0])[0]: (row[1], row[2]) for row in rows(text)} == fields


def test_protocol_page_lists_the_features() -> None:
    table = {code(row[0])[0]: code(row[1]) for row in rows(section(PROTOCOL, "Features"))}
    assert list(table) == list(messages.FEATURES)
    for kind in KINDS:
        name = kind.__name__.lower()
        said = re.search(r"Feature `(\w+)`\.", section(PROTOCOL, f"`{name}`"))
        assert [feature for feature, names in table.items() if name in names] == ([said[1]] if said else []), name


def test_protocol_page_is_right_about_datagram_flows() -> None:
    text = section(PROTOCOL, "Datagram flows")
    for words in (
        f"0 to {limits.DATAGRAM_BYTES:,} bytes",
        f"at {limits.DATAGRAM_QUEUE_BYTES:,} bytes, {datagrams.HEADER_BYTES} more counted for each datagram",
        f"at most {limits.LISTENER_FLOWS:,}: for one more",
    ):
        assert words in text, words
    assert (limits.UDP_IDLE_SECONDS, udp.REFUSED_SECONDS) == (60, 1)  # a minute, and a second


def test_protocol_page_is_right_about_reverse_forwards() -> None:
    text = section(PROTOCOL, "Reverse forwards")
    for words in (
        f"more than {reverse_server.FORWARDS:,} places",
        f"every {reverse_client.RETRY_SECONDS:g} seconds",
        f"should be idle: {REVERSE_LINKS} at first",
        f"at most {limits.OPEN_WAIT_SECONDS:g} seconds; then it is reset",
        f"without `;mode=MODE` {forwards.UNIX_MODE:o}",
    ):
        assert words in text, words
    assert f"is ended {TAKE_OVER_SECONDS:g} seconds later" in section(PROTOCOL, "Streams without a link")
    assert SURPLUS_SECONDS == 60.0  # a minute
    for bind in ("tcp:127.0.0.1:8080", "tcp:[::1]:8080", "tcp:*:0", "tcp:localhost:1", "socks:*:1080", "unix:/run/x"):
        forward = forwards.parse_listen(bind)
        assert forwards.parse_listen(forwards.listen_text(forward)) == forward


def test_protocol_page_is_right_about_times_and_numbers() -> None:
    """What an implementer must know of the constants, where the text says them."""
    hello = next(field for field in msgspec.structs.fields(messages.Hello) if field.name == "resume_window")
    assert hello.default == limits.RESUME_WINDOW_SECONDS == 300
    assert limits.MAX_RESUME_WINDOW_SECONDS == 3600
    life = section(PROTOCOL, "Life of a link")
    for words in (
        f"After {limits.PING_AFTER_SECONDS:g} seconds without one, at the client after "
        f"{limits.CLIENT_PING_AFTER_SECONDS:g} so",
        f"up to {liveness.TICK_SECONDS:g} seconds early",
        f"dead {limits.PONG_WITHIN_SECONDS:g} seconds after the `ping`",
        f"max({liveness.STALL_SECONDS:g} s, {liveness.STALL_ROUND_TRIPS} round trips)",
        f"{liveness.STALL_ANSWER_SECONDS:g} seconds to be answered",
        f"more than {liveness.GAP_SECONDS:g} seconds",
        f"{pace.FRAME_SECONDS:g} seconds at the measured rate",
        f"{pace.FIRST_BYTES:,} bytes",
    ):
        assert words in life, words
    waiting = section(PROTOCOL, "Streams without a link")
    for number in (limits.PRINCIPAL_DETACHED, limits.DETACHED):
        assert f"{number:,}" in waiting, number
    assert f"at most {DETACHED_IDS} ids" in section(PROTOCOL, "What the server noticed first")
    assert f"{limits.PRINCIPAL_TOMBSTONES:,}" in section(PROTOCOL, "Tombstones")
    assert f"{limits.TOMBSTONES:,}" in section(PROTOCOL, "Tombstones")


def test_protocol_page_has_the_state_tables() -> None:
    shown = {
        (code(row[0])[0], code(row[1])[0]): code(row[2])[0]
        for row in rows(section(PROTOCOL, "States of a link: transitions"))
    }
    assert shown == {
        (state.value, event.value): to.value
        for (state, event), to in EXCHANGE.items()
        if state is not to or event.value != "closed"
    }
    expected = {
        code(row[0])[0]: set(code(row[1])) for row in rows(section(PROTOCOL, "States of a link: what may come"))
    }
    assert expected == {state.value: {kind.__name__.lower() for kind in kinds} for state, kinds in EXPECTED.items()}


def calls(name: str, *, apart_from: str = "") -> Iterator[ast.Call]:
    """Every call of a function or method of this name in the package, but for one file's."""
    for path in SOURCES:
        if path.name == apart_from:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and name == getattr(node.func, "attr", getattr(node.func, "id", None)):
                yield node


def constants(nodes: Iterator[ast.Call], position: int, kind: type) -> set[Any]:
    found = (node.args[position] for node in nodes if len(node.args) > position)
    return {arg.value for arg in found if isinstance(arg, ast.Constant) and type(arg.value) is kind}


def test_protocol_page_lists_the_reset_codes_that_are_sent() -> None:
    sent = {
        *constants(calls("reset"), 0, str),
        *constants(calls("StreamError", apart_from="dynamic.py"), 0, str),  # whose applications are told, not the peer
        *_MOST_TELLING,
        "name-not-found",
    }
    assert {code(row[0])[0] for row in rows(section(PROTOCOL, "Reset codes"))} == sent


def test_protocol_page_lists_the_close_codes_that_are_sent() -> None:
    sent = {1002, 1007, *constants(calls("ProtocolError"), 1, int), *constants(calls("close"), 0, int)}
    assert {int(code(row[0])[0]) for row in rows(section(PROTOCOL, "Close codes"))} == sent


def test_protocol_page_lists_the_statuses_that_are_answered() -> None:
    nodes = [*calls("HandshakeError", apart_from="http_proxy.py"), *calls("_fault")]  # what a proxy answers is its own
    assert {int(code(row[0])[0]) for row in rows(section(PROTOCOL, "Refusals of the handshake"))} == constants(
        iter(nodes), 0, int
    )


# --- the worked example ---------------------------------------------------------------------------------------------

KEY = bytes.fromhex("37fa213d")  # that of RFC 6455 §5.7, again and again; a real client draws new ones
SESSION, SERVER, BOOT = "c2Vzc2lvbi1pZC0xMjM0NQ", "c2VydmVyLWlkLTEyMzQ1Ng", "Ym9vdC1pZC0xMjM0NTY3OA"
FIRST, SECOND = "c3RyZWFtLW51bWJlci0wMQ", "c3RyZWFtLW51bWJlci0wMg"


class Ends:
    """Two ends of one link: what they wrote, and the streams that they carry."""

    def __init__(self) -> None:
        self.client = LinkProtocol("client", keys=MaskKeys(lambda size: KEY * (size // len(KEY))), role="forward")
        self.server = LinkProtocol("server")
        self.budget = Budget(limits.PROCESS_BYTES)
        self.log: list[tuple[str, bytes]] = []
        self.ingress: StreamState
        self.egress: StreamState

    def cut(self) -> None:
        """The link is lost; both ends notice, and there is another one."""
        self.ingress.link_lost()
        self.egress.link_lost()
        self.client = LinkProtocol("client", keys=MaskKeys(lambda size: KEY * (size // len(KEY))), role="forward")
        self.server = LinkProtocol("server")

    def open(self, stream_id: str, target: str) -> None:
        self.ingress = StreamState(stream_id, egress=False, budget=self.budget)
        self.client.open(self.ingress, target=target, peer="127.0.0.1:40000")

    def flush(self, sender: LinkProtocol, *, lost: bool = False) -> None:
        """All that one end has to say goes to the other, or is `lost`. Applications take what comes at once."""
        other, way = (self.server, "C") if sender is self.client else (self.client, "S")
        while buffers := sender.pull(limits.FRAME_BYTES, 0.0, 0.0):
            for frame in frames(b"".join(bytes(buffer) for buffer in buffers)):
                self.log.append((way, frame))
                if lost:
                    continue
                for event in other.receive(frame):
                    if isinstance(event, Open):
                        self.egress = StreamState(event.stream, egress=True, budget=self.budget)
                        other.accept(self.egress)
                    elif isinstance(event, Resume):
                        other.resumed(self.egress, event, opened="10.0.0.5:5432")
                    elif isinstance(event, bytes | memoryview):
                        (self.egress if other is self.server else self.ingress).inbound.passed(len(event))


def frames(written: bytes) -> Iterator[bytes]:
    while written:
        length, at = written[1] & 127, 2
        if length == 126:
            length, at = int.from_bytes(written[2:4], "big"), 4
        end = at + length + (4 if written[1] & 128 else 0)
        yield written[:end]
        written = written[end:]


def worked_example() -> list[tuple[str, bytes]]:
    """The session of docs/reference/protocol.md, spoken by the code: direction and bytes of every frame."""
    ends = Ends()
    client, server = ends.client, ends.server
    client.send(Hello(version=1, session=SESSION, role="forward", agent="example/1"))
    ends.open(FIRST, "tcp:db:5432")
    ends.ingress.outbound.append(b"hi")
    ends.flush(client)
    server.send(Welcome(version=1, server=SERVER, boot=BOOT, keepalive=15))
    server.ping(1)
    ends.flush(server)
    ends.flush(client)
    server.opened("10.0.0.5:5432")
    ends.egress.outbound.append(b"HI")
    ends.flush(server)
    ends.ingress.ack_wanted = ends.egress.ack_wanted = True  # the sweep
    ends.flush(client)
    ends.flush(server)
    ends.ingress.outbound.end()
    ends.flush(client)
    ends.egress.inbound.end_delivered()
    ends.flush(server)
    ends.egress.outbound.end()
    ends.flush(server)
    ends.ingress.inbound.end_delivered()
    ends.flush(client)
    assert client.state is server.state is Exchange.IDLE
    ends.open(SECOND, "tcp:db:1")
    ends.flush(client)
    ends.egress.reset_wanted = ("refused", "connection refused")
    ends.flush(server)
    ends.flush(client)
    assert client.state is server.state is Exchange.IDLE
    client.close(1000, "surplus")
    ends.flush(client)
    ends.flush(server)
    return ends.log


def resumption_example() -> list[tuple[str, bytes]]:
    """The cut and the resumption of docs/reference/protocol.md: frames of two links, lost ones too."""
    ends = Ends()
    hello = Hello(version=1, session=SESSION, role="forward", resume_window=7200, features=["resume"])
    welcome = Welcome(version=1, server=SERVER, boot=BOOT, resume_window=3600, features=["resume"])
    ends.client.send(hello)
    ends.open(FIRST, "tcp:db:5432")
    ends.ingress.outbound.append(b"one ")
    ends.flush(ends.client)
    ends.server.send(welcome)
    ends.server.opened("10.0.0.5:5432")
    ends.flush(ends.server)
    ends.ingress.outbound.append(b"two")
    ends.flush(ends.client, lost=True)
    ends.ingress.outbound.end()
    ends.flush(ends.client, lost=True)
    ends.egress.outbound.append(b"ONE ")
    ends.flush(ends.server)
    ends.egress.outbound.append(b"TWO")
    ends.flush(ends.server, lost=True)
    ends.cut()
    ends.client.send(hello)
    ends.flush(ends.client)
    ends.server.send(msgspec.structs.replace(welcome, known=True))
    ends.flush(ends.server)
    ends.ingress.epoch += 1
    ends.client.resume(ends.ingress, opened=None)
    ends.flush(ends.client)
    ends.flush(ends.server)
    assert (ends.ingress.replayed, ends.egress.replayed) == (3, 3)
    ends.flush(ends.client)
    ends.egress.inbound.end_delivered()
    ends.flush(ends.server)
    ends.egress.outbound.end()
    ends.flush(ends.server)
    ends.ingress.inbound.end_delivered()
    ends.flush(ends.client)
    assert ends.client.state is ends.server.state is Exchange.IDLE
    assert ends.budget.held == 0
    return ends.log


def unmasked(frame: bytes) -> bytes:
    if not frame[1] & 128:
        return frame[4 if frame[1] & 127 == 126 else 2 :]
    at = 8 if frame[1] & 127 == 126 else 6
    return bytes(byte ^ KEY[index % 4] for index, byte in enumerate(frame[at:]))


def rendered(log: list[tuple[str, bytes]]) -> str:
    """A worked example as the page shows it: sender, the frame in hexadecimal, and the payload of text frames."""
    lines = []
    for way, frame in log:
        dump = frame.hex(" ")
        lines += [
            f"{way}  {dump[start : start + 96].rstrip()}" if not start else f"   {dump[start : start + 96].rstrip()}"
            for start in range(0, len(dump), 96)
        ]
        if frame[0] & 15 == 1:
            lines.append(f"   {unmasked(frame).decode()}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("heading", "example"),
    [
        ("Worked example: frames", worked_example),
        ("Worked example: a cut and a resumption", resumption_example),
    ],
)
def test_the_worked_examples_are_what_the_code_says(
    heading: str, example: Callable[[], list[tuple[str, bytes]]]
) -> None:
    shown = re.findall(r"^```text\n(.*?)^```", section(PROTOCOL, heading), re.MULTILINE | re.DOTALL)
    dumped = [line for block in shown for line in block.splitlines()]
    assert dumped == rendered(example()).splitlines()


def test_the_worked_example_shakes_hands_as_the_code_does() -> None:
    request, answer = re.findall(
        r"^```text\n(.*?)^```", section(PROTOCOL, "Worked example: handshake"), re.MULTILINE | re.DOTALL
    )
    upgrade = handshake.ClientUpgrade(
        "tunnel.example.org", "/", b"the sample nonce", messages.SUBPROTOCOL, [("Authorization", "Bearer " + "A" * 43)]
    )
    assert upgrade.request().decode() == request.replace("\n", "\r\n") + "\r\n"
    head = RequestReader().feed(upgrade.request())
    assert head is not None
    accepted = handshake.accept(head, path="/", subprotocols=(messages.SUBPROTOCOL,))
    assert handshake.accept_response(accepted).decode() == answer.replace("\n", "\r\n") + "\r\n"
    assert upgrade.feed(handshake.accept_response(accepted))
