"""Memory of the host, for providers that compute there.

What a process may still take is what the machine has, or its control group (a container) where that is less.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from llorch.providers.device import MemoryInfo

HUGE_PAGE = 2 << 20

# Where control groups are mounted, and the files of limit, use and statistics: version 2, version 1.
# https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
_VERSION_2 = ("", "memory.max", "memory.current", ("inactive_file", "active_file"))
_VERSION_1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def host_memory(mounted: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> MemoryInfo:
    """Bytes. `mounted` and `own`: where Linux tells of control groups; other systems have none."""
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for limit, used in _groups(mounted, own):
        total, free = min(total, limit), min(free, limit - used)
    return MemoryInfo(total=total, free=max(free, 0))


def in_huge_pages(nbytes: int) -> npt.NDArray[Any]:
    """Zeros, uint8, from the beginning of a page of HUGE_PAGE bytes on: in pages of 4 KiB, reading weights once a token
    would wait for address translation."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # private: Python's default is shared memory, which Linux does not give huge pages
        pages = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
    else:  # not Linux: whatever the system gives
        pages = mmap.mmap(-1, nbytes + HUGE_PAGE)
    whole = np.frombuffer(pages, np.uint8)
    skipped = -whole.ctypes.data % HUGE_PAGE
    return whole[skipped : skipped + nbytes]


def left_over(nbytes: int) -> int:
    """Bytes of the last huge page of so much memory that nothing uses."""
    return -nbytes % HUGE_PAGE if nbytes >= HUGE_PAGE else 0


def _groups(mounted: Path, own: Path) -> Iterator[tuple[int, int]]:
    """(limit, use) of the process's group and of those above it; the file cache is no use, it makes room when asked."""
    if not own.exists():
        return
    for line in own.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        folder, limit_file, used_file, cache_keys = _VERSION_2 if number == "0" else _VERSION_1
        root = mounted / folder
        group = root / path.lstrip("/")
        for place in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
            # within a container the path may be the host's, of which its own mount shows the end alone
            if (place / limit_file).exists() and (limit := _number(place / limit_file)) is not None:
                yield limit, (_number(place / used_file) or 0) - _file_cache(place / "memory.stat", cache_keys)


def _number(path: Path) -> int | None:
    """None where it says "max"."""
    text = path.read_text().strip()
    return int(text) if text.isdigit() else None


def _file_cache(path: Path, keys: tuple[str, ...]) -> int:
    values = dict(line.split() for line in path.read_text().splitlines())
    return sum(int(values.get(key, 0)) for key in keys)
