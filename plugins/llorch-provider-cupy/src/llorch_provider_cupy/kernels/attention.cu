// Causal attention over the paged cache, in one pass: online softmax (Milakov and Gimelshein, 2018; Dao et al., 2022).
//
// `attend_rows` takes any batch, after `append` has written its keys and values. `attend_1`,
// `attend_2`, `attend_4` take steps of one query a sequence: the context is cut into splits (flash decoding), each of
// which leaves a partial result for `combine`, and the token's own key is written by the way. They can do their
// neighbours' work too: rotate q and k as `rope` would, and round the result for the product behind them.

#if CACHE_HALF
typedef half_bits cached;
INLINED cached to_cached(float v) { return to_half(v); }
INLINED float from_cached(cached c) { return from_half(c); }
#else
typedef float cached;
INLINED cached to_cached(float v) { return v; }
INLINED float from_cached(cached c) { return c; }
#endif

// Eight neighbouring dimensions.
struct Eight {
    float v[8];
};

INLINED Eight load_eight(const cached *p) {
    Eight e;
#if CACHE_HALF
    const uint4 raw = *(const uint4 *)p;
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        e.v[2 * i] = from_half((half_bits)(words[i] & 0xffff));
        e.v[2 * i + 1] = from_half((half_bits)(words[i] >> 16));
    }
#else
    const float4 a = ((const float4 *)p)[0], b = ((const float4 *)p)[1];
    e.v[0] = a.x; e.v[1] = a.y; e.v[2] = a.z; e.v[3] = a.w;
    e.v[4] = b.x; e.v[5] = b.y; e.v[6] = b.z; e.v[7] = b.w;
#endif
    return e;
}

INLINED void store_eight(cached *p, const Eight &e) {
#if CACHE_HALF
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = to_half(e.v[2 * i]) | (unsigned)to_half(e.v[2 * i + 1]) << 16;
    *(uint4 *)p = make_uint4(words[0], words[1], words[2], words[3]);
#else
    ((float4 *)p)[0] = make_float4(e.v[0], e.v[1], e.v[2], e.v[3]);
    ((float4 *)p)[1] = make_float4(e.v[4], e.v[5], e.v[6], e.v[7]);
#endif
}

// Where a token's key or value of a head starts in the cache.
INLINED size_t place(int slot, int kv_heads, int head, int block_size) {
    return (((size_t)(slot / block_size) * kv_heads + head) * block_size + slot % block_size) * PADDED_DIM;
}

// Writes new keys and values to their slots: blocks along x are key heads, y tokens.
KERNEL(THREADS)
append(cached *keys, cached *values, const float *k, const float *v, const int *slots, int kv_heads, int block_size) {
    const size_t from = ((size_t)blockIdx.y * kv_heads + blockIdx.x) * HEAD_DIM;
    const size_t to = place(slots[blockIdx.y], kv_heads, blockIdx.x, block_size);
    for (int d = threadIdx.x; d < PADDED_DIM; d += THREADS) {
        keys[to + d] = to_cached(d < HEAD_DIM ? k[from + d] : 0.0f);
        values[to + d] = to_cached(d < HEAD_DIM ? v[from + d] : 0.0f);
    }
}

// ---- one query a sequence ----

// Lanes that share a key, eight dimensions each.
#define LANES (PADDED_DIM > 128 ? 32 : PADDED_DIM > 64 ? 16 : PADDED_DIM > 32 ? 8 : PADDED_DIM > 16 ? 4 : PADDED_DIM > 8 ? 2 : 1)
#define KEYS_PER_WARP (32 / LANES)
#define STREAMS (WARPS * KEYS_PER_WARP)
#define AHEAD (HEADS_HERE > 2 ? 1 : 2)  // keys of a stream that are loaded at once: as many as registers hold

// The state of an online softmax.
struct Running {
    float largest, sum;
    Eight mixed;
};

INLINED void take(Running &state, float score, const Eight &value) {
    const float largest = fmaxf(state.largest, score);
    const float shrink = expf(state.largest - largest), weight = expf(score - largest);  // exp(-inf) = 0 at first
    state.sum = state.sum * shrink + weight;
    state.largest = largest;
#pragma unroll
    for (int i = 0; i < 8; i++) state.mixed.v[i] = fmaf(weight, value.v[i], state.mixed.v[i] * shrink);
}

