"""Bounded GGUF reader over mmap: versions 2 and 3, little-endian.

Every count and length is checked against the bytes that are left before anything is allocated, so a damaged or hostile
file ends in a GGUFError at once. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import struct
import sys
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar, overload

import gguf
import numpy as np
import numpy.typing as npt

from llorch.errors import GGUFError

# Metadata and tensor infos together; the largest vocabularies in use (262k tokens, 515k merges) need about 20 MiB.
HEADER_LIMIT = 64 << 20
MAX_KEYS = MAX_TENSORS = 1 << 16
MAX_STRINGS = 1 << 21  # in one array
MAX_ARRAYS = 1 << 12  # arrays in arrays count, too
MAX_KEY_BYTES = (1 << 16) - 1  # the specification's limit
MAX_ALIGNMENT = 1 << 20
MAX_ARRAY_DEPTH = 4
MAX_DIMS = 4  # GGML_MAX_DIMS
MADV_POPULATE_READ = 22  # madvise(2); the mmap module has no name for it

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
# GGML type number -> name, elements of a block, bytes of a block
_TYPES = {t.value: (t.name, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType if t in gguf.GGML_QUANT_SIZES}
_REQUIRED = object()
_REFETCH = "fetch or convert the file again"

T = TypeVar("T", str, int, float, bool, list[str], npt.NDArray[Any])
D = TypeVar("D")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in the file. Bytes are raw blocks of its type, rows one after another."""

    name: str
    shape: tuple[int, ...]  # row-major, (rows, cols): GGUF's dimensions reversed
    type: str  # GGML's name: "F32", "Q4_0", ...
    offset: int  # from the start of the file
    nbytes: int


class GGUFFile:
    """An open GGUF file: `metadata` (numbers, strings; arrays as list[str] or ndarray), `tensors`, raw `data`.

    A context manager. Arrays from `data` stay valid after `close`: the map goes away with the last of them.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        """Use `GGUFFile.open`. Raises GGUFError for anything but a whole, well-formed file."""
        self.path = path
        self._map: mmap.mmap | None = data
        self._size = len(data)
        cursor = _Cursor(path, data)
        self.version, tensor_count, key_count = _read_preamble(cursor)
        self.metadata, self._offsets = _read_metadata(cursor, key_count)
        self.alignment = self._alignment()
        self.tensors = _place(cursor, _read_tensor_infos(cursor, tensor_count), self.alignment)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Maps the file and reads its header. Raises GGUFError that names file, field, offset and what to do."""
        path = Path(path)
        return cls(path, _map(path))

    @overload
    def get(self, key: str, kind: type[T]) -> T: ...
    @overload
    def get(self, key: str, kind: type[T], default: D) -> T | D: ...
    def get(self, key: str, kind: type[Any], default: Any = _REQUIRED) -> Any:
        """The value of a metadata field; `default`, where one is given and the field is absent.

        `kind` is str, int, float (takes integers too), bool, list (an array of strings) or np.ndarray (an array of
        numbers). Raises GGUFError where the field has another type, or is absent and has no default.
        """
        if key not in self.metadata:
            if default is not _REQUIRED:
                return default
            raise GGUFError(
                f"{self.path}: metadata field {key} is missing; convert the model again with a current converter"
            )
        value = self.metadata[key]
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind or (kind is list and value and not isinstance(value[0], str)):
            raise GGUFError(f"{self.path}: {self.where(key)} is {describe(value)}, expected {_KINDS[kind]}; {_REFETCH}")
        return value

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor: one of several where the model is split."""
        return self.path

    @property
    def nbytes(self) -> int:
        """Bytes of the file, of all its parts where it is split."""
        return self._size

    def where(self, key: str) -> str:
        """A metadata field as messages name it: its key, and its offset where it has one."""
        at = f" at offset {self._offsets[key]}" if key in self._offsets else ""
        return f"metadata field {key}{at}"

    def begin(self, key: str) -> str:
        """How a message about a field's value begins: the file, the offset and the key."""
        at = f"at offset {self._offsets[key]}: " if key in self._offsets else ""
        return f"{self.path}: {at}{key}"

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The raw blocks of a tensor, uint8 [nbytes]: a read-only view on the map, no copy."""
        if self._map is None:
            raise GGUFError(f"{self.path}: the file is closed; open it again to read tensor {name}")
        info = self.tensors.get(name)
        if info is None:
            raise GGUFError(f"{self.path}: tensor {name} is missing; the file has {len(self.tensors)} tensors")
        _map_pages(self._map, info.offset, info.nbytes)
        return np.frombuffer(self._map, np.uint8, info.nbytes, info.offset)

    def close(self) -> None:
        """Gives the map back as soon as no array from `data` uses it."""
        self._map = None  # mmap.close() would raise while such an array lives

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _alignment(self) -> int:
        alignment = self.get("general.alignment", int, 32)
        if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise GGUFError(
                f"{self.path}: {self.where('general.alignment')} is {alignment}, "
                f"expected a power of two up to {MAX_ALIGNMENT}; {_REFETCH}"
            )
        return alignment


_KINDS = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "a boolean",
    list: "an array of strings",
    np.ndarray: "an array of numbers",
}


def describe(value: Any) -> str:
    """A value of the metadata, fit for a message."""
    if isinstance(value, str):
        return f"the string '{shown(value)}'"
    if isinstance(value, np.ndarray):
        return f"an array of {len(value)} {value.dtype} numbers"
    if isinstance(value, list):
        return f"an array of {len(value)} {'strings' if value and isinstance(value[0], str) else 'arrays'}"
    return f"the {type(value).__name__} {value}"


def shown(text: str) -> str:
    """Text from the file, fit for a message: control characters escaped, not too long."""
    return repr(text if len(text) <= 80 else text[:77] + "...")[1:-1]


def _map(path: Path) -> mmap.mmap:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise GGUFError(f"{path} is a directory, not a GGUF file; name one of the .gguf files in it")
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
            raise GGUFError(f"{path} is not a regular file; copy the model to a file first")
        if status.st_size == 0:
            raise GGUFError(f"{path} is empty: 0 bytes, a GGUF header has at least 24; {_REFETCH}")
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise GGUFError(f"{path}: no such file; check the path") from None
    except PermissionError:
        raise GGUFError(f"{path}: permission denied; give this user read access (chmod +r)") from None
    except (OSError, ValueError) as error:
        raise GGUFError(f"{path!s}: cannot be opened: {error}") from error


def _map_pages(data: mmap.mmap, offset: int, nbytes: int) -> None:
    """One call for a tensor's pages: one fault after the other would cost half as much time again as reading them."""
    if sys.platform == "linux":
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        with contextlib.suppress(OSError):  # advice: a kernel before 5.14 does not know it
            data.madvise(MADV_POPULATE_READ, start, offset + nbytes - start)


