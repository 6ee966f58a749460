// Norms, elementwise operations, row lookups and rounding: what is done row by row.

#define ROW_THREADS 512
#define ROW_WARPS (ROW_THREADS / 32)
#define FLAT_THREADS 256

// One block a row: x += y where y is given, then out = x / sqrt(mean(x^2) + eps) * weight. Where `numbers` is given, the
// result is rounded to int8 too, for the product that follows.
KERNEL(ROW_THREADS)
rmsnorm(float *out, float *x, const float *y, const float *weight, signed char *numbers, Rounded *rounded, int dim,
        float eps) {
    SHARED(float, parts, 32);
    const size_t at = (size_t)blockIdx.x * dim;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < dim; i += ROW_THREADS) {
        float value = x[at + i];
        if (y) {
            value += y[at + i];
            x[at + i] = value;
        }
        squares = fmaf(value, value, squares);
    }
    const float mean = block_sum(squares, parts, ROW_WARPS) / dim;
    const float scale = 1.0f / sqrtf(mean + eps);
    const int units = (dim + UNIT - 1) / UNIT;
    for (int unit = warp_index(); unit < units; unit += ROW_WARPS) {
        const int i = unit * UNIT + lane_index();
        float value = 0.0f;
        if (i < dim) {
            value = x[at + i] * scale * weight[i];
            out[at + i] = value;
        }
        if (numbers) round_unit(value, numbers, rounded, blockIdx.x, unit, units);
    }
}

// One warp a unit: blocks along x share a row's units, y is the row.
KERNEL(FLAT_THREADS)
round_rows(signed char *numbers, Rounded *rounded, const float *x, int cols, int units) {
    const int unit = blockIdx.x * (FLAT_THREADS / 32) + warp_index(), i = unit * UNIT + lane_index();
    if (unit >= units) return;  // whole warps
    const float value = i < cols ? x[(size_t)blockIdx.y * cols + i] : 0.0f;
    round_unit(value, numbers, rounded, blockIdx.y, unit, units);
}

KERNEL(FLAT_THREADS) add(float *out, const float *x, const float *y, uint64 count) {
    const uint64 i = (uint64)blockIdx.x * FLAT_THREADS + threadIdx.x;
    if (i < count) out[i] = x[i] + y[i];
}

KERNEL(FLAT_THREADS) swiglu(float *out, const float *gate, const float *up, uint64 count) {
    const uint64 i = (uint64)blockIdx.x * FLAT_THREADS + threadIdx.x;
    if (i < count) out[i] = gated(gate[i], up[i]);
}

KERNEL(FLAT_THREADS) gather(float *out, const float *x, const int *rows, int dim) {
    const int i = blockIdx.x * FLAT_THREADS + threadIdx.x;
    if (i < dim) out[(size_t)blockIdx.y * dim + i] = x[(size_t)rows[blockIdx.y] * dim + i];
}

// ---- around products on tensor cores ----

// One block a row: x as halves of `stride` columns (zeros behind the last), divided by a power of two of the
// row's own.
KERNEL(ROW_THREADS) to_halves(half_bits *out, float *scales, const float *x, int cols, int stride) {
    SHARED(float, parts, 32);
    const size_t row = blockIdx.x;
    float largest = 0.0f;
    for (int i = threadIdx.x; i < cols; i += ROW_THREADS) largest = fmaxf(largest, fabsf(x[row * cols + i]));
    largest = block_max(largest, parts, ROW_WARPS);
    const PowerOfTwo power = half_range(largest);
    for (int i = threadIdx.x; i < stride; i += ROW_THREADS)
        out[row * stride + i] = to_half(i < cols ? x[row * cols + i] * power.inverse : 0.0f);
    if (threadIdx.x == 0) scales[row] = power.value;
}

KERNEL(FLAT_THREADS) to_brains(brain_bits *out, const float *x, int cols, int stride) {
    const int i = blockIdx.x * FLAT_THREADS + threadIdx.x;
    const size_t row = blockIdx.y;
    if (i < stride) out[row * stride + i] = to_brain(i < cols ? x[row * cols + i] : 0.0f);
}

// out = out * scale of its row + bias; either may be null.
KERNEL(FLAT_THREADS) finish(float *out, const float *scales, const float *bias, int width) {
    const int i = blockIdx.x * FLAT_THREADS + threadIdx.x;
    const size_t row = blockIdx.y;
    if (i >= width) return;
    float value = out[row * width + i];
    if (scales) value *= scales[row];
    if (bias) value += bias[i];
    out[row * width + i] = value;
}

// The same for gate and up, and the activation of both.
KERNEL(FLAT_THREADS)
finish_gated(float *out, const float *gate, const float *up, const float *scales, const float *bias_gate,
             const float *bias_up, int width) {
    const int i = blockIdx.x * FLAT_THREADS + threadIdx.x;
    const size_t row = blockIdx.y;
    if (i >= width) return;
    const float scale = scales ? scales[row] : 1.0f;
    float g = gate[row * width + i] * scale, u = up[row * width + i] * scale;
    if (bias_gate) g += bias_gate[i];
    if (bias_up) u += bias_up[i];
    out[row * width + i] = gated(g, u);
}
