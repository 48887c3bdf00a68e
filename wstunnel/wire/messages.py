"""The control messages of `wstunnel.1`: one JSON object in one text message, with a `type`.

    {"type":"open","n":1,"stream":"0123456789abcdefghijkA","target":"tcp:db:5432"}

Every message of the protocol is typed here. Those of a feature (see `FEATURES`) a peer sends only to one that lists it.
The normative text is docs/reference/protocol.md. Unknown keys are ignored, so that later versions may add some.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from wstunnel.errors import ProtocolError
from wstunnel.limits import MESSAGE_BRACKETS, MESSAGE_BYTES, NUMBER_MAX

SUBPROTOCOL = "wstunnel.1"
VERSION = 1

FEATURES: tuple[str, ...] = ("resume", "drain", "reverse", "udp")
"""What this version can do beyond what every `wstunnel.1` peer can."""

Number = Annotated[int, Meta(ge=0, le=NUMBER_MAX)]
Count = Annotated[int, Meta(ge=1, le=NUMBER_MAX)]
Id = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{22}\Z")]
"""128 random bits in base64url without padding, chosen by whoever opens the thing."""
TEXT_CHARACTERS = 1024
Text = Annotated[str, Meta(max_length=TEXT_CHARACTERS)]
Name = Annotated[str, Meta(max_length=64)]
Ids = Annotated[list[Id], Meta(max_length=256)]
Numbers = Annotated[list[Number], Meta(max_length=256)]
Features = Annotated[list[Name], Meta(max_length=64)]
LinkRole = Literal["control", "forward", "reverse"]
Outcome = Literal["finished", "reset", "unknown", "stale"]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=str.lower, omit_defaults=True):
    """Base of all control messages. The tag is the class name in lower case."""


class Hello(Message, frozen=True, kw_only=True):
    """Client, first message on every link. `resume_window` is in seconds: what the client would like. `quiet`, too: for
    so long the server is not to ask by itself whether the link lives, since the client measures the path."""

    version: Number
    session: Id
    role: LinkRole
    agent: Text = ""
    resume_window: Number = 300
    features: Features = []
    quiet: Number = 0


class Welcome(Message, frozen=True, kw_only=True):
    """Server, its answer to `hello`. Times are in seconds. `boot` changes with every start of the server. `quiet` is
    what was granted of the client's."""

    version: Number
    server: Id
    boot: Id
    known: bool = False
    resume_window: Number = 0
    keepalive: Number = 0
    idle_links: Number = 0
    features: Features = []
    quiet: Number = 0


class Open(Message, frozen=True, kw_only=True):
    """Ingress: dial `target` (on `reverse` links: that of `forward`). Early data may follow at once."""

    n: Count
    stream: Id
    target: Text = ""
    forward: Name = ""
    peer: Text = ""


class Opened(Message, frozen=True, kw_only=True):
    """Egress: the target was reached at `address`."""

    n: Count
    address: Text = ""


class Ack(Message, frozen=True, kw_only=True):
    """Offsets of the direction towards the sender of this message: taken by its application; may be sent up to."""

    n: Count
    consumed: Number
    limit: Number


class Eof(Message, frozen=True, kw_only=True):
    """No byte follows `total`."""

    n: Count
    total: Number


class Reset(Message, frozen=True, kw_only=True):
    """Both directions end here. Before `opened` it is a refusal."""

    n: Count
    code: Name
    message: Text = ""


class Resume(Message, frozen=True, kw_only=True):
    """Client, on a `forward` link: go on with a stream whose link was lost."""

    n: Count
    stream: Id
    epoch: Count
    received: Number
    consumed: Number
    limit: Number
    opened: Text | None = None


class Resumed(Message, frozen=True, kw_only=True):
    """Server: the stream goes on from these offsets."""

    n: Count
    received: Number
    consumed: Number
    limit: Number
    opened: Text | None = None


