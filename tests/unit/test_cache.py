from __future__ import annotations

import pytest

from llorch.core.cache import BlockAllocator
from llorch.core.prefix import ROOT, PrefixIndex
from llorch.errors import LlorchError


def test_block_0_is_never_allotted() -> None:
    allocator = BlockAllocator(blocks=5, block_size=4)
    assert allocator.total == 4
    assert allocator.allocate(4) == [1, 2, 3, 4]
    assert allocator.allocate(1) is None


def test_a_sequence_grows_into_the_block_behind_its_last_while_others_grow_too() -> None:
    allocator = BlockAllocator(blocks=33, block_size=4)
    sequences = [allocator.allocate(2) for _ in range(4)]
    for _ in range(5):
        for blocks in sequences:
            blocks += allocator.allocate(1, after=blocks[-1])
    for blocks in sequences:
        assert blocks == list(range(blocks[0], blocks[0] + 7))


def test_where_the_next_block_is_taken_a_sequence_goes_on_in_the_widest_gap() -> None:
    allocator = BlockAllocator(blocks=9, block_size=4)
    a, b = allocator.allocate(1), allocator.allocate(3)
    assert (a, b) == ([1], [5, 6, 7])
    assert allocator.allocate(4, after=7) == [8, 2, 3, 4]


def test_blocks_that_do_not_lie_together_are_given_where_no_gap_is_wide_enough() -> None:
    allocator = BlockAllocator(blocks=9, block_size=4)
    blocks = [allocator.allocate(1)[0] for _ in range(8)]
    allocator.release([block for block in blocks if block % 2])
    assert sorted(allocator.allocate(3)) == [1, 3, 5]


def test_blocks_for_rounds_up() -> None:
    allocator = BlockAllocator(blocks=9, block_size=32)
    assert [allocator.blocks_for(n) for n in (1, 32, 33)] == [1, 1, 2]


def test_a_block_released_twice_is_an_error() -> None:
    allocator = BlockAllocator(blocks=3, block_size=4)
    blocks = allocator.allocate(1)
    allocator.release(blocks)
    with pytest.raises(LlorchError, match="released twice"):
        allocator.release(blocks)


def known(allocator: BlockAllocator, index: PrefixIndex, count: int, first: int) -> list[int]:
    """Blocks that hold numbers from `first` on."""
    blocks, digest = allocator.allocate(count), ROOT
    for i, block in enumerate(blocks):
        digest = index.add(block, digest, range(first + 4 * i, first + 4 * i + 4))
    return blocks


def test_what_was_held_longest_ago_is_evicted_first_and_of_a_sequence_its_end() -> None:
    index = PrefixIndex(4)
    allocator = BlockAllocator(9, 4, index)
    old, new, held = (known(allocator, index, n, first) for n, first in ((3, 0), (2, 100), (1, 200)))
    allocator.release(old)
    allocator.release(new)
    assert (allocator.free, allocator.kept) == (7, 5)
    allocator.allocate(2)  # the two that are empty
    assert allocator.evictions == 0
    assert allocator.allocate(1) == [old[2]]
    assert allocator.allocate(1) == [old[1]]
    allocator.hold(old[0])
    allocator.release(old[:1])  # used again: now it is the new ones' turn
    assert allocator.allocate(2) == sorted(new)
    assert (allocator.kept, allocator.evictions) == (1, 4)
    assert allocator.allocate(2) is None
    assert held[0] in index


def test_eviction_of_one_block_of_many_leaves_a_stretch_behind_it() -> None:
    index = PrefixIndex(4)
    allocator = BlockAllocator(65, 4, index)
    allocator.release(known(allocator, index, 64, 0))
    blocks = allocator.allocate(1)
    for _ in range(15):
        blocks += allocator.allocate(1, after=blocks[-1])
    assert blocks == list(range(49, 65))
    assert allocator.kept == 48
