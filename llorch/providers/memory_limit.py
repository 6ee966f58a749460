"""Amounts of memory as a user writes and reads them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_UNITS = {"mib": 1 << 20, "gib": 1 << 30}


def amount(nbytes: int) -> str:
    """Bytes in a message: GiB, or MiB below one."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 1 << 30 else f"{nbytes / 2**20:.1f} MiB"


@dataclass(frozen=True)
class MemoryLimit:
    """Bytes, or a share of all that the device has: one of the two."""

    nbytes: int | None = None
    share: float | None = None

    def of(self, total: int) -> int:
        """The limit in bytes on a device of `total` bytes."""
        if self.nbytes is not None:
            return min(self.nbytes, total)
        return total if self.share is None else int(self.share * total)

    @classmethod
    def parse(cls, text: str) -> MemoryLimit:
        """From "20GiB", "900MiB", "20" (GiB) or "90%". Raises ValueError with what is allowed."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gib|mib|%)?", text.strip().lower())
        if found is None:
            raise ValueError("expected an amount of memory such as 20GiB or 900MiB, or a share such as 90%")
        value, unit = float(found[1]), found[2]
        if unit == "%":
            if not 0 < value <= 100:
                raise ValueError("expected a share above 0% and at most 100%")
            return cls(share=value / 100)
        if unit is None and value < 1:
            raise ValueError(f"{text} may mean a share or GiB: write {value * 100:g}% or {value:g}GiB")
        nbytes = math.floor(value * _UNITS[unit or "gib"])
        if nbytes < 1:
            raise ValueError("expected an amount of memory above 0")
        return cls(nbytes=nbytes)
