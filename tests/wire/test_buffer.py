"""wire/buffer.py against a plain bytearray, and what it costs in memory."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from wstunnel.limits import BLOCK_BYTES, SCRATCH_BYTES
from wstunnel.wire import buffer as module
from wstunnel.wire.buffer import SPARE_BLOCKS, SPARE_FROM_BYTES, OffsetBuffer

NOISE = random.Random(1).randbytes(1 << 20)


def pattern(offset: int, size: int) -> bytes:
    """What stands at `offset`: no two places look alike."""
    offset %= len(NOISE) // 2
    return NOISE[offset : offset + size]


def read(buffer: OffsetBuffer, offset: int, limit: int) -> bytes:
    """All bytes from `offset` on, by views of at most `limit`."""
    whole = bytearray()
    while offset + len(whole) < buffer.end:
        view = buffer.view(offset + len(whole), limit)
        assert 1 <= len(view) <= limit
        whole += view
        view.release()
    return bytes(whole)


class BufferMachine(RuleBasedStateMachine):
    """`model` is every byte ever appended; the buffer has those from `start` on."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = OffsetBuffer()
        self.model = bytearray()
        self.start = 0

    @initialize(size=st.sampled_from([0, 1, BLOCK_BYTES - 1, BLOCK_BYTES]))
    def begin(self, size: int) -> None:
        if size:
            self.append(size, bytes)

    sizes = st.one_of(
        st.integers(1, 5),
        st.integers(1, 3 * BLOCK_BYTES),
        st.sampled_from([BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1]),
    )

    @rule(size=sizes, kind=st.sampled_from([bytes, bytearray, memoryview]))
    def append(self, size: int, kind: type) -> None:
        data = bytearray(pattern(len(self.model), size))
        self.model += data
        self.buffer.append(memoryview(data) if kind is memoryview else kind(data))
        data[:] = bytes(len(data))  # it was copied: the scratch buffer is used again

    @rule(size=st.sampled_from([SPARE_FROM_BYTES - 1, SPARE_FROM_BYTES, SCRATCH_BYTES, SCRATCH_BYTES + 1]))
    def append_large(self, size: int) -> None:
        self.append(size, memoryview)

    @rule(size=st.sampled_from([SPARE_FROM_BYTES, SCRATCH_BYTES - 1, SCRATCH_BYTES]))
    def adopt(self, size: int) -> None:
        data = pattern(len(self.model), size)
        scratch = memoryview(bytearray(SCRATCH_BYTES))
        scratch[:size] = data
        self.model += data
        other = self.buffer.adopt(scratch[:size])
        assert len(other) == SCRATCH_BYTES
        other[:] = bytes(SCRATCH_BYTES)  # the next read goes there

    @rule(sizes=st.lists(st.integers(1, 40), min_size=10, max_size=60))
    def append_many(self, sizes: list[int]) -> None:
        for size in sizes:
            self.append(size, bytes)

    @precondition(lambda self: self.start < len(self.model))
    @rule(data=st.data(), limit=st.sampled_from([1, 2, 100, BLOCK_BYTES, BLOCK_BYTES + 1, 1 << 20]))
    def view(self, data: st.DataObject, limit: int) -> None:
        offset = data.draw(st.integers(self.start, len(self.model) - 1), label="offset")
        view = self.buffer.view(offset, limit)
        assert 1 <= len(view) <= limit
        assert view == self.model[offset : offset + len(view)]
        view.release()

    @precondition(lambda self: self.start < len(self.model))
    @rule(limit=st.sampled_from([1000, BLOCK_BYTES, 1 << 20]))
    def read_on(self, limit: int) -> None:
        assert read(self.buffer, self.start, limit) == self.model[self.start :]

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.start = data.draw(
            st.one_of(st.integers(self.start, len(self.model)), st.sampled_from([self.start, len(self.model)])),
            label="offset",
        )
        self.buffer.release(self.start)

    @invariant()
    def offsets(self) -> None:
        assert self.buffer.start == self.start
        assert self.buffer.end == len(self.model)
        assert len(self.buffer) == len(self.model) - self.start


BufferMachine.TestCase.settings = settings(derandomize=True, deadline=None, max_examples=100, stateful_step_count=25)
TestAgainstABytearray = BufferMachine.TestCase


