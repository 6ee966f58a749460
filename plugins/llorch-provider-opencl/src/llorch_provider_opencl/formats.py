"""How weights lie on the device: rows side by side, in words of four bytes.

16 rows make a group. A group's columns are cut into units (one or more of GGUF's blocks); a unit is a fixed number of
words for each row, scales before quants, and word i of all 16 rows lies in a row: [groups, units, words, 16]. A kernel
that gives each row a lane reads whole cache lines and never adds up across lanes. Rows and columns are padded with
zeros. The bits of a value are those of the file: no scale is rounded. kernels/weights.cl is this file's other half.

Block formats: ggml's `ggml-common.h` and `ggml-quants.c`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llorch.providers import HostWeight

ROWS_PER_GROUP = 16
SLAB_BYTES = 8 << 20  # of raw blocks repacked at once: temporaries stay below about ten times that

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Format:
    """A weight type. `pack` turns raw units [..., unit_bytes] into words [..., words of the rows' own, without halves].

    `halves` are float16 of a unit, [..., n], which lie as [n, 16] before the words: two to a word.
    """

    type: str
    columns: int  # of a unit
    unit_bytes: int  # of a unit, in the file
    block_columns: int  # of a block, in the file: a row is a whole number of these
    words: int
    segment: int  # columns that share a scale
    pack: Callable[[Bytes], tuple[Words | None, npt.NDArray[np.uint16] | None]]

    def units(self, cols: int) -> int:
        return -(-cols // self.columns)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes on the device of a matrix (rows, cols)."""
        rows, cols = shape
        return -(-rows // ROWS_PER_GROUP) * self.units(cols) * self.words * ROWS_PER_GROUP * 4


def _nibble_words(q: Bytes) -> Words:
    """[..., n] values below 16 -> [..., n / 8] words; nibble k of word w is value 8 w + k."""
    return np.ascontiguousarray(q[..., 0::2] | q[..., 1::2] << 4).view("<u4")


def _field_words(values: Bytes, width: int) -> Words:
    """High bits [..., 32] of a block's quants -> [..., width] words, where the kernel finds them.

    Those of column 8 w + k lie 4 bits above nibble k, and w % (4 / width) fields higher; k = 7 wraps round to 0.
    """
    columns = np.arange(32)
    word, nibble = columns // 8, columns % 8
    per_word = 4 // width
    place = ((nibble + 1) % 8 * 4 + word % per_word * width).astype(np.uint32)
    shifted = values.astype(np.uint32) << place
    found: Words = np.bitwise_or.reduce(shifted.reshape(*values.shape[:-1], width, 32 // width), axis=-1)
    return found


def _halves(raw: Bytes) -> npt.NDArray[np.uint16]:
    return np.ascontiguousarray(raw).view("<u2")


def _pack_f32(raw: Bytes) -> tuple[Words | None, npt.NDArray[np.uint16] | None]:
    return np.ascontiguousarray(raw).view("<u4"), None


def _pack_f16(raw: Bytes) -> tuple[Words | None, npt.NDArray[np.uint16] | None]:
    return None, _halves(raw)


def _pack_q8_0(raw: Bytes) -> tuple[Words | None, npt.NDArray[np.uint16] | None]:
    """Two blocks of 34 bytes: d, 32 signed bytes (stored 128 larger)."""
    blocks = raw.reshape(*raw.shape[:-1], 2, 34)
    quants = np.ascontiguousarray(blocks[..., 2:] ^ 0x80).reshape(*raw.shape[:-1], 64)
    return quants.view("<u4"), _halves(blocks[..., :2]).reshape(*raw.shape[:-1], 2)


def _pack_q4_0(raw: Bytes) -> tuple[Words | None, npt.NDArray[np.uint16] | None]:
    """Two blocks of 18 bytes: d, 16 bytes whose low nibbles are columns 0..15, the high ones 16..31."""
    blocks = raw.reshape(*raw.shape[:-1], 2, 18)
    quants = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)
    return (
        _nibble_words(quants).reshape(*raw.shape[:-1], 8),
        _halves(blocks[..., :2]).reshape(*raw.shape[:-1], 2),
    )


def _k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The 6-bit scales and minima [..., 8] of Q4_K and Q5_K, from their 12 bytes."""
    low, high, rest = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([low & 63, (rest & 15) | (low >> 6 << 4)], axis=-1)
    minima = np.concatenate([high & 63, (rest >> 4) | (high >> 6 << 4)], axis=-1)
    return scales, minima


def _k_nibbles(qs: Bytes) -> Bytes:
    """[..., 128] bytes -> [..., 8, 32]: 32 bytes hold two blocks, the first in the low nibbles."""
    pairs = qs.reshape(*qs.shape[:-1], 4, 32)
    return np.stack([pairs & 15, pairs >> 4], axis=-2).reshape(*qs.shape[:-1], 8, 32)


def _pack_q4_k(raw: Bytes) -> tuple[Words | None, npt.NDArray[np.uint16] | None]:
    """144 bytes: d, dmin, 12 of scales, 128 of quants."""
    scales, minima = _k_scales(raw[..., 4:16])
    quants = _nibble_words(_k_nibbles(raw[..., 16:])).reshape(*raw.shape[:-1], 32)
    return np.concatenate([scales.view("<u4"), minima.view("<u4"), quants], axis=-1), _halves(raw[..., :4])


def _pack_q5_k(raw: Bytes) -> tuple[Words | None, npt.NDArray[np.uint16] | None]:
    """176 bytes: d, dmin, 12 of scales, 32 of fifth bits (bit i of byte c: column 32 i + c), 128 of quants."""
    scales, minima = _k_scales(raw[..., 4:16])
    fifth = np.unpackbits(raw[..., 16:48], axis=-1, bitorder="little").reshape(*raw.shape[:-1], 32, 8).swapaxes(-1, -2)
    quants = np.concatenate([_nibble_words(_k_nibbles(raw[..., 48:])), _field_words(fifth, 1)], axis=-1)
    quants = quants.reshape(*raw.shape[:-1], 40)
    return np.concatenate([scales.view("<u4"), minima.view("<u4"), quants], axis=-1), _halves(raw[..., :4])


def _pack_q6_k(raw: Bytes) -> tuple[Words | None, npt.NDArray[np.uint16] | None]:
    """210 bytes: 128 of low nibbles, 64 of high pairs of bits, 16 signed scales (stored 128 larger), d."""
    lead = raw.shape[:-1]
    low = raw[..., :128].reshape(*lead, 2, 2, 32)  # each half of 128 columns: 64 bytes, columns +0/+64 share them
    low = np.stack([low & 15, low >> 4], axis=-3).reshape(*lead, 8, 32)
    pairs = raw[..., 128:192].reshape(*lead, 2, 1, 32)
    high: Bytes = ((pairs >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & np.uint8(3)).reshape(*lead, 8, 32)
    quants = np.concatenate([_nibble_words(low), _field_words(high, 2)], axis=-1).reshape(*lead, 48)
    scales = np.ascontiguousarray(raw[..., 192:208] ^ 0x80).view("<u4")
    d = _halves(raw[..., 208:210])
    return np.concatenate([scales, quants], axis=-1), np.concatenate([d, np.zeros_like(d)], axis=-1)


FORMATS = {
    f.type: f
    for f in (
        Format("F32", 16, 64, 1, 16, 16, _pack_f32),
        Format("F16", 32, 64, 1, 16, 32, _pack_f16),
        Format("Q8_0", 64, 68, 32, 17, 32, _pack_q8_0),
        Format("Q4_0", 64, 36, 32, 9, 32, _pack_q4_0),
        Format("Q4_K", 256, 144, 256, 37, 32, _pack_q4_k),
        Format("Q5_K", 256, 176, 256, 45, 32, _pack_q5_k),
        Format("Q6_K", 256, 210, 256, 53, 16, _pack_q6_k),
    )
}


def repacked(weight: HostWeight) -> Iterator[tuple[int, Words]]:
    """The matrix in slabs of whole groups: (offset in bytes, words [groups, units, words, 16])."""
    form = FORMATS[weight.type]
    rows, cols = weight.shape
    raw = weight.data.reshape(rows, -1)
    units = form.units(cols)
    step = max(1, SLAB_BYTES // (ROWS_PER_GROUP * raw.shape[1])) * ROWS_PER_GROUP
    group_bytes = units * form.words * ROWS_PER_GROUP * 4
    for start in range(0, rows, step):
        yield start // ROWS_PER_GROUP * group_bytes, _repack(form, raw[start : start + step], units)


def _repack(form: Format, raw: Bytes, units: int) -> Words:
    groups = -(-len(raw) // ROWS_PER_GROUP)
    padded = groups * ROWS_PER_GROUP, units * form.unit_bytes
    if raw.shape != padded:
        whole = np.zeros(padded, np.uint8)
        whole[: raw.shape[0], : raw.shape[1]] = raw
        raw = whole
    words, halves = form.pack(raw.reshape(groups, ROWS_PER_GROUP, units, form.unit_bytes))
    packed = np.empty((groups, units, form.words, ROWS_PER_GROUP), np.uint32)
    first = 0 if halves is None else halves.shape[-1] // 2
    if halves is not None:
        lanes = packed[:, :, :first].view(np.uint16).reshape(groups, units, -1, ROWS_PER_GROUP)
        lanes[...] = halves.transpose(0, 2, 3, 1)
    if words is not None:
        packed[:, :, first:] = words.transpose(0, 2, 3, 1)
    return packed
