"""The policy of the paged KV cache: which blocks a sequence has. The device owns their memory."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from llorch.core.prefix import PrefixIndex
from llorch.errors import LlorchError

EVICTED_AT_ONCE = 16  # so that what is evicted for one block leaves a stretch for those that come next


class BlockAllocator:
    """Hands out cache blocks 1 .. blocks - 1; block 0 is where padding is written.

    A block is held by one sequence or several, or it is free: empty, or kept for the tokens that `index` knows it
    holds. Kept blocks are evicted, those first that were held longest ago, where empty ones do not suffice.

    Consecutive blocks are preferred: a device whose attention reads one stretch of memory then need not gather. A
    sequence grows into the block behind its last where that is empty, and a new one begins in the middle of the widest
    gap, so that it and the one before it both have room.
    """

    def __init__(self, blocks: int, block_size: int, index: PrefixIndex | None = None) -> None:
        self.block_size, self.total = block_size, blocks - 1
        self.used = 0  # blocks that are held
        self.evictions = 0
        self._index = index
        self._holders = [0] * blocks
        self._empty = np.ones(blocks, np.bool_)
        self._empty[0] = False
        self._kept: OrderedDict[int, None] = OrderedDict()  # held longest ago first

    @property
    def free(self) -> int:
        return self.total - self.used

    @property
    def kept(self) -> int:
        """Free blocks whose contents another sequence may use."""
        return len(self._kept)

    def holders(self, block: int) -> int:
        return self._holders[block]

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """`count` blocks with one holder each, or None where fewer are free; behind block `after` if possible."""
        if count > self.free:
            return None
        if (lacking := count - (self.free - self.kept)) > 0:
            self._evict(max(lacking, min(EVICTED_AT_ONCE, self.kept // 4)))
        taken = [] if after is None else self._following(after, count)
        while len(taken) < count:
            gap = self._gap(count - len(taken))
            self._empty[gap.start : gap.stop] = False
            taken += gap
        for block in taken:
            self._holders[block] = 1
        self.used += count
        return taken

    def hold(self, block: int) -> None:
        """Adds a holder to a block that is held or kept."""
        if not self._holders[block]:
            del self._kept[block]
            self.used += 1
        self._holders[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Takes a holder from each. The last are evicted first: sequences share beginnings, not ends."""
        for block in reversed(blocks):
            if not self._holders[block]:
                raise LlorchError(f"cache block {block} was released twice or never allotted: this is a bug in llorch")
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            self.used -= 1
            if self._index is not None and block in self._index:
                self._kept[block] = None
            else:
                self._empty[block] = True

    def clear(self) -> None:
        """Forgets what all blocks hold; those that are held stay so."""
        if self._index is not None:
            self._index.clear()
        for block in self._kept:
            self._empty[block] = True
        self._kept.clear()

    def _evict(self, count: int) -> None:
        assert self._index is not None  # nothing is kept without one
        for _ in range(count):
            block, _ = self._kept.popitem(last=False)
            self._index.forget(block)
            self._empty[block] = True
        self.evictions += count

    def _following(self, after: int, count: int) -> list[int]:
        last = after + 1
        while last <= min(after + count, self.total) and self._empty[last]:
            self._empty[last] = False
            last += 1
        return list(range(after + 1, last))

    def _gap(self, count: int) -> range:
        """At most `count` consecutive empty blocks of the widest gap."""
        edges = np.flatnonzero(np.diff(self._empty, prepend=False, append=False))  # begin, end, begin, end, ...
        widest = int(np.argmax(edges[1::2] - edges[::2]))
        begin, end = int(edges[2 * widest]), int(edges[2 * widest + 1])
        if self._holders[begin - 1]:
            begin += max(0, min((end - begin) // 2, end - begin - count))
        return range(begin, min(begin + count, end))
