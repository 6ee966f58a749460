"""Causal attention over the paged cache: one pass per key head, in segments of the context with an online softmax.

A block of the cache holds, for each key head, keys as [block_size / 16][head_dim][16] and values as
[head_dim / 16][block_size][16]: both are weights in groups of 16 rows (tokens, and dimensions), so that the kernels of
emitter.py make the scores of all queries that share keys, and mix their values; between them is softmax.py. head_dim is
padded to 4 for keys and to 16 for values.

The context is cut every SEGMENT tokens from its beginning. A segment gives each query its largest score, the sum of
its weights and the mixed values; these are merged in their order (Milakov and Gimelshein, 2018; Dao et al., 2022), by
the worker that made them or, where there are few queries, after several workers made one segment each. Either way the
operations are the same, so a query's result depends on its own context alone.
"""

from __future__ import annotations

import numpy as np

from llorch_provider_numba.formats import SEGMENT
from llorch_provider_numba.intrinsics import (
    call_product,
    call_softmax,
    floats,
    half_of,
    halves,
    inlined,
    ints,
    load_f64,
    load_i32,
    load_i64,
    native,
)
from llorch_provider_numba.products import tile_of
from llorch_provider_numba.rows import ONE, ZERO, exp32

HALF_MAX = np.float32(65504)
AHEAD = 2  # blocks between what is read and what is asked for: to compute with one takes less than memory's latency

# Slots of a record (program.py): q, k, v, out, keys, values, slots, positions, sequence ids, block tables, max blocks,
# heads, kv heads, head dim, block size, tokens, width of a cached value, window (0: none), scale, soft cap (0: none),
# scratch, bytes of it per thread, partials (0: not split), segments, tokens of a tile, largest tile, kernels by size
# of tile 1, 2, 4, 8, their groups, kernels of the softmax
Q, K, V, OUT, KEYS, VALUES, SLOTS, POSITIONS, SEQUENCES, TABLES, MAX_BLOCKS = range(24, 24 + 88, 8)
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TOKENS, WIDTH, WINDOW, SCALE, SOFT_CAP = range(112, 112 + 72, 8)
SCRATCH, THREAD_BYTES, PARTIALS, SEGMENTS, TILE_TOKENS, LARGEST = range(184, 184 + 48, 8)
KERNELS, GROUPS, SOFTMAX = range(232, 232 + 96, 32)


