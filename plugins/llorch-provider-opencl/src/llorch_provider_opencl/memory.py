"""Device memory: tensors, the inputs of a step, the paged cache, and the books of what is allocated."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llorch.providers import AttentionSpec, CacheSpec, DeviceMemoryError
from llorch.providers.host_memory import HUGE_PAGE, in_huge_pages
from llorch_provider_opencl.runtimes import import_pyopencl

UPLOADS_IN_FLIGHT = 4


class Memory:
    """Allocates an opened device's buffers, and releases those that are left when it closes."""

    def __init__(self, context: Any, device: Any, huge_pages: bool) -> None:
        self._context, self._device, self._huge_pages = context, device, huge_pages
        self._buffers: weakref.WeakSet[Buffer] = weakref.WeakSet()

    @property
    def allocated(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)

    def allocate(self, nbytes: int, what: str, *, weight: bool = False) -> Buffer:
        """`weight`: memory that is read as a whole every step. Raises DeviceMemoryError with what asked for it."""
        largest = self._device.max_mem_alloc_size
        if nbytes > largest:
            raise DeviceMemoryError(
                f"{what} needs {nbytes / 2**30:.2f} GiB in one piece, {self._device.name.strip()} gives at most "
                f"{largest / 2**30:.2f} GiB: use a smaller context or a more strongly quantised model"
            )
        cl, nbytes = import_pyopencl(), max(nbytes, 4)
        try:
            if weight and self._huge_pages and nbytes >= HUGE_PAGE:
                buffer = Buffer(*_over_huge_pages(cl, self._context, nbytes), nbytes)
            else:
                buffer = Buffer(cl.Buffer(self._context, cl.mem_flags.READ_WRITE, nbytes), None, nbytes)
        except (cl.MemoryError, MemoryError, OSError) as error:
            raise DeviceMemoryError(
                f"{what} needs {nbytes / 2**20:.1f} MiB more on {self._device.name.strip()}, which holds "
                f"{self.allocated / 2**30:.2f} GiB of this model: use a smaller --context or --parallel ({error})"
            ) from error
        self._buffers.add(buffer)
        return buffer

    def close(self) -> None:
        for buffer in list(self._buffers):
            buffer.release()


def _over_huge_pages(cl: Any, context: Any, nbytes: int) -> tuple[Any, npt.NDArray[Any]]:
    """A buffer over host memory in huge pages, which must outlive it."""
    host = in_huge_pages(nbytes)
    return cl.Buffer(context, cl.mem_flags.READ_WRITE | cl.mem_flags.USE_HOST_PTR, hostbuf=host), host


class Buffer:
    """A cl.Buffer, the host memory below it if any, and its size."""

    def __init__(self, buffer: Any, host: npt.NDArray[Any] | None, nbytes: int) -> None:
        self.cl, self._host, self.nbytes = buffer, host, nbytes

    def release(self) -> None:
        self.cl.release()
        self._host, self.nbytes = None, 0


@dataclass(frozen=True)
class Tensor:
    """A buffer from an offset on, which is 0 for activations: kernels that take int32 tensors take the offset too."""

    buffer: Buffer
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int = 0  # in elements

    @property
    def cl(self) -> Any:
        return self.buffer.cl

    @property
    def at(self) -> np.int32:
        """The offset as a kernel's argument."""
        return np.int32(self.offset)

    def rows(self, n: int) -> Tensor:
        return Tensor(self.buffer, (n, *self.shape[1:]), self.dtype, self.offset)


@dataclass(frozen=True)
class Weight:
    """A matrix in groups of rows (formats.py), or a vector of float32 padded to whole groups."""

    buffer: Buffer
    type: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def cl(self) -> Any:
        return self.buffer.cl


class Inputs:
    """All int32 inputs in one host array and one buffer.

    An upload is sent from a copy (one of UPLOADS_IN_FLIGHT): the host may fill the next step while it is on its way.
    """

    def __init__(self, queue: Any, memory: Memory, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._queue = queue
        sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        ends = np.cumsum(list(sizes.values()))
        total = int(ends[-1])
        self._staging = np.zeros(total, np.int32)
        self._buffer = memory.allocate(self._staging.nbytes, "the inputs of a step")
        self.host: dict[str, npt.NDArray[np.int32]] = {}
        self.device: dict[str, Tensor] = {}
        for (name, shape), end in zip(shapes.items(), ends.tolist(), strict=True):
            start = end - sizes[name]
            self.host[name] = self._staging[start:end].reshape(shape)
            self.device[name] = Tensor(self._buffer, tuple(shape), np.dtype(np.int32), start)
        self._copies = [np.empty_like(self._staging) for _ in range(UPLOADS_IN_FLIGHT)]
        self._events: list[Any] = [None] * UPLOADS_IN_FLIGHT
        self._turn = 0

    def upload(self) -> None:
        cl, turn = import_pyopencl(), self._turn
        self._events[turn] = None  # letting go of pyopencl's event waits for its transfer, four steps old
        self._copies[turn][...] = self._staging
        self._events[turn] = cl.enqueue_copy(self._queue, self._buffer.cl, self._copies[turn], is_blocking=False)
        self._turn = (turn + 1) % UPLOADS_IN_FLIGHT


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of a layer, as kernels/attention.cl describes them."""

    keys: Buffer
    values: Buffer


def padded_dim(head_dim: int) -> int:
    """A value's dimensions in the cache: whole vectors at any width."""
    return -(-head_dim // 16) * 16


def layer_bytes(spec: CacheSpec) -> tuple[int, int]:
    """Bytes of a layer's keys and of its values."""
    tokens = spec.blocks * spec.kv_heads * spec.block_size * {"f32": 4, "f16": 2}[spec.dtype]
    return tokens * spec.head_dim, tokens * padded_dim(spec.head_dim)


class KVCache:
    """The blocks of all layers. Keys and values of each layer have their own buffers: devices limit a buffer's size."""

    def __init__(self, queue: Any, memory: Memory, spec: CacheSpec) -> None:
        self._queue = queue
        keys, values = layer_bytes(spec)
        self._key_bytes, self._value_bytes = keys // spec.blocks, values // spec.blocks
        what = f"a KV cache of {spec.blocks * spec.block_size} tokens"
        self.layers = [
            LayerCache(
                memory.allocate(keys, what),
                memory.allocate(values, what),
            )
            for _ in range(spec.layers)
        ]

    def copy(self, src: int, dst: int) -> None:
        """Enqueued like a kernel: it does not wait."""
        cl = import_pyopencl()
        for layer in self.layers:
            for buffer, size in ((layer.keys, self._key_bytes), (layer.values, self._value_bytes)):
                cl.enqueue_copy(
                    self._queue, buffer.cl, buffer.cl, byte_count=size, src_offset=src * size, dst_offset=dst * size
                )


def cache_macros(spec: AttentionSpec) -> dict[str, int | float | str]:
    """What kernels/attention.cl has to know of a site."""
    macros: dict[str, int | float | str] = {
        "HEADS": spec.heads,
        "KV_HEADS": spec.kv_heads,
        "HEAD_DIM": spec.head_dim,
        "PADDED_DIM": padded_dim(spec.head_dim),
        "BLOCK_SIZE": spec.block_size,
        "CACHE_HALF": int(spec.cache_dtype == "f16"),
        "SCALE": float(spec.scale),
    }
    if spec.window is not None:
        macros["WINDOW"] = spec.window
    if spec.soft_cap is not None:
        macros["SOFT_CAP"] = float(spec.soft_cap)
    return macros
