"""wire/directions.py: offsets and credit of one direction, at its sender and at its receiver."""

from __future__ import annotations

import re
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wstunnel.errors import ProtocolError, StreamError
from wstunnel.limits import KIB, SCRATCH_BYTES, SEND_MAX, WINDOW_FIRST
from wstunnel.wire.buffer import SPARE_FROM_BYTES
from wstunnel.wire.credit import Budget
from wstunnel.wire.directions import Inbound, Outbound
from wstunnel.wire.states import Half

PLENTY = 1 << 40
NOW = 1000.0
ROUND_TRIP = 0.08


def refuses(text: str) -> pytest.RaisesExc[ProtocolError]:
    return pytest.raises(ProtocolError, match=re.escape(text), check=lambda error: error.code == 1002)


def sender(data: bytes = b"", *, sent: int = 0, limit: int = WINDOW_FIRST) -> Outbound:
    """An outbound direction whose application wrote `data`, of which `sent` bytes are on the link."""
    outbound = Outbound(Budget(PLENTY), limit)
    if data:
        outbound.append(data)
    while sent > outbound.cursor:
        assert outbound.take(sent - outbound.cursor)
    return outbound


def finished_sender(total: int = 5) -> Outbound:
    """All bytes and `eof` are on the link."""
    outbound = sender(bytes(total), sent=total)
    outbound.end()
    assert outbound.eof_sent() == total
    return outbound


class TestSending:
    def test_takes_in_order_from_where_it_was(self) -> None:
        outbound = sender(b"abcdef")
        assert outbound.queued() == 6
        assert outbound.take(4) == b"abcd"
        assert outbound.queued() == 2
        assert outbound.take(4) == b"ef"
        assert outbound.take(4) is None
        assert outbound.queued() == 0
        assert outbound.cursor == outbound.replay.end == 6

    def test_what_was_sent_is_kept_until_it_is_acked(self) -> None:
        outbound = sender(b"abcdef", sent=6)
        assert outbound.budget.held == 6
        outbound.acknowledge(4, WINDOW_FIRST)
        assert (outbound.replay.start, outbound.replay.end) == (4, 6)
        assert outbound.replay.view(4, 9) == b"ef"
        assert outbound.budget.held == 2

    def test_appending_after_a_view_was_let_go(self) -> None:
        outbound = sender(b"abc", sent=3)
        outbound.append(memoryview(b"def"))
        assert outbound.take(9) == b"def"
        assert outbound.budget.held == 6

    def test_what_was_read_can_be_kept_where_it_is(self) -> None:
        outbound = sender(b"abc")
        scratch = memoryview(bytearray(b"x" * SCRATCH_BYTES))
        other = outbound.adopt(scratch[:SPARE_FROM_BYTES])
        other[:] = bytes(len(other))
        assert outbound.budget.held == outbound.queued() == 3 + SPARE_FROM_BYTES
        assert outbound.take(9) == b"abc"
        assert outbound.take(1 << 20) == b"x" * SPARE_FROM_BYTES
        outbound.acknowledge(3 + SPARE_FROM_BYTES, WINDOW_FIRST)
        assert outbound.budget.held == 0


class TestCarry:
    def test_as_append_and_take(self) -> None:
        outbound = sender(b"abc", sent=3)
        assert outbound.carry(memoryview(b"de"))
        assert (outbound.cursor, outbound.queued(), outbound.budget.held) == (5, 0, 5)
        assert bytes(outbound.replay.view(0, 9)) == b"abcde"

    def test_not_ahead_of_what_is_queued(self) -> None:
        outbound = sender(b"abc", sent=2)
        assert not outbound.carry(memoryview(b"de"))
        assert (outbound.cursor, outbound.queued(), outbound.budget.held) == (2, 1, 3)


