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
from pathlib import Path

import numpy as np
import psutil
import threadpoolctl

MATRIX_ROWS = MATRIX_COLS = 4096  # 64 MiB of float32
BLAS_SPINS = 0.1  # seconds, more than BLAS's threads keep a core busy after their work: what is measured next needs it

_RESET_PEAK, _PROCESS = Path("/proc/self/clear_refs"), Path("/proc/self/status")  # Linux, see proc(5)


class Bandwidth:
    """Reads more memory than caches hold, pass by pass. The figures are medians, in 10^9 bytes a second.

    Passes are meant to alternate with what they are compared to: others may use the machine at the same time. Keeps
    1 GiB of memory while it lives (512 MiB where less than 4 GiB is free).
    """

    def __init__(self, threads: int | None = None) -> None:
        """`threads`: as many as the device uses, one a core by default."""
        self._threads = threads or _cores()
        count = 16 if psutil.virtual_memory().available >= 4 << 30 else 8
        self._matrices = [np.ones((MATRIX_ROWS, MATRIX_COLS), np.float32) for _ in range(count)]
        self._read_passes: list[float] = []
        self._matvec_passes: list[float] = []
        self._read()  # threads start on first use
        self._matvec()

    def measure(self) -> None:
        """One pass of each kind."""
        self._read_passes.append(self._read())
        self._matvec_passes.append(self._matvec())
        time.sleep(BLAS_SPINS)

    @property
    def read_gb_s(self) -> float:
        """A dot product of long vectors, which only reads."""
        return statistics.median(self._read_passes)

    @property
    def matvec_gb_s(self) -> float:
        """NumPy's float32 matrix-vector product, counting the bytes of the matrices."""
        return statistics.median(self._matvec_passes)

    @property
    def best_gb_s(self) -> float:
        return max(self.read_gb_s, self.matvec_gb_s)

    def _read(self) -> float:
        # BLAS's dot product reads two arrays at once and computes next to nothing: nothing else in NumPy reads faster
        halves = zip(self._matrices[::2], self._matrices[1::2], strict=True)
        parts = [
            pair
            for a, b in halves
            for pair in zip(*(np.array_split(m.reshape(-1), self._threads) for m in (a, b)), strict=True)
        ]
        with (
            ThreadPoolExecutor(self._threads) as pool,
            threadpoolctl.threadpool_limits(1, user_api="blas"),
        ):
            return self._rate(lambda: list(pool.map(lambda pair: np.dot(*pair), parts)))

    def _matvec(self) -> float:
        x, out = np.ones(MATRIX_COLS, np.float32), np.empty(MATRIX_ROWS, np.float32)

        def products() -> None:
            for matrix in self._matrices:
                np.dot(matrix, x, out=out)

        with threadpoolctl.threadpool_limits(self._threads, user_api="blas"):
            return self._rate(products)

    def _rate(self, work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return sum(matrix.nbytes for matrix in self._matrices) / (time.perf_counter() - start) / 1e9


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
