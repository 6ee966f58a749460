// Weight types as repacked by formats.py: a unit of UNIT columns of a group of 16 rows is UNIT_WORDS words of 16 lanes,
// lane = row. Scales come first: behind the quants they break the sequence that a CPU's prefetcher follows, and the K types
// are half as fast. Per type:
//   SEGMENT               columns that share one scale, and one sum of x
//   SHIFT(column)         a quant is left where it lies in its word, so that it counts 2^SHIFT too much; x is
//                         multiplied by 2^-SHIFT beforehand, which is exact
//   quants(...)           the quants of one column, times 2^SHIFT
//   scaled(...)           total + scale * (sum over a segment of quant * x - offset * sum of x)
// `unit` points to the unit's first word, `lane` is the first row of this work-item within the group.

#define WORD(i) LOAD_WORDS(unit + (i) * ROWS_PER_GROUP + lane)
#define HALF(i, j) LOAD_HALVES((__global const half *)(unit + (i) * ROWS_PER_GROUP) + (j) * ROWS_PER_GROUP + lane)
#define BYTE(v, i) TO_FLOATS(((v) >> (8 * (i))) & 255u)

// A nibble of a word. The topmost is shifted down: it would be negative where it lies.
#define NIBBLE_SHIFT(column) ((column) % 8 < 7 ? 4 * ((column) % 8) : 0)
#define NIBBLE(v, k) TO_FLOATS((k) < 7 ? (v) & (15u << (4 * (k))) : (v) >> 28)

#if defined(TYPE_F32)

#define UNIT 16
#define UNIT_WORDS 16
#define SEGMENT 16
#define SHIFT(column) 0
#if WIDTH == 1
#define AS_FLOATS(v) as_float(v)
#else
#define AS_FLOATS(v) JOIN(as_float, WIDTH)(v)
#endif
INLINED lanes quants(__global const uint *unit, uint lane, uint segment, uint column) { return AS_FLOATS(WORD(column)); }
INLINED lanes scaled(__global const uint *unit, uint lane, uint segment, lanes acc, float sum, lanes total) {
    return total + acc;
}

#elif defined(TYPE_F16)

#define UNIT 32
#define UNIT_WORDS 16
#define SEGMENT 32
#define SHIFT(column) 0
INLINED lanes quants(__global const uint *unit, uint lane, uint segment, uint column) {
    return HALF(column / 2, column % 2);
}
INLINED lanes scaled(__global const uint *unit, uint lane, uint segment, lanes acc, float sum, lanes total) {
    return total + acc;
}

#elif defined(TYPE_Q8_0)

#define UNIT 64
#define UNIT_WORDS 17
#define SEGMENT 32
#define SHIFT(column) ((column) % 4 < 3 ? 8 * ((column) % 4) : 0)
INLINED lanes quants(__global const uint *unit, uint lane, uint segment, uint column) {
    words v = WORD(1 + 8 * segment + column / 4);
    uint k = column % 4;
    return TO_FLOATS(k < 3 ? v & (255u << (8 * k)) : v >> 24);
}
INLINED lanes scaled(__global const uint *unit, uint lane, uint segment, lanes acc, float sum, lanes total) {
    return fma(HALF(0, segment), acc - 128.0f * sum, total);
}

#elif defined(TYPE_Q4_0)

#define UNIT 64
#define UNIT_WORDS 9
#define SEGMENT 32
#define SHIFT(column) NIBBLE_SHIFT(column)
INLINED lanes quants(__global const uint *unit, uint lane, uint segment, uint column) {
    words v = WORD(1 + 4 * segment + column / 8);
    return NIBBLE(v, column % 8);
}
INLINED lanes scaled(__global const uint *unit, uint lane, uint segment, lanes acc, float sum, lanes total) {
    return fma(HALF(0, segment), acc - 8.0f * sum, total);
}

#elif defined(TYPE_Q4_K)

#define UNIT 256
#define UNIT_WORDS 37
#define SEGMENT 32
#define SHIFT(column) NIBBLE_SHIFT(column)
INLINED lanes quants(__global const uint *unit, uint lane, uint segment, uint column) {
    words v = WORD(5 + 4 * segment + column / 8);
    return NIBBLE(v, column % 8);
}
INLINED lanes scaled(__global const uint *unit, uint lane, uint segment, lanes acc, float sum, lanes total) {
    lanes scale = HALF(0, 0) * BYTE(WORD(1 + segment / 4), segment % 4);
    lanes offset = HALF(0, 1) * BYTE(WORD(3 + segment / 4), segment % 4);
    return fma(scale, acc, fma(offset, (lanes)(-sum), total));
}

#elif defined(TYPE_Q5_K)

#define UNIT 256
#define UNIT_WORDS 45
#define SEGMENT 32
#define SHIFT(column) NIBBLE_SHIFT(column)
INLINED lanes quants(__global const uint *unit, uint lane, uint segment, uint column) {
    words v = WORD(5 + 5 * segment + column / 8), fifth = WORD(9 + 5 * segment) >> (column / 8);
    uint k = column % 8;
    if (k == 7) return TO_FLOATS((v >> 28) | ((fifth & 1u) << 4));
    return TO_FLOATS((v & (15u << (4 * k))) | (fifth & (16u << (4 * k))));
}
INLINED lanes scaled(__global const uint *unit, uint lane, uint segment, lanes acc, float sum, lanes total) {
    lanes scale = HALF(0, 0) * BYTE(WORD(1 + segment / 4), segment % 4);
    lanes offset = HALF(0, 1) * BYTE(WORD(3 + segment / 4), segment % 4);
    return fma(scale, acc, fma(offset, (lanes)(-sum), total));
}

#elif defined(TYPE_Q6_K)

#define UNIT 256
#define UNIT_WORDS 53
#define SEGMENT 16
#define SHIFT(column) NIBBLE_SHIFT(column)
INLINED lanes quants(__global const uint *unit, uint lane, uint segment, uint column) {
    uint word = 2 * (segment % 2) + column / 8, block = 5 + 6 * (segment / 2), k = column % 8;
    words v = WORD(block + word), high = WORD(block + 4 + word / 2) >> (2 * (column / 8));
    if (k == 7) return TO_FLOATS((v >> 28) | ((high & 3u) << 4));
    return TO_FLOATS((v & (15u << (4 * k))) | (high & (48u << (4 * k))));
}
INLINED lanes scaled(__global const uint *unit, uint lane, uint segment, lanes acc, float sum, lanes total) {
    lanes scale = BYTE(WORD(1 + segment / 4), segment % 4) - 128.0f;  // stored 128 too large
    return fma(HALF(0, 0) * scale, acc - 32.0f * sum, total);
}

#endif

#define SEGMENTS (UNIT / SEGMENT)
