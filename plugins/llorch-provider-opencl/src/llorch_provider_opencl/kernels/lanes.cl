// Vectors of WIDTH lanes, and what the kernels do with them. WIDTH is 1 on GPUs, where the lanes are neighbouring
// work-items, and the native vector width on CPUs, where one work-item holds them all.

#pragma OPENCL FP_CONTRACT OFF  // the same rounding in every variant of a kernel: fma() is written where it is meant

// a call passes arrays through memory, and PoCL 3.1 does not inline what is merely `inline`
#define INLINED static inline __attribute__((always_inline))

#define ROWS_PER_GROUP 16  // rows of a weight that lie side by side
#define ITEMS_PER_GROUP (ROWS_PER_GROUP / WIDTH)

#if WIDTH == 1
typedef float lanes;
typedef uint words;
#define LOAD(p) (*(p))
#define STORE(v, p) (*(p) = (v))
#define LOAD_WORDS(p) (*(p))
#define LOAD_HALVES(p) vload_half(0, (p))
#define STORE_HALVES(v, p) vstore_half((v), 0, (p))
#define TO_FLOATS(v) convert_float(as_int(v))
#define SUM(v) (v)
#define LARGEST(v) (v)
#else
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
typedef JOIN(float, WIDTH) lanes;
typedef JOIN(uint, WIDTH) words;
#define LOAD(p) JOIN(vload, WIDTH)(0, (p))
#define STORE(v, p) JOIN(vstore, WIDTH)((v), 0, (p))
#define LOAD_WORDS(p) JOIN(vload, WIDTH)(0, (p))
#define LOAD_HALVES(p) JOIN(vload_half, WIDTH)(0, (p))
#define STORE_HALVES(v, p) JOIN(vstore_half, WIDTH)((v), 0, (p))
// signed: every value here is below 2^31, and only AVX-512 converts unsigned integers in one instruction
#define TO_FLOATS(v) JOIN(convert_float, WIDTH)(JOIN(as_int, WIDTH)(v))

INLINED float sum_of_4(float4 v) { return (v.x + v.y) + (v.z + v.w); }
INLINED float largest_of_4(float4 v) { return fmax(fmax(v.x, v.y), fmax(v.z, v.w)); }
#if WIDTH == 4
#define SUM(v) sum_of_4(v)
#define LARGEST(v) largest_of_4(v)
#elif WIDTH == 8
#define SUM(v) sum_of_4((v).lo + (v).hi)
#define LARGEST(v) largest_of_4(fmax((v).lo, (v).hi))
#else
INLINED float sum_of_16(float16 v) { float8 h = v.lo + v.hi; return sum_of_4(h.lo + h.hi); }
INLINED float largest_of_16(float16 v) { float8 h = fmax(v.lo, v.hi); return largest_of_4(fmax(h.lo, h.hi)); }
#define SUM(v) sum_of_16(v)
#define LARGEST(v) largest_of_16(v)
#endif
#endif

// Stores the first `count` lanes.
INLINED void store_first(lanes v, __global float *p, int count) {
    if (count >= WIDTH) {
        STORE(v, p);
        return;
    }
#if WIDTH > 1
    float each[WIDTH];
    JOIN(vstore, WIDTH)(v, 0, each);
    for (int i = 0; i < count; i++) p[i] = each[i];
#endif
}
