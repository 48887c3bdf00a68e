"""The map of the package: dependencies point down, and `wire/` is deaf and blind. Read from the source.

A new module fails here until it is placed in `LAYERS`. Place it as low as it goes; if that does not work because it
needs something above, it is the design that has to change, not the table.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import wstunnel

ROOT = Path(wstunnel.__file__).parent

# From low to high. A module may import those of lower lines, and none of its own.
LAYERS: tuple[tuple[str, ...], ...] = (
    # Words that everybody uses.
    ("wstunnel", "errors", "limits"),
    # The protocol, sans I/O.
    ("wire", "wire.buffer", "wire.credit", "wire.http1", "wire.masking", "wire.messages"),
    ("wire.addresses", "wire.http_body"),
    ("wire.frames", "wire.handshake", "wire.proxy_protocol", "wire.socks", "wire.states", "wire.tombstones"),
    ("wire.connect", "wire.datagrams", "wire.directions", "wire.forwarded", "wire.http_proxy", "wire.plain"),
    ("wire.protocol",),
    # This machine and the texts with a grammar; none knows of another.
    ("logs",),
    (
        "descriptors",
        "liveness",
        "outages",
        "pace",
        "pool",
        "sockets",
        "state",
        "systemd",
        "targets",
        "transport",
        "trio_loop",
    ),
    ("reactor",),
    ("absence", "auth", "endpoints.plain_side", "forwards", "front", "plain_endpoints", "tls"),
    (
        "endpoints.proxy_header",
        "endpoints.stdio",
        "endpoints.unix",
        "issuer",
        "policy",
        "tls_relay",
        "upstream",
        "validity",
    ),
    # The data path: one stream, one link, and the ways out.
    ("config", "dial", "endpoints.plain_client", "endpoints.plain_target", "flow", "link", "profiles", "stream"),
    ("flows", "proxy_tunnel"),
    ("dialler", "endpoints", "endpoints.plain", "endpoints.tcp", "recovery", "session"),
    ("egress", "endpoints.listeners", "failover", "ingress"),
    ("endpoints.udp",),
    ("endpoints.socks_udp", "reverse_client", "reverse_server"),
    ("endpoints.dynamic",),
    # The roles.
    ("client_session", "plain_server", "raw", "server_session"),
    ("client", "server"),
    ("check_advice", "check_report", "check_watch", "connect", "route"),
    ("check_link",),
    ("check_idle",),
    ("check",),
    # The command line. `cli` itself is `main`; the group finds the commands by name when they are asked for.
    ("cli.reports",),
    ("cli.group", "cli.options", "cli.running"),
    ("cli", "cli.reach"),
    (
        "cli.check",
        "cli.client",
        "cli.connect",
        "cli.demo_child",
        "cli.demo_processes",
        "cli.invite",
        "cli.login",
        "cli.profiles",
        "cli.server",
    ),
    ("cli.demo_relay", "cli.demo_target"),
    ("cli.demo_load",),
    ("cli.demo_screen",),
    ("cli.demo",),
    ("__main__",),
)

NAMED_AT_RUN_TIME = {"cli.group"}
"""Modules that may import by a name that is made up while they run. No other may: this test would not see it."""

WIRE_MAY_USE = {
    # of the package
    *("errors", "limits"),
    # of Python: what computes, and nothing that reads a clock, a random number, a file or a socket
    *("__future__", "abc", "base64", "codecs", "collections", "collections.abc", "dataclasses", "enum"),
    *("functools", "hashlib", "http", "ipaddress", "math", "re", "struct", "typing"),
    # of others: parsers, and masking in C (all of websockets besides imports asyncio, socket and ssl)
    *("h11", "msgspec", "websockets.speedups"),
}
IMPURE = {
    *("asyncio", "datetime", "logging", "multiprocessing", "os", "pathlib", "random", "secrets", "select"),
    *("selectors", "signal", "socket", "ssl", "subprocess", "sys", "threading", "time", "trio", "uuid", "websockets"),
}


@dataclass(frozen=True)
class Import:
    """One module that another imports, both by their names below `wstunnel` if they are of it.

    `type_only`: it stands under `if TYPE_CHECKING` and is gone when the program runs.
    """

    importer: str
    imported: str
    line: int
    type_only: bool


def short(name: str) -> str:
    return name.removeprefix("wstunnel.")


def source_files() -> dict[str, str]:
    """The source of each module, by its short name. A package goes by its own name, the topmost is `wstunnel`."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = [*path.relative_to(ROOT).with_suffix("").parts]
        if parts[-1] == "__init__":
            parts.pop()
        found[".".join(parts) or "wstunnel"] = path.read_text(encoding="utf-8")
    return found


