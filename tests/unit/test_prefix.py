from __future__ import annotations

from llorch.core.prefix import ROOT, Match, PrefixIndex


def index_of(*sequences: list[int], size: int = 4) -> PrefixIndex:
    """Each sequence in blocks of its own, numbered from 1."""
    index, block = PrefixIndex(size), 0
    for tokens in sequences:
        digest = ROOT
        for at in range(0, len(tokens), size):
            block += 1
            digest = index.add(block, digest, tokens[at : at + size])
    return index


def test_whole_blocks_of_the_same_beginning_are_found() -> None:
    index = index_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])
    match = index.find([1, 2, 3, 4, 5, 6, 7, 8, 90, 91])
    assert (match.blocks, match.partial) == ([1, 2], None)
    assert index.find([2, 2, 3, 4, 5]) == Match()


def test_the_same_tokens_behind_others_are_not_the_same() -> None:
    index = index_of([1, 2, 3, 4, 5, 6, 7, 8])
    assert index.find([5, 6, 7, 8, 9]) == Match()
    assert index.find([9, 9, 9, 9, 5, 6, 7, 8, 9]) == Match()


def test_the_last_token_of_a_prompt_is_never_found_as_its_logits_are_wanted() -> None:
    index = index_of([1, 2, 3, 4, 5, 6, 7, 8])
    match = index.find([1, 2, 3, 4, 5, 6, 7, 8])
    assert (match.blocks, match.partial, match.common) == ([1], 2, 3)


def test_of_a_block_that_begins_alike_the_common_part_is_found() -> None:
    index = index_of([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 70], size=4)
    match = index.find([1, 2, 3, 4, 5, 6, 70, 80, 90])
    assert (match.blocks, match.partial, match.common) == ([1], 4, 3)


def test_a_common_part_of_a_quarter_of_a_block_is_not_worth_a_copy() -> None:
    index = index_of([1, 2, 3, 4])
    assert index.find([1, 20, 30, 40, 50]) == Match()
    assert index.find([1, 2, 30, 40, 50]).common == 2


def test_the_block_that_was_known_first_stays_so_and_a_forgotten_one_is_found_no_more() -> None:
    index = index_of([1, 2, 3, 4], [1, 2, 3, 4])
    assert 1 in index
    assert 2 not in index
    index.forget(2)
    assert index.find([1, 2, 3, 4, 5]).blocks == [1]
    index.forget(1)
    assert index.find([1, 2, 3, 4, 5]) == Match()
