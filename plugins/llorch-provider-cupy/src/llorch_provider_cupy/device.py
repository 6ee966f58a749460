"""An opened card: its runtime, its memory, what its operations share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from llorch.providers import (
    CacheSpec,
    DeviceInfo,
    DeviceMemoryError,
    HostWeight,
    MemoryInfo,
    MemoryNeed,
    OpSpec,
    RopeSpec,
    amount,
)
from llorch_provider_cupy import programs
from llorch_provider_cupy.formats import FORMATS, LARGEST_HALF, UNIT
from llorch_provider_cupy.joining import fuse
from llorch_provider_cupy.launches import FLAT_THREADS, Function, Work, blocks, f32, i32
from llorch_provider_cupy.memory import (
    Inputs,
    KVCache,
    Memory,
    Tensor,
    Weight,
    blocks_that_fit,
    cache_block_bytes,
)
from llorch_provider_cupy.programs import Program
from llorch_provider_cupy.runtime import Allocation, Plain, Runtime

CAPTURE_SIZES = (1, 2, 4, 8, 16, 32, 64)  # tokens of a decode step
MOST_BLOCKS = 65535  # of a launch along y
NATIVE: Mapping[str, Plain] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}  # weights that lie as cuBLAS takes them


class CudaDevice:
    """Tensors are `memory.Tensor`, weights `memory.Weight`."""

    weight_types: Mapping[Any, frozenset[str]] = {
        "embed": frozenset(FORMATS),
        "matmul": frozenset(FORMATS),
        "vector": frozenset({"F32"}),
    }
    cache_dtypes = ("f16", "f32")
    block_sizes = (32, 16, 64)
    capture_sizes = CAPTURE_SIZES

    def __init__(
        self,
        runtime: Runtime,
        info: DeviceInfo,
        *,
        halves: bool = False,
        prompts_on_tensor_cores: bool = False,
        joins_norms: bool = False,
    ) -> None:
        """`halves`: weights of products are kept as halves too, for products of many tokens. `joins_norms`: in steps
        of one token, norms and the rounding behind gate and up are done by the products before them."""
        self.runtime, self.info, self._halves = runtime, info, halves
        self.prompts_on_tensor_cores, self.joins_norms = prompts_on_tensor_cores, joins_norms
        self.properties = runtime.properties
        self._memory = Memory(runtime)
        self._functions: dict[tuple[Program, str], Function] = {}
        self._scratch: dict[str, Allocation] = {}
        self._turns: dict[tuple[float, ...], Allocation] = {}

    # ---- for the operations ----

    def function(self, program: Program, name: str, threads: int) -> Function:
        key = (program, name)
        if key not in self._functions:
            self._functions[key] = Function(self, program, name, threads)
        return self._functions[key]

    def reserve(self, name: str, nbytes: int) -> None:
        """Makes room that sites share by name: all work is on one stream, so each has it to itself in its turn."""
        if name not in self._scratch or self._scratch[name].nbytes < nbytes:
            self._scratch[name] = self._memory.allocate(nbytes, f"scratch memory ({name})")

    def scratch(self, name: str) -> Allocation:
        """What was reserved when the site was bound."""
        return self._scratch[name]

    def scratches(self) -> tuple[Allocation, ...]:
        return tuple(self._scratch.values())

    def rotation(self, spec: RopeSpec) -> tuple[int | np.generic, ...]:
        """A rotation as kernels take it: frequencies in whole turns a position, how many, whether pairs are halves of
        a head, and the magnitude. Sites with the same frequencies share their memory."""
        frequencies = spec.frequencies
        if frequencies not in self._turns:
            turns = np.array(frequencies, np.float64) / (2 * np.pi)
            self._turns[frequencies] = self._filled(turns, "RoPE frequencies")
        turns_at = self._turns[frequencies].address
        return turns_at, i32(len(frequencies)), i32(spec.pairing == "half"), f32(spec.magnitude)

    def expand(self, weight: Weight, kind: Plain, target: int, first: int, count: int) -> list[Work]:
        """Writes rows `first` .. first + count - 1 of a matrix as plain values, of whole units of columns a row."""
        rows, cols = weight.shape
        width, units = padded_columns(cols), padded_columns(cols) // UNIT
        name = "to_floats" if kind == "f32" else "to_half_values"
        launch = self.function(programs.products(weight.type), name, FLAT_THREADS)
        works = []
        for start in range(0, count, MOST_BLOCKS):
            grid = (blocks(width // 8, FLAT_THREADS), min(MOST_BLOCKS, count - start))
            at = target + start * width * (4 if kind == "f32" else 2)
            works.append(launch.work(grid, at, weight.address, i32(rows), i32(units), i32(first + start)))
        return works

    def _filled(self, host: npt.NDArray[Any], what: str) -> Allocation:
        allocation = self._memory.allocate(host.nbytes, what)
        self.runtime.upload(allocation.address, np.ascontiguousarray(host))
        return allocation

    # ---- the contract ----

    def expect(self, weights: Sequence[HostWeight]) -> str:
        """Raises DeviceMemoryError before anything is uploaded where the weights cannot fit."""
        need, free = sum(map(self._size, weights)), self.memory().free
        halves = sum(map(self._half_bytes, weights))
        where = f"on {self.info.description}, {amount(free)} are free"
        if need > free:
            raise DeviceMemoryError(
                f"the weights take {amount(need)} {where}, and no context would fit: use a more strongly "
                "quantised model, a card with more memory, or several (--device cuda:0,1)"
            )
        if need + halves > free:
            raise DeviceMemoryError(
                f"the weights take {amount(need)} and their halves {amount(halves)} {where}: "
                "start without --prefill-weights half"
            )
        beside = f", and {amount(halves)} of halves beside them" if self._halves else ""
        return f"weights: {amount(need)}, quantised as in the file, scales apart from quants{beside}"

    def bytes_of(self, weight: HostWeight) -> int:
        """What a weight takes here, at most."""
        return self._size(weight) + self._half_bytes(weight)

    def _half_bytes(self, weight: HostWeight) -> int:
        """What a matrix takes as halves beside itself: at most, as one with larger values gets none."""
        if not self._halves or "matmul" not in weight.uses or weight.type in ("F16", "F32"):
            return 0
        if weight.type == "BF16" and self._multiplies_brains:
            return 0
        return 2 * weight.shape[0] * padded_columns(weight.shape[1])

    @property
    def _multiplies_brains(self) -> bool:
        return self.properties.compute_capability >= (8, 0)

    def _size(self, weight: HostWeight) -> int:
        return FORMATS[weight.type].nbytes(weight.shape) if len(weight.shape) == 2 else weight.nbytes

    def memory_need(self, weights: Sequence[HostWeight], cache: CacheSpec, specs: Sequence[OpSpec]) -> MemoryNeed:
        from llorch_provider_cupy.forecast import scratch_bytes  # the operations it looks at import this module

        return MemoryNeed(
            weights=sum(map(self._size, weights)),
            cache=cache.blocks * cache.layers * cache_block_bytes(cache),
            scratch=scratch_bytes(specs, self.properties.multiprocessors),
        )

    def weight(self, host_weight: HostWeight) -> Weight:
        if len(host_weight.shape) == 1:
            values = host_weight.data.view(np.float32)
            allocation = self._filled(values, host_weight.name)
            return Weight(allocation, "F32", host_weight.shape, host_weight.nbytes, "f32")
        form, nbytes = FORMATS[host_weight.type], self._size(host_weight)
        allocation = self._memory.allocate(nbytes, host_weight.name)
        for offset, piece in form.repacked(host_weight):
            self.runtime.upload(allocation.address + offset, piece)
        found = Weight(allocation, host_weight.type, host_weight.shape, nbytes, self._kind(host_weight))
        if found.kind == "f16" and (half_bytes := self._half_bytes(host_weight)):
            halves = self._memory.allocate(half_bytes, f"{host_weight.name} as halves")
            for work in self.expand(found, "f16", halves.address, 0, found.shape[0]):
                work()
            found = replace(found, halves=halves)
        return found

    def _kind(self, weight: HostWeight) -> Plain:
        """The type that loses nothing to speak of: halves, but where a value is beyond them."""
        if weight.type == "F16":
            return "f16"
        if weight.type == "BF16" and self._multiplies_brains:
            return "bf16"
        if weight.type == "F32" or FORMATS[weight.type].largest_value(weight) > LARGEST_HALF:
            return "f32"
        return "f16"

    def weight_bytes(self, weight: Weight) -> int:
        return weight.nbytes

    def held_bytes(self, weight: Weight) -> int:
        return weight.nbytes + (0 if weight.halves is None else weight.halves.nbytes)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        kind = np.dtype(dtype)
        shape = tuple(int(n) for n in shape)
        return Tensor(self._memory.allocate(int(np.prod(shape)) * kind.itemsize, "activations"), shape, kind)

    def rows(self, tensor: Tensor, n: int) -> Tensor:
        return tensor.rows(n)

    def cache_blocks(self, spec: CacheSpec) -> int:
        """How many of the spec's blocks there is room for."""
        return blocks_that_fit(spec, self.memory().free, self.properties.piece)

    def kv_cache(self, spec: CacheSpec) -> KVCache:
        """Raises DeviceMemoryError with the context that would fit."""
        need, free = spec.blocks * spec.layers * cache_block_bytes(spec), self.memory().free
        if need > free:
            fit = max(0, blocks_that_fit(spec, free, self.properties.piece) - 1) * spec.block_size
            tokens = (spec.blocks - 1) * spec.block_size
            raise DeviceMemoryError(
                f"a KV cache of {tokens} tokens needs {amount(need)}, {amount(free)} are free on "
                f"{self.info.description}: {fit} tokens would fit (--context times --parallel)"
            )
        return KVCache(self.runtime, self._memory, spec)

    def inputs(self, shapes: Mapping[str, tuple[int, ...]]) -> Inputs:
        return Inputs(self.runtime, self._memory, shapes)

    def write(self, tensor: Tensor, host: npt.NDArray[Any]) -> None:
        """Returns when `host` may be changed again."""
        values = np.ascontiguousarray(host, tensor.dtype)
        if values.shape != tensor.shape:
            raise ValueError(f"host array of shape {values.shape} for a tensor of shape {tensor.shape}")
        self.runtime.upload(tensor.address, values)

    def read(self, tensor: Tensor, host: npt.NDArray[Any]) -> None:
        if host.shape != tensor.shape or host.dtype != tensor.dtype:
            raise ValueError(
                f"host array {host.dtype} of shape {host.shape} for a tensor {tensor.dtype} of shape {tensor.shape}"
            )
        found = host if host.flags.c_contiguous else np.empty(host.shape, host.dtype)
        self.runtime.download(found, tensor.address)
        if found is not host:
            host[...] = found

    def capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        return self.runtime.record(run)

    def fuse(self, entries: Sequence[Any]) -> Sequence[Any]:
        joined = fuse(entries, norms=self.joins_norms)
        return [entries[place]._replace(kernel=kernel) for place, kernel in joined.items()]

    def memory(self) -> MemoryInfo:
        total, free = self.runtime.memory()
        return MemoryInfo(total=total, free=free)

    def close(self) -> None:
        """Waits for what is running, then frees all memory."""
        self.runtime.close()
        self._memory.close()
        self._scratch.clear()
        self._turns.clear()


def padded_columns(cols: int) -> int:
    return -(-cols // UNIT) * UNIT
