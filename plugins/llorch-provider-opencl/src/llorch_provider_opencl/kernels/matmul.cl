// out[T, rows] = x[T, cols] @ w.T + bias, over weights in groups of 16 rows (weights.cl) and x as `prepare` lays it out.
//
// TOKENS of x are one tile: [cols][TOKENS], behind the tiles the sums of each SEGMENT columns. A work-item holds
// GROUPS * TOKENS * WIDTH results; SPLITS work-items share the columns of a group and add up in local memory.
// A result's rounding depends on columns and SPLITS alone, neither on TOKENS nor on the other rows.

// One tile of x: zeros where there is no token or column. One work-item takes SPAN segments.
__kernel void prepare(__global float *restrict prepared, __global const float *restrict x, const int tokens,
                      const int cols, const int units) {
    const int segments = units * SEGMENTS, tile = get_global_id(1), tiles = get_global_size(1);
    const int first = get_global_id(0) * SPAN, last = min(first + SPAN, segments);
    __global float *out = prepared + (size_t)tile * segments * SEGMENT * TOKENS;
    __global float *sums = prepared + (size_t)tiles * segments * SEGMENT * TOKENS + (size_t)tile * segments * TOKENS;
    for (int segment = first; segment < last; segment++) {
        for (int t = 0; t < TOKENS; t++) {
            const int token = tile * TOKENS + t;
            __global const float *row = x + (size_t)token * cols;
            float sum = 0.0f;
            for (int i = 0; i < SEGMENT; i++) {
                const int column = segment * SEGMENT + i;
                const float value = token < tokens && column < cols ? row[column] : 0.0f;
                out[column * TOKENS + t] = value * as_float((127 - SHIFT(i)) << 23);
                sum += value;
            }
            sums[segment * TOKENS + t] = sum;
        }
    }
}

// Unrolled, so that results are registers and not arrays.
#define ALL_RESULTS                                                    \
    _Pragma("unroll") for (int g = 0; g < GROUPS; g++) _Pragma("unroll") for (int t = 0; t < TOKENS; t++)

// What one work-item adds up: for each of GROUPS groups of rows and each token, the units first .. last - 1.
INLINED void product(lanes (*total)[TOKENS], __global const uint *const *w, const uint lane, __global const float *x,
                    __global const float *sums, const int first, const int last) {
    ALL_RESULTS total[g][t] = (lanes)(0.0f);
    for (int i = first; i < last; i++) {
#pragma unroll UNROLL
        for (int s = 0; s < SEGMENTS; s++) {
            lanes acc[GROUPS][TOKENS];
            ALL_RESULTS acc[g][t] = (lanes)(0.0f);
            const int segment = i * SEGMENTS + s;
            __global const float *xs = x + (size_t)segment * SEGMENT * TOKENS;
#pragma unroll
            for (int c = 0; c < SEGMENT; c++) {
#pragma unroll
                for (int g = 0; g < GROUPS; g++) {
                    const lanes q = quants(w[g] + (size_t)i * UNIT_WORDS * ROWS_PER_GROUP, lane, s, c);
#pragma unroll
                    for (int t = 0; t < TOKENS; t++) acc[g][t] = fma(q, (lanes)(xs[c * TOKENS + t]), acc[g][t]);
                }
            }
            ALL_RESULTS total[g][t] = scaled(w[g] + (size_t)i * UNIT_WORDS * ROWS_PER_GROUP, lane, s, acc[g][t],
                                             sums[segment * TOKENS + t], total[g][t]);
        }
    }
}

#if SPLITS > 1
#define LOCAL_SUMS __local lanes shared[SPLITS][GROUPS * TOKENS][GROUP_ITEMS]
// The work-items of split 0 get the sums of all splits, in their order.
INLINED void add_splits(lanes (*total)[TOKENS], __local lanes (*shared)[GROUPS * TOKENS][GROUP_ITEMS], const int split,
                       const int item) {
    ALL_RESULTS shared[split][g * TOKENS + t][item] = total[g][t];
    barrier(CLK_LOCAL_MEM_FENCE);
    for (int i = 1; split == 0 && i < SPLITS; i++)
        ALL_RESULTS total[g][t] += shared[i][g * TOKENS + t][item];
}
#endif

// A work-group is GROUP_ITEMS items (rows) times SPLITS. Neighbouring work-groups take the tiles of the same rows, so
// that weights come from the cache for all tiles but one.
typedef struct {
    int item, split, tile, first_item, first, last;
} place;

