"""`Runtime` on a card, through CuPy: memory from a pool of its own, one non-blocking stream, graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cupy
import numpy as np
import numpy.typing as npt
from cupy.cuda import runtime as cuda

from llorch.providers import DeviceMemoryError, MemoryLimit, ProviderError, amount
from llorch_provider_cupy.compiler import Binaries, Nvrtc, cuda_library
from llorch_provider_cupy.cublas import Cublas, workspace_bytes
from llorch_provider_cupy.programs import Program
from llorch_provider_cupy.runtime import Gemm, Properties

SENDS_IN_FLIGHT = 4
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation, which CuPy 14 has no name for
PIECE = 2 << 20  # of cudaMalloc: the granularity that cuMemGetAllocationGranularity gives on all cards since Pascal
OUTSIDE_OF_THE_POOL = 256 << 20  # bytes left for modules and graphs, a guess: what they take has not been measured
_current = threading.local()  # the runtime whose device and stream CUDA and CuPy hold for this thread


class CupyAllocation:
    def __init__(self, memory: Any, nbytes: int) -> None:
        self._memory, self.address, self.nbytes = memory, int(memory.ptr), nbytes

    def release(self) -> None:
        self._memory, self.nbytes = None, 0


class CupyRuntime:
    def __init__(self, number: int, limit: MemoryLimit | None = None) -> None:
        """`limit`: the most of the card's memory to take; CUDA itself, its graphs and modules come on top."""
        self._device = cupy.cuda.Device(number)
        self._device.use()
        self._limit = None if limit is None else limit.of(cuda.memGetInfo()[1])
        _current.runtime = self
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._stream.use()
        self._pool = cupy.cuda.MemoryPool()
        if self._limit is not None:
            self._pool.set_limit(size=self._limit)
        found = cuda.getDeviceProperties(number)
        capability = int(found["major"]), int(found["minor"])
        self.properties = Properties(found["name"].decode(), capability, int(found["multiProcessorCount"]), PIECE)
        self._binaries = Binaries(Nvrtc(cuda_library("nvrtc")))
        self._modules: dict[Program, Any] = {}
        self._staging: dict[int, _Staging] = {}
        nbytes = workspace_bytes(capability)
        self._workspace = self.allocate(nbytes)
        self._cublas = Cublas(cuda_library("cublas"), self._stream.ptr, self._workspace.address, nbytes)

    def _enter(self) -> None:
        """Makes the device and the stream those of this thread."""
        if getattr(_current, "runtime", None) is not self:
            self._device.use()
            self._stream.use()
            _current.runtime = self

    def allocate(self, nbytes: int) -> CupyAllocation:
        self._enter()
        return CupyAllocation(self._pool.malloc(nbytes), nbytes)

    # ---- transfers ----

    def upload(self, address: int, host: npt.NDArray[Any]) -> None:
        with self._checked():
            cuda.memcpyAsync(address, host.ctypes.data, host.nbytes, cuda.memcpyHostToDevice, self._stream.ptr)
            self._stream.synchronize()

    def send(self, address: int, host: npt.NDArray[Any]) -> None:
        with self._checked():
            if host.nbytes not in self._staging:
                self._staging[host.nbytes] = _Staging(host.nbytes)
            self._staging[host.nbytes].send(address, host, self._stream)

    def download(self, host: npt.NDArray[Any], address: int) -> None:
        with self._checked():
            cuda.memcpyAsync(host.ctypes.data, address, host.nbytes, cuda.memcpyDeviceToHost, self._stream.ptr)
            self._stream.synchronize()

    def copy(self, target: int, source: int, nbytes: int) -> None:
        with self._checked():
            cuda.memcpyAsync(target, source, nbytes, cuda.memcpyDeviceToDevice, self._stream.ptr)

    def transfer(self, other: CupyRuntime, target: int, source: int, nbytes: int) -> None:
        with other._checked():
            ready = cupy.cuda.Event(disable_timing=True)
            ready.record(other._stream)
        with self._checked():
            self._stream.wait_event(ready)
            cuda.memcpyPeerAsync(target, other._device.id, source, self._device.id, nbytes, self._stream.ptr)
            done = cupy.cuda.Event(disable_timing=True)
            done.record(self._stream)
        with other._checked():
            other._stream.wait_event(done)

    @contextmanager
    def _checked(self) -> Iterator[None]:
        """CUDA's errors, which may be those of kernels that were enqueued before, as errors of this provider."""
        self._enter()
        try:
            yield
        except cuda.CUDARuntimeError as error:
            if error.status == OUT_OF_MEMORY:
                total, free = self.memory()
                raise DeviceMemoryError(
                    f"CUDA itself is out of memory on {self.properties.name} ({error}): {amount(free)} of "
                    f"{amount(total)} are free for llorch: start with --gpu-memory and less than "
                    f"{(total - free) / 2**30:.1f}GiB, which leaves more to others"
                ) from error
            raise ProviderError(f"cupy-cuda: {self.properties.name} reports {error}: restart llorch") from error

    # ---- work ----

    def function(self, program: Program, name: str) -> Any:
        self._enter()
        if program not in self._modules:
            module = cupy.cuda.function.Module()
            module.load(self._binaries.get(program, self.properties.compute_capability))
            self._modules[program] = module
        return self._modules[program].get_function(name)

    def launch(self, function: Any, grid: tuple[int, int, int], threads: int, arguments: Sequence[np.generic]) -> None:
        self._enter()
        function(grid, (threads, 1, 1), arguments, stream=self._stream)

    def gemm(self, product: Gemm) -> None:
        self._enter()
        self._cublas.gemm(product)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        with self._checked():
            self._stream.begin_capture()
            try:
                run()
            finally:
                graph = self._stream.end_capture()  # a capture that fails is ended too, or the stream stays unusable
            graph.upload(self._stream)

        def replay() -> None:
            self._enter()
            graph.launch(self._stream)

        return replay

    def mark(self) -> Any:
        self._enter()
        event = cupy.cuda.Event()
        event.record(self._stream)
        return event

    def seconds(self, first: Any, second: Any) -> float:
        with self._checked():
            second.synchronize()
            return float(cupy.cuda.get_elapsed_time(first, second)) / 1e3

    # ---- memory ----

    def memory(self) -> tuple[int, int]:
        self._enter()
        free, total = cuda.memGetInfo()
        free = max(0, free - OUTSIDE_OF_THE_POOL) + self._pool.free_bytes()
        if self._limit is not None:
            total, free = min(total, self._limit), min(free, self._limit - self._pool.used_bytes())
        return total, max(0, free)

    def close(self) -> None:
        self._enter()
        self._stream.synchronize()
        self._cublas.close()
        self._workspace.release()
        self._modules.clear()
        self._staging.clear()
        self._pool.free_all_blocks()


class _Staging:
    """Pinned copies of what is sent each step: the host may fill the next while one is on its way."""

    def __init__(self, nbytes: int) -> None:
        self._pinned = [cupy.cuda.alloc_pinned_memory(nbytes) for _ in range(SENDS_IN_FLIGHT)]
        self._copies = [np.frombuffer(memory, np.uint8, nbytes) for memory in self._pinned]
        self._events = [cupy.cuda.Event(disable_timing=True) for _ in range(SENDS_IN_FLIGHT)]
        self._turn = 0

    def send(self, address: int, host: npt.NDArray[Any], stream: Any) -> None:
        turn = self._turn
        copy, event = self._copies[turn], self._events[turn]
        event.synchronize()  # its transfer of SENDS_IN_FLIGHT steps ago; none before the first record
        copy[...] = host.reshape(-1).view(np.uint8)
        cuda.memcpyAsync(address, copy.ctypes.data, copy.nbytes, cuda.memcpyHostToDevice, stream.ptr)
        event.record(stream)
        self._turn = (turn + 1) % SENDS_IN_FLIGHT
