"""A session: what its streams and links ask of it, the sweep, the budgets, the end."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest

from tests.memory import MemoryReactor, MemorySocket
from tests.test_link import HELLO, SESSION, End, Wire, close_write, hang_up, identify, read, write
from wstunnel import limits, logs
from wstunnel.link import Link
from wstunnel.reverse_server import Places
from wstunnel.server_session import ServerSession
from wstunnel.session import HALF_CLOSED_SWEEPS, Principal, Session
from wstunnel.wire.credit import Budget
from wstunnel.wire.messages import Ack, Bye, Need, Reset
from wstunnel.wire.protocol import PeerClosed
from wstunnel.wire.states import Exchange


def sweep(wire: Wire, now: float, times: int = 1) -> None:
    """`times` sweeps at `now`, and all that follows from each."""
    wire.reactor.now = now
    for _ in range(times):
        wire.end.sweep(now)
        wire.run()


class TestPrincipal:
    def test_counts_streams_over_all_its_sessions(self):
        everyone: dict[str, Principal] = {}
        principal = Principal("someone", Budget(1 << 30), everyone)
        assert everyone == {"someone": principal}
        sessions = [Session(SESSION, principal, MemoryReactor(), logs.logger("test")) for _ in range(2)]
        assert principal.sessions == set(sessions)
        streams = [
            session.make_stream(identify(number), egress=True, target="t", peer="p")
            for number, session in enumerate(sessions)
        ]
        assert principal.streams == 2
        streams[0].reset("refused", "no")
        assert principal.streams == 1
        sessions[0].leave()
        sessions[0].leave()
        assert principal.sessions == {sessions[1]}

    def test_its_budget_is_part_of_the_processes(self):
        process = Budget(1 << 30)
        principal = Principal("someone", process, {})
        principal.budget.charge(5)
        assert process.held == 5
        assert principal.budget.capacity == limits.PRINCIPAL_BYTES


class TestLinks:
    def test_are_counted_until_they_are_lost(self):
        end = End(MemoryReactor())
        wires = [Wire(end=end) for _ in range(2)]
        assert end.principal.links == 2
        hang_up(wires[0].far)
        wires[0].run()
        assert end.principal.links == 1
        assert end.links == {wires[1].link}

    @pytest.mark.parametrize("message", [Bye(), Need(links=1)])
    def test_a_message_that_no_role_expects_closes_that_link_only(self, message):
        end = End(MemoryReactor())
        first, second = Wire(end=end), Wire(end=end)
        first.link.protocol.role = "control"
        first.say(message)
        assert [event.code for event in first.got if isinstance(event, PeerClosed)] == [1002]
        second.open()

    def test_the_base_class_does_nothing_with_an_idle_link(self):
        session = Session(SESSION, Principal("someone", Budget(1), {}), MemoryReactor(), logs.logger("test"))
        assert session.idle(SimpleNamespace()) is None

    def test_a_link_carries_one_stream_after_another(self):
        for side in ("client", "server"):
            wire = Wire(side)
            for number in range(1, 51):
                stream, application = wire.open(number)
                write(application, b"%d" % number)
                close_write(application)
                wire.state.outbound.append(b"%d" % -number)
                wire.state.outbound.end()
                wire.run()
                assert wire.data() == b"%d" % number
                assert read(application) == b"%d" % -number
                assert stream.outcome == ("finished", "")
            assert wire.link.protocol.n == 50
            assert wire.end.links == {wire.link}
            assert not wire.end.streams
            assert set(wire.reactor.handlers) == {wire.link}


class TestLog:
    def lines(self, caplog: pytest.LogCaptureFixture, text: str) -> list[dict[str, object]]:
        return [
            record.msg.fields
            for record in caplog.records
            if isinstance(record.msg, logs._Message) and record.msg.text == text
        ]

    def test_a_stream_has_one_line_when_it_opens_and_one_when_it_ends(self, caplog):
        caplog.set_level(logging.DEBUG, logger="wstunnel")
        wire = Wire()
        _stream, application = wire.open()
        write(application, b"12345")
        wire.state.outbound.append(b"123")
        wire.reactor.now = 2.5
        for end in (lambda: close_write(application), wire.state.outbound.end):
            end()
            wire.run()
        (opened,) = self.lines(caplog, "stream opened")
        (ended,) = self.lines(caplog, "stream ended")
        assert opened["address"] == "192.0.2.7:1"
        assert ended["sent"] == 5 and ended["received"] == 3
        assert ended["seconds"] == 2.5
        assert ended["reason"] == "finished" and "detail" not in ended
        for line in (opened, ended):
            assert line["target"] == "tcp:db:1"
            assert line["peer"] == "application" and line["principal"] == "someone"
            assert line["stream"] == logs.hash_id(identify(1)), "the id itself would let its reader resume the stream"
        json.dumps([opened, ended])

    def test_one_that_never_reached_its_target_was_refused(self, caplog):
        caplog.set_level(logging.DEBUG, logger="wstunnel")
        wire = Wire()
        wire.begin()
        wire.run()
        wire.end.accepted[0].note = "no rule allows it"
        wire.end.accepted[0].reset("refused", "connection refused")
        wire.run()
        (refused,) = self.lines(caplog, "stream refused")
        assert (refused["reason"], refused["detail"]) == ("refused", "connection refused")
        assert refused["policy"] == "no rule allows it", "for the log only"
        assert all("no rule" not in str(message) for message in wire.got)
        assert self.lines(caplog, "stream ended") == []


class TestSweep:
    def test_acks_what_moved_and_nothing_else(self):
        wire = Wire()
        _stream, _application = wire.open()
        sweep(wire, 1.0)
        assert wire.got == []
        wire.state.outbound.append(b"a few")
        wire.run()
        assert wire.got == []
        sweep(wire, 2.0)
        assert [(type(message), message.consumed) for message in wire.got] == [(Ack, 5)]
        sweep(wire, 3.0)
        assert len(wire.got) == 1

    def test_a_stream_that_moved_and_ended_is_left_alone(self):
        wire = Wire()
        stream, _application = wire.open()
        wire.end.stream_moved(stream)
        stream.reset("idle", "enough")
        sweep(wire, 1.0)
        wire.end.stream_moved(stream)
        sweep(wire, 2.0)
        assert wire.got == [Reset(n=1, code="idle", message="enough")]

    def test_a_fault_in_our_own_code_ends_only_that_link(self, monkeypatch):
        """The sweep runs outside of the reactor, which would have caught it."""
        end = End(MemoryReactor())
        bad, moved, good = Wire(end=end), Wire(end=end), Wire(end=end)
        moved_stream, _ = moved.open(1)
        end.stream_moved(moved_stream)
        good_stream, _ = good.open(2)
        original = {name: getattr(Link, name) for name in ("sweep", "flush")}

        def sweep_link(link, now):
            if link is bad.link:
                raise ValueError("our bug")
            original["sweep"](link, now)

        def flush(link):
            if link is moved.link:
                raise ValueError("another")
            original["flush"](link)

        monkeypatch.setattr(Link, "sweep", sweep_link)
        monkeypatch.setattr(Link, "flush", flush)
        end.sweep(1.0)
        assert end.losses == ["internal error: ValueError('another')", "internal error: ValueError('our bug')"]
        assert end.links == {good.link}
        assert good_stream.outcome is None

    def test_links_keep_their_deadlines(self):
        wire = Wire(greet=False)
        sweep(wire, limits.HANDSHAKE_SECONDS)
        assert not wire.link.protocol.close_sent
        sweep(wire, limits.HANDSHAKE_SECONDS + 0.1)
        assert [message for message in wire.got if isinstance(message, PeerClosed)] == [
            PeerClosed(1002, "no hello in time")
        ]

    def test_sockets_with_nothing_wanted_are_looked_at_where_the_reactor_cannot(self):
        wire = Wire("client", end=End(MemoryReactor(), window=4))
        wire.reactor.reports_hangups = False
        wire.consuming = False
        stream, application = wire.open()
        other_wire = Wire("client", end=wire.end)
        other, _ = other_wire.open(2)
        dialling = wire.end.make_stream(identify(3), egress=True, target="t", peer="p")
        write(application, b"1234")
        wire.run()
        assert stream.mask == 0
        sweep(wire, 1.0)
        assert stream.reason is None
        application.linger_reset = True
        application.close()
        sweep(wire, 2.0)
        assert stream.outcome == ("reset", "connection reset")
        assert other.reason is None and dialling.reason is None


class TestHalfClosed:
    def half_closed(self) -> tuple[Wire, object, MemorySocket]:
        wire = Wire()
        stream, application = wire.open()
        close_write(application)
        wire.run()
        sweep(wire, 1.0, HALF_CLOSED_SWEEPS)
        return wire, stream, application

    def test_a_byte_starts_the_hour_again(self):
        wire, stream, application = self.half_closed()
        sweep(wire, 3000.0, HALF_CLOSED_SWEEPS)
        wire.state.outbound.append(b"x")
        wire.run()
        assert read(application) == b"x"
        sweep(wire, 3001.0 + 600, HALF_CLOSED_SWEEPS)
        sweep(wire, 3001.0 + limits.HALF_CLOSED_SECONDS, HALF_CLOSED_SWEEPS)
        assert stream.reason is None
        sweep(wire, 3601.0 + limits.HALF_CLOSED_SECONDS, HALF_CLOSED_SWEEPS)
        assert stream.outcome == ("idle", "half-closed and silent for an hour")

    def test_one_that_is_open_both_ways_may_be_silent_for_ever(self):
        wire = Wire()
        stream, _application = wire.open()
        for hour in range(1, 5):
            sweep(wire, hour * 3600.0, HALF_CLOSED_SWEEPS)
        assert stream.reason is None

    def test_it_is_looked_at_in_every_thirtieth_sweep(self):
        wire, stream, _application = self.half_closed()
        sweep(wire, 3601.0, HALF_CLOSED_SWEEPS - 1)
        assert stream.reason is None
        sweep(wire, 3601.0)
        assert stream.reason is not None

    def test_one_whose_both_ends_sent_all_is_not_half_closed_any_more(self):
        wire, stream, _application = self.half_closed()
        wire.state.outbound.end()
        wire.run()
        assert stream.outcome == ("finished", "")
        assert not wire.end._half_closed


class TestBudgets:
    """Those of whole streams are in test_data_path.py."""

    def test_the_largest_of_all_principals_goes_when_the_process_is_full(self):
        process = Budget(1000)
        everyone: dict[str, Principal] = {}
        reactor = MemoryReactor()
        wires = []
        for number, size in enumerate((300, 500, 150)):
            wire = Wire(end=End(reactor, name=f"user{number}", process=process, everyone=everyone))
            stream, _application = wire.open(room=0)
            wire.state.outbound.append(bytes(size))
            wire.run()
            wires.append((wire, stream))
        assert process.held == 950
        wires[2][0].state.outbound.append(bytes(60))
        wires[2][0].run()
        for wire, _ in wires:
            wire.run()
        assert [stream.outcome and stream.outcome[0] for _, stream in wires] == [None, "limit", None]
        assert process.held == 510

    def test_only_ones_own_go_when_the_principal_is_full(self):
        process = Budget(10_000)
        everyone: dict[str, Principal] = {}
        reactor = MemoryReactor()
        large = Wire(end=End(reactor, name="large", process=process, everyone=everyone))
        small = Wire(end=End(reactor, name="small", process=process, everyone=everyone, capacity=100))
        streams = []
        for wire, size in ((large, 5000), (small, 100)):
            stream, _application = wire.open(room=0)
            wire.state.outbound.append(bytes(size))
            wire.run()
            streams.append(stream)
        assert streams[0].outcome is None
        assert streams[1].outcome == ("limit", "too much memory is held: the largest stream is reset")

    @pytest.mark.parametrize(("held", "goes"), [(501, "connection"), (500, "stream")])
    def test_a_plain_connection_that_holds_more_than_any_stream_goes_first(self, held: int, goes: str):
        wire = Wire(end=End(MemoryReactor(), capacity=1000))
        principal = wire.end.principal
        stream, _application = wire.open(room=0)
        wire.state.outbound.append(bytes(500))
        wire.run()

        class Plain:
            def __init__(self) -> None:
                self.held = held

            def give_up(self) -> None:
                principal.budget.charge(-self.held)
                self.held = 0

        plain = Plain()
        principal.plain[plain] = None
        principal.budget.charge(held)
        principal.relieve()
        assert (plain.held, stream.reason is not None) == ((0, False) if goes == "connection" else (500, True))

    def test_relief_is_asked_for_once(self):
        wire = Wire(end=End(MemoryReactor(), capacity=10))
        wire.open(room=0)
        wire.end.principal.budget.charge(20)
        asked: list[object] = []
        wire.reactor.later = asked.append
        wire.end.stream_held()
        wire.end.stream_held()
        assert len(asked) == 1
        wire.end._relieve()
        assert wire.link.stream.reason is None, "it holds nothing: to reset it would give nothing back"
        wire.end.stream_held()
        assert len(asked) == 2

    def test_over_75_percent_an_open_is_refused_with_limit(self):
        reactor = MemoryReactor()
        principal = Principal("someone", Budget(1 << 30), {})
        principal.budget.charge(int(principal.budget.capacity * 0.75))
        server = SimpleNamespace(
            reactor=reactor, share=lambda most: most, max_resume_window=0, udp_timeout=60,
            places=Places((), most=1), drop_oldest=None, negotiate=lambda *_: None,
        )  # fmt: skip
        session = ServerSession(SESSION, principal, server, HELLO)
        wire = Wire()
        wire.link.owner = session
        wire.begin()
        wire.run()
        assert wire.got == [Reset(n=1, code="limit", message="too much memory is held")]
        assert not session.streams

    def test_a_reset_that_the_link_cannot_take_yet_goes_later(self):
        """The memory is given back at once; an ack that is under way is for bytes that are gone here, and no fault."""
        end = End(MemoryReactor(), window=64 * 1024, capacity=16 * 1024)
        wire, other = Wire("client", end=end), Wire("client", end=end)
        stream, application = wire.open()
        other_stream, _other_application = other.open(2, room=0)
        wire.near.outgoing.room = 10_000
        write(application, bytes(12_000))
        wire.run()
        assert wire.link.blocked
        other.state.outbound.append(bytes(6000))
        other.run()
        assert stream.reason == ("limit", "too much memory is held: the largest stream is reset")
        assert end.principal.budget.held == 6000
        wire.say(Ack(n=1, consumed=3000, limit=3000 + 64 * 1024))
        wire.near.outgoing.room = None
        wire.run()
        assert wire.messages()[-1] == Reset(n=1, code="limit", message=stream.reason[1])
        assert stream.outcome == stream.reason
        assert other_stream.outcome is None
        assert not end.losses
        assert wire.link.protocol.state is wire.peer.state is Exchange.IDLE

    def test_a_stream_that_may_send_no_reset_any_more_gives_its_memory_back_and_ends(self):
        end = End(MemoryReactor(), window=64 * 1024, capacity=16 * 1024)
        wire, other = Wire("client", end=end), Wire("client", end=end)
        wire.consuming = False
        stream, application = wire.open()
        other.open(2, room=0)
        write(application, bytes(12_000))
        close_write(application)
        wire.state.outbound.end()
        wire.run()
        assert not stream.state.resettable()
        other.state.outbound.append(bytes(6000))
        other.run()
        wire.run()
        assert end.principal.budget.held == 6000
        for consumed in (9000, 3000):
            wire.state.inbound.taken(consumed)
            wire.state.ack_wanted = True
            wire.run()
        wire.state.inbound.end_delivered()
        wire.run()
        assert stream.outcome is not None
        assert not end.losses
        assert wire.link.protocol.state is wire.peer.state is Exchange.IDLE


class TestDetached:
    def cut(self, wire: Wire) -> None:
        hang_up(wire.far)
        wire.run()

    def test_the_one_that_has_waited_longest_of_all_principals_goes(self, monkeypatch, caplog):
        monkeypatch.setattr(limits, "DETACHED", 2)
        caplog.set_level(logging.WARNING, logger="wstunnel")
        reactor, everyone, process = MemoryReactor(), {}, Budget(1 << 40)
        ends = [End(reactor, name=name, everyone=everyone, process=process) for name in ("one", "two", "three")]
        streams = []
        for number, end in enumerate(ends):
            end.resume_window = 300.0
            wire = Wire(end=end)
            streams.append(wire.open(number)[0])
            reactor.advance(1)
            if number == 0:
                wire_one = wire
            else:
                self.cut(wire)
        self.cut(wire_one)
        reason = "too many streams without a link: the oldest is reset"
        assert [stream.outcome for stream in streams] == [None, ("limit", reason), None]
        assert [end.principal.detached for end in ends] == [1, 0, 1]
        said = "too many streams without a link: the oldest were reset"
        assert [str(record.msg.text) for record in caplog.records].count(said) == 1

    def test_without_a_window_the_stream_ends_with_its_link(self):
        wire = Wire()
        stream, application = wire.open()
        self.cut(wire)
        assert stream.outcome == ("lost", "connection closed without a close frame")
        assert application.reset_by_peer and wire.end.principal.detached == 0

    def test_a_reset_that_was_asked_for_counts_for_the_end_that_does_not_resume(self):
        for resumes in (False, True):
            wire = Wire()
            wire.end.resume_window, wire.end.resumes = 300.0, resumes
            stream, _application = wire.open()
            stream.reset("idle", "enough")
            wire.carry_out()
            self.cut(wire)
            assert stream.outcome == (None if resumes else ("idle", "enough"))
            assert len(wire.end._detached) == resumes

    def test_the_window_ends_with_a_sweep(self):
        wire = Wire()
        wire.end.resume_window = 10.0
        stream, application = wire.open()
        wire.reactor.now = 5.0
        self.cut(wire)
        wire.end.sweep(14.9)
        assert stream.outcome is None and not application.reset_by_peer
        wire.end.sweep(15.0)
        assert stream.outcome == ("lost", "no link for 10 s")
        assert application.reset_by_peer and not wire.end.streams


class TestClose:
    def test_streams_are_reset_and_links_get_a_close_frame(self):
        end = End(MemoryReactor())
        wires = [Wire(end=end) for _ in range(3)]
        opened = [wire.open(number) for number, wire in enumerate(wires[:2], 1)]
        end.close(1001, "we go")
        for _stream, application in opened:
            assert application.reset_by_peer
        assert not end.streams
        assert end.outcomes[identify(1)] == ("shutdown", "we go")
        for wire in wires:
            wire.run()
            assert wire.got[-1] == PeerClosed(1001, "we go")
            hang_up(wire.far)
            wire.run()
        assert not end.links
        assert end.principal.links == 0
        assert not end.reactor.handlers

    def test_peers_that_do_not_answer_are_given_a_second(self):
        end = End(MemoryReactor())
        wire = Wire(end=end)
        end.close(1001, "we go")
        end.sweep(limits.LINGER_SECONDS - 0.1)
        assert end.links
        end.sweep(limits.LINGER_SECONDS)
        assert end.losses == ["closed"]
        assert wire.near.closed