INLINED place find_place(const int tiles, const int units) {
    place p;
    p.item = get_local_id(0) % GROUP_ITEMS;
    p.split = get_local_id(0) / GROUP_ITEMS;
    p.tile = get_group_id(0) % tiles;
    p.first_item = (get_group_id(0) / tiles) * GROUP_ITEMS + p.item;
    const int share = (units + SPLITS - 1) / SPLITS;
    p.first = min(p.split * share, units);
    p.last = min(p.first + share, units);
    return p;
}

#if !PAIRED  // each kernel has a program of its own: compiling takes seconds on some devices

__kernel void matmul(__global float *restrict out, __global const float *restrict prepared,
                     __global const uint *restrict w, __global const float *restrict bias, const int tokens,
                     const int rows, const int units) {
    const int tiles = (tokens + TOKENS - 1) / TOKENS, segments = units * SEGMENTS;
    const place p = find_place(tiles, units);
    const int groups = (rows + ROWS_PER_GROUP - 1) / ROWS_PER_GROUP;
    const size_t group_words = (size_t)units * UNIT_WORDS * ROWS_PER_GROUP;
    const int group = p.first_item / ITEMS_PER_GROUP * GROUPS, lane = p.first_item % ITEMS_PER_GROUP * WIDTH;
    __global const float *x = prepared + (size_t)p.tile * segments * SEGMENT * TOKENS;
    __global const float *sums =
        prepared + (size_t)tiles * segments * SEGMENT * TOKENS + (size_t)p.tile * segments * TOKENS;
    __global const uint *weights[GROUPS];
#pragma unroll
    for (int g = 0; g < GROUPS; g++) weights[g] = w + min(group + g, groups - 1) * group_words;  // none behind the last
    lanes total[GROUPS][TOKENS];
    product(total, weights, lane, x, sums, p.first, p.last);
#if SPLITS > 1
    LOCAL_SUMS;
    add_splits(total, shared, p.split, p.item);
    if (p.split > 0) return;
#endif
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        const int row = (group + g) * ROWS_PER_GROUP + lane, count = rows - row;
        if (count <= 0) continue;
        lanes b = (lanes)(0.0f);
        if (bias) b = LOAD(bias + row);  // a vector is padded to whole groups
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const int token = p.tile * TOKENS + t;
            if (token < tokens) store_first(total[g][t] + b, out + (size_t)token * rows + row, count);
        }
    }
}

#else
#define PAIRS (GROUPS / 2)

// out = silu(gate) * up, where gate and up are products of the same x: the first half of the work-item's groups is the
// gate's, the second half the same rows of up.
__kernel void gate_up_swiglu(__global float *restrict out, __global const float *restrict prepared,
                             __global const uint *restrict w_gate, __global const uint *restrict w_up,
                             __global const float *restrict bias_gate, __global const float *restrict bias_up,
                             const int tokens, const int rows, const int units) {
    const int tiles = (tokens + TOKENS - 1) / TOKENS, segments = units * SEGMENTS;
    const place p = find_place(tiles, units);
    const int groups = (rows + ROWS_PER_GROUP - 1) / ROWS_PER_GROUP;
    const size_t group_words = (size_t)units * UNIT_WORDS * ROWS_PER_GROUP;
    const int group = p.first_item / ITEMS_PER_GROUP * PAIRS, lane = p.first_item % ITEMS_PER_GROUP * WIDTH;
    __global const float *x = prepared + (size_t)p.tile * segments * SEGMENT * TOKENS;
    __global const float *sums =
        prepared + (size_t)tiles * segments * SEGMENT * TOKENS + (size_t)p.tile * segments * TOKENS;
    __global const uint *weights[GROUPS];
#pragma unroll
    for (int g = 0; g < PAIRS; g++) {
        const size_t at = min(group + g, groups - 1) * group_words;
        weights[g] = w_gate + at;
        weights[PAIRS + g] = w_up + at;
    }
    lanes total[GROUPS][TOKENS];
    product(total, weights, lane, x, sums, p.first, p.last);
#if SPLITS > 1
    LOCAL_SUMS;
    add_splits(total, shared, p.split, p.item);
    if (p.split > 0) return;
#endif
#pragma unroll
    for (int g = 0; g < PAIRS; g++) {
        const int row = (group + g) * ROWS_PER_GROUP + lane, count = rows - row;
        if (count <= 0) continue;
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const int token = p.tile * TOKENS + t;
            lanes gate = total[g][t], up = total[PAIRS + g][t];
            if (bias_gate) gate += LOAD(bias_gate + row);
            if (bias_up) up += LOAD(bias_up + row);
            if (token < tokens) store_first(gate / (1.0f + exp(-gate)) * up, out + (size_t)token * rows + row, count);
        }
    }
}
#endif
