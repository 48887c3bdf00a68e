"""One link's protocol: connection bytes in, events out; messages and stream data in, connection bytes out.

A test can drive two of these with a list of bytes between them. `link.py` drives one with a socket:

    for event in protocol.receive(data): ...     # payloads (bytes-like) and messages, already checked and applied
    while buffers := protocol.pull(size, now): ...   # what to write next, in order; taking it commits to sending it

Control messages overtake stream data that was not pulled yet; a frame that was pulled is finished.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from wstunnel.errors import ProtocolError, StreamError
from wstunnel.limits import CONTROL_QUEUE_BYTES, KIB, MESSAGE_BYTES, WINDOW_FIRST
from wstunnel.wire import messages
from wstunnel.wire.credit import Budget
from wstunnel.wire.datagrams import HEADER_BYTES, DatagramState
from wstunnel.wire.directions import Inbound, Outbound
from wstunnel.wire.frames import (
    FrameDecoder,
    MaskKeys,
    Opcode,
    apply_mask,
    encode_close,
    encode_data,
    encode_frame,
    encode_header,
    encode_pair,
    parse_close,
)
from wstunnel.wire.messages import (
    Ack,
    AnyMessage,
    Bye,
    Detached,
    Drain,
    Eof,
    Gone,
    Hello,
    LinkRole,
    Listen,
    Listening,
    Message,
    Need,
    Open,
    Opened,
    Ping,
    Pong,
    Reset,
    Resume,
    Resumed,
    Unlisten,
    Welcome,
)
from wstunnel.wire.states import EXCHANGE, EXPECTED, Exchange, ExchangeEvent, Half
from wstunnel.wire.tombstones import Tombstone

Buffer = bytes | memoryview
_ADVANCING = frozenset((Opened, Ack, Eof))
_COUNTED = (Opened, Ack, Eof, Reset, Resumed)
_CONTROL: dict[type[Message], str] = {
    Bye: "client", Gone: "client", Listen: "client", Unlisten: "client",
    Detached: "server", Drain: "server", Listening: "server", Need: "server",
}  # fmt: skip
"""Messages of the control link, and the side that sends them."""
_BINARY = int(Opcode.BINARY)
_TEXT = int(Opcode.TEXT)
_PING = int(Opcode.PING)
_PONG = int(Opcode.PONG)
_MASK_BYTES = 128 * KIB
"""Masked at once, a multiple of the key's 4: what is masked is still in the cache when it is sent."""
_SMALL = 4096  # bytes; below it one joined write is cheaper than a gathered one
# Module names: before Python 3.12 looking into an enumeration costs as much as a call.
_BUSY, _FLOW, _RESETTING = Exchange.BUSY, Exchange.FLOW, Exchange.RESETTING
_DONE = Half.DONE


@dataclass(frozen=True, slots=True)
class PeerClosed:
    """Event: the peer's close frame. Nothing follows it."""

    code: int
    reason: str


class StreamState:
    """One tunnelled stream at one end, without its socket.

    Args:
        stream_id: 22 base64url characters.
        egress: whether this end dials the target.
        budget: what the stream's principal holds.
        window: the first window of both directions, in bytes; both ends of the protocol count on the default.

    Attributes:
        opened: the target was reached (at the ingress: and `opened` came).
        ack_wanted: the sweep asks for an ack though little was consumed.
        reset_wanted: the reset to send once all queued data is on the link; stays until it was answered.
        epoch: of the last `resume`; 0 before the first.
        replayed: bytes that the last resumption sends again.
        answered: the peer has shown that it has the stream, if only by an ack.
    """

    __slots__ = (
        "ack_wanted", "answered", "egress", "epoch", "id", "inbound", "opened", "outbound", "replayed", "reset_wanted",
    )  # fmt: skip

    def __init__(self, stream_id: str, *, egress: bool, budget: Budget, window: int = WINDOW_FIRST) -> None:
        self.id = stream_id
        self.egress = egress
        self.outbound = Outbound(budget, window)
        self.inbound = Inbound(budget, window)
        self.opened = False
        self.ack_wanted = False
        self.reset_wanted: tuple[str, str] | None = None
        self.epoch = 0
        self.replayed = 0
        self.answered = False

    def link_lost(self) -> None:
        """The link is gone. From now on nothing that it brought and that was not read yet counts."""
        self.outbound.link_lost()
        self.inbound.link_lost()

    def progress(self) -> int:
        """Grows with everything that arrives, here or there."""
        return self.inbound.received + self.outbound.replay.start

    def unanswered(self) -> bool:
        """At the ingress: nothing says that the egress has ever heard of the stream."""
        heard = self.opened or self.answered or self.inbound.received or self.outbound.replay.start
        return not (self.egress or heard)

    def resettable(self) -> bool:
        """Whether a reset may still be sent: not after one's own EOF and one's ack of the peer's."""
        return self.outbound.state is Half.OPEN or self.inbound.state is not Half.DONE

    def discard(self) -> None:
        """Give back all memory: the stream was reset."""
        self.outbound.discard()
        self.inbound.discard()


