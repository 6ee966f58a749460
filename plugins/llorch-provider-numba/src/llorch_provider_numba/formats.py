"""How weights lie in memory: 16 rows side by side, so that a vector's lanes are rows and nothing is added across lanes.

16 rows make a group, a group's columns are cut into units. A unit holds the scales of all 16 rows, then their quants:

    halves [n, 16] float16 | scales [segments, 16] int8 | minima [segments, 16] uint8 | pad to 64 bytes | blocks

A block is 32 columns as vectors of 64 bytes. Byte 4 r + j of unpacked vector k is column 4 k + j of row r, k = 0..7.
Bits of a value are split into planes of 8, 4, 2 or 1 bits; a plane of width w packs the eight vectors into w: field f
(bits f w .. f w + w - 1) of packed vector v belongs to unpacked vector f w + v. No bit of a value is changed.

A value is scale * (quant + offset) + minimum, per segment of 16 or 32 columns. `emitter.py` and `repack.py` are this
file's other halves. Block formats in the file: ggml's `ggml-common.h` and `ggml-quants.c`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LANES = 16  # rows of a group
BLOCK = 32  # columns that share a scale of the activations
VECTOR = 4 * LANES  # bytes
SEGMENT = 256  # tokens of context that attention takes at once

# ggml's table of the non-linear 4-bit types, kvalues_iq4nl
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Format:
    """A quantised weight type. `raw` bytes in the file hold `raw_columns` columns."""

    type: str
    code: int  # in repack.py and embed
    planes: tuple[int, ...]  # widths in bits, lowest first; their sum is the quant's
    segment: int  # columns that share a scale
    raw: int
    raw_columns: int
    halves: int  # float16 values: of a block, or of a unit where there are scales
    scales: bool = False  # int8 factors of the first half, one a segment
    minima: bool = False
    offset: int = 0
    table: tuple[int, ...] | None = None

    @property
    def unit(self) -> int:
        """Columns. Types without super-blocks take two blocks, so that vectors begin at cache lines."""
        return 256 if self.raw_columns == 256 else 2 * BLOCK

    @property
    def bits(self) -> int:
        return sum(self.planes)

    @property
    def wide(self) -> bool:
        """Whether quants are signed and take the whole byte."""
        return self.bits == 8 or self.table is not None

    @property
    def blocks(self) -> int:
        return self.unit // BLOCK

    @property
    def segments(self) -> int:
        return self.unit // self.segment

    @property
    def scales_at(self) -> int:
        return 2 * LANES * self.halves * (1 if self.scales else self.blocks)

    @property
    def minima_at(self) -> int:
        return self.scales_at + (LANES * self.segments if self.scales else 0)

    @property
    def blocks_at(self) -> int:
        end = self.minima_at + (LANES * self.segments if self.scales and self.minima else 0)
        return -(-end // VECTOR) * VECTOR

    @property
    def unit_bytes(self) -> int:
        return self.blocks_at + self.blocks * self.bits * VECTOR

    def numbers(self) -> npt.NDArray[np.int64]:
        """What compiled code has to know of it (repack.py, and `embed` in rows.py)."""
        places = (self.scales_at, self.minima_at if self.minima else 0) if self.scales else (0, 0)
        sizes = (self.code, self.raw, self.raw_columns, self.unit, self.unit_bytes, self.bits, self.halves)
        rest = (self.blocks_at, self.segments, self.offset, int(self.minima))
        table = (1, *self.table) if self.table else (0,)
        return np.array((*sizes, *places, *rest, *table), np.int64)


@dataclass(frozen=True)
class PlainFormat:
    """Floats, column by column: [units, unit, 16]. The cache of attention has this layout too."""

    type: str
    code: int
    width: int  # bytes

    unit = 4  # columns

    @property
    def unit_bytes(self) -> int:
        return self.unit * LANES * self.width


QUANTISED = {
    f.type: f
    for f in (
        Format("Q4_0", 2, (4,), 32, 18, 32, 1, offset=-8),
        Format("Q4_1", 3, (4,), 32, 20, 32, 2, minima=True),
        Format("Q5_0", 6, (4, 1), 32, 22, 32, 1, offset=-16),
        Format("Q5_1", 7, (4, 1), 32, 24, 32, 2, minima=True),
        Format("Q8_0", 8, (8,), 32, 34, 32, 1),
        Format("Q2_K", 10, (2,), 16, 84, 256, 2, scales=True, minima=True),
        Format("Q3_K", 11, (2, 1), 16, 110, 256, 1, scales=True, offset=-4),
        Format("Q4_K", 12, (4,), 32, 144, 256, 2, scales=True, minima=True),
        Format("Q5_K", 13, (4, 1), 32, 176, 256, 2, scales=True, minima=True),
        Format("Q6_K", 14, (4, 2), 16, 210, 256, 1, scales=True, offset=-32),
        Format("IQ4_NL", 20, (4,), 32, 18, 32, 1, table=IQ4_VALUES),
        Format("IQ4_XS", 23, (4,), 32, 136, 256, 1, scales=True, table=IQ4_VALUES),
    )
}
PLAIN = {f.type: f for f in (PlainFormat("F32", 0, 4), PlainFormat("F16", 1, 2), PlainFormat("BF16", 30, 2))}
FORMATS: dict[str, Format | PlainFormat] = {**QUANTISED, **PLAIN}


def groups_of(rows: int) -> int:
    return -(-rows // LANES)


def units_of(form: Format | PlainFormat, cols: int) -> int:
    return -(-cols // form.unit)


def nbytes(form: Format | PlainFormat, shape: tuple[int, ...]) -> int:
    """Bytes of a matrix (rows, cols) as it lies in memory."""
    rows, cols = shape
    return groups_of(rows) * units_of(form, cols) * form.unit_bytes
