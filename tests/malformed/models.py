"""Well-formed GGUF files that are no model: hyperparameters, tensors and weights that cannot be served."""

from __future__ import annotations

import math
from collections.abc import Iterator

import gguf
import numpy as np

from tests.malformed.case import Case, of
from tests.malformed.layout import (
    BOOL,
    DIM,
    F32,
    I32,
    I64,
    STRING,
    U32,
    U64,
    VOCAB,
    TensorPart,
    Value,
    array,
    scalar,
    tiny,
)

TINY = tiny()
UNSUPPORTED = "UnsupportedModelError"
WRONG_TYPES: dict[str, Value] = {
    "a string": scalar(STRING, "64"),
    "a float": scalar(F32, 64.0),
    "a boolean": scalar(BOOL, True),
    "an array of strings": array(STRING, ["64"]),
}
INTEGERS = [
    "general.alignment",
    "llama.context_length",
    "llama.embedding_length",
    "llama.block_count",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.rope.dimension_count",
    "llama.attention.sliding_window",
]
NUMBERS = ["llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base", "llama.rope.scaling.factor"]
REQUIRED = [
    "general.architecture",
    "llama.context_length",
    "llama.embedding_length",
    "llama.block_count",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.layer_norm_rms_epsilon",
]


def models() -> Iterator[Case]:
    for part in (_types, _numbers, _heads, _scaling, _tensors, _weights):
        yield from part()


def _types() -> Iterator[Case]:
    for key in INTEGERS:
        for name, value in WRONG_TYPES.items():
            yield of(f"{key} is {name}", TINY.with_field(key, value), f"field {key}", "expected an integer", where=key)
    for key in NUMBERS:
        for name in ("a string", "a boolean", "an array of strings"):
            file = TINY.with_field(key, WRONG_TYPES[name])
            yield of(f"{key} is {name}", file, f"field {key}", "expected a number", where=key)
    for key in ("general.architecture", "general.name", "llama.rope.scaling.type"):
        for name, value in {"a number": scalar(U32, 3), "an array": array(STRING, ["llama"])}.items():
            file = TINY.with_field(key, value)
            yield of(f"{key} is {name}", file, f"field {key}", "expected a string", where=key)
    for key in REQUIRED:
        yield of(f"no {key}", TINY.without_field(key), f"metadata field {key} is missing")


def _numbers() -> Iterator[Case]:
    ranges = {
        "llama.context_length": (0, 1 << 32),
        "llama.embedding_length": (0, 1 << 40),
        "llama.block_count": (0, 4097, 10**9),
        "llama.feed_forward_length": (0, 1 << 62),
        "llama.attention.head_count": (0, 65537),
        "llama.attention.head_count_kv": (0, 65537),
        "llama.rope.dimension_count": (0, 1, 31, 33, 64),
    }
    for key, values in ranges.items():
        for value in values:
            file = TINY.with_field(key, scalar(U64, value))
            said = f"is {value}, expected an even number" if value == 31 else f"is {value}, expected"
            yield of(f"{key} is {value}", file, f"field {key}", said, where=key)
    for key in (
        "llama.block_count",
        "llama.embedding_length",
        "llama.attention.head_count",
        "llama.attention.sliding_window",
    ):
        yield of(f"{key} is -1", TINY.with_field(key, scalar(I64, -1)), f"field {key}", "is -1, expected", where=key)
    for key in NUMBERS:
        for value in (0.0, -1.0, math.nan, math.inf, -math.inf):
            file = TINY.with_field(key, scalar(F32, value))
            said = f"is {value}, expected a finite number above {int(key.endswith('freq_base'))}"
            yield of(f"{key} is {value}", file, f"field {key}", said, where=key)
    layers = {"[]": [], "[2, 1]": [2, 1]}
    for name, values in layers.items():
        file = TINY.with_field("llama.attention.head_count", array(U32, values))
        said = ("from 1 to 2: not supported",) if values else ("has 0 entries, expected one a layer",)
        error = UNSUPPORTED if values else "GGUFError"
        yield of(f"head_count {name}", file, *said, where="llama.attention.head_count", error=error)