class TestBlocks:
    def test_empty(self) -> None:
        buffer = OffsetBuffer()
        assert (buffer.start, buffer.end, len(buffer)) == (0, 0, 0)
        buffer.release(0)
        assert (buffer.start, buffer.end, len(buffer)) == (0, 0, 0)

    def test_small_pieces_are_joined(self) -> None:
        buffer = OffsetBuffer()
        for piece in (b"ab", b"c", b"def"):
            buffer.append(piece)
        assert buffer.view(0, 100) == b"abcdef"
        assert buffer.view(1, 3) == b"bcd"

    def test_one_view_ends_with_its_block(self) -> None:
        buffer = OffsetBuffer()
        buffer.append(b"a" * BLOCK_BYTES)
        buffer.append(b"b")
        assert buffer.view(0, 1 << 20) == b"a" * BLOCK_BYTES
        assert buffer.view(BLOCK_BYTES - 1, 1 << 20) == b"a"
        assert buffer.view(BLOCK_BYTES, 1 << 20) == b"b"

    def test_reading_again_from_before(self) -> None:
        """A sender goes back to what the peer received."""
        buffer = OffsetBuffer()
        whole = pattern(0, 5 * BLOCK_BYTES)
        for start in range(0, len(whole), BLOCK_BYTES):
            buffer.append(whole[start : start + BLOCK_BYTES])
        assert read(buffer, 0, 1000) == whole
        assert read(buffer, BLOCK_BYTES + 5, 1000) == whole[BLOCK_BYTES + 5 :]
        buffer.release(3 * BLOCK_BYTES + 7)  # below the block read last
        assert read(buffer, 3 * BLOCK_BYTES + 7, 1000) == whole[3 * BLOCK_BYTES + 7 :]
        assert read(buffer, 3 * BLOCK_BYTES + 7, 1000) == whole[3 * BLOCK_BYTES + 7 :]

    def test_released_past_the_block_read_last(self) -> None:
        buffer = OffsetBuffer()
        whole = pattern(0, 5 * BLOCK_BYTES)
        for start in range(0, len(whole), BLOCK_BYTES):
            buffer.append(whole[start : start + BLOCK_BYTES])
        buffer.view(0, 1)
        buffer.release(2 * BLOCK_BYTES)
        assert buffer.view(2 * BLOCK_BYTES, 10) == whole[2 * BLOCK_BYTES :][:10]

    def test_reading_goes_on_after_blocks_before_it_went(self) -> None:
        """A sender in steady state: it reads at the end while acks release the beginning."""
        buffer = OffsetBuffer()
        whole = pattern(0, 8 * BLOCK_BYTES)
        for start in range(0, 5 * BLOCK_BYTES, BLOCK_BYTES):
            buffer.append(whole[start : start + BLOCK_BYTES])
        assert buffer.view(3 * BLOCK_BYTES, 10) == whole[3 * BLOCK_BYTES :][:10]
        buffer.release(2 * BLOCK_BYTES)
        assert buffer.view(3 * BLOCK_BYTES + 10, 10) == whole[3 * BLOCK_BYTES + 10 :][:10]
        buffer.append(whole[5 * BLOCK_BYTES :])
        assert read(buffer, 3 * BLOCK_BYTES + 20, 1000) == whole[3 * BLOCK_BYTES + 20 :]

    def test_offsets_go_on_after_all_was_released(self) -> None:
        buffer = OffsetBuffer()
        buffer.append(b"abc")
        buffer.release(3)
        assert len(buffer) == 0
        buffer.append(b"de")
        assert (buffer.start, buffer.end) == (3, 5)
        assert buffer.view(3, 9) == b"de"

    def test_appending_does_not_change_what_was_handed_out(self) -> None:
        """Whoever keeps a view past the next append is told so by the interpreter, not by wrong bytes."""
        buffer = OffsetBuffer()
        buffer.append(b"abc")
        view = buffer.view(0, 3)
        with pytest.raises(BufferError):
            buffer.append(b"d")
        assert view == b"abc"


