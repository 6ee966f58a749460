// What reads weights of one type: products for 1 to 8 tokens, lookups, and values in a plain type for cuBLAS.
//
// A product: each warp takes ROWS rows of the weight for all tokens, its lanes neighbouring units (16 bytes) of each.
// Sums over lanes by shuffles. Rows and tokens behind the last are computed as the last and not written.

#define PRODUCT_THREADS 128
#define PRODUCT_WARPS (PRODUCT_THREADS / 32)
#define FLAT_THREADS 256

#if PLAIN
typedef const float *Activations;
#else
struct Activations {
    const signed char *numbers;
    const Rounded *rounded;
};
#endif

#if PLAIN
// Eight columns of x, zeros behind the last.
INLINED void load_x(const float *x, int column, int cols, float *values) {
    if (cols % 4 == 0 && column + 8 <= cols) {
        const float4 a = ((const float4 *)(x + column))[0], b = ((const float4 *)(x + column))[1];
        values[0] = a.x; values[1] = a.y; values[2] = a.z; values[3] = a.w;
        values[4] = b.x; values[5] = b.y; values[6] = b.z; values[7] = b.w;
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = column + i < cols ? x[column + i] : 0.0f;
    }
}
#endif

// sums[r][t] over the lane's own columns, of rows `first` .. first + ROWS - 1.
template <int TOKENS, int ROWS, int UNROLL = TOKENS == 1 ? 2 : 1>
INLINED void accumulate(float (*sums)[TOKENS], const Matrix &m, int first, const Activations &x, int tokens, int cols) {
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++) sums[r][t] = 0.0f;
#if PLAIN
#pragma unroll(UNROLL)
    for (int column = lane_index() * 8; column < m.units * UNIT; column += 256) {
        float w[ROWS][8];
#pragma unroll
        for (int r = 0; r < ROWS; r++) load_weights(m, min(first + r, m.rows - 1), column, w[r]);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            float values[8];
            load_x(x + (size_t)min(t, tokens - 1) * cols, column, cols, values);
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int i = 0; i < 8; i++) sums[r][t] = fmaf(w[r][i], values[i], sums[r][t]);
        }
    }
#else
#pragma unroll(UNROLL)
    for (int unit = lane_index(); unit < m.units; unit += 32) {
        Unit u[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) u[r] = load_unit(m, min(first + r, m.rows - 1), unit);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const int token = min(t, tokens - 1);
            const int4 *at = (const int4 *)(x.numbers + place_of_numbers(token, unit, m.units));
            const int4 a = at[0], b = at[m.units];
            const int numbers[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
            const Rounded rounded = x.rounded[(size_t)token * m.units + unit];
#pragma unroll
            for (int r = 0; r < ROWS; r++) sums[r][t] += unit_product(u[r], numbers, rounded);
        }
    }
#endif
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++) sums[r][t] = warp_sum(sums[r][t]);
}

// What is left of a norm where the kernel before has rounded x times its weight, not yet divided by the root of the mean
// square: a product is linear in its activations. `squares` are the sums of x^2 by units, null where x is whole.
struct Norm {
    const float *squares;
    float eps;
};

// This lane's share of the sum of squares, to be loaded before a product's weights.
INLINED float squares_here(const Norm &norm, int units) {
    float sum = 0.0f;
    for (int unit = lane_index(); norm.squares && unit < units; unit += 32) sum += norm.squares[unit];
    return sum;
}

INLINED float norm_factor(const Norm &norm, float squares, int cols) {
    return norm.squares ? 1.0f / sqrtf(warp_sum(squares) / cols + norm.eps) : 1.0f;
}

// One of the products of a launch; their blocks lie one after another.
struct Part {
    float *out;
    const byte *weight;
    const float *bias;
    int rows;
};

template <int TOKENS, int ROWS>
INLINED void product(Part a, Part b, Part c, const Activations &x, const Norm &norm, int tokens, int cols, int units) {
    const int rows_per_block = PRODUCT_WARPS * ROWS;
    const int blocks_a = (a.rows + rows_per_block - 1) / rows_per_block;
    const int blocks_b = (b.rows + rows_per_block - 1) / rows_per_block;
    int block = blockIdx.x;
    Part part = a;
    if (block >= blocks_a) {
        block -= blocks_a;
        part = b;
        if (block >= blocks_b) {
            block -= blocks_b;
            part = c;
        }
    }
    const int first = (block * PRODUCT_WARPS + warp_index()) * ROWS;
    if (first >= part.rows) return;  // whole warps
    const Matrix m = {part.weight, part.rows, units};
    const float squares = squares_here(norm, units);
    float sums[ROWS][TOKENS];
    accumulate<TOKENS, ROWS>(sums, m, first, x, tokens, cols);
    const float factor = norm_factor(norm, squares, cols);
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
            if (lane_index() == (r * TOKENS + t) % 32 && first + r < part.rows && t < tokens) {
                const int row = first + r;
                part.out[(size_t)t * part.rows + row] = sums[r][t] * factor + (part.bias ? part.bias[row] : 0.0f);
            }
}

