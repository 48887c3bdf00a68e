"""Every limit: a name, a unit, a reason. Checked before anything is buffered."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB

# --- HTTP handshake -------------------------------------------------------------------------------------------------
HEAD_BYTES = 16 * KIB
"""Request or response head. nginx and HAProxy stop at 8 and 16 KiB; bearer tokens and cookies fit many times."""
HEAD_FIELDS = 64
"""Header fields in a head. Browsers behind two proxies send about 30."""
HANDSHAKE_SECONDS = 10.0
"""From accept (or dial) to the end of the upgrade, TLS included. A stranger can hold a connection no longer."""
HANDSHAKES = 1024
"""Connections that are not authenticated yet. Beyond it the oldest is dropped: strangers cannot lock users out."""
HANDSHAKES_DIVISOR = 16
"""Handshakes take at most this part of the descriptors that the process may have."""
PRINCIPAL_SHARE = 0.46
"""Links of one principal, and as many streams, as a part of the descriptors: 92 % in all, so that others get in.
What waits to become a stream counts as one, and so does a socket that listens for a client."""
REVERSE_DIVISOR = 2
"""Streams of reverse forwards take at most this part of a principal's: strangers at a port leave its owner the rest."""
LISTENING_DIVISOR = 16
"""Sockets that listen for one principal take at most this part of the descriptors: a range is asked for in a word."""
REFUSAL_BODY_BYTES = 4 * KIB
"""How much of a refusing response's body the client reads to show its first line."""

# --- WebSocket and messages -----------------------------------------------------------------------------------------
CONTROL_PAYLOAD_BYTES = 125
"""RFC 6455 §5.5: all control frames MUST have a payload length of 125 bytes or less."""
MESSAGE_BYTES = 16 * KIB
"""A text message (control). The largest that we send is well under 1 KiB."""
MESSAGE_BRACKETS = 256
"""Opening brackets in a control message, and so its depth: decoders fail at depths that differ with the interpreter."""
FRAME_BYTES = 512 * KIB
"""Payload of a data frame that we send: one read of a local socket. Peers' may be any size: we never gather them."""
CONTROL_QUEUE_BYTES = 64 * KIB
"""Control messages waiting on a link. A peer that makes us queue more is not reading: the link is closed."""
NUMBER_MAX = 2**53 - 1
"""Largest number in a message: JavaScript's Number.MAX_SAFE_INTEGER."""

# --- streams --------------------------------------------------------------------------------------------------------
SCRATCH_BYTES = 512 * KIB
"""The one read buffer of the process. For bulk what an event costs counts more than what fits into a cache."""
READ_FIRST_BYTES = 16 * KIB
"""First read of a link, and bounds for a stranger: 16 KiB of tiny frames take 20 ms, 256 KiB a third of a second."""
READ_FLOOR_BYTES = 1 * KIB
"""Least that is read from a link whose frames take long to handle."""
BLOCK_BYTES = 16 * KIB
"""Replay and inbox bytes are kept in blocks of at least this: 2-byte frames otherwise cost 20-180 heap bytes a byte."""
LINK_QUEUE_BYTES = 256 * KIB
"""Bytes read from local sockets and not yet taken by the link; more pauses local reads."""
WINDOW_FIRST = 256 * KIB
"""First receive window: a round trip of 80 ms still carries 3 MB/s before the window grows."""
WINDOW_FLOOR = 64 * KIB
"""A window never shrinks below this, whatever the budgets say."""
WINDOW_MAX = 16 * MIB
"""1.6 Gbit/s at 80 ms."""
SEND_MAX = 16 * MIB
"""Most unacknowledged bytes that a sender holds for a stream, whatever it was granted."""
PRINCIPAL_BYTES = 256 * MIB
"""Bytes held (inboxes and replay buffers) for one principal."""
PROCESS_BYTES = 512 * MIB
"""Bytes held in the whole process."""
PRINCIPAL_STREAMS = 16384
"""Streams of one principal."""
PRINCIPAL_LINKS = 16384
"""Links of one principal."""
PRINCIPAL_LISTENING = 2048
"""Sockets that listen for one principal: a range of 1,024 ports at both addresses of `*`."""
PRINCIPAL_TOMBSTONES = 16384
"""Finished and refused ids remembered for one principal."""
TOMBSTONES = 65536
"""Finished and refused ids remembered in all: about 25 MB."""
PRINCIPAL_DETACHED = 4096
"""Streams of one principal without a link. Beyond it the one that has waited longest is reset."""
DETACHED = 8192
"""Streams without a link in all. Each keeps a socket and what is to be sent again."""
HALF_CLOSED_SECONDS = 3600.0
"""A half-closed stream without a byte for this long is reset."""

# --- datagram flows -------------------------------------------------------------------------------------------------
DATAGRAM_BYTES = 65507
"""Payload of a datagram: what UDP over IPv4 can carry, 65,535 bytes less both headers."""
DATAGRAM_QUEUE_BYTES = 64 * KIB
"""Datagrams of one flow that wait for a link, or for the target's name to resolve; beyond it the oldest is dropped."""
UDP_IDLE_SECONDS = 60
"""A flow without a datagram for this long ends (`--udp-timeout`). NATs forget theirs after 30 s to some minutes."""
LISTENER_FLOWS = 1024
"""Flows of one socket that takes datagrams: any source makes one. Beyond it the one that was idle longest ends."""

# --- time -----------------------------------------------------------------------------------------------------------
DIAL_SECONDS = 10.0
"""Dialling a target, name resolution included."""
RESUME_WINDOW_SECONDS = 300
"""How long a stream without a link is kept (`--resume-window`): a tunnel, a reboot of the router, a short sleep."""
MAX_RESUME_WINDOW_SECONDS = 3600
"""What a server grants at most (`--max-resume-window`), and how long it remembers the ids of streams that ended."""
OPEN_WAIT_SECONDS = 10.0
"""How long an accepted connection waits for a link before it is reset."""
STOP_SECONDS = 3.0
"""From SIGTERM to exit, whatever is open."""
STALLED_SECONDS = 60.0
"""A link that takes no byte of a begun frame for this long is given up. 100 kbit/s empty a full buffer in 20 s."""
LINGER_SECONDS = 1.0
"""After our Close or FIN: how long the other side's is awaited."""
PING_AFTER_SECONDS = 15.0
"""Silence on a link after which a `ping` goes out. Common proxies' idle timeouts start at 30 s."""
CLIENT_PING_AFTER_SECONDS = 13.0
"""The same at the client. Its pings come before the server would ask, so on a link that lives only one end does; the
server's wait is what it would be without. Two seconds apart, so that a slow path does not have both ask."""
PONG_WITHIN_SECONDS = 10.0
"""An unanswered `ping` this old means that the link is dead."""
SWEEP_SECONDS = 1.0
"""Period of the sweep: late acks, silent links, stale tombstones."""
TURN_SECONDS = 0.002
"""Longest turn of the reactor before other Trio tasks run: a cold open took 36 ms beside 32 bulk streams without it."""

# --- the client's pool ----------------------------------------------------------------------------------------------
IDLE_LINKS = 12
"""Warm links kept ready (`--idle-links`)."""
DIALS_AT_ONCE = 8
"""Handshakes in flight to the server: enough for 80 ms paths, no stampede."""
BACKOFF_FIRST_SECONDS = 0.2
BACKOFF_MAX_SECONDS = 15.0
"""Re-dial delays double from the first to the last, each drawn between 0 and itself (full jitter)."""
