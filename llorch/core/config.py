"""What a model file says about its own shape: hyperparameters from GGUF metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llorch.core.gguf import GGUFFile
from llorch.core.models import ARCHITECTURES
from llorch.errors import GGUFError, UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Hyperparameters under the field's usual names; in brackets the GGUF key behind `<architecture>.`."""

    name: str
    architecture: str
    n_layers: int  # block_count
    dim: int  # embedding_length
    n_heads: int  # attention.head_count
    n_kv_heads: int  # attention.head_count_kv
    head_dim: int  # attention.key_length
    ffn_dim: int  # feed_forward_length
    vocab_size: int
    context_length: int
    rms_eps: float  # attention.layer_norm_rms_epsilon
    rope_dim: int  # rope.dimension_count
    rope_base: float  # rope.freq_base
    rope_scale: float  # linear scaling: positions are divided by it
    attention_scale: float  # attention.scale; 1 / sqrt(head_dim) by default
    quant_kind: str  # the weight type that holds most bytes

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> ModelConfig:
        """Raises GGUFError for a missing or senseless value, UnsupportedModelError for what llorch does not do."""
        return _read(file)

    def rope_frequencies(self, factors: np.ndarray | None = None) -> tuple[float, ...]:
        """Radians per position of each rotated pair: base^(-2i/d) / scale / factor_i (RoFormer, section 3.2.2)."""
        exponents = np.arange(0, self.rope_dim, 2, dtype=np.float64) / self.rope_dim
        frequencies = self.rope_base**-exponents / self.rope_scale
        if factors is not None:
            frequencies = frequencies / factors.astype(np.float64)
        return tuple(float(f) for f in frequencies)


class _Reader:
    """Numbers under one architecture's prefix, each checked against its sensible range."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = 1 << 31) -> int:
        full = f"{self.architecture}.{key}"
        value: Any = self.file.metadata.get(full, default)
        if value is None:
            raise GGUFError(f"{self.file.path}: metadata field {full} is missing; the file cannot be served without it")
        if isinstance(value, np.ndarray):  # per layer; llorch serves models whose layers agree
            distinct = sorted({int(v) for v in value})
            if len(distinct) != 1:
                raise UnsupportedModelError(
                    f"{self.file.path}: {full} differs from layer to layer ({distinct}): not supported"
                )
            value = distinct[0]
        if isinstance(value, bool) or not isinstance(value, int):
            raise GGUFError(f"{self.file.path}: metadata field {full} is {value!r}, expected an integer")
        if not low <= value <= high:
            raise GGUFError(f"{self.file.path}: metadata field {full} is {value}, expected {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        full = f"{self.architecture}.{key}"
        value: Any = self.file.metadata.get(full, default)
        if value is None:
            raise GGUFError(f"{self.file.path}: metadata field {full} is missing; the file cannot be served without it")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise GGUFError(f"{self.file.path}: metadata field {full} is {value!r}, expected a number")
        if not np.isfinite(value) or value <= 0:
            raise GGUFError(f"{self.file.path}: metadata field {full} is {value}, expected a positive number")
        return float(value)


def _read(file: GGUFFile) -> ModelConfig:
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise GGUFError(f"{file.path}: metadata field general.architecture is missing or no string")
    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModelError(f"{file.path}: architecture {architecture!r} is not supported; supported: {known}")
    read = _Reader(file, architecture)
    dim, n_heads = read.integer("embedding_length"), read.integer("attention.head_count", high=1 << 16)
    n_kv_heads = read.integer("attention.head_count_kv", n_heads, high=1 << 16)
    head_dim = read.integer("attention.key_length", dim // n_heads or 1, high=1 << 16)
    _check_heads(file, read, dim, n_heads, n_kv_heads, head_dim)
    rope_dim = read.integer("rope.dimension_count", head_dim, low=2, high=head_dim)
    if rope_dim % 2:
        raise GGUFError(f"{file.path}: {architecture}.rope.dimension_count is {rope_dim}, expected an even number")
    return ModelConfig(
        name=str(file.metadata.get("general.name") or file.path.stem),
        architecture=architecture,
        n_layers=read.integer("block_count", high=1 << 12),
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=read.integer("feed_forward_length"),
        vocab_size=_vocab_size(file, read),
        context_length=read.integer("context_length"),
        rms_eps=read.number("attention.layer_norm_rms_epsilon"),
        rope_dim=rope_dim,
        rope_base=read.number("rope.freq_base", 10000.0),
        rope_scale=_rope_scale(file, read),
        attention_scale=read.number("attention.scale", head_dim**-0.5),
        quant_kind=_quant_kind(file),
    )


def _check_heads(file: GGUFFile, read: _Reader, dim: int, n_heads: int, n_kv_heads: int, head_dim: int) -> None:
    if "attention.key_length" not in {k.removeprefix(read.architecture + ".") for k in file.metadata} and dim % n_heads:
        raise GGUFError(f"{file.path}: embedding_length {dim} is not a multiple of attention.head_count {n_heads}")
    if n_heads % n_kv_heads:
        raise GGUFError(
            f"{file.path}: attention.head_count {n_heads} is not a multiple of attention.head_count_kv {n_kv_heads}"
        )
    value_dim = read.integer("attention.value_length", head_dim)
    if value_dim != head_dim:
        raise UnsupportedModelError(
            f"{file.path}: attention.value_length {value_dim} and key_length {head_dim} differ: not supported"
        )
    if read.integer("expert_count", 0, low=0):
        raise UnsupportedModelError(f"{file.path}: a mixture of experts (expert_count > 0) is not supported")


def _vocab_size(file: GGUFFile, read: _Reader) -> int:
    """The embedding table is the truth; the metadata's count may be absent or padded."""
    table = file.tensors.get("token_embd.weight")
    if table is not None and len(table.shape) == 2:
        return table.shape[0]
    return read.integer("vocab_size")


def _rope_scale(file: GGUFFile, read: _Reader) -> float:
    """The factor of linear scaling, 1 for none. Older files carry `rope.scale_linear` instead of `rope.scaling.*`."""
    kind = file.metadata.get(f"{read.architecture}.rope.scaling.type")
    if kind in ("linear", None):
        legacy = read.number("rope.scale_linear", 1.0)
        return read.number("rope.scaling.factor", legacy)
    if kind == "none":
        return 1.0
    raise UnsupportedModelError(
        f"{file.path}: RoPE scaling {kind!r} is not supported; supported: none, linear, and rope_freqs.weight"
    )


def _quant_kind(file: GGUFFile) -> str:
    by_type: dict[str, int] = {}
    for tensor in file.tensors.values():
        by_type[tensor.type] = by_type.get(tensor.type, 0) + tensor.nbytes
    return max(by_type, key=lambda t: by_type[t]) if by_type else "none"
