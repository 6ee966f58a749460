// out[t] = table[tokens[t]], over a table as weights.cl has it. Compiled with WIDTH 1: one column at a time.

__kernel void embed(__global float *restrict out, __global const int *restrict tokens, const int offset,
                    __global const uint *restrict w, const int cols, const int units) {
    const int t = get_global_id(1), row = tokens[offset + t];
    const uint lane = row % ROWS_PER_GROUP;
    const int segment = get_global_id(0);
    __global const uint *group = w + (size_t)(row / ROWS_PER_GROUP) * units * UNIT_WORDS * ROWS_PER_GROUP;
    __global const uint *unit = group + (size_t)(segment / SEGMENTS) * UNIT_WORDS * ROWS_PER_GROUP;
    const int first = segment * SEGMENT, last = min(first + SEGMENT, cols);
    for (int column = first; column < last; column++) {
        const int i = column - first;
        const float q = quants(unit, lane, segment % SEGMENTS, i) * as_float((127 - SHIFT(i)) << 23);
        out[(size_t)t * cols + column] = scaled(unit, lane, segment % SEGMENTS, q, 1.0f, 0.0f);
    }
}
