// What all kernels share. Written so that NVRTC needs no header: halves are their bits, converted by one instruction.
// With EMULATED, g++ compiles the same files for the tests' emulator.

#ifdef EMULATED
#define KERNEL_OF(threads, resident) extern "C" void
#else
// `resident`: blocks that a multiprocessor is to hold at once
#define KERNEL_OF(threads, resident) extern "C" __global__ void __launch_bounds__(threads, resident)
#define SHARED(type, name, count) __shared__ type name[count]
#define INFINITY __int_as_float(0x7f800000)
#endif

// one is promised elsewhere: without it ptxas spills registers for blocks that may never come
#define KERNEL(threads) KERNEL_OF(threads, 1)

#define INLINED static __device__ __forceinline__
#define ALL_LANES 0xffffffffu

typedef unsigned char byte;
typedef unsigned short half_bits;  // IEEE binary16
typedef unsigned short brain_bits;  // bfloat16
typedef unsigned long long uint64;

INLINED float from_half(half_bits h) {
#ifdef EMULATED
    _Float16 value;
    memcpy(&value, &h, 2);
    return (float)value;
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
#endif
}

INLINED half_bits to_half(float f) {
#ifdef EMULATED
    const _Float16 value = (_Float16)f;
    half_bits h;
    memcpy(&h, &value, 2);
    return h;
#else
    half_bits h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
#endif
}

INLINED float from_brain(brain_bits b) { return __uint_as_float((unsigned)b << 16); }

// To the nearest, ties to even; a NaN stays one.
INLINED brain_bits to_brain(float f) {
    const unsigned u = __float_as_uint(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (brain_bits)(u >> 16 | 64);
    return (brain_bits)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

// A power of two and its inverse.
struct PowerOfTwo {
    float value, inverse;
};

// The one that, divided by, brings numbers of this size to just below 2^15: none is too large for a half, and small
// ones keep their bits.
INLINED PowerOfTwo half_range(float largest) {
    const int exponent = (int)(__float_as_uint(largest) >> 23) - 127;  // largest < 2^(exponent + 1)
    const int shift = min(126, max(-126, exponent - 14));
    PowerOfTwo power;
    power.value = __uint_as_float((unsigned)(shift + 127) << 23);
    power.inverse = __uint_as_float((unsigned)(127 - shift) << 23);
    return power;
}

// d += a b of a warp, on tensor cores: a is 16 x 16 halves, b 16 x 8, d 16 x 8 float32. How they lie in the lanes'
// registers: NVIDIA's "PTX ISA", "Matrix Fragments for mma.m16n8k16 with floating point type". Compute capability 8.0.
INLINED void mma_16_8_16(float *d, const unsigned *a, unsigned b0, unsigned b1) {
#ifdef EMULATED
    emulator::mma_16_8_16(d, a, b0, b1, __LINE__);
#elif __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// ---- rotary embedding ----

struct Turn {
    float sine, cosine;
};

// `turns` is a pair's frequency in whole turns a position, in float64: a float32 angle is off at position 100,000.
INLINED Turn turn_of(int position, double turns, float magnitude) {
    double turn = position * turns;
    turn -= floor(turn);
    Turn found;
    sincospif(2.0f * (float)turn, &found.sine, &found.cosine);
    found.sine *= magnitude;
    found.cosine *= magnitude;
    return found;
}

INLINED float gated(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

// ---- warps and blocks ----

INLINED int lane_index() { return threadIdx.x & 31; }
INLINED int warp_index() { return threadIdx.x >> 5; }

INLINED float warp_sum(float v) {
#pragma unroll
    for (int other = 16; other > 0; other >>= 1) v += __shfl_xor_sync(ALL_LANES, v, other);
    return v;
}

INLINED float warp_max(float v) {
#pragma unroll
    for (int other = 16; other > 0; other >>= 1) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, other));
    return v;
}

// The sum over a block of `warps` warps, the same in all its threads. `parts` is shared memory of 32 floats.
INLINED float block_sum(float v, float *parts, int warps) {
    v = warp_sum(v);
    __syncthreads();  // parts may still be read from the call before
    if (lane_index() == 0) parts[warp_index()] = v;
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < warps; i++) sum += parts[i];
    return sum;
}

INLINED float block_max(float v, float *parts, int warps) {
    v = warp_max(v);
    __syncthreads();
    if (lane_index() == 0) parts[warp_index()] = v;
    __syncthreads();
    float most = parts[0];
    for (int i = 1; i < warps; i++) most = fmaxf(most, parts[i]);
    return most;
}

// ---- activations rounded to int8 ----

#define UNIT 32  // columns that share a scale

#define PIECE 16  // bytes of a load

// Where a unit's numbers lie: the first 16 of all units of a row, then the last 16 of all. Lanes that take neighbouring
// units then load neighbouring bytes.
INLINED size_t place_of_numbers(size_t row, int unit, int units) { return (row * 2 * units + unit) * PIECE; }

// A unit's scale, the sum of its values before they were rounded, and the sums of its first and its last 16 numbers.
struct __align__(16) Rounded {
    float scale, sum;
    int low, high;
};

// One warp rounds one unit, a column a lane (zero where there is none): x is about scale * number, |number| <= 127.
INLINED void round_unit(float value, signed char *numbers, Rounded *rounded, size_t row, int unit, int units) {
    const float largest = warp_max(fabsf(value));
    const float scale = largest / 127.0f;
    const int number = scale > 0.0f ? __float2int_rn(value / scale) : 0;
    const float exact = warp_sum(value);
    int sum = number;
#pragma unroll
    for (int other = 8; other > 0; other >>= 1) sum += __shfl_xor_sync(ALL_LANES, sum, other);
    const int high = __shfl_sync(ALL_LANES, sum, 16);
    const int half = lane_index() / PIECE;
    numbers[place_of_numbers(row, unit, units) + (size_t)half * units * PIECE + lane_index() % PIECE] = (signed char)number;
    if (lane_index() == 0) {
        Rounded r;
        r.scale = scale;
        r.sum = exact;
        r.low = sum;
        r.high = high;
        rounded[row * units + unit] = r;
    }
}
