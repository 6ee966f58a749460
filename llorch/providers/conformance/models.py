"""Whole tiny models: written by the suite, computed by the oracle in float64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from llorch.providers.conformance import oracle
from llorch.providers.conformance.weights import random_blocks
from llorch.providers.spec import AttentionSpec, RopeSpec

Float = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """Shapes and weight type of a random Llama model."""

    type: str = "F32"
    dim: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 512
    vocab: int = 300
    context: int = 256
    tied: bool = False
    biases: bool = False
    rope_factors: bool = False
    rope_scale: float = 1.0
    window: int | None = None
    gain: float = 1.0  # of the sub-blocks over the embedding: a tied model of gain 1 repeats its input
    seed: int = 0
    eos_id: int = 2

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


def layer_matrices(m: TinyModel) -> dict[str, tuple[int, int]]:
    """(rows, columns) of a layer's matrices."""
    kv = m.kv_heads * m.head_dim
    attention = {"attn_q": (m.dim, m.dim), "attn_k": (kv, m.dim), "attn_v": (kv, m.dim), "attn_output": (m.dim, m.dim)}
    return attention | {"ffn_gate": (m.ffn, m.dim), "ffn_up": (m.ffn, m.dim), "ffn_down": (m.dim, m.ffn)}


Tensors = dict[str, tuple[str, npt.NDArray[np.uint8], tuple[int, ...]]]  # name -> type, raw data, shape


