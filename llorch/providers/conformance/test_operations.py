"""Each operation against the float64 oracle, over shapes that hurt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llorch.providers.conformance import oracle
from llorch.providers.conformance.rig import EXACT, Rig, compare
from llorch.providers.conformance.weights import random_weight, values_of, vector
from llorch.providers.spec import (
    AddRMSNormSpec,
    AddSpec,
    EmbedSpec,
    GateUpSwigluSpec,
    GatherSpec,
    MatmulGroupSpec,
    MatmulSpec,
    RMSNormSpec,
    RopePairSpec,
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
    x = normal(rng, tokens, cols)
    out, weight = rig.output(tokens, rows), rig.device.weight(host)
    kernel, device_x = rig.bind("matmul", spec), rig.tensor(x)
    device_b = None if b is None else vector_weight(rig, b)
    (found,) = rig.call(kernel, [out], lambda: kernel(out.tensor, device_x, weight, device_b))
    exact_x, exact_w, energy = x.astype(np.float64), values_of(host), 0.0
    if rig.product_limit > EXACT:  # rounding goes with the products, whose sum in a single row may be anything
        energy = float(((exact_x**2) @ (exact_w**2).T).sum())
    compare(found, oracle.matmul(exact_x, exact_w, b), rig.product_limit, spec, energy)


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
    out, weight, kernel, device_x = (
        rig.output(2, 16), rig.device.weight(host), rig.bind("matmul", spec), rig.tensor(x),
    )  # fmt: skip
    (found,) = rig.call(kernel, [out], lambda: kernel(out.tensor, device_x, weight, None))
    compare(
        found / magnitude, oracle.matmul(x.astype(np.float64), values_of(host)) / magnitude, rig.product_limit, spec
    )


@pytest.mark.parametrize("fused", [True, False], ids=["as offered", "decomposed"])
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_matmul_group(rig: Rig, rng: np.random.Generator, weight_type: str, tokens: int, fused: bool) -> None:
    parts = tuple(
        MatmulSpec(max_tokens=64, rows=rows, cols=256, type=weight_type, bias=bias, label=f"blk.0.{rows}")
        for rows, bias in ((64, False), (32, True), (33, False))
    )
    spec = MatmulGroupSpec(max_tokens=64, parts=parts, label="blk.0.attn_q")
    hosts = [random_weight(rng, weight_type, part.rows, 256, frozenset({"matmul"})) for part in parts]
    biases = [normal(rng, part.rows) if part.bias else None for part in parts]
    x = normal(rng, tokens, 256)
    outs = [rig.output(tokens, part.rows) for part in parts]
    weights = [rig.device.weight(host) for host in hosts]
    device_biases = [None if b is None else vector_weight(rig, b) for b in biases]
    kernel, device_x = rig.bind("matmul_group", spec, fused=fused), rig.tensor(x)
    tensors = [out.tensor for out in outs]
    found = rig.call(kernel, outs, lambda: kernel(*tensors, device_x, *weights, *device_biases))
    for one, host, bias, part in zip(found, hosts, biases, parts, strict=True):
        compare(one, oracle.matmul(x.astype(np.float64), values_of(host), bias), rig.product_limit, part)


@pytest.mark.parametrize("fused", [True, False], ids=["as offered", "decomposed"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_gate_up_swiglu(
    rig: Rig, rng: np.random.Generator, weight_type: str, tokens: int, bias: bool, fused: bool
) -> None:
    gate, up = (
        MatmulSpec(max_tokens=64, rows=96, cols=256, type=weight_type, bias=bias, label=f"blk.0.ffn_{name}")
        for name in ("gate", "up")
    )
    spec = GateUpSwigluSpec(max_tokens=64, gate=gate, up=up, label="blk.0.ffn_swiglu")
    hosts = [random_weight(rng, weight_type, 96, 256, frozenset({"matmul"})) for _ in range(2)]
    biases = [normal(rng, 96) if bias else None for _ in range(2)]
    x = normal(rng, tokens, 256) * np.float32(0.1)
    out, kernel, device_x = rig.output(tokens, 96), rig.bind("gate_up_swiglu", spec, fused=fused), rig.tensor(x)
    weights = [rig.device.weight(host) for host in hosts]
    device_biases = [None if b is None else vector_weight(rig, b) for b in biases]
    (found,) = rig.call(kernel, [out], lambda: kernel(out.tensor, device_x, *weights, *device_biases))
    g, u = (oracle.matmul(x.astype(np.float64), values_of(h), b) for h, b in zip(hosts, biases, strict=True))
    compare(found, oracle.swiglu(g, u), rig.product_limit * 10, spec)


# ---- lookups ----


@pytest.mark.parametrize("tokens", TOKENS)
def test_embed(rig: Rig, rng: np.random.Generator, embed_type: str, tokens: int) -> None:
    spec = EmbedSpec(max_tokens=512, rows=70, cols=512, type=embed_type)
    host = random_weight(rng, embed_type, 70, 512, frozenset({"embed"}))
    ids = rng.integers(0, 70, tokens, dtype=np.int32)
    ids[-1] = 69
    out, table, device_ids, kernel = (
        rig.output(tokens, 512), rig.device.weight(host), rig.tensor(ids), rig.bind("embed", spec),
    )  # fmt: skip
    (found,) = rig.call(kernel, [out], lambda: kernel(out.tensor, device_ids, table))
    compare(found, values_of(host)[ids], EXACT, spec)


def test_one_tied_weight_serves_embed_and_matmul(rig: Rig, rng: np.random.Generator, tied_type: str) -> None:
    host = random_weight(rng, tied_type, 40, 256, frozenset({"embed", "matmul"}))
    weight, exact = rig.device.weight(host), values_of(host)
    embed_spec = EmbedSpec(max_tokens=4, rows=40, cols=256, type=tied_type)
    matmul_spec = MatmulSpec(max_tokens=4, rows=40, cols=256, type=tied_type)
    ids, x = np.array([0, 39, 5], np.int32), normal(rng, 3, 256)
    embed, matmul = rig.bind("embed", embed_spec), rig.bind("matmul", matmul_spec)
    embedded, product, device_ids, device_x = rig.output(3, 256), rig.output(3, 40), rig.tensor(ids), rig.tensor(x)
    (found,) = rig.call(embed, [embedded], lambda: embed(embedded.tensor, device_ids, weight))
    compare(found, exact[ids], EXACT, embed_spec)
    (found,) = rig.call(matmul, [product], lambda: matmul(product.tensor, device_x, weight, None))
    compare(found, oracle.matmul(x.astype(np.float64), exact), rig.product_limit, matmul_spec)


@pytest.mark.parametrize("rows", [[0], [6, 0, 3], [2, 2, 2, 2, 2, 2, 2, 2, 2]])
@pytest.mark.parametrize("width", WIDTHS)
def test_gather(rig: Rig, rng: np.random.Generator, rows: list[int], width: int) -> None:
    spec, x = GatherSpec(max_tokens=16, dim=width), normal(rng, 7, width)
    out, kernel = rig.output(len(rows), width), rig.bind("gather", spec)
    device_x, device_rows = rig.tensor(x), rig.tensor(np.array(rows, np.int32))
    (found,) = rig.call(kernel, [out], lambda: kernel(out.tensor, device_x, device_rows))
    np.testing.assert_array_equal(found, x[rows])


@pytest.mark.parametrize("k", [1, 3, 64])
@pytest.mark.parametrize("vocab", [64, 1000, 32003])
def test_topk_where_offered(rig: Rig, rng: np.random.Generator, k: int, vocab: int) -> None:
    spec = TopkSpec(max_tokens=8, vocab=vocab, k=k)
    offered = rig.bind_if_offered("topk", spec)
    if offered is None:
        pytest.skip("the provider leaves the choice to the host")
    logits = np.round(normal(rng, 5, vocab) * 8) / 8  # many equals
    values, ids, device_logits = rig.output(5, k), rig.output(5, k, dtype="int32"), rig.tensor(logits)
    found = rig.call(offered, [values, ids], lambda: offered(values.tensor, ids.tensor, device_logits))
    for row, row_values, row_ids in zip(logits, *found, strict=True):
        expected = np.lexsort((np.arange(vocab), -row))[:k]
        assert row_ids.tolist() == expected.tolist(), "not the largest first, the lower id first among equals"
        np.testing.assert_array_equal(row_values, row[expected])


# ---- norms, elementwise ----


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_rmsnorm(rig: Rig, rng: np.random.Generator, tokens: int, dim: int, scale: float) -> None:
    spec = RMSNormSpec(max_tokens=512, dim=dim, eps=1e-5)
    x, w = normal(rng, tokens, dim) * np.float32(scale), normal(rng, dim)
    out, kernel, device_x, weight = (
        rig.output(tokens, dim), rig.bind("rmsnorm", spec), rig.tensor(x), vector_weight(rig, w),
    )  # fmt: skip
    (found,) = rig.call(kernel, [out], lambda: kernel(out.tensor, device_x, weight))
    compare(found, oracle.rmsnorm(x.astype(np.float64), w, 1e-5), EXACT, spec)


@pytest.mark.parametrize("fused", [True, False], ids=["as offered", "decomposed"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dim", WIDTHS)
def test_add_rmsnorm(rig: Rig, rng: np.random.Generator, tokens: int, dim: int, fused: bool) -> None:
    add, norm = AddSpec(max_tokens=512, dim=dim), RMSNormSpec(max_tokens=512, dim=dim, eps=1e-6)
    spec = AddRMSNormSpec(max_tokens=512, add=add, norm=norm)
    x, y, w = normal(rng, tokens, dim), normal(rng, tokens, dim), normal(rng, dim)
    out, residual = rig.output(tokens, dim), rig.output(tokens, dim)
    kernel, device_y, weight = rig.bind("add_rmsnorm", spec, fused=fused), rig.tensor(y), vector_weight(rig, w)
    out.fill(np.nan)
    residual.fill(x)
    kernel(out.tensor, residual.tensor, device_y, weight)
    total = x.astype(np.float64) + y
    compare(residual.read(), total, EXACT, add)
    compare(out.read(), oracle.rmsnorm(total, w, 1e-6), EXACT, spec)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dim", WIDTHS)
def test_add_and_swiglu(rig: Rig, rng: np.random.Generator, tokens: int, dim: int) -> None:
    x, y = normal(rng, tokens, dim) * 8, normal(rng, tokens, dim)
    device_x, device_y, out = rig.tensor(x), rig.tensor(y), rig.output(tokens, dim)
    add = rig.bind("add", AddSpec(max_tokens=512, dim=dim))
    (found,) = rig.call(add, [out], lambda: add(out.tensor, device_x, device_y))
    np.testing.assert_array_equal(found, x + y)
    out.fill(x)
    add(out.tensor, out.tensor, device_y)  # in place, as a residual is added
    np.testing.assert_array_equal(out.read(), x + y)
    spec = SwigluSpec(max_tokens=512, dim=dim)
    swiglu = rig.bind("swiglu", spec)
    (found,) = rig.call(swiglu, [out], lambda: swiglu(out.tensor, device_x, device_y))
    compare(found, oracle.swiglu(x.astype(np.float64), y), EXACT, spec)


def test_swiglu_at_the_ends_of_the_exponential(rig: Rig) -> None:
    gate = np.array([[-1e4, -100, -88, -1e-30, 0, 1e-30, 88, 100, 1e4]], np.float32)
    out, spec = rig.output(*gate.shape), SwigluSpec(max_tokens=1, dim=gate.shape[1])
    kernel, device_gate, up = rig.bind("swiglu", spec), rig.tensor(gate), rig.tensor(np.ones_like(gate))
    (found,) = rig.call(kernel, [out], lambda: kernel(out.tensor, device_gate, up))
    assert np.isfinite(found).all(), f"swiglu gives {found}"
    compare(found, oracle.swiglu(gate.astype(np.float64), np.ones_like(gate)), EXACT, spec)


# ---- rope ----

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
    positions = rng.integers(0, 4096, tokens, dtype=np.int32)
    x, out = normal(rng, tokens, heads * head_dim), rig.output(tokens, heads * head_dim)
    kernel, device_positions = rig.bind("rope", spec), rig.tensor(positions)
    out.fill(x)
    kernel(out.tensor, device_positions)
    compare(out.read(), oracle.rope(x.astype(np.float64), positions, spec), 1e-7, spec)  # float32 angles at 4096


@pytest.mark.parametrize("fused", [True, False], ids=["as offered", "decomposed"])
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_rope_pair(rig: Rig, rng: np.random.Generator, tokens: int, fused: bool) -> None:
    q_spec, k_spec = rope_spec(8, 64, 64, "adjacent", "plain"), rope_spec(2, 64, 64, "adjacent", "plain")
    spec = RopePairSpec(max_tokens=512, q=replace(q_spec, label="q"), k=replace(k_spec, label="k"))
    positions = rng.integers(0, 2048, tokens, dtype=np.int32)
    q, k = normal(rng, tokens, 512), normal(rng, tokens, 128)
    q_out, k_out = rig.output(tokens, 512), rig.output(tokens, 128)
    kernel, device_positions = rig.bind("rope_pair", spec, fused=fused), rig.tensor(positions)
    q_out.fill(q)
    k_out.fill(k)
    kernel(q_out.tensor, k_out.tensor, device_positions)
    compare(q_out.read(), oracle.rope(q.astype(np.float64), positions, q_spec), 1e-7, q_spec)
    compare(k_out.read(), oracle.rope(k.astype(np.float64), positions, k_spec), 1e-7, k_spec)