class Gone(Message, frozen=True, kw_only=True):
    """The stream cannot go on. On the control link it is named by `stream` instead of `n`."""

    outcome: Outcome
    n: Number = 0
    stream: Id | None = None
    code: Name = ""
    message: Text = ""


class Detached(Message, frozen=True, kw_only=True):
    """Server, control link: these streams of the session have no link here. `epochs`: of the last `resume` of each, so
    that a client that has resumed it since knows that this is old news."""

    streams: Ids
    epochs: Numbers = []


class Listen(Message, frozen=True, kw_only=True):
    """Client, control link: accept connections at `bind` for `forward`."""

    forward: Name
    bind: Text


class Listening(Message, frozen=True, kw_only=True):
    """Server: the address that was bound, or `code` and `message` of a refusal."""

    forward: Name
    address: Text = ""
    code: Name = ""
    message: Text = ""


class Unlisten(Message, frozen=True, kw_only=True):
    """Client, control link: stop accepting for `forward`."""

    forward: Name


class Need(Message, frozen=True, kw_only=True):
    """Server, control link: how many reverse links should be parked (absolute)."""

    links: Number


class Ping(Message, frozen=True, kw_only=True):
    """Either side, any link. Answered by `pong` with the same number."""

    number: Number


class Pong(Message, frozen=True, kw_only=True):
    """The answer to `ping`."""

    number: Number


class Drain(Message, frozen=True, kw_only=True):
    """Server, control link: it is going in `deadline` seconds; open no more streams here."""

    deadline: Number


class Bye(Message, frozen=True, kw_only=True):
    """Client, control link: the session is over."""


AnyMessage = (
    Hello | Welcome | Open | Opened | Ack | Eof | Reset | Resume | Resumed | Gone | Detached
    | Listen | Listening | Unlisten | Need | Ping | Pong | Drain | Bye
)  # fmt: skip

_PING_HEAD, _PONG_HEAD = b'{"type":"ping","number":', b'{"type":"pong","number":'
_HEAD_BYTES = len(_PING_HEAD)
_SHORT_DIGITS = len(str(NUMBER_MAX)) - 1  # any number of so few is small enough

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyMessage] = msgspec.json.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """The message as UTF-8 JSON, without a line end."""
    return _encoder.encode(message)


def encode_ping(number: int) -> bytes:
    """As `encode(Ping(number=number))`, without the object."""
    return b"%s%d}" % (_PING_HEAD, number)


def encode_pong(number: int) -> bytes:
    """As `encode(Pong(number=number))`, without the object."""
    return b"%s%d}" % (_PONG_HEAD, number)


def decode_ping(data: bytes) -> Ping | Pong | None:
    """A `ping` or `pong` that is spelt as we spell it; None for all else, be it right or wrong: see `decode`.

    Idle links send nothing else, and this costs a fraction of a look at any JSON.

    Args:
        data: the payload of a text message; whether it is UTF-8 need not have been checked.
    """
    digits = data[_HEAD_BYTES:-1]
    # isdigit() of bytes knows ASCII only. JSON has no leading zeros.
    if not digits.isdigit() or len(digits) > _SHORT_DIGITS or data[-1:] != b"}" or (digits > b"0" and digits[0] == 48):
        return None
    head = data[:_HEAD_BYTES]
    if head == _PING_HEAD:
        return Ping(number=int(digits))
    return Pong(number=int(digits)) if head == _PONG_HEAD else None


def decode(data: bytes | bytearray) -> AnyMessage:
    """Parse one whole text message.

    Args:
        data: the payload, already checked to be UTF-8 (RFC 6455 §8.1).

    Raises:
        ProtocolError: whatever is wrong with it, close code 1002.
    """
    if len(data) > MESSAGE_BYTES:
        raise ProtocolError(f"control message of more than {MESSAGE_BYTES} bytes")
    if data.count(b"[") + data.count(b"{") > MESSAGE_BRACKETS:
        raise ProtocolError("bad control message: nested too deeply")
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"bad control message: {error}"[:120]) from None
