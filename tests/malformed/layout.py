"""GGUF files byte by byte: any part may be given that no writer would write, and where each part lies is known.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
SIZES = {U8: 1, I8: 1, U16: 2, I16: 2, U32: 4, I32: 4, F32: 4, BOOL: 1, U64: 8, I64: 8, F64: 8}
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}
HEADER_BYTES = 24


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw)) + raw


@dataclass(frozen=True)
class Value:
    """A metadata value: its type's number, and its bytes."""

    kind: int
    payload: bytes


def scalar(kind: int, value: Any) -> Value:
    return Value(kind, text(value) if kind == STRING else struct.pack(f"<{_CODES[kind]}", value))


def array(kind: int, values: Any, count: int | None = None) -> Value:
    """`count`: what the file says of its length."""
    parts = [text(v) if kind == STRING else struct.pack(f"<{_CODES[kind]}", v) for v in values]
    return Value(ARRAY, u32(kind) + u64(len(parts) if count is None else count) + b"".join(parts))


@dataclass(frozen=True)
class TensorPart:
    """`dims` as in the file, the row's length first. `offset`: where the file says its data is; None: where it is."""

    name: str | bytes
    dims: tuple[int, ...]
    data: bytes = b""
    type: int = 0
    offset: int | None = None
    n_dims: int | None = None


@dataclass(frozen=True)
class File:
    """All that a GGUF file has. `bytes()` gives its content, `where()` the offsets of its parts."""

    fields: Mapping[str | bytes, Value]
    tensors: tuple[TensorPart, ...]
    alignment: int = 32
    version: int = 3
    field_count: int | None = None
    tensor_count: int | None = None
    more_fields: tuple[tuple[str | bytes, Value], ...] = ()  # behind the others: keys may repeat there
    _where: dict[str, int] = field(default_factory=dict, compare=False)

    def but(self, **changes: Any) -> File:
        return replace(self, _where={}, **changes)

    def with_field(self, key: str | bytes, value: Value) -> File:
        return self.but(fields={**self.fields, key: value})

    def without_field(self, key: str) -> File:
        return self.but(fields={k: v for k, v in self.fields.items() if k != key})

    def with_tensor(self, name: str, **changes: Any) -> File:
        return self.but(tensors=tuple(replace(t, **changes) if t.name == name else t for t in self.tensors))

    def without_tensor(self, name: str) -> File:
        return self.but(tensors=tuple(t for t in self.tensors if t.name != name))

    def bytes(self) -> bytes:
        fields = [*self.fields.items(), *self.more_fields]
        out = bytearray(b"GGUF" + u32(self.version))
        out += u64(len(self.tensors) if self.tensor_count is None else self.tensor_count)
        out += u64(len(fields) if self.field_count is None else self.field_count)
        for key, value in fields:
            self._where[f"key {key!s}"] = len(out)
            out += text(key) + u32(value.kind)
            self._where[str(key)] = len(out)
            out += value.payload
        data = bytearray()
        for tensor in self.tensors:
            self._where[f"info {tensor.name!s}"] = len(out)
            data += bytes(-len(data) % self.alignment)
            self._where[f"data {tensor.name!s}"] = len(data)
            out += text(tensor.name)
            self._where[f"dims {tensor.name!s}"] = len(out)
            out += u32(len(tensor.dims) if tensor.n_dims is None else tensor.n_dims)
            out += b"".join(map(u64, tensor.dims)) + u32(tensor.type)
            out += u64(len(data) if tensor.offset is None else tensor.offset)
            data += tensor.data
        self._where["end of header"] = len(out)
        out += bytes(-len(out) % self.alignment)
        for tensor in self.tensors:
            self._where[f"data {tensor.name!s}"] += len(out)
        return bytes(out + data)

    def where(self) -> dict[str, int]:
        """Offsets: a field's value by its key, `key K`, `info T`, `dims T` and `data T` of a tensor."""
        self.bytes()
        return self._where


# ---- a model that loads ----

