"""Starting, stopping, crashing, coming back, and the wrong credentials: what each process says and how it exits."""

from __future__ import annotations

import re
import signal
import socket
import ssl
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

import pytest
import trustme

from .process import Process, wait_until
from .sockets import Echo, pattern, read_exactly, unused_port
from .tunnel import COMMAND, Client, Server, environment, settle

if TYPE_CHECKING:
    from pathlib import Path

STOP_SECONDS = 15.0
"""3 s are promised; a loaded machine may take longer to notice."""
WRONG_PIN = "#sha256=" + "0" * 64


def _works(client: Client, target: str) -> None:
    with client.connect(target) as app:
        app.sendall(b"are you there")
        assert read_exactly(app, 13) == b"are you there"


def _works_again(client: Client, target: str) -> bool:
    try:
        _works(client, target)
    except (OSError, AssertionError):
        return False
    return True


def _said_of_the_server(client: Client, after: int = 0) -> list[str]:
    """The lines of a client's log that are about no forward and no stream."""
    return [line for line in client.stderr[after:].splitlines() if not re.search(r"^listening |\bstream\b", line)]


class TestServerGone:
    def test_killed_and_back_on_the_same_port(self, tmp_path: Path) -> None:
        with Echo() as echo, ExitStack() as stack:
            crashing = stack.enter_context(Server(tmp_path, plain=False, port=unused_port(), name="crashing"))
            invitation = crashing.invitation
            client = stack.enter_context(Client(tmp_path, invitation.url, [echo.address]))
            app = stack.enter_context(client.connect(echo.address))
            app.sendall(b"before")
            assert read_exactly(app, 6) == b"before"
            settle(
                crashing, client
            )  # a link that is half-way up when the server dies may come up yet, and be lost again
            said = len(client.stderr)

            crashing.kill()
            wait_until(lambda: len(_said_of_the_server(client, said)) == 1, "the client to say that the server is away")

            stack.enter_context(Server(tmp_path, plain=False, port=invitation.port, name="restarted"))
            with pytest.raises(ConnectionResetError):  # only now does it hear that the stream is unknown
                app.recv(1)
            wait_until(lambda: _works_again(client, echo.address), "the tunnel to work again", within=60)
            assert client.running
            # Once that it is away and once that it is back, not once a link or once a try.
            wait_until(lambda: len(_said_of_the_server(client, said)) == 2, "the client to say that the server is back")

    def test_away_from_the_start_is_said_once(self, tmp_path: Path) -> None:
        with Server(tmp_path, plain=True, port=unused_port(), name="first") as first:
            invitation = first.invitation
        with (
            Echo() as echo,
            # Something that takes connections and drops them: so that the tries can be counted.
            socket.create_server(("127.0.0.1", invitation.port)) as listener,
            Client(tmp_path, invitation.url, [echo.address]) as client,
        ):
            listener.settimeout(60)
            listener.accept()[0].close()
            wait_until(lambda: bool(_said_of_the_server(client)), "the client to say that the server is away")
            for _ in range(5):
                listener.accept()[0].close()
            assert client.running
            assert len(_said_of_the_server(client)) == 1
            listener.close()
            with Server(tmp_path, plain=True, port=invitation.port, name="second"):
                wait_until(lambda: _works_again(client, echo.address), "the tunnel to work", within=60)
                assert client.stop(signal.SIGTERM) == 0

    def test_an_application_waits_for_a_link_ten_seconds_at_most(self, tmp_path: Path) -> None:
        with Server(tmp_path, plain=True, port=unused_port()) as gone:
            invitation = gone.invitation
        with (
            Client(tmp_path, invitation.url, ["127.0.0.1:9"]) as client,
            client.connect("127.0.0.1:9", within=30) as app,
        ):
            started = time.monotonic()
            with pytest.raises(ConnectionResetError):
                app.recv(1)
            assert time.monotonic() - started > 5, "given up before a server could have come back"


