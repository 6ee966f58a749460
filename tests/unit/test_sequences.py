"""Cache blocks under every order of operations, against a model of what the device holds."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from llorch.core.cache import BlockAllocator
from llorch.core.prefix import PrefixIndex
from llorch.core.sequences import BlockTable, SequenceCache

SIZE, BLOCKS = 4, 13
BAD = -1  # a NaN
OPERATIONS, STEPS = 10_000, 100


class Sequence:
    def __init__(self, tokens: list[int], table: BlockTable, computed: int) -> None:
        self.tokens, self.table, self.computed = tokens, table, computed


class Machine(RuleBasedStateMachine):
    """Sequences begin, compute, end and are preempted. `memory` is what the device holds at each block and offset: the
    tokens whose keys and values are there, that is all of the sequence up to this place."""

    operations = 0

    def __init__(self) -> None:
        super().__init__()
        Machine.operations -= 1  # the first look at the invariants comes before any
        self.index = PrefixIndex(SIZE)
        self.allocator = BlockAllocator(BLOCKS, SIZE, self.index)
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}
        self.cache = SequenceCache(self.allocator, self.index, self.copy)
        self.sequences: list[Sequence] = []

    def copy(self, src: int, dst: int) -> None:
        assert src == 0 or self.allocator.holders(src), "a block is copied that may be evicted for its own copy"
        for offset in range(SIZE):
            self.memory[dst, offset] = self.memory.get((src, offset), ())

    def write(self, one: Sequence, count: int) -> None:
        for position in range(one.computed, one.computed + count):
            block = one.table.blocks[position // SIZE]
            assert self.allocator.holders(block) == 1, "a shared block is written"
            known = len(self.index.known(block).tokens) if block in self.index else 0
            assert position % SIZE >= known, "what others may begin with is written over"
            self.memory[block, position % SIZE] = tuple(one.tokens[: position + 1])
        one.computed += count

    @invariant()
    def count(self) -> None:
        Machine.operations += 1

    def pick(self, data: st.DataObject) -> Sequence:
        return self.sequences[data.draw(st.integers(0, len(self.sequences) - 1))]

    @rule(tokens=st.lists(st.integers(1, 2), min_size=1, max_size=14))
    def begin(self, tokens: list[int]) -> None:
        table, cached = self.cache.begin(tokens)
        assert cached < len(tokens)
        self.sequences.append(Sequence(tokens, table, cached))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), more=st.lists(st.integers(1, 2), max_size=2), count=st.integers(1, 9), tail=st.booleans())
    def compute(self, data: st.DataObject, more: list[int], count: int, tail: bool) -> None:
        one = self.pick(data)
        one.tokens += more
        count = min(count, len(one.tokens) - one.computed)
        before, free = list(one.table.blocks), self.allocator.free
        if self.cache.extend(one.table, one.computed + count):
            self.write(one, count)
            self.cache.record(one.table, one.tokens, one.computed, tail=tail)
        else:
            assert one.table.blocks == before
            assert self.allocator.blocks_for(one.computed + count) - len(before) > free

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        one = self.pick(data)
        self.sequences.remove(one)
        self.cache.release(one.table, one.tokens, one.computed)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def preempt_and_begin_again(self, data: st.DataObject) -> None:
        one = self.pick(data)
        self.cache.release(one.table, one.tokens, one.computed)
        one.table, one.computed = self.cache.begin(one.tokens)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """Its own blocks hold NaN, and nobody may find or get one of them."""
        one = self.pick(data)
        own = [block for block in one.table.blocks if self.allocator.holders(block) == 1]
        for block in own:
            for offset in range(SIZE):
                self.memory[block, offset] = (BAD,)
        self.sequences.remove(one)
        self.cache.discard(one.table)

    @rule()
    def restart(self) -> None:
        """The engine fails: nothing in the cache counts, and no sequence is left."""
        for one in self.sequences:
            self.cache.release(one.table, one.tokens, one.computed)
        self.sequences.clear()
        self.allocator.clear()
        assert self.allocator.kept == 0
        assert self.allocator.free == self.allocator.total

    @invariant()
    def holders_are_the_tables_that_have_the_block(self) -> None:
        held = [block for one in self.sequences for block in one.table.blocks]
        assert all(self.allocator.holders(block) == held.count(block) for block in range(BLOCKS))
        assert 0 not in held
        assert self.allocator.used == len(set(held))

    @invariant()
    def no_block_is_lost_and_none_is_two_things(self) -> None:
        allocator = self.allocator
        empty = {int(block) for block in allocator._empty.nonzero()[0]}
        kept = set(allocator._kept)
        held = {block for block in range(BLOCKS) if allocator.holders(block)}
        assert empty | kept | held == set(range(1, BLOCKS))
        assert len(empty) + len(kept) + len(held) == BLOCKS - 1
        assert allocator.free == len(empty) + len(kept)
        assert all(block in self.index for block in kept)
        assert not any(block in self.index for block in empty)

    @invariant()
    def a_block_that_is_known_holds_its_tokens(self) -> None:
        for block in list(self.index._known):
            for offset, token in enumerate(self.index.known(block).tokens):
                assert self.memory[block, offset][-1] == token

    @invariant()
    def a_sequence_finds_all_that_it_has_computed(self) -> None:
        for one in self.sequences:
            for position in range(one.computed):
                place = one.table.blocks[position // SIZE], position % SIZE
                assert self.memory[place] == tuple(one.tokens[: position + 1])

    @invariant()
    def no_free_block_holds_nan(self) -> None:
        held = {block for one in self.sequences for block in one.table.blocks}
        assert not any(value == (BAD,) and block not in held for (block, _), value in self.memory.items())


RUN = settings(max_examples=OPERATIONS // STEPS, stateful_step_count=STEPS, deadline=None, database=None)


def test_ten_thousand_operations_keep_every_invariant() -> None:
    Machine.operations = 0
    while Machine.operations < OPERATIONS:  # an example may end before its last step
        run_state_machine_as_test(Machine, settings=RUN)


class Broken(Machine):
    """The twin: a copy that does not happen."""

    def copy(self, src: int, dst: int) -> None:
        pass


def test_the_invariants_find_a_copy_that_does_not_happen() -> None:
    once = settings(RUN, phases=[Phase.generate], report_multiple_bugs=False, print_blob=False)
    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(Broken, settings=once)


def cache(blocks: int = 9) -> tuple[SequenceCache, list[tuple[int, int]]]:
    index, copies = PrefixIndex(SIZE), []
    allocator = BlockAllocator(blocks, SIZE, index)
    return SequenceCache(allocator, index, lambda src, dst: copies.append((src, dst))), copies


def compute(cached: SequenceCache, tokens: list[int]) -> tuple[BlockTable, int]:
    """A sequence whose tokens are all computed, and how many were there already."""
    table, found = cached.begin(tokens)
    assert cached.extend(table, len(tokens))
    cached.record(table, tokens, len(tokens))
    return table, found


def test_a_prompt_that_runs_twice_shares_its_blocks_and_copies_that_of_the_last_token() -> None:
    cached, copies = cache()
    first, _ = compute(cached, [1, 2, 3, 4, 5, 6, 7, 8])
    second, found = compute(cached, [1, 2, 3, 4, 5, 6, 7, 8])
    assert found == 7
    assert second.blocks[0] == first.blocks[0]
    assert copies == [(first.blocks[1], second.blocks[1])]
    assert cached.allocator.used == 3


def test_a_sequence_that_goes_on_where_another_ended_takes_its_last_block_over() -> None:
    cached, copies = cache()
    first, _ = compute(cached, [1, 2, 3, 4, 5, 6])
    cached.release(first, [1, 2, 3, 4, 5, 6], 6)
    second, found = compute(cached, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert (found, copies) == (6, [])
    assert second.blocks[:2] == first.blocks


def test_a_copy_that_finds_no_block_is_done_without() -> None:
    cached, copies = cache(blocks=3)
    first, _ = compute(cached, [1, 2, 3, 4, 5, 6, 7, 8])
    table, found = cached.begin([1, 2, 3, 4, 5, 6, 7, 8])
    assert (table.blocks, found, copies) == (first.blocks[:1], 4, [])
    assert not cached.extend(table, 8)


def test_room_counts_what_others_hold_already() -> None:
    cached, _ = cache(blocks=5)
    compute(cached, [1, 2, 3, 4, 5, 6, 7, 8])
    assert cached.fits([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], spare=0)
    assert not cached.fits([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], spare=2)
    assert not cached.fits([9, 9, 9, 9, 5, 6, 7, 8, 9, 10, 11], spare=0)


def test_without_an_index_nothing_is_shared_or_kept() -> None:
    cached = SequenceCache(BlockAllocator(9, SIZE), None, lambda src, dst: pytest.fail("copied"))
    first, _ = compute(cached, [1, 2, 3, 4, 5, 6])
    cached.release(first, [1, 2, 3, 4, 5, 6], 6)
    assert cached.allocator.kept == 0
    assert compute(cached, [1, 2, 3, 4, 5, 6])[1] == 0
