"""The Llama family: Llama 2 and 3, Mistral, TinyLlama, Yi, SmolLM and all that share their graph.

Touvron et al., "LLaMA: Open and Efficient Foundation Language Models" (2023), section 2.2, and for grouped KV heads
Ainslie et al., "GQA" (2023). Names are those of the GGUF tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llorch.core.config import ModelConfig
from llorch.core.models.weights import WeightSpec
from llorch.core.plan import Graph, Rotation


def weights(c: ModelConfig) -> Iterator[WeightSpec]:
    """Every tensor the graph reads. The output matrix may be tied to the embedding; biases are taken where present."""
    q_dim, kv_dim = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    yield WeightSpec("token_embd.weight", (c.vocab_size, c.dim), "embed")
    yield WeightSpec("output_norm.weight", (c.dim,), "vector")
    yield WeightSpec("output.weight", (c.vocab_size, c.dim), "matmul", tied="token_embd.weight")
    if c.rope_scaling.kind == "longrope":
        yield WeightSpec("rope_factors_long.weight", (c.rope_dim // 2,), "host")
        yield WeightSpec("rope_factors_short.weight", (c.rope_dim // 2,), "host")
    else:
        yield WeightSpec("rope_freqs.weight", (c.rope_dim // 2,), "host", optional=True)
    for layer in range(c.n_layers):
        p = f"blk.{layer}."
        yield WeightSpec(f"{p}attn_norm.weight", (c.dim,), "vector")
        yield from _linear(f"{p}attn_q", q_dim, c.dim)
        yield from _linear(f"{p}attn_k", kv_dim, c.dim)
        yield from _linear(f"{p}attn_v", kv_dim, c.dim)
        yield from _linear(f"{p}attn_output", c.dim, q_dim)
        yield WeightSpec(f"{p}ffn_norm.weight", (c.dim,), "vector")
        yield from _linear(f"{p}ffn_gate", c.ffn_dim, c.dim)
        yield from _linear(f"{p}ffn_up", c.ffn_dim, c.dim)
        yield from _linear(f"{p}ffn_down", c.dim, c.ffn_dim)


def _linear(name: str, rows: int, cols: int) -> Iterator[WeightSpec]:
    yield WeightSpec(f"{name}.weight", (rows, cols), "matmul")
    yield WeightSpec(f"{name}.bias", (rows,), "vector", optional=True)


def build(c: ModelConfig, g: Graph, rope_factors: np.ndarray | None) -> None:
    """The graph, from `g.tokens` to `g.logits`. T: tokens of the step, R: rows whose logits are wanted."""
    # llama.cpp's converter permutes Q and K so that neighbours (2i, 2i + 1) turn together
    rotation = Rotation("adjacent", c.rope_frequencies(rope_factors), c.rope_scaling.magnitude)
    x = g.buffer(c.dim)  # [T, dim], the residual stream
    h = g.buffer(c.dim)  # [T, dim], the normalised input of a sub-block
    o = g.buffer(c.dim)  # [T, dim], what a sub-block adds to x
    q = g.buffer(c.n_heads * c.head_dim)  # [T, heads * head_dim]
    k = g.buffer(c.n_kv_heads * c.head_dim)  # [T, kv_heads * head_dim]
    v = g.buffer(c.n_kv_heads * c.head_dim)
    a = g.buffer(c.n_heads * c.head_dim)  # [T, heads * head_dim], heads side by side
    f = g.buffer(c.ffn_dim)  # [T, ffn_dim]

    g.embed(x, "token_embd")
    g.rmsnorm(h, x, "blk.0.attn_norm", c.rms_eps)
    for layer in range(c.n_layers):
        p = f"blk.{layer}."
        # x += W_o attend(rope(W_q h), rope(W_k h), W_v h)
        g.matmul_group((q, k, v), h, (f"{p}attn_q", f"{p}attn_k", f"{p}attn_v"))
        g.rope_pair(q, k, p, c, rotation)
        g.attention(a, q, k, v, f"{p}attention", c)
        g.matmul(o, a, f"{p}attn_output")
        g.add_rmsnorm(h, x, o, f"{p}attn_residual", f"{p}ffn_norm", c.rms_eps)
        # x += W_down (silu(W_gate h) * W_up h)
        g.gate_up_swiglu(f, h, f"{p}ffn_gate", f"{p}ffn_up", f"{p}ffn_swiglu")
        g.matmul(o, f, f"{p}ffn_down")
        if layer + 1 < c.n_layers:  # each norm joins the addition before it, so that a provider can fuse the two
            g.add_rmsnorm(h, x, o, f"{p}out", f"blk.{layer + 1}.attn_norm", c.rms_eps)
        else:
            g.add(x, o, f"{p}out")

    last = g.gather(x, "output_rows")  # [R, dim]
    normed = g.buffer(c.dim)
    g.rmsnorm(normed, last, "output_norm", c.rms_eps)
    g.logits = g.buffer(c.vocab_size)  # [R, vocab]
    g.matmul(g.logits, normed, "output", weight=None if g.has("output.weight") else "token_embd")
