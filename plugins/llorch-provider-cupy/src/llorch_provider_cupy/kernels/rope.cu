// Rotates q and k in place: a thread one pair of HEADS_PER_BLOCK heads.

#define ROPE_THREADS 64
#define HEADS_PER_BLOCK 4

// `turns` are the pairs' frequencies in whole turns a position, in float64: a float32 angle is off at position 100,000.
KERNEL(ROPE_THREADS)
rope(float *q, float *k, const int *positions, const double *turns, int pairs, int q_heads, int k_heads, int head_dim,
     int halves, float magnitude) {
    const int pair = blockIdx.x * ROPE_THREADS + threadIdx.x;
    const size_t token = blockIdx.z;
    if (pair >= pairs) return;
    double turn = positions[token] * turns[pair];
    turn -= floor(turn);
    float sine, cosine;
    sincospif(2.0f * (float)turn, &sine, &cosine);
    sine *= magnitude;
    cosine *= magnitude;
    const int first = halves ? pair : 2 * pair, second = halves ? pair + pairs : 2 * pair + 1;
    const int begin = blockIdx.y * HEADS_PER_BLOCK, end = min(begin + HEADS_PER_BLOCK, q_heads + k_heads);
    for (int head = begin; head < end; head++) {
        float *row = head < q_heads ? q + (token * q_heads + head) * head_dim
                                    : k + (token * k_heads + head - q_heads) * head_dim;
        const float a = row[first], b = row[second];
        row[first] = a * cosine - b * sine;
        row[second] = a * sine + b * cosine;
    }
}
