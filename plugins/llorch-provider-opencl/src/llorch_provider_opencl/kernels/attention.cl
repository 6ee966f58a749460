// Causal attention over the paged cache, in one pass: online softmax (Milakov and Gimelshein, 2018; Dao et al., 2022).
//
// A block holds, for each key head, keys as [HEAD_DIM][BLOCK_SIZE] and values as [BLOCK_SIZE][PADDED_DIM]: scores are
// made for neighbouring tokens at once, and added up for neighbouring dimensions, without horizontal sums.
// A query's rounding depends on its own context alone.

#if CACHE_HALF
typedef half cached;
#define LOAD_CACHED(p) LOAD_HALVES(p)
#define LOAD_ONE(p) vload_half(0, (p))
#define STORE_ONE(v, p) vstore_half((v), 0, (p))
#else
typedef float cached;
#define LOAD_CACHED(p) LOAD(p)
#define LOAD_ONE(p) (*(p))
#define STORE_ONE(v, p) (*(p) = (v))
#endif

#define KEYS_OF_HEAD (HEAD_DIM * BLOCK_SIZE)
#define VALUES_OF_HEAD (PADDED_DIM * BLOCK_SIZE)
#define QUERIES_PER_KEY (HEADS / KV_HEADS)

// Writes the new keys and values to their slots. Dimensions behind HEAD_DIM are zeros, so that none is read unset.
__kernel void append(__global cached *restrict keys, __global cached *restrict values, __global const float *restrict k,
                     __global const float *restrict v, __global const int *restrict slots, const int offset) {
    const int d = get_global_id(0), head = get_global_id(1), t = get_global_id(2), slot = slots[offset + t];
    const size_t at = (size_t)(slot / BLOCK_SIZE) * KV_HEADS + head;
    const int token = slot % BLOCK_SIZE;
    const size_t from = ((size_t)t * KV_HEADS + head) * HEAD_DIM + d;
    if (d < HEAD_DIM) STORE_ONE(k[from], keys + at * KEYS_OF_HEAD + d * BLOCK_SIZE + token);
    STORE_ONE(d < HEAD_DIM ? v[from] : 0.0f, values + at * VALUES_OF_HEAD + (size_t)token * PADDED_DIM + d);
}

#if defined(SOFT_CAP)
#define CAPPED(score) (SOFT_CAP * tanh((score) / SOFT_CAP))
#else
#define CAPPED(score) (score)
#endif

INLINED int first_key(const int position) {
#if defined(WINDOW)
    return max(0, position - WINDOW + 1);
#else
    return 0;
#endif
}

#if WIDTH > 1

__constant float LANES[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// One work-item a query and head: WIDTH keys at a time.
__kernel void attend(__global float *restrict out, __global const float *restrict q,
                     __global const cached *restrict keys, __global const cached *restrict values,
                     __global const int *restrict positions, const int positions_at,
                     __global const int *restrict sequence_ids, const int sequence_ids_at,
                     __global const int *restrict tables, const int tables_at, const int max_blocks) {
    const int head = get_global_id(0), t = get_global_id(1);
    const int sequence = sequence_ids[sequence_ids_at + t], position = positions[positions_at + t];
    __global float *result = out + ((size_t)t * HEADS + head) * HEAD_DIM;
    __global const float *query = q + ((size_t)t * HEADS + head) * HEAD_DIM;
    lanes acc[PADDED_DIM / WIDTH];
    for (int i = 0; i < PADDED_DIM / WIDTH; i++) acc[i] = (lanes)(0.0f);
    float largest = -INFINITY, sum = 0.0f;
    const int begin = first_key(position), end = sequence < 0 ? 0 : position + 1;
    for (int start = begin / WIDTH * WIDTH; start < end; start += WIDTH) {
        const int block = tables[tables_at + sequence * max_blocks + start / BLOCK_SIZE];
        const size_t at = (size_t)block * KV_HEADS + head / QUERIES_PER_KEY;
        __global const cached *key = keys + at * KEYS_OF_HEAD + start % BLOCK_SIZE;
        __global const cached *value = values + at * VALUES_OF_HEAD + (size_t)(start % BLOCK_SIZE) * PADDED_DIM;
        lanes even = (lanes)(0.0f), odd = (lanes)(0.0f);
#if HEAD_DIM % 2
        odd = LOAD_CACHED(key + (HEAD_DIM - 1) * BLOCK_SIZE) * query[HEAD_DIM - 1];
#endif
        for (int d = 0; d + 1 < HEAD_DIM; d += 2) {
            even = fma(LOAD_CACHED(key + d * BLOCK_SIZE), (lanes)(query[d]), even);
            odd = fma(LOAD_CACHED(key + (d + 1) * BLOCK_SIZE), (lanes)(query[d + 1]), odd);
        }
        const int low = max(begin - start, 0), high = min(end - start, WIDTH);
        lanes scores = CAPPED((even + odd) * SCALE);
        const lanes lane = JOIN(vload, WIDTH)(0, LANES);
        scores = lane >= (float)low && lane < (float)high ? scores : (lanes)(-INFINITY);
        const float most = fmax(largest, LARGEST(scores));
        const float shrink = exp(largest - most);  // exp(-inf) = 0 the first time
        const lanes weights = exp(scores - most);
        sum = fma(sum, shrink, SUM(weights));
        largest = most;
        float each[WIDTH];
        STORE(weights, each);
        for (int i = 0; i < PADDED_DIM / WIDTH; i++) acc[i] *= shrink;
        for (int j = low; j < high; j++)
            for (int i = 0; i < PADDED_DIM / WIDTH; i++)
                acc[i] = fma(LOAD_CACHED(value + j * PADDED_DIM + i * WIDTH), (lanes)(each[j]), acc[i]);
    }
    const float scale = sum > 0.0f ? 1.0f / sum : 0.0f;  // padding has no keys
    for (int i = 0; i < PADDED_DIM / WIDTH; i++) store_first(acc[i] * scale, result + i * WIDTH, HEAD_DIM - i * WIDTH);
}

#else

#define DIMS_PER_ITEM ((HEAD_DIM + LOCAL - 1) / LOCAL)

// One work-group a query and head: LOCAL keys at a time, one each work-item; then LOCAL dimensions.
__kernel void attend(__global float *restrict out, __global const float *restrict q,
                     __global const cached *restrict keys, __global const cached *restrict values,
                     __global const int *restrict positions, const int positions_at,
                     __global const int *restrict sequence_ids, const int sequence_ids_at,
                     __global const int *restrict tables, const int tables_at, const int max_blocks) {
    __local float query[HEAD_DIM], weights[LOCAL], shared[LOCAL];
    const int item = get_local_id(0), head = get_group_id(0), t = get_group_id(1);
    const int sequence = sequence_ids[sequence_ids_at + t], position = positions[positions_at + t];
    const size_t row = ((size_t)t * HEADS + head) * HEAD_DIM;
    for (int d = item; d < HEAD_DIM; d += LOCAL) query[d] = q[row + d];
    float acc[DIMS_PER_ITEM];
    for (int i = 0; i < DIMS_PER_ITEM; i++) acc[i] = 0.0f;
    float largest = -INFINITY, sum = 0.0f;
    const int begin = first_key(position), end = sequence < 0 ? 0 : position + 1;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (int start = begin / LOCAL * LOCAL; start < end; start += LOCAL) {
        const int token = start + item;
        float score = -INFINITY;
        if (token >= begin && token < end) {
            const int block = tables[tables_at + sequence * max_blocks + token / BLOCK_SIZE];
            const size_t at = (size_t)block * KV_HEADS + head / QUERIES_PER_KEY;
            __global const cached *key = keys + at * KEYS_OF_HEAD + token % BLOCK_SIZE;
            score = 0.0f;
            for (int d = 0; d < HEAD_DIM; d++) score = fma(LOAD_ONE(key + d * BLOCK_SIZE), query[d], score);
            score = CAPPED(score * SCALE);
        }
        shared[item] = score;
        for (int half_ = LOCAL / 2; half_ > 0; half_ /= 2) {
            barrier(CLK_LOCAL_MEM_FENCE);
            if (item < half_) shared[item] = fmax(shared[item], shared[item + half_]);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        const float most = fmax(largest, shared[0]);
        const float shrink = exp(largest - most);  // exp(-inf) = 0 the first time
        weights[item] = exp(score - most);
        largest = most;
        barrier(CLK_LOCAL_MEM_FENCE);
        const int low = max(begin - start, 0), high = min(end - start, LOCAL);
        sum *= shrink;
        for (int j = low; j < high; j++) sum += weights[j];
        for (int i = 0; i < DIMS_PER_ITEM; i++) acc[i] *= shrink;
        for (int j = low; j < high; j++) {
            const int block = tables[tables_at + sequence * max_blocks + (start + j) / BLOCK_SIZE];
            const size_t at = (size_t)block * KV_HEADS + head / QUERIES_PER_KEY;
            __global const cached *value = values + at * VALUES_OF_HEAD + (size_t)((start + j) % BLOCK_SIZE) * PADDED_DIM;
            for (int i = 0; i < DIMS_PER_ITEM; i++) {
                const int d = item + i * LOCAL;
                if (d < HEAD_DIM) acc[i] = fma(LOAD_ONE(value + d), weights[j], acc[i]);
            }
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    const float scale = sum > 0.0f ? 1.0f / sum : 0.0f;  // padding has no keys
    for (int i = 0; i < DIMS_PER_ITEM; i++)
        if (item + i * LOCAL < HEAD_DIM) out[row + item + i * LOCAL] = acc[i] * scale;
}

#endif
