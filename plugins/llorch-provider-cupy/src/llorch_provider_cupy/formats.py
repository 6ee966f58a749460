"""How weights lie on the device: sections, each [rows][...], quants in front of scales (kernels/weights.cuh).

The bits of a value are those of the file: no scale is rounded. Rows of plain types are padded with zeros to whole units
of 32 columns. Quants lie 16 bytes to a unit (of Q8_0 in two sections), so that neighbouring threads load neighbouring
bytes.

Block formats: ggml's `ggml-common.h` and `ggml-quants.c`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llorch.providers import HostWeight

UNIT = 32  # columns
SLAB_BYTES = 8 << 20  # of raw blocks repacked at once: temporaries stay below about ten times that
LARGEST_HALF = 65504.0

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Format:
    """A weight type. `pack` turns raw blocks [rows, blocks, block_bytes] into one array [rows, bytes] a section."""

    type: str
    block_columns: int  # of a block of the file
    block_bytes: int
    sections: tuple[int, ...]  # bytes of eight units (256 columns) of a row
    pack: Callable[[Bytes], tuple[Bytes, ...]]
    largest: Callable[[Bytes], float]  # no value of these raw blocks is larger

    def units(self, cols: int) -> int:
        return -(-cols // UNIT)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes on the device of a matrix (rows, cols)."""
        rows, cols = shape
        return rows * sum(self._row_bytes(cols))

    def _row_bytes(self, cols: int) -> list[int]:
        return [self.units(cols) * section // 8 for section in self.sections]

    def repacked(self, weight: HostWeight) -> Iterator[tuple[int, Bytes]]:
        """The matrix in pieces: (offset in bytes, bytes [rows, bytes of a row])."""
        rows, cols = weight.shape
        raw = weight.data.reshape(rows, -1)
        row_bytes = self._row_bytes(cols)
        starts = np.cumsum([0, *row_bytes[:-1]]).tolist()
        step = max(1, SLAB_BYTES // raw.shape[1])
        for first in range(0, rows, step):
            slab = raw[first : first + step]
            packed = self.pack(slab.reshape(len(slab), -1, self.block_bytes))
            for part, start, width in zip(packed, starts, row_bytes, strict=True):
                yield rows * start + first * width, _padded(part, width)

    def largest_value(self, weight: HostWeight) -> float:
        """A bound of what the matrix holds."""
        raw = weight.data.reshape(weight.shape[0], -1)
        step = max(1, SLAB_BYTES // raw.shape[1])
        slabs = (raw[first : first + step] for first in range(0, len(raw), step))
        return max(self.largest(slab.reshape(len(slab), -1, self.block_bytes)) for slab in slabs)


def _padded(part: Bytes, width: int) -> Bytes:
    if part.shape[1] == width:
        return np.ascontiguousarray(part)
    whole = np.zeros((len(part), width), np.uint8)
    whole[:, : part.shape[1]] = part
    return whole


def _rows(part: npt.NDArray[np.uint8]) -> Bytes:
    return np.ascontiguousarray(part).reshape(len(part), -1)


def _plain(raw: Bytes) -> tuple[Bytes, ...]:
    return (_rows(raw),)


def _pack_q4_0(raw: Bytes) -> tuple[Bytes, ...]:
    """18 bytes: d, 16 bytes whose low nibbles are columns 0..15, the high ones 16..31."""
    return _rows(raw[..., 2:]), _rows(raw[..., :2])


def _pack_q8_0(raw: Bytes) -> tuple[Bytes, ...]:
    """34 bytes: d, 32 signed bytes."""
    return _rows(raw[..., 2:18]), _rows(raw[..., 18:]), _rows(raw[..., :2])


def _k_scales(packed: Bytes) -> Bytes:
    """The 6-bit (scale, minimum) [..., 8, 2] of Q4_K and Q5_K, from their 12 bytes."""
    low, high, rest = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([low & 63, (rest & 15) | (low >> 6 << 4)], axis=-1)
    minima = np.concatenate([high & 63, (rest >> 4) | (high >> 6 << 4)], axis=-1)
    return np.stack([scales, minima], axis=-1)


def _k_quants(qs: Bytes) -> Bytes:
    """[..., 128] bytes -> [..., 8, 32] quants: 32 bytes hold two units, the first in the low nibbles."""
    pairs = qs.reshape(*qs.shape[:-1], 4, 32)
    return np.stack([pairs & 15, pairs >> 4], axis=-2).reshape(*qs.shape[:-1], 8, 32)


def _nibbles(quants: Bytes) -> Bytes:
    """[..., 32] quants below 16 -> [..., 16] bytes, the first 16 in the low nibbles."""
    return quants[..., :16] | quants[..., 16:] << 4


def _fields(values: Bytes, width: int) -> Bytes:
    """Further bits [..., n] of columns -> words of 8 / width columns to a byte: column c in byte c % 4 of its word."""
    words = values.reshape(*values.shape[:-1], -1, 8 // width, 4)
    places = (np.arange(8 // width, dtype=np.uint8) * width)[:, None]
    found: Bytes = np.bitwise_or.reduce(words << places, axis=-2)
    return found.reshape(*values.shape[:-1], -1)


def _pack_q4_k(raw: Bytes) -> tuple[Bytes, ...]:
    """144 bytes: d, dmin, 12 of scales, 128 of quants."""
    return _rows(_nibbles(_k_quants(raw[..., 16:]))), _rows(_k_scales(raw[..., 4:16])), _rows(raw[..., :4])


def _pack_q5_k(raw: Bytes) -> tuple[Bytes, ...]:
    """176 bytes: d, dmin, 12 of scales, 32 of fifth bits (bit i of byte c: column 32 i + c), 128 of quants."""
    fifth = np.unpackbits(raw[..., 16:48], axis=-1, bitorder="little").reshape(*raw.shape[:-1], 32, 8).swapaxes(-1, -2)
    quants = _rows(_nibbles(_k_quants(raw[..., 48:])))
    return quants, _rows(_fields(fifth, 1)), _rows(_k_scales(raw[..., 4:16])), _rows(raw[..., :4])


def _pack_q6_k(raw: Bytes) -> tuple[Bytes, ...]:
    """210 bytes: 128 of low nibbles, 64 of high pairs of bits, 16 signed scales, d."""
    lead = raw.shape[:-1]
    low = raw[..., :128].reshape(*lead, 2, 2, 32)  # each half of 128 columns: 64 bytes, columns +0/+64 share them
    low = np.stack([low & 15, low >> 4], axis=-3).reshape(*lead, 8, 32)
    pairs = raw[..., 128:192].reshape(*lead, 2, 1, 32)
    high: Bytes = ((pairs >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & np.uint8(3)).reshape(*lead, 8, 32)
    return _rows(_nibbles(low)), _rows(_fields(high, 2)), _rows(raw[..., 192:208]), _rows(raw[..., 208:210])


def _halves(raw: Bytes, at: int) -> float:
    """The largest size of the half at this byte of each block."""
    found = np.ascontiguousarray(raw[..., at : at + 2]).view(np.float16)
    return float(np.abs(found.astype(np.float32)).max(initial=0))


FORMATS = {
    f.type: f
    for f in (
        Format("F32", 1, 4, (1024,), _plain, lambda raw: float(np.abs(raw.view(np.float32)).max(initial=0))),
        Format("F16", 1, 2, (512,), _plain, lambda raw: _halves(raw, 0)),
        Format("BF16", 1, 2, (512,), _plain, lambda raw: float("inf")),
        Format("Q8_0", 32, 34, (128, 128, 16), _pack_q8_0, lambda raw: 128 * _halves(raw, 0)),
        Format("Q4_0", 32, 18, (128, 16), _pack_q4_0, lambda raw: 8 * _halves(raw, 0)),
        Format("Q4_K", 256, 144, (128, 16, 4), _pack_q4_k, lambda raw: 63 * (15 * _halves(raw, 0) + _halves(raw, 2))),
        Format(
            "Q5_K", 256, 176, (128, 32, 16, 4), _pack_q5_k, lambda raw: 63 * (31 * _halves(raw, 0) + _halves(raw, 2))
        ),
        Format("Q6_K", 256, 210, (128, 64, 16, 2), _pack_q6_k, lambda raw: 128 * 32 * _halves(raw, 208)),
    )
}