class _Cursor:
    """A position in the header that never passes its end: each read is checked against what is left."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.pos = path, data, 0
        self.end = min(len(data), HEADER_LIMIT)
        self.arrays = 0

    def fail(self, field: str, offset: int, problem: str, advice: str = _REFETCH) -> NoReturn:
        raise GGUFError(f"{self.path}: {field} at offset {offset}: {problem}; {advice}")

    def require(self, field: str, size: int, need: str = "needs") -> None:
        left = self.end - self.pos
        if size > left:
            of = "in the file" if self.end == len(self.data) else f"of the {HEADER_LIMIT} a header may have"
            self.fail(field, self.pos, f"{need} {size} bytes, {left} are left {of}")

    def integer(self, field: str, code: struct.Struct) -> int:
        self.require(field, code.size)
        (value,) = code.unpack_from(self.data, self.pos)
        self.pos += code.size
        return int(value)

    def count(self, field: str, element_bytes: int, what: str, most: int | None = None) -> int:
        """A count of elements that each take at least `element_bytes`."""
        at = self.pos
        count = self.integer(field, _U64)
        self.require(field, count * element_bytes, f"{count} {what} need")
        if most is not None and count > most:
            self.fail(field, at, f"{count} {what}, at most {most} are read")
        return count

    def text(self, field: str) -> str:
        length = self.count(field, 1, "bytes of text")
        start, self.pos = self.pos, self.pos + length
        try:
            return self.data[start : self.pos].decode()
        except UnicodeDecodeError as error:
            self.fail(field, start + error.start, f"byte {error.start} of {length} is not UTF-8")

    def value(self, field: str, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.text(field)
        if kind == _ARRAY:
            return self.array(field, depth + 1)
        if kind not in _DTYPES:
            self.fail(field, self.pos - 4, f"value type {kind} is unknown, known are 0 to 12", "update llorch")
        return self.numbers(field, _DTYPES[kind], 1)[0].item()

    def array(self, field: str, depth: int) -> Any:
        at = self.pos
        self.arrays += 1
        if depth > MAX_ARRAY_DEPTH:
            self.fail(field, at, f"arrays are nested {depth} deep, at most {MAX_ARRAY_DEPTH} are read")
        if self.arrays > MAX_ARRAYS:
            self.fail(field, at, f"{self.arrays} arrays, at most {MAX_ARRAYS} are read")
        kind = self.integer(field, _U32)
        if kind == _STRING:
            return self.strings(field, self.count(field, 8, "strings", MAX_STRINGS))
        if kind == _ARRAY:
            return [self.array(f"{field}[{i}]", depth + 1) for i in range(self.count(field, 12, "arrays"))]
        if kind not in _DTYPES:
            self.fail(field, at, f"array element type {kind} is unknown, known are 0 to 12", "update llorch")
        dtype = _DTYPES[kind]
        return self.numbers(field, dtype, self.count(field, dtype.itemsize, f"{dtype} numbers"))

    def numbers(self, field: str, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
        self.require(field, count * dtype.itemsize)
        if count == 0:
            return np.empty(0, dtype)
        # a copy, so that the map can be given back
        values = np.frombuffer(self.data, dtype, count, self.pos).copy()
        if dtype == _DTYPES[_BOOL] and (wrong := values.view(np.uint8) > 1).any():
            index = int(wrong.argmax())
            self.fail(field, self.pos + index, f"boolean byte {values.view(np.uint8)[index]}, expected 0 or 1")
        self.pos += count * dtype.itemsize
        return values

    def strings(self, field: str, count: int) -> list[str]:
        """The hot loop of opening a file: 400,000 strings in a large vocabulary, so the checks are inlined."""
        texts: list[str] = []
        data, unpack, append, pos, end = self.data, _U64.unpack_from, texts.append, self.pos, self.end
        try:
            for _ in range(count):
                start = pos + 8
                stop = start + unpack(data, pos)[0]
                if stop > end:
                    raise EOFError
                append(data[start:stop].decode())
                pos = stop
        except (EOFError, struct.error, UnicodeDecodeError):
            self.pos = pos
            self.text(f"{field}[{len(texts)}]")  # reads the same string with every check, and says what is wrong
            raise
        self.pos = pos
        return texts


def _read_preamble(cursor: _Cursor) -> tuple[int, int, int]:
    """Version, tensor count, metadata field count."""
    head = cursor.data[:64]
    if head[:4] != b"GGUF":
        cursor.fail("magic", 0, f"{head[:4]!r}, expected b'GGUF'", _looks_like(head))
    cursor.pos = 4
    version = cursor.integer("version", _U32)
    if version and version & 0xFFFF == 0:
        swapped = int.from_bytes(version.to_bytes(4, "big"), "little")
        cursor.fail(
            "version",
            4,
            f"{version} is {swapped} in big-endian order, llorch reads little-endian files",
            "convert it with gguf-convert-endian",
        )
    if version not in (2, 3):
        advice = "update llorch" if version > 3 else "convert the model again with a current converter"
        cursor.fail("version", 4, f"GGUF version {version}, llorch reads 2 and 3", advice)
    # The least that a tensor info takes: name 8 + 1, dimensions 4 + 8, type 4, offset 8;
    # and a metadata field: key 8 + 1, type 4, value 1.
    tensors = cursor.count("tensor count", 33, "tensors", MAX_TENSORS)
    keys = cursor.count("metadata field count", 14, "metadata fields", MAX_KEYS)
    return version, tensors, keys


def _looks_like(head: bytes) -> str:
    """What a file that is no GGUF file may be, and what to do about it."""
    start = head.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "this is a git-lfs pointer: run `git lfs pull`, or download the file itself"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "this is a web page, the download went wrong: download the file itself"
    if head[8:9] == b"{":
        return "this looks like a safetensors file: convert the model to GGUF with llama.cpp's convert_hf_to_gguf.py"
    if head.startswith(b"PK\x03\x04"):
        return "this is a zip archive or a PyTorch checkpoint: convert the model to GGUF with convert_hf_to_gguf.py"
    if head[:4] in (b"lmgg", b"fmgg", b"tjgg", b"algg"):
        return "this is a GGML file, GGUF's predecessor: convert it with llama.cpp's convert_llama_ggml_to_gguf.py"
    return "this is not a GGUF file: check the path"


def _read_metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Values and their offsets, by key."""
    metadata: dict[str, Any] = {}
    offsets: dict[str, int] = {}
    for index in range(count):
        at = cursor.pos
        key = cursor.text(f"key of metadata field {index} of {count}")
        length = cursor.pos - at - _U64.size
        if not 1 <= length <= MAX_KEY_BYTES:
            cursor.fail(
                f"metadata field {index} of {count}", at, f"key of {length} bytes, expected 1 to {MAX_KEY_BYTES}"
            )
        field = f"metadata field {shown(key)}"
        if key in metadata:
            cursor.fail(field, at, f"the same key has a value at offset {offsets[key]} already")
        kind = cursor.integer(field, _U32)
        offsets[key] = cursor.pos
        metadata[key] = cursor.value(field, kind)
    return metadata, offsets


