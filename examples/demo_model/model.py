"""The Llama architecture in PyTorch, as small as it goes: RMSNorm, rotary positions, grouped KV heads, SwiGLU.

Names and layouts are those of the GGUF file, so that export.py only has to write them down.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """Sizes of the model: 2.95 million weights, 3.2 MB in Q8_0. Deep and narrow, because to copy a word of the question takes
    more than one layer."""

    vocab: int = 3072
    width: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    hidden: int = 512
    context: int = 1024
    rope_base: float = 10000.0
    eps: float = 1e-5

    @property
    def head_size(self) -> int:
        return self.width // self.heads


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + swiglu(norm(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv_width = shape.kv_heads * shape.head_size
        self.attn_norm = RMSNorm(shape.width, shape.eps)
        self.attn_q = nn.Linear(shape.width, shape.width, bias=False)
        self.attn_k = nn.Linear(shape.width, kv_width, bias=False)
        self.attn_v = nn.Linear(shape.width, kv_width, bias=False)
        self.attn_output = nn.Linear(shape.width, shape.width, bias=False)
        self.ffn_norm = RMSNorm(shape.width, shape.eps)
        self.ffn_gate = nn.Linear(shape.width, shape.hidden, bias=False)
        self.ffn_up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.ffn_down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.attention(self.attn_norm(x), rotation)
        y = self.ffn_norm(x)
        return x + self.ffn_down(functional.silu(self.ffn_gate(y)) * self.ffn_up(y))

    def attention(self, x: Tensor, rotation: Tensor) -> Tensor:
        batch, length, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, length, -1, self.shape.head_size).transpose(1, 2)

        q, k = rotate(heads(self.attn_q(x)), rotation), rotate(heads(self.attn_k(x)), rotation)
        group = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(group, 1), heads(self.attn_v(x)).repeat_interleave(group, 1)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attn_output(y.transpose(1, 2).reshape(batch, length, -1))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Pairs of neighbours turned by their angle, GGUF's order for this architecture. x: [batch, heads, length, size]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = rotation[0, : x.shape[2]], rotation[1, : x.shape[2]]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Llama(nn.Module):
    """Logits [batch, length, vocab] of ids [batch, length]. The embedding is the output matrix, too."""

    rotation: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.vocab, shape.width)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.output_norm = RMSNorm(shape.width, shape.eps)
        frequencies = shape.rope_base ** -(torch.arange(0, shape.head_size, 2) / shape.head_size)
        angles = torch.outer(torch.arange(shape.context), frequencies)
        self.register_buffer("rotation", torch.stack((angles.cos(), angles.sin())), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(("attn_output.weight", "ffn_down.weight")):  # as many add up as there are layers
                nn.init.normal_(parameter, std=0.02 / (2 * shape.layers) ** 0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_embd(ids)
        for block in self.blk:
            x = block(x, self.rotation)
        return functional.linear(self.output_norm(x), self.token_embd.weight)
