"""Operations on rows of activations: norms, rotation, elementwise, lookups. Numba compiles them; LLVM vectorises.

Each takes the address of its record in a program (`program.py`) and the number of the item to do.
"""

from __future__ import annotations

import numpy as np

from llorch_provider_numba.intrinsics import (
    bits_of,
    bytes_at,
    doubles,
    float_of,
    float_of_half,
    floats,
    halves,
    inlined,
    ints,
    load_f64,
    load_i64,
    load_u8,
    load_u16,
    native,
)
from llorch_provider_numba.protocol import ELEMENTS

LOG2E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
C0, C1, C2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
C3, C4, C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
ONE, ZERO, MAGIC = (
    np.float32(1),
    np.float32(0),
    np.float32(12582912.0),
)  # 1.5 * 2^23: adding it rounds to a whole number
LOWEST, HIGHEST = np.float32(-87.0), np.float32(88.0)
MAGIC_BITS = np.int32(0x4B400000)


@inlined
def exp32(x):
    """e^x within 2e-7, x cut to -87 .. 88. Range reduction and polynomial: Cephes' expf (Moshier)."""
    x = min(max(x, LOWEST), HIGHEST)
    shifted = x * LOG2E + MAGIC
    n = shifted - MAGIC
    r = x - n * LN2_HIGH - n * LN2_LOW
    p = ((((C0 * r + C1) * r + C2) * r + C3) * r + C4) * r + C5
    power = float_of((bits_of(shifted) - MAGIC_BITS + np.int32(127)) << np.int32(23))
    return (p * r * r + r + ONE) * power


@inlined
def silu(gate):
    return gate / (ONE + exp32(-gate))


@native(fastmath={"reassoc", "contract"})
def _sum_of_squares(x):
    total = ZERO
    for i in range(len(x)):
        total += x[i] * x[i]
    return total


@native
def rmsnorm(p, t):
    """slots: out, x, y (0: none; else x += y first), weight, dim, eps"""
    dim = load_i64(p + 56)
    out, x = floats(load_i64(p + 24) + 4 * t * dim, dim), floats(load_i64(p + 32) + 4 * t * dim, dim)
    weight = floats(load_i64(p + 48), dim)
    if load_i64(p + 40) != 0:
        y = floats(load_i64(p + 40) + 4 * t * dim, dim)
        for i in range(dim):
            x[i] += y[i]
    mean = _sum_of_squares(x) / np.float32(dim)
    factor = ONE / np.sqrt(mean + np.float32(load_f64(p + 64)))
    for i in range(dim):
        out[i] = x[i] * factor * weight[i]


@native
def rope(p, t):
    """slots: q, k (0: none), positions, frequencies, pairs, heads, kv heads, head dim, half, magnitude, turns"""
    pairs, heads, kv_heads, dim = load_i64(p + 56), load_i64(p + 64), load_i64(p + 72), load_i64(p + 80)
    half, magnitude = load_i64(p + 88), load_f64(p + 96)
    position = np.float64(ints(load_i64(p + 40), t + 1)[t])
    frequencies = doubles(load_i64(p + 48), pairs)
    turns = floats(load_i64(p + 104) + 8 * t * pairs, 2 * pairs)
    for i in range(pairs):
        angle = position * frequencies[i]
        turns[i], turns[pairs + i] = np.cos(angle) * magnitude, np.sin(angle) * magnitude
    _rotate(floats(load_i64(p + 24) + 4 * t * heads * dim, heads * dim), turns, pairs, heads, dim, half)
    if kv_heads > 0:
        k = floats(load_i64(p + 32) + 4 * t * kv_heads * dim, kv_heads * dim)
        _rotate(k, turns, pairs, kv_heads, dim, half)


@native
def _rotate(x, turns, pairs, heads, dim, half):
    step, apart = (1, pairs) if half else (2, 1)
    for head in range(heads):
        for i in range(pairs):
            first = head * dim + i * step
            a, b, cos, sin = x[first], x[first + apart], turns[i], turns[pairs + i]
            x[first], x[first + apart] = a * cos - b * sin, a * sin + b * cos


@native
def swiglu(p, item):
    """slots: out, gate, up, count"""
    begin, end = item * ELEMENTS, min(load_i64(p + 48), (item + 1) * ELEMENTS)
    out, gate, up = floats(load_i64(p + 24), end), floats(load_i64(p + 32), end), floats(load_i64(p + 40), end)
    for i in range(begin, end):
        out[i] = silu(gate[i]) * up[i]


