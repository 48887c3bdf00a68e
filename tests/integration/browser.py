"""Chromium without a window, driven over the DevTools protocol, and web sites of a page each for it to open."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self
from urllib.request import Request, urlopen

from websockets.sync.client import ClientConnection, connect

from .process import Process, wait_until
from .programs import require

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECONDS = 60.0
"""For any one answer of the browser, before the test fails."""


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"<!doctype html><meta charset=utf-8><title>page</title><h1>A page</h1>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
        pass


class _Files(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
        pass


@contextmanager
def site(directory: Path | None = None) -> Iterator[str]:
    """A web site with one page, or with the files of a directory. Yields its origin."""
    handler = _Page if directory is None else partial(_Files, directory=str(directory))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(SECONDS)


class Page:
    """One tab."""

    def __init__(self, connection: ClientConnection) -> None:
        self._socket = connection
        self._number = 0

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        """A DevTools command's result; events that come meanwhile are passed over."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(SECONDS))
            if message.get("id") == self._number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def run(self, script: str, *arguments: Any) -> Any:
        """Call a JavaScript function, which may be async, with JSON arguments. Returns what it returns, from JSON."""
        call = f"({script})({', '.join(map(json.dumps, arguments))})"
        done = self.command("Runtime.evaluate", expression=call, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")


class Chromium:
    """A running browser, with nothing in it of who runs the tests.

    Args:
        directory: for its profile and logs.
        trusted: SHA-256 digests of public keys, base64, of servers whose own certificates it is to take.
    """

    def __init__(self, directory: Path, *, trusted: tuple[str, ...] = ()) -> None:
        self._profile = directory / "profile"
        command: list[str | Path] = [
            require("chromium"),
            "--headless=new",
            "--no-sandbox",  # it refuses to run as root with one
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            "--no-proxy-server",
            "--remote-debugging-port=0",
            f"--user-data-dir={self._profile}",
            *([f"--ignore-certificate-errors-spki-list={','.join(trusted)}"] if trusted else []),
            "about:blank",
        ]
        self._process = Process("chromium", command, directory=directory)

    def __enter__(self) -> Self:
        self._process.__enter__()
        try:
            found = self._profile / "DevToolsActivePort"
            wait_until(
                lambda: not self._process.running or (found.exists() and found.read_text().count("\n") > 0),
                "Chromium's DevTools",
                within=60,
            )
            assert self._process.running, self._process.tail()
            self._port = int(found.read_text().splitlines()[0])
        except BaseException as error:
            self._process.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, *details: Any) -> None:
        self._process.__exit__(*details)

    @contextmanager
    def open(self, url: str) -> Iterator[Page]:
        """A new tab with the page at `url` in it."""
        asked = Request(f"http://127.0.0.1:{self._port}/json/new?about:blank", method="PUT")
        with urlopen(asked, timeout=SECONDS) as answer:  # noqa: S310  # it is http
            devtools = json.load(answer)["webSocketDebuggerUrl"]
        with connect(devtools, max_size=None, open_timeout=SECONDS, proxy=None) as connection:
            page = Page(connection)
            page.command("Page.navigate", url=url)
            loaded = "() => document.readyState === 'complete' && location.origin !== 'null'"
            wait_until(lambda: page.run(loaded) is True, f"the page at {url}")
            yield page
