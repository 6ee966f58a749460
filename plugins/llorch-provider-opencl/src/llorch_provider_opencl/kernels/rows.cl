// Operations on rows and elements. LOCAL work-items share a row.

// The sum of every work-item's value, in an order that is always the same.
INLINED float sum_of_group(__local float *shared, const float value) {
#if LOCAL == 1
    return value;
#else
    const int item = get_local_id(0);
    shared[item] = value;
    for (int half_ = LOCAL / 2; half_ > 0; half_ /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (item < half_) shared[item] += shared[item + half_];
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    return shared[0];
#endif
}

// out = x / sqrt(mean(x^2) + eps) * weight; adds y to x first where there is one. One work-group a row.
__kernel void rmsnorm(__global float *restrict out, __global float *restrict x, __global const float *restrict y,
                      __global const float *restrict weight, const int dim, const float eps) {
    __local float shared[LOCAL];
    const size_t row = get_group_id(0) * (size_t)dim;
    const int whole = dim / WIDTH * WIDTH, start = get_local_id(0) * WIDTH, step = LOCAL * WIDTH;
    x += row;
    lanes squares = (lanes)(0.0f);
    for (int i = start; i < whole; i += step) {
        lanes v = LOAD(x + i);
        if (y) {
            v += LOAD(y + row + i);
            STORE(v, x + i);
        }
        squares = fma(v, v, squares);
    }
    float rest = 0.0f;
    for (int i = whole + get_local_id(0); i < dim; i += LOCAL) {
        float v = x[i];
        if (y) x[i] = v = v + y[row + i];
        rest = fma(v, v, rest);
    }
    const float scale = 1.0f / sqrt(sum_of_group(shared, SUM(squares) + rest) / (float)dim + eps);
    for (int i = start; i < whole; i += step) STORE(LOAD(x + i) * scale * LOAD(weight + i), out + row + i);
    for (int i = whole + get_local_id(0); i < dim; i += LOCAL) out[row + i] = x[i] * scale * weight[i];
}

// A work-item takes PER_ITEM vectors, PER_ITEM * WIDTH elements.
#define ELEMENTWISE(name, expression)                                                                               \
    __kernel void name(__global float *out, __global const float *x, __global const float *y, const uint count) {   \
        uint i = get_global_id(0) * (PER_ITEM * WIDTH);                                                             \
        const uint end = min(i + PER_ITEM * WIDTH, count);                                                          \
        for (; i + WIDTH <= end; i += WIDTH) {                                                                      \
            const lanes a = LOAD(x + i), b = LOAD(y + i);                                                           \
            STORE(expression, out + i);                                                                             \
        }                                                                                                           \
        for (; i < end; i++) {                                                                                      \
            const float a = x[i], b = y[i];                                                                         \
            out[i] = expression;                                                                                    \
        }                                                                                                           \
    }

ELEMENTWISE(add, a + b)
ELEMENTWISE(swiglu, a / (1.0f + exp(-a)) * b)  // exp(-a) may be infinite: a / inf is the right 0

// out[i] = x[rows[i]]
__kernel void gather(__global float *restrict out, __global const float *restrict x, __global const int *restrict rows,
                     const int offset, const int dim) {
    const int column = get_global_id(0);
    out[get_global_id(1) * (size_t)dim + column] = x[rows[offset + get_global_id(1)] * (size_t)dim + column];
}

// The largest of each row, and the lowest of its places. One work-group a row.
__kernel void argmax(__global float *restrict values, __global int *restrict ids, const int offset,
                     __global const float *restrict x, const int count) {
    __local float shared_values[LOCAL];
    __local int shared_ids[LOCAL];
    const int item = get_local_id(0);
    x += get_group_id(0) * (size_t)count;
    float best = -INFINITY;
    int id = count;
    for (int i = item * PER_ITEM * WIDTH; i < count; i += LOCAL * PER_ITEM * WIDTH) {
        const int end = min(i + PER_ITEM * WIDTH, count);
        int at = i;
        lanes largest = (lanes)(-INFINITY);
        for (; at + WIDTH <= end; at += WIDTH) largest = fmax(largest, LOAD(x + at));
        float found = LARGEST(largest);
        for (; at < end; at++) found = fmax(found, x[at]);
        if (found <= best && id < count) continue;
        best = found;
        for (id = i; id < end - 1 && x[id] != found; id++) {}
    }
    shared_values[item] = best;
    shared_ids[item] = id;
    for (int half_ = LOCAL / 2; half_ > 0; half_ /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (item >= half_) continue;
        const float other = shared_values[item + half_];
        const int other_id = shared_ids[item + half_];
        if (other < shared_values[item] || (other == shared_values[item] && other_id > shared_ids[item])) continue;
        shared_values[item] = other;
        shared_ids[item] = other_id;
    }
    if (item > 0) return;
    values[get_group_id(0)] = shared_values[0];
    ids[offset + get_group_id(0)] = shared_ids[0];
}
