"""Standard input and output as one end of a stream: whatever they are, terminals, pipes, sockets or files.

A regular file cannot be waited for with epoll, and O_NONBLOCK on a pipe or a terminal is seen by everyone who shares
it. So two threads read and write them, blocking, and a socket pair leads to the reactor. The threads are daemons:
whoever waits for a terminal's next line must not keep the process alive.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from collections.abc import Callable

import trio

from wstunnel import sockets

CHUNK_BYTES = 256 * 1024
"""Read or written at a time."""
STANDARD_ERROR = 2


class Stdio:
    """Joins two descriptors with a socket.

    Args:
        source: what is read, to its end, which shuts the stream's direction down.
        sink: what is written, and closed at the end; a standard descriptor then leads to nowhere. It stays open if the
            stream fails: who reads it, as ssh does, takes its end for all there is to know, and ends the program
            that was about to say why. Neither is closed here before.

    Attributes:
        sock: the stream's end, non-blocking; the caller owns it.
        ended: set when everything was written and `source` has ended too, or is a terminal, whose user waits for that.
        broken: why writing `sink` has failed, once it has.
        failed: set when reading `source` has failed; what was read is not all, so that the stream gets no EOF: it has
            to be reset.
        unread: why, then.
        threads: those that work; the last one closes what they share.
    """

    def __init__(self, source: int, sink: int) -> None:
        self.sock, self._far = socket.socketpair()
        self.sock.setblocking(False)
        self.ended = trio.Event()
        self.broken: OSError | None = None
        self.failed = trio.Event()
        self.unread: OSError | None = None
        self._source = source
        self._sink = sink
        self._terminal = os.isatty(source)  # one that is gone does not say so
        self._left = 1 if self._terminal else 2
        self._working = 2
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._failed = False
        self.threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start both threads. Called within Trio."""
        token = trio.lowlevel.current_trio_token()
        for work in (self._read, self._write):
            thread = threading.Thread(target=self._run, args=(work, token), daemon=True, name=work.__name__)
            self.threads.append(thread)
        for thread in self.threads:
            thread.start()

    def over(self, *, failed: bool) -> None:
        """The stream is over; to be called as soon as that is known. `failed`: `sink` is left open."""
        self._failed = self._failed or failed
        self._over.set()

    def close(self) -> None:
        """Let both threads end as soon as they look: what they would send goes nowhere. May be repeated."""
        self._over.set()
        with self._lock:
            if not self.threads:
                self._far.close()
            try:
                self._far.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # closed, or the stream's end is

    def _hung_up(self) -> bool:
        poll = select.poll()
        poll.register(self._far, 0)
        return bool(poll.poll(0))

    def _run(self, work: Callable[[], bool], token: trio.lowlevel.TrioToken) -> None:
        counts = work()
        with self._lock:
            self._left -= counts
            ended = self._left <= 0
            self._working -= 1
            if not self._working:
                self._far.close()
        try:
            if self.unread is not None:
                token.run_sync_soon(self.failed.set)
            if ended:
                token.run_sync_soon(self.ended.set)
        except trio.RunFinishedError:
            pass

    def _read(self) -> bool:
        """Source to stream."""
        try:
            while data := self._read_some():
                self._far.sendall(data)
            if self.unread is None:
                self._far.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the stream is over: the other thread knows
        return not self._terminal

    def _read_some(self) -> bytes:
        while True:
            try:
                return os.read(self._source, CHUNK_BYTES)
            except BlockingIOError:
                _wait(self._source, select.POLLIN)
            except OSError as error:
                if not (self._terminal and error.errno == errno.EIO):  # that is the end of a terminal that is gone
                    self.unread = error
                return b""

    def _write(self) -> bool:
        """Stream to sink."""
        try:
            while data := self._far.recv(CHUNK_BYTES):
                try:
                    _write_all(self._sink, data)
                except OSError as error:
                    self.broken = error
                    sockets.reset(self._far)
                    break
        except OSError:
            pass  # the stream was reset
        if self.broken is None and self._hung_up():  # not only this direction has ended
            self._over.wait()
            if self._failed:
                return True
        try:
            _close(self._sink)
        except OSError:
            pass
        return True


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            _wait(descriptor, select.POLLOUT)


def _wait(descriptor: int, events: int) -> None:
    """Somebody who shares the descriptor has made it non-blocking, which holds for all who do."""
    poll = select.poll()
    poll.register(descriptor, events)
    poll.poll()


def _close(descriptor: int) -> None:
    if descriptor > STANDARD_ERROR:
        os.close(descriptor)
        return
    # The next socket would get its number, and whatever is printed then would go to the server.
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, descriptor)
    if nowhere != descriptor:
        os.close(nowhere)
