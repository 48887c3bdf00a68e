"""Through mitmproxy, which opens TLS with an authority of its own: trusted and not."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme

from .process import Process, wait_until
from .programs import accepts, install
from .sockets import Echo, unused_port
from .test_proxies import works
from .tunnel import Client, Server, environment, run

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.programs, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def mitmdump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program; unless installed it gets an environment of its own, since its dependencies do not go with ours."""
    installed = shutil.which("mitmdump")
    if installed is not None:
        return Path(installed)
    directory = tmp_path_factory.mktemp("mitmproxy")
    try:
        install(sys.executable, "-m", "venv", directory)
        install(directory / "bin" / "pip", "install", "-q", "--disable-pip-version-check", "mitmproxy>=10", within=240)
    except AssertionError as error:
        reason = f"mitmproxy cannot be installed: {error}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return directory / "bin" / "mitmdump"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """With a certificate of an authority that mitmproxy knows: yields the authority's file, too."""
    directory = tmp_path_factory.mktemp("server")
    authority = trustme.CA()
    ca, cert, key = directory / "ca.pem", directory / "cert.pem", directory / "key.pem"
    authority.cert_pem.write_to_path(str(ca))
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(cert))
    shutil.copy(cert, key)
    key.chmod(0o600)
    with Server(directory, plain=False, arguments=["--cert", str(cert), "--key", str(key)]) as running:
        yield running, ca


@pytest.fixture(scope="module")
def proxy(
    mitmdump: Path, server: tuple[Server, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """Yields its URL and the file of its authority."""
    directory, port = tmp_path_factory.mktemp("run"), unused_port()
    argv = [
        mitmdump, "-q", "--set", f"confdir={directory}", "--listen-host", "127.0.0.1", "-p", str(port),
        "--set", f"ssl_verify_upstream_trusted_ca={server[1]}",
    ]  # fmt: skip
    with Process("mitmdump", argv, directory=directory, env=environment(directory)) as process:
        authority = directory / "mitmproxy-ca-cert.pem"
        wait_until(lambda: not process.running or (authority.exists() and accepts(port)), "mitmproxy to listen")
        assert process.running, process.tail()
        yield f"http://127.0.0.1:{port}", authority


def test_with_its_authority_trusted(server: tuple[Server, Path], proxy: tuple[str, Path], tmp_path: Path) -> None:
    url = server[0].invitation.changed(pin="")
    arguments = ["--proxy", proxy[0], "--ca", str(proxy[1])]
    with Echo() as echo, Client(tmp_path, url, [echo.address], arguments=arguments) as client:
        works(client, echo.address)


def test_untrusted_it_is_named_and_gets_no_token(
    server: tuple[Server, Path], proxy: tuple[str, Path], tmp_path: Path
) -> None:
    url = server[0].invitation.changed(pin="")
    done = run(tmp_path, "client", "-L", "0:127.0.0.1:9", "--proxy", proxy[0], WSTUNNEL_URL=url)
    assert done.returncode == 1
    assert "did not prove who it is" in done.stderr
    assert 'It was issued by "mitmproxy" (mitmproxy)' in done.stderr


def test_a_pin_lets_nobody_between(server: tuple[Server, Path], proxy: tuple[str, Path], tmp_path: Path) -> None:
    url = server[0].invitation.changed(pin=f"#sha256={'A' * 43}")
    done = run(tmp_path, "client", "-L", "0:127.0.0.1:9", "--proxy", proxy[0], WSTUNNEL_URL=url)
    assert done.returncode == 1
    assert "the server's key is not the one in the login URL" in done.stderr
