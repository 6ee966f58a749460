"""Host memory: weights in huge pages, activations at cache lines, the paged cache."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llorch.providers import CacheSpec
from llorch.providers.host_memory import HUGE_PAGE, in_huge_pages

LINE = 64

Bytes = npt.NDArray[np.uint8]


def aligned(nbytes: int) -> Bytes:
    """Uninitialised memory that begins at a cache line."""
    whole = np.empty(nbytes + LINE, np.uint8)
    skipped = -whole.ctypes.data % LINE
    return whole[skipped : skipped + nbytes]


def zeros(nbytes: int) -> Bytes:
    """Zeros, in huge pages where they fill one."""
    if nbytes >= HUGE_PAGE:
        return in_huge_pages(nbytes)
    small = aligned(nbytes)
    small[...] = 0
    return small


class Arena:
    """Room for a model's weights, side by side: each in pages of its own would waste one of 2 MiB at its end."""

    def __init__(self, nbytes: int) -> None:
        self._memory, self._used = zeros(nbytes), 0

    def take(self, nbytes: int) -> Bytes:
        """Memory that begins at a cache line; from elsewhere where the arena is full."""
        start = -(-self._used // LINE) * LINE
        if start + nbytes > self._memory.nbytes:
            return zeros(nbytes)
        self._used = start + nbytes
        return self._memory[start : self._used]


def forget_pages(data: npt.NDArray[Any]) -> None:
    """Lets the system take back the pages of a file's map that `data` lies in; they are read again if need be."""
    owner: Any = data
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if not isinstance(owner, mmap.mmap) or data.flags.writeable or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = data.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # a page may hold the end of the tensor before
    if start + data.nbytes > first:
        owner.madvise(mmap.MADV_DONTNEED, first, start + data.nbytes - first)


@dataclass(frozen=True)
class Weight:
    """A matrix in groups of rows (formats.py), or a vector of float32."""

    memory: npt.NDArray[Any]
    type: str
    shape: tuple[int, ...]

    @property
    def address(self) -> int:
        return int(self.memory.ctypes.data)

    @property
    def nbytes(self) -> int:
        return int(self.memory.nbytes)


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of a layer by block; the layout within a block is attention.py's."""

    keys: npt.NDArray[Any]
    values: npt.NDArray[Any]


def _padded_dims(spec: CacheSpec) -> tuple[int, int]:
    """Dimensions of a key and of a value as they lie in the cache."""
    return -(-spec.head_dim // 4) * 4, -(-spec.head_dim // 16) * 16


def cache_bytes(spec: CacheSpec) -> int:
    """Bytes of the whole cache, once all of it was written."""
    width = {"f32": 4, "f16": 2}[spec.dtype]
    return spec.layers * spec.blocks * spec.kv_heads * spec.block_size * sum(_padded_dims(spec)) * width


class KVCache:
    def __init__(self, spec: CacheSpec) -> None:
        dtype = {"f32": np.float32, "f16": np.uint16}[spec.dtype]
        per_head = spec.kv_heads * spec.block_size
        key_dim, value_dim = _padded_dims(spec)
        keys, values = spec.blocks * per_head * key_dim, spec.blocks * per_head * value_dim
        # zeros: memory comes when it is first written, and what was never written is no NaN
        whole = zeros(spec.layers * (keys + values) * dtype().itemsize).view(dtype)
        layers = whole.reshape(spec.layers, keys + values)
        self.layers = [
            LayerCache(layer[:keys].reshape(spec.blocks, -1), layer[keys:].reshape(spec.blocks, -1)) for layer in layers
        ]

    def copy(self, src: int, dst: int) -> None:
        for layer in self.layers:
            layer.keys[dst], layer.values[dst] = layer.keys[src], layer.values[src]


class Inputs:
    """Host memory is device memory: nothing to upload."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.host = {name: np.zeros(shape, np.int32) for name, shape in shapes.items()}
        self.device = self.host

    def upload(self) -> None:
        return None