@native
def add(p, item):
    """slots: out, x, y, count"""
    begin, end = item * ELEMENTS, min(load_i64(p + 48), (item + 1) * ELEMENTS)
    out, x, y = floats(load_i64(p + 24), end), floats(load_i64(p + 32), end), floats(load_i64(p + 40), end)
    for i in range(begin, end):
        out[i] = x[i] + y[i]


@native
def gather(p, t):
    """slots: out, x, rows, dim"""
    dim = load_i64(p + 48)
    row = np.int64(ints(load_i64(p + 40), t + 1)[t])
    out, x = floats(load_i64(p + 24) + 4 * t * dim, dim), floats(load_i64(p + 32) + 4 * row * dim, dim)
    for i in range(dim):
        out[i] = x[i]


@native
def argmax(p, t):
    """slots: values, ids, logits, vocab. The largest of a row, the lower id first among equals."""
    vocab = load_i64(p + 48)
    row = floats(load_i64(p + 40) + 4 * t * vocab, vocab)
    best = 0
    for i in range(1, vocab):
        if row[i] > row[best]:
            best = i
    floats(load_i64(p + 24), t + 1)[t] = row[best]
    ints(load_i64(p + 32), t + 1)[t] = best


# ---- lookups in tables of weights ----


@native
def embed(p, t):
    """slots: out, tokens, table, cols, group bytes, unit bytes, code, Format.numbers"""
    cols, unit_bytes, code = load_i64(p + 48), load_i64(p + 64), load_i64(p + 72)
    row = np.int64(ints(load_i64(p + 32), t + 1)[t])
    out = floats(load_i64(p + 24) + 4 * t * cols, cols)
    group, lane = load_i64(p + 40) + row // 16 * load_i64(p + 56), row % 16
    if code == 0:
        column = floats(group, cols * 16)
        for c in range(cols):
            out[c] = column[16 * c + lane]
    elif code == 1 or code == 30:
        bits = halves(group, cols * 16)
        for c in range(cols):
            value = bits[16 * c + lane]
            out[c] = float_of_half(value) if code == 1 else float_of(np.int32(np.uint32(value) << np.uint32(16)))
    else:
        form = load_i64(p + 80)
        unit_columns = load_i64(form + 24)
        for block in range(cols // 32):
            unit = block * 32 // unit_columns
            _embed_block(out, block, group + unit * unit_bytes, block - unit * (unit_columns // 32), lane, form)


@native
def _embed_block(out, block, base, index, lane, form):
    """32 columns of a row: quants out of their planes, times their segment's scale, plus its minimum."""
    bits, n_halves, scales_at, minima_at = (
        load_i64(form + 40),
        load_i64(form + 48),
        load_i64(form + 56),
        load_i64(form + 64),
    )
    quants, segment = base + load_i64(form + 72) + index * bits * 64 + 4 * lane, 256 // max(load_i64(form + 80), 8)
    offset, table, has_minima = load_i64(form + 88), form + 104, load_i64(form + 96)
    for c in range(32):
        if c % segment == 0:
            if scales_at > 0:
                s = 16 * ((index * 32 + c) // segment) + lane
                scale = float_of_half(load_u16(base + 2 * lane)) * np.float32(bytes_at(base + scales_at, s + 1)[s])
                least = ZERO
                if minima_at > 0:
                    least = float_of_half(load_u16(base + 32 + 2 * lane)) * np.float32(load_u8(base + minima_at + s))
            else:
                scale = float_of_half(load_u16(base + 32 * n_halves * index + 2 * lane))
                least = ZERO
                if has_minima:
                    least = float_of_half(load_u16(base + 32 * (n_halves * index + 1) + 2 * lane))
        quant = _quant(quants + c % 4, c // 4, bits)
        if load_i64(table) != 0:
            quant = load_i64(table + 8 * (1 + quant))
        elif bits == 8:
            quant = np.int64(np.int8(quant))
        out[block * 32 + c] = np.float32(quant + offset) * scale + least


@inlined
def _quant(quants, k, bits):
    """Byte k of a row's word from all planes."""
    if bits == 8:
        return np.int64(load_u8(quants + 64 * k))
    if bits >= 4:
        value = np.int64(load_u8(quants + 64 * (k % 4))) >> (k // 4 * 4) & 15
        at, position = quants + 256, 4
    else:
        value = np.int64(load_u8(quants + 64 * (k % 2))) >> (k // 2 * 2) & 3
        at, position = quants + 128, 2
    if bits - position == 2:
        value |= (np.int64(load_u8(at + 64 * (k % 2))) >> (k // 2 * 2) & 3) << position
    elif bits - position == 1:
        value |= (np.int64(load_u8(at)) >> k & 1) << position
    return value
