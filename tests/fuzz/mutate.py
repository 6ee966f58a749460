"""Changes to files that keep what is around them whole: bytes changed at random seldom get past the first length."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from tests.malformed.layout import BOOL, F32, F64, I32, SIZES, STRING, U8, File, Value, array, scalar, text, u32, u64

NUMBERS = (0, 1, 2, 3, 5, 7, 8, 31, 32, 255, 256, 4096, 65535, 65536, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
LARGE = (1 << 33, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e-5, 1e30, -1e30, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", " ", "▁", "▁▁", "\0", "<0x41>", "<0x-1>", "<0x100>", "<s>", "\U0010ffff", "�", "\ufeff", "é", "x" * 300)
KINDS = (
    "llama",
    "gpt2",
    "bert",
    "t5",
    "none",
    "linear",
    "yarn",
    "longrope",
    "default",
    "qwen2",
    "llama-bpe",
    "mistral",
)


def mutated(file: File, seed: int) -> bytes:
    """The file with one to four changes, the same ones for a seed."""
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 4)):
        file = rng.choice(_CHANGES)(file, rng)
    data = file.bytes()
    return data if rng.random() < 0.9 else data[: rng.randrange(len(data) + 1)]


def _value(rng: random.Random) -> Value:
    kind = rng.choice([*SIZES, STRING, STRING])
    if rng.random() < 0.3:
        return array(kind, [_plain(kind, rng) for _ in range(rng.choice((0, 1, 2, 6, 40)))])
    return scalar(kind, _plain(kind, rng))


def _plain(kind: int, rng: random.Random) -> object:
    if kind == STRING:
        return rng.choice(TEXTS + KINDS)
    if kind in (F32, F64):
        return rng.choice(FLOATS)
    if kind == BOOL:
        return rng.random() < 0.5
    bits = 8 * SIZES[kind]
    number = rng.choice(NUMBERS + LARGE) % (1 << bits)
    signed = kind in (1, 3, 5, 11)
    return number - (1 << bits) if signed and number >= 1 << (bits - 1) else number


def _other_value(file: File, rng: random.Random) -> File:
    return file.with_field(rng.choice(list(file.fields)), _value(rng)) if file.fields else file


def _same_kind(file: File, rng: random.Random) -> File:
    """Another value of the type that the reader expects there."""
    key = rng.choice(list(file.fields)) if file.fields else ""
    value = file.fields.get(key)
    if value is None or value.kind not in (*SIZES, STRING):
        return file
    return file.with_field(key, scalar(value.kind, _plain(value.kind, rng)))


def _other_words(file: File, rng: random.Random) -> File:
    """A vocabulary whose arrays are in step, but odd."""
    count = rng.choice((1, 3, 6, 20))
    fields = {
        "tokens": array(STRING, [rng.choice((*TEXTS, *"abcdef")) + rng.choice(("", str(i))) for i in range(count)]),
        "scores": array(F32, [rng.choice(FLOATS) for _ in range(count + rng.choice((0, 0, 0, -1, 1)))]),
        "token_type": array(I32, [rng.choice((0, 1, 1, 2, 3, 4, 5, 6, 7, -1)) for _ in range(count)]),
        "merges": array(STRING, [f"{rng.choice(TEXTS)} {rng.choice('abc')}" for _ in range(rng.choice((0, 1, 3)))]),
    }
    chosen = rng.sample(list(fields), rng.randint(1, len(fields)))
    return file.but(fields={**file.fields, **{f"tokenizer.ggml.{name}": fields[name] for name in chosen}})


def _without(file: File, rng: random.Random) -> File:
    keys, names = list(file.fields), [str(tensor.name) for tensor in file.tensors]
    if names and rng.random() < 0.4:
        return file.without_tensor(rng.choice(names))
    return file.without_field(str(rng.choice(keys))) if keys else file


def _twice(file: File, rng: random.Random) -> File:
    if file.tensors and rng.random() < 0.5:
        return file.but(tensors=(*file.tensors, rng.choice(file.tensors)))
    return file.but(more_fields=((rng.choice(list(file.fields)), _value(rng)),)) if file.fields else file


def _counts(file: File, rng: random.Random) -> File:
    which = rng.choice(("field_count", "tensor_count"))
    return file.but(**{which: rng.choice((*NUMBERS, *LARGE))})


def _tensor(file: File, rng: random.Random) -> File:
    if not file.tensors:
        return file
    tensor = rng.choice(file.tensors)
    dims = tuple(rng.choice((*NUMBERS, *LARGE)) if rng.random() < 0.5 else d for d in tensor.dims)
    changes = rng.choice(
        (
            {"dims": dims},
            {"dims": tensor.dims[::-1]},
            {"type": rng.randrange(45)},
            {"offset": rng.choice((*NUMBERS, *LARGE))},
            {"n_dims": rng.choice((0, 1, 3, 4, 5, 1 << 31))},
            {"name": rng.choice(TEXTS)},
            {"name": text(b"\xff")[8:]},
        )
    )
    return file.but(tensors=tuple(replace(t, **changes) if t is tensor else t for t in file.tensors))


def _nested(file: File, rng: random.Random) -> File:
    payload = array(U8, [1]).payload
    for _ in range(rng.choice((1, 3, 4, 5, 100))):
        payload = u32(9) + u64(rng.choice((1, 1, 1, 0, 1 << 40))) + payload
    return file.with_field(rng.choice(("some.key", "tokenizer.ggml.tokens", "general.name")), Value(9, payload))


_CHANGES: tuple[Callable[[File, random.Random], File], ...] = (
    *(_same_kind, _same_kind, _same_kind, _other_value, _other_words, _other_words, _without, _twice, _counts),
    *(_tensor, _tensor, _nested),
)
