from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.core.cache import BlockAllocator
from llorch.errors import LlorchError


def test_block_0_is_never_allotted() -> None:
    allocator = BlockAllocator(blocks=5, block_size=4)
    assert allocator.total == 4
    assert allocator.allocate(4) == [1, 2, 3, 4]
    assert allocator.allocate(1) is None


def test_consecutive_blocks_are_preferred() -> None:
    allocator = BlockAllocator(blocks=9, block_size=4)
    a, b, _ = allocator.allocate(1), allocator.allocate(2), allocator.allocate(1)
    allocator.release(a)
    allocator.release(b)
    c = allocator.allocate(1)
    assert (a, c) == ([1], [1])
    assert allocator.allocate(3) == [5, 6, 7]  # not 2, 3, 5
    assert allocator.allocate(3) == [2, 3, 8]  # what is left


def test_blocks_for_rounds_up() -> None:
    allocator = BlockAllocator(blocks=9, block_size=32)
    assert [allocator.blocks_for(n) for n in (1, 32, 33)] == [1, 1, 2]


def test_a_block_released_twice_is_an_error() -> None:
    allocator = BlockAllocator(blocks=3, block_size=4)
    blocks = allocator.allocate(1)
    allocator.release(blocks)
    with pytest.raises(LlorchError, match="released twice"):
        allocator.release(blocks)


@given(st.lists(st.integers(1, 6), max_size=40), st.randoms(use_true_random=False))
def test_no_block_is_ever_held_twice_and_none_is_lost(sizes, random) -> None:
    allocator, held = BlockAllocator(blocks=17, block_size=4), []
    for size in sizes:
        blocks = allocator.allocate(size)
        if blocks is None:
            assert allocator.free < size
            if held:
                allocator.release(held.pop(random.randrange(len(held))))
        else:
            held.append(blocks)
        flat = [block for blocks in held for block in blocks]
        assert len(flat) == len(set(flat)) == allocator.used
        assert allocator.used + allocator.free == 16
        assert 0 not in flat
