// What kernels of attention share. A block of the cache holds, for each key head, [block_size][PADDED_DIM] keys, and as
// many values; dimensions behind HEAD_DIM are zeros.

#define PADDED_DIM ((HEAD_DIM + 7) / 8 * 8)
#define THREADS 128
#define WARPS (THREADS / 32)

INLINED float capped(float score, float soft_cap) {
    return soft_cap > 0.0f ? soft_cap * tanhf(score / soft_cap) : score;
}

INLINED int first_key(int position, int window) { return window > 0 ? max(0, position - window + 1) : 0; }
