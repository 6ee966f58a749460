"""Products: activations laid out for the kernels of emitter.py, and the loop over row groups and tiles of tokens."""

from __future__ import annotations

import numpy as np

from llorch_provider_numba.intrinsics import (
    call_product,
    floats,
    inlined,
    ints,
    load_i64,
    native,
)
from llorch_provider_numba.protocol import CHUNK, PLAIN, ROUNDED
from llorch_provider_numba.rounding import round_block
from llorch_provider_numba.rows import ONE, ZERO, silu


@inlined
def tile_of(t, tokens, largest):
    """(start, size) of the tile that a token is in: as many of the largest size as fit, then a smaller one each."""
    whole = tokens // largest * largest
    if t < whole:
        return t // largest * largest, largest
    start, size = whole, largest // 2
    while size > 0:
        if tokens - start >= size:
            if t < start + size:
                break
            start += size
        size //= 2
    return start, size


@native
def prepare(p, t):
    """slots: x, prepared, tokens, cols, blocks, kind, segment, offset, minima, largest tile"""
    tokens, cols, blocks, kind = load_i64(p + 40), load_i64(p + 48), load_i64(p + 56), load_i64(p + 64)
    start, size = tile_of(t, tokens, load_i64(p + 96))
    x = floats(load_i64(p + 24) + 4 * t * cols, cols)
    if kind == PLAIN:  # a block is a column
        out = floats(load_i64(p + 32) + 4 * start * blocks, size * blocks)
        for c in range(cols):
            out[c * size + t - start] = x[c]
        for c in range(cols, blocks):
            out[c * size + t - start] = ZERO
        return
    record = 48 if kind == ROUNDED else 136
    to = load_i64(p + 32) + start * blocks * record + (t - start) * record
    segment, offset, minima = load_i64(p + 72), load_i64(p + 80), load_i64(p + 88)
    for block in range(blocks):
        here = to + block * size * record
        if block * 32 >= cols:
            ints(here, record // 4)[:] = 0
        elif kind == ROUNDED:
            _round(load_i64(p + 24) + 4 * (t * cols + block * 32), here, segment, np.int32(offset), minima)
        else:
            _keep(x[block * 32 : block * 32 + 32], here, segment, np.float32(offset), minima)


@inlined
def _round(x, here, segment, offset, minima):
    """The 32 columns at address x, as a record of emitter.py."""
    low, high, scale = round_block(x, here)
    floats(here + 32, 1)[0] = scale
    if segment == 32:
        low += high
    if minima:
        sums = floats(here + 36, 2)
        sums[0], sums[1] = scale * np.float32(low), scale * np.float32(high)
    else:
        corrections = ints(here + 36, 2)
        corrections[0], corrections[1] = low * offset, high * offset


@inlined
def _keep(x, here, segment, offset, minima):
    out, low, high = floats(here, 34), ZERO, ZERO
    for i in range(16):
        out[i], out[16 + i] = x[i], x[16 + i]
        low, high = low + x[i], high + x[16 + i]
    if segment == 32:
        low += high
    factor = ONE if minima else offset
    out[32], out[33] = low * factor, high * factor


@native
def multiply(p, chunk):
    """slots: w, group bytes, groups, units, prepared, bytes of a token in it, out, rows, tokens, bias (0: none),
    largest tile, four kernels by size of tile 1, 2, 4, 8, their groups, and for gate_up_swiglu: up, up's bias, scratch
    """
    rows, tokens = load_i64(p + 80), load_i64(p + 88)
    first, last = chunk * CHUNK, min((chunk + 1) * CHUNK, load_i64(p + 40))
    begin, end = first * 16, min(last * 16, rows)
    up = load_i64(p + 176)
    start = 0
    while start < tokens:
        _, size = tile_of(start, tokens, load_i64(p + 104))
        out = load_i64(p + 72) + 4 * (start * rows + begin)
        if up == 0:
            _tile(p, load_i64(p + 24), load_i64(p + 96), out, first, last, start, size)
        else:
            gate_at = load_i64(p + 192) + 4 * (start * rows + begin)
            up_at = gate_at + 4 * tokens * rows
            _tile(p, load_i64(p + 24), load_i64(p + 96), gate_at, first, last, start, size)
            _tile(p, up, load_i64(p + 184), up_at, first, last, start, size)
            for t in range(size):
                g, u = floats(gate_at + 4 * t * rows, end - begin), floats(up_at + 4 * t * rows, end - begin)
                result = floats(out + 4 * t * rows, end - begin)
                for i in range(end - begin):
                    result[i] = silu(g[i]) * u[i]
        start += size


@native
def _tile(p, w, bias, out, first, last, start, size):
    """Groups first to last - 1 times one tile of tokens."""
    group_bytes, units, rows = load_i64(p + 32), load_i64(p + 48), load_i64(p + 80)
    which = 0 if size == 1 else 1 if size == 2 else 2 if size == 4 else 3
    kernel, at_once = load_i64(p + 112 + 8 * which), load_i64(p + 144 + 8 * which)
    x = load_i64(p + 56) + start * load_i64(p + 64)
    begin, end = first * 16, min(last * 16, rows)
    if bias != 0:
        values = floats(bias, rows)
        for t in range(size):
            result = floats(out + 4 * t * rows, end - begin)
            for i in range(end - begin):
                result[i] = values[begin + i]
    for g in range(first, last, at_once):
        call_product(
            kernel, w + g * group_bytes, group_bytes, min(at_once, last - g), x, units,
            out + 64 * (g - first), rows, end - 16 * g, np.int64(bias != 0), 0,
        )  # fmt: skip