// Takes over the state of the lane `other` away: the same result in both.
INLINED void merge(Running &state, int other) {
    const float their_largest = __shfl_xor_sync(ALL_LANES, state.largest, other);
    const float largest = fmaxf(state.largest, their_largest);
    const float mine = state.largest > -INFINITY ? expf(state.largest - largest) : 0.0f;
    const float theirs = their_largest > -INFINITY ? expf(their_largest - largest) : 0.0f;
    state.sum = state.sum * mine + __shfl_xor_sync(ALL_LANES, state.sum, other) * theirs;
    state.largest = largest;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float value = __shfl_xor_sync(ALL_LANES, state.mixed.v[i], other);
        state.mixed.v[i] = state.mixed.v[i] * mine + value * theirs;
    }
}

INLINED float score_of(const Eight &query, const Eight &key, float scale, float soft_cap) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum = fmaf(query.v[i], key.v[i], sum);
#pragma unroll
    for (int other = LANES / 2; other > 0; other >>= 1) sum += __shfl_xor_sync(ALL_LANES, sum, other);
    return capped(sum * scale, soft_cap);
}

// How q and k are still to be rotated; not at all where `turns` is null.
struct Rope {
    const double *turns;
    int pairs, halves;
    float magnitude;
};

// A rotation of eight neighbouring dimensions: v cosine + (its partner) sine.
struct Turns {
    Eight sine, cosine;
    int partner[8];
};

INLINED Turns turns_of(const Rope &rope, int position, int d) {
    Turns found;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int dim = d + i, pair = rope.halves ? dim % rope.pairs : dim / 2;
        found.sine.v[i] = 0.0f;
        found.cosine.v[i] = 1.0f;
        found.partner[i] = dim;
        if (dim >= 2 * rope.pairs) continue;  // it passes unchanged
        const bool first = rope.halves ? dim < rope.pairs : dim % 2 == 0;
        const int apart = rope.halves ? rope.pairs : 1;
        const Turn turn = turn_of(position, rope.turns[pair], rope.magnitude);
        found.sine.v[i] = first ? -turn.sine : turn.sine;
        found.cosine.v[i] = turn.cosine;
        found.partner[i] = first ? dim + apart : dim - apart;
    }
    return found;
}

// Dimensions d .. d + 7 of a head, zeros behind its last.
INLINED Eight load_row(const float *row, int d, bool inside, const Rope &rope, const Turns &turns) {
    Eight found;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const bool there = inside && d + i < HEAD_DIM;
        found.v[i] = there ? row[d + i] : 0.0f;
        if (rope.turns && there)
            found.v[i] = found.v[i] * turns.cosine.v[i] + row[turns.partner[i]] * turns.sine.v[i];
    }
    return found;
}

// Writes a dimension of a head's result, and where `numbers` is given rounds it too: by whole warps then, as heads of a
// multiple of UNIT dimensions come.
INLINED void finish_dim(float *out, signed char *numbers, Rounded *rounded, int token, int head, int heads, int dim,
                        float total, float sum) {
    const float value = sum > 0.0f ? total / sum : 0.0f;  // padding has no keys
    const int column = head * HEAD_DIM + dim;
    out[(size_t)token * heads * HEAD_DIM + column] = value;
    if (numbers) round_unit(value, numbers, rounded, token, column / UNIT, heads * HEAD_DIM / UNIT);
}

