// CUDA C++ on the host, for tests: what the provider's kernels use of it, and no more.
//
// A block runs as one fiber a thread, on one operating-system thread. A fiber gives way at barriers and at shuffles,
// and goes on when all threads of the block (of the warp) have arrived. Every second launch runs blocks and threads
// in reverse order, so that a kernel that lacks a barrier gives different results. Threads that wait for each other at
// different lines, or for one that has returned, end the launch with an error, as do writes behind shared memory.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__ __restrict
#define SHARED(type, name, count) type *name = (type *)emulator::shared((count) * sizeof(type), __LINE__)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace emulator {

constexpr int WARP = 32, MOST_THREADS = 1024, STACK = 64 << 10, ARENA = 227 << 10, GAP = 64;
constexpr unsigned char POISON = 0xff;  // as a float: NaN

struct Fiber {
    jmp_buf place;
    ucontext_t start;
    bool started = false, done = false;
    int warp_line = 0, block_line = 0;        // where it waits, 0 where it does not
    unsigned warp_barriers = 0;                // passed
    size_t shared_bytes = 0;
    dim3 thread;
};

struct Warp {
    int arrived = 0, line = 0;
    unsigned turns = 0;
    uint64_t values[2][WARP];
};

struct State {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    unsigned char *stacks = nullptr, *arena = nullptr;  // not touched before they are used
    size_t used = ARENA;  // bytes of the arena that the block before has used
    std::vector<std::pair<size_t, size_t>> gaps;
    int threads = 0, current = 0, arrived = 0, line = 0, alive = 0;
    unsigned turns = 0;
    jmp_buf scheduler;
    dim3 block, grid_size, block_size;
    void (*body)(void *) = nullptr;
    void *argument = nullptr;
    char error[256] = "";
};
inline State state;
inline unsigned launches = 0;

inline Fiber &me() { return state.fibers[state.current]; }

inline void fail(const char *what, int line, int other = 0) {
    if (!state.error[0])
        snprintf(state.error, sizeof state.error, "%s (line %d, line %d; block %u,%u,%u thread %u)", what, line, other,
                 state.block.x, state.block.y, state.block.z, me().thread.x);
    _longjmp(state.scheduler, 2);
}

inline void give_way() {
    if (!_setjmp(me().place)) _longjmp(state.scheduler, 1);
}

inline void *shared(size_t bytes, int) {
    Fiber &fiber = me();
    const size_t at = fiber.shared_bytes;
    fiber.shared_bytes = (at + bytes + GAP + 127) / 128 * 128;
    if (ARENA < fiber.shared_bytes) fail("more than 227 KiB of shared memory", 0);
    const std::pair<size_t, size_t> gap{at + bytes, fiber.shared_bytes};
    if (state.gaps.empty() || state.gaps.back().first < gap.first) state.gaps.push_back(gap);
    state.used = std::max(state.used, fiber.shared_bytes);
    return state.arena + at;
}

inline void barrier(int line) {
    Fiber &fiber = me();
    if (state.arrived && state.line != line) fail("threads of a block wait at different barriers", line, state.line);
    state.line = line;
    const unsigned turn = state.turns;
    if (++state.arrived == state.threads) {
        state.arrived = 0;
        state.turns++;
        return;
    }
    fiber.block_line = line;
    while (state.turns == turn) give_way();
    fiber.block_line = 0;
}

// Waits for the warp; `value` is then readable by its lanes until their next shuffle but one.
inline const uint64_t *exchange(uint64_t value, int line) {
    Fiber &fiber = me();
    Warp &warp = state.warps[state.current / WARP];
    const int lanes = std::min(WARP, state.threads - state.current / WARP * WARP);
    if (warp.arrived && warp.line != line) fail("lanes of a warp shuffle at different lines", line, warp.line);
    warp.line = line;
    const unsigned turn = warp.turns;
    uint64_t *values = warp.values[turn % 2];
    values[state.current % WARP] = value;
    if (++warp.arrived == lanes) {
        warp.arrived = 0;
        warp.turns++;
        return values;
    }
    fiber.warp_line = line;
    while (warp.turns == turn) give_way();
    fiber.warp_line = 0;
    return values;
}

