"""Plain endpoints from a web page in Chromium, by the browser's own WebSocket."""

from __future__ import annotations

import base64
import hashlib
import os
from typing import TYPE_CHECKING, Any

import pytest

from .browser import Chromium, Page, site
from .plain import Endpoints, endpoints
from .sockets import read_exactly, read_to_end, reset

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.programs, pytest.mark.timeout(180)]

OPEN = """
function open(url, protocols) {
  const socket = new WebSocket(url, protocols);
  socket.binaryType = 'arraybuffer';
  window.socket = socket;
  window.received = [];
  window.waiting = [];
  window.ended = new Promise(resolve => {
    socket.onclose = event => resolve({code: event.code, clean: event.wasClean, reason: event.reason});
  });
  socket.onmessage = event => {
    window.received.push(...(typeof event.data === 'string' ? [event.data] : new Uint8Array(event.data)));
    window.waiting.forEach(check => check());
  };
  return new Promise(resolve => {
    socket.onopen = () => resolve({open: true, protocol: socket.protocol});
    window.ended.then(closed => resolve({open: false, ...closed}));
  });
}
"""
RECEIVED = """
size => new Promise(resolve => {
  const check = () => {
    if (window.received.length >= size) resolve(String.fromCharCode(...window.received.slice(0, size)));
  };
  window.waiting.push(check);
  check();
})
"""
EXCHANGE = """
async size => {
  const sent = new Uint8Array(size);
  for (let at = 0; at < size; at += 65536) crypto.getRandomValues(sent.subarray(at, at + 65536));
  const back = new Uint8Array(size);
  let filled = 0, other = 0;
  const done = new Promise(resolve => {
    window.socket.onmessage = event => {
      const piece = new Uint8Array(event.data);
      back.set(piece, filled);
      filled += piece.length;
      if (filled === size) resolve();
    };
  });
  for (let at = 0; at < size; at += 100000) window.socket.send(sent.subarray(at, at + 100000));
  await done;
  for (let at = 0; at < size; at++) other += sent[at] !== back[at];
  return {filled, other};
}
"""
CLOSED = "() => window.ended"


@pytest.fixture(scope="module")
def origins() -> Iterator[tuple[str, str]]:
    """Two sites: the one that is let in, and another."""
    with site() as ours, site() as other:
        yield ours, other


@pytest.fixture(scope="module", params=["tls", "plain"])
def served(
    request: pytest.FixtureRequest, origins: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoints]:
    directory = tmp_path_factory.mktemp("server")
    # As a person may write it: a browser sends it without the slash.
    with endpoints(directory, "--allow-origin", f"{origins[0]}/", plain=request.param == "plain") as running:
        yield running


@pytest.fixture(scope="module")
def browser(served: Endpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    pin = served.server.invitation.pin.removeprefix("#sha256=")
    trusted = (base64.b64encode(base64.urlsafe_b64decode(pin + "=")).decode(),) if pin else ()
    with Chromium(tmp_path_factory.mktemp("chromium"), trusted=trusted) as running:
        yield running


@pytest.fixture
def page(browser: Chromium, origins: tuple[str, str]) -> Iterator[Page]:
    with browser.open(f"{origins[0]}/") as opened:
        yield opened


def dial(page: Page, served: Endpoints, path: str, *protocols: str) -> dict[str, Any]:
    """Open the page's WebSocket, with what pages offer unless told otherwise."""
    offered = protocols or ("binary", f"bearer.{served.token}")
    opened: dict[str, Any] = page.run(OPEN, served.url(path), offered)
    return opened


def test_binary_both_ways(page: Page, served: Endpoints) -> None:
    assert dial(page, served, "/echo") == {"open": True, "protocol": "binary"}
    size = 4_000_000
    assert page.run(EXCHANGE, size) == {"filled": size, "other": 0}
    page.run("() => window.socket.close(1000)")
    assert page.run(CLOSED) == {"code": 1000, "clean": True, "reason": ""}


def test_what_the_server_says_unasked_and_its_end(page: Page, served: Endpoints) -> None:
    assert dial(page, served, "/listener")["open"]
    with served.listener.accept() as target:
        target.sendall(b"unasked")
        assert page.run(RECEIVED, 7) == "unasked"
        page.run("() => window.socket.send(new Uint8Array([104, 105]))")
        assert read_exactly(target, 2) == b"hi"
        target.sendall(b" and goodbye")
    # All of it before the end.
    assert page.run(CLOSED) == {"code": 1000, "clean": True, "reason": "the target has closed the connection"}
    assert page.run(RECEIVED, 19) == "unasked and goodbye"


def test_the_page_goes_away(page: Page, served: Endpoints) -> None:
    assert dial(page, served, "/listener")["open"]
    with served.listener.accept() as target:
        data = os.urandom(200_000)
        script = "text => window.socket.send(Uint8Array.from(atob(text), character => character.charCodeAt(0)))"
        page.run(script, base64.b64encode(data).decode())
        page.run("() => window.socket.close()")
        assert hashlib.sha256(read_to_end(target)).digest() == hashlib.sha256(data).digest()


def test_the_target_resets(page: Page, served: Endpoints) -> None:
    assert dial(page, served, "/listener")["open"]
    reset(served.listener.accept())
    assert page.run(CLOSED) == {"code": 1011, "clean": True, "reason": "the target's connection broke"}


def test_text_is_refused(page: Page, served: Endpoints) -> None:
    assert dial(page, served, "/echo")["open"]
    page.run("() => window.socket.send('words')")
    assert page.run(CLOSED) == {"code": 1003, "clean": True, "reason": "this endpoint takes binary messages only"}


def test_another_origin_is_refused(browser: Chromium, served: Endpoints, origins: tuple[str, str]) -> None:
    before = len(served.server.stderr)
    with browser.open(f"{origins[1]}/") as other:
        assert dial(other, served, "/listener") == {"open": False, "code": 1006, "clean": False, "reason": ""}
    served.server.wait_for_line("status=403 .*web pages of this origin", after=before)


@pytest.mark.parametrize("offered", [("binary",), ("binary", "bearer." + "x" * 43)])
def test_without_a_valid_token(page: Page, served: Endpoints, offered: tuple[str, ...]) -> None:
    before = len(served.server.stderr)
    assert dial(page, served, "/listener", *offered)["open"] is False
    served.server.wait_for_line("status=401", after=before)


def test_a_token_alone_is_not_enough_for_browsers(page: Page, served: Endpoints) -> None:
    """No subprotocol is chosen then, which Chromium takes for a failure; hence pages offer `binary` first."""
    assert dial(page, served, "/echo", f"bearer.{served.token}")["open"] is False


def test_a_target_that_refuses(page: Page, served: Endpoints) -> None:
    before = len(served.server.stderr)
    assert dial(page, served, "/refusing")["open"] is False
    served.server.wait_for_line("status=502", after=before)


def test_tokens_are_in_no_log(served: Endpoints) -> None:
    assert served.token not in served.server.stderr
    assert "endpoint=/echo" in served.server.stderr