def _heads() -> Iterator[Case]:
    def put(key: str, value: int) -> object:
        return TINY.with_field(key, scalar(U32, value))

    count, kv = "llama.attention.head_count", "llama.attention.head_count_kv"
    yield of(
        "heads that don't divide the width", put(count, 3), "is 64, which is not a multiple of attention.head_count 3"
    )  # type: ignore[arg-type]
    yield of(
        "key heads that don't divide the heads",
        put(kv, 3),
        "is 2, which is not a multiple of attention.head_count_kv 3",
    )  # type: ignore[arg-type]
    value = TINY.with_field("llama.attention.value_length", scalar(U32, 16))
    yield of("keys and values of other lengths", value, "value_length", "is 16, key_length is 32", error=UNSUPPORTED)
    experts = TINY.with_field("llama.expert_count", scalar(U32, 8))
    yield of("experts", experts, "mixture of 8 experts", error=UNSUPPORTED)
    key_length = TINY.with_field("llama.attention.key_length", scalar(U32, 48))
    yield of("a key length of 48", key_length, "tensor blk.0.attn_q.weight", "(64, 64)", "(96, 64)")
    for name in ("mamba", "", "LLAMA", "x" * 5000):
        file = TINY.with_field("general.architecture", scalar(STRING, name))
        said = (f"architecture {name[:80]!r} is not supported", "supported: ")
        yield of(f"architecture {name[:8]!r}", file, *said, error=UNSUPPORTED)


