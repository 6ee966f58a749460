"""The sizes of real models: what a kernel made for small ones gets wrong beyond its block, its grid or its buffer.

Each takes weights of few distinct rows, and the weight types that most models have.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llorch.providers.conformance import oracle
from llorch.providers.conformance.paged import PagedSequences
from llorch.providers.conformance.rig import Rig, compare, compare_bits
from llorch.providers.conformance.test_attention import check, spec_for
from llorch.providers.conformance.test_fused import check_add_rmsnorm
from llorch.providers.conformance.test_operations import (
    check_add_and_swiglu,
    check_product,
    check_rmsnorm,
    check_rope,
    check_topk,
    normal,
    rope_spec,
)
from llorch.providers.conformance.weights import repeated_weight
from llorch.providers.spec import EmbedSpec, GateUpSwigluSpec, GatherSpec, MatmulGroupSpec, MatmulSpec

DIM, FFN = 4096, 14336  # of Llama 3 8B
TALL = 70_003  # rows of a vocabulary: more than 65,535, the most of a CUDA grid's second dimension
VOCABULARY = 128_256
LONG_PROMPT = 1025  # tokens of a step
LONG_CONTEXT = 2100


# ---- products ----


def narrowest(weight_type: str) -> int:
    """Columns of the smallest row."""
    return 256 if weight_type.endswith("_K") else 32


def check_tall(rig: Rig, rng: np.random.Generator, kind: str, tokens: int, rows: int, cols: int) -> None:
    spec = MatmulSpec(max_tokens=max(tokens, 512), rows=rows, cols=cols, type=kind, label="output")
    host, values = repeated_weight(rng, kind, rows, cols, frozenset({"matmul"}))
    check_product(rig, normal(rng, tokens, cols), host, values, spec)


@pytest.mark.parametrize(("rows", "cols"), [(2, FFN), (FFN, 256)])
def test_matmul_of_a_real_size(rig: Rig, rng: np.random.Generator, common_type: str, rows: int, cols: int) -> None:
    check_tall(rig, rng, common_type, 2, rows, cols)


def test_matmul_of_a_long_prompt(rig: Rig, rng: np.random.Generator, common_type: str) -> None:
    check_tall(rig, rng, common_type, LONG_PROMPT, 48, 256)


def test_matmul_of_a_whole_vocabulary(rig: Rig, rng: np.random.Generator, common_type: str) -> None:
    check_tall(rig, rng, common_type, 1, TALL, narrowest(common_type))


def test_matmul_group_of_a_real_size(rig: Rig, rng: np.random.Generator, common_type: str) -> None:
    parts = tuple(MatmulSpec(max_tokens=2, rows=rows, cols=256, type=common_type) for rows in (DIM, 1024, 1024))
    spec = MatmulGroupSpec(max_tokens=2, parts=parts)
    kernel, x = rig.bind("matmul_group", spec), normal(rng, 2, 256)
    made = [repeated_weight(rng, common_type, part.rows, 256, frozenset({"matmul"})) for part in parts]
    outs = {f"out_{i}": rig.output(2, part.rows) for i, part in enumerate(parts, start=1)}
    weights = {f"w_{i}": rig.device.weight(host) for i, (host, _) in enumerate(made, start=1)}
    biases = {f"bias_{i}": None for i in range(1, len(parts) + 1)}
    found = rig.call(kernel, spec, **outs, x=rig.input(x), **weights, **biases)
    for one, (_, values), part in zip(found, made, parts, strict=True):
        few = oracle.matmul(x.astype(np.float64), values)
        compare(one, few[:, np.arange(part.rows) % len(values)], rig.product_limit, part)


def test_gate_up_swiglu_of_a_real_size(rig: Rig, rng: np.random.Generator, common_type: str) -> None:
    part = MatmulSpec(max_tokens=2, rows=FFN, cols=256, type=common_type)
    spec = GateUpSwigluSpec(max_tokens=2, gate=part, up=part)
    kernel, x = rig.bind("gate_up_swiglu", spec), normal(rng, 2, 256) * np.float32(0.1)
    (gate, gate_values), (up, up_values) = (
        repeated_weight(rng, common_type, FFN, 256, frozenset({"matmul"})) for _ in range(2)
    )
    (found,) = rig.call(
        kernel, spec, out=rig.output(2, FFN), x=rig.input(x), w_gate=rig.device.weight(gate),
        w_up=rig.device.weight(up), bias_gate=None, bias_up=None,
    )  # fmt: skip
    few = oracle.swiglu(*(oracle.matmul(x.astype(np.float64), values) for values in (gate_values, up_values)))
    compare(found, few[:, np.arange(FFN) % len(gate_values)], rig.product_limit * 10, spec)


# ---- lookups ----


def test_embed_of_a_whole_vocabulary(rig: Rig, rng: np.random.Generator, common_embed_type: str) -> None:
    cols = narrowest(common_embed_type)
    spec = EmbedSpec(max_tokens=512, rows=TALL, cols=cols, type=common_embed_type)
    host, values = repeated_weight(rng, common_embed_type, TALL, cols, frozenset({"embed"}))
    ids = np.array([TALL - 1, 0, 1 << 15, 65_535, 65_536, 65_537], np.int32)
    kernel, table = rig.bind("embed", spec), rig.device.weight(host)
    (found,) = rig.call(kernel, spec, out=rig.output(len(ids), cols), tokens=rig.input(ids), table=table)
    compare(found, values[ids % len(values)], 1e-10, spec)


def test_gather_from_a_long_prompt(rig: Rig, rng: np.random.Generator) -> None:
    spec, x = GatherSpec(max_tokens=LONG_PROMPT, dim=DIM), normal(rng, LONG_PROMPT, DIM)
    rows = np.array([LONG_PROMPT - 1, 0, 513], np.int32)
    kernel = rig.bind("gather", spec)
    (found,) = rig.call(kernel, spec, out=rig.output(len(rows), DIM), x=rig.input(x), rows=rig.input(rows))
    compare_bits(found, x[rows], spec)


@pytest.mark.parametrize("k", [1, 64])
def test_topk_of_a_whole_vocabulary(rig: Rig, rng: np.random.Generator, k: int) -> None:
    check_topk(rig, rng, tokens=2, k=k, vocab=VOCABULARY)


# ---- norms, elementwise, rope ----

by_width = pytest.mark.parametrize("dim", [DIM, FFN])
by_tokens = pytest.mark.parametrize("tokens", [1, 2, 33])  # 33 x 14336: more elements than fit a small grid


@by_tokens
@by_width
def test_rmsnorm_of_a_real_size(rig: Rig, rng: np.random.Generator, tokens: int, dim: int) -> None:
    check_rmsnorm(rig, rng, tokens, dim)


@by_tokens
@by_width
def test_add_rmsnorm_of_a_real_size(rig: Rig, rng: np.random.Generator, tokens: int, dim: int) -> None:
    check_add_rmsnorm(rig, rng, tokens, dim, fused=True)


@by_tokens
@by_width
def test_add_and_swiglu_of_a_real_size(rig: Rig, rng: np.random.Generator, tokens: int, dim: int) -> None:
    check_add_and_swiglu(rig, rng, tokens, dim)


@pytest.mark.parametrize(("tokens", "heads"), [(2, 32), (LONG_PROMPT, 8)])
@pytest.mark.parametrize("pairing", ["adjacent", "half"])
def test_rope_at_far_positions(rig: Rig, rng: np.random.Generator, pairing: str, tokens: int, heads: int) -> None:
    spec = replace(rope_spec(heads, 128, 128, pairing, "plain"), max_tokens=LONG_PROMPT)
    check_rope(rig, rng, tokens, spec, longest=1 << 17)


# ---- attention ----


def test_attention_over_thousands_of_keys(rig: Rig, rng: np.random.Generator) -> None:
    spec = spec_for(rig, heads=2, kv_heads=1, max_tokens=512, max_blocks=-(-LONG_CONTEXT // rig.device.block_sizes[0]))
    sequences = PagedSequences(rig, spec, rng, [[int(block) + 1 for block in rng.permutation(spec.max_blocks)]])
    for count in (512, 512, 512, 512):
        sequences.grow({0: count})
    check(sequences, {0: 33})
    check(sequences, {0: 1})
