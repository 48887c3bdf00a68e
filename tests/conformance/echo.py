"""A WebSocket echo on `wstunnel.wire` and plain Trio sockets, both roles: what the Autobahn Testsuite talks to.

It gathers nothing: each piece of a message goes back as a fragment of its own, as soon as it is here.
"""

from __future__ import annotations

import os

import trio

from wstunnel.errors import HandshakeError, ProtocolError
from wstunnel.wire import handshake, http1
from wstunnel.wire.frames import FrameDecoder, MaskKeys, Opcode, encode_close, encode_frame, parse_close

READ_BYTES = 256 * 1024
LINGER_SECONDS = 2.0


async def serve(stream: trio.SocketStream) -> None:
    """The server's side of one connection, from its first byte to its end. Closes `stream`."""
    async with stream:
        reader = http1.RequestReader()
        try:
            while (request := reader.feed(data := await stream.receive_some(READ_BYTES))) is None:
                if not data:
                    return
            upgrade = handshake.accept(request, path="/", subprotocols=())
        except HandshakeError as error:
            await stream.send_all(handshake.refusal(error))
            return
        await stream.send_all(handshake.accept_response(upgrade))
        await _echo(stream, reader.leftover, None)


async def connect(host: str, port: int, path: str) -> bytes:
    """A client that echoes until the server closes. Returns the last whole message, for services that only say one.

    Raises:
        OSError: nobody listens.
        WstunnelError: the server would not upgrade.
    """
    async with await trio.open_tcp_stream(host, port) as stream:
        client = handshake.ClientUpgrade(f"{host}:{port}", path, os.urandom(16), None)
        await stream.send_all(client.request())
        while not client.feed(data := await stream.receive_some(READ_BYTES)):
            if not data:
                client.eof()
        return await _echo(stream, client.leftover, MaskKeys(os.urandom))


async def _echo(stream: trio.SocketStream, data: bytes, keys: MaskKeys | None) -> bytes:
    """Echo until either side closes; `keys` makes it the client's side. Returns the last message that was short."""
    decoder = FrameDecoder(masked=keys is None)
    in_message = False
    message = last = b""
    failed = False
    try:
        while True:
            out = bytearray()
            try:
                for opcode, payload, end in decoder.feed(data):
                    key = keys.next() if keys else None
                    if opcode is Opcode.CLOSE:
                        code, _ = parse_close(payload)
                        out += encode_close(None if code == 1005 else code, key=key)
                    elif opcode is Opcode.PING:
                        out += encode_frame(Opcode.PONG, payload, key=key)
                    elif opcode is not Opcode.PONG:
                        out += encode_frame(Opcode.CONTINUATION if in_message else opcode, payload, fin=end, key=key)
                        in_message = not end
                        message = message + payload if len(message) < 1024 else message
                        if end:
                            message, last = b"", message
            except ProtocolError as error:
                failed = True
                out += encode_close(error.code, str(error), key=keys.next() if keys else None)
            await stream.send_all(out)
            if failed or decoder.closed:
                break
            data = await stream.receive_some(READ_BYTES)
            if not data:
                return last
        if keys is None:
            # RFC 6455 §7.1.1: the server closes the connection first, the client waits for it.
            await stream.send_eof()
        with trio.move_on_after(LINGER_SECONDS):
            # Closing with unread input would send a reset, which can destroy the Close frame on its way.
            while await stream.receive_some(READ_BYTES):
                pass
    except trio.BrokenResourceError:
        pass  # the suite drops connections on purpose
    return last