DIM, FFN, HEADS, WORDS = 64, 96, 2, 4
VOCAB = 259 + WORDS


def _floats(rng: np.random.Generator, *shape: int) -> bytes:
    return (0.1 * rng.standard_normal(shape)).astype(np.float32).tobytes()


def tiny() -> File:
    """One layer, float32, a SentencePiece vocabulary of bytes and a few words."""
    rng = np.random.default_rng(0)
    p = "blk.0."
    matrices = {
        "token_embd": (VOCAB, DIM),
        "output": (VOCAB, DIM),
        p + "attn_q": (DIM, DIM),
        p + "attn_k": (DIM, DIM),
        p + "attn_v": (DIM, DIM),
        p + "attn_output": (DIM, DIM),
        p + "ffn_gate": (FFN, DIM),
        p + "ffn_up": (FFN, DIM),
        p + "ffn_down": (DIM, FFN),
    }
    tensors = [
        TensorPart(f"{n}.weight", (cols, rows), _floats(rng, rows, cols)) for n, (rows, cols) in matrices.items()
    ]
    tensors += [
        TensorPart(f"{n}.weight", (DIM,), _floats(rng, DIM)) for n in ("output_norm", p + "attn_norm", p + "ffn_norm")
    ]
    return File({**hyperparameters(), **vocabulary()}, tuple(tensors))


def hyperparameters() -> dict[str | bytes, Value]:
    return {
        "general.architecture": scalar(STRING, "llama"),
        "general.name": scalar(STRING, "malformed"),
        "general.alignment": scalar(U32, 32),
        "llama.context_length": scalar(U32, 64),
        "llama.embedding_length": scalar(U32, DIM),
        "llama.block_count": scalar(U32, 1),
        "llama.feed_forward_length": scalar(U32, FFN),
        "llama.attention.head_count": scalar(U32, HEADS),
        "llama.attention.head_count_kv": scalar(U32, HEADS),
        "llama.attention.layer_norm_rms_epsilon": scalar(F32, 1e-5),
        "llama.rope.dimension_count": scalar(U32, DIM // HEADS),
        "llama.rope.freq_base": scalar(F32, 10000.0),
    }


def vocabulary() -> dict[str | bytes, Value]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *(f"w{i}" for i in range(WORDS))]
    return {
        "tokenizer.ggml.model": scalar(STRING, "llama"),
        "tokenizer.ggml.tokens": array(STRING, tokens),
        "tokenizer.ggml.scores": array(F32, [0.0] * 259 + [-float(i) for i in range(WORDS)]),
        "tokenizer.ggml.token_type": array(I32, [2, 3, 3] + [6] * 256 + [1] * WORDS),
        "tokenizer.ggml.bos_token_id": scalar(U32, 1),
        "tokenizer.ggml.eos_token_id": scalar(U32, 2),
        "tokenizer.ggml.unknown_token_id": scalar(U32, 0),
        "tokenizer.ggml.add_bos_token": scalar(BOOL, True),
    }


def byte_level() -> dict[str | bytes, Value]:
    """A byte-level BPE vocabulary: the 256 bytes as GPT-2 writes them, and what two merges make."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = (chr(256 + i) for i in range(256))
    letters = [chr(b) if b in printable else next(spare) for b in range(256)]
    tokens = [*letters, "he", "hel", *(f"<|{i}|>" for i in range(VOCAB - 258))]
    return {
        "tokenizer.ggml.model": scalar(STRING, "gpt2"),
        "tokenizer.ggml.pre": scalar(STRING, "gpt-2"),
        "tokenizer.ggml.tokens": array(STRING, tokens),
        "tokenizer.ggml.token_type": array(I32, [1] * 258 + [3] * (VOCAB - 258)),
        "tokenizer.ggml.merges": array(STRING, ["h e", "he l"]),
        "tokenizer.ggml.bos_token_id": scalar(U32, 259),
        "tokenizer.ggml.eos_token_id": scalar(U32, 260),
    }
