"""The threads of an opened device. They spin for a moment after a program, then sleep."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from pathlib import Path

import numpy as np
import psutil

from llorch_provider_numba.native import entry
from llorch_provider_numba.protocol import (
    ASLEEP,
    ENDED,
    ENDING,
    JOIN,
    LIE_DOWN,
    LINE,
    PARTS,
    RECORD,
    SERVE,
    START,
    YIELD,
)

SPINS = 20_000  # pauses before a thread sleeps, about a millisecond: the host's part of a decode step is shorter


def default_threads() -> int:
    """Physical cores that this process may use, no more than the container's CPU limit."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or allowed
    return max(1, min(allowed, physical, _container_limit() or allowed))


def _container_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """CPUs that cgroup v2 or v1 allows, rounded down; None where there is no limit."""
    try:
        if (root / "cpu.max").exists():
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except (OSError, ValueError):
        return None
    return None if quota in ("max", "-1") else max(1, int(quota) // int(period))


def _yield_address() -> int:
    """int f(void) that lets another thread run."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


class Program:
    """Records of operations, in native memory; what they point to is kept alive by `kept`."""

    def __init__(self, records: np.ndarray, kept: object) -> None:
        self.records, self.kept = np.ascontiguousarray(records), kept
        assert self.records.shape[1] * 8 == RECORD
        self.records[-1, 2] = 1  # the step ends when its last operation has
        self.address, self.count = self.records.ctypes.data, len(self.records)


class Pool:
    """The calling thread is one of `threads`."""

    def __init__(self, threads: int) -> None:
        self.threads, self._drive = threads, entry("drive")
        whole = np.zeros((ASLEEP + LINE * threads) // 8 + 8, np.int64)
        skipped = -whole.ctypes.data % LINE // 8
        self._shared = whole[skipped:]
        self._address = self._shared.ctypes.data
        self._shared[YIELD // 8] = _yield_address()
        self._counters = np.zeros((64, LINE // 8), np.int64)
        self._locks = [threading.Lock() for _ in range(threads)]
        for lock in self._locks:
            lock.acquire()
        self._workers = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(1, threads)]
        for worker in self._workers:
            worker.start()

    def run(self, program: Program) -> None:
        """Returns when all of it is done. One thread at a time may call it."""
        needed = program.count * min(self.threads, PARTS)
        if needed > len(self._counters):
            self._counters = np.zeros((needed, LINE // 8), np.int64)
        counters = self._counters.ctypes.data
        if self._drive(START, self._address, 0, self.threads, program.address, program.count, counters):
            self._wake()
            self._drive(JOIN, self._address, 0, self.threads, 0, 0, 0)

    def _wake(self) -> None:
        for thread in range(1, self.threads):
            mark = (ASLEEP + LINE * thread) // 8 + 1
            if self._shared[mark]:
                self._shared[mark] = 0
                self._locks[thread].release()

    def _work(self, thread: int) -> None:
        address, seen = self._address, 0
        while True:
            seen = self._drive(SERVE, address, thread, self.threads, seen, SPINS, 0)
            if seen == ENDED:
                return
            if self._drive(LIE_DOWN, address, thread, self.threads, seen, 0, 0):
                self._locks[thread].acquire()

    def close(self) -> None:
        """Ends the threads."""
        self._shared[ENDING // 8] = 1
        for thread, worker in enumerate(self._workers, start=1):
            while worker.is_alive():
                if self._locks[thread].locked():
                    self._locks[thread].release()
                worker.join(0.01)
        self._workers = []