def _read_tensor_infos(cursor: _Cursor, count: int) -> dict[int, TensorInfo]:
    """Tensors by the offset of their info in the header; their own offsets count from the data section here."""
    infos: dict[int, TensorInfo] = {}
    seen: dict[str, int] = {}
    for index in range(count):
        at = cursor.pos
        name = cursor.text(f"name of tensor {index} of {count}")
        if not name:
            cursor.fail(f"tensor {index} of {count}", at, "name of 0 bytes, expected at least 1")
        if name in seen:
            cursor.fail(f"tensor {shown(name)}", at, f"the same name stands at offset {seen[name]} already")
        seen[name] = at
        infos[at] = _read_tensor_info(cursor, name)
    return infos


def _read_tensor_info(cursor: _Cursor, name: str) -> TensorInfo:
    field, at = f"tensor {shown(name)}", cursor.pos
    n_dims = cursor.integer(field, _U32)
    if not 1 <= n_dims <= MAX_DIMS:
        cursor.fail(field, at, f"{n_dims} dimensions, expected 1 to {MAX_DIMS}")
    dims = [cursor.integer(field, _U64) for _ in range(n_dims)]
    if not all(0 < dim < 1 << 63 for dim in dims):
        cursor.fail(field, at + 4, f"dimensions {dims}, each must be from 1 to {(1 << 63) - 1}")
    type_at = cursor.pos
    number = cursor.integer(field, _U32)
    if number not in _TYPES:
        advice = "update the gguf package, or convert the model to another type"
        cursor.fail(field, type_at, f"tensor type {number} is unknown, the highest known is {max(_TYPES)}", advice)
    type_name, block_elements, block_bytes = _TYPES[number]
    if dims[0] % block_elements:
        cursor.fail(
            field, at + 4, f"rows of {dims[0]} elements do not divide into {type_name} blocks of {block_elements}"
        )
    nbytes = prod(dims) // block_elements * block_bytes
    return TensorInfo(name, tuple(reversed(dims)), type_name, cursor.integer(field, _U64), nbytes)


def _place(cursor: _Cursor, infos: dict[int, TensorInfo], alignment: int) -> dict[str, TensorInfo]:
    """Tensors by name, with offsets from the start of the file; each aligned, within the file, none over another."""
    start = -(-cursor.pos // alignment) * alignment
    size = len(cursor.data)
    tensors: dict[str, TensorInfo] = {}
    for at, info in infos.items():
        field = f"tensor {shown(info.name)}"
        if info.offset % alignment:
            cursor.fail(field, at, f"data offset {info.offset} is not a multiple of the alignment {alignment}")
        begin = start + info.offset
        if begin + info.nbytes > size:
            cursor.fail(field, at, f"data ends at byte {begin + info.nbytes}, the file has {size}")
        tensors[info.name] = TensorInfo(info.name, info.shape, info.type, begin, info.nbytes)
    for one, two in pairwise(sorted(tensors.values(), key=lambda info: info.offset)):
        if one.offset + one.nbytes > two.offset:
            cursor.fail(
                f"tensor {shown(two.name)}",
                two.offset,
                f"data starts at byte {two.offset}, tensor {shown(one.name)} ends at {one.offset + one.nbytes}",
            )
    return tensors
