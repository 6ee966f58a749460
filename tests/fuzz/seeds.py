"""The first inputs, of our own making: small files that load, and what is broken about the malformed ones.

python -m tests.fuzz.seeds writes those that tests/fuzz/corpus lacks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from tests.malformed.layout import (
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    File,
    TensorPart,
    Value,
    array,
    byte_level,
    hyperparameters,
    scalar,
    u32,
    u64,
)

CORPUS = Path(__file__).parent / "corpus"
LARGEST = 8192  # bytes of an input: small ones are what mutations get through
DIM, FFN, VOCAB = 8, 4, 6


def small() -> File:
    """A whole model of one layer in 2 KB."""
    p = "blk.0."
    shapes = {
        "token_embd": (VOCAB, DIM),
        **{f"{p}attn_{n}": (DIM, DIM) for n in ("q", "k", "v", "output")},
        **{f"{p}ffn_{n}": (FFN, DIM) for n in ("gate", "up")},
        p + "ffn_down": (DIM, FFN),
    }
    tensors = [TensorPart(f"{n}.weight", (c, r), bytes(4 * r * c)) for n, (r, c) in shapes.items()]
    tensors += [
        TensorPart(f"{n}.weight", (DIM,), bytes(4 * DIM)) for n in ("output_norm", p + "attn_norm", p + "ffn_norm")
    ]
    sizes = {"embedding_length": DIM, "feed_forward_length": FFN, "rope.dimension_count": DIM // 2}
    fields = {**hyperparameters(), **{f"llama.{k}": scalar(U32, v) for k, v in sizes.items()}, **_words()}
    return File(fields, tuple(tensors))


def _words() -> dict[str | bytes, Value]:
    return {
        "tokenizer.ggml.model": scalar(STRING, "llama"),
        "tokenizer.ggml.tokens": array(STRING, ["<unk>", "<s>", "</s>", "<0x41>", "▁a", "b"]),
        "tokenizer.ggml.scores": array(F32, [0.0] * 4 + [-1.0, -2.0]),
        "tokenizer.ggml.token_type": array(I32, [2, 3, 3, 6, 1, 4]),
        "tokenizer.ggml.bos_token_id": scalar(U32, 1),
        "tokenizer.ggml.eos_token_id": scalar(U32, 2),
        "tokenizer.ggml.unknown_token_id": scalar(U32, 0),
        "tokenizer.ggml.add_bos_token": scalar(BOOL, True),
        "tokenizer.ggml.add_space_prefix": scalar(BOOL, False),
    }


def files() -> Iterator[File]:
    """Each is another way through the reader, the configuration and the vocabularies."""
    file = small()
    yield file
    yield File(_words(), ())
    yield File(byte_level(), ())
    yield File({}, ())
    kinds = {U8: 1, I8: -1, U16: 2, I16: -2, U32: 3, I32: -3, F32: 0.5, BOOL: True, U64: 4, I64: -4, F64: 1.5}
    scalars = {f"some.{kind}": scalar(kind, value) for kind, value in kinds.items()}
    arrays = {f"some.array.{kind}": array(kind, [value] * 3) for kind, value in kinds.items()}
    inner = array(U8, [1, 2, 3]).payload
    nested = Value(9, u32(9) + u64(2) + inner + inner)
    yield File({**scalars, **arrays, "some.nested": nested, "some.text": scalar(STRING, "text")}, ())
    for kind in ("none", "linear", "yarn", "longrope"):
        yield _scaled(file, kind)
    split = {"split.no": scalar(U16, 0), "split.count": scalar(U16, 2), "split.tensors.count": scalar(I32, 11)}
    yield file.but(fields={**split, **file.fields})
    for alignment in (1, 8, 1 << 9):
        aligned = {**file.fields, "general.alignment": scalar(U32, alignment)}
        yield file.but(fields=aligned, alignment=alignment)
    for type_number, block in ((1, 1), (2, 32), (8, 32), (12, 256), (30, 1)):
        cols = max(DIM, block)
        yield file.with_tensor("blk.0.ffn_up.weight", type=type_number, dims=(cols, FFN), data=bytes(4 * cols * FFN))


def _scaled(file: File, kind: str) -> File:
    p = "llama.rope.scaling."
    scaling = {
        p + "type": scalar(STRING, kind),
        p + "factor": scalar(F32, 4.0),
        p + "original_context_length": scalar(U32, 16),
        p + "attn_factor": scalar(F32, 1.1),
    }
    factors = [TensorPart(f"rope_factors_{n}.weight", (DIM // 4,), bytes(DIM)) for n in ("long", "short")]
    more = tuple(factors) if kind == "longrope" else ()
    return file.but(fields={**file.fields, **scaling}, tensors=file.tensors + more)


def main() -> None:
    CORPUS.mkdir(exist_ok=True)
    for seed in (file.bytes() for file in files()):
        (CORPUS / hashlib.sha1(seed).hexdigest()).write_bytes(seed)


if __name__ == "__main__":
    main()
