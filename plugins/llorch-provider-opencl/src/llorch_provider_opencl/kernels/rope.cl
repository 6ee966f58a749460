// Rotates pair i of each head by position * frequency[i], in place, for q and (where it is not null) k.
// The product is made in two floats: in one, the angle at position 100,000 is off by 0.004.

INLINED void turn(__global float *head, const int first, const int second, const float c, const float s) {
    const float a = head[first], b = head[second];
    head[first] = a * c - b * s;
    head[second] = a * s + b * c;
}

__kernel void rope(__global float *q, __global float *k, __global const int *restrict positions, const int offset,
                   __global const float2 *restrict frequencies, const int pairs, const int heads, const int kv_heads,
                   const int head_dim, const float magnitude) {
    const int pair = get_global_id(0), t = get_global_id(1), first_head = get_global_id(2) * HEADS_PER_ITEM;
    if (pair >= pairs) return;
    const float position = (float)positions[offset + t];  // exact below 2^24
    const float2 frequency = frequencies[pair];           // x + y is the double
    const float angle = position * frequency.x;
    const float rest = fma(position, frequency.x, -angle) + position * frequency.y;
    const float s0 = sin(angle), c0 = cos(angle), shrink = 1.0f - 0.5f * rest * rest;
    const float c = (c0 * shrink - s0 * rest) * magnitude, s = (s0 * shrink + c0 * rest) * magnitude;
    const int first = HALF_PAIRS ? pair : 2 * pair, second = HALF_PAIRS ? pair + pairs : 2 * pair + 1;
    const int last_head = min(first_head + HEADS_PER_ITEM, heads + kv_heads);
    for (int head = first_head; head < last_head; head++) {
        __global float *x = head < heads ? q + ((size_t)t * heads + head) * head_dim
                                         : k + ((size_t)t * kv_heads + head - heads) * head_dim;
        turn(x, first, second, c, s);
    }
}