template <class T> T shuffle(T value, int source, int line) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    const uint64_t *values = exchange(bits, line);
    T found;
    memcpy(&found, &values[source & (WARP - 1)], sizeof found);
    return found;
}

inline void fiber_main() {
    for (;;) {
        state.body(state.argument);
        me().done = true;
        state.alive--;
        give_way();
    }
}

inline void make_room() {
    if (state.arena) return;
    state.fibers.resize(MOST_THREADS);
    state.warps.resize(MOST_THREADS / WARP);
    state.stacks = (unsigned char *)malloc((size_t)MOST_THREADS * STACK);
    state.arena = (unsigned char *)aligned_alloc(128, ARENA);
}

inline void prepare(int threads) {
    make_room();
    state.threads = state.alive = threads;
    state.arrived = 0;
    for (auto &warp : state.warps) warp.arrived = 0;
    memset(state.arena, POISON, state.used);
    state.used = 0;
    state.gaps.clear();
    for (int i = 0; i < threads; i++) {
        Fiber &fiber = state.fibers[i];
        fiber.done = false;
        fiber.shared_bytes = 0;
        fiber.warp_line = fiber.block_line = 0;
        const dim3 size = state.block_size;
        fiber.thread = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    }
}

inline void resume(int i) {
    state.current = i;
    Fiber &fiber = state.fibers[i];
    if (_setjmp(state.scheduler)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = state.stacks + (size_t)i * STACK;
    fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
    setcontext(&fiber.start);
}

inline void run_block(bool reverse) {
    while (state.alive && !state.error[0]) {
        const int before_alive = state.alive;
        bool moved = false;
        for (int n = 0; n < state.threads && !state.error[0]; n++) {
            const int i = reverse ? state.threads - 1 - n : n;
            if (state.fibers[i].done) continue;
            const unsigned turns = state.turns, warp_turns = state.warps[i / WARP].turns;
            const int waiting = state.fibers[i].block_line + state.fibers[i].warp_line;
            resume(i);
            const Fiber &fiber = state.fibers[i];
            moved |= fiber.done || !waiting || turns != state.turns || warp_turns != state.warps[i / WARP].turns ||
                     waiting != fiber.block_line + fiber.warp_line;
        }
        if (!moved && !state.error[0]) {
            int line = 0;
            for (int i = 0; i < state.threads; i++)
                if (!state.fibers[i].done) line = state.fibers[i].block_line + state.fibers[i].warp_line;
            snprintf(state.error, sizeof state.error,
                     "threads wait for others that have returned or wait elsewhere (line %d, %d of %d left)", line,
                     before_alive, state.threads);
        }
    }
    const unsigned char *base = state.arena;
    for (auto [from, to] : state.gaps)
        for (size_t i = from; i < to; i++)
            if (base[i] != POISON && !state.error[0])
                snprintf(state.error, sizeof state.error, "it wrote behind an array in shared memory (block %u,%u,%u)",
                         state.block.x, state.block.y, state.block.z);
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<A> *)arguments[I]...);
}

// Which of its arguments point at what it may write: bit i of argument i.
template <class... A> uint64_t writes(void (*)(A...)) {
    uint64_t found = 0, bit = 1;
    ((found |= std::is_pointer_v<A> && !std::is_const_v<std::remove_pointer_t<A>> ? bit : 0, bit <<= 1), ...);
    return found;
}

