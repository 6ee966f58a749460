// Attention of prompts on tensor cores: as `attend_rows` of attention.cu, over a cache of halves, with both products in
// halves and sums in float32 (the scheme of Dao, "FlashAttention-2", 2023). Needs compute capability 8.0.
//
// A warp has 16 queries, with all their dimensions in registers, in the order that `mma` wants them; 32 keys at a time
// lie in shared memory with their values. The weights of the softmax stay where the first product leaves them: two
// neighbouring pieces of its result are an operand of the second.

#define KEYS 32
#define WARP_ROWS 16
#define ROWS (WARPS * WARP_ROWS)
#define DIMS ((HEAD_DIM + 15) / 16 * 16)
#define STRIDE (DIMS + 8)  // of a key: lanes of eight keys hit different banks

INLINED unsigned pair(half_bits low, half_bits high) { return low | (unsigned)high << 16; }
INLINED unsigned pair(float low, float high) { return pair(to_half(low), to_half(high)); }

// KEYS keys or values from `base` on into shared memory; zeros behind the last, and behind the last dimension.
INLINED void load_tile(uint4 *tile, const half_bits *from, const int *table, int base, int end, int kv_heads,
                       int kv_head, int block_size) {
    for (int i = threadIdx.x; i < KEYS * (DIMS / 8); i += THREADS) {
        const int key = base + i / (DIMS / 8), eight = i % (DIMS / 8);
        uint4 values = make_uint4(0, 0, 0, 0);
        if (key < end && eight * 8 < PADDED_DIM) {
            const size_t at = ((size_t)table[key / block_size] * kv_heads + kv_head) * block_size + key % block_size;
            values = *(const uint4 *)(from + at * PADDED_DIM + eight * 8);
        }
        tile[i / (DIMS / 8) * (STRIDE / 8) + eight] = values;
    }
}

// Blocks: x tiles of ROWS tokens, y query heads. A tile may hold tokens of several sequences: runs, one after another.
KERNEL(THREADS)
attend_prompt(float *out, const float *q, const half_bits *keys, const half_bits *values, const int *positions,
              const int *sequence_ids, const int *tables, int tokens, int heads, int kv_heads, int block_size,
              int max_blocks, int window, float scale, float soft_cap) {
    SHARED(uint4, key_tile, KEYS * STRIDE / 8);
    SHARED(uint4, value_tile, KEYS * STRIDE / 8);
    const int head = blockIdx.y, kv_head = head / (heads / kv_heads), start = blockIdx.x * ROWS;
    const int here = min(ROWS, tokens - start);
    // mma's layout: a lane has rows `group` and group + 8 of its warp's, and columns 2 t, 2 t + 1 of each eight
    const int group = lane_index() >> 2, t = lane_index() & 3;
    int rows[2], row_positions[2];
    float back[2], largest[2], sums[2], mixed[DIMS / 8][4];
    unsigned query[DIMS / 16][4];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        rows[r] = warp_index() * WARP_ROWS + group + 8 * r;
        const bool there = rows[r] < here;
        row_positions[r] = there ? positions[start + rows[r]] : 0;
        const float *row = q + ((size_t)(start + min(rows[r], here - 1)) * heads + head) * HEAD_DIM;
        float most = 0.0f;
        for (int dim = t; dim < HEAD_DIM; dim += 4) most = fmaxf(most, fabsf(row[dim]));
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
        const PowerOfTwo power = half_range(most);
        back[r] = power.value * scale;
        largest[r] = -INFINITY;
        sums[r] = 0.0f;
#pragma unroll
        for (int s = 0; s < DIMS / 16; s++)
#pragma unroll
            for (int eight = 0; eight < 2; eight++) {
                const int dim = s * 16 + eight * 8 + 2 * t;
                const float low = there && dim < HEAD_DIM ? row[dim] * power.inverse : 0.0f;
                const float high = there && dim + 1 < HEAD_DIM ? row[dim + 1] * power.inverse : 0.0f;
                query[s][2 * eight + r] = pair(low, high);
            }
    }
#pragma unroll
    for (int i = 0; i < DIMS / 8; i++)
#pragma unroll
        for (int c = 0; c < 4; c++) mixed[i][c] = 0.0f;

    for (int run = 0; run < here;) {
        const int sequence = sequence_ids[start + run];
        int run_end = run + 1;
        while (run_end < here && sequence_ids[start + run_end] == sequence) run_end++;
        const int begin = first_key(positions[start + run], window);
        const int end = sequence < 0 ? 0 : positions[start + run_end - 1] + 1;
        const int *table = tables + (size_t)max(sequence, 0) * max_blocks;
        for (int base = begin; base < end; base += KEYS) {
            __syncthreads();
            load_tile(key_tile, keys, table, base, end, kv_heads, kv_head, block_size);
            load_tile(value_tile, values, table, base, end, kv_heads, kv_head, block_size);
            __syncthreads();
            float scores[KEYS / 8][4];
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int c = 0; c < 4; c++) scores[n][c] = 0.0f;
                const unsigned *key = (const unsigned *)key_tile + (n * 8 + group) * (STRIDE / 2) + t;
#pragma unroll
                for (int s = 0; s < DIMS / 16; s++) mma_16_8_16(scores[n], query[s], key[s * 8], key[s * 8 + 4]);
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const bool inside = rows[r] >= run && rows[r] < run_end;
                const int first = first_key(row_positions[r], window);
                float most = largest[r];
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        const int key = base + n * 8 + 2 * t + c;
                        const bool seen = inside && key >= first && key <= row_positions[r];
                        float &score = scores[n][2 * r + c];
                        score = seen ? capped(score * back[r], soft_cap) : -INFINITY;
                        most = fmaxf(most, score);
                    }
                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
                const float shrink = largest[r] > -INFINITY ? expf(largest[r] - most) : 0.0f;
                largest[r] = most;
                sums[r] *= shrink;  // of this lane's columns: those of the row are added at the end
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        float &score = scores[n][2 * r + c];
                        score = score > -INFINITY ? expf(score - most) : 0.0f;
                        sums[r] += score;
                    }
#pragma unroll
                for (int i = 0; i < DIMS / 8; i++) {
                    mixed[i][2 * r] *= shrink;
                    mixed[i][2 * r + 1] *= shrink;
                }
            }
#pragma unroll
            for (int j = 0; j < KEYS / 16; j++) {
                const float *low = scores[2 * j], *high = scores[2 * j + 1];
                const unsigned weights[4] = {pair(low[0], low[1]), pair(low[2], low[3]), pair(high[0], high[1]),
                                             pair(high[2], high[3])};
                const half_bits *value = (const half_bits *)value_tile + (j * 16 + 2 * t) * STRIDE + group;
#pragma unroll
                for (int i = 0; i < DIMS / 8; i++)
                    mma_16_8_16(mixed[i], weights, pair(value[i * 8], value[STRIDE + i * 8]),
                                pair(value[8 * STRIDE + i * 8], value[9 * STRIDE + i * 8]));
            }
        }
        run = run_end;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float sum = sums[r] + __shfl_xor_sync(ALL_LANES, sums[r], 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        if (rows[r] >= here) continue;
        float *row = out + ((size_t)(start + rows[r]) * heads + head) * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < DIMS / 8; i++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int dim = i * 8 + 2 * t + c;
                if (dim < HEAD_DIM) row[dim] = sum > 0.0f ? mixed[i][2 * r + c] / sum : 0.0f;  // padding has no keys
            }
    }
}