class TestMemory:
    """2-byte frames otherwise cost 20 to 180 heap bytes a byte."""

    @pytest.mark.parametrize("size", [2, 100, BLOCK_BYTES // 2 + 1, BLOCK_BYTES - 1, BLOCK_BYTES, 100_000])
    def test_follows_the_bytes_held_not_the_pieces(self, size: int) -> None:
        total = max(8 * BLOCK_BYTES, 4 * size)
        piece = memoryview(bytearray(size))
        buffer = OffsetBuffer()
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(total // size):
                buffer.append(piece)
            held = tracemalloc.get_traced_memory()[0] - before
            assert len(buffer) <= held <= 1.25 * len(buffer)
            buffer.release(buffer.end - 1)
            assert tracemalloc.get_traced_memory()[0] - before <= 3 * max(BLOCK_BYTES, size)
            buffer.release(buffer.end)
            assert tracemalloc.get_traced_memory()[0] - before <= 2048
        finally:
            tracemalloc.stop()

    def test_a_block_goes_with_its_last_byte(self) -> None:
        buffer = OffsetBuffer()
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(3):
                buffer.append(memoryview(bytearray(100_000)))
            buffer.release(200_000)
            assert tracemalloc.get_traced_memory()[0] - before < 150_000
        finally:
            tracemalloc.stop()


@pytest.fixture
def spare(monkeypatch: pytest.MonkeyPatch) -> list[bytearray]:
    """The spare blocks, none at first."""
    blocks: list[bytearray] = []
    monkeypatch.setattr(module, "_spare", blocks)
    return blocks


class TestSpareBlocks:
    """A fresh block of 256 KiB costs more than the copy into it."""

    def test_what_was_released_is_used_again(self, spare: list[bytearray]) -> None:
        first, second = OffsetBuffer(), OffsetBuffer()
        first.append(b"a" * SCRATCH_BYTES)
        block = first.view(0, 1).obj
        first.release(SCRATCH_BYTES - 1)
        assert spare == []
        first.release(SCRATCH_BYTES)
        assert [id(one) for one in spare] == [id(block)]
        second.append(b"b" * SPARE_FROM_BYTES)
        assert spare == []
        assert second.view(0, 1).obj is block
        assert read(second, 0, 1 << 20) == b"b" * SPARE_FROM_BYTES

    @pytest.mark.parametrize("size", [1, BLOCK_BYTES, SPARE_FROM_BYTES - 1, SCRATCH_BYTES + 1])
    def test_pieces_of_other_sizes_have_their_own(self, spare: list[bytearray], size: int) -> None:
        buffer = OffsetBuffer()
        buffer.append(bytes(size))
        buffer.release(size)
        assert spare == []

    @pytest.mark.parametrize("way", ["at once", "one by one", "restart"])
    def test_so_many_and_no_more(self, spare: list[bytearray], way: str) -> None:
        buffer = OffsetBuffer()
        count = SPARE_BLOCKS + 3
        for _ in range(count):
            buffer.append(bytes(SPARE_FROM_BYTES))
        if way == "restart":
            buffer.restart(7)
        else:
            for number in range(count) if way == "one by one" else [count - 1]:
                buffer.release((number + 1) * SPARE_FROM_BYTES)
        assert len(spare) == SPARE_BLOCKS
        assert len({id(block) for block in spare}) == SPARE_BLOCKS
        assert {len(block) for block in spare} == {SCRATCH_BYTES}

    def test_adopted_is_not_copied(self, spare: list[bytearray]) -> None:
        buffer = OffsetBuffer()
        buffer.append(b"abc")
        scratch = memoryview(bytearray(b"x" * SCRATCH_BYTES))
        other = buffer.adopt(scratch[:SPARE_FROM_BYTES])
        assert (buffer.start, buffer.end) == (0, 3 + SPARE_FROM_BYTES)
        assert buffer.view(3, 1 << 20).obj is scratch.obj
        assert other.obj is not scratch.obj
        assert len(other) == SCRATCH_BYTES
        buffer.release(buffer.end)
        assert [id(block) for block in spare] == [id(scratch.obj)]

    def test_an_adopted_block_is_exchanged_for_a_spare_one(self, spare: list[bytearray]) -> None:
        spare.append(bytearray(SCRATCH_BYTES))
        block = spare[0]
        assert OffsetBuffer().adopt(memoryview(bytearray(SCRATCH_BYTES))).obj is block
        assert spare == []

    def test_small_pieces_after_it_do_not_join_it(self, spare: list[bytearray]) -> None:
        buffer = OffsetBuffer()
        buffer.append(b"a" * SPARE_FROM_BYTES)
        buffer.append(b"b")
        buffer.append(b"c")
        assert read(buffer, SPARE_FROM_BYTES - 1, 100) == b"abc"
