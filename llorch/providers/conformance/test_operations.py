"""Each required operation, and topk, against the float64 oracle, over shapes that hurt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llorch.providers.conformance import oracle
from llorch.providers.conformance.rig import EXACT, Rig, compare, compare_bits, describe
from llorch.providers.conformance.weights import random_weight, values_of, vector
from llorch.providers.device import HostWeight
from llorch.providers.spec import (
    AddSpec,
    EmbedSpec,
    GatherSpec,
    MatmulSpec,
    RMSNormSpec,
    RopeSpec,
    SwigluSpec,
    TopkSpec,
)

TOKENS = (1, 2, 7, 33, 512)
WIDTHS = (1, 31, 64, 333)  # off and on any vector width


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def vector_weight(rig: Rig, values: np.ndarray) -> Any:
    return rig.device.weight(vector("v", values))


# ---- products ----


def check_matmul(rig: Rig, rng: np.random.Generator, tokens: int, rows: int, cols: int, kind: str, bias: bool) -> None:
    spec = MatmulSpec(max_tokens=max(tokens, 512), rows=rows, cols=cols, type=kind, bias=bias, label="blk.0.attn_q")
    host = random_weight(rng, kind, rows, cols, frozenset({"matmul"}))
    b = normal(rng, rows) if bias else None
    check_product(rig, normal(rng, tokens, cols), host, values_of(host), spec, b)


def check_product(
    rig: Rig, x: np.ndarray, host: HostWeight, values: np.ndarray, spec: MatmulSpec, bias: np.ndarray | None = None
) -> None:
    """`values`: the weight's distinct rows, which repeat."""
    weight, device_bias = rig.device.weight(host), None if bias is None else vector_weight(rig, bias)
    kernel, out = rig.bind("matmul", spec), rig.output(len(x), spec.rows)
    (found,) = rig.call(kernel, spec, out=out, x=rig.input(x), w=weight, bias=device_bias)
    exact_x, row, energy = x.astype(np.float64), np.arange(spec.rows) % len(values), 0.0
    if rig.product_limit > EXACT:  # rounding goes with the products, whose sum in a single row may be anything
        energy = float(((exact_x**2) @ (values**2).T)[:, row].sum())
    expected = oracle.matmul(exact_x, values)[:, row]
    compare(found, expected if bias is None else expected + bias, rig.product_limit, spec, energy)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("rows", "cols"), [(64, 256), (1, 256), (48, 512), (257, 768)])
def test_matmul_shapes(rig: Rig, rng: np.random.Generator, weight_type: str, tokens: int, rows: int, cols: int) -> None:
    if tokens == 512 and weight_type not in ("F32", "Q8_0", "Q4_K"):
        rows, tokens = min(rows, 64), 129  # the widest shapes once per kind of block are enough
    check_matmul(rig, rng, tokens, rows, cols, weight_type, bias=False)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 5), (31, 33), (17, 1000), (100, 30)])
@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
def test_matmul_of_plain_types_with_odd_columns(
    rig: Rig, rng: np.random.Generator, plain_type: str, tokens: int, rows: int, cols: int
) -> None:
    check_matmul(rig, rng, tokens, rows, cols, plain_type, bias=False)


@pytest.mark.parametrize("tokens", [1, 7])
def test_matmul_with_a_bias(rig: Rig, rng: np.random.Generator, weight_type: str, tokens: int) -> None:
    check_matmul(rig, rng, tokens, 40, 256, weight_type, bias=True)


@pytest.mark.parametrize("magnitude", [1e-30, 1e15])
def test_matmul_of_tiny_and_huge_activations(rig: Rig, rng: np.random.Generator, magnitude: float) -> None:
    spec = MatmulSpec(max_tokens=2, rows=16, cols=64, type="F32")
    host = random_weight(rng, "F32", 16, 64, frozenset({"matmul"}))
    x = normal(rng, 2, 64) * np.float32(magnitude)
    weight, kernel = rig.device.weight(host), rig.bind("matmul", spec)
    (found,) = rig.call(kernel, spec, out=rig.output(2, 16), x=rig.input(x), w=weight, bias=None)
    compare(
        found / magnitude, oracle.matmul(x.astype(np.float64), values_of(host)) / magnitude, rig.product_limit, spec
    )


# ---- lookups ----