def tensors_of(m: TinyModel) -> Tensors:
    """Random weights whose activations stay near one in every layer."""
    rng = np.random.default_rng(m.seed)
    made: Tensors = {}

    def matrix(name: str, rows: int, cols: int, kind: str | None = None) -> None:
        kind = kind or m.type
        made[name] = (kind, random_blocks(rng, kind, rows, cols), (rows, cols))

    def vector(name: str, values: npt.NDArray[np.floating]) -> None:
        made[name] = ("F32", np.ascontiguousarray(values, np.float32).view(np.uint8), values.shape)

    matrix("token_embd.weight", m.vocab, m.dim)
    vector("output_norm.weight", 1 + 0.1 * rng.standard_normal(m.dim))
    if not m.tied:
        matrix("output.weight", m.vocab, m.dim)
    if m.rope_factors:
        vector("rope_freqs.weight", np.linspace(1, 8, m.head_dim // 2))
    for layer in range(m.layers):
        p = f"blk.{layer}."
        # a norm's weight takes the size of the random matrices behind it out again
        vector(p + "attn_norm.weight", (1 + 0.1 * rng.standard_normal(m.dim)) * m.gain * m.dim**-0.5)
        vector(p + "ffn_norm.weight", (1 + 0.1 * rng.standard_normal(m.dim)) * m.gain * m.dim**-0.5)
        for name, (rows, cols) in layer_matrices(m).items():
            matrix(f"{p}{name}.weight", rows, cols)
            if m.biases:
                vector(f"{p}{name}.bias", 0.1 * rng.standard_normal(rows))
    return made


def write_model(m: TinyModel, path: Path) -> Path:
    """The model as a GGUF file, with a byte vocabulary so that any text can be tokenized."""
    w = gguf.GGUFWriter(str(path), "llama")
    write_metadata(w, m, "conformance")
    for name, (kind, data, shape) in tensors_of(m).items():
        quantized = gguf.GGMLQuantizationType[kind]
        if kind == "F32":
            w.add_tensor(name, data.view(np.float32).reshape(shape))
        elif kind == "F16":
            w.add_tensor(name, data.view(np.float16).reshape(shape))
        else:
            w.add_tensor(name, data.reshape(shape[0], -1), raw_dtype=quantized)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def write_metadata(w: gguf.GGUFWriter, m: TinyModel, name: str) -> None:
    """Shapes and the byte vocabulary."""
    w.add_name(name)
    w.add_context_length(m.context)
    w.add_embedding_length(m.dim)
    w.add_block_count(m.layers)
    w.add_feed_forward_length(m.ffn)
    w.add_head_count(m.heads)
    w.add_head_count_kv(m.kv_heads)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(m.head_dim)
    w.add_rope_freq_base(10000.0)
    if m.rope_scale != 1.0:
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(m.rope_scale)
    if m.window is not None:
        w.add_sliding_window(m.window)
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    tokens += [f"w{i}" for i in range(m.vocab - len(tokens))]
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens)
    w.add_token_scores([0.0] * 259 + [-float(i) for i in range(m.vocab - 259)])
    w.add_token_types([2, 3, 3] + [6] * 256 + [1] * (m.vocab - 259))
    w.add_bos_token_id(1)
    w.add_eos_token_id(m.eos_id)
    w.add_unk_token_id(0)


class OracleModel:
    """The same model in float64, one whole prompt at a time."""

    def __init__(self, m: TinyModel) -> None:
        self.m = m
        self.w: dict[str, Float] = {}
        for name, (kind, data, shape) in tensors_of(m).items():
            rows = data.reshape(*shape[:-1], -1)
            values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
            self.w[name] = np.asarray(values, np.float64).reshape(shape)
        frequencies = 10000.0 ** -(np.arange(0, m.head_dim, 2) / m.head_dim) / m.rope_scale
        if m.rope_factors:
            frequencies = frequencies / self.w["rope_freqs.weight"]
        self._frequencies = tuple(float(f) for f in frequencies)

    def logits(self, tokens: list[int]) -> Float:
        """Logits [T, vocab] of every position."""
        m, positions = self.m, np.arange(len(tokens), dtype=np.int32)
        attention = AttentionSpec(
            max_tokens=m.context, heads=m.heads, kv_heads=m.kv_heads, head_dim=m.head_dim, scale=m.head_dim**-0.5,
            block_size=16, max_blocks=1, max_sequences=1, cache_dtype="f32", window=m.window,
        )  # fmt: skip
        x = self.w["token_embd.weight"][tokens]
        for layer in range(m.layers):
            p = f"blk.{layer}."
            h = oracle.rmsnorm(x, self.w[p + "attn_norm.weight"], 1e-5)
            q, k, v = (self._linear(p + name, h) for name in ("attn_q", "attn_k", "attn_v"))
            q, k = self._rope(q, m.heads, positions), self._rope(k, m.kv_heads, positions)
            x = x + self._linear(p + "attn_output", oracle.attention(q, k, v, 0, attention))
            h = oracle.rmsnorm(x, self.w[p + "ffn_norm.weight"], 1e-5)
            f = oracle.swiglu(self._linear(p + "ffn_gate", h), self._linear(p + "ffn_up", h))
            x = x + self._linear(p + "ffn_down", f)
        h = oracle.rmsnorm(x, self.w["output_norm.weight"], 1e-5)
        return oracle.matmul(h, self.w["token_embd.weight" if m.tied else "output.weight"])

    def greedy(self, prompt: list[int], count: int) -> tuple[list[int], float]:
        """`count` most likely tokens, and the smallest margin over the second, in standard deviations of the logits."""
        tokens, margin = list(prompt), np.inf
        for _ in range(count):
            last = self.logits(tokens)[-1]
            second, first = np.sort(last)[-2:]
            margin = min(margin, (first - second) / last.std())
            tokens.append(int(last.argmax()))
        return tokens[len(prompt) :], float(margin)

    def _linear(self, name: str, x: Float) -> Float:
        return oracle.matmul(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def _rope(self, x: Float, heads: int, positions: npt.NDArray[np.int32]) -> Float:
        spec = RopeSpec(
            max_tokens=self.m.context, heads=heads, head_dim=self.m.head_dim, pairing="adjacent",
            frequencies=self._frequencies,
        )  # fmt: skip
        return oracle.rope(x, positions, spec)
