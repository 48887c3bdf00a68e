"""What `check` found: steps, each with its evidence and, where there is something to do, the next step.

{"ok": false, "url": "wss://host/", "steps": [
    {"step": "tcp", "ok": false, "text": "...", "evidence": {...}, "next": "..."}]}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Final

NAMES: Final = (
    "name", "route", "proxy", "tcp", "tls", "http", "authentication", "tunnel", "round-trip", "keepalive", "idle",
)  # fmt: skip
"""Every step that there is, in the order of the layers. To a proxy one must connect before it answers: then `proxy`
comes after `tcp`."""
HIDDEN: Final = "***"
_WIDTH: Final = max(map(len, NAMES))


@dataclass(frozen=True, slots=True)
class Step:
    """One layer.

    Args:
        step: one of NAMES.
        ok: whether it works.
        text: what was found, one line.
        evidence: the same for programs: what JSON can hold. Times are in seconds.
        next: what the user may do now; None where there is nothing to be done. A step that is `ok` may have one.
    """

    step: str
    ok: bool
    text: str
    evidence: dict[str, Any] = field(default_factory=dict)
    next: str | None = None


@dataclass(slots=True)
class Report:
    """What is known of one server so far.

    Args:
        url: of the server, without its token.
        secrets: texts that must not come out, whoever sends them back to us.
        tell: is called with each step as it is added.

    Attributes:
        steps: so far.
        refused: the server said no: to the token, or to this version.
        finished: the check came to its end, be it at a failure.
    """

    url: str
    secrets: Collection[str] = ()
    tell: Callable[[Step], None] = lambda _step: None
    steps: list[Step] = field(default_factory=list)
    refused: bool = False
    finished: bool = False

    @property
    def ok(self) -> bool:
        """Whether all is well."""
        return self.finished and all(step.ok for step in self.steps)

    @property
    def exit_code(self) -> int:
        """0 all is well, 1 something failed, 3 the server refused."""
        return 0 if self.ok else 3 if self.refused else 1

    def add(self, step: Step) -> None:
        """Note a step, less the secrets in it, and tell it."""
        clean = Step(
            step.step, step.ok, self._hide(step.text), self._hide(step.evidence),
            None if step.next is None else self._hide(step.next),
        )  # fmt: skip
        self.steps.append(clean)
        self.tell(clean)

    def as_json(self) -> str:
        """One object in one line, in ASCII. Of a check that was interrupted it says so."""
        steps = [
            {"step": step.step, "ok": step.ok, "text": step.text, "evidence": step.evidence, "next": step.next}
            for step in self.steps
        ]
        found: dict[str, Any] = {"ok": self.ok, "url": self.url, "steps": steps}
        if not self.finished:
            found["interrupted"] = True
        return json.dumps(found)

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str):
            for secret in self.secrets:
                value = value.replace(secret, HIDDEN)
            return value
        if isinstance(value, dict):
            return {key: self._hide(member) for key, member in value.items()}
        if isinstance(value, list | tuple):
            return [self._hide(member) for member in value]
        return value


@dataclass(frozen=True, slots=True)
class Layout:
    """How text is shown, by what the output's encoding can say.

    Args:
        encoding: of the output.
    """

    encoding: str

    def step(self, step: Step) -> str:
        """A line with the finding, and one with what to do, if there is something."""
        good, bad, arrow = ("✓", "✗", "→") if self._can("✓✗→") else ("ok  ", "FAIL", "->")
        mark = good if step.ok else bad
        lines = [f"  {mark} {step.step:<{_WIDTH}}  {step.text}"]
        if step.next is not None:
            lines.append(f"  {' ' * len(mark)} {'':<{_WIDTH}}  {arrow} {step.next}")
        return self._encodable("\n".join(lines))

    def heading(self, report: Report) -> str:
        return self._encodable(report.url)

    def summary(self, report: Report) -> str:
        """The last line about a server."""
        failed = [step.step for step in report.steps if not step.ok]
        if not report.finished:
            return "interrupted" + (f"; not well: {', '.join(failed)}" if failed else "")
        return f"not well: {', '.join(failed)}" if failed else "all is well"

    def _can(self, text: str) -> bool:
        try:
            text.encode(self.encoding)
        except (UnicodeError, LookupError):
            return False
        return True

    def _encodable(self, text: str) -> str:
        if self._can(text):
            return text
        return text.replace("…", "...").encode("ascii", "backslashreplace").decode()


def duration(seconds: float) -> str:
    """A time as people read it: `0.4 ms`, `12 ms`, `1.2 s`, `13 s`, `3 min`."""
    if seconds < 0.01:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10 and round(seconds, 1) != round(seconds):
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 60} min" if whole >= 120 and whole % 60 == 0 else f"{whole} s"