@pytest.mark.parametrize("tokens", TOKENS)
def test_embed(rig: Rig, rng: np.random.Generator, embed_type: str, tokens: int) -> None:
    spec = EmbedSpec(max_tokens=512, rows=70, cols=512, type=embed_type)
    host = random_weight(rng, embed_type, 70, 512, frozenset({"embed"}))
    ids = rng.integers(0, 70, tokens, dtype=np.int32)
    ids[-1] = 69
    table, kernel = rig.device.weight(host), rig.bind("embed", spec)
    (found,) = rig.call(kernel, spec, out=rig.output(tokens, 512), tokens=rig.input(ids), table=table)
    compare(found, values_of(host)[ids], EXACT, spec)


def test_one_tied_weight_serves_embed_and_matmul(rig: Rig, rng: np.random.Generator, tied_type: str) -> None:
    host = random_weight(rng, tied_type, 40, 256, frozenset({"embed", "matmul"}))
    weight, exact = rig.device.weight(host), values_of(host)
    embed_spec = EmbedSpec(max_tokens=4, rows=40, cols=256, type=tied_type)
    matmul_spec = MatmulSpec(max_tokens=4, rows=40, cols=256, type=tied_type)
    ids, x = np.array([0, 39, 5], np.int32), normal(rng, 3, 256)
    embed, matmul = rig.bind("embed", embed_spec), rig.bind("matmul", matmul_spec)
    (found,) = rig.call(embed, embed_spec, out=rig.output(3, 256), tokens=rig.input(ids), table=weight)
    compare(found, exact[ids], EXACT, embed_spec)
    (found,) = rig.call(matmul, matmul_spec, out=rig.output(3, 40), x=rig.input(x), w=weight, bias=None)
    compare(found, oracle.matmul(x.astype(np.float64), exact), rig.product_limit, matmul_spec)


@pytest.mark.parametrize("rows", [[0], [6, 0, 3], [2, 2, 2, 2, 2, 2, 2, 2, 2]])
@pytest.mark.parametrize("width", WIDTHS)
def test_gather(rig: Rig, rng: np.random.Generator, rows: list[int], width: int) -> None:
    spec, x = GatherSpec(max_tokens=16, dim=width), normal(rng, 7, width)
    kernel, device_rows = rig.bind("gather", spec), rig.input(np.array(rows, np.int32))
    (found,) = rig.call(kernel, spec, out=rig.output(len(rows), width), x=rig.input(x), rows=device_rows)
    compare_bits(found, x[rows], spec)


@pytest.mark.parametrize("k", [1, 3, 64])
@pytest.mark.parametrize("vocab", [64, 1000, 32003])
def test_topk_where_offered(rig: Rig, rng: np.random.Generator, k: int, vocab: int) -> None:
    check_topk(rig, rng, tokens=5, k=k, vocab=vocab)


def check_topk(rig: Rig, rng: np.random.Generator, tokens: int, k: int, vocab: int) -> None:
    spec = TopkSpec(max_tokens=8, vocab=vocab, k=k)
    kernel = rig.bind_offered("topk", spec)
    logits = np.round(normal(rng, tokens, vocab) * 8) / 8  # many equals
    values, ids = rig.output(tokens, k), rig.output(tokens, k, dtype="int32")
    found = rig.call(kernel, spec, values=values, ids=ids, logits=rig.input(logits))
    for row, row_values, row_ids in zip(logits, *found, strict=True):
        expected = np.lexsort((np.arange(vocab), -row))[:k]
        if len(wrong := np.flatnonzero(row_ids != expected)):
            raise AssertionError(
                f"{describe(spec)}: not the largest first, the lower id first among equals: place {wrong[0]} has "
                f"id {row_ids[wrong[0]]}, expected {expected[wrong[0]]}"
            )
        compare_bits(row_values, row[expected], spec)


# ---- norms, elementwise ----


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_rmsnorm(rig: Rig, rng: np.random.Generator, tokens: int, dim: int, scale: float) -> None:
    check_rmsnorm(rig, rng, tokens, dim, scale)


def check_rmsnorm(rig: Rig, rng: np.random.Generator, tokens: int, dim: int, scale: float = 1.0) -> None:
    spec = RMSNormSpec(max_tokens=512, dim=dim, eps=1e-5)
    x, w = normal(rng, tokens, dim) * np.float32(scale), normal(rng, dim)
    kernel, weight = rig.bind("rmsnorm", spec), vector_weight(rig, w)
    (found,) = rig.call(kernel, spec, out=rig.output(tokens, dim), x=rig.input(x), weight=weight)
    compare(found, oracle.rmsnorm(x.astype(np.float64), w, 1e-5), EXACT, spec)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dim", WIDTHS)
