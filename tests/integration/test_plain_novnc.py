"""noVNC in Chromium, through a plain endpoint, to an X server that shows its screen by VNC."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .browser import Chromium, site
from .plain import endpoints
from .process import Process, wait_until
from .programs import accepts, require
from .sockets import unused_port

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.programs, pytest.mark.timeout(180)]

NOVNC = Path("/usr/share/novnc")
CONNECT = """
async (url, protocols) => {
  document.body.innerHTML = '<div id=screen style="width: 640px; height: 480px"></div>';
  const RFB = (await import('/core/rfb.js')).default;
  const rfb = new RFB(document.getElementById('screen'), url, {wsProtocols: protocols});
  return await new Promise(resolve => {
    rfb.addEventListener('connect', () => rfb.addEventListener('desktopname', event => 0));
    rfb.addEventListener('desktopname', event => resolve(event.detail.name));
    rfb.addEventListener('disconnect', event => resolve(`disconnected, clean: ${event.detail.clean}`));
  });
}
"""
# How many of the screen's pixels are white, of how many.
PIXELS = """
() => {
  const canvas = document.querySelector('#screen canvas');
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  let white = 0;
  for (let at = 0; at < data.length; at += 4) white += data[at] + data[at + 1] + data[at + 2] === 765;
  return [white, data.length / 4];
}
"""


@pytest.fixture
def vnc(tmp_path: Path) -> Iterator[int]:
    """An X server with an empty, white screen. Yields its VNC port."""
    port = unused_port()
    flags = ["-rfbport", str(port), "-SecurityTypes", "None", "-localhost", "-desktop", "a white screen", "-wr"]
    # The display's number is of no use to anybody here; it only must be free.
    command = [require("Xtigervnc"), f":{port}", "-geometry", "320x200", "-depth", "24", *flags]
    with Process("xvnc", command, directory=tmp_path) as running:
        wait_until(lambda: not running.running or accepts(port), "the VNC server")
        assert running.running, running.tail()
        yield port


def test_the_screen_is_shown(vnc: int, tmp_path: Path) -> None:
    if not NOVNC.exists():
        require("novnc")  # which says what is missing
    with (
        site(NOVNC) as origin,
        endpoints(tmp_path, "--endpoint", f"/vnc=127.0.0.1:{vnc}", "--allow-origin", origin) as served,
        Chromium(tmp_path) as browser,
        browser.open(f"{origin}/vnc_lite.html") as page,
    ):
        name = page.run(CONNECT, served.url("/vnc"), ["binary", f"bearer.{served.token}"])
        assert name == "a white screen"
        # All but the pointer.
        wait_until(lambda: page.run(PIXELS)[0] > 0.9 * 320 * 200, "the screen's pixels")
        assert page.run(PIXELS)[1] == 320 * 200
        picture = page.command("Page.captureScreenshot", format="png")["data"]
        (tmp_path / "novnc.png").write_bytes(base64.b64decode(picture))
