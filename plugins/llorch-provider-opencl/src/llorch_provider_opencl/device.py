"""An opened OpenCL device: one in-order queue, its memory, its programs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llorch.providers import (
    CacheSpec,
    DeviceInfo,
    DeviceMemoryError,
    GateUpSwigluSpec,
    HostWeight,
    MatmulGroupSpec,
    MatmulSpec,
    MemoryInfo,
    MemoryNeed,
    OpSpec,
    amount,
)
from llorch.providers.host_memory import host_memory, left_over
from llorch_provider_opencl.formats import FORMATS, ROWS_PER_GROUP, repacked
from llorch_provider_opencl.memory import Buffer, Inputs, KVCache, Memory, Tensor, Weight, layer_bytes
from llorch_provider_opencl.programs import Macros, Programs, source
from llorch_provider_opencl.quirks import Settings, Traits, settings_for
from llorch_provider_opencl.recording import Launcher
from llorch_provider_opencl.runtimes import import_pyopencl

CAPTURE_SIZES = (1, 2, 4, 8, 16, 32)  # tokens of a decode step


def traits_of(device: Any) -> Traits:
    cl = import_pyopencl()
    return Traits(
        is_cpu=bool(device.type & cl.device_type.CPU),
        platform=device.platform.name,
        name=device.name.strip(),
        vendor=device.vendor,
        vector_width=device.native_vector_width_float,
        compute_units=device.max_compute_units,
        local_bytes=device.local_mem_size,
        max_group=device.max_work_group_size,
    )


@functools.cache
def _shared(device: Any, options: str) -> tuple[Any, Programs]:
    """One context a device for the life of the process, so that a program is loaded once however often it is opened."""
    cl = import_pyopencl()
    context = cl.Context([device])
    return context, Programs(context, device, options)


class OpenCLDevice:
    """Tensors are `memory.Tensor`, weights `memory.Weight`."""

    weight_types: Mapping[Any, frozenset[str]] = {
        "embed": frozenset(FORMATS),
        "matmul": frozenset(FORMATS),
        "vector": frozenset({"F32"}),
    }
    cache_dtypes = ("f32", "f16")
    block_sizes = (32, 16, 64)

    def __init__(self, device: Any, info: DeviceInfo, settings: Settings | None = None) -> None:
        cl = import_pyopencl()
        self.info, self.traits = info, traits_of(device)
        self.settings = settings or settings_for(self.traits)
        self._device = device
        self.context, self._programs = _shared(device, self.settings.options)
        self.queue = cl.CommandQueue(self.context, device)  # in order: no kernel waits for another explicitly
        self.launcher = Launcher(self.queue, device)
        self.capture_sizes = CAPTURE_SIZES if self.launcher.can_record else ()
        self._memory = Memory(self.context, device, self.settings.huge_pages)
        self._prepared: Buffer | None = None
        self._frequencies: dict[tuple[float, ...], Buffer] = {}

    # ---- for the operations ----

    def kernel(self, name: str, files: Sequence[str], macros: Macros) -> Any:
        """A new kernel object, whose arguments are its own."""
        program = self._programs.get(source("lanes", *files), {"WIDTH": self.settings.width, **macros})
        return import_pyopencl().Kernel(program, name)

    def reserve_prepared(self, floats: int) -> None:
        """Makes room for the activations that products prepare: shared by all, because the queue is in order."""
        if self._prepared is None or self._prepared.nbytes < 4 * floats:
            self._prepared = self._memory.allocate(4 * floats, "the prepared activations")

    @property
    def prepared(self) -> Buffer:
        assert self._prepared is not None  # reserved when the product was bound
        return self._prepared

    def frequencies(self, values: tuple[float, ...]) -> Buffer:
        """Float64 frequencies as pairs of float32 whose sum they are, one buffer for all sites that share them."""
        if values not in self._frequencies:
            exact = np.array(values, np.float64)
            high = exact.astype(np.float32)
            pairs = np.stack([high, (exact - high).astype(np.float32)], axis=1)
            self._frequencies[values] = self._filled(pairs, "RoPE frequencies")
        return self._frequencies[values]

    def _filled(self, host: npt.NDArray[Any], what: str) -> Buffer:
        buffer = self._memory.allocate(host.nbytes, what)
        import_pyopencl().enqueue_copy(self.queue, buffer.cl, np.ascontiguousarray(host), is_blocking=True)
        return buffer

    # ---- the contract ----

    def expect(self, weights: Sequence[HostWeight]) -> str:
        """Raises DeviceMemoryError before anything is uploaded where the weights cannot fit."""
        need = sum(self._size(w) for w in weights)
        free = self.memory().free
        if need > free:
            raise DeviceMemoryError(
                f"the weights take {need / 2**30:.2f} GiB on {self.info.description}, {free / 2**30:.2f} GiB are free: "
                "use a more strongly quantised model or another device"
            )
        return f"weights: {amount(need)}, quantised as in the file, rows side by side"

    def _size(self, weight: HostWeight) -> int:
        return FORMATS[weight.type].nbytes(weight.shape) if len(weight.shape) == 2 else weight.nbytes

    def memory_need(self, weights: Sequence[HostWeight], cache: CacheSpec, specs: Sequence[OpSpec]) -> MemoryNeed:
        sizes = list(map(self._size, weights))
        prepared = max((self._prepared_bytes(product) for spec in specs for product in _products(spec)), default=0)
        rounding = sum(map(left_over, sizes)) if self.settings.huge_pages else 0
        held = cache.layers * sum(layer_bytes(cache))
        return MemoryNeed(weights=sum(sizes), cache=held, scratch=prepared + rounding)

    def _prepared_bytes(self, spec: MatmulSpec) -> int:
        form, tile = FORMATS[spec.type], self.settings.prefill_tokens
        columns = form.units(spec.cols) * form.columns
        return 4 * -(-spec.max_tokens // tile) * tile * (columns + columns // form.segment)

    def weight(self, host_weight: HostWeight) -> Weight:
        cl, shape = import_pyopencl(), host_weight.shape
        if len(shape) == 1:
            padded = np.zeros(-(-shape[0] // ROWS_PER_GROUP) * ROWS_PER_GROUP, np.float32)
            padded[: shape[0]] = host_weight.data.view(np.float32)
            return Weight(self._filled(padded, host_weight.name), "F32", shape, host_weight.nbytes)
        nbytes = self._size(host_weight)
        buffer = self._memory.allocate(nbytes, host_weight.name, weight=True)
        for offset, slab in repacked(host_weight):
            cl.enqueue_copy(self.queue, buffer.cl, slab, dst_offset=offset, is_blocking=True)
        return Weight(buffer, host_weight.type, shape, nbytes)

    def weight_bytes(self, weight: Weight) -> int:
        return weight.nbytes

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        kind = np.dtype(dtype)
        shape = tuple(int(n) for n in shape)
        return Tensor(self._memory.allocate(int(np.prod(shape)) * kind.itemsize, "activations"), shape, kind)

    def rows(self, tensor: Tensor, n: int) -> Tensor:
        return tensor.rows(n)

    def kv_cache(self, spec: CacheSpec) -> KVCache:
        spec.require(self.memory().free)
        return KVCache(self.queue, self._memory, spec)

    def inputs(self, shapes: Mapping[str, tuple[int, ...]]) -> Inputs:
        return Inputs(self.queue, self._memory, shapes)

    def write(self, tensor: Tensor, host: npt.NDArray[Any]) -> None:
        """Returns when `host` may be changed again."""
        values = np.ascontiguousarray(host, tensor.dtype)
        if values.shape != tensor.shape:
            raise ValueError(f"host array of shape {values.shape} for a tensor of shape {tensor.shape}")
        offset = tensor.offset * tensor.dtype.itemsize
        import_pyopencl().enqueue_copy(self.queue, tensor.cl, values, dst_offset=offset, is_blocking=True)

    def read(self, tensor: Tensor, host: npt.NDArray[Any]) -> None:
        if host.shape != tensor.shape or host.dtype != tensor.dtype:
            raise ValueError(
                f"host array {host.dtype} of shape {host.shape} for a tensor {tensor.dtype} of shape {tensor.shape}"
            )
        found = host if host.flags.c_contiguous else np.empty(host.shape, host.dtype)
        offset = tensor.offset * tensor.dtype.itemsize
        import_pyopencl().enqueue_copy(self.queue, found, tensor.cl, src_offset=offset, is_blocking=True)
        if found is not host:
            host[...] = found

    def capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        return self.launcher.record(run)

    def memory(self) -> MemoryInfo:
        """OpenCL tells the total alone: what this device object holds is taken off, and a CPU shares the machine's."""
        total = self._device.global_mem_size
        free = total - self._memory.allocated
        if self.traits.is_cpu:
            free = min(free, host_memory().free)
        return MemoryInfo(total=total, free=max(0, free))

    def close(self) -> None:
        """Waits for what is running, then frees all memory."""
        self.queue.finish()
        self._memory.close()
        self._prepared = None
        self._frequencies.clear()


def _products(spec: OpSpec) -> Sequence[MatmulSpec]:
    match spec:
        case MatmulSpec():
            return (spec,)
        case MatmulGroupSpec():
            return spec.parts
        case GateUpSwigluSpec():
            return (spec.gate, spec.up)
    return ()
