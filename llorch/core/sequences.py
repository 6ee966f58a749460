"""The cache blocks of one sequence, from its first token to its end, and what it shares with others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from llorch.core.cache import BlockAllocator
from llorch.core.prefix import COPY_SHARE, ROOT, Match, PrefixIndex


@dataclass(eq=False)
class BlockTable:
    """A sequence's blocks, in order. The first `shared` may be others' too: they are full, and never written again."""

    blocks: list[int] = field(default_factory=list)
    shared: int = 0
    digest: bytes = ROOT  # of the tokens in the shared blocks


class SequenceCache:
    """Gives sequences their blocks. `copy(src, dst)` is the device's; without an index nothing is reused."""

    def __init__(self, allocator: BlockAllocator, index: PrefixIndex | None, copy: Callable[[int, int], None]) -> None:
        self.allocator = allocator
        self.hit_tokens = 0  # tokens that did not have to be computed again
        self._index, self._copy = index, copy

    def fits(self, tokens: Sequence[int], spare: int) -> bool:
        """Whether blocks for these tokens and `spare` more blocks are free, once known ones are shared."""
        allocator = self.allocator
        need = allocator.blocks_for(len(tokens) + 1) + spare
        if need <= allocator.free or self._index is None:
            return need <= allocator.free
        found = self._index.find(tokens).blocks
        return need - sum(allocator.holders(block) > 0 for block in found) <= allocator.free

    def awaits(self, tokens: Sequence[int], others: Iterable[tuple[Sequence[int], int]]) -> bool:
        """Whether a sequence with these tokens should not begin yet: one of the others, of which the first so many
        tokens are in the cache, is computing what it would compute as well, and what is worth to be shared."""
        others = list(others)
        if self._index is None or not others:
            return False
        match, size = self._index.find(tokens), self.allocator.block_size
        end = len(match.blocks) * size + match.common + size // COPY_SHARE + 1
        return end < len(tokens) and any(
            computed < end <= len(other) and other[:end] == tokens[:end] for other, computed in others
        )

    def begin(self, tokens: Sequence[int]) -> tuple[BlockTable, int]:
        """A table for a sequence with these tokens, and how many of them are in the cache already: not the last."""
        if self._index is None:
            return BlockTable(), 0
        match = self._index.find(tokens)
        for block in match.blocks:
            self.allocator.hold(block)
        table = BlockTable(list(match.blocks), len(match.blocks), match.digest)
        cached = len(match.blocks) * self.allocator.block_size + self._begin_partial(table, match)
        self.hit_tokens += cached
        return table, cached

    def _begin_partial(self, table: BlockTable, match: Match) -> int:
        """Goes on in a copy of a block that begins alike; in the block itself where the sequence only adds to it."""
        block, allocator, index = match.partial, self.allocator, self._index
        if block is None or index is None:
            return 0
        if not allocator.holders(block) and len(index.known(block).tokens) == match.common:
            allocator.hold(block)
            index.forget(block)
            table.blocks.append(block)
            return match.common
        allocator.hold(block)  # it must not be evicted to make room for its own copy
        found = allocator.allocate(1, after=table.blocks[-1] if table.blocks else None)
        if found is not None:
            self._copy(block, found[0])
            table.blocks += found
        allocator.release([block])
        return match.common if found is not None else 0

    def extend(self, table: BlockTable, tokens: int) -> bool:
        """Makes room for this many tokens in all. False where blocks are lacking: the table stays as it is."""
        allocator = self.allocator
        lacking = allocator.blocks_for(tokens) - len(table.blocks)
        if lacking <= 0:
            return True
        found = allocator.allocate(lacking, after=table.blocks[-1] if table.blocks else None)
        if found is not None:
            table.blocks += found
        return found is not None

    def record(self, table: BlockTable, tokens: Sequence[int], computed: int, *, tail: bool = False) -> None:
        """The first `computed` tokens are in the cache: blocks that are full now can be shared.

        With `tail` also what is in the last block, which others copy: a prompt's end, for all who ask the same.
        """
        size = self.allocator.block_size
        if self._index is None:
            return
        while (table.shared + 1) * size <= computed:
            at = table.shared * size
            table.digest = self._index.add(table.blocks[table.shared], table.digest, tokens[at : at + size])
            table.shared += 1
        at = table.shared * size
        if tail and computed > at:
            self._index.add(table.blocks[table.shared], table.digest, tokens[at:computed])

    def release(self, table: BlockTable, tokens: Sequence[int], computed: int) -> None:
        """The sequence ends or is to be computed again. What its blocks hold stays known until they are evicted."""
        self.record(table, tokens, computed, tail=True)
        self.allocator.release(table.blocks)

    def discard(self, table: BlockTable) -> None:
        """The sequence ends, and what it computed is no number: nothing of it is left.

        Kernels may multiply what lies behind a context's end by zero, so a block must not be handed on with a NaN in
        it; block 0, where padding is written, holds finite numbers.
        """
        for block in table.blocks:
            if self._index is not None:
                self._index.forget(block)
            if self.allocator.holders(block) == 1:
                self._copy(0, block)
        self.allocator.release(table.blocks)