class TestRoom:
    """A sender holds at most min(limit, its own maximum, budget) unacked: then it stops reading."""

    def test_the_first_window_needs_no_ack(self) -> None:
        outbound = Outbound(Budget(PLENTY))
        assert outbound.room() == 256 * KIB
        outbound.append(bytes(1000))
        assert outbound.room() == 256 * KIB - 1000
        outbound.append(bytes(256 * KIB - 1000))
        assert outbound.room() == 0

    def test_an_ack_makes_room_only_by_its_limit(self) -> None:
        outbound = sender(bytes(100), sent=100, limit=100)
        outbound.acknowledge(60, 100)
        assert outbound.room() == 0
        outbound.acknowledge(60, 130)
        assert outbound.room() == 30

    def test_down_to_the_last_byte(self) -> None:
        outbound = sender(bytes(99), limit=100)
        assert outbound.room() == 1
        outbound.append(b"x")
        assert outbound.room() == 0

    def test_its_own_maximum_whatever_was_granted(self) -> None:
        outbound = sender(limit=10 * SEND_MAX)
        assert outbound.room() == SEND_MAX
        for _ in range(16):
            outbound.append(bytes(SEND_MAX // 16))
        assert outbound.room() == 0
        while outbound.take(SEND_MAX):
            pass
        outbound.acknowledge(1000, 10 * SEND_MAX)
        assert outbound.room() == 1000

    def test_the_budget(self) -> None:
        budget = Budget(1000)
        outbound, other = Outbound(budget), Outbound(budget)
        outbound.append(bytes(800))
        assert outbound.room() == other.room() == 75, "an eighth is left for what peers were granted"
        other.append(bytes(75))
        assert outbound.room() == other.room() == 0

    def test_none_after_the_end(self) -> None:
        outbound = sender(b"abc")
        outbound.end()
        assert outbound.room() == 0


class TestEofOut:
    """EOF takes one offset of its own, and needs no credit."""

    def test_due_once_every_byte_is_on_the_link(self) -> None:
        outbound = sender(b"abc")
        assert not outbound.eof_due()
        outbound.end()
        assert outbound.total == 3
        assert not outbound.eof_due()
        outbound.take(2)
        assert not outbound.eof_due()
        outbound.take(2)
        assert outbound.eof_due()
        assert outbound.eof_sent() == 3
        assert outbound.state is Half.ENDED
        assert not outbound.eof_due()

    def test_of_nothing(self) -> None:
        outbound = sender()
        outbound.end()
        assert outbound.eof_due()
        assert outbound.eof_sent() == 0
        outbound.acknowledge(1, WINDOW_FIRST)
        assert outbound.state is Half.DONE

    def test_with_the_window_full(self) -> None:
        outbound = sender(bytes(100), sent=100, limit=100)
        outbound.end()
        assert outbound.eof_due()

    def test_delivered_when_total_plus_one_is_acked(self) -> None:
        outbound = finished_sender(5)
        outbound.acknowledge(4, WINDOW_FIRST)
        outbound.acknowledge(5, WINDOW_FIRST)
        assert outbound.state is Half.ENDED
        assert outbound.budget.held == 0
        outbound.acknowledge(6, WINDOW_FIRST)
        assert outbound.state is Half.DONE
        assert outbound.replay.start == outbound.replay.end == 5

    def test_bytes_and_end_in_one_ack(self) -> None:
        outbound = finished_sender(5)
        outbound.acknowledge(6, WINDOW_FIRST)
        assert outbound.state is Half.DONE
        assert outbound.budget.held == 0


class TestAcksIn:
    def test_of_what_was_not_sent(self) -> None:
        outbound = sender(b"abcdef", sent=3)
        with refuses("ack of 4, only 3 were sent"):
            outbound.acknowledge(4, WINDOW_FIRST)
        outbound.acknowledge(3, WINDOW_FIRST)

    def test_of_an_end_that_was_not_sent(self) -> None:
        outbound = sender(b"abc", sent=3)
        outbound.end()
        with refuses("ack of 4, only 3 were sent"):
            outbound.acknowledge(4, WINDOW_FIRST)

    def test_beyond_the_end(self) -> None:
        outbound = finished_sender(5)
        with refuses("ack of 7, only 6 were sent"):
            outbound.acknowledge(7, WINDOW_FIRST)
        outbound.acknowledge(6, WINDOW_FIRST)
        with refuses("ack of 7, only 6 were sent"):
            outbound.acknowledge(7, WINDOW_FIRST)

    def test_going_back(self) -> None:
        outbound = sender(b"abcdef", sent=6)
        outbound.acknowledge(4, WINDOW_FIRST)
        with refuses("ack went back from 4 to 3"):
            outbound.acknowledge(3, WINDOW_FIRST)
        outbound.acknowledge(4, WINDOW_FIRST)

    def test_going_back_from_the_end(self) -> None:
        outbound = finished_sender(5)
        outbound.acknowledge(6, WINDOW_FIRST)
        with refuses("ack went back from 6 to 5"):
            outbound.acknowledge(5, WINDOW_FIRST)
        outbound.acknowledge(6, WINDOW_FIRST + 1)
        assert outbound.state is Half.DONE

    def test_limit_falling(self) -> None:
        outbound = sender(b"abc", sent=3)
        with refuses(f"limit fell from {WINDOW_FIRST} to {WINDOW_FIRST - 1}"):
            outbound.acknowledge(3, WINDOW_FIRST - 1)
        outbound.acknowledge(3, WINDOW_FIRST + 10)
        with refuses(f"limit fell from {WINDOW_FIRST + 10} to {WINDOW_FIRST + 9}"):
            outbound.acknowledge(3, WINDOW_FIRST + 9)

    @pytest.mark.parametrize(("consumed", "limit"), [(7, 1 << 30), (1, 1 << 30), (4, WINDOW_FIRST - 1)])
    def test_a_wrong_one_changes_nothing(self, consumed: int, limit: int) -> None:
        outbound = sender(b"abcdef", sent=6)
        outbound.acknowledge(2, WINDOW_FIRST)
        with pytest.raises(ProtocolError):
            outbound.acknowledge(consumed, limit)
        assert (outbound.replay.start, outbound.limit, outbound.budget.held) == (2, WINDOW_FIRST, 4)


class TestDiscardOut:
    def test_gives_everything_back(self) -> None:
        outbound = sender(b"abcdef", sent=2)
        outbound.discard()
        assert outbound.budget.held == 0
        assert outbound.queued() == 0
        assert outbound.take(9) is None
        outbound.discard()
        assert outbound.budget.held == 0

    def test_the_memory_itself(self) -> None:
        outbound = sender()
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            outbound.append(memoryview(bytearray(100_000)))
            assert tracemalloc.get_traced_memory()[0] - before >= 100_000
            outbound.discard()
            assert tracemalloc.get_traced_memory()[0] - before < 10_000
        finally:
            tracemalloc.stop()

    def test_acks_that_were_under_way_are_no_fault(self) -> None:
        """The peer does not know yet that the bytes were dropped: it acks what it consumed of those that went out."""
        outbound = sender(b"abcdef", sent=4)
        outbound.discard()
        outbound.acknowledge(2, WINDOW_FIRST)
        outbound.acknowledge(4, WINDOW_FIRST)
        assert outbound.budget.held == 0

    def test_no_end_is_told_of_bytes_that_never_went_out(self) -> None:
        outbound = sender(b"abcdef", sent=4)
        outbound.end()
        outbound.discard()
        assert not outbound.eof_due()

    def test_no_end_goes_out_at_all(self) -> None:
        outbound = sender(b"abc", sent=3)
        outbound.end()
        outbound.discard()
        assert not outbound.eof_due()


class TestResumeOut:
    """The sender goes on behind what the receiver has, from its replay buffer."""

    def test_what_was_not_received_goes_out_again(self) -> None:
        outbound = sender(b"abcdefgh", sent=6)
        outbound.link_lost()
        assert outbound.resume(4, 3, WINDOW_FIRST) == 2
        assert (outbound.replay.start, outbound.cursor, outbound.budget.held) == (3, 4, 5)
        assert outbound.take(99) == b"efgh"

    def test_nothing_was_lost(self) -> None:
        outbound = sender(b"abcdefgh", sent=6)
        assert outbound.resume(6, 6, WINDOW_FIRST + 1) == 0
        assert outbound.take(99) == b"gh"
        assert outbound.limit == WINDOW_FIRST + 1

    def test_more_arrived_than_we_knew_to_have_sent(self) -> None:
        """After `restart` only: then nothing goes out for the second time."""
        outbound = sender(b"abc", sent=3)
        outbound.restart()
        assert outbound.resume(3, 0, WINDOW_FIRST) == 0
        assert outbound.take(9) is None

    def test_an_end_on_the_link_may_be_lost(self) -> None:
        outbound = finished_sender(5)
        outbound.link_lost()
        assert outbound.state is Half.OPEN
        assert outbound.resume(5, 5, WINDOW_FIRST) == 0
        assert outbound.eof_due()

    def test_an_end_that_was_received(self) -> None:
        outbound = finished_sender(5)
        outbound.link_lost()
        assert outbound.resume(6, 5, WINDOW_FIRST) == 0
        assert outbound.state is Half.ENDED
        assert not outbound.eof_due()
        outbound.acknowledge(6, WINDOW_FIRST)
        assert outbound.state is Half.DONE

    def test_an_end_that_was_delivered(self) -> None:
        outbound = finished_sender(5)
        outbound.link_lost()
        assert outbound.resume(6, 6, WINDOW_FIRST) == 0
        assert outbound.state is Half.DONE
        assert outbound.budget.held == 0
        outbound.link_lost()
        assert outbound.state is Half.DONE
        assert outbound.resume(6, 6, WINDOW_FIRST) == 0

    @pytest.mark.parametrize(
        ("received", "consumed", "limit"),
        [(1, 1, 1 << 30), (7, 2, 1 << 30), (3, 4, 1 << 30), (3, 1, 1 << 30), (4, 2, WINDOW_FIRST - 1)],
    )
    def test_what_cannot_be_changes_nothing(self, received: int, consumed: int, limit: int) -> None:
        outbound = sender(b"abcdef", sent=4)
        outbound.acknowledge(2, WINDOW_FIRST)
        with pytest.raises(StreamError, match=f"^cannot go on from {received} .* 2 to 6 are held$") as raised:
            outbound.resume(received, consumed, limit)
        assert raised.value.code == "lost"
        assert (outbound.replay.start, outbound.cursor, outbound.limit) == (2, 4, WINDOW_FIRST)
        assert outbound.budget.held == 4

    def test_an_end_that_was_not_sent_cannot_have_been_received(self) -> None:
        outbound = sender(b"abc", sent=3)
        with pytest.raises(StreamError):
            outbound.resume(4, 3, WINDOW_FIRST)
        outbound.end()
        assert outbound.resume(3, 3, WINDOW_FIRST) == 0

    def test_restart_sends_everything_again(self) -> None:
        outbound = finished_sender(3)
        outbound.link_lost()
        outbound.restart()
        assert outbound.take(9) == bytes(3)
        assert outbound.eof_due()


def receiver(data: bytes = b"", *, window: int = WINDOW_FIRST, budget: Budget | None = None) -> Inbound:
    """An inbound direction with `data` in its inbox."""
    inbound = Inbound(budget or Budget(PLENTY), window)
    if data:
        inbound.arrived(len(data))
        inbound.store(data)
    return inbound


class TestReceiving:
    def test_stored_then_taken(self) -> None:
        inbound = receiver(b"abcdef")
        assert (inbound.received, inbound.consumed, inbound.budget.held) == (6, 0, 6)
        assert inbound.waiting(4) == b"abcd"
        inbound.taken(3)
        assert (inbound.received, inbound.consumed, inbound.budget.held) == (6, 3, 3)
        assert inbound.waiting(9) == b"def"
        inbound.taken(3)
        assert inbound.waiting(9) is None
        assert (inbound.received, inbound.consumed, inbound.budget.held) == (6, 6, 0)

    def test_what_the_application_takes_at_once_is_never_held(self) -> None:
        inbound = receiver()
        inbound.arrived(5)
        inbound.passed(5)
        assert (inbound.received, inbound.consumed, inbound.budget.held) == (5, 5, 0)
        assert inbound.waiting(9) is None

    def test_a_part_at_once_the_rest_stored(self) -> None:
        inbound = receiver()
        inbound.arrived(6)
        inbound.passed(2)
        inbound.store(b"cdef")
        assert (inbound.received, inbound.consumed, inbound.budget.held) == (6, 2, 4)
        assert inbound.waiting(9) == b"cdef"
        assert (inbound.inbox.start, inbound.inbox.end) == (2, 6)  # offsets of the direction, not of the inbox
        inbound.taken(4)
        inbound.arrived(1)
        inbound.passed(1)
        inbound.arrived(1)
        inbound.store(b"h")
        assert inbound.waiting(9) == b"h"
        assert (inbound.received, inbound.consumed) == (8, 7)

    def test_up_to_the_limit(self) -> None:
        inbound = receiver(window=100)
        inbound.arrived(60)
        inbound.arrived(40)
        with refuses("data up to 101 passes the limit 100"):
            inbound.arrived(1)
        assert inbound.received == 100

    def test_one_piece_past_the_limit(self) -> None:
        inbound = receiver(window=100)
        with refuses("data up to 101 passes the limit 100"):
            inbound.arrived(101)

    def test_the_limit_is_what_was_granted_not_what_is_held(self) -> None:
        inbound = receiver(window=100)
        inbound.arrived(100)
        inbound.passed(100)
        with refuses("data up to 101 passes the limit 100"):
            inbound.arrived(1)
        assert inbound.grant(NOW, ROUND_TRIP) == (100, 200)
        inbound.arrived(100)


class TestEofIn:
    def test_takes_an_offset_of_its_own(self) -> None:
        inbound = receiver(b"abc")
        inbound.ended(3)
        assert (inbound.total, inbound.received, inbound.consumed) == (3, 4, 0)
        assert inbound.state is Half.ENDED

    @pytest.mark.parametrize("total", [0, 2, 4])
    def test_total_must_be_what_arrived(self, total: int) -> None:
        inbound = receiver(b"abc")
        with refuses(f"eof at {total}, but 3 bytes arrived"):
            inbound.ended(total)
        assert inbound.total is None
        assert inbound.state is Half.OPEN

    @pytest.mark.parametrize("total", [3, 4])
    def test_a_second_one(self, total: int) -> None:
        inbound = receiver(b"abc")
        inbound.ended(3)
        with refuses("second eof"):
            inbound.ended(total)

    def test_data_after_it(self) -> None:
        inbound = receiver(b"abc")
        inbound.ended(3)
        with refuses("data after eof at 3"):
            inbound.arrived(1)

    def test_needs_no_credit(self) -> None:
        inbound = receiver(b"abc", window=3)
        inbound.ended(3)
        assert inbound.received == 4

    def test_delivered_after_every_byte(self) -> None:
        inbound = receiver(b"abc")
        assert not inbound.at_end()
        inbound.ended(3)
        assert not inbound.at_end()
        inbound.taken(2)
        assert not inbound.at_end()
        inbound.taken(1)
        assert inbound.at_end()
        inbound.end_delivered()
        assert not inbound.at_end()
        assert inbound.consumed == 4

    def test_is_acked_at_once(self) -> None:
        inbound = receiver(b"abc")
        inbound.ended(3)
        inbound.taken(3)
        assert not inbound.ack_due()  # 3 bytes are no quarter of a window
        inbound.end_delivered()
        assert inbound.ack_due()
        assert inbound.grant(NOW, ROUND_TRIP) == (4, 4 + WINDOW_FIRST)
        assert inbound.state is Half.DONE
        assert not inbound.ack_due()

    def test_an_ack_short_of_it_does_not_end_the_direction(self) -> None:
        inbound = receiver(b"abc")
        inbound.grant(NOW, ROUND_TRIP)
        assert inbound.state is Half.OPEN
        inbound.ended(3)
        inbound.taken(3)
        assert inbound.grant(NOW, ROUND_TRIP)[0] == 3
        assert inbound.state is Half.ENDED
        inbound.end_delivered()
        assert inbound.grant(NOW, ROUND_TRIP)[0] == 4
        assert inbound.state is Half.DONE
        assert inbound.grant(NOW, ROUND_TRIP)[0] == 4  # once more changes nothing
        assert inbound.state is Half.DONE


class TestAcksOut:
    def test_at_a_quarter_of_the_window(self) -> None:
        inbound = receiver(bytes(100), window=100)
        inbound.taken(24)
        assert not inbound.ack_due()
        inbound.taken(1)
        assert inbound.ack_due()
        assert inbound.grant(NOW, ROUND_TRIP) == (25, 125)
        assert not inbound.ack_due()

    def test_received_alone_is_no_reason(self) -> None:
        inbound = receiver(bytes(100), window=100)
        assert not inbound.ack_due()


class TestRestate:
    """`resume` and `resumed` carry what an ack would, and are as good as one once they were received."""

    def test_says_where_it_is(self) -> None:
        inbound = receiver(b"abcdef", window=100)
        inbound.taken(2)
        assert inbound.restate() == (6, 2, 102)
        assert not inbound.ack_due()
        inbound.arrived(96)
        with refuses("passes the limit 102"):
            inbound.arrived(1)

    def test_the_limit_never_falls(self) -> None:
        inbound = receiver(bytes(100), window=100)
        inbound.taken(50)
        assert inbound.grant(NOW, ROUND_TRIP) == (50, 150)
        inbound.window.size = 64
        assert inbound.restate() == (100, 50, 150)

    def test_a_delivered_end(self) -> None:
        inbound = receiver(b"abc")
        inbound.ended(3)
        inbound.taken(3)
        inbound.end_delivered()
        assert inbound.restate() == (4, 4, 4 + WINDOW_FIRST)
        assert inbound.state is Half.ENDED
        inbound.confirmed()
        assert inbound.state is Half.DONE
        inbound.confirmed()
        assert inbound.state is Half.DONE

    def test_an_end_delivered_only_after_it_was_restated(self) -> None:
        """The peer was told that the end was not delivered yet: an ack has still to say so."""
        inbound = receiver(b"abc")
        inbound.ended(3)
        inbound.taken(3)
        inbound.restate()
        inbound.end_delivered()
        inbound.confirmed()
        assert inbound.state is Half.ENDED
        assert inbound.ack_due()
        inbound.grant(NOW, ROUND_TRIP)
        assert inbound.state is Half.DONE

    def test_no_end_yet(self) -> None:
        inbound = receiver(b"abc")
        inbound.restate()
        inbound.confirmed()
        assert inbound.state is Half.OPEN

    def test_an_ack_of_the_end_may_be_lost(self) -> None:
        inbound = receiver()
        inbound.ended(0)
        inbound.end_delivered()
        inbound.grant(NOW, ROUND_TRIP)
        assert inbound.state is Half.DONE
        inbound.link_lost()
        assert inbound.state is Half.ENDED
        assert inbound.restate()[:2] == (1, 1)
        inbound.confirmed()
        assert inbound.state is Half.DONE


class TestDiscardIn:
    def test_gives_everything_back(self) -> None:
        inbound = receiver(b"abc")
        inbound.discard()
        assert inbound.budget.held == 0
        assert inbound.waiting(9) is None
        inbound.discard()
        assert inbound.budget.held == 0


class TestBothEnds:
    """One direction, from its sender to its receiver, whatever is written, taken and acked when."""

    steps = st.lists(
        st.tuples(st.sampled_from(["write", "send", "take", "sweep", "end"]), st.integers(1, 200)), max_size=120
    )

    @given(steps, st.sampled_from([1, 3, 64, 1000]))
    @settings(derandomize=True, deadline=None)
    def test_every_byte_once_in_order_within_the_limit(self, steps: list[tuple[str, int]], window: int) -> None:
        budget = Budget(PLENTY)
        outbound, inbound = Outbound(budget, window), Inbound(budget, window)
        written, read = bytearray(), bytearray()
        now = NOW

        def ack(*, wanted: bool = False) -> None:
            if wanted or inbound.ack_due():
                outbound.acknowledge(*inbound.grant(now, ROUND_TRIP))

        def send(size: int) -> None:
            view = outbound.take(size)
            if view is not None:
                inbound.arrived(len(view))
                inbound.store(bytes(view))
            elif outbound.eof_due():
                inbound.ended(outbound.eof_sent())

        def take(size: int) -> None:
            view = inbound.waiting(size)
            if view is not None:
                read.extend(view)
                size = len(view)
                view.release()
                inbound.taken(size)
            elif inbound.at_end():
                inbound.end_delivered()
            ack()

        def write(size: int) -> None:
            data = bytes((len(written) + n) % 251 for n in range(min(size, outbound.room())))
            if data:
                outbound.append(data)
                written.extend(data)

        for action, size in [*steps, ("end", 1)]:
            now += 0.01
            if action == "write":
                write(size)
            elif action == "send":
                send(size)
            elif action == "take":
                take(size)
            elif action == "sweep":
                ack(wanted=True)
            elif outbound.total is None:
                outbound.end()
            assert written.startswith(read)
            consumed, received, end = inbound.consumed, inbound.received, outbound.replay.end
            assert outbound.replay.start <= consumed <= received <= end + (outbound.total is not None)
            assert end <= outbound.limit <= inbound.window.limit
            assert len(inbound.inbox) <= inbound.window.limit - consumed + (outbound.total is not None)
            assert budget.held == len(outbound.replay) + len(inbound.inbox)
        while outbound.state is not Half.DONE or inbound.state is not Half.DONE:
            send(50)
            take(50)
        assert read == written
        assert budget.held == 0
