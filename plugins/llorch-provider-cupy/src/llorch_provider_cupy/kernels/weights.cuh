// A matrix as formats.py lays it out: sections one after another, each [rows][...], quants before scales. A unit is 32
// columns of a row. Quants of 4 to 6 bits: 16 bytes a unit, column c in the low half of byte c, column 16 + c in the
// high half; further bits of column c in byte c % 4 of their word, bit (c / 4) (Q5_K) or bits 2 (c / 4 % 4) (Q6_K, a
// word for each 16 columns). Q8_0: a section of columns 0 to 15 of each unit, one of columns 16 to 31. Loading a unit
// gives its 32 quants as bytes in eight words, in order of columns.

struct Matrix {
    const byte *base;
    int rows, units;
};

#if defined(TYPE_F32) || defined(TYPE_F16) || defined(TYPE_BF16)

#define PLAIN 1
#if defined(TYPE_F32)
#define WEIGHT_BYTES 4
#else
#define WEIGHT_BYTES 2
#endif

// Eight neighbouring weights of a row, from a column that is a multiple of 8.
INLINED void load_weights(const Matrix &m, int row, int column, float *values) {
    const byte *at = m.base + ((size_t)row * m.units * UNIT + column) * WEIGHT_BYTES;
#if defined(TYPE_F32)
    const float4 a = ((const float4 *)at)[0], b = ((const float4 *)at)[1];
    values[0] = a.x; values[1] = a.y; values[2] = a.z; values[3] = a.w;
    values[4] = b.x; values[5] = b.y; values[6] = b.z; values[7] = b.w;
#else
    const uint4 raw = *(const uint4 *)at;
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if defined(TYPE_F16)
        values[2 * i] = from_half((half_bits)(words[i] & 0xffff));
        values[2 * i + 1] = from_half((half_bits)(words[i] >> 16));
#else
        values[2 * i] = __uint_as_float(words[i] << 16);
        values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
#endif
    }
#endif
}

#else

#define PLAIN 0

struct Unit {
    int quants[8];
    float low, high;  // scales of the first and the last 16 columns
    float minimum;    // what is taken off, where HAS_MINIMUM
};

#if defined(TYPE_Q4_0)
#define OFFSET 8
#define QUANT_BYTES 16
#elif defined(TYPE_Q8_0)
#define OFFSET 0
#define QUANT_BYTES 16
#define HIGH_BYTES 16
#elif defined(TYPE_Q4_K)
#define OFFSET 8
#define QUANT_BYTES 16
#define HAS_MINIMUM 1
#elif defined(TYPE_Q5_K)
#define OFFSET 16
#define QUANT_BYTES 16
#define HIGH_BYTES 4
#define HAS_MINIMUM 1
#elif defined(TYPE_Q6_K)
#define OFFSET 32
#define QUANT_BYTES 16
#define HIGH_BYTES 8
#endif

#ifndef HIGH_BYTES
#define HIGH_BYTES 0
#endif
#ifndef HAS_MINIMUM
#define HAS_MINIMUM 0
#endif

INLINED Unit load_unit(const Matrix &m, int row, int unit) {
    const size_t count = (size_t)m.rows * m.units, at = (size_t)row * m.units + unit;
    const byte *scales = m.base + count * (QUANT_BYTES + HIGH_BYTES);
    Unit u;
    const uint4 raw = *(const uint4 *)(m.base + at * QUANT_BYTES);
#if defined(TYPE_Q8_0)
    const uint4 rest = *(const uint4 *)(m.base + count * QUANT_BYTES + at * HIGH_BYTES);
    u.quants[0] = raw.x; u.quants[1] = raw.y; u.quants[2] = raw.z; u.quants[3] = raw.w;
    u.quants[4] = rest.x; u.quants[5] = rest.y; u.quants[6] = rest.z; u.quants[7] = rest.w;
#else
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u.quants[i] = words[i] & 0x0f0f0f0fu;
        u.quants[i + 4] = words[i] >> 4 & 0x0f0f0f0fu;
    }
#endif
#if defined(TYPE_Q4_0) || defined(TYPE_Q8_0)
    u.low = u.high = from_half(((const half_bits *)scales)[at]);
#else
    // scales and minima of the units in bytes, behind them those of eight units in halves
    const size_t block = (size_t)row * (m.units / 8) + unit / 8;
    const half_bits *large = (const half_bits *)(scales + count * 2);
#if defined(TYPE_Q6_K)
    const float d = from_half(large[block]);
    u.low = d * ((const signed char *)scales)[2 * at];
    u.high = d * ((const signed char *)scales)[2 * at + 1];
    const uint2 bits = *(const uint2 *)(m.base + count * QUANT_BYTES + at * HIGH_BYTES);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u.quants[i] |= (bits.x >> 2 * i & 0x03030303u) << 4;
        u.quants[i + 4] |= (bits.y >> 2 * i & 0x03030303u) << 4;
    }
#else
    u.low = u.high = from_half(large[2 * block]) * scales[2 * at];
    u.minimum = from_half(large[2 * block + 1]) * scales[2 * at + 1];
#if defined(TYPE_Q5_K)
    const unsigned bits = *(const unsigned *)(m.base + count * QUANT_BYTES + at * HIGH_BYTES);
#pragma unroll
    for (int i = 0; i < 8; i++) u.quants[i] |= (bits >> i & 0x01010101u) << 4;
#endif
#endif
#endif
    return u;
}

// The value of quant `i` of a unit, as the file means it.
INLINED float unit_value(const Unit &u, int word, int i) {
    const int quant = (signed char)(word >> 8 * (i & 3));
    const float scale = i < 16 ? u.low : u.high;
#if HAS_MINIMUM
    return scale * quant - u.minimum;
#else
    return scale * (quant - OFFSET);
#endif
}

// What a unit adds to a product with a unit of rounded activations.
INLINED float unit_product(const Unit &u, const int *numbers, const Rounded &rounded) {
    int low = 0, high = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        low = __dp4a(u.quants[i], numbers[i], low);
        high = __dp4a(u.quants[i + 4], numbers[i + 4], high);
    }
#if HAS_MINIMUM
    // with quants around zero the rounding weighs least; what that leaves takes the sum as it was before
    const int centred = low + high - OFFSET * (rounded.low + rounded.high);
    return rounded.scale * u.low * centred + (OFFSET * u.low - u.minimum) * rounded.sum;
#else
    return rounded.scale * (u.low * (low - OFFSET * rounded.low) + u.high * (high - OFFSET * rounded.high));
#endif
}

// Eight neighbouring weights of a row, from a column that is a multiple of 8.
INLINED void load_weights(const Matrix &m, int row, int column, float *values) {
    const Unit u = load_unit(m, row, column / UNIT);
    const int part = column / 8 % 4;
    const int first = part == 0 ? u.quants[0] : part == 1 ? u.quants[2] : part == 2 ? u.quants[4] : u.quants[6];
    const int second = part == 0 ? u.quants[1] : part == 1 ? u.quants[3] : part == 2 ? u.quants[5] : u.quants[7];
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = unit_value(u, i < 4 ? first : second, part * 8 + i);
}

#endif