def test_add_and_swiglu(rig: Rig, rng: np.random.Generator, tokens: int, dim: int) -> None:
    check_add_and_swiglu(rig, rng, tokens, dim)


def check_add_and_swiglu(rig: Rig, rng: np.random.Generator, tokens: int, dim: int) -> None:
    x, y = normal(rng, tokens, dim) * 8, normal(rng, tokens, dim)
    device_x, device_y, out, both = rig.input(x), rig.input(y), rig.output(tokens, dim), rig.in_place(x)
    add_spec, spec = AddSpec(max_tokens=512, dim=dim), SwigluSpec(max_tokens=512, dim=dim)
    add, swiglu = rig.bind("add", add_spec), rig.bind("swiglu", spec)
    (found,) = rig.call(add, add_spec, out=out, x=device_x, y=device_y)
    compare_bits(found, x + y, add_spec)
    (found,) = rig.call(add, add_spec, out=both, x=both, y=device_y)  # as a residual is added
    compare_bits(found, x + y, add_spec)
    (found,) = rig.call(swiglu, spec, out=out, gate=device_x, up=device_y)
    compare(found, oracle.swiglu(x.astype(np.float64), y), EXACT, spec)


def test_swiglu_at_the_ends_of_the_exponential(rig: Rig) -> None:
    gate = np.array([[-1e4, -100, -88, -1e-30, 0, 1e-30, 88, 100, 1e4]], np.float32)
    spec, up = SwigluSpec(max_tokens=1, dim=gate.shape[1]), rig.input(np.ones_like(gate))
    kernel = rig.bind("swiglu", spec)
    (found,) = rig.call(kernel, spec, out=rig.output(*gate.shape), gate=rig.input(gate), up=up)
    assert np.isfinite(found).all(), f"swiglu gives {found}"
    compare(found, oracle.swiglu(gate.astype(np.float64), np.ones_like(gate)), EXACT, spec)


# ---- rope ----

ROPE_AT_4096 = 1e-7  # angles in float32: their error grows with the position
FREQUENCIES = {
    "plain": lambda rotated: 10000.0 ** -(np.arange(0, rotated, 2) / rotated),
    "factors": lambda rotated: 5e5 ** -(np.arange(0, rotated, 2) / rotated) / np.linspace(1, 8, rotated // 2),
}


def rope_spec(heads: int, head_dim: int, rotated: int, pairing: Any, kind: str, magnitude: float = 1.0) -> RopeSpec:
    return RopeSpec(
        max_tokens=512, heads=heads, head_dim=head_dim, pairing=pairing, magnitude=magnitude,
        frequencies=tuple(float(f) for f in FREQUENCIES[kind](rotated)),
    )  # fmt: skip


@pytest.mark.parametrize("pairing", ["adjacent", "half"])
@pytest.mark.parametrize(("head_dim", "rotated"), [(8, 8), (64, 64), (80, 32), (96, 96), (128, 128), (256, 64)])
@pytest.mark.parametrize(("heads", "tokens"), [(1, 1), (3, 7), (4, 33)])
@pytest.mark.parametrize("kind", FREQUENCIES)
def test_rope(
    rig: Rig, rng: np.random.Generator, pairing: str, head_dim: int, rotated: int, heads: int, tokens: int, kind: str
) -> None:
    spec = rope_spec(heads, head_dim, rotated, pairing, kind, magnitude=1.1 if kind == "factors" else 1.0)
    check_rope(rig, rng, tokens, spec, longest=4096)


def check_rope(rig: Rig, rng: np.random.Generator, tokens: int, spec: RopeSpec, longest: int) -> None:
    positions = rng.integers(0, longest, tokens, dtype=np.int32)
    x, kernel = normal(rng, tokens, spec.heads * spec.head_dim), rig.bind("rope", spec)
    (found,) = rig.call(kernel, spec, x=rig.in_place(x), positions=rig.input(positions))
    limit = ROPE_AT_4096 * (longest / 4096) ** 2
    compare(found, oracle.rope(x.astype(np.float64), positions, spec), limit, spec)
