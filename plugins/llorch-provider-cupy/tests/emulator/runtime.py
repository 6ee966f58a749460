"""`Runtime` over host memory, with the kernels compiled by g++ (cuda_on_host.h).

Every allocation lies between guard bands and starts as NaN. After each launch the guards of all memory that the kernel
was given are looked at, so that a write out of bounds ends the test that made it.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llorch_provider_cupy.programs import Program
from llorch_provider_cupy.runtime import Gemm, Properties

from llorch.providers import MemoryLimit

HEADER, RACES = (Path(__file__).with_name(name) for name in ("cuda_on_host.h", "races.h"))
CACHE = Path(__file__).parents[4] / ".cache" / "cuda-emulator"  # of the checkout; nothing else depends on it
OPTIONS = ("-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fno-gnu-unique", "-U_FORTIFY_SOURCE", "-w")
GUARD, ALIGNMENT, POISON = 512, 256, 0xFF
RUN = """
extern "C" const char *run_{name}(const unsigned *sizes, void **arguments, const size_t *bytes, size_t count) {{
    return emulator::launch({name}, sizes, arguments, bytes, count);
}}
extern "C" uint64_t writes_{name}() {{ return emulator::writes({name}); }}
"""
LOOK_FOR_RACES = bool(os.environ.get("LLORCH_EMULATOR_RACES"))  # it makes launches some ten times slower
LAUNCHING = threading.Lock()  # an emulated card runs one kernel at a time, and all share their fibers


NO_COMPILER = "the emulated card needs g++: apt install g++"


class EmulatorError(AssertionError):
    """A kernel did what it must not."""


def compiler() -> str | None:
    return shutil.which("g++")


def build(program: Program, *, races: bool = False) -> ctypes.CDLL:
    """The program as a shared library, kept by all that it is made of. `races`: one that looks for them."""
    wrappers = "".join(RUN.format(name=name) for name in program.kernels)
    headers = (HEADER, RACES) if races else (HEADER,)
    options = (
        *OPTIONS,
        *program.defines,
        "-DEMULATED",
        *(word for path in headers for word in ("-include", str(path))),
    )
    options += ("-fsanitize=thread",) if races else ()
    source = program.source + wrappers
    texts = [source, *(path.read_text() for path in headers), *options]
    library = CACHE / f"{program.name}-{hashlib.sha256(chr(0).join(texts).encode()).hexdigest()[:32]}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        temporary = library.with_suffix(f".{os.getpid()}")
        compiled = temporary.with_suffix(f"{temporary.suffix}.o")
        command = [str(compiler()), *options, "-fPIC", "-x", "c++", "-c", "-", "-o", str(compiled)]
        subprocess.run(command, input=source, text=True, check=True)
        # without the option, as its library is not wanted: races.h has the functions
        subprocess.run([str(compiler()), "-shared", str(compiled), "-o", str(temporary)], check=True)
        compiled.unlink()
        temporary.replace(library)
    return ctypes.CDLL(str(library))


class HostAllocation:
    def __init__(self, runtime: HostRuntime, nbytes: int) -> None:
        self._memory = np.full(nbytes + 2 * GUARD + ALIGNMENT, POISON, np.uint8)
        self._start = GUARD + -(self._memory.ctypes.data + GUARD) % ALIGNMENT
        self.address, self.nbytes = self._memory.ctypes.data + self._start, nbytes
        self._runtime: HostRuntime | None = runtime
        runtime.allocated[self.address] = (nbytes, self._memory)

    def release(self) -> None:
        if self._runtime is not None:
            self._runtime.check(self.address)
            del self._runtime.allocated[self.address]
            self._runtime, self.nbytes, self._memory = None, 0, np.empty(0, np.uint8)

    def __del__(self) -> None:
        if self._runtime is not None:
            self._runtime.allocated.pop(self.address, None)


class HostRuntime:
    properties = Properties("emulated card", (9, 0), 2, 1)

    def __init__(self, total: int = 1 << 30, limit: MemoryLimit | None = None, *, races: bool = LOOK_FOR_RACES) -> None:
        """`races`: a launch whose threads race is an error."""
        self.total = total if limit is None else limit.of(total)
        # iterated as a copy: what the garbage collector finds meanwhile takes itself out
        self.allocated: dict[int, tuple[int, npt.NDArray[np.uint8]]] = {}
        self.launched: list[str] = []  # names of kernels, for tests that ask which ran
        self._races = races
        self._libraries: dict[Program, ctypes.CDLL] = {}
        self._recording: list[Callable[[], None]] | None = None

    def allocate(self, nbytes: int) -> HostAllocation:
        if nbytes > self.memory()[1]:
            raise MemoryError
        return HostAllocation(self, nbytes)

    def memory(self) -> tuple[int, int]:
        return self.total, self.total - sum(nbytes for nbytes, _ in self.allocated.copy().values())

    def _view(self, address: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Bytes within one allocation."""
        for start, (size, memory) in self.allocated.copy().items():
            if start <= address and address + nbytes <= start + size:
                at = address - memory.ctypes.data
                return memory[at : at + nbytes]
        raise EmulatorError(f"{nbytes} bytes at {address:#x} are not the device's")

    def _holds(self, address: int) -> bool:
        return any(start <= address < start + size for start, (size, _) in self.allocated.copy().items())

    def check(self, address: int) -> None:
        """The guards around what lies at an address."""
        for start, (size, memory) in self.allocated.copy().items():
            if start <= address < start + size:
                before = start - memory.ctypes.data
                if (memory[:before] != POISON).any() or (memory[before + size :] != POISON).any():
                    raise EmulatorError(f"something was written outside of {size} bytes")
                return
        raise EmulatorError(f"{address:#x} is no address of the device's")

    # ---- transfers ----

    def upload(self, address: int, host: npt.NDArray[Any]) -> None:
        assert host.flags.c_contiguous
        self._view(address, host.nbytes)[...] = host.reshape(-1).view(np.uint8)

    send = upload

    def download(self, host: npt.NDArray[Any], address: int) -> None:
        assert host.flags.c_contiguous
        host.reshape(-1).view(np.uint8)[...] = self._view(address, host.nbytes)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._do(lambda: self._copy(target, source, nbytes))

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        self._view(target, nbytes)[...] = self._view(source, nbytes)

    def transfer(self, other: HostRuntime, target: int, source: int, nbytes: int) -> None:
        assert self._recording is None
        assert other._recording is None
        other._view(target, nbytes)[...] = self._view(source, nbytes)

    # ---- kernels ----

    def function(self, program: Program, name: str) -> Any:
        if program not in self._libraries:
            self._libraries[program] = build(program, races=self._races)
        function = getattr(self._libraries[program], f"run_{name}")
        function.restype = ctypes.c_char_p
        function.watch = getattr(self._libraries[program], "watch_races", None)
        writes = getattr(self._libraries[program], f"writes_{name}")
        writes.restype = ctypes.c_uint64
        function.writes = writes()
        function.name = f"{name} of {program}"
        return function

    def launch(self, function: Any, grid: tuple[int, int, int], threads: int, arguments: Sequence[np.generic]) -> None:
        self._do(lambda: self._launch(function, grid, threads, arguments))

    def _launch(self, function: Any, grid: tuple[int, int, int], threads: int, arguments: Sequence[np.generic]) -> None:
        assert all(n > 0 for n in grid), f"{function.name}: a grid of {grid}"
        assert max(grid[1:]) <= 65535, f"{function.name}: a grid of {grid}"
        values = [np.asarray(a).reshape(1).copy() for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
        widths = (ctypes.c_size_t * len(values))(*(v.nbytes for v in values))
        sizes = (ctypes.c_uint * 6)(*grid, threads, 1, 1)
        with LAUNCHING:
            if function.watch is not None:
                self._watch(function, values)
            error = function(sizes, pointers, widths, ctypes.c_size_t(len(values)))
        self.launched.append(function.name)
        if error:
            raise EmulatorError(f"{function.name}: {error.decode()}")
        for address in self._addresses(values):
            self.check(address)

    def _addresses(self, values: Sequence[npt.NDArray[Any]]) -> list[int]:
        """Those among a kernel's arguments."""
        # a count otherwise; some builds of Python have their memory at addresses that small
        wide = (int(value[0]) for value in values if value.dtype == np.uint64)
        return [value for value in wide if value >= 1 << 32 or self._holds(value)]

    def _watch(self, function: Any, values: Sequence[npt.NDArray[Any]]) -> None:
        written = {int(value[0]) for i, value in enumerate(values) if function.writes >> i & 1}
        pieces = [
            (at, at + size)
            for at, (size, _) in self.allocated.copy().items()
            if any(at <= a < at + size for a in written)
        ]
        function.watch((ctypes.c_size_t * (2 * len(pieces)))(*itertools.chain(*pieces)), ctypes.c_size_t(len(pieces)))

    # ---- products ----

    def gemm(self, product: Gemm) -> None:
        self._do(lambda: self._gemm(product))

    def _gemm(self, p: Gemm) -> None:
        x = self._matrix(p.kind, p.x, p.x_stride, p.tokens, p.cols)
        w = self._matrix(p.kind, p.w, p.w_stride, p.rows, p.cols)
        span = (p.tokens - 1) * p.out_stride + p.rows
        out = self._view(p.out, 4 * span).view(np.float32)
        rows = np.lib.stride_tricks.as_strided(out, (p.tokens, p.rows), (4 * p.out_stride, 4))
        rows[...] = x @ w.T
        self.launched.append("gemm")

    def _matrix(self, kind: str, address: int, stride: int, rows: int, cols: int) -> npt.NDArray[np.float32]:
        dtype = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[kind]
        width = np.dtype(dtype).itemsize
        raw = self._view(address, ((rows - 1) * stride + cols) * width).view(dtype)
        found = np.lib.stride_tricks.as_strided(raw, (rows, cols), (stride * width, width))
        if kind == "bf16":
            return (found.astype(np.uint32) << 16).view(np.float32)
        return found.astype(np.float32)

    # ---- recording ----

    def _do(self, work: Callable[[], None]) -> None:
        if self._recording is None:
            work()
        else:
            self._recording.append(work)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        recorded = self._recording = []
        try:
            run()
        finally:
            self._recording = None

        def replay() -> None:
            for work in recorded:
                work()

        return replay

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, first: float, second: float) -> float:
        return second - first

    def close(self) -> None:
        for address in list(self.allocated):
            self.check(address)