// Blocks: x splits of the context, y groups of HEADS_HERE query heads that share a key head, z tokens.
template <int HEADS_HERE>
INLINED void attend(float *out, signed char *numbers, Rounded *rounded, float *partial, float2 *softmax, const float *q,
                    const float *k, const float *v, cached *keys, cached *values, const int *slots,
                    const int *positions, const int *sequence_ids, const int *tables, const Rope &rope, int heads,
                    int kv_heads, int block_size, int max_blocks, int split_length, int window, float scale,
                    float soft_cap) {
    const int token = blockIdx.z, split = blockIdx.x, per_key = heads / kv_heads;
    const int groups = (per_key + HEADS_HERE - 1) / HEADS_HERE;
    const int kv_head = blockIdx.y / groups, group = blockIdx.y % groups;
    const int first_head = kv_head * per_key + group * HEADS_HERE, count = min(HEADS_HERE, per_key - group * HEADS_HERE);
    const int position = positions[token], sequence = sequence_ids[token];
    const bool padding = sequence < 0;
    const int begin = max(first_key(position, window), split * split_length);
    const int end = padding ? 0 : min(position, (split + 1) * split_length);
    const bool own = !padding && position / split_length == split;
    const int lane = lane_index() % LANES, stream = warp_index() * KEYS_PER_WARP + lane_index() / LANES;
    const bool inside = lane * 8 < PADDED_DIM;
    const int d = inside ? lane * 8 : 0;

    Turns turns;
    if (rope.turns) turns = turns_of(rope, position, d);
    Eight query[HEADS_HERE];
    Running state[HEADS_HERE];
#pragma unroll
    for (int h = 0; h < HEADS_HERE; h++) {
        const size_t row = (size_t)token * heads + first_head + min(h, count - 1);
        query[h] = load_row(q + row * HEAD_DIM, d, inside, rope, turns);
        state[h].largest = -INFINITY;
        state[h].sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) state[h].mixed.v[i] = 0.0f;
    }
    if (own) {  // before the loop, which needs the registers that `turns` takes
        const size_t from = ((size_t)token * kv_heads + kv_head) * HEAD_DIM;
        const Rope none = {};
        Eight key = load_row(k + from, d, inside, rope, turns), value = load_row(v + from, d, inside, none, turns);
#pragma unroll
        for (int i = 0; i < 8; i++) {  // as the cache will hold them
            key.v[i] = from_cached(to_cached(key.v[i]));
            value.v[i] = from_cached(to_cached(value.v[i]));
        }
#pragma unroll
        for (int h = 0; h < HEADS_HERE; h++) {
            const float score = score_of(query[h], key, scale, soft_cap);
            if (stream == 0) take(state[h], score, value);
        }
        if (group == 0 && stream == 0 && inside) {
            const size_t to = place(slots[token], kv_heads, kv_head, block_size) + d;
            store_eight(keys + to, key);
            store_eight(values + to, value);
        }
    }
    for (int base = begin; base < end; base += STREAMS * AHEAD) {
        Eight key[AHEAD], value[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int at = min(base + a * STREAMS + stream, end - 1);
            const int block = tables[(size_t)sequence * max_blocks + at / block_size];
            const size_t from = (((size_t)block * kv_heads + kv_head) * block_size + at % block_size) * PADDED_DIM + d;
            key[a] = load_eight(keys + from);
            value[a] = load_eight(values + from);
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++)
#pragma unroll
            for (int h = 0; h < HEADS_HERE; h++) {
                const float score = score_of(query[h], key[a], scale, soft_cap);
                if (base + a * STREAMS + stream < end) take(state[h], score, value[a]);
            }
    }

    SHARED(float, mixed, WARPS * HEADS_HERE * PADDED_DIM);
    SHARED(float, largest, WARPS * HEADS_HERE);
    SHARED(float, sums, WARPS * HEADS_HERE);
#pragma unroll
    for (int h = 0; h < HEADS_HERE; h++) {
#pragma unroll
        for (int other = LANES; other < 32; other *= 2) merge(state[h], other);
        const int at = warp_index() * HEADS_HERE + h;
        if (lane_index() < LANES && inside)
#pragma unroll
            for (int i = 0; i < 8; i++) mixed[at * PADDED_DIM + d + i] = state[h].mixed.v[i];
        if (lane_index() == 0) {
            largest[at] = state[h].largest;
            sums[at] = state[h].sum;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * HEAD_DIM; i += THREADS) {
        const int h = i / HEAD_DIM, dim = i % HEAD_DIM;
        float most = -INFINITY, sum = 0.0f, total = 0.0f;
        for (int w = 0; w < WARPS; w++) most = fmaxf(most, largest[w * HEADS_HERE + h]);
        for (int w = 0; w < WARPS && most > -INFINITY; w++) {
            const int at = w * HEADS_HERE + h;
            const float weight = expf(largest[at] - most);
            sum = fmaf(weight, sums[at], sum);
            total = fmaf(weight, mixed[at * PADDED_DIM + dim], total);
        }
        const size_t row = (size_t)token * heads + first_head + h;
        if (gridDim.x == 1) {
            finish_dim(out, numbers, rounded, token, first_head + h, heads, dim, total, sum);
        } else {
            const size_t at = row * gridDim.x + split;
            partial[at * HEAD_DIM + dim] = total;
            if (dim == 0) softmax[at] = make_float2(most, sum);
        }
    }
}

