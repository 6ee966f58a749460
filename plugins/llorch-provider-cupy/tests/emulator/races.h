// Races within a launch. g++ calls these functions at every access of memory (-fsanitize=thread; its own library, which
// knows threads of the operating system and not fibers, is not linked).
//
// Two accesses to a byte, one of them a write, have an order where one thread makes both, or where a barrier of the
// block lies between them, or a barrier of the warp (a shuffle is none: it orders no memory). Blocks have no order.
// Accesses that the emulator happens to run one after another are told apart that way from those that a card would.
#pragma once
#include <memory>
#include <unordered_map>

#define UNWATCHED __attribute__((no_sanitize("thread")))

namespace races {

struct Access {
    unsigned block = 0, turn = 0;  // blocks from 1 on: 0 is no access
    unsigned short thread = 0, warp_barriers = 0;
};

// The last write of a byte, and enough of its reads: the last, the last of another thread of that block, and the last
// of another block.
struct Cell {
    Access write, read, beside, elsewhere;
};

constexpr size_t PAGE = 4096;
struct Page {
    unsigned launch = 0;  // whose accesses it has
    Cell cells[PAGE];
};
constexpr size_t MOST_RANGES = 64, NEAR = 64;
struct Watch {
    uintptr_t ranges[MOST_RANGES][2];  // begin and end of what the kernel may write, and of shared memory
    size_t count = 0;
    std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
    unsigned launch = 0;
    bool looking = false;  // the library's own accesses are instrumented too
    struct {
        uintptr_t number = 0;
        Page *page = nullptr;
    } near[NEAR];  // pages of the map, by the end of their number
};
inline Watch watch;

UNWATCHED inline Cell &cell(uintptr_t at) {
    const uintptr_t number = at / PAGE;
    auto &near = watch.near[number % NEAR];
    if (!near.page || near.number != number) {
        auto &found = watch.pages[number];
        if (!found) found.reset(new Page);
        near.number = number;
        near.page = found.get();
    }
    if (near.page->launch != watch.launch) memset((void *)near.page->cells, 0, sizeof near.page->cells);
    near.page->launch = watch.launch;
    return near.page->cells[at % PAGE];
}

UNWATCHED inline bool ordered(const Access &a, const Access &b) {
    if (a.block == 0) return true;
    if (a.block != b.block) return false;
    if (a.thread == b.thread || a.turn != b.turn) return true;
    return a.thread / emulator::WARP == b.thread / emulator::WARP && a.warp_barriers != b.warp_barriers;
}

// Ends the launch, and does not return.
UNWATCHED inline void conflict(const Access &now, const char *does, const Access &other, const char *did, bool in_shared) {
    auto &state = emulator::state;
    snprintf(state.error, sizeof state.error,
             "a race in %s memory: thread %d of block %u %s what thread %d of block %u has %s, with no barrier between them",
             in_shared ? "shared" : "global", now.thread, now.block - 1, does, other.thread, other.block - 1, did);
    watch.looking = false;
    _longjmp(state.scheduler, 2);
}

UNWATCHED inline void look(uintptr_t from, size_t bytes, bool write) {
    const auto &state = emulator::state;
    const uintptr_t arena = (uintptr_t)state.arena;
    const bool in_shared = from >= arena && from < arena + emulator::ARENA;
    const dim3 grid = state.grid_size, block = state.block;
    const Access now{1 + block.x + grid.x * (block.y + grid.y * block.z), state.turns, (unsigned short)state.current,
                     (unsigned short)state.fibers[state.current].warp_barriers};
    for (uintptr_t at = from; at < from + bytes; at++) {
        Cell &c = cell(at);
        if (in_shared && c.write.block != now.block) c.write = Access();  // of a block before, which had its own
        if (!ordered(c.write, now)) conflict(now, write ? "writes" : "reads", c.write, "written", in_shared);
        if (!write) {
            if (c.read.block != now.block) c.elsewhere = c.read;
            if (c.read.block == now.block && c.read.thread != now.thread) c.beside = c.read;
            c.read = now;
            continue;
        }
        for (Access *read : {&c.read, &c.beside, &c.elsewhere}) {
            if (in_shared && read->block != now.block) *read = Access();
            if (!ordered(*read, now)) conflict(now, "writes", *read, "read", in_shared);
        }
        c.write = now;
    }
}

UNWATCHED inline void touch(void *p, size_t bytes, bool write) {
    if (watch.looking) return;
    const uintptr_t at = (uintptr_t)p;
    for (size_t i = 0; i < watch.count; i++)
        if (at >= watch.ranges[i][0] && at < watch.ranges[i][1]) {
            watch.looking = true;
            look(at, bytes, write);
            watch.looking = false;
            return;
        }
}

}  // namespace races

// Forgets the launch before; `ranges`: begin and end of each piece of memory that the next may write.
extern "C" UNWATCHED void watch_races(const uintptr_t *ranges, size_t count) {
    auto &watch = races::watch;
    watch.looking = true;
    emulator::make_room();
    watch.launch++;
    if (count >= races::MOST_RANGES) abort();
    memcpy(watch.ranges, ranges, count * sizeof watch.ranges[0]);
    watch.ranges[count][0] = (uintptr_t)emulator::state.arena;
    watch.ranges[count][1] = watch.ranges[count][0] + emulator::ARENA;
    watch.count = count + 1;
    watch.looking = false;
}

#define ACCESS(name, bytes)                                                                             \
    extern "C" UNWATCHED void __tsan_read##name(void *p) { races::touch(p, bytes, false); }  \
    extern "C" UNWATCHED void __tsan_write##name(void *p) { races::touch(p, bytes, true); }  \
    extern "C" UNWATCHED void __tsan_unaligned_read##name(void *p) { races::touch(p, bytes, false); } \
    extern "C" UNWATCHED void __tsan_unaligned_write##name(void *p) { races::touch(p, bytes, true); }
ACCESS(1, 1)
ACCESS(2, 2)
ACCESS(4, 4)
ACCESS(8, 8)
ACCESS(16, 16)
extern "C" UNWATCHED void __tsan_read_range(void *p, size_t n) { races::touch(p, n, false); }
extern "C" UNWATCHED void __tsan_write_range(void *p, size_t n) { races::touch(p, n, true); }
extern "C" UNWATCHED void __tsan_func_entry(void *) {}
extern "C" UNWATCHED void __tsan_func_exit() {}
extern "C" UNWATCHED void __tsan_init() {}
extern "C" UNWATCHED void __tsan_vptr_update(void **, void *) {}
