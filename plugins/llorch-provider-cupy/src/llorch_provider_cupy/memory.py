"""Device memory: tensors, weights, the inputs of a step, the paged cache."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llorch.providers import CacheSpec, DeviceMemoryError, amount
from llorch_provider_cupy.runtime import Allocation, Plain, Runtime


class Memory:
    """Allocates an opened device's memory, and releases what is left when it closes."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._allocated: weakref.WeakSet[Any] = weakref.WeakSet()

    def allocate(self, nbytes: int, what: str) -> Allocation:
        """Raises DeviceMemoryError with what asked for it, how much it needs, and how much is free."""
        nbytes = max(nbytes, 16)
        try:
            found = self._runtime.allocate(nbytes)
        except MemoryError as error:
            total, free = self._runtime.memory()
            raise DeviceMemoryError(
                f"{what} needs {amount(nbytes)} more on {self._runtime.properties.name}, "
                f"{amount(free)} of {amount(total)} are free: use a smaller --chunk, --context or "
                "--parallel, or a more strongly quantised model"
            ) from error
        self._allocated.add(found)
        return found

    def close(self) -> None:
        for allocation in list(self._allocated):
            allocation.release()


@dataclass(frozen=True)
class Tensor:
    """Memory from an offset on, which is 0 for activations."""

    allocation: Allocation
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int = 0  # in bytes

    @property
    def address(self) -> int:
        return self.allocation.address + self.offset

    def rows(self, n: int) -> Tensor:
        return Tensor(self.allocation, (n, *self.shape[1:]), self.dtype, self.offset)


@dataclass(frozen=True)
class Weight:
    """A matrix as formats.py lays it out, or a vector of float32."""

    allocation: Allocation
    type: str
    shape: tuple[int, ...]
    nbytes: int
    kind: Plain  # what it is multiplied as on tensor cores
    halves: Allocation | None = None  # the same values, [rows][whole units of columns]

    @property
    def address(self) -> int:
        return self.allocation.address


class Inputs:
    """All int32 inputs in one host array and one piece of device memory."""

    def __init__(self, runtime: Runtime, memory: Memory, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._runtime = runtime
        sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        ends = np.cumsum(list(sizes.values())).tolist()
        self.everything = np.zeros(ends[-1], np.int32)
        self._allocation = memory.allocate(self.everything.nbytes, "the inputs of a step")
        self.host: dict[str, npt.NDArray[np.int32]] = {}
        self.device: dict[str, Tensor] = {}
        for (name, shape), end in zip(shapes.items(), ends, strict=True):
            start = end - sizes[name]
            self.host[name] = self.everything[start:end].reshape(shape)
            self.device[name] = Tensor(self._allocation, tuple(shape), np.dtype(np.int32), 4 * start)

    def upload(self, everything: npt.NDArray[np.int32] | None = None) -> None:
        """`everything`: the host array of inputs of the same shapes, to be sent instead."""
        self._runtime.send(self._allocation.address, self.everything if everything is None else everything)


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of a layer, as kernels/attention.cu describes them."""

    keys: Allocation
    values: Allocation


def blocks_that_fit(spec: CacheSpec, free: int, piece: int) -> int:
    """Blocks of such a cache for which this many bytes are enough, where memory comes in pieces of `piece` bytes."""
    each = free // (2 * spec.layers) // piece * piece  # keys and values of a layer are allocated apart
    return min(spec.blocks, each // (cache_block_bytes(spec) // 2))


def padded_dim(head_dim: int) -> int:
    return -(-head_dim // 8) * 8


class KVCache:
    """The blocks of all layers."""

    def __init__(self, runtime: Runtime, memory: Memory, spec: CacheSpec) -> None:
        self._runtime = runtime
        self._block_bytes = cache_block_bytes(spec) // 2
        what = f"a KV cache of {spec.blocks * spec.block_size} tokens"
        size = spec.blocks * self._block_bytes
        self.layers = [LayerCache(memory.allocate(size, what), memory.allocate(size, what)) for _ in range(spec.layers)]

    def copy(self, src: int, dst: int) -> None:
        """Enqueued like a kernel: it does not wait."""
        size = self._block_bytes
        for layer in self.layers:
            for part in (layer.keys, layer.values):
                self._runtime.copy(part.address + dst * size, part.address + src * size, size)


def cache_block_bytes(spec: CacheSpec) -> int:
    """Bytes of a block's keys and values in one layer."""
    width = {"f32": 4, "f16": 2}[spec.dtype]
    return 2 * spec.kv_heads * spec.block_size * padded_dim(spec.head_dim) * width