template <int TOKENS, int ROWS>
INLINED void gate_up(float *out, const byte *gate, const byte *up, const float *bias_gate, const float *bias_up,
                     int rows, const Activations &x, const Norm &norm, int tokens, int cols, int units) {
    const int first = (blockIdx.x * PRODUCT_WARPS + warp_index()) * ROWS;
    if (first >= rows) return;  // whole warps
    const float squares = squares_here(norm, units);
    float gates[ROWS][TOKENS], ups[ROWS][TOKENS];
    const Matrix gate_matrix = {gate, rows, units}, up_matrix = {up, rows, units};
    accumulate<TOKENS, ROWS>(gates, gate_matrix, first, x, tokens, cols);
    accumulate<TOKENS, ROWS>(ups, up_matrix, first, x, tokens, cols);
    const float factor = norm_factor(norm, squares, cols);
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
            if (lane_index() == (r * TOKENS + t) % 32 && first + r < rows && t < tokens) {
                const int row = first + r;
                const float g = gates[r][t] * factor + (bias_gate ? bias_gate[row] : 0.0f);
                const float u = ups[r][t] * factor + (bias_up ? bias_up[row] : 0.0f);
                out[(size_t)t * rows + row] = gated(g, u);
            }
}

#if PLAIN
#define X_ARGUMENTS const float *x
#define X_VALUE const Activations activations = x
#else
#define X_ARGUMENTS const signed char *numbers, const Rounded *rounded
#define X_VALUE const Activations activations = {numbers, rounded}
#endif

#define PRODUCTS(TOKENS, ROWS)                                                                                     \
    KERNEL(PRODUCT_THREADS)                                                                                        \
    product_##TOKENS(X_ARGUMENTS, const float *squares, float eps, int tokens, int cols, int units, float *out_a,  \
                     const byte *weight_a, const float *bias_a, int rows_a, float *out_b, const byte *weight_b,    \
                     const float *bias_b, int rows_b, float *out_c, const byte *weight_c, const float *bias_c,     \
                     int rows_c) {                                                                                 \
        X_VALUE;                                                                                                   \
        const Part a = {out_a, weight_a, bias_a, rows_a}, b = {out_b, weight_b, bias_b, rows_b};                   \
        const Part c = {out_c, weight_c, bias_c, rows_c};                                                          \
        const Norm norm = {squares, eps};                                                                          \
        product<TOKENS, ROWS>(a, b, c, activations, norm, tokens, cols, units);                                    \
    }                                                                                                              \
    KERNEL(PRODUCT_THREADS)                                                                                        \
    gate_up_##TOKENS(X_ARGUMENTS, const float *squares, float eps, int tokens, int cols, int units, float *out,    \
                     const byte *gate, const byte *up, const float *bias_gate, const float *bias_up, int rows) {   \
        X_VALUE;                                                                                                   \
        const Norm norm = {squares, eps};                                                                          \
        gate_up<TOKENS, ROWS>(out, gate, up, bias_gate, bias_up, rows, activations, norm, tokens, cols, units);    \
    }

PRODUCTS(1, PLAIN ? 2 : 1)  // a plain row's columns are the larger part of what a lane loads: rows share them
PRODUCTS(2, 2)
PRODUCTS(4, 2)
PRODUCTS(8, 2)

// ---- products of one token that do their neighbours' work ----
//
// A block makes the rows of a unit, a warp each, so that it can round them for the product behind it.

#define UNIT_THREADS (UNIT * 32)
#if defined(TYPE_Q5_K) || defined(TYPE_Q6_K)
#define UNIT_UNROLL 1  // a block of this size leaves a thread 64 registers
#else
#define UNIT_UNROLL 2
#endif