class TestCredentials:
    @pytest.mark.parametrize("plain", [False, True], ids=["tls", "plain"])
    def test_wrong_token(self, tmp_path: Path, plain: bool) -> None:
        with Server(tmp_path, plain=plain) as server:
            url = server.invitation.changed(token="A" * 43)
            code, said = _client_gives_up(tmp_path, url)
            assert code == 3
            assert "wstunnel invite" in said
            assert "wstunnel login" in said or "WSTUNNEL_URL" in said
            assert "A" * 43 not in said

    def test_a_second_invitation_replaces_the_first_or_joins_it(self, tmp_path: Path) -> None:
        with Echo() as echo, Server(tmp_path, plain=True) as server:
            again = server.invite()
            assert again.token != server.invitation.token
            with Client(tmp_path, again.url, [echo.address]) as client:
                _works(client, echo.address)

    def test_wrong_pin_at_a_real_server(self, tmp_path: Path) -> None:
        with Server(tmp_path, plain=False) as server:
            assert server.invitation.pin.startswith("#sha256=")
            code, said = _client_gives_up(tmp_path, server.invitation.changed(pin=WRONG_PIN))
            assert code == 1
            assert "sha256=" in said
            assert "401" not in server.stderr, "the token was sent all the same"

    @pytest.mark.parametrize("pin", [WRONG_PIN, ""], ids=["wrong-pin", "untrusted"])
    def test_the_token_is_not_sent_to_an_impostor(self, tmp_path: Path, pin: str) -> None:
        with Server(tmp_path, plain=False) as server:
            invitation = server.invitation
        with Impostor() as impostor:
            code, said = _client_gives_up(tmp_path, invitation.changed(port=impostor.port, pin=pin))
            assert code == 1, said
            assert impostor.connections > 0, "the client never came"
        assert impostor.heard == b""

    def test_an_impostor_hears_whoever_trusts_it(self, tmp_path: Path) -> None:
        """That the test above can fail: with its authority trusted, the impostor does get the token."""
        with Server(tmp_path, plain=False) as server:
            invitation = server.invitation
        with Impostor() as impostor:
            authority = tmp_path / "authority.pem"
            impostor.authority.cert_pem.write_to_path(str(authority))
            url = invitation.changed(port=impostor.port, pin="")
            with _client(tmp_path, url, "--ca", str(authority)):
                wait_until(lambda: invitation.token.encode() in impostor.heard, "the token")


def _client(directory: Path, url: str, *arguments: str) -> Process:
    argv = [*COMMAND, "client", "-L", "0:127.0.0.1:9", *arguments]
    return Process("client", argv, directory=directory, env=environment(directory, WSTUNNEL_URL=url), exit_codes=(0, 1))


def _client_gives_up(directory: Path, url: str) -> tuple[int, str]:
    """Run a client that must end by itself. Returns its exit code and what it said."""
    with _client(directory, url) as client:
        code = client.wait(within=30)
    return code, client.stderr


class Impostor:
    """A TLS server with a certificate for 127.0.0.1 that nobody was told to trust. Remembers all that it hears."""

    def __init__(self) -> None:
        self.authority = trustme.CA()
        self.heard = b""
        self.connections = 0
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.authority.issue_cert("127.0.0.1").configure_cert(self._context)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.1)
        self.port: int = self._listener.getsockname()[1]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="impostor")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with self._listener:
            while not self._stop.is_set():
                try:
                    connection, _ = self._listener.accept()
                except TimeoutError:
                    continue
                self.connections += 1
                with connection:
                    self._listen(connection)

    def _listen(self, connection: socket.socket) -> None:
        connection.settimeout(2)
        try:
            with self._context.wrap_socket(connection, server_side=True) as secured:
                while data := secured.recv(65536):
                    self.heard += data
        except (OSError, ssl.SSLError):
            return  # what the client thought of the certificate


class TestStopping:
    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
    @pytest.mark.parametrize("who", ["server", "client"])
    @pytest.mark.parametrize("plain", [False, True], ids=["tls", "plain"])
    def test_with_50_streams_open(self, tmp_path: Path, who: str, plain: bool, signum: signal.Signals) -> None:
        with (
            Echo() as echo,
            Server(tmp_path, plain=plain) as server,
            ExitStack() as apps,
            Client(tmp_path, server.invitation.url, [echo.address]) as client,
        ):
            opened = [apps.enter_context(client.connect(echo.address)) for _ in range(50)]
            for app in opened:
                app.sendall(b"hello")
                assert read_exactly(app, 5) == b"hello"
            for app in opened[:10]:  # replies that nobody reads fill every buffer on the way
                _fill(app)
            ending = server if who == "server" else client
            interrupted = who == "client" and signum is signal.SIGINT
            assert ending.stop(signum, within=STOP_SECONDS) == (130 if interrupted else 0)
            for app in opened[10:]:
                assert _is_over(app)

    @pytest.mark.parametrize("who", ["server", "client"])
    def test_with_nothing_open(self, tmp_path: Path, who: str) -> None:
        with (
            Echo() as echo,
            Server(tmp_path, plain=True) as server,
            Client(tmp_path, server.invitation.url, [echo.address]) as client,
        ):
            _works(client, echo.address)
            ending = server if who == "server" else client
            assert ending.stop(signal.SIGTERM, within=STOP_SECONDS) == 0

    def test_a_client_ends_while_its_server_is_away(self, tmp_path: Path) -> None:
        with Server(tmp_path, plain=True, port=unused_port()) as gone:
            invitation = gone.invitation
        with Client(tmp_path, invitation.url, ["127.0.0.1:9"]) as client:
            assert client.stop(signal.SIGTERM, within=STOP_SECONDS) == 0


def _fill(app: socket.socket) -> None:
    """Send until nothing more is taken at once."""
    data = pattern(1 << 20)
    app.setblocking(False)
    try:
        for _ in range(64):
            app.send(data)
    except BlockingIOError:
        pass  # full, as wanted
    finally:
        app.settimeout(30)


def _is_over(app: socket.socket) -> bool:
    """Whether the stream ended, by a reset or cleanly."""
    try:
        return app.recv(1) == b""
    except ConnectionResetError:
        return True
