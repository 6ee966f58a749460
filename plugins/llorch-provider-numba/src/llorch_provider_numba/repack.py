"""From GGUF's blocks to groups of 16 rows (formats.py), on the way from the file's map to memory.

Block formats: ggml's `ggml-common.h` and `ggml-quants.c`. Numbers of types are ggml's own.
"""

from __future__ import annotations

import numpy as np

from llorch_provider_numba.intrinsics import (
    bytes_at,
    halves,
    inlined,
    load_i64,
    load_u8,
    load_u16,
    load_u32,
    native,
    room_for_words,
    words,
)

NIBBLES, PAIRS, ONES = np.uint32(0x0F0F0F0F), np.uint32(0x03030303), np.uint32(0x01010101)
SPREAD = np.uint32(0x00204081)  # times four bits: a bit to the bottom of each byte


@inlined
def _nibbles(v, raw):
    """16 bytes: low nibbles are columns 0 to 15, high ones 16 to 31."""
    for k in range(4):
        word = load_u32(raw + 4 * k)
        v[k] = word & NIBBLES
        v[4 + k] = (word >> np.uint32(4)) & NIBBLES


@inlined
def _shifted_nibbles(v, raw, high):
    """32 bytes whose low or high nibbles are the columns."""
    shift = np.uint32(4 if high else 0)
    for k in range(8):
        v[k] = (load_u32(raw + 4 * k) >> shift) & NIBBLES


@inlined
def _fifth_bits(v, bits):
    """Bit c of a word is the fifth bit of column c."""
    for k in range(8):
        four = (bits >> np.uint32(4 * k)) & np.uint32(15)
        v[k] |= ((four * SPREAD) & ONES) << np.uint32(4)


@inlined
def _high_bits(v, raw, shift, mask, position):
    for k in range(8):
        v[k] |= ((load_u32(raw + 4 * k) >> np.uint32(shift)) & mask) << np.uint32(position)