#define ATTEND(HEADS_HERE)                                                                                            \
    KERNEL_OF(THREADS, RESIDENT)                                                                                      \
    attend_##HEADS_HERE(float *out, signed char *numbers, Rounded *rounded, float *partial, float2 *softmax,          \
                        const float *q, const float *k, const float *v, cached *keys, cached *values,                 \
                        const int *slots, const int *positions, const int *sequence_ids, const int *tables,           \
                        const double *turns, int pairs, int halves, float magnitude, int heads, int kv_heads,         \
                        int block_size, int max_blocks, int split_length, int window, float scale, float soft_cap) {  \
        const Rope rope = {turns, pairs, halves, magnitude};                                                          \
        attend<HEADS_HERE>(out, numbers, rounded, partial, softmax, q, k, v, keys, values, slots, positions,          \
                           sequence_ids, tables, rope, heads, kv_heads, block_size, max_blocks, split_length, window, \
                           scale, soft_cap);                                                                          \
    }

// Blocks of a multiprocessor: attention.py cuts the context into as many as registers allow for the usual heads.
#define RESIDENT (PADDED_DIM <= 128 && PADDED_DIM == LANES * 8 ? 4 : 3)

ATTEND(1)
ATTEND(2)
ATTEND(4)

// Blocks: x query heads, y tokens.
KERNEL(THREADS)
combine(float *out, signed char *numbers, Rounded *rounded, const float *partial, const float2 *softmax, int heads,
        int splits) {
    const size_t row = (size_t)blockIdx.y * heads + blockIdx.x;
    float most = -INFINITY;
    for (int s = 0; s < splits; s++) most = fmaxf(most, softmax[row * splits + s].x);
    for (int dim = threadIdx.x; dim < HEAD_DIM; dim += THREADS) {
        float sum = 0.0f, total = 0.0f;
        for (int s = 0; s < splits && most > -INFINITY; s++) {
            const float2 state = softmax[row * splits + s];
            const float weight = expf(state.x - most);
            sum = fmaf(weight, state.y, sum);
            total = fmaf(weight, partial[(row * splits + s) * HEAD_DIM + dim], total);
        }
        finish_dim(out, numbers, rounded, blockIdx.y, blockIdx.x, heads, dim, total, sum);
    }
}

// ---- any batch ----

#define ROWS_PER_WARP (PADDED_DIM > 128 ? 2 : 4)
#define ROWS (WARPS * ROWS_PER_WARP)
#define DIMS_PER_LANE ((HEAD_DIM + 31) / 32)
#define KEY_STRIDE (HEAD_DIM | 1)  // odd: lanes that read one dimension of 32 keys hit 32 banks

