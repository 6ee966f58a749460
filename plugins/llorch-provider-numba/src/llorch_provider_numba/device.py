"""An opened CPU: its threads, its memory, its compiled kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from llorch.providers import (
    CacheSpec,
    DeviceInfo,
    DeviceMemoryError,
    DeviceOptions,
    HostWeight,
    MemoryInfo,
    MemoryNeed,
    OpSpec,
    amount,
)
from llorch.providers.host_memory import host_memory, left_over
from llorch_provider_numba import compiler
from llorch_provider_numba.forecast import scratch_bytes
from llorch_provider_numba.formats import FORMATS, Format, groups_of, nbytes
from llorch_provider_numba.hosts import Host
from llorch_provider_numba.memory import (
    LINE,
    Arena,
    Bytes,
    Inputs,
    KVCache,
    Weight,
    aligned,
    cache_bytes,
    forget_pages,
)
from llorch_provider_numba.native import entry
from llorch_provider_numba.pool import Pool, default_threads
from llorch_provider_numba.program import Launcher

CAPTURE_SIZES = (
    *range(1, 17),
    20,
    24,
    28,
    32,
)  # tokens of a decode step; a captured step costs a few records of memory
SLICE = 16  # groups that a thread repacks at a time


class NumbaDevice:
    """Tensors are NumPy arrays, weights `memory.Weight`."""

    weight_types: Mapping[Any, frozenset[str]] = {
        "embed": frozenset(FORMATS),
        "matmul": frozenset(FORMATS),
        "vector": frozenset({"F32"}),
    }
    cache_dtypes = ("f16", "f32")
    block_sizes = (32, 64, 16)
    capture_sizes = CAPTURE_SIZES

    def __init__(self, info: DeviceInfo, host: Host, options: DeviceOptions) -> None:
        self.info, self.host = info, host
        self.threads = options.threads or default_threads()
        self._pool = Pool(self.threads)
        self.launcher = Launcher(self._pool)
        self._loaders = ThreadPoolExecutor(self.threads, "repack")
        self._scratch: dict[str, Bytes] = {}
        self._weights = Arena(0)

    # ---- for the operations ----

    def kernels(self, type_name: str) -> dict[int, int]:
        """Addresses of a weight type's kernels by tokens of a tile."""
        return compiler.product_kernels(type_name, self.host)

    def softmax_kernels(self) -> dict[int, int]:
        """Addresses by rows of a tile."""
        return compiler.softmax_kernels(self.host)

    def scratch(self, name: str, size: int) -> Bytes:
        """At least `size` bytes, shared by all sites that ask for the name: operations run one after another."""
        found = self._scratch.get(name)
        if found is None or found.nbytes < size:
            found = self._scratch[name] = aligned(size)
        return found

    # ---- the contract ----

    def expect(self, weights: Sequence[HostWeight]) -> str:
        """Raises DeviceMemoryError before anything is loaded where the weights cannot fit."""
        need = self._arena_bytes(weights)
        free = self.memory().free
        if need > free:
            raise DeviceMemoryError(
                f"the weights take {need / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free: "
                "use a more strongly quantised model"
            )
        self._weights = Arena(need)
        return f"weights: {amount(need)}, quantised as in the file, 16 rows side by side"

    def _arena_bytes(self, weights: Sequence[HostWeight]) -> int:
        return sum(self._size(weight) + LINE for weight in weights)

    def _size(self, weight: HostWeight) -> int:
        return nbytes(FORMATS[weight.type], weight.shape) if len(weight.shape) == 2 else weight.nbytes

    def memory_need(self, weights: Sequence[HostWeight], cache: CacheSpec, specs: Sequence[OpSpec]) -> MemoryNeed:
        arena = self._arena_bytes(weights)
        unused = arena - sum(map(self._size, weights)) + left_over(arena)
        scratch = scratch_bytes(specs, self.host, self.threads) + unused
        return MemoryNeed(weights=sum(map(self._size, weights)), cache=cache_bytes(cache), scratch=scratch)

    def weight(self, host_weight: HostWeight) -> Weight:
        shape = host_weight.shape
        if len(shape) == 1:
            vector = aligned(host_weight.nbytes).view(np.float32)
            vector[...] = host_weight.data.view(np.float32)
            return Weight(vector, "F32", shape)
        memory = self._weights.take(self._size(host_weight))
        form = FORMATS[host_weight.type]
        where = (host_weight.data.ctypes.data, memory.ctypes.data, *shape)
        numbers = form.numbers() if isinstance(form, Format) else None
        repack = entry("repack_plain" if numbers is None else "repack")
        how = form.width if numbers is None else numbers.ctypes.data

        def slab(first: int) -> None:
            last = min(first + SLICE, groups_of(shape[0]))
            repack(*where, how, first, last)

        for _ in self._loaders.map(slab, range(0, groups_of(shape[0]), SLICE)):
            pass
        forget_pages(host_weight.data)
        return Weight(memory, host_weight.type, shape)

    def weight_bytes(self, weight: Weight) -> int:
        return weight.nbytes

    def empty(self, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
        kind = np.dtype(dtype)
        return aligned(int(np.prod(shape)) * kind.itemsize).view(kind).reshape(shape)

    def rows(self, tensor: npt.NDArray[Any], n: int) -> npt.NDArray[Any]:
        return tensor[:n]

    def kv_cache(self, spec: CacheSpec) -> KVCache:
        spec.require(self.memory().free)
        return KVCache(spec)

    def inputs(self, shapes: Mapping[str, tuple[int, ...]]) -> Inputs:
        return Inputs(shapes)

    def write(self, tensor: npt.NDArray[Any], host: npt.NDArray[Any]) -> None:
        if host.shape != tensor.shape:
            raise ValueError(f"host array of shape {host.shape} for a tensor of shape {tensor.shape}")
        tensor[...] = host

    def read(self, tensor: npt.NDArray[Any], host: npt.NDArray[Any]) -> None:
        if host.shape != tensor.shape or host.dtype != tensor.dtype:
            raise ValueError(
                f"host array {host.dtype} of shape {host.shape} for a tensor {tensor.dtype} of shape {tensor.shape}"
            )
        host[...] = tensor

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        return self.launcher.record(run)

    def memory(self) -> MemoryInfo:
        return host_memory()

    def close(self) -> None:
        """Ends the threads and lets go of scratch memory."""
        self._pool.close()
        self._loaders.shutdown()
        self._scratch.clear()
        self._weights = Arena(0)
