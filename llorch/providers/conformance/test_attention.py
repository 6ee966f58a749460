"""Attention over the paged cache: ragged batches, block borders, tables out of order, every head geometry."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llorch.providers.conformance import oracle
from llorch.providers.conformance.paged import PagedSequences
from llorch.providers.conformance.rig import Rig, compare
from llorch.providers.spec import AttentionSpec

LIMIT = {"f32": 1e-10, "f16": 1e-6}  # float16 keys and values carry 11 bits: (2^-12)^2 relative error

SPEC = AttentionSpec(
    max_tokens=256, heads=8, kv_heads=2, head_dim=64, scale=64**-0.5, block_size=0, max_blocks=40, max_sequences=8,
    cache_dtype="f32",
)  # fmt: skip


def spec_for(rig: Rig, cache_dtype: str | None = None, **changes: object) -> AttentionSpec:
    dtype = cache_dtype or ("f32" if "f32" in rig.device.cache_dtypes else rig.device.cache_dtypes[0])
    block_size = changes.pop("block_size", rig.device.block_sizes[0])
    return replace(SPEC, cache_dtype=dtype, block_size=block_size, **changes)  # type: ignore[arg-type]


def check(sequences: PagedSequences, counts: dict[int, int]) -> None:
    found, expected = sequences.step(counts)
    compare(found, expected, LIMIT[sequences.spec.cache_dtype], sequences.spec)


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 1), (8, 8), (8, 2), (6, 3)])
def test_head_geometries(rig: Rig, rng: np.random.Generator, head_dim: int, heads: int, kv_heads: int) -> None:
    spec = spec_for(rig, heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5)
    sequences = PagedSequences(rig, spec, rng, [[1, 2, 3], [6, 4, 5]])
    for counts in ({0: 7}, {0: 1, 1: 2}, {1: 33}, {0: 1, 1: 1}):
        check(sequences, counts)


@pytest.mark.parametrize("cache_dtype", ["f32", "f16"])
def test_decodes_and_prefill_chunks_in_one_batch(rig: Rig, rng: np.random.Generator, cache_dtype: str) -> None:
    if cache_dtype not in rig.device.cache_dtypes:
        pytest.skip(f"the device offers no {cache_dtype} cache, only {', '.join(rig.device.cache_dtypes)}")
    spec = spec_for(rig, cache_dtype)
    tables = [[5, 1, 9, 2], [3, 4, 6, 7], [12, 11, 10, 8], [20, 22, 21, 13], [14, 15, 16, 17]]
    sequences = PagedSequences(rig, spec, rng, tables)
    for counts in ({0: 33, 1: 1, 2: 2}, {3: 7, 0: 1, 4: 50}, {0: 1, 1: 1, 2: 1, 3: 1, 4: 1}, {4: 2, 1: 64}, {2: 1}):
        check(sequences, counts)


def test_contexts_cross_every_block_border(rig: Rig, rng: np.random.Generator) -> None:
    for block_size in rig.device.block_sizes:
        spec = spec_for(rig, block_size=block_size, heads=4, kv_heads=2, head_dim=32, scale=0.2)
        sequences = PagedSequences(rig, spec, rng, [[3, 1, 2], [4, 6, 5]])
        check(sequences, {0: block_size - 1, 1: block_size})
        for _ in range(3):
            check(sequences, {0: 1, 1: 1})
        check(sequences, {0: block_size, 1: 2})


def test_a_long_context(rig: Rig, rng: np.random.Generator) -> None:
    spec = spec_for(rig, heads=4, kv_heads=1, head_dim=64)
    blocks = min(40, 1000 // spec.block_size)
    order = [int(b) + 1 for b in rng.permutation(blocks)]
    sequences = PagedSequences(rig, spec, rng, [order])
    for _ in range(3):
        check(sequences, {0: 200})
    check(sequences, {0: 1})


@pytest.mark.parametrize("window", [1, 5, 40])
def test_sliding_window(rig: Rig, rng: np.random.Generator, window: int) -> None:
    sequences = PagedSequences(rig, spec_for(rig, window=window), rng, [[2, 1, 3], [4, 5, 6]])
    for counts in ({0: 50, 1: 3}, {0: 1, 1: 1}, {0: 9, 1: 20}):
        check(sequences, counts)


def test_soft_cap(rig: Rig, rng: np.random.Generator) -> None:
    sequences = PagedSequences(rig, spec_for(rig, soft_cap=2.0), rng, [[2, 1], [4, 3]])
    for counts in ({0: 20, 1: 3}, {0: 1, 1: 1}):
        check(sequences, counts)


def test_scores_of_hundreds_do_not_overflow(rig: Rig, rng: np.random.Generator) -> None:
    sequences = PagedSequences(rig, spec_for(rig, scale=30.0), rng, [[1, 2]])
    found, expected = sequences.step({0: 40})
    assert np.isfinite(found).all(), "attention gives infinities or NaN"
    # scores of a thousand carry rounding errors of 1e-4: the softmax of near ties differs by as much
    assert oracle.nmse(found, expected) < 1e-6


def test_a_freed_block_is_reused(rig: Rig, rng: np.random.Generator) -> None:
    spec = spec_for(rig)
    sequences = PagedSequences(rig, spec, rng, [[1, 2], [3, 4]])
    check(sequences, {0: 40, 1: 5})
    sequences.replace(0, [2, 1])  # another sequence in the same blocks, the other way round
    check(sequences, {0: 20, 1: 1})


def test_truncation_forgets_what_came_after(rig: Rig, rng: np.random.Generator) -> None:
    sequences = PagedSequences(rig, spec_for(rig), rng, [[1, 2, 3]])
    check(sequences, {0: 50})
    sequences.truncate(0, 17)
    check(sequences, {0: 3})
    check(sequences, {0: 1})


def test_a_copied_block_holds_the_same(rig: Rig, rng: np.random.Generator) -> None:
    spec = spec_for(rig)
    sequences = PagedSequences(rig, spec, rng, [[1, 2], [3, 4]])
    check(sequences, {0: spec.block_size + 3})
    sequences.copy(0, 1)
    check(sequences, {1: 1, 0: 1})
    check(sequences, {1: 4})


def test_padding_tokens_and_sequences_change_nothing(rig: Rig, rng: np.random.Generator) -> None:
    sequences = PagedSequences(rig, spec_for(rig), rng, [[1, 2], [3, 4]])
    check(sequences, {0: 9, 1: 2})
    found, expected = sequences.step({0: 1, 1: 1}, padded=5)
    compare(found, expected, LIMIT[sequences.spec.cache_dtype], sequences.spec)
    check(sequences, {0: 1, 1: 1})


def test_a_row_does_not_depend_on_the_rows_beside_it_where_that_is_declared(rig: Rig, rng: np.random.Generator) -> None:
    if not rig.provider.batch_invariant:
        pytest.skip("the provider does not declare batch_invariant")
    seeds = [np.random.default_rng(3) for _ in range(2)]
    alone = PagedSequences(rig, spec_for(rig), seeds[0], [[1, 2]])
    beside = PagedSequences(rig, spec_for(rig), seeds[1], [[1, 2], [3, 4], [5, 6]])
    first, _ = alone.step({0: 30})
    second, _ = beside.step({0: 30})
    np.testing.assert_array_equal(first, second)
    q_row, _ = alone.step({0: 1})
    q_rows, _ = beside.step({0: 1, 1: 5, 2: 1})
    np.testing.assert_array_equal(q_row[0], q_rows[0])
