"""Every operation in float64, written for reading: what providers are compared with.

T tokens, H heads of D dimensions, K key heads, C tokens of context.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llorch.providers.spec import AttentionSpec, RopeSpec

Float = npt.NDArray[np.float64]


def rmsnorm(x: Float, weight: Float, eps: float) -> Float:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, 2019)."""
    normed: Float = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    return normed * weight


def matmul(x: Float, w: Float, bias: Float | None = None) -> Float:
    """x [T, cols], w [rows, cols]."""
    product: Float = x @ w.T
    return product if bias is None else product + bias


def swiglu(gate: Float, up: Float) -> Float:
    """silu(gate) * up (Shazeer, 2020); silu(g) = g / (1 + exp(-g)) = g (1 + tanh(g / 2)) / 2."""
    silu: Float = gate * 0.5 * (1 + np.tanh(gate / 2))
    return silu * up


def rope(x: Float, positions: npt.NDArray[np.int32], spec: RopeSpec) -> Float:
    """x [T, H * D]. Pairs as complex numbers, turned by position * frequency (Su et al., 2021)."""
    half = len(spec.frequencies)
    heads = x.reshape(len(x), spec.heads, spec.head_dim).astype(np.float64)
    if spec.pairing == "adjacent":
        first, second = np.arange(half) * 2, np.arange(half) * 2 + 1
    else:
        first, second = np.arange(half), np.arange(half) + half
    pairs = heads[..., first] + 1j * heads[..., second]
    pairs *= spec.magnitude * np.exp(1j * positions[:, None, None] * np.array(spec.frequencies))
    heads[..., first], heads[..., second] = pairs.real, pairs.imag
    return heads.reshape(x.shape)


def attention_weights(q: Float, keys: Float, first: int, spec: AttentionSpec) -> Float:
    """softmax(q k^T * scale + mask) [H, T, C]; q [T, H * D] at positions first, ...; keys [C, K * D]."""
    queries = q.reshape(len(q), spec.heads, spec.head_dim)
    grouped = keys.reshape(len(keys), spec.kv_heads, spec.head_dim)
    weights = np.zeros((spec.heads, len(q), len(keys)))
    for head in range(spec.heads):
        shared = grouped[:, head // (spec.heads // spec.kv_heads)]
        for t in range(len(q)):
            position = first + t
            low = 0 if spec.window is None else max(0, position - spec.window + 1)
            scores = shared[low : position + 1] @ queries[t, head] * spec.scale
            if spec.soft_cap is not None:
                scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
            exponentials = np.exp(scores - scores.max())
            weights[head, t, low : position + 1] = exponentials / exponentials.sum()
    return weights


def attention(q: Float, keys: Float, values: Float, first: int, spec: AttentionSpec) -> Float:
    """Attended values [T, H * D] of one sequence whose whole keys and values [C, K * D] are given."""
    weights = attention_weights(q, keys, first, spec)
    grouped = values.reshape(len(values), spec.kv_heads, spec.head_dim)
    of_head = np.repeat(grouped, spec.heads // spec.kv_heads, axis=1)  # [C, H, D]
    mixed: Float = np.einsum("htc,chd->thd", weights, of_head)
    return mixed.reshape(q.shape)


def nmse(found: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """Sum of squared error over sum of squares, in float64."""
    exact = np.asarray(expected, np.float64)
    error = np.asarray(found, np.float64) - exact
    return float((error * error).sum() / (exact * exact).sum())
