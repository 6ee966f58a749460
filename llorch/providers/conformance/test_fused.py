"""The fused operations, as the provider offers them and as core makes them of the required ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llorch.providers.conformance import oracle
from llorch.providers.conformance.rig import EXACT, Rig, compare
from llorch.providers.conformance.test_operations import ROPE_AT_4096, TOKENS, WIDTHS, normal, rope_spec, vector_weight
from llorch.providers.conformance.weights import random_weight, values_of
from llorch.providers.spec import (
    AddRMSNormSpec,
    AddSpec,
    GateUpSwigluSpec,
    MatmulGroupSpec,
    MatmulSpec,
    RMSNormSpec,
    RopePairSpec,
)

as_offered_and_decomposed = pytest.mark.parametrize("fused", [True, False], ids=["as offered", "decomposed"])


@as_offered_and_decomposed
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dim", WIDTHS)
def test_add_rmsnorm(rig: Rig, rng: np.random.Generator, tokens: int, dim: int, fused: bool) -> None:
    check_add_rmsnorm(rig, rng, tokens, dim, fused)


def check_add_rmsnorm(rig: Rig, rng: np.random.Generator, tokens: int, dim: int, fused: bool) -> None:
    add, norm = AddSpec(max_tokens=512, dim=dim), RMSNormSpec(max_tokens=512, dim=dim, eps=1e-6)
    spec = AddRMSNormSpec(max_tokens=512, add=add, norm=norm)
    x, y, w = normal(rng, tokens, dim), normal(rng, tokens, dim), normal(rng, dim)
    kernel, weight = rig.bind("add_rmsnorm", spec, fused=fused), vector_weight(rig, w)
    found, residual = rig.call(
        kernel, spec, out=rig.output(tokens, dim), x=rig.in_place(x), y=rig.input(y), weight=weight
    )
    total = x.astype(np.float64) + y
    compare(residual, total, EXACT, add)
    compare(found, oracle.rmsnorm(total, w, 1e-6), EXACT, spec)


@as_offered_and_decomposed
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
    kernel = rig.bind("matmul_group", spec, fused=fused)
    outs = {f"out_{i}": rig.output(tokens, part.rows) for i, part in enumerate(parts, start=1)}
    weights = {f"w_{i}": rig.device.weight(host) for i, host in enumerate(hosts, start=1)}
    device_biases = {f"bias_{i}": None if b is None else vector_weight(rig, b) for i, b in enumerate(biases, start=1)}
    found = rig.call(kernel, spec, **outs, x=rig.input(x), **weights, **device_biases)
    for one, host, bias, part in zip(found, hosts, biases, parts, strict=True):
        compare(one, oracle.matmul(x.astype(np.float64), values_of(host), bias), rig.product_limit, part)


@as_offered_and_decomposed
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
    kernel = rig.bind("gate_up_swiglu", spec, fused=fused)
    w_gate, w_up = (rig.device.weight(host) for host in hosts)
    bias_gate, bias_up = (None if b is None else vector_weight(rig, b) for b in biases)
    (found,) = rig.call(
        kernel, spec, out=rig.output(tokens, 96), x=rig.input(x),
        w_gate=w_gate, w_up=w_up, bias_gate=bias_gate, bias_up=bias_up,
    )  # fmt: skip
    g, u = (oracle.matmul(x.astype(np.float64), values_of(h), b) for h, b in zip(hosts, biases, strict=True))
    compare(found, oracle.swiglu(g, u), rig.product_limit * 10, spec)


@as_offered_and_decomposed
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_rope_pair(rig: Rig, rng: np.random.Generator, tokens: int, fused: bool) -> None:
    q_spec, k_spec = rope_spec(8, 64, 64, "adjacent", "plain"), rope_spec(2, 64, 64, "adjacent", "plain")
    spec = RopePairSpec(max_tokens=512, q=replace(q_spec, label="q"), k=replace(k_spec, label="k"))
    positions = rng.integers(0, 2048, tokens, dtype=np.int32)
    q, k = normal(rng, tokens, 512), normal(rng, tokens, 128)
    kernel = rig.bind("rope_pair", spec, fused=fused)
    found_q, found_k = rig.call(kernel, spec, q=rig.in_place(q), k=rig.in_place(k), positions=rig.input(positions))
    compare(found_q, oracle.rope(q.astype(np.float64), positions, q_spec), ROPE_AT_4096, q_spec)
    compare(found_k, oracle.rope(k.astype(np.float64), positions, k_spec), ROPE_AT_4096, k_spec)
