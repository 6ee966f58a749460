"""Files that are broken as GGUF files, whatever they hold: counts, lengths, types, dimensions, offsets, truncation."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import gguf

from tests.malformed.case import Case, of
from tests.malformed.layout import (
    ARRAY,
    BOOL,
    HEADER_BYTES,
    SIZES,
    STRING,
    U32,
    File,
    TensorPart,
    Value,
    array,
    scalar,
    text,
    tiny,
    u32,
    u64,
)

HUGE = {"2^31": 1 << 31, "2^63": 1 << 63, "2^64 - 1": (1 << 64) - 1}
TINY = tiny()
WHOLE = TINY.bytes()


def containers() -> Iterator[Case]:
    for part in (_preamble, _keys, _values, _arrays, _tensor_infos, _dimensions, _places, _truncations, _other_files):
        yield from part()


def _patched(offset: int, new: bytes) -> bytes:
    return WHOLE[:offset] + new + WHOLE[offset + len(new) :]


def _preamble() -> Iterator[Case]:
    for magic in (b"GGUG", b"gguf", b"FUGG", b"\0\0\0\0"):
        yield Case(f"magic {magic!r}", _patched(0, magic), ("magic at offset 0", repr(magic), "expected b'GGUF'"))
    for version in (0, 1, 4, 5, 65535):
        said = f"version at offset 4: GGUF version {version}, llorch reads 2 and 3"
        yield Case(f"version {version}", _patched(4, u32(version)), (said,))
    for version in (2, 3):
        big = struct.pack(">I", version)
        yield Case(
            f"big-endian version {version}", _patched(4, big), ("version at offset 4", f"is {version} in big-endian")
        )
    for i, what in ((8, "tensor"), (16, "metadata field")):
        for name, count in HUGE.items():
            said = (f"{what} count at offset {i + 8}: {count} {what}s need", "are left in the file")
            yield Case(f"{what} count {name}", _patched(i, u64(count)), said)
    more = TINY.but(field_count=len(TINY.fields) + 1)
    # what follows is read as what is missing, and is soon no such thing
    yield of("a field more than there are", more, "are left in the file")
    yield of(
        "a field fewer than there are",
        TINY.but(field_count=len(TINY.fields) - 1),
        "tensor",
        "dimensions, expected 1 to 4",
    )
    yield of("a tensor more than there are", TINY.but(tensor_count=13), "name of tensor 12 of 13 at offset")
    roomy = TINY.but(tensors=(*TINY.tensors, TensorPart("x", (1,), bytes(33 << 16))))
    yield of("65537 tensors", roomy.but(tensor_count=65537), "65537 tensors, at most 65536 are read")
    yield of("65537 fields", roomy.but(field_count=65537), "65537 metadata fields, at most 65536 are read")


def _keys() -> Iterator[Case]:
    at = len(TINY.fields)
    field = f"of metadata field {at} of {at + 1}"
    yield of("an empty key", TINY.with_field("", scalar(U32, 1)), "key of 0 bytes, expected 1 to 65535", where="key ")
    long = "k" * 65536
    yield of("a key of 2^16 bytes", TINY.with_field(long, scalar(U32, 1)), "key of 65536 bytes, expected 1 to 65535")
    for raw in (b"\xff", b"ab\xc3", b"\xed\xa0\x80"):
        said = f"byte {2 if raw[0] == 97 else 0} of {len(raw)} is not UTF-8"
        yield of(f"the key {raw!r}", TINY.with_field(raw, scalar(U32, 1)), said, field)
    for key in ("general.name", "llama.block_count"):
        twice = TINY.but(more_fields=((key, scalar(U32, 1)),))
        first = TINY.where()[key]
        yield of(
            f"{key} twice",
            twice,
            f"field {key}",
            f"the same key has a value at offset {first} already",
            where=f"key {key}",
        )
    start = TINY.where()["key general.name"]
    left = len(WHOLE) - start - 8
    for name, length in {**HUGE, "one past the end": left + 1}.items():
        said = (f"key of metadata field 1 of {at} at offset {start + 8}: {length} bytes of text", f"{left} are left")
        yield Case(f"a key of {name} bytes", _patched(start, u64(length)), said)


def _values() -> Iterator[Case]:
    for kind in (13, 14, 255, 1 << 31, (1 << 32) - 1):
        file = TINY.with_field("some.key", Value(kind, bytes(8)))
        yield of(f"value type {kind}", file, "field some.key", f"value type {kind} is unknown, known are 0 to 12")
        file = TINY.with_field("some.key", Value(ARRAY, u32(kind) + u64(1) + bytes(8)))
        said = f"array element type {kind} is unknown, known are 0 to 12"
        yield of(f"array element type {kind}", file, said, where="some.key")
    start = TINY.where()["general.name"]
    left = len(WHOLE) - start - 8
    for name, length in {**HUGE, "one past the end": left + 1}.items():
        said = (
            f"field general.name at offset {start + 8}: {length} bytes of text need",
            f"{left} are left in the file",
        )
        yield Case(f"a string of {name} bytes", _patched(start, u64(length)), said)
    for raw in (b"ab\xff", b"\x80", b"\xf5\x80\x80\x80"):
        file = TINY.with_field("general.name", Value(STRING, text(raw)))
        said = f"byte {raw.index(0xFF) if 0xFF in raw else 0} of {len(raw)} is not UTF-8"
        yield of(f"the string {raw!r}", file, "field general.name", said)
    for byte in (2, 255):
        file = TINY.with_field("some.key", Value(BOOL, bytes([byte])))
        yield of(f"the boolean {byte}", file, f"boolean byte {byte}, expected 0 or 1", where="some.key")
        flags = Value(ARRAY, u32(BOOL) + u64(3) + bytes([0, 1, byte]))
        offset = TINY.with_field("some.key", flags).where()["some.key"] + 12 + 2
        said = f"field some.key at offset {offset}: boolean byte {byte}"
        yield of(f"the boolean {byte} in an array", TINY.with_field("some.key", flags), said)


def _arrays() -> Iterator[Case]:
    for kind in (*SIZES, STRING, ARRAY):
        for name, count in HUGE.items():
            file = TINY.with_field("some.key", Value(ARRAY, u32(kind) + u64(count)))
            yield of(
                f"an array of {name} elements of type {kind}", file, "field some.key at offset", f": {count} ", "need"
            )
    start = TINY.where()["tokenizer.ggml.scores"] + 12
    left = len(WHOLE) - start
    count = left // 4 + 1
    said = (
        f"field tokenizer.ggml.scores at offset {start}: {count} float32 numbers need {4 * count} bytes, "
        f"{left} are left",
    )
    yield Case("an array one past the end", _patched(start - 8, u64(count)), said)
    for i, raw in ((0, b"\xff"), (2, b"ok\xfe")):
        words = array(STRING, ["a", "b", "c"])
        broken = Value(ARRAY, words.payload[: 12 + 9 * i] + text(raw) + words.payload[12 + 9 * (i + 1) :])
        yield of(
            f"string {i} of an array not UTF-8",
            TINY.with_field("some.key", broken),
            f"field some.key[{i}]",
            "is not UTF-8",
        )
        cut = Value(ARRAY, words.payload[: 12 + 9 * i] + u64(1 << 40) + words.payload[12 + 9 * i + 8 :])
        yield of(
            f"string {i} of an array of 2^40 bytes",
            TINY.with_field("some.key", cut),
            f"field some.key[{i}]",
            f": {1 << 40} bytes",
        )
    for depth in (5, 6, 100, 100_000):
        deep = Value(ARRAY, (u32(ARRAY) + u64(1)) * (depth - 1) + u32(U32) + u64(0))
        said = "arrays are nested 5 deep, at most 4 are read"
        yield of(f"arrays nested {depth:,} deep", TINY.with_field("some.key", deep), "field some.key[0]", said)
    many = Value(ARRAY, u32(ARRAY) + u64(5000) + (u32(U32) + u64(0)) * 5000)
    yield of("5000 arrays in an array", TINY.with_field("some.key", many), "4097 arrays, at most 4096 are read")
    strings = Value(ARRAY, u32(STRING) + u64((1 << 21) + 1) + bytes(8 * ((1 << 21) + 1)))
    yield of("2^21 + 1 strings", TINY.with_field("some.key", strings), "2097153 strings, at most 2097152 are read")
    for alignment in (0, 3, 24, 1 << 21, 1 << 31):
        file = TINY.with_field("general.alignment", scalar(U32, alignment))
        said = f"is {alignment}, expected a power of two up to 1048576"
        yield of(f"alignment {alignment}", file, "field general.alignment", said, where="general.alignment")


def _tensor_infos() -> Iterator[Case]:
    total = len(TINY.tensors)

    def put(name: str | bytes) -> File:
        return TINY.but(tensors=(*TINY.tensors, TensorPart(name, (32,), bytes(128))))

    yield of(
        "an empty tensor name",
        put(""),
        f"tensor {total} of {total + 1}",
        "name of 0 bytes, expected at least 1",
        where="info ",
    )
    for raw in (b"\xff", b"blk\xc3("):
        yield of(f"the tensor name {raw!r}", put(raw), f"name of tensor {total} of {total + 1}", "is not UTF-8")
    again = put("output.weight")
    first = TINY.where()["info output.weight"]
    yield of(
        "output.weight twice",
        again,
        "tensor output.weight",
        f"the same name stands at offset {first} already",
        where="info output.weight",
    )
    start = TINY.where()["info output.weight"]
    left = len(WHOLE) - start - 8
    for name, length in {**HUGE, "one past the end": left + 1}.items():
        said = (f"name of tensor 1 of {total} at offset {start + 8}: {length} bytes", f"{left} are left")
        yield Case(f"a tensor name of {name} bytes", _patched(start, u64(length)), said)
    known = {t.value for t in gguf.GGMLQuantizationType if t in gguf.GGML_QUANT_SIZES}
    for kind in (4, 5, 31, 36, 99, 255, 1 << 31, (1 << 32) - 1):
        if kind not in known:
            said = (
                "tensor output.weight at offset",
                f"tensor type {kind} is unknown, the highest known is {max(known)}",
            )
            yield of(f"tensor type {kind}", TINY.with_tensor("output.weight", type=kind), *said)


def _dimensions() -> Iterator[Case]:
    where = "dims output.weight"
    for count in (0, 5, 255, 1 << 31, (1 << 32) - 1):
        file = TINY.with_tensor("output.weight", n_dims=count)
        yield of(
            f"{count} dimensions", file, "tensor output.weight", f"{count} dimensions, expected 1 to 4", where=where
        )
    dims = {
        "zero": (64, 0),
        "zero first": (0, 64),
        "zero of four": (64, 2, 0, 2),
        "negative": (64, (1 << 64) - 1),
        "2^63": (1 << 63, 1),
    }
    for name, shape in dims.items():
        said = ("tensor output.weight at offset", f"dimensions {list(shape)}, each must be from 1 to {(1 << 63) - 1}")
        yield of(f"dimensions: {name}", TINY.with_tensor("output.weight", dims=shape), *said)
    wraps = {
        "2^64": (1 << 32, 1 << 32),
        "2^96": (1 << 32, 1 << 32, 1 << 32),
        "2^252": ((1 << 63) - 1,) * 4,
        "2^62": (1 << 31, 1 << 31),
    }
    for name, shape in wraps.items():
        said = ("tensor output.weight", "data ends at byte", "the file has")
        yield of(f"{name} elements", TINY.with_tensor("output.weight", dims=shape), *said, where="info output.weight")
    for kind, (elements, size) in gguf.GGML_QUANT_SIZES.items():
        if elements > 1:
            file = TINY.with_tensor("output.weight", type=int(kind), dims=(elements + 1, 2), data=bytes(4 * size))
            said = f"rows of {elements + 1} elements do not divide into {kind.name} blocks of {elements}"
            yield of(f"a row of {kind.name} and one more", file, "tensor output.weight at offset", said)


def _places() -> Iterator[Case]:
    name, size = "output.weight", len(WHOLE)
    for offset in (1, 4, 16, 33):
        said = f"data offset {offset} is not a multiple of the alignment 32"
        yield of(
            f"data offset {offset}",
            TINY.with_tensor(name, offset=offset),
            "tensor output.weight",
            said,
            where=f"info {name}",
        )
    for what, offset in {
        "2^31": 1 << 31,
        "2^63": 1 << 63,
        "wrapping": (1 << 64) - 32,
        "one step too far": size // 32 * 32,
    }.items():
        said = ("tensor output.weight", "data ends at byte", f"the file has {size}")
        yield of(f"data offset {what}", TINY.with_tensor(name, offset=offset), *said, where=f"info {name}")
    for what, offset in {"on another": 0, "over another's end": 32}.items():
        said = ("tensor ", "data starts at byte", "ends at")
        yield of(f"data {what}", TINY.with_tensor(name, offset=offset), *said)
    last = TINY.tensors[-1].name
    yield of(
        "the last tensor's data on the first's", TINY.with_tensor(str(last), offset=0), "data starts at byte", "ends at"
    )


def _truncations() -> Iterator[Case]:
    """At each section, at its border and within."""
    where = TINY.where()
    ends: dict[str, int] = {
        "magic": 2,
        "magic's end": 4,
        "version": 6,
        "version's end": 8,
        "tensor count": 12,
        "field count": 20,
    }
    ends["header"] = HEADER_BYTES
    for key in ("general.architecture", "llama.block_count", "tokenizer.ggml.scores", "tokenizer.ggml.tokens"):
        ends |= {f"{key}, its key": where[f"key {key}"] + 10, f"{key}, its type": where[key] - 2}
        ends |= {f"{key}, its start": where[key], f"{key}, its value": where[key] + 3}
    ends["an array of strings"] = where["tokenizer.ggml.tokens"] + 1000
    ends["an array of numbers"] = where["tokenizer.ggml.scores"] + 501
    for name in ("token_embd.weight", "blk.0.ffn_norm.weight"):
        ends |= {f"{name}, its name": where[f"info {name}"] + 9, f"{name}, its dimensions": where[f"dims {name}"] + 6}
        ends |= {f"{name}, its count": where[f"dims {name}"] + 2, f"{name}, its info": where[f"info {name}"]}
    ends |= {"the last info": where["end of header"] - 4, "the header's padding": where["end of header"] + 1}
    for name in ("token_embd.weight", "output.weight", "blk.0.attn_q.weight"):
        ends |= {f"before {name}": where[f"data {name}"], f"within {name}": where[f"data {name}"] + 777}
    ends["the last byte"] = len(WHOLE) - 1
    for name, end in ends.items():
        said = (
            ("magic",)
            if end < 4
            else (
                ("data ends at byte", f"the file has {end}")
                if end > where["end of header"] - 1
                else ("are left in the file",)
            )
        )
        yield Case(f"cut in {name}", WHOLE[:end], said)


def _other_files() -> Iterator[Case]:
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    json = b'{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    others = {
        "a git-lfs pointer": (lfs, "git lfs pull"),
        "an HTML page": (b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>", "web page"),
        "an HTML page behind spaces": (b"\r\n  <html><body>Sign in</body></html>", "web page"),
        "an XML error": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
        "a safetensors file": (u64(len(json)) + json + bytes(4), "safetensors"),
        "a PyTorch checkpoint": (b"PK\x03\x04" + bytes(200), "PyTorch"),
        "a GGML file": (b"tjgg" + u32(3) + bytes(64), "predecessor"),
        "an older GGML file": (b"lmgg" + bytes(64), "predecessor"),
        "a JSON file": (b'{"model_type": "llama"}', "check the path"),
        "zeros": (bytes(4096), "check the path"),
    }
    for name, (content, said) in others.items():
        yield Case(name, content, ("magic at offset 0", "expected b'GGUF'", said))
    yield Case("an empty file", b"", ("is empty: 0 bytes, a GGUF header has at least 24",))
    yield Case(
        "a directory",
        says=("this directory holds no .gguf model",),
        write=lambda path: path.mkdir(),
        error="ModelError",
    )
    yield Case("a pipe", says=("is not a regular file",), write=os.mkfifo)
    yield Case("no such file", says=("no such file",), write=lambda _path: None)
    yield Case("a link to nowhere", says=("no such file",), write=lambda path: path.symlink_to("nowhere"))
    yield Case("a link to itself", says=("cannot be opened",), write=lambda path: path.symlink_to(path))
    yield Case("no permission", says=("permission denied", "chmod +r"), write=_locked)


def _locked(path: Path) -> None:
    path.write_bytes(WHOLE)
    path.chmod(0)