def is_foreign_module(name: str) -> bool:
    """Whether a dotted name outside the package is a module rather than something in one. Imports what is above it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # what stands before the last dot is no package
        return False


class Reader(ast.NodeVisitor):
    """Collects all imports of one module: at its top, in functions, under conditions, and by `import_module`."""

    def __init__(self, name: str, modules: Mapping[str, str]) -> None:
        self.name = name
        self.modules = modules
        self.type_only = False
        self.imports: list[Import] = []

    def add(self, imported: str, line: int) -> None:
        self.imports.append(Import(self.name, short(imported), line, self.type_only))

    def visit_If(self, node: ast.If) -> None:
        before = self.type_only
        self.type_only |= ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for child in node.body:
            self.visit(child)
        self.type_only = before
        for child in (node.test, *node.orelse):
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if node.level:
            packages = ["wstunnel", *self.name.split(".")] if self.name != "wstunnel" else ["wstunnel"]
            is_package = any(other.startswith(f"{self.name}.") for other in self.modules) or self.name == "wstunnel"
            packages = packages[: len(packages) + is_package - node.level]
            module = ".".join([*packages, module] if module else packages)
        for alias in node.names:
            whole = f"{module}.{alias.name}"
            if module.split(".")[0] == "wstunnel":
                deeper = short(whole) in self.modules
            else:  # only of wire/ it is asked what exactly it imports from outside
                deeper = self.name.split(".")[0] == "wire" and is_foreign_module(whole)
            self.add(whole if deeper else module, node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        if ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__"):
            name = node.args[0] if node.args else None
            literal = name.value if isinstance(name, ast.Constant) else None
            self.add(literal if isinstance(literal, str) else "?", node.lineno)


def read_imports(modules: Mapping[str, str]) -> Iterator[Import]:
    for name, source in modules.items():
        reader = Reader(name, modules)
        reader.visit(ast.parse(source))
        yield from reader.imports


def complaints(modules: Mapping[str, str], layers: tuple[tuple[str, ...], ...] = LAYERS) -> list[str]:
    """Everything that is wrong with `modules`, a line each, in words that say what to do."""
    level = {name: number for number, layer in enumerate(layers) for name in layer}
    found = [f"{name} is in no layer: place it in LAYERS" for name in modules if name not in level]
    found += [f"{name} is placed in LAYERS and does not exist" for name in level if name not in modules]
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for item in read_imports(modules):
        where = f"{item.importer}:{item.line}"
        if item.imported == "?" and item.importer not in NAMED_AT_RUN_TIME:
            found.append(f"{where} imports by a name made up at run time")
        if item.importer.split(".")[0] == "wire":
            own = item.imported.split(".")[0] == "wire"
            # Types count as well: what wire/ cannot import it has no business to know.
            if not own and item.imported not in WIRE_MAY_USE:
                found.append(f"{where} imports {item.imported}: wire/ is sans I/O and knows only WIRE_MAY_USE")
        # Under TYPE_CHECKING imports may point up or sideways (a stream and its link name each other's types): they
        # are gone at run time, so they can neither make a cycle nor hinder the use of the lower module alone.
        if item.imported not in modules or item.type_only:
            continue
        graph[item.importer].add(item.imported)
        if item.importer in level and item.imported in level and level[item.imported] >= level[item.importer]:
            found.append(f"{where} imports {item.imported}, which is not below it")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("cycle: " + " <- ".join(error.args[1]))
    return found


def test_the_package_follows_its_map() -> None:
    assert complaints(source_files()) == []


def test_each_module_is_placed_once() -> None:
    placed = [name for layer in LAYERS for name in layer]
    assert len(placed) == len(set(placed))


def test_nothing_impure_was_let_into_wire() -> None:
    assert not WIRE_MAY_USE & IMPURE


def test_the_source_is_what_is_read() -> None:
    """The check below would pass if no file were found."""
    modules = source_files()
    assert {"wstunnel", "wire", "wire.protocol", "cli", "cli.group", "__main__"} <= set(modules)
    runtime = {(item.importer, item.imported) for item in read_imports(modules) if not item.type_only}
    assert {
        ("wire.protocol", "wire.messages"),  # from wstunnel.wire import messages
        ("wire.protocol", "errors"),  # from wstunnel.errors import ProtocolError
        ("cli", "cli.group"),  # in a function
        ("cli.group", "wstunnel"),  # from wstunnel import __version__
        ("cli.group", "?"),  # import_module
        ("wire.frames", "collections.abc"),
    } - runtime == {("wire.frames", "collections.abc")}  # under TYPE_CHECKING
    assert Import("link", "stream", 0, True) in {
        Import(item.importer, item.imported, 0, item.type_only) for item in read_imports(modules)
    }


class TestTheCheckItself:
    """On made-up modules: two layers, and `wire` below both."""

    LAYERS = (("wstunnel",), ("wire",), ("wire.a",), ("low", "beside"), ("high", "package"), ("package.inside",))

    def check(self, **sources: str) -> list[str]:
        modules = {name: "" for layer in self.LAYERS for name in layer}
        modules |= {name.replace("__", "."): source for name, source in sources.items()}
        return complaints(modules, self.LAYERS)

    @pytest.mark.parametrize(
        "source",
        [
            *("", "import os, trio", "import wstunnel", "from wstunnel import low", "from wstunnel.low import x"),
            *("import wstunnel.low", "import wstunnel.low as l", "from . import low", "from .low import x"),
            *("from wstunnel.wire import a", "from wstunnel.wire.a import x", "from wstunnel import x"),
            "def f():\n    from wstunnel import low",
        ],
    )
    def test_down(self, source: str) -> None:
        assert self.check(high=source) == []

    @pytest.mark.parametrize(
        "source",
        [
            *("from wstunnel import high", "from wstunnel.high import x", "import wstunnel.high as h"),
            *("from . import high", "from .high import x", "from wstunnel import x, high"),
            *("import importlib\nimportlib.import_module('wstunnel.high')", "__import__('wstunnel.high')"),
            "def f():\n    if x:\n        from wstunnel.high import y",
            "try:\n    import wstunnel.high\nexcept ImportError: pass",
            "class C:\n    from wstunnel.high import x",
            "if TYPE_CHECKING:\n    pass\nelse:\n    import wstunnel.high",
            "if not TYPE_CHECKING:\n    import wstunnel.high",
        ],
    )
    def test_up(self, source: str) -> None:
        found = self.check(low=source)
        assert len(found) == 1
        assert found[0].startswith("low:")
        assert found[0].endswith("imports high, which is not below it")

    def test_sideways(self) -> None:
        assert self.check(low="import wstunnel.beside") == ["low:1 imports beside, which is not below it"]

    def test_relative_imports_within_a_package(self) -> None:
        assert self.check(package__inside="from .. import low\nfrom ..high import x\nfrom . import y") == []
        assert self.check(package="from . import inside") == ["package:1 imports package.inside, which is not below it"]
        assert self.check(package="from .inside import x") == [
            "package:1 imports package.inside, which is not below it"
        ]

    @pytest.mark.parametrize("test", ["TYPE_CHECKING", "typing.TYPE_CHECKING"])
    def test_types_may_point_up(self, test: str) -> None:
        assert self.check(low=f"if {test}:\n    from wstunnel.high import X", high="import wstunnel.low") == []

    def test_cycles(self) -> None:
        found = self.check(low="def f():\n    import wstunnel.high", high="import wstunnel.low")
        assert found[0] == "low:2 imports high, which is not below it"
        assert found[1].startswith("cycle: ")
        assert {"low", "high"} <= set(found[1].removeprefix("cycle: ").split(" <- "))

    def test_new_and_lost_modules(self) -> None:
        assert self.check(new="") == ["new is in no layer: place it in LAYERS"]
        assert complaints({"wstunnel": ""}, (("wstunnel",), ("gone",))) == [
            "gone is placed in LAYERS and does not exist"
        ]

    def test_names_made_up_at_run_time(self) -> None:
        assert self.check(low="import_module(f'wstunnel.{x}')") == ["low:1 imports by a name made up at run time"]
        assert self.check(low="import_module()") == ["low:1 imports by a name made up at run time"]

    @pytest.mark.parametrize(
        ("source", "imported"),
        [
            *((f"import {name}", name) for name in sorted(IMPURE)),
            ("from os import urandom", "os"),
            ("from http import client", "http.client"),
            ("import http.client", "http.client"),
            ("from websockets.frames import apply_mask", "websockets.frames"),
            ("def f():\n    import time", "time"),
            ("if TYPE_CHECKING:\n    import socket", "socket"),
            ("if TYPE_CHECKING:\n    from wstunnel.low import X", "low"),
            ("import trio.testing", "trio.testing"),
        ],
    )
    def test_wire_is_sans_io(self, source: str, imported: str) -> None:
        found = self.check(wire__a=source)
        assert len(found) == 1
        assert f" imports {imported}: wire/ is sans I/O" in found[0]

    def test_wire_knows_nothing_above_it(self) -> None:
        found = self.check(wire__a="from wstunnel import low")
        assert found == [
            "wire.a:1 imports low: wire/ is sans I/O and knows only WIRE_MAY_USE",
            "wire.a:1 imports low, which is not below it",
        ]

    @pytest.mark.parametrize(
        "source",
        [
            *("import re", "from collections.abc import Iterator", "from http import HTTPStatus", "import msgspec"),
            *("from websockets.speedups import apply_mask", "from wstunnel.wire import x", "import h11"),
        ],
    )
    def test_what_wire_may_use(self, source: str) -> None:
        assert self.check(wire__a=source) == []