// Blocks: x tiles of ROWS tokens, y query heads. A tile may hold tokens of several sequences: runs, one after another.
// 32 keys at a time lie in shared memory, then their values in the same place; a lane has a key, then its dimensions.
KERNEL(THREADS)
attend_rows(float *out, const float *q, const cached *keys, const cached *values, const int *positions,
            const int *sequence_ids, const int *tables, int tokens, int heads, int kv_heads, int block_size,
            int max_blocks, int window, float scale, float soft_cap) {
    SHARED(float, queries, ROWS * HEAD_DIM);
    SHARED(float, tile, 32 * KEY_STRIDE);
    const int head = blockIdx.y, kv_head = head / (heads / kv_heads), start = blockIdx.x * ROWS;
    const int here = min(ROWS, tokens - start), lane = lane_index(), row0 = warp_index() * ROWS_PER_WARP;
    for (int i = threadIdx.x; i < here * HEAD_DIM; i += THREADS)
        queries[i] = q[((size_t)(start + i / HEAD_DIM) * heads + head) * HEAD_DIM + i % HEAD_DIM];
    float mixed[ROWS_PER_WARP][DIMS_PER_LANE], largest[ROWS_PER_WARP], sums[ROWS_PER_WARP];
#pragma unroll
    for (int r = 0; r < ROWS_PER_WARP; r++) {
        largest[r] = -INFINITY;
        sums[r] = 0.0f;
#pragma unroll
        for (int i = 0; i < DIMS_PER_LANE; i++) mixed[r][i] = 0.0f;
    }
    for (int run = 0; run < here;) {
        const int sequence = sequence_ids[start + run];
        int run_end = run + 1;
        while (run_end < here && sequence_ids[start + run_end] == sequence) run_end++;
        const int begin = first_key(positions[start + run], window);
        const int end = sequence < 0 ? 0 : positions[start + run_end - 1] + 1;
        for (int base = begin; base < end; base += 32) {
            const int loaded = min(32, end - base);
            float weights[ROWS_PER_WARP];
            for (int part = 0; part < 2; part++) {  // keys, then values
                const cached *from = part == 0 ? keys : values;
                __syncthreads();
                for (int i = threadIdx.x; i < loaded * HEAD_DIM; i += THREADS) {
                    const int key = base + i / HEAD_DIM;
                    const int block = tables[(size_t)sequence * max_blocks + key / block_size];
                    const size_t at = ((size_t)block * kv_heads + kv_head) * block_size + key % block_size;
                    tile[i / HEAD_DIM * KEY_STRIDE + i % HEAD_DIM] = from_cached(from[at * PADDED_DIM + i % HEAD_DIM]);
                }
                __syncthreads();
                if (part == 1) break;
                float scores[ROWS_PER_WARP];
#pragma unroll
                for (int r = 0; r < ROWS_PER_WARP; r++) scores[r] = 0.0f;
                if (lane < loaded)
                    for (int dim = 0; dim < HEAD_DIM; dim++) {
                        const float key = tile[lane * KEY_STRIDE + dim];
#pragma unroll
                        for (int r = 0; r < ROWS_PER_WARP; r++)
                            scores[r] = fmaf(queries[min(row0 + r, here - 1) * HEAD_DIM + dim], key, scores[r]);
                    }
#pragma unroll
                for (int r = 0; r < ROWS_PER_WARP; r++) {
                    const int row = row0 + r;
                    const int position = row < here ? positions[start + row] : 0;
                    const bool seen = row >= run && row < run_end && lane < loaded && base + lane <= position &&
                                      base + lane >= first_key(position, window);
                    const float score = seen ? capped(scores[r] * scale, soft_cap) : -INFINITY;
                    const float most = fmaxf(largest[r], warp_max(score));
                    weights[r] = seen ? expf(score - most) : 0.0f;
                    const float shrink = largest[r] > -INFINITY ? expf(largest[r] - most) : 0.0f;
                    sums[r] = sums[r] * shrink + warp_sum(weights[r]);
                    largest[r] = most;
#pragma unroll
                    for (int i = 0; i < DIMS_PER_LANE; i++) mixed[r][i] *= shrink;
                }
            }
            for (int j = 0; j < loaded; j++) {
                float value[DIMS_PER_LANE];
#pragma unroll
                for (int i = 0; i < DIMS_PER_LANE; i++)
                    value[i] = lane + 32 * i < HEAD_DIM ? tile[j * KEY_STRIDE + lane + 32 * i] : 0.0f;
#pragma unroll
                for (int r = 0; r < ROWS_PER_WARP; r++) {
                    const float weight = __shfl_sync(ALL_LANES, weights[r], j);
#pragma unroll
                    for (int i = 0; i < DIMS_PER_LANE; i++) mixed[r][i] = fmaf(weight, value[i], mixed[r][i]);
                }
            }
        }
        run = run_end;
    }
#pragma unroll
    for (int r = 0; r < ROWS_PER_WARP; r++) {
        if (row0 + r >= here) continue;
        float *row = out + ((size_t)(start + row0 + r) * heads + head) * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < DIMS_PER_LANE; i++)
            if (lane + 32 * i < HEAD_DIM) row[lane + 32 * i] = sums[r] > 0.0f ? mixed[r][i] / sums[r] : 0.0f;
    }
}