def _scaling() -> Iterator[Case]:
    kind = "llama.rope.scaling.type"
    for name in ("ntk", "", "YARN"):
        file = TINY.with_field(kind, scalar(STRING, name))
        said = (f"is {name!r}: not supported; supported: none, linear, yarn, longrope",)
        yield of(f"RoPE scaling {name!r}", file, *said, where=kind, error=UNSUPPORTED)
    longrope = TINY.with_field(kind, scalar(STRING, "longrope"))
    yield of("longrope without factors", longrope, "tensor rope_factors_long.weight is missing")
    yarn = TINY.with_field(kind, scalar(STRING, "yarn"))
    for key, value in {"original_context_length": scalar(I32, 0), "yarn_beta_fast": scalar(F32, math.nan)}.items():
        full = f"llama.rope.scaling.{key}"
        yield of(f"yarn, {key}", yarn.with_field(full, value), f"field {full}", "expected", where=full)
    for factor in (0.0, -2.0, math.nan):
        values = np.full(DIM // 4, factor, np.float32)
        values[0] = 1
        file = TINY.but(tensors=(*TINY.tensors, TensorPart("rope_freqs.weight", (DIM // 4,), values.tobytes())))
        said = ("tensor rope_freqs.weight", str(factor))
        yield of(f"a RoPE factor of {factor}", file, *said)
    one = TINY.with_field("llama.rope.freq_base", scalar(F32, 1.0))
    file = one.with_field(kind, scalar(STRING, "yarn"))
    yield of("yarn of base 1", file, "freq_base", "is 1", "above 1", where="llama.rope.freq_base")


def _tensors() -> Iterator[Case]:
    for tensor in TINY.tensors:
        name = str(tensor.name)
        if name != "output.weight":  # tied to the embedding where it is absent
            file = TINY.without_tensor(name)
            # without its table the vocabulary has no size but the metadata's
            said = f"tensor {name} is missing" if name != "token_embd.weight" else "llama.vocab_size is missing"
            yield of(f"no {name}", file, said)
        rows = tensor.dims[1:] or ()
        shapes = {"a row less": (tensor.dims[0], rows[0] - 1) if rows else (tensor.dims[0] - 1,)}
        if rows and rows[0] != tensor.dims[0]:
            shapes["turned"] = (rows[0], tensor.dims[0])
        for what, dims in shapes.items():
            file = TINY.with_tensor(name, dims=dims, data=tensor.data[: 4 * math.prod(dims)])
            if name == "token_embd.weight":
                said = ("tokenizer.ggml.tokens", f"has {VOCAB} tokens", f"{dims[1]} rows")
                yield of(f"{name}, {what}", file, *said, error="TokenizerError")
            else:
                said = (f"tensor {name}", f"{tuple(reversed(dims))}", f"{tuple(reversed(tensor.dims))}")
                yield of(f"{name}, {what}", file, *said, where=f"data {name}")
    for name in ("blk.1.attn_q.weight", "blk.0.attn_q_norm.weight", "blk.0.ffn_gate_inp.weight", "what.is.this"):
        file = TINY.but(tensors=(*TINY.tensors, TensorPart(name, (DIM,), bytes(4 * DIM))))
        said = (f"tensor {name}", "has no place in a llama model of 1 layers", "uses 12 of the file's 13 tensors")
        yield of(f"the tensor {name}", file, *said, where=f"data {name}", error=UNSUPPORTED)
    two = TINY.with_field("llama.block_count", scalar(U32, 2))
    yield of("a layer more than there are", two, "tensor blk.1.attn_norm.weight is missing", "2 layers")
    for kind in (gguf.GGMLQuantizationType.I32, gguf.GGMLQuantizationType.F64, gguf.GGMLQuantizationType.Q8_1):
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        file = TINY.with_tensor("output.weight", type=int(kind), data=bytes(VOCAB * DIM // elements * size))
        said = ("tensor output.weight", f"has type {kind.name}, which cannot be expanded")
        yield of(f"weights of type {kind.name}", file, *said, where="data output.weight", error=UNSUPPORTED)
    no_tensors = TINY.but(tensors=())
    yield of("no tensors", no_tensors, "llama.vocab_size is missing")


# type -> offset of a float16 scale in its block
_SCALES = {"F16": 0, "Q8_0": 0, "Q4_0": 0, "Q4_1": 2, "Q5_0": 0, "IQ4_NL": 0}


def _weights() -> Iterator[Case]:
    for value in (math.nan, math.inf, -math.inf):
        data = bytearray(TINY.tensors[1].data)
        data[404:408] = np.float32(value).tobytes()
        file = TINY.with_tensor("output.weight", data=bytes(data))
        at = file.where()["data output.weight"] + 404
        said = (f"tensor output.weight at offset {at}: the weight is {value}, byte 404 of {len(data)}",)
        yield of(f"a weight is {value}", file, *said)
    for name in ("blk.0.attn_norm.weight", "token_embd.weight"):
        (tensor,) = (t for t in TINY.tensors if t.name == name)
        file = TINY.with_tensor(name, data=np.float32(math.nan).tobytes() + tensor.data[4:])
        yield of(
            f"{name} begins with NaN", file, f"tensor {name}", "the weight is nan, byte 0 of", where=f"data {name}"
        )
    for kind, offset in _SCALES.items():
        number = gguf.GGMLQuantizationType[kind]
        elements, size = gguf.GGML_QUANT_SIZES[number]
        data = bytearray(VOCAB * DIM // elements * size)
        start = 7 * size
        data[start : start + size] = bytes([1]) * size
        data[start + offset : start + offset + 2] = np.float16(math.nan).tobytes()
        file = TINY.with_tensor("output.weight", type=int(number), data=bytes(data))
        at = file.where()["data output.weight"] + start
        yield of(f"a scale of {kind} is NaN", file, f"tensor output.weight at offset {at}: the weight is nan")
    bf16 = bytearray(VOCAB * DIM * 2)
    bf16[10:12] = b"\xc0\x7f"
    file = TINY.with_tensor("output.weight", type=int(gguf.GGMLQuantizationType.BF16), data=bytes(bf16))
    yield of("a weight of BF16 is NaN", file, "tensor output.weight", "the weight is nan, byte 10 of")