class LinkProtocol:
    """The protocol of one link at one end.

    Args:
        side: `client` masks what it sends and opens on `forward` links; `server` the other way round.
        keys: source of masking keys; needed by the client, None at the server.
        role: what the link is for; at the server None until `hello` tells.

    Attributes:
        state: see `wire/states.py`.
        n: count of exchanges on this link.
        stream: the stream that the link carries now.
        flow: the datagram flow that it carries instead.
        greeted: the peer's hello or welcome came.
        expecting: something was pulled that the peer must react to. Whoever wants to know sets it back.
        drained: the last `pull` left nothing behind.
    """

    __slots__ = (
        "_control", "_control_bytes", "_decoder", "_keys", "_pong", "_pong_number", "_text",
        "close_received", "close_sent", "drained", "expecting", "flow", "greeted", "n", "role", "side", "state",
        "stream",
    )  # fmt: skip

    def __init__(
        self, side: Literal["client", "server"], *, keys: MaskKeys | None = None, role: LinkRole | None = None
    ) -> None:
        self.side = side
        self.role = role
        self.state = Exchange.NEW
        self.n = 0
        self.stream: StreamState | None = None
        self.flow: DatagramState | None = None
        self.greeted = False
        self.expecting = False
        self.drained = True
        self.close_sent = False
        self.close_received = False
        self._keys = keys
        self._decoder = FrameDecoder(masked=side == "server")
        self._text: bytearray | None = None
        self._control: list[Buffer] = []
        self._control_bytes = 0
        self._pong: bytes | None = None
        self._pong_number: int | None = None

    # --- in -----------------------------------------------------------------------------------------------------------

    def receive_data(self, data: memoryview) -> Buffer | None:
        """The stream data in `data`, if that is one short data frame and nothing else: as `receive` would yield it.

        None means that nothing was decoded: call `receive`. It may raise the same errors.
        """
        stream = self.stream
        if self.state is not _BUSY or not (stream.opened or stream.egress):  # type: ignore[union-attr]
            return None
        payload = self._decoder.whole(data)
        if payload:
            stream.inbound.arrived(len(payload))  # type: ignore[union-attr]  # BUSY has a stream
        return payload or None

    def receive_ping(self, data: memoryview) -> Ping | Pong | None:
        """What `data` holds, if that is a `ping` or `pong` with its frame of RFC 6455, spelt as we do, and no more.

        Both are answered inside, as by `receive`. None means that nothing was decoded: call `receive`.
        """
        if not self.greeted or self.close_sent:
            return None
        pair = self._decoder.pair(data)
        if pair is None:
            return None
        opcode, text = pair
        message = messages.decode_ping(text)
        # After the greeting and before the end both messages may come in every state: see EXPECTED.
        if opcode == _PONG:
            return message if type(message) is Pong else None
        if type(message) is not Ping:
            return None
        self._pong = b""
        self._pong_number = message.number
        return message

    def ack_due(self) -> bool:
        """Whether the stream's data asks for an ack now, though nothing else would be pulled."""
        return self.stream is not None and self.stream.inbound.ack_due()

    def receive(self, data: bytes | memoryview) -> Iterator[Buffer | AnyMessage | PeerClosed]:
        """Decode what came from the connection.

        Yields, in order: stream data (a payload, valid until the next step of the iteration: the caller passes it on or
        stores it, see `Inbound`), or a whole datagram; messages, already checked and applied; `PeerClosed`. RFC 6455
        pings are answered inside. While the stream is being reset its data is dropped here.

        Raises:
            ProtocolError: the peer broke a rule. Events before it were yielded. The caller closes with its code.
        """
        for opcode, payload, last in self._decoder.feed(data):
            if self.close_sent and opcode != Opcode.CLOSE:
                continue  # §5.5.1: what was under way when we closed
            if opcode == _BINARY:
                state = self.state
                if state is _BUSY:
                    stream = self.stream
                    if not stream.opened and not stream.egress:  # type: ignore[union-attr]  # BUSY has a stream
                        raise ProtocolError("data before opened")
                    if payload:
                        stream.inbound.arrived(len(payload))  # type: ignore[union-attr]
                        yield payload
                elif state is _FLOW:
                    datagram = self._gather_datagram(payload, last)
                    if datagram is not None:
                        yield datagram
                elif state is not _RESETTING:
                    raise ProtocolError(f"data while {state.value}")
            elif opcode == _TEXT:
                message = self._gather(payload, last)
                if message is not None and self._apply(message):
                    yield message
            elif opcode == Opcode.PING:
                # §5.5.3: a second ping before the first was answered: only the most recent one need be.
                self._pong = bytes(payload)
            elif opcode == Opcode.CLOSE:
                code, reason = parse_close(bytes(payload))
                self.close_received = True
                if not self.close_sent:
                    self.close(1000 if code == 1005 else code)
                yield PeerClosed(code, reason)

    def _gather_datagram(self, payload: Buffer, last: bool) -> Buffer | None:
        flow = self.flow
        assert flow is not None
        if not flow.opened and not flow.egress:
            raise ProtocolError("data before opened")
        return flow.arrived(payload, last)

    def _gather(self, payload: Buffer, last: bool) -> AnyMessage | None:
        """Put a text message together; None until it is whole."""
        if self._text is None:
            if last:
                return messages.decode(bytes(payload))
            self._text = bytearray()
        if len(self._text) + len(payload) > MESSAGE_BYTES:
            raise ProtocolError(f"control message of more than {MESSAGE_BYTES} bytes")
        self._text += payload
        if not last:
            return None
        text, self._text = bytes(self._text), None
        return messages.decode(text)

    def _apply(self, message: AnyMessage) -> bool:
        """Check a message against the state and apply it; False if it is to be ignored."""
        kind = type(message)
        if not self.greeted:
            self._greet(message)
            return True
        if kind in _ADVANCING and self.state is _BUSY and message.n == self.n:  # type: ignore[union-attr]
            self._advance(message)  # type: ignore[arg-type]
            return True
        name = kind.__name__.lower()
        if isinstance(message, _COUNTED):
            if message.n < self.n:
                return False
            if message.n > self.n:
                raise ProtocolError(f"{name} for exchange {message.n}, the link is at {self.n}")
        if kind not in EXPECTED[self.state]:
            raise ProtocolError(f"{name} while {self.state.value}")
        if isinstance(message, Open | Resume):
            self._accept(message)
        elif isinstance(message, Ping):
            self._pong_number = message.number
        elif isinstance(message, Reset):
            if self.state is not _RESETTING:
                self.send(Reset(n=self.n, code=message.code))
            self._move(ExchangeEvent.RESET_RECEIVED)
        elif isinstance(message, Gone) and self.state is Exchange.RESUMING:
            return self._answered(message.n, name, ExchangeEvent.GONE)
        elif kind in _CONTROL:
            if self.side == _CONTROL[kind] or self.role != "control":
                raise ProtocolError(f"{name} not from a {_CONTROL[kind]} on its control link")
        elif isinstance(message, Resumed):
            self._resumed(message)
        elif self.state is Exchange.RESETTING:
            if self.flow is not None and kind not in EXPECTED[_FLOW]:
                raise ProtocolError(f"{name} while flow")
            return isinstance(message, Pong)
        elif isinstance(message, Opened):
            self._advance(message)
        return True

    def _greet(self, message: AnyMessage) -> None:
        if not isinstance(message, Hello if self.side == "server" else Welcome):
            raise ProtocolError(f"{type(message).__name__.lower()} before the greeting")
        if isinstance(message, Hello):
            self.role = message.role
        self.greeted = True
        self._move(ExchangeEvent.GREETED)

    def _accept(self, message: Open | Resume) -> None:
        # Only the client opens on `forward` links, only the server on `reverse` links. Only the client resumes.
        name = type(message).__name__.lower()
        if self.role != ("forward" if self.side == "server" else "reverse" if isinstance(message, Open) else None):
            raise ProtocolError(f"{name} from the wrong side of a {self.role} link")
        if message.n != self.n + 1:
            raise ProtocolError(f"{name} counts {message.n}, expected {self.n + 1}")
        self.n = message.n
        self._move(ExchangeEvent.OPEN)

    def _answered(self, n: int, name: str, event: ExchangeEvent) -> bool:
        """The answer to our `resume`; False if it is that to an earlier one."""
        if n > self.n:
            raise ProtocolError(f"{name} for exchange {n}, the link is at {self.n}")
        if n == self.n:
            self._move(event)
        return n == self.n

    def _resumed(self, message: Resumed) -> None:
        stream = self.stream
        assert stream is not None
        self._move(ExchangeEvent.RESUMED)
        stream.inbound.confirmed()
        if not stream.egress and message.opened is not None:
            stream.opened = True
        stream.answered = True
        try:
            stream.replayed = stream.outbound.resume(message.received, message.consumed, message.limit)
        except StreamError as error:
            stream.reset_wanted = stream.reset_wanted or (error.code, str(error))
        if stream.reset_wanted is not None:
            stream.outbound.discard()  # without knowing what the peer has, nothing can go before the reset
        self._settle()

    def _advance(self, message: Opened | Ack | Eof) -> None:
        stream = self.stream
        if stream is None:
            flow = self.flow
            assert flow is not None  # which lets nothing but `opened` through
            if flow.egress or flow.opened:
                raise ProtocolError("second opened" if flow.opened else "opened from the ingress")
            flow.opened = True
            return
        if isinstance(message, Ack):
            stream.answered = True
            stream.outbound.acknowledge(message.consumed, message.limit)
            self._settle()
        elif isinstance(message, Opened):
            if stream.egress or stream.opened:
                raise ProtocolError("second opened" if stream.opened else "opened from the ingress")
            stream.opened = True
        else:
            if not stream.opened and not stream.egress:
                raise ProtocolError("eof before opened")
            stream.inbound.ended(message.total)

    # --- out ----------------------------------------------------------------------------------------------------------

    def carry(self, data: memoryview) -> bytes | None:
        """What was just read from the application, kept in the stream, and as one frame to be written whole.

        None if something else has to go first; then nothing was done: the caller appends it to the stream, and pulls.

        Args:
            data: as much as a short frame may have at any pace, and the stream has room for.
        """
        stream = self.stream
        if (
            self.state is not _BUSY
            or self._control
            or self._pong_number is not None
            or self._pong is not None
            or stream.reset_wanted is not None  # type: ignore[union-attr]  # BUSY has a stream
            or not stream.outbound.carry(data)  # type: ignore[union-attr]
        ):
            return None
        self.expecting = True
        return encode_data(data, self._key())

    def send(self, message: Message) -> None:
        """Queue a control message. It overtakes stream data. After a close frame it is dropped.

        Raises:
            ProtocolError: the peer does not read and too much is queued (close code 1008).
        """
        if self.close_sent:
            return
        payload = messages.encode(message)
        self._reserve(len(payload))
        self._control.append(self._frame(Opcode.TEXT, payload))

    def ping(self, number: int) -> None:
        """Queue `ping`, and a ping frame of RFC 6455: it keeps proxies awake that do not count text messages.

        Raises:
            ProtocolError: as `send`.
        """
        if self.close_sent:
            return
        frames = encode_pair(_PING, messages.encode_ping(number), self._keys)
        self._reserve(len(frames))
        self._control.append(frames)

    def _reserve(self, size: int) -> None:
        if self._control_bytes + size > CONTROL_QUEUE_BYTES:
            raise ProtocolError("too many control messages queued: the peer does not read", 1008)
        self._control_bytes += size

    def open(self, stream: StreamState | DatagramState, *, target: str = "", forward: str = "", peer: str = "") -> None:
        """Start an exchange: the link must be idle (or new, at the client) and this side the one that opens on it."""
        self.n += 1
        self.expecting = True
        self._move(ExchangeEvent.OPEN)
        self.accept(stream)
        self.send(Open(n=self.n, stream=stream.id, target=target, forward=forward, peer=peer))

    def resume(self, stream: StreamState, *, opened: str | None) -> None:
        """Client: go on with a stream that lost its link, on this idle one. Its epoch was raised already.

        Args:
            stream: what to go on with.
            opened: at the egress: the address that was dialled.
        """
        self.n += 1
        self.stream = stream
        self.expecting = True
        self._move(ExchangeEvent.RESUME_SENT)
        received, consumed, limit = stream.inbound.restate()
        self.send(
            Resume(
                n=self.n, stream=stream.id, epoch=stream.epoch,
                received=received, consumed=consumed, limit=limit, opened=opened,
            )
        )  # fmt: skip

    def resumed(self, stream: StreamState, message: Resume, *, opened: str | None) -> None:
        """Server: go on with the stream that `message` asks for; must follow that event at once, as must `gone`.

        Args:
            stream: what to go on with; it has no link.
            message: what the client has of it.
            opened: at the egress, once the target was reached: the address that was dialled.

        Raises:
            StreamError: the offsets cannot be. Nothing was sent or changed.
        """
        stream.replayed = stream.outbound.resume(message.received, message.consumed, message.limit)
        stream.epoch = message.epoch
        if not stream.egress and message.opened is not None:
            stream.opened = True
        self.stream = stream
        self.expecting = True
        received, consumed, limit = stream.inbound.restate()
        stream.inbound.confirmed()  # `resumed` goes ahead of all that follows on this link
        self.send(Resumed(n=self.n, received=received, consumed=consumed, limit=limit, opened=opened))
        self._settle()

    def gone(self, stone: Tombstone) -> None:
        """Server: the stream of the `resume` that just came cannot go on; the link is idle again."""
        message = stone.message[: messages.TEXT_CHARACTERS]
        self._move(ExchangeEvent.GONE)
        self.send(Gone(n=self.n, outcome=stone.outcome, code=stone.code, message=message))

    def accept(self, stream: StreamState | DatagramState) -> None:
        """The exchange that the peer's `open` began is about `stream`; must follow that event at once."""
        if isinstance(stream, DatagramState):
            self.flow = stream
            self._move(ExchangeEvent.FLOW)
        else:
            self.stream = stream

    def opened(self, address: str) -> None:
        """Egress: the target was reached."""
        stream = self.stream or self.flow
        assert stream is not None
        stream.opened = True
        self.send(Opened(n=self.n, address=address))

    def close(self, code: int, reason: str = "") -> None:
        """Queue a close frame behind the control messages; nothing is sent after it and no data is yielded any more."""
        if self.close_sent:
            return
        self.close_sent = True
        self._control.append(encode_close(code, reason, key=self._key()))
        self._move(ExchangeEvent.CLOSED)

    def pull(self, size: int, now: float, round_trip: float) -> list[Buffer]:
        """What goes onto the connection next: the control messages, at most one data frame, and what follows it.

        Of a datagram flow as many whole datagrams as are not more than a data frame.

        Args:
            size: most payload bytes in the data frame.
            now: monotonic time in seconds, for the credit.
            round_trip: the link's smallest, in seconds.

        Returns:
            buffers to be written in order and whole; empty when there is nothing to send. Views in it die with the
            next append to the stream.
        """
        out: list[Buffer] = self._control
        self.drained = True
        if self._pong is not None or self._pong_number is not None:
            self._pull_pongs(out)
        stream = self.stream
        if (
            stream is not None
            and self.state is _BUSY
            and (stream.reset_wanted is None or not self._pull_reset(out, stream))
        ):
            inbound, outbound = stream.inbound, stream.outbound
            # Silence after the end: nothing is acked beyond the ack of the peer's EOF.
            if (stream.ack_wanted and inbound.state is not _DONE) or inbound.ack_due():
                stream.ack_wanted = False
                consumed, limit = inbound.grant(now, round_trip)
                out.append(self._frame(Opcode.TEXT, messages.encode(Ack(n=self.n, consumed=consumed, limit=limit))))
            view = outbound.take(size)
            if view is not None:
                self.expecting = True
                self._data(out, view)
                self.drained = outbound.cursor == outbound.replay.end
            if stream.reset_wanted is None or not self._pull_reset(out, stream):
                if outbound.total is not None and outbound.eof_due():
                    total = outbound.eof_sent()
                    self.expecting = True
                    out.append(self._frame(Opcode.TEXT, messages.encode(Eof(n=self.n, total=total))))
                if outbound.state is _DONE:
                    self._settle()
        elif self.state is _FLOW:
            self._pull_datagrams(out, size)
        if out:
            self._control = []
            self._control_bytes = 0
        return out

    def _pull_pongs(self, out: list[Buffer]) -> None:
        if self.close_sent:
            return
        pong, number = self._pong, self._pong_number
        self._pong = self._pong_number = None
        if number is None:
            assert pong is not None
            out.append(self._frame(Opcode.PONG, pong))
        elif pong == b"":
            out.append(encode_pair(_PONG, messages.encode_pong(number), self._keys))
        else:
            if pong is not None:
                out.append(self._frame(Opcode.PONG, pong))
            out.append(self._frame(Opcode.TEXT, messages.encode_pong(number)))

    def _pull_datagrams(self, out: list[Buffer], size: int) -> None:
        """In one buffer: a system call takes no more than some thousand."""
        flow, keys = self.flow, self._keys
        assert flow is not None
        queue = flow.queue
        frames: list[Buffer] = []
        while queue and size > 0:
            datagram = queue.pop()
            size -= len(datagram) + HEADER_BYTES
            key = None if keys is None else keys.next()
            frames.append(encode_header(_BINARY, len(datagram), key=key))
            frames.append(datagram if key is None else apply_mask(datagram, key))
        if frames:
            flow.sent += len(frames) // 2
            out.append(b"".join(frames))
        if queue:
            self.drained = False
        elif flow.reset_wanted is not None:
            self._send_reset(out, *flow.reset_wanted)

    def _pull_reset(self, out: list[Buffer], stream: StreamState) -> bool:
        """The reset that the stream wants, if its time has come: all queued data is out, and it is still allowed.

        Asked before the acks, too: one of them may be the last thing that this end may send.
        """
        if stream.reset_wanted is None or stream.outbound.queued() or not stream.resettable():
            return False
        self._send_reset(out, *stream.reset_wanted)
        return True

    def _send_reset(self, out: list[Buffer], code: str, reason: str) -> None:
        self.expecting = True
        message = Reset(n=self.n, code=code, message=reason[: messages.TEXT_CHARACTERS])
        out.append(self._frame(Opcode.TEXT, messages.encode(message)))
        self._move(ExchangeEvent.RESET_SENT)

    def _data(self, out: list[Buffer], view: memoryview) -> None:
        """One binary frame. RFC 6455 §5.3: every client frame has a fresh, unpredictable key."""
        keys = self._keys
        key = None if keys is None else keys.next()
        size = len(view)
        if size < _SMALL:
            out.append(encode_data(view, key))
            return
        out.append(encode_header(_BINARY, size, key=key))
        if key is None:
            out.append(view)
        else:
            out.extend(apply_mask(view[at : at + _MASK_BYTES], key) for at in range(0, size, _MASK_BYTES))

    def _key(self) -> bytes | None:
        return None if self._keys is None else self._keys.next()

    def _frame(self, opcode: Opcode, payload: bytes) -> bytes:
        return encode_frame(opcode, payload, key=self._key())

    def _settle(self) -> None:
        """Both directions done: the link may be used again."""
        stream = self.stream
        if stream is not None and stream.outbound.state is _DONE and stream.inbound.state is _DONE:
            self._move(ExchangeEvent.FINISHED)

    def _move(self, event: ExchangeEvent) -> None:
        self.state = EXCHANGE[self.state, event]
        if self.state in (Exchange.IDLE, Exchange.CLOSED):
            self.stream = self.flow = None
