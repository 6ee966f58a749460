"""The GGUF reader: what it reads, that it is fast, and that every damaged file ends in one clear error."""

from __future__ import annotations

import os
import socket
import statistics
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch.core import gguf as reader
from llorch.core.gguf import GGUFFile, TensorInfo
from llorch.errors import GGUFError
from tests.malformed.layout import ARRAY, BOOL, F32, I32, STRING, U32, U64, text, u32, u64
from tests.support import shared


def field(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + u32(kind) + payload


def tensor(name: str | bytes = "a", dims: tuple[int, ...] = (32, 2), kind: int = 2, offset: int = 0) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def build(
    fields: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
    tensor_count: int | None = None,
    field_count: int | None = None,
) -> bytes:
    head = b"GGUF" + u32(version)
    head += u64(len(tensors) if tensor_count is None else tensor_count)
    head += u64(len(fields) if field_count is None else field_count)
    head += b"".join(fields) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def whole_file() -> bytes:
    """Every part that a file can have."""
    fields = (
        field("general.architecture", STRING, text("llama")),
        field("general.alignment", U32, u32(64)),
        field("number", F32, struct.pack("<f", 0.5)),
        field("negative", I32, struct.pack("<i", -3)),
        field("yes", BOOL, b"\1"),
        field("numbers", ARRAY, u32(U64) + u64(2) + u64(7) + u64(1 << 63)),
        field("flags", ARRAY, u32(BOOL) + u64(2) + b"\0\1"),
        field("texts", ARRAY, u32(STRING) + u64(3) + text("a") + text("") + text("ü")),
        field("none", ARRAY, u32(STRING) + u64(0)),
        field("nested", ARRAY, u32(ARRAY) + u64(2) + u32(STRING) + u64(1) + text("x") + u32(U32) + u64(1) + u32(5)),
    )
    tensors = (tensor("q", (32, 2), 2, 64), tensor("f", (3,), 0, 0))
    return build(fields, tensors, bytes(range(12)) + bytes(52) + bytes(range(36)), alignment=64)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def writer(content: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return writer


Write = Callable[[bytes], Path]


# ---- what it reads ----


@pytest.mark.parametrize("version", [2, 3])
def test_reads_every_kind_of_value(write: Write, version: int) -> None:
    content = bytearray(whole_file())
    content[4] = version
    with GGUFFile.open(write(bytes(content))) as file:
        assert (file.version, file.alignment) == (version, 64)
        assert file.metadata["general.architecture"] == "llama"
        assert (file.metadata["number"], file.metadata["negative"], file.metadata["yes"]) == (0.5, -3, True)
        assert file.metadata["numbers"].tolist() == [7, 1 << 63]
        assert file.metadata["flags"].tolist() == [False, True]
        assert file.metadata["texts"] == ["a", "", "ü"]
        assert file.metadata["none"] == []
        assert file.metadata["nested"][0] == ["x"]
        assert file.metadata["nested"][1].tolist() == [5]


def test_tensors_have_row_major_shapes_and_absolute_offsets(write: Write) -> None:
    content = whole_file()
    with GGUFFile.open(write(content)) as file:
        start = len(content) - 100
        assert file.tensors["q"] == TensorInfo("q", (2, 32), "Q4_0", start + 64, 36)
        assert file.tensors["f"] == TensorInfo("f", (3,), "F32", start, 12)
        assert file.data("q").tobytes() == bytes(range(36))
        assert file.data("f").tobytes() == bytes(range(12))


def test_data_is_a_read_only_view_on_the_map(write: Write) -> None:
    with GGUFFile.open(write(whole_file())) as file:
        view, again = file.data("q"), file.data("q")
        assert view.dtype == np.uint8
        assert not view.flags.writeable
        assert not view.flags.owndata
        assert np.shares_memory(view, again)


def test_views_outlive_the_file(write: Write) -> None:
    with GGUFFile.open(write(whole_file())) as file:
        view = file.data("q")
    assert view.tobytes() == bytes(range(36))
    with pytest.raises(GGUFError, match="is closed; open it again to read tensor q"):
        file.data("q")


def test_closing_gives_the_map_back(write: Write) -> None:
    path = write(whole_file())
    file = GGUFFile.open(path)
    file.data("q")
    assert str(path) in Path("/proc/self/maps").read_text()
    file.close()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_an_unknown_tensor_is_named(write: Write) -> None:
    with GGUFFile.open(write(whole_file())) as file, pytest.raises(GGUFError, match=r"tensor x is missing.*2 tensors"):
        file.data("x")


def test_agrees_with_the_gguf_package() -> None:
    path = shared("models", "stories260K.gguf")
    theirs = gguf.GGUFReader(path)
    with GGUFFile.open(path) as ours:
        for key, expected in theirs.fields.items():
            if not key.startswith("GGUF."):
                value = ours.metadata[key]
                assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected.contents(), key
        assert list(ours.tensors) == [t.name for t in theirs.tensors]
        for expected in theirs.tensors:
            info = ours.tensors[expected.name]
            assert info.shape == tuple(reversed(expected.shape.tolist()))
            assert (info.type, info.nbytes) == (expected.tensor_type.name, expected.n_bytes)
            assert info.offset == expected.data_offset
            assert ours.data(expected.name).tobytes() == expected.data.tobytes()


def test_a_large_vocabulary_opens_in_under_700_ms() -> None:
    path = shared("vocabs", "ggml-vocab-llama-bpe.gguf")
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        with GGUFFile.open(path) as file:
            strings = len(file.get("tokenizer.ggml.tokens", list)) + len(file.get("tokenizer.ggml.merges", list))
        seconds.append(time.perf_counter() - start)
    assert strings == 128256 + 280147
    assert statistics.median(seconds) < 0.7


def test_importing_it_stays_light() -> None:
    # the gguf package itself brings sentencepiece
    heavy = ["tokenizers", "google.protobuf", "litestar", "pydantic", "jinja2", "numba", "rich"]
    script = f"import sys, llorch.core.gguf; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# ---- typed access ----


@pytest.mark.parametrize(
    ("key", "kind", "expected"),
    [
        ("general.architecture", str, "llama"),
        ("negative", int, -3),
        ("number", float, 0.5),
        ("negative", float, -3.0),
        ("yes", bool, True),
        ("texts", list, ["a", "", "ü"]),
        ("none", list, []),
    ],
)
def test_get_gives_the_value(write: Write, key: str, kind: type[Any], expected: Any) -> None:
    with GGUFFile.open(write(whole_file())) as file:
        value = file.get(key, kind)
        assert value == expected
        assert type(value) is kind


def test_get_gives_arrays_of_numbers(write: Write) -> None:
    with GGUFFile.open(write(whole_file())) as file:
        assert file.get("numbers", np.ndarray).dtype == np.uint64


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [
        ("general.architecture", int, "is the string 'llama', expected an integer"),
        ("yes", int, "is the bool True, expected an integer"),
        ("number", int, "is the float 0.5, expected an integer"),
        ("negative", bool, "is the int -3, expected a boolean"),
        ("negative", str, "is the int -3, expected a string"),
        ("numbers", list, "is an array of 2 uint64 numbers, expected an array of strings"),
        ("nested", list, "is an array of 2 arrays, expected an array of strings"),
        ("texts", np.ndarray, "is an array of 3 strings, expected an array of numbers"),
    ],
)
def test_get_refuses_another_type(write: Write, key: str, kind: type[Any], message: str) -> None:
    path = write(whole_file())
    with GGUFFile.open(path) as file, pytest.raises(GGUFError) as error:
        file.get(key, kind)
    assert str(error.value).startswith(f"{path}: metadata field {key} at offset ")
    assert message in str(error.value)


def test_get_of_an_absent_field(write: Write) -> None:
    path = write(whole_file())
    with GGUFFile.open(path) as file:
        assert file.get("absent", int, 5) == 5
        assert file.get("absent", str, None) is None
        with pytest.raises(GGUFError, match=r"model\.gguf: metadata field absent is missing; convert"):
            file.get("absent", str)


# ---- what is no GGUF file at all ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: 0 bytes, a GGUF header has at least 24"),
        (b"GG", r"b'GG', expected b'GGUF'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"<html><head>", "web page"),
        (u64(300) + b'{"__metadata__":{}}', "safetensors"),
        (b"PK\x03\x04" + bytes(30), "PyTorch"),
        (b"tjgg" + bytes(30), "predecessor"),
        (bytes(64), "check the path"),
    ],
)
def test_other_files_are_recognised(write: Write, content: bytes, message: str) -> None:
    path = write(content)
    with pytest.raises(GGUFError, match=message) as error:
        GGUFFile.open(path)
    assert str(path) in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"absent\.gguf: no such file"):
        GGUFFile.open(tmp_path / "absent.gguf")


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"is a directory.*name one of the \.gguf files"):
        GGUFFile.open(tmp_path)


