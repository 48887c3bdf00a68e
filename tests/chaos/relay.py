"""A relay that carries the tunnel's connections and breaks them, in a process of its own."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.integration.process import Process

if TYPE_CHECKING:
    from collections.abc import Iterator

FORWARDER = Path(__file__).with_name("forwarder.py")


@dataclass(frozen=True)
class Counts:
    """What a relay has done since it was started.

    Attributes:
        accepted: connections that it took.
        open: connections that nothing has happened to.
        bytes: forwarded, both ways together.
        hits: faults that ended at least one connection over which data was flowing.
        faults: faults by kind.
        cut: connections ended, by kind of fault.
    """

    accepted: int
    open: int
    bytes: int
    hits: int
    faults: dict[str, int]
    cut: dict[str, int]

    @property
    def cuts(self) -> int:
        """Connections ended, by whatever fault."""
        return sum(self.cut.values())


class Relay(Process):
    """Forwards connections to `port` of 127.0.0.1 on to `upstream`, whole until it is told otherwise.

    Use as a context manager; entering returns once it accepts. The kinds of fault:

    - `rst`: both ends are reset.
    - `fin`: both ends get a FIN, in the middle of what was being forwarded.
    - `half`: one end is told at once, the other one to three seconds later; meanwhile nothing moves.
    - `black_hole`: nothing moves any more, and nobody is told. New connections work.
    - `freeze`: nothing at all moves for 200 ms; then everything goes on.
    - `refuse`: new connections are refused for up to two seconds.
    - `outage`: `rst` and `refuse` together.

    Args:
        upstream: the port of 127.0.0.1 where connections go on to.
        directory: for its logs.
        seed: of everything that it does at random.
        rate: bytes a second each way, for all connections together, with small buffers; None does not shape.
        name: of its logs.
    """

    def __init__(
        self, upstream: int, directory: Path, *, seed: int = 0, rate: int | None = None, name: str = "relay"
    ) -> None:
        argv = [sys.executable, FORWARDER, "--upstream", str(upstream), "--seed", str(seed)]
        argv += ["--rate", str(rate)] if rate is not None else []
        # Without traces of its end: it has nothing to tidy up.
        super().__init__(name, argv, directory=directory, stop_signal=signal.SIGKILL, exit_codes=(-signal.SIGKILL,))
        self._lock = threading.Lock()

    def __enter__(self) -> Relay:
        super().__enter__()
        try:
            found = self.wait_for_line(r"forwarding (\d+) control (\d+)")
            self.port = int(found[1])
            self._control = socket.create_connection(("127.0.0.1", int(found[2])), timeout=30)
            self._answers = self._control.makefile("r", encoding="utf-8")
        except BaseException as error:
            super().__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, *details: Any) -> None:
        try:
            if self.running:
                print(f"{self.name}: {self.counts()}")
        finally:
            self._answers.close()
            self._control.close()
            super().__exit__(*details)

    def fault(self, kind: str, scope: str = "all", seconds: float | None = None) -> int:
        """Do one thing now.

        Args:
            kind: see the class.
            scope: `all` connections, `one` of them, or `busy`: one over which data flows, if there is one.
            seconds: how long, where the kind has a length; None draws it.

        Returns:
            how many connections it hit.
        """
        hit = self._command("fault", kind, scope, *([str(seconds)] if seconds is not None else []))
        assert isinstance(hit, int), hit
        return hit

    @contextmanager
    def faults(self, seconds: float, *kinds: str, scope: str = "any", patience: float = 0.0) -> Iterator[None]:
        """While the context lasts: faults of these kinds in random order, so many seconds apart in the mean.

        While no connection is busy each waits, up to `patience` seconds: so what it hits has recovered.
        `scope` is `all`: each hits all connections; or `any`: half of them hit one, which is often a busy one.
        """
        assert self._command("every", str(seconds), str(patience), scope, *kinds) == "ok"
        try:
            yield
        finally:
            self.calm()

    def calm(self) -> None:
        """No more `faults` from now on."""
        assert self._command("calm") == "ok"

    def counts(self) -> Counts:
        """What happened so far."""
        answer = self._command("counts")
        assert isinstance(answer, dict), answer
        return Counts(**{name: answer[name] for name in Counts.__dataclass_fields__})

    def _command(self, *words: str) -> object:
        with self._lock:
            self._control.sendall(" ".join(words).encode() + b"\n")
            answer: object = json.loads(self._answers.readline())
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer
