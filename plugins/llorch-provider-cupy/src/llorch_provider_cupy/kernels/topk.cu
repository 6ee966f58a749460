// The k largest logits of each row, largest first, the lower id first among equals.
//
// A candidate is one 64-bit key: the value in an order that unsigned integers have, above the complement of its id.

#define SORT_THREADS 512
#define SORTED 2048  // keys that a block sorts
#define ARGMAX_THREADS 1024

INLINED uint64 key_of(float value, int id) {
    const unsigned bits = __float_as_uint(value == 0.0f ? 0.0f : value);  // -0 equals 0
    const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64)ordered << 32 | (unsigned)~id;
}

INLINED float value_of(uint64 key) {
    const unsigned ordered = (unsigned)(key >> 32);
    return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

INLINED int id_of(uint64 key) { return (int)~(unsigned)key; }

INLINED uint64 larger(uint64 a, uint64 b) { return a > b ? a : b; }

// One block a row.
KERNEL(ARGMAX_THREADS) argmax(float *values, int *ids, const float *logits, int vocab) {
    SHARED(uint64, parts, 32);
    const size_t row = blockIdx.x;
    uint64 best = 0;
    for (int i = threadIdx.x; i < vocab; i += ARGMAX_THREADS) best = larger(best, key_of(logits[row * vocab + i], i));
#pragma unroll
    for (int other = 16; other > 0; other >>= 1) best = larger(best, __shfl_xor_sync(ALL_LANES, best, other));
    if (lane_index() == 0) parts[warp_index()] = best;
    __syncthreads();
    if (warp_index() > 0) return;  // no barrier follows
    best = parts[lane_index()];
#pragma unroll
    for (int other = 16; other > 0; other >>= 1) best = larger(best, __shfl_xor_sync(ALL_LANES, best, other));
    if (lane_index() == 0) {
        values[row] = value_of(best);
        ids[row] = id_of(best);
    }
}

// Bitonic, descending (Batcher, 1968).
INLINED void sort_keys(uint64 *keys) {
    for (int size = 2; size <= SORTED; size *= 2)
        for (int distance = size / 2; distance > 0; distance /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < SORTED / 2; i += SORT_THREADS) {
                const int low = 2 * i - (i & (distance - 1)), high = low + distance;
                const uint64 a = keys[low], b = keys[high];
                const bool descending = (low & size) == 0;
                if (descending ? a < b : a > b) {
                    keys[low] = b;
                    keys[high] = a;
                }
            }
        }
    __syncthreads();
}

// The k largest of SORTED logits, as keys [rows][parts][k]: blocks along x are the parts of a row.
KERNEL(SORT_THREADS) topk_parts(uint64 *candidates, const float *logits, int vocab, int k) {
    SHARED(uint64, keys, SORTED);
    const size_t row = blockIdx.y;
    for (int i = threadIdx.x; i < SORTED; i += SORT_THREADS) {
        const int id = blockIdx.x * SORTED + i;
        keys[i] = id < vocab ? key_of(logits[row * vocab + id], id) : 0;
    }
    sort_keys(keys);
    uint64 *out = candidates + (row * gridDim.x + blockIdx.x) * k;
    for (int i = threadIdx.x; i < k; i += SORT_THREADS) out[i] = keys[i];
}

// The k largest of `count` keys of each row: what is best so far is sorted with as many others as there is room for.
KERNEL(SORT_THREADS) topk_merge(float *values, int *ids, const uint64 *candidates, int count, int k) {
    SHARED(uint64, keys, SORTED);
    const uint64 *row = candidates + (size_t)blockIdx.x * count;
    for (int i = threadIdx.x; i < SORTED; i += SORT_THREADS) keys[i] = i < count ? row[i] : 0;
    sort_keys(keys);
    for (int next = SORTED; next < count; next += SORTED - k) {
        for (int i = threadIdx.x; i < SORTED - k; i += SORT_THREADS) keys[k + i] = next + i < count ? row[next + i] : 0;
        sort_keys(keys);
    }
    for (int i = threadIdx.x; i < k; i += SORT_THREADS) {
        values[(size_t)blockIdx.x * k + i] = value_of(keys[i]);
        ids[(size_t)blockIdx.x * k + i] = id_of(keys[i]);
    }
}