// o = W x + bias; stream += o; then stream * norm_weight, whole and rounded, and its squares, for a product that divides.
KERNEL(UNIT_THREADS)
product_norm(X_ARGUMENTS, int cols, int units, float *out, const byte *weight, const float *bias, float *stream,
             const float *norm_weight, float *normed, signed char *next_numbers, Rounded *next_rounded,
             float *next_squares) {
    SHARED(float, values, UNIT);
    X_VALUE;
    const int first = blockIdx.x * UNIT, rows = gridDim.x * UNIT, row = first + warp_index();
    const Matrix m = {weight, rows, units};
    float sums[1][1];
    accumulate<1, 1, UNIT_UNROLL>(sums, m, row, activations, 1, cols);
    if (lane_index() == 0) {
        const float value = sums[0][0] + (bias ? bias[row] : 0.0f);
        out[row] = value;
        values[warp_index()] = stream[row] + value;
    }
    __syncthreads();
    if (warp_index() > 0) return;
    const int mine = first + lane_index();
    const float sum = values[lane_index()], scaled = sum * norm_weight[mine];
    stream[mine] = sum;
    normed[mine] = scaled;
    const float squares = warp_sum(sum * sum);
    if (lane_index() == 0) next_squares[blockIdx.x] = squares;
    round_unit(scaled, next_numbers, next_rounded, 0, blockIdx.x, gridDim.x);
}

KERNEL(UNIT_THREADS)
gate_up_round(X_ARGUMENTS, const float *squares, float eps, int cols, int units, float *out, const byte *gate,
              const byte *up, const float *bias_gate, const float *bias_up, signed char *next_numbers,
              Rounded *next_rounded) {
    SHARED(float, values, UNIT);
    X_VALUE;
    const int first = blockIdx.x * UNIT, rows = gridDim.x * UNIT, row = first + warp_index();
    const Norm norm = {squares, eps};
    const Matrix gate_matrix = {gate, rows, units}, up_matrix = {up, rows, units};
    const float share = squares_here(norm, units);
    float gates[1][1], ups[1][1];
    accumulate<1, 1, UNIT_UNROLL>(gates, gate_matrix, row, activations, 1, cols);
    accumulate<1, 1, UNIT_UNROLL>(ups, up_matrix, row, activations, 1, cols);
    const float factor = norm_factor(norm, share, cols);
    if (lane_index() == 0) {
        const float g = gates[0][0] * factor + (bias_gate ? bias_gate[row] : 0.0f);
        const float u = ups[0][0] * factor + (bias_up ? bias_up[row] : 0.0f);
        values[warp_index()] = gated(g, u);
    }
    __syncthreads();
    if (warp_index() > 0) return;
    const float value = values[lane_index()];
    out[first + lane_index()] = value;
    round_unit(value, next_numbers, next_rounded, 0, blockIdx.x, gridDim.x);
}

// ---- values ----

// out[t] = table[tokens[t]]; a thread eight columns.
KERNEL(FLAT_THREADS) embed(float *out, const int *tokens, const byte *table, int rows, int units, int cols) {
    const int column = (blockIdx.x * FLAT_THREADS + threadIdx.x) * 8;
    if (column >= cols) return;
    const Matrix m = {table, rows, units};
    float values[8];
    load_weights(m, tokens[blockIdx.y], column, values);
    float *row = out + (size_t)blockIdx.y * cols;
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (column + i < cols) row[column + i] = values[i];
}

// Rows `first` and on as float32 [count][units * 32] or as halves; a thread eight columns.
KERNEL(FLAT_THREADS) to_floats(float *out, const byte *weight, int rows, int units, int first) {
    const int column = (blockIdx.x * FLAT_THREADS + threadIdx.x) * 8;
    if (column >= units * UNIT) return;
    const Matrix m = {weight, rows, units};
    float values[8];
    load_weights(m, first + blockIdx.y, column, values);
    float4 *at = (float4 *)(out + (size_t)blockIdx.y * units * UNIT + column);
    at[0] = make_float4(values[0], values[1], values[2], values[3]);
    at[1] = make_float4(values[4], values[5], values[6], values[7]);
}

KERNEL(FLAT_THREADS) to_half_values(half_bits *out, const byte *weight, int rows, int units, int first) {
    const int column = (blockIdx.x * FLAT_THREADS + threadIdx.x) * 8;
    if (column >= units * UNIT) return;
    const Matrix m = {weight, rows, units};
    float values[8];
    load_weights(m, first + blockIdx.y, column, values);
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = to_half(values[2 * i]) | (unsigned)to_half(values[2 * i + 1]) << 16;
    *(uint4 *)(out + (size_t)blockIdx.y * units * UNIT + column) = make_uint4(words[0], words[1], words[2], words[3]);
}
