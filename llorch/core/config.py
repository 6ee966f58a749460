"""What a model file says about its own shape: hyperparameters from GGUF metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llorch.core.gguf import GGUFFile, describe
from llorch.core.models import ARCHITECTURES
from llorch.core.rope import KINDS, RopeScaling
from llorch.errors import GGUFError, UnsupportedModelError

RECONVERT = "convert the model again with a current converter"


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
    rope_scaling: RopeScaling  # rope.scaling.*
    window: int | None  # attention.sliding_window: how many tokens a query sees, itself included; None for all
    attention_scale: float  # attention.scale; 1 / sqrt(head_dim) by default
    quant_kind: str  # the weight type that holds most bytes

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> ModelConfig:
        """Raises GGUFError for a missing or senseless value, UnsupportedModelError for what llorch does not do."""
        return _read(file)

    def rope_frequencies(self, factors: np.ndarray | None = None) -> tuple[float, ...]:
        """Radians per position of each rotated pair, scaling included; `factors` [rope_dim / 2] divide them."""
        return self.rope_scaling.frequencies(self.rope_dim, self.rope_base, factors)


class _Reader:
    """Numbers under one architecture's prefix, each checked against its sensible range."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = 1 << 31) -> int:
        value = self._value(key, default)
        if isinstance(value, np.ndarray):  # per layer; llorch serves models whose layers agree
            value = self._same_everywhere(key, value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise GGUFError(f"{self.where(key)} is {describe(value)}, expected an integer; {RECONVERT}")
        if not low <= value <= high:
            raise GGUFError(f"{self.where(key)} is {value}, expected {low} to {high}; {RECONVERT}")
        return value

    def number(self, key: str, default: float | None = None, *, low: float = 0.0) -> float:
        """A finite number above `low`."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise GGUFError(f"{self.where(key)} is {describe(value)}, expected a number; {RECONVERT}")
        if not np.isfinite(value) or value <= low:
            raise GGUFError(f"{self.where(key)} is {value}, expected a finite number above {low:g}; {RECONVERT}")
        return float(value)

    def where(self, key: str) -> str:
        """File, field and offset, as messages begin."""
        return f"{self.file.path}: {self.file.where(f'{self.architecture}.{key}')}"

    def _value(self, key: str, default: Any) -> Any:
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise GGUFError(f"{self.where(key)} is missing; the file cannot be served without it")
        return value

    def _same_everywhere(self, key: str, values: np.ndarray) -> Any:
        distinct = np.unique(values).tolist()
        if len(distinct) == 1:
            return distinct[0]
        if not distinct:
            raise GGUFError(f"{self.where(key)} has 0 entries, expected one a layer; {RECONVERT}")
        raise UnsupportedModelError(
            f"{self.where(key)} differs from layer to layer, from {distinct[0]} to {distinct[-1]}: not supported"
        )


def _read(file: GGUFFile) -> ModelConfig:
    architecture = file.get("general.architecture", str)
    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModelError(
            f"{file.path}: architecture {architecture[:80]!r} is not supported; supported: {known}"
        )
    read = _Reader(file, architecture)
    dim, n_heads = read.integer("embedding_length"), read.integer("attention.head_count", high=1 << 16)
    n_kv_heads = read.integer("attention.head_count_kv", n_heads, high=1 << 16)
    head_dim = read.integer("attention.key_length", dim // n_heads or 1, high=1 << 16)
    _check_heads(file, read, dim, n_heads, n_kv_heads, head_dim)
    rope_dim = read.integer("rope.dimension_count", head_dim, low=2, high=head_dim)
    if rope_dim % 2:
        raise GGUFError(f"{read.where('rope.dimension_count')} is {rope_dim}, expected an even number; {RECONVERT}")
    context_length = read.integer("context_length")
    return ModelConfig(
        name=file.get("general.name", str, "") or file.path.stem,
        architecture=architecture,
        n_layers=read.integer("block_count", high=1 << 12),
        dim=dim,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=read.integer("feed_forward_length"),
        vocab_size=_vocab_size(file, read),
        context_length=context_length,
        rms_eps=read.number("attention.layer_norm_rms_epsilon"),
        rope_dim=rope_dim,
        rope_base=read.number("rope.freq_base", 10000.0, low=1.0),
        rope_scaling=_rope_scaling(file, read, context_length),
        window=_window(file, read),
        attention_scale=read.number("attention.scale", head_dim**-0.5),
        quant_kind=_quant_kind(file),
    )


def _check_heads(file: GGUFFile, read: _Reader, dim: int, n_heads: int, n_kv_heads: int, head_dim: int) -> None:
    if f"{read.architecture}.attention.key_length" not in file.metadata and dim % n_heads:
        raise GGUFError(
            f"{read.where('embedding_length')} is {dim}, which is not a multiple of attention.head_count {n_heads}; "
            f"{RECONVERT}"
        )
    if n_heads % n_kv_heads:
        raise GGUFError(
            f"{read.where('attention.head_count')} is {n_heads}, which is not a multiple of attention.head_count_kv "
            f"{n_kv_heads}; {RECONVERT}"
        )
    value_dim = read.integer("attention.value_length", head_dim)
    if value_dim != head_dim:
        raise UnsupportedModelError(
            f"{read.where('attention.value_length')} is {value_dim}, key_length is {head_dim}: only equal ones are "
            "supported"
        )
    if experts := read.integer("expert_count", 0, low=0):
        raise UnsupportedModelError(f"{read.where('expert_count')}: a mixture of {experts} experts is not supported")


def _vocab_size(file: GGUFFile, read: _Reader) -> int:
    """The embedding table is the truth; the metadata's count may be absent or padded."""
    table = file.tensors.get("token_embd.weight")
    if table is not None and len(table.shape) == 2:
        return table.shape[0]
    return read.integer("vocab_size")


def _rope_scaling(file: GGUFFile, read: _Reader, context_length: int) -> RopeScaling:
    """Defaults are llama.cpp's. Older files carry `rope.scale_linear` instead of `rope.scaling.*`."""
    kind = file.get(f"{read.architecture}.rope.scaling.type", str, "linear")
    if kind not in KINDS:
        raise UnsupportedModelError(
            f"{read.where('rope.scaling.type')} is {kind[:80]!r}: not supported; supported: {', '.join(KINDS)}"
        )
    extrapolation = read.number("rope.scaling.yarn_ext_factor", 1.0, low=-2.0)
    return RopeScaling(
        kind=kind,
        factor=read.number("rope.scaling.factor", read.number("rope.scale_linear", 1.0)),
        original_context=read.integer("rope.scaling.original_context_length", context_length),
        attention_factor=read.number("rope.scaling.attn_factor", 1.0),
        beta_fast=read.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=read.number("rope.scaling.yarn_beta_slow", 1.0),
        extrapolation=1.0 if extrapolation < 0 else extrapolation,  # llama.cpp: below 0 is not set
    )


def _window(file: GGUFFile, read: _Reader) -> int | None:
    """llama.cpp ignores the window of this architecture; Mistral 7B v0.1 was trained with one."""
    window = read.integer("attention.sliding_window", 0, low=0)
    return window or None


def _quant_kind(file: GGUFFile) -> str:
    by_type: dict[str, int] = {}
    for tensor in file.tensors.values():
        by_type[tensor.type] = by_type.get(tensor.type, 0) + tensor.nbytes
    return max(by_type, key=lambda t: by_type[t]) if by_type else "none"
