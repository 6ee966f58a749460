"""The policy of the paged KV cache: which blocks a sequence has. The device owns their memory."""

from __future__ import annotations

from bisect import insort

from llorch.errors import LlorchError


class BlockAllocator:
    """Hands out cache blocks 1 .. blocks - 1; block 0 is where padding is written.

    Consecutive blocks are preferred: a device whose attention reads one stretch of memory then need not gather.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.total = blocks - 1
        self._free = list(range(1, blocks))  # ascending
        self._used: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return len(self._used)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks, or None where fewer are free."""
        if count > len(self._free):
            return None
        start = self._run(count)
        taken = self._free[start : start + count]
        del self._free[start : start + count]
        self._used.update(taken)
        return taken

    def _run(self, count: int) -> int:
        """Where the first stretch of `count` consecutive free blocks begins in the free list, else 0."""
        free = self._free
        for start in range(len(free) - count + 1):
            if free[start + count - 1] - free[start] == count - 1:
                return start
        return 0

    def release(self, blocks: list[int]) -> None:
        for block in blocks:
            if block not in self._used:
                raise LlorchError(f"cache block {block} was released twice or never allotted: this is a bug in llorch")
            self._used.remove(block)
            insort(self._free, block)
