"""The reference provider, operation by operation, against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llorch.core.quant import DEQUANTIZABLE, dequantize
from llorch.errors import DeviceMemoryError
from llorch.providers import (
    AddSpec,
    AttentionSpec,
    Batch,
    CacheSpec,
    EmbedSpec,
    GatherSpec,
    HostWeight,
    MatmulSpec,
    MemoryInfo,
    RMSNormSpec,
    RopeSpec,
    SwigluSpec,
    TopkSpec,
)
from llorch.providers.conformance import oracle
from llorch.providers.conformance.weights import random_weight
from llorch.providers.numpy_cpu import NumpyDevice, NumpyOps, provider

OPS = NumpyOps()


@pytest.fixture
def device() -> NumpyDevice:
    return provider.open()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def host_weight(rng: np.random.Generator, kind: str, rows: int, cols: int, uses: str = "matmul") -> HostWeight:
    return random_weight(rng, kind, rows, cols, frozenset({uses}))


@pytest.mark.parametrize("expanded", [True, False], ids=["expanded", "in slabs"])
@pytest.mark.parametrize("kind", sorted(DEQUANTIZABLE))
def test_matmul_of_every_weight_type(device, rng, kind, expanded) -> None:
    device._expand = expanded
    host = host_weight(rng, kind, 48, 512)
    weight = device.weight(host)
    assert (weight.dense is not None) == (expanded or kind == "F32")
    exact = dequantize(host.data, kind, host.shape).astype(np.float64)
    kernel = OPS.matmul(MatmulSpec(max_tokens=8, rows=48, cols=512, type=kind))
    for tokens in (1, 2, 7):
        x, out = normal(rng, tokens, 512), np.full((tokens, 48), np.nan, np.float32)
        kernel(out, x, weight, None)
        assert oracle.nmse(out, oracle.matmul(x.astype(np.float64), exact)) < 1e-10


@pytest.mark.parametrize("rows", [1, 31, 300])
def test_slabs_cover_every_row(device, rng, rows, monkeypatch) -> None:
    monkeypatch.setattr("llorch.providers.numpy_cpu.SLAB_ELEMENTS", 256 * 8)
    device._expand = False
    host = host_weight(rng, "Q4_K", rows, 256)
    out = np.full((2, rows), np.nan, np.float32)
    x = normal(rng, 2, 256)
    OPS.matmul(MatmulSpec(max_tokens=2, rows=rows, cols=256, type="Q4_K"))(out, x, device.weight(host), None)
    assert oracle.nmse(out, x.astype(np.float64) @ dequantize(host.data, "Q4_K", host.shape).T) < 1e-10


def test_matmul_adds_a_bias(device, rng) -> None:
    host, bias = host_weight(rng, "F32", 5, 8), normal(rng, 5)
    vector = HostWeight(name="b", shape=(5,), type="F32", data=bias.view(np.uint8), uses=frozenset({"vector"}))
    x, out = normal(rng, 3, 8), np.empty((3, 5), np.float32)
    kernel = OPS.matmul(MatmulSpec(max_tokens=3, rows=5, cols=8, type="F32", bias=True))
    kernel(out, x, device.weight(host), device.weight(vector))
    assert oracle.nmse(out, x.astype(np.float64) @ dequantize(host.data, "F32", (5, 8)).T + bias) < 1e-12


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q6_K"])
def test_embed_looks_rows_up(device, rng, kind) -> None:
    host = host_weight(rng, kind, 10, 256, "embed")
    tokens, out = np.array([9, 0, 3, 3], np.int32), np.empty((4, 256), np.float32)
    OPS.embed(EmbedSpec(max_tokens=4, rows=10, cols=256, type=kind))(out, tokens, device.weight(host))
    np.testing.assert_array_equal(out, dequantize(host.data, kind, host.shape)[tokens])


def test_rmsnorm_swiglu_add_and_gather(device, rng) -> None:
    x, y, out = normal(rng, 5, 33), normal(rng, 5, 33), np.empty((5, 33), np.float32)
    w = normal(rng, 33)
    weight = device.weight(HostWeight(name="n", shape=(33,), type="F32", data=w.view(np.uint8), uses=frozenset()))
    OPS.rmsnorm(RMSNormSpec(max_tokens=5, dim=33, eps=1e-5))(out, x, weight)
    assert oracle.nmse(out, oracle.rmsnorm(x.astype(np.float64), w, 1e-5)) < 1e-12
    gate = x * 100  # both tails of the exponential
    OPS.swiglu(SwigluSpec(max_tokens=5, dim=33))(out, gate, y)
    assert oracle.nmse(out, oracle.swiglu(gate.astype(np.float64), y)) < 1e-12
    expected = x + y
    OPS.add(AddSpec(max_tokens=5, dim=33))(x, x, y)  # in place
    np.testing.assert_array_equal(x, expected)
    rows = np.array([4, 0], np.int32)
    OPS.gather(GatherSpec(max_tokens=2, dim=33))(out[:2], x, rows)
    np.testing.assert_array_equal(out[:2], x[rows])


def test_swiglu_of_a_hugely_negative_gate_is_zero() -> None:
    gate, up, out = np.full((1, 2), -1e4, np.float32), np.ones((1, 2), np.float32), np.empty((1, 2), np.float32)
    OPS.swiglu(SwigluSpec(max_tokens=1, dim=2))(out, gate, up)
    assert np.all(out == 0)


@pytest.mark.parametrize("pairing", ["adjacent", "half"])
@pytest.mark.parametrize(("dim", "rotated"), [(8, 8), (64, 64), (80, 32)])
def test_rope(rng, pairing, dim, rotated) -> None:
    frequencies = tuple(float(f) for f in 10000.0 ** -(np.arange(0, rotated, 2) / rotated))
    spec = RopeSpec(max_tokens=6, heads=3, head_dim=dim, pairing=pairing, frequencies=frequencies, magnitude=1.25)
    positions = np.array([0, 1, 2, 99, 4095, 131071], np.int32)
    x = normal(rng, 6, 3 * dim)
    expected = oracle.rope(x.astype(np.float64), positions, spec)
    OPS.rope(spec)(x, positions)
    assert oracle.nmse(x, expected) < 1e-12


# ---- attention over the paged cache ----

SPEC = AttentionSpec(
    max_tokens=64, heads=8, kv_heads=2, head_dim=16, scale=0.25, block_size=4, max_blocks=16, max_sequences=4,
    cache_dtype="f32",
)  # fmt: skip


class PagedSequences:
    """Sequences whose keys and values grow step by step, in a device's cache and beside it."""

    def __init__(self, spec: AttentionSpec, tables: list[list[int]], rng: np.random.Generator) -> None:
        self.spec, self.tables, self.rng = spec, tables, rng
        blocks = max(max(table) for table in tables) + 1
        cache_spec = CacheSpec(
            layers=1, kv_heads=spec.kv_heads, head_dim=spec.head_dim, block_size=spec.block_size, blocks=blocks,
            dtype=spec.cache_dtype,
        )  # fmt: skip
        self.cache = provider.open().kv_cache(cache_spec)
        width = spec.kv_heads * spec.head_dim
        self.keys = [np.empty((0, width), np.float32) for _ in tables]
        self.values = [np.empty((0, width), np.float32) for _ in tables]

    def step(self, counts: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Adds counts[s] tokens to each sequence s; returns what the kernel gave and what the oracle says."""
        spec, tokens = self.spec, sum(counts.values())
        q = normal(self.rng, tokens, spec.heads * spec.head_dim)
        k, v = (normal(self.rng, tokens, spec.kv_heads * spec.head_dim) for _ in range(2))
        slots, expected, at, starts, lengths = [], [], 0, [0], []
        tables = np.zeros((spec.max_sequences, spec.max_blocks), np.int32)
        for row, (s, count) in enumerate(counts.items()):
            first = len(self.keys[s])
            self.keys[s] = np.concatenate([self.keys[s], k[at : at + count]])
            self.values[s] = np.concatenate([self.values[s], v[at : at + count]])
            tables[row, : len(self.tables[s])] = self.tables[s]
            for p in range(first, first + count):
                slots.append(self.tables[s][p // spec.block_size] * spec.block_size + p % spec.block_size)
            exact = [a.astype(np.float64) for a in (q[at : at + count], self.keys[s], self.values[s])]
            expected.append(oracle.attention(*exact, first, spec))
            at += count
            starts.append(at)
            lengths.append(first + count)
        out = np.full_like(q, np.nan)
        kernel = OPS.attention(spec)
        kernel(out, q, k, v, self.cache.layers[0], self._batch(slots, tables, starts, lengths))
        return out, np.concatenate(expected)

    def _batch(self, slots: list[int], tables: np.ndarray, starts: list[int], lengths: list[int]) -> Batch:
        def array(values: list[int]) -> Any:
            return np.array(values, np.int32)

        return Batch(
            positions=array([]), slots=array(slots), sequence_ids=array([]), block_tables=tables,
            query_starts=array(starts), context_lengths=array(lengths), tokens=len(slots), sequences=len(lengths),
        )  # fmt: skip


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        replace(SPEC, kv_heads=8),
        replace(SPEC, kv_heads=1),
        replace(SPEC, window=5),
        replace(SPEC, soft_cap=2.0),
        replace(SPEC, cache_dtype="f16"),
    ],
    ids=["grouped", "one key head each", "one key head", "window", "soft cap", "f16 cache"],
)
def test_attention_of_ragged_batches(rng, spec) -> None:
    # consecutive blocks, blocks out of order, and a table that starts in the middle
    sequences = PagedSequences(spec, [[1, 2, 3, 4, 5], [9, 7, 12, 6, 11], [13, 14, 8, 10]], rng)
    limit = 1e-6 if spec.cache_dtype == "f16" else 1e-12
    for counts in ({0: 7, 1: 1}, {1: 4, 2: 3}, {0: 1, 1: 1, 2: 1}, {2: 2, 0: 9}, {1: 1}):
        found, expected = sequences.step(counts)
        assert oracle.nmse(found, expected) < limit


def test_attention_in_slices_equals_attention_at_once(rng, monkeypatch) -> None:
    monkeypatch.setattr("llorch.providers.numpy_cpu.SCORE_ELEMENTS", 8 * 20 * 3)  # three queries a slice
    found, expected = PagedSequences(SPEC, [[1, 2, 3, 4, 5]], rng).step({0: 20})
    assert oracle.nmse(found, expected) < 1e-12


def test_a_copied_block_holds_the_same_keys_and_values(rng) -> None:
    sequences = PagedSequences(SPEC, [[1, 2], [3, 4]], rng)
    sequences.step({0: 6})
    sequences.cache.copy(1, 3)
    sequences.cache.copy(2, 4)
    sequences.keys[1], sequences.values[1] = sequences.keys[0], sequences.values[0]
    found, expected = sequences.step({1: 1})
    assert oracle.nmse(found, expected) < 1e-12


# ---- topk, memory, options ----


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_topk_gives_the_largest_first_and_the_lower_id_among_equals(k) -> None:
    logits = np.array([[1, 3, 3, -1, 3, 0, 2, 2], [0] * 8, [-np.inf, 5, *[-np.inf] * 6]], np.float32)
    values, ids = np.empty((3, k), np.float32), np.empty((3, k), np.int32)
    OPS.topk(TopkSpec(max_tokens=3, vocab=8, k=k))(values, ids, logits)
    for row, row_values, row_ids in zip(logits, values, ids, strict=True):
        expected = sorted(range(8), key=lambda i: (-row[i], i))[:k]
        assert row_ids.tolist() == expected
        assert row_values.tolist() == row[expected].tolist()


def test_weights_are_expanded_only_where_half_the_free_memory_holds_them(device, rng, monkeypatch) -> None:
    weights = [host_weight(rng, "Q8_0", 64, 256)]
    need = 64 * 256 * 4
    for free, word in ((2 * need, "expanded"), (2 * need - 2, "slabs")):
        monkeypatch.setattr(device, "memory", lambda free=free: MemoryInfo(total=free, free=free))
        assert word in device.expect(weights)
        assert (device.weight(weights[0]).dense is not None) == (word == "expanded")


def test_a_cache_beyond_memory_is_an_error_with_both_numbers(device) -> None:
    spec = CacheSpec(layers=100, kv_heads=64, head_dim=128, block_size=32, blocks=1 << 20, dtype="f32")
    with pytest.raises(DeviceMemoryError, match=r"needs .* GiB, .* GiB are free: start with a smaller --context"):
        device.kv_cache(spec)