def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GGUFError, match="is not a regular file"):
        GGUFFile.open(tmp_path / "pipe")


def test_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path has at most 108 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(GGUFError, match="is not a regular file"):
            GGUFFile.open("socket")


def test_no_permission(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(whole_file())

    def refuse(*_args: Any, **_kwargs: Any) -> None:  # root may read everything, so chmod proves nothing
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(GGUFError, match="permission denied; give this user read access"):
        GGUFFile.open(path)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000])
def test_a_path_that_no_file_can_have(path: str) -> None:
    with pytest.raises(GGUFError, match="cannot be opened"):
        GGUFFile.open(path)


# ---- damaged and hostile files ----

A = field("a", U32, u32(1))
ONE = (tensor(),)
DEEP = b"".join(u32(ARRAY) + u64(1) for _ in range(100_000)) + u32(U32) + u64(0)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "version 0": (build(version=0), "version at offset 4: GGUF version 0, llorch reads 2 and 3; convert"),
    "version 1": (build(version=1), "GGUF version 1, llorch reads 2 and 3; convert"),
    "version 4": (build(version=4), "GGUF version 4, llorch reads 2 and 3; update"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(8), "50331648 is 3 in big-endian order"),
    "no version": (b"GGUF\3\0", "version at offset 4: needs 4 bytes, 2 are left"),
    "no counts": (b"GGUF" + u32(3) + bytes(4), "tensor count at offset 8: needs 8 bytes, 4 are left"),
    "tensor count 2^31": (build(tensor_count=1 << 31), "tensor count at offset 16: 2147483648 tensors need"),
    "tensor count 2^63": (build(tensor_count=1 << 63), "9223372036854775808 tensors need"),
    "tensor count + 1": (build(ONE[:0], ONE, tensor_count=2), "tensor 1 of 2 at offset 65: name of 0 bytes"),
    "too many tensors": (build(tensor_count=65537) + bytes(33 * 65537), "65537 tensors, at most 65536 are read"),
    "field count 2^31": (build(field_count=1 << 31), "metadata field count at offset 24: 2147483648 metadata fields"),
    "field count 2^64-1": (build(field_count=(1 << 64) - 1), "18446744073709551615 metadata fields need"),
    "field count + 1": (build((A,), field_count=2), "2 metadata fields need 28 bytes, 24 are left|field 1 of 2"),
    "key past the end": (build((u64(1 << 63) + bytes(16),)), "key of metadata field 0 of 1 at offset 32: 92233720"),
    "key one past the end": (build((u64(33) + bytes(32),)), "33 bytes of text need 33 bytes, 32 are left"),
    "empty key": (build((field("", U32, u32(1)),)), "field 0 of 1 at offset 24: key of 0 bytes, expected 1 to 65535"),
    "long key": (build((field("k" * 65536, U32, u32(1)),)), "key of 65536 bytes, expected 1 to 65535"),
    "key not UTF-8": (build((field(b"a\xff", U32, u32(1)),)), "field 0 of 1 at offset 33: byte 1 of 2 is not UTF-8"),
    "duplicate key": (build((A, A)), "metadata field a at offset 41: the same key has a value at offset 37 already"),
    "value type 13": (build((field("a", 13, bytes(8)),)), "field a at offset 33: value type 13 is unknown.*0 to 12"),
    "value type 2^32-1": (build((field("a", 0xFFFFFFFF, bytes(8)),)), "value type 4294967295 is unknown"),
    "no value type": (build((text("a" * 9),))[:41], "field a{9} at offset 41: needs 4 bytes, 0 are left"),
    "no value": (build((field("a", U64, bytes(8)),))[:41], "field a at offset 37: needs 8 bytes, 4 are"),
    "boolean 2": (build((field("a", BOOL, b"\2"),)), "field a at offset 37: boolean byte 2, expected 0 or 1"),
    "array boolean 7": (
        build((field("a", ARRAY, u32(BOOL) + u64(3) + b"\0\1\7"),)),
        "field a at offset 51: boolean byte 7",
    ),
    "string past the end": (build((field("a", STRING, u64(1 << 40)),)), "field a at offset 45: 1099511627776 bytes"),
    "string not UTF-8": (
        build((field("a", STRING, text(b"ab\xc3(")),)),
        "field a at offset 47: byte 2 of 4 is not UTF-8",
    ),
    "array of type 13": (build((field("a", ARRAY, u32(13) + u64(1)),)), "array element type 13 is unknown"),
    "array of 2^62 numbers": (
        build((field("a", ARRAY, u32(U32) + u64(1 << 62)),)),
        "4611686018427387904 uint32 numbers need 18446744073709551616 bytes, 15 are left",
    ),
    "array of 2^61 strings": (build((field("a", ARRAY, u32(STRING) + u64(1 << 61)),)), "2305843009213693952 strings"),
    "array one past the end": (
        build((field("a", ARRAY, u32(0) + u64(16)),)),
        "16 uint8 numbers need 16 bytes, 15 are left",
    ),
    "array of 2^50 arrays": (build((field("a", ARRAY, u32(ARRAY) + u64(1 << 50)),)), "1125899906842624 arrays need"),
    "array string past the end": (
        build((field("a", ARRAY, u32(STRING) + u64(2) + text("x") + u64(1 << 20)),)),
        r"field a\[1\] at offset 66: 1048576 bytes of text need 1048576 bytes, 30 are left",
    ),
    "array string cut in its length": (
        build((field("a", ARRAY, u32(STRING) + u64(2) + text("xxxxxxxxx") + b"\1\0\0\0"),))[:70],
        r"field a\[1\] at offset 66: needs 8 bytes, 4 are left",
    ),
    "array string not UTF-8": (
        build((field("a", ARRAY, u32(STRING) + u64(2) + text("x") + text(b"y\xff")),)),
        r"field a\[1\] at offset 67: byte 1 of 2 is not UTF-8",
    ),
    "2^21 + 1 strings": (
        build((field("a", ARRAY, u32(STRING) + u64((1 << 21) + 1) + bytes(8 * ((1 << 21) + 1))),)),
        "field a at offset 41: 2097153 strings, at most 2097152 are read",
    ),
    "arrays nested 100,000 deep": (build((field("a", ARRAY, DEEP),)), "nested 5 deep, at most 4 are read"),
    "100,000 nested arrays": (
        build((field("a", ARRAY, u32(ARRAY) + u64(100_000) + (u32(U32) + u64(0)) * 100_000),)),
        "4097 arrays, at most 4096 are read",
    ),
    "alignment 0": (build((field("general.alignment", U32, u32(0)),)), "alignment at offset 53 is 0, expected a power"),
    "alignment 3": (build((field("general.alignment", U32, u32(3)),)), "is 3, expected a power of two up to 1048576"),
    "alignment 2^31": (build((field("general.alignment", U32, u32(1 << 31)),)), "is 2147483648, expected a power"),
    "alignment a string": (build((field("general.alignment", STRING, text("32")),)), "'32', expected an integer"),
    "empty tensor name": (build((), (tensor(""),)), "tensor 0 of 1 at offset 24: name of 0 bytes"),
    "tensor name not UTF-8": (build((), (tensor(b"\xff"),)), "name of tensor 0 of 1 at offset 32: byte 0 of 1"),
    "duplicate tensor": (
        build((), (tensor(), tensor(offset=64)), bytes(128)),
        "tensor a at offset 65: the same name stands at offset 24 already",
    ),
    "0 dimensions": (build((), (tensor(dims=()), bytes(9)), tensor_count=1), "tensor a at offset 33: 0 dimensions"),
    "5 dimensions": (build((), (tensor(dims=(32, 1, 1, 1, 1)),)), "5 dimensions, expected 1 to 4"),
    "zero dimension": (
        build((), (tensor(dims=(32, 0)),)),
        r"tensor a at offset 37: dimensions \[32, 0\], each must be",
    ),
    "negative dimension": (build((), (tensor(dims=(32, (1 << 64) - 1)),)), r"\[32, 18446744073709551615\], each must"),
    "overflowing dimensions": (
        build((), (tensor(dims=(1 << 32, 1 << 32, 1 << 32)),), bytes(64)),
        r"data ends at byte 44565841414273\d+, the file has",
    ),
    "product that wraps to 0": (build((), (tensor(dims=(1 << 32, 1 << 32)),), bytes(64)), "data ends at byte"),
    "rows of no whole block": (
        build((), (tensor(dims=(33, 2)),), bytes(64)),
        "tensor a at offset 37: rows of 33 elements do not divide into Q4_0 blocks of 32",
    ),
    "tensor type 4": (build((), (tensor(kind=4),), bytes(64)), "tensor a at offset 53: tensor type 4 is unknown"),
    "tensor type 2^31": (build((), (tensor(kind=1 << 31),), bytes(64)), "tensor type 2147483648 is unknown"),
    "unaligned offset": (build((), (tensor(offset=16),), bytes(64)), "data offset 16 is not a multiple of the align"),
    "offset past the end": (build((), (tensor(offset=64),), bytes(64)), "data ends at byte 196, the file has 160"),
    "offset that wraps": (build((), (tensor(offset=(1 << 64) - 32),), bytes(64)), "data ends at byte 184467440737095"),
    "overlapping tensors": (
        build((), (tensor("a"), tensor("b", offset=32)), bytes(128)),
        "tensor b at offset 160: data starts at byte 160, tensor a ends at 164",
    ),
    "no data": (build((), ONE), "tensor a at offset 24: data ends at byte 132, the file has 96"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_malformed_file_ends_at_once_in_an_error_with_file_field_offset_and_numbers(write: Write, name: str) -> None:
    content, message = HOSTILE[name]
    path = write(content)
    start = time.perf_counter()
    with pytest.raises(GGUFError, match=message) as error:
        GGUFFile.open(path)
    assert time.perf_counter() - start < 1
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value)) < 500
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError):
            GGUFFile.open(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_names_from_the_file_are_cut_and_escaped_in_messages(write: Write) -> None:
    path = write(build((field("a\n\x1b" + "k" * 5000, 99, bytes(8)),)))
    with pytest.raises(GGUFError) as error:
        GGUFFile.open(path)
    assert r"a\n\x1bkkk" in str(error.value)
    assert len(str(error.value)) < 400


def test_every_truncation_ends_in_an_error(write: Write) -> None:
    content = whole_file()
    for length in range(len(content)):
        with pytest.raises(GGUFError):
            GGUFFile.open(write(content[:length]))


def test_a_header_beyond_the_limit_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    path.write_bytes(build((field("a", ARRAY, u32(STRING) + u64(10**11)),)))
    os.truncate(path, 10**12)  # all zeros: 10^11 empty strings
    start = time.perf_counter()
    with pytest.raises(GGUFError, match=rf"800000000000 bytes, \d+ are left of the {reader.HEADER_LIMIT} a header may"):
        GGUFFile.open(path)
    assert time.perf_counter() - start < 1


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(st.integers(0, 500), st.integers(0, 255), min_size=1, max_size=6))
def test_any_change_of_bytes_reads_or_ends_in_an_error(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[int, int]
) -> None:
    content = bytearray(whole_file())
    for position, byte in changes.items():
        content[position % len(content)] = byte
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(content)
    with suppress(GGUFError), GGUFFile.open(path) as file:
        for name, info in file.tensors.items():
            assert file.data(name).nbytes == info.nbytes