// Runs a kernel; the error of its launch, or "".
template <class... A>
const char *launch(void (*kernel)(A...), const unsigned *sizes, void **arguments, const size_t *bytes, size_t count) {
    const size_t expected[] = {sizeof(A)...};
    for (size_t i = 0; i < std::max(count, sizeof...(A)); i++)
        if (count != sizeof...(A) || bytes[i] != expected[i]) return "its arguments are not those of the kernel";
    struct Bound {
        void (*kernel)(A...);
        void **arguments;
    } bound{kernel, arguments};
    state.argument = &bound;
    state.body = [](void *b) {
        call(((Bound *)b)->kernel, ((Bound *)b)->arguments, std::index_sequence_for<A...>{});
    };
    state.grid_size = {sizes[0], sizes[1], sizes[2]};
    state.block_size = {sizes[3], sizes[4], sizes[5]};
    state.error[0] = 0;
    const int threads = sizes[3] * sizes[4] * sizes[5];
    const size_t blocks = (size_t)sizes[0] * sizes[1] * sizes[2];
    const bool reverse = launches++ % 2;
    for (size_t n = 0; n < blocks && !state.error[0]; n++) {
        const size_t i = reverse ? blocks - 1 - n : n;
        state.block = {unsigned(i % sizes[0]), unsigned(i / sizes[0] % sizes[1]),
                       unsigned(i / ((size_t)sizes[0] * sizes[1]))};
        prepare(threads);
        run_block(reverse);
    }
    if (state.error[0])
        for (auto &fiber : state.fibers) fiber.started = false;
    return state.error;
}

// d += a b of a warp: a 16 x 16 and b 16 x 8 halves, d 16 x 8 float32, in the lanes' registers as the PTX ISA has it
// ("Matrix Fragments for mma.m16n8k16 with floating point type"): lane = 4 * group + t;
//   a_i:  row group (i = 0, 1, 4, 5) or group + 8 (i = 2, 3, 6, 7); column 2 t + (i & 1), and 8 more for i >= 4
//   b_i:  row 2 t + (i & 1), and 8 more for i >= 2; column group
//   d_i:  row group, and 8 more for i >= 2; column 2 t + (i & 1)
inline void mma_16_8_16(float *d, const unsigned *a, unsigned b0, unsigned b1, int line) {
    float A[16][16], B[16][8];
    const unsigned registers[6] = {a[0], a[1], a[2], a[3], b0, b1};
    for (int reg = 0; reg < 6; reg++) {
        const uint64_t *all = exchange(registers[reg], line);
        for (int lane = 0; lane < WARP; lane++)
            for (int half = 0; half < 2; half++) {
                _Float16 value;
                const unsigned short bits = (unsigned short)(all[lane] >> 16 * half);
                memcpy(&value, &bits, 2);
                const int group = lane / 4, t = lane % 4, i = (reg < 4 ? reg : reg - 4) * 2 + half;
                if (reg < 4)
                    A[group + (i % 4 >= 2 ? 8 : 0)][2 * t + (i & 1) + (i >= 4 ? 8 : 0)] = (float)value;
                else
                    B[2 * t + (i & 1) + (i >= 2 ? 8 : 0)][group] = (float)value;
            }
    }
    const int lane = state.current % WARP, group = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
        const int row = group + (i >= 2 ? 8 : 0), column = 2 * t + (i & 1);
        for (int k = 0; k < 16; k++) d[i] += A[row][k] * B[k][column];
    }
}

}  // namespace emulator

#define threadIdx (emulator::me().thread)
#define blockIdx (emulator::state.block)
#define blockDim (emulator::state.block_size)
#define gridDim (emulator::state.grid_size)
#define __syncthreads() emulator::barrier(__LINE__)
#define __syncwarp() (emulator::exchange(0, __LINE__), emulator::me().warp_barriers++)
#define __shfl_xor_sync(mask, value, other) \
    emulator::shuffle((value), (emulator::state.current ^ (other)), __LINE__)
#define __shfl_sync(mask, value, source) emulator::shuffle((value), (source), __LINE__)

inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
inline int __float2int_rn(float f) { return (int)nearbyintf(f); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline void sincospif(float x, float *s, float *c) {
    *s = (float)sin(M_PI * (double)x);
    *c = (float)cos(M_PI * (double)x);
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (int)(signed char)(a >> 8 * i) * (int)(signed char)(b >> 8 * i);
    return c;
}