@native
def unpack(code, raw, block, v):
    """The quants of 32 columns, v[k] those of columns 4 k to 4 k + 3. `raw`: the block, or the super-block it is in."""
    half, quarter = block // 4, block % 4
    if code == 2 or code == 20:  # Q4_0, IQ4_NL
        _nibbles(v, raw + 2)
    elif code == 3:  # Q4_1
        _nibbles(v, raw + 4)
    elif code == 6:  # Q5_0
        _nibbles(v, raw + 6)
        _fifth_bits(v, load_u32(raw + 2))
    elif code == 7:  # Q5_1
        _nibbles(v, raw + 8)
        _fifth_bits(v, load_u32(raw + 4))
    elif code == 8:  # Q8_0
        for k in range(8):
            v[k] = load_u32(raw + 2 + 4 * k)
    elif code == 10 or code == 11:  # Q2_K, Q3_K
        quants = raw + (16 if code == 10 else 32) + 32 * half
        for k in range(8):
            v[k] = (load_u32(quants + 4 * k) >> np.uint32(2 * quarter)) & PAIRS
        if code == 11:
            _high_bits(v, raw, block, ONES, 2)
    elif code == 12:  # Q4_K
        _shifted_nibbles(v, raw + 16 + block // 2 * 32, block % 2)
    elif code == 13:  # Q5_K
        _shifted_nibbles(v, raw + 48 + block // 2 * 32, block % 2)
        _high_bits(v, raw + 16, block, ONES, 4)
    elif code == 14:  # Q6_K
        _shifted_nibbles(v, raw + 64 * half + quarter % 2 * 32, quarter // 2)
        _high_bits(v, raw + 128 + 32 * half, 2 * quarter, PAIRS, 4)
    else:  # IQ4_XS
        _nibbles(v, raw + 8 + 16 * block)


@inlined
def _plane(v, out, at, width, position):
    """Packs bits position .. position + width - 1 of the eight words into `width`, 16 words apart."""
    mask = np.uint32(((1 << width) - 1) * 0x01010101)
    for i in range(width):
        word = np.uint32(0)
        for f in range(8 // width):
            word |= ((v[f * width + i] >> np.uint32(position)) & mask) << np.uint32(f * width)
        out[at + 16 * i] = word


@inlined
def pack(bits, v, out, at):
    """Writes the planes of one row's block."""
    if bits == 4:
        _plane(v, out, at, 4, 0)
    elif bits == 8:
        for k in range(8):
            out[at + 16 * k] = v[k]
    elif bits == 6:
        _plane(v, out, at, 4, 0)
        _plane(v, out, at + 64, 2, 4)
    elif bits == 5:
        _plane(v, out, at, 4, 0)
        _plane(v, out, at + 64, 1, 4)
    else:
        _plane(v, out, at, 2, 0)
        if bits == 3:
            _plane(v, out, at + 32, 1, 2)


@native
def scale(code, raw, s):
    """The integer scale of segment s of a super-block."""
    if code == 10:  # Q2_K
        return load_u8(raw + s) & 15
    if code == 11:  # Q3_K: 6 bits, less 32
        low = load_u8(raw + 96 + s % 8) >> (4 * (s // 8)) & 15
        high = load_u8(raw + 104 + s % 4) >> (2 * (s // 4)) & 3
        return (low | high << 4) - 32
    if code == 12 or code == 13:  # Q4_K, Q5_K: 6 bits
        if s < 4:
            return load_u8(raw + 4 + s) & 63
        return load_u8(raw + 8 + s) & 15 | load_u8(raw + s) >> 6 << 4
    if code == 14:  # Q6_K
        return np.int64(np.int8(load_u8(raw + 192 + s)))
    low = load_u8(raw + 4 + s // 2) >> (4 * (s % 2)) & 15  # IQ4_XS: 6 bits, less 32
    return (low | (load_u16(raw + 2) >> (2 * s) & 3) << 4) - 32


@native
def minimum(code, raw, s):
    if code == 10:
        return load_u8(raw + s) >> 4
    if s < 4:
        return load_u8(raw + 8 + s) & 63
    return load_u8(raw + 8 + s) >> 4 | load_u8(raw + 4 + s) >> 6 << 4


@native
def half(code, raw, index):
    """The bits of a float16 of a super-block: its scale, and its minimum, which is subtracted in the file."""
    if code == 10:
        found = load_u16(raw + 80 + 2 * index)
    elif code == 11:
        found = load_u16(raw + 108)
    elif code == 14:
        found = load_u16(raw + 208)
    else:
        found = load_u16(raw + 2 * index)
    return found ^ (0x8000 if index == 1 else 0)


@native
def repack(source, target, rows, cols, form, first, last):
    """Groups first to last - 1 of a quantised matrix. `form`: the address of Format.numbers."""
    code, raw_bytes, raw_columns = load_i64(form), load_i64(form + 8), load_i64(form + 16)
    unit_columns, unit_bytes, bits, n_halves = (
        load_i64(form + 24),
        load_i64(form + 32),
        load_i64(form + 40),
        load_i64(form + 48),
    )
    scales_at, minima_at, blocks_at, segments = (
        load_i64(form + 56),
        load_i64(form + 64),
        load_i64(form + 72),
        load_i64(form + 80),
    )
    units, row_bytes = -(-cols // unit_columns), cols // raw_columns * raw_bytes
    blocks = unit_columns // 32
    v = words(room_for_words(), 8)
    for group in range(first, last):
        for unit in range(units):
            to = target + (group * units + unit) * unit_bytes
            out, out_halves, out_bytes = (
                words(to, unit_bytes // 4),
                halves(to, unit_bytes // 2),
                bytes_at(to, unit_bytes),
            )
            if (group + 1) * 16 > rows or (unit + 1) * unit_columns > cols:
                out[:] = 0
            for lane in range(min(16, rows - group * 16)):
                row = source + (group * 16 + lane) * row_bytes
                if raw_columns == 256:
                    raw = row + unit * raw_bytes
                    for i in range(n_halves):
                        out_halves[16 * i + lane] = half(code, raw, i)
                    for s in range(segments):
                        out_bytes[scales_at + 16 * s + lane] = scale(code, raw, s)
                        if minima_at > 0:
                            out_bytes[minima_at + 16 * s + lane] = minimum(code, raw, s)
                    for block in range(8):
                        unpack(code, raw, block, v)
                        pack(bits, v, out, (blocks_at + block * bits * 64) // 4 + lane)
                else:
                    for block in range(min(blocks, (cols - unit * unit_columns) // 32)):
                        raw = row + (unit * blocks + block) * raw_bytes
                        for i in range(n_halves):
                            out_halves[16 * (block * n_halves + i) + lane] = load_u16(raw + 2 * i)
                        unpack(code, raw, 0, v)
                        pack(bits, v, out, (blocks_at + block * bits * 64) // 4 + lane)
    return np.int64(0)


@native
def repack_plain(source, target, rows, cols, width, first, last):
    """Groups of a float matrix: [units, 4, 16], zeros behind the last row and column."""
    units, per_unit = -(-cols // 4), 64
    for group in range(first, last):
        to = target + group * units * per_unit * width
        whole = (group + 1) * 16 <= rows and cols % 4 == 0
        if width == 4:
            out4 = words(to, units * per_unit)
            if not whole:
                out4[:] = 0
            for lane in range(min(16, rows - group * 16)):
                row4 = words(source + (group * 16 + lane) * cols * 4, cols)
                for c in range(cols):
                    out4[16 * c + lane] = row4[c]
        else:
            out2 = halves(to, units * per_unit)
            if not whole:
                out2[:] = 0
            for lane in range(min(16, rows - group * 16)):
                row2 = halves(source + (group * 16 + lane) * cols * 2, cols)
                for c in range(cols):
                    out2[16 * c + lane] = row2[c]
    return np.int64(0)
