"""Bytes of one direction between two offsets, in blocks: the replay buffer of a sender, the inbox of a receiver."""

from __future__ import annotations

from wstunnel.limits import BLOCK_BYTES, SCRATCH_BYTES

SPARE_FROM_BYTES = SCRATCH_BYTES // 2
"""Pieces of at least this go into a spare block of SCRATCH_BYTES: half of it is wasted at most."""
SPARE_BLOCKS = 16
"""Blocks kept for use again. A fresh one of this size costs the kernel 128 page faults, more than the copy into it."""
_spare: list[bytearray] = []


def _spare_block() -> bytearray:
    return _spare.pop() if _spare else bytearray(SCRATCH_BYTES)


class OffsetBuffer:
    """The bytes from offset `start` to offset `end` of one direction of a stream.

    Appending copies. Small pieces are joined into blocks of at least `BLOCK_BYTES`, so that memory follows the number
    of bytes and not of pieces. Reading gives views; a view must be let go before the next `append`.
    """

    __slots__ = ("_blocks", "_first", "_near", "_near_start", "end", "start")

    def __init__(self) -> None:
        self.start = 0
        self.end = 0
        self._blocks: list[bytes | bytearray | memoryview] = []
        self._first = 0  # offset of the first byte of the first block, <= start
        self._near = 0  # the block that was read last, and its first offset: reading goes on from there
        self._near_start = 0

    def __len__(self) -> int:
        return self.end - self.start

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Copy `data`, at least one byte, behind `end`."""
        size = len(data)
        blocks = self._blocks
        if size < BLOCK_BYTES:
            last = blocks[-1] if blocks else None
            if isinstance(last, bytearray) and len(last) < BLOCK_BYTES:
                last += data
                self.end += size
            else:
                self._add(bytearray(data))
        elif SPARE_FROM_BYTES <= size <= SCRATCH_BYTES:
            block = memoryview(_spare_block())[:size]
            block[:] = data
            self._add(block)
        else:
            self._add(bytes(data))

    def adopt(self, data: memoryview) -> memoryview:
        """Keep `data` itself behind `end`, without copying it.

        Args:
            data: at least SPARE_FROM_BYTES, the beginning of a bytearray of SCRATCH_BYTES, which is ours from now on.

        Returns:
            another such buffer, whole, for the caller to use instead.
        """
        self._add(data)
        return memoryview(_spare_block())

    def _add(self, block: bytes | bytearray | memoryview) -> None:
        if not self._blocks:
            self._first = self._near_start = self.start
            self._near = 0
        self._blocks.append(block)
        self.end += len(block)

    def view(self, offset: int, limit: int) -> memoryview:
        """Contiguous bytes at `offset`: at least one, at most `limit`.

        Args:
            offset: `start` <= offset < `end`.
            limit: >= 1.
        """
        blocks = self._blocks
        if offset >= self._near_start:
            index, begin = self._near, self._near_start
        else:
            index, begin = 0, self._first
        while offset >= begin + len(blocks[index]):
            begin += len(blocks[index])
            index += 1
        self._near, self._near_start = index, begin
        skip = offset - begin
        return memoryview(blocks[index])[skip : skip + limit]

    def release(self, offset: int) -> None:
        """Forget everything below `offset`, `start` <= offset <= `end`. Blocks are freed whole."""
        self.start = offset
        blocks = self._blocks
        if offset == self.end:
            self._forget(len(blocks))
            return
        gone = 0
        first = self._first
        while first + len(blocks[gone]) <= offset:
            first += len(blocks[gone])
            gone += 1
        if gone:
            self._forget(gone)
            self._first = first
            if self._near >= gone:
                self._near -= gone
            else:
                self._near, self._near_start = 0, first

    def restart(self, offset: int) -> None:
        """Forget everything: the direction goes on at `offset`."""
        if self._blocks:
            self._forget(len(self._blocks))
        self.start = self.end = offset

    def _forget(self, count: int) -> None:
        """Drop the first blocks. Large ones are kept to be used again."""
        blocks = self._blocks
        for block in blocks[:count]:
            if isinstance(block, memoryview) and len(_spare) < SPARE_BLOCKS:
                _spare.append(block.obj)  # type: ignore[arg-type]  # made of a bytearray above
        del blocks[:count]
