"""This machine's memory: how fast it reads, which limits the decoding of one sequence, and what the process takes.

A decode step reads every weight once and does two operations with it, so on all but the smallest models its speed is
that of reading memory.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import threadpoolctl

MATRIX_ROWS = MATRIX_COLS = 4096  # 64 MiB of float32
PASSES = 5

_RESET_PEAK, _PROCESS = Path("/proc/self/clear_refs"), Path("/proc/self/status")  # Linux, see proc(5)


@dataclass(frozen=True)
class Bandwidth:
    """Rates of the passes, in 10^9 bytes a second; the properties are their medians."""

    read_passes: tuple[float, ...]
    matvec_passes: tuple[float, ...]

    @property
    def read_gb_s(self) -> float:
        """A reduction that only reads."""
        return statistics.median(self.read_passes)

    @property
    def matvec_gb_s(self) -> float:
        """NumPy's float32 matrix-vector product, counting the bytes of the matrices."""
        return statistics.median(self.matvec_passes)

    @property
    def best_gb_s(self) -> float:
        return max(self.read_gb_s, self.matvec_gb_s)

    def __add__(self, other: Bandwidth) -> Bandwidth:
        return Bandwidth(self.read_passes + other.read_passes, self.matvec_passes + other.matvec_passes)


def measure_bandwidth(threads: int | None = None) -> Bandwidth:
    """Reads more than caches hold, with as many threads as there are cores, or `threads`.

    Takes about a second and, while it runs, 1 GiB of memory (512 MiB where less than 4 GiB is free).
    """
    threads = threads or _cores()
    count = 16 if psutil.virtual_memory().available >= 4 << 30 else 8
    matrices = [np.ones((MATRIX_ROWS, MATRIX_COLS), np.float32) for _ in range(count)]
    return Bandwidth(_read(matrices, threads), _matvec(matrices, threads))


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(matrices: list[npt.NDArray[np.float32]], threads: int) -> tuple[float, ...]:
    # of NumPy's reductions the one that computes least, so that memory is what it waits for
    parts = [part for m in matrices for part in np.array_split(m.reshape(-1).view(np.int64), threads)]
    with ThreadPoolExecutor(threads) as pool:
        return _rates(matrices, lambda: list(pool.map(np.bitwise_or.reduce, parts)))


def _matvec(matrices: list[npt.NDArray[np.float32]], threads: int) -> tuple[float, ...]:
    x, out = np.ones(MATRIX_COLS, np.float32), np.empty(MATRIX_ROWS, np.float32)

    def products() -> None:
        for matrix in matrices:
            np.dot(matrix, x, out=out)

    with threadpoolctl.threadpool_limits(threads, user_api="blas"):
        return _rates(matrices, products)


def _rates(matrices: list[npt.NDArray[np.float32]], work: Callable[[], object]) -> tuple[float, ...]:
    """GB/s of each pass, after one that is not counted."""
    size, rates = sum(matrix.nbytes for matrix in matrices), []
    for _ in range(1 + PASSES):
        start = time.perf_counter()
        work()
        rates.append(size / (time.perf_counter() - start) / 1e9)
    return tuple(rates[1:])


def reset_peak_memory() -> None:
    """Lets `peak_memory` count from now on. Does nothing where the system has no such thing."""
    if _RESET_PEAK.exists():
        _RESET_PEAK.write_text("5")


def peak_memory() -> int | None:
    """Most bytes of memory that this process held since the reset, mapped files included; None where unknown."""
    if not _RESET_PEAK.exists():
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", _PROCESS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