@native
def append(p, t):
    """Writes a token's keys and values to its slot."""
    kv_heads, dim, size, width = (
        load_i64(p + KV_HEADS),
        load_i64(p + HEAD_DIM),
        load_i64(p + BLOCK_SIZE),
        load_i64(p + WIDTH),
    )
    slot = np.int64(load_i32(load_i64(p + SLOTS) + 4 * t))
    block, offset = slot // size, slot % size
    key_dim, value_dim = (dim + 3) // 4 * 4, (dim + 15) // 16 * 16
    for head in range(kv_heads):
        k = floats(load_i64(p + K) + 4 * (t * kv_heads + head) * dim, dim)
        v = floats(load_i64(p + V) + 4 * (t * kv_heads + head) * dim, dim)
        key_at = load_i64(p + KEYS) + ((block * kv_heads + head) * size + offset // 16 * 16) * key_dim * width
        value_at = load_i64(p + VALUES) + (block * kv_heads + head) * size * value_dim * width
        if width == 4:
            keys4, values4 = floats(key_at, 16 * key_dim), floats(value_at, size * value_dim)
            for d in range(dim):
                keys4[16 * d + offset % 16] = k[d]
                values4[(d // 16 * size + offset) * 16 + d % 16] = v[d]
        else:
            keys2, values2 = halves(key_at, 16 * key_dim), halves(value_at, size * value_dim)
            for d in range(dim):
                keys2[16 * d + offset % 16] = _finite_half(k[d])
                values2[(d // 16 * size + offset) * 16 + d % 16] = _finite_half(v[d])


@inlined
def _finite_half(x):
    return half_of(min(max(x, -HALF_MAX), HALF_MAX))


@native
def attend(p, item, thread):
    """An item is a tile of tokens and a key head; split, a token, a key head and a segment."""
    kv_heads, tokens = load_i64(p + KV_HEADS), load_i64(p + TOKENS)
    ids, positions = ints(load_i64(p + SEQUENCES), tokens), ints(load_i64(p + POSITIONS), tokens)
    if load_i64(p + PARTIALS) != 0:
        segments = load_i64(p + SEGMENTS)
        segment, head, t = item % segments, item // segments % kv_heads, item // segments // kv_heads
        begin, end = _visible(p, positions, t, t + 1)
        if ids[t] >= 0 and begin // SEGMENT <= segment <= (end - 1) // SEGMENT:
            group = load_i64(p + HEADS) // kv_heads
            partial = load_i64(p + PARTIALS) + 4 * item * group * (load_i64(p + HEAD_DIM) + 2)
            _pack_queries(p, t, t + 1, head, thread)
            _segment(p, t, t + 1, head, segment, partial, thread)
        return
    step = load_i64(p + TILE_TOKENS)
    head, t = item % kv_heads, item // kv_heads * step
    last = min(t + step, tokens)
    while t < last:
        end = t + 1
        while end < last and ids[end] == ids[t] and positions[end] == positions[end - 1] + 1:
            end += 1
        _whole(p, t, end, head, ids[t], positions, thread)
        t = end


@native
def combine(p, item):
    """Merges what `attend` left of a token and a key head, where it was split."""
    kv_heads, heads, dim = load_i64(p + KV_HEADS), load_i64(p + HEADS), load_i64(p + HEAD_DIM)
    head, t = item % kv_heads, item // kv_heads
    group, segments = heads // kv_heads, load_i64(p + SEGMENTS)
    positions = ints(load_i64(p + POSITIONS), t + 1)
    out = load_i64(p + OUT) + 4 * (t * heads + head * group) * dim
    size = group * (dim + 2)
    first = load_i64(p + PARTIALS) + 4 * item * segments * size
    if load_i32(load_i64(p + SEQUENCES) + 4 * t) < 0:
        floats(out, group * dim)[:] = ZERO
        return
    begin, end = _visible(p, positions, t, t + 1)
    low = begin // SEGMENT
    into = first + 4 * low * size
    for segment in range(low + 1, (end - 1) // SEGMENT + 1):
        _merge(into, first + 4 * segment * size, group, dim)
    _finish(into, out, group, dim)


@inlined
def _visible(p, positions, t, end):
    """The keys that any query of tokens t .. end - 1 sees."""
    window = load_i64(p + WINDOW)
    first = np.int64(positions[t]) - window + 1 if window > 0 else 0
    return max(first, 0), np.int64(positions[end - 1]) + 1


@native
def _whole(p, t, end, head, sequence, positions, thread):
    """All segments of neighbouring tokens of one sequence."""
    heads, kv_heads, dim = load_i64(p + HEADS), load_i64(p + KV_HEADS), load_i64(p + HEAD_DIM)
    group = heads // kv_heads
    rows = (end - t) * group
    if sequence >= 0:
        total = _place(p, thread, 3)
        begin, context = _visible(p, positions, t, end)
        _pack_queries(p, t, end, head, thread)
        _segment(p, t, end, head, begin // SEGMENT, total, thread)
        for segment in range(begin // SEGMENT + 1, (context - 1) // SEGMENT + 1):
            partial = _place(p, thread, 4)
            _segment(p, t, end, head, segment, partial, thread)
            _merge(total, partial, rows, dim)
    for i in range(t, end):
        out = load_i64(p + OUT) + 4 * (i * heads + head * group) * dim
        if sequence >= 0:
            _finish_rows(total, out, rows, (i - t) * group, group, dim)
        else:
            floats(out, group * dim)[:] = ZERO


@inlined
def _place(p, thread, part):
    """A worker's own memory: 0 queries, 1 scores, 2 weights, 3 and 4 partial results."""
    at = load_i64(p + SCRATCH) + thread * load_i64(p + THREAD_BYTES)
    rows = max(load_i64(p + TILE_TOKENS) * (load_i64(p + HEADS) // load_i64(p + KV_HEADS)), 1)
    dim = load_i64(p + HEAD_DIM) + 4
    offset = 0 if part == 0 else rows * (dim + (0 if part == 1 else SEGMENT if part == 2 else 2 * SEGMENT))
    return at + 4 * (offset + (rows * dim if part == 4 else 0))


@native
def _pack_queries(p, t, end, head, thread):
    """Rows of queries (a token's heads, then the next token's) as tiles [head_dim][rows of the tile]."""
    heads, kv_heads, dim = load_i64(p + HEADS), load_i64(p + KV_HEADS), load_i64(p + HEAD_DIM)
    group, largest = heads // kv_heads, load_i64(p + LARGEST)
    rows, key_dim = (end - t) * group, (dim + 3) // 4 * 4
    packed = floats(_place(p, thread, 0), rows * key_dim)
    scale = np.float32(load_f64(p + SCALE))
    for row in range(rows):
        start, size = tile_of(row, rows, largest)
        q = floats(load_i64(p + Q) + 4 * ((t + row // group) * heads + head * group + row % group) * dim, dim)
        at = start * key_dim + row - start
        for d in range(dim):
            packed[at + d * size] = q[d] * scale
        for d in range(dim, key_dim):
            packed[at + d * size] = ZERO


@native
def _segment(p, t, end, head, segment, partial, thread):
    """partial: [rows] largest scores, [rows] sums, [rows, head_dim] mixed values, of one segment of the context."""
    heads, kv_heads = load_i64(p + HEADS), load_i64(p + KV_HEADS)
    rows, first = (end - t) * (heads // kv_heads), segment * SEGMENT
    positions = ints(load_i64(p + POSITIONS), end)
    begin, context = _visible(p, positions, t, end)
    begin, last = max(begin, first) // 16 * 16, min(context, first + SEGMENT)
    size = load_i64(p + BLOCK_SIZE)
    begin = begin // size * size
    sequence = np.int64(load_i32(load_i64(p + SEQUENCES) + 4 * t))
    table = ints(load_i64(p + TABLES) + 4 * sequence * load_i64(p + MAX_BLOCKS), load_i64(p + MAX_BLOCKS))
    block, count, blocks = begin // size, (last - begin + size - 1) // size, (context + size - 1) // size
    for i in range(count):
        at, keys = begin + i * size, _read(p, table, head, block, count, blocks, i)
        following = _read(p, table, head, block, count, blocks, i + AHEAD)
        _score(p, keys, rows, at - first, min(size, last - at), following, thread)
    _soften(p, t, rows, first, begin - first, last - first, partial, thread)
    for i in range(count):
        at, values = begin + i * size, _read(p, table, head, block, count, blocks, count + i)
        following = _read(p, table, head, block, count, blocks, count + i + AHEAD)
        _mix(p, values, rows, at - first, min(size, last - at), i > 0, partial + 8 * rows, following, thread)


@inlined
def _read(p, table, head, block, count, blocks, i):
    """Address of what a segment reads as its i-th: the keys of its `count` blocks, their values, the next one's keys.

    0 behind the context, which has `blocks` of them.
    """
    dim = load_i64(p + HEAD_DIM)
    if i < count or i >= 2 * count:
        start, dim = load_i64(p + KEYS), (dim + 3) // 4 * 4
        block += i if i < count else i - count
    else:
        start, dim = load_i64(p + VALUES), (dim + 15) // 16 * 16
        block += i - count
    if block >= blocks:
        return np.int64(0)
    rows = (np.int64(table[block]) * load_i64(p + KV_HEADS) + head) * load_i64(p + BLOCK_SIZE)
    return start + rows * dim * load_i64(p + WIDTH)


@native
def _score(p, keys, rows, column, count, following, thread):
    """scores[rows, SEGMENT] of `count` keys of a block; `following`: address of the block that is read next, or 0."""
    key_dim = (load_i64(p + HEAD_DIM) + 3) // 4 * 4
    group_bytes = 16 * key_dim * load_i64(p + WIDTH)
    ahead = following - keys if following != 0 else 0
    queries, scores = _place(p, thread, 0), _place(p, thread, 1)
    groups, largest, row = (count + 15) // 16, load_i64(p + LARGEST), 0
    while row < rows:
        _, size = tile_of(row, rows, largest)
        which = 0 if size == 1 else 1 if size == 2 else 2 if size == 4 else 3
        kernel, at_once = load_i64(p + KERNELS + 8 * which), load_i64(p + GROUPS + 8 * which)
        for g in range(0, groups, at_once):
            call_product(
                kernel, keys + g * group_bytes, group_bytes, min(at_once, groups - g), queries + 4 * row * key_dim,
                key_dim // 4, scores + 4 * (row * SEGMENT + column + 16 * g), SEGMENT, count - 16 * g, 0, ahead,
            )  # fmt: skip
        row += size


@native
def _soften(p, t, rows, first, begin, last, partial, thread):
    """Weights exp(score - largest) of each row, zero where it sees nothing, as tiles [SEGMENT][rows of the tile]."""
    group, window = load_i64(p + HEADS) // load_i64(p + KV_HEADS), load_i64(p + WINDOW)
    positions = ints(load_i64(p + POSITIONS), t + (rows - 1) // group + 1)
    lows, highs = ints(partial, rows), ints(partial + 4 * rows, rows)  # where the kernel puts its results
    cap = np.float32(load_f64(p + SOFT_CAP))
    for row in range(rows):
        position = np.int64(positions[t + row // group]) - first
        low = max(begin, position - window + 1) if window > 0 else begin
        high = min(last, position + 1)
        lows[row], highs[row] = low, high
        if cap > ZERO:
            scores = floats(_place(p, thread, 1) + 4 * row * SEGMENT, SEGMENT)
            for i in range(low, high):
                scores[i] = cap * np.tanh(scores[i] / cap)
    row = 0
    while row < rows:
        _, size = tile_of(row, rows, load_i64(p + LARGEST))
        which = 0 if size == 1 else 1 if size == 2 else 2 if size == 4 else 3
        at = 4 * row * SEGMENT
        call_softmax(
            load_i64(p + SOFTMAX + 8 * which), _place(p, thread, 1) + at, begin // 16, (last + 15) // 16,
            _place(p, thread, 2) + at, partial + 4 * row, partial + 4 * (rows + row),
        )  # fmt: skip
        row += size


@native
def _mix(p, values, rows, column, count, adds, out, following, thread):
    """out[rows, head_dim] = or += weights @ values of `count` tokens of a block; `following` as in `_score`."""
    dim, size_of_block, width = load_i64(p + HEAD_DIM), load_i64(p + BLOCK_SIZE), load_i64(p + WIDTH)
    groups, largest, row = (dim + 15) // 16, load_i64(p + LARGEST), 0
    group_bytes = 16 * size_of_block * width
    ahead = following - values if following != 0 else 0
    weights = _place(p, thread, 2)
    while row < rows:
        _, size = tile_of(row, rows, largest)
        which = 0 if size == 1 else 1 if size == 2 else 2 if size == 4 else 3
        kernel, at_once = load_i64(p + KERNELS + 8 * which), load_i64(p + GROUPS + 8 * which)
        x = weights + 4 * (row * SEGMENT + column * size)
        for g in range(0, groups, at_once):
            call_product(
                kernel, values + g * group_bytes, group_bytes, min(at_once, groups - g), x, (count + 3) // 4,
                out + 4 * (row * dim + 16 * g), dim, dim - 16 * g, np.int64(adds), ahead,
            )  # fmt: skip
        row += size


@native
def _merge(into, partial, rows, dim):
    """Two partial results of the same queries, the second of a later segment."""
    most, more = floats(into, rows * (dim + 2)), floats(partial, rows * (dim + 2))
    for row in range(rows):
        if more[rows + row] == ZERO:
            continue
        if most[rows + row] == ZERO:
            keep, add = ZERO, ONE
            most[row] = more[row]
        else:
            largest = max(most[row], more[row])
            keep, add = exp32(most[row] - largest), exp32(more[row] - largest)
            most[row] = largest
        most[rows + row] = most[rows + row] * keep + more[rows + row] * add
        at = 2 * rows + row * dim
        for d in range(dim):
            most[at + d] = most[at + d] * keep + more[at + d] * add


@inlined
def _finish_rows(total, out, rows, first, count, dim):
    found, result = floats(total, rows * (dim + 2)), floats(out, count * dim)
    for i in range(count):
        factor = ONE / found[rows + first + i]
        for d in range(dim):
            result[i * dim + d] = found[2 * rows + (first + i) * dim + d] * factor


@native
def _finish(total, out, rows, dim):
    _finish_rows(total, out, rows, 0, rows, dim)
