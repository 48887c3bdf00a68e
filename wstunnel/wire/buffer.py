"""Bytes of one direction between two offsets, in blocks: the replay buffer of a sender, the inbox of a receiver."""

from __future__ import annotations

from wstunnel.limits import BLOCK_BYTES


class OffsetBuffer:
    """The bytes from offset `start` to offset `end` of one direction of a stream.

    Appending copies. Small pieces are joined into blocks of at least `BLOCK_BYTES`, so that memory follows the number
    of bytes and not of pieces. Reading gives views; a view must be let go before the next `append`.
    """

    __slots__ = ("_blocks", "_first", "_near", "_near_start", "end", "start")

    def __init__(self) -> None:
        self.start = 0
        self.end = 0
        self._blocks: list[bytes | bytearray] = []
        self._first = 0  # offset of the first byte of the first block, <= start
        self._near = 0  # the block that was read last, and its first offset: reading goes on from there
        self._near_start = 0

    def __len__(self) -> int:
        return self.end - self.start

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Copy `data`, at least one byte, behind `end`."""
        size = len(data)
        self.end += size
        blocks = self._blocks
        if blocks:
            last = blocks[-1]
            if size < BLOCK_BYTES and isinstance(last, bytearray) and len(last) < BLOCK_BYTES:
                last += data
                return
        else:
            self._first = self._near_start = self.start
            self._near = 0
        blocks.append(bytes(data) if size >= BLOCK_BYTES else bytearray(data))

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
            blocks.clear()
            return
        gone = 0
        first = self._first
        while first + len(blocks[gone]) <= offset:
            first += len(blocks[gone])
            gone += 1
        if gone:
            del blocks[:gone]
            self._first = first
            if self._near >= gone:
                self._near -= gone
            else:
                self._near, self._near_start = 0, first

    def restart(self, offset: int) -> None:
        """Forget everything: the direction goes on at `offset`."""
        self._blocks.clear()
        self.start = self.end = offset
