// Rotates q and k in place: a thread one pair of HEADS_PER_BLOCK heads.

#define ROPE_THREADS 64
#define HEADS_PER_BLOCK 4

KERNEL(ROPE_THREADS)
rope(float *q, float *k, const int *positions, const double *turns, int pairs, int halves, float magnitude, int q_heads,
     int k_heads, int head_dim) {
    const int pair = blockIdx.x * ROPE_THREADS + threadIdx.x;
    const size_t token = blockIdx.z;
    if (pair >= pairs) return;
    const Turn turn = turn_of(positions[token], turns[pair], magnitude);
    const int first = halves ? pair : 2 * pair, second = halves ? pair + pairs : 2 * pair + 1;
    const int begin = blockIdx.y * HEADS_PER_BLOCK, end = min(begin + HEADS_PER_BLOCK, q_heads + k_heads);
    for (int head = begin; head < end; head++) {
        float *row = head < q_heads ? q + (token * q_heads + head) * head_dim
                                    : k + (token * k_heads + head - q_heads) * head_dim;
        const float a = row[first], b = row[second];
        row[first] = a * turn.cosine - b * turn.sine;
        row[second] = a * turn.sine + b * turn.cosine;
    }
}
