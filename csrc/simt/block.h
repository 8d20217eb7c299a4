// One block of threads: who runs next, barriers, and what is said when nobody can run.
//
// Barriers are counted as hardware does: a thread that has returned needs not come. All threads that meet must meet at the
// same line: two barriers in two branches would hang, or worse pass, on a device.
#pragma once

#include "fiber.h"
#include "vectors.h"

namespace simt {

constexpr unsigned warp_size = 32, most_threads = 1024, most_warps = most_threads / warp_size;

enum class Order { forward, reverse, shuffled };

struct Schedule {
    Order order = Order::forward;
    uint64_t state = 0;

    uint32_t random() {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return static_cast<uint32_t>(state >> 33);
    }
    // A set bit of a mask that is not zero.
    unsigned pick(uint32_t mask) {
        if (order == Order::forward) return static_cast<unsigned>(__builtin_ctz(mask));
        if (order == Order::reverse) return 31u - static_cast<unsigned>(__builtin_clz(mask));
        const unsigned turn = random() & 31;
        const uint32_t turned = mask >> turn | mask << (-turn & 31);
        return (static_cast<unsigned>(__builtin_ctz(turned)) + turn) & 31;
    }
};

struct Place {
    const char* file = nullptr;
    int line = 0;
    const char* call = nullptr;
};

inline bool operator!=(const Place& a, const Place& b) { return a.line != b.line || a.call != b.call || a.file != b.file; }

struct Fiber {
    Context context;
    uint3 thread;
    unsigned lane, warp;
};

// What the lanes of a warp hand in and get back; out[] is filled for all when the last one comes.
struct Warp {
    uint32_t present = 0, live = 0, ready = 0, arrived = 0;
    unsigned latest = 0;  // of those who have arrived
    bool alike = true;    // whether these have one mask and one place
    uint32_t mask[warp_size];
    uint64_t value[warp_size], out[warp_size];
    int source[warp_size];
    Place place[warp_size];
};

struct Block {
    Stacks stacks{most_threads};
    Fiber fibers[most_threads];
    Warp warps[most_warps];
    Context home;
    uint32_t ready_warps = 0;
    unsigned threads = 0, live = 0, waiting = 0;
    int met = 0, any = 0, result_any = 0, result_count = 0;
    Place barrier;  // where those wait who are at a barrier
    bool at_barrier[most_threads];
    uint3 index{};
    dim3 shape, grid;
    Schedule schedule;
    std::vector<char> dynamic;
    char* dynamic_base = nullptr;
    size_t dynamic_bytes = 0;
    void (*body)(void*) = nullptr;
    void* argument = nullptr;
    std::string error;
};

inline thread_local Block* block = nullptr;
inline thread_local Fiber* self = nullptr;

inline Fiber& fiber(unsigned warp, unsigned lane) { return block->fibers[warp * warp_size + lane]; }

inline std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
inline std::string text(const char* format, ...) {
    char buffer[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(buffer, sizeof buffer, format, arguments);
    va_end(arguments);
    return buffer;
}

inline std::string text(const Place& place) {
    const char* name = strrchr(place.file, '/');
    return text("%s (%s:%d)", place.call, name ? name + 1 : place.file, place.line);
}

inline void set_ready(unsigned warp, uint32_t lanes) {
    block->warps[warp].ready |= lanes;
    if (block->warps[warp].ready) block->ready_warps |= 1u << warp;
}

inline void set_waiting(unsigned warp, uint32_t lanes) {
    block->warps[warp].ready &= ~lanes;
    if (!block->warps[warp].ready) block->ready_warps &= ~(1u << warp);
}

// Ends the block with a message: nobody comes back to its fibers, so the message is made and gone before this one is left.
template <class Message>
[[noreturn]] __attribute__((noinline, cold)) void fail(Message&& message) {
    const uint3 at = block->index, thread = self->thread;
    block->error = text("block (%u, %u, %u), thread (%u, %u, %u): ", at.x, at.y, at.z, thread.x, thread.y, thread.z) + message();
    change(self->context, block->home, block->home, true);
    __builtin_unreachable();
}

// Why nobody can run: the first thread of each kind of wait.
__attribute__((noinline, cold)) inline std::string deadlock() {
    struct Wait {
        Place place;
        uint32_t mask;
    };
    std::string told = "nobody can go on, a barrier or warp intrinsic in divergent code:";
    std::vector<Wait> seen;
    for (unsigned i = 0; i < block->threads && seen.size() < 4; ++i) {
        const Warp& warp = block->warps[i / warp_size];
        const unsigned lane = i % warp_size;
        if (!(warp.live >> lane & 1)) continue;
        const bool at_barrier = block->at_barrier[i];
        const Wait wait = at_barrier ? Wait{block->barrier, 0} : Wait{warp.place[lane], warp.mask[lane]};
        if (std::any_of(seen.begin(), seen.end(), [&](const Wait& w) { return w.mask == wait.mask && !(w.place != wait.place); })) continue;
        told += text("%s thread %u waits at ", seen.empty() ? "" : ";", i) + text(wait.place);
        if (!at_barrier) told += text(" with mask 0x%08x", wait.mask);
        seen.push_back(wait);
    }
    if (block->live < block->threads) told += text("; %u of %u threads have returned", block->threads - block->live, block->threads);
    return told;
}

// The fiber to run now; the home of the block if all have returned or nobody can.
inline Fiber* next() {
    Block& b = *block;
    if (!b.ready_warps) {
        if (b.live) b.error = text("block (%u, %u, %u): ", b.index.x, b.index.y, b.index.z) + deadlock();
        return nullptr;
    }
    unsigned warp = self->warp;
    const bool hop = b.schedule.order == Order::shuffled && !(b.schedule.random() & 7);
    if (hop || !(b.ready_warps >> warp & 1)) warp = b.schedule.pick(b.ready_warps);
    return &fiber(warp, b.schedule.pick(b.warps[warp].ready));
}

// Gives the processor to whom the schedule names; comes back when this thread is named again.
inline void yield(bool last = false) {
    Fiber* const from = self;
    Fiber* const to = next();
    if (to == from) return;
    self = to ? to : from;
    change(from->context, to ? to->context : block->home, block->home, last);
}

inline void open_barrier() {
    Block& b = *block;
    if (!b.waiting || b.waiting != b.live) return;
    b.result_any = b.any;
    b.result_count = b.met;
    b.waiting = 0, b.any = 0, b.met = 0;
    for (unsigned i = 0; i < b.threads; i += warp_size) {
        const unsigned warp = i / warp_size;
        set_ready(warp, b.warps[warp].live);
    }
    std::fill_n(b.at_barrier, b.threads, false);
}

// Waits for the block; block->result_any and result_count tell how many came with a true predicate.
inline void meet(bool predicate, Place place) {
    Block& b = *block;
    const unsigned i = self->warp * warp_size + self->lane;
    if (!b.waiting) b.barrier = place;
    else if (b.barrier != place) fail([&] { return "waits at " + text(place) + " while others wait at " + text(b.barrier); });
    b.any |= predicate;
    b.met += predicate;
    ++b.waiting;
    b.at_barrier[i] = true;
    set_waiting(self->warp, 1u << self->lane);
    open_barrier();
    yield();
}

// Where a fiber starts.
inline void enter() {
    arrived(self->context, block->home);
    block->body(block->argument);
    Warp& warp = block->warps[self->warp];
    for (uint32_t waiting = warp.arrived; waiting; waiting &= waiting - 1) {
        const unsigned k = static_cast<unsigned>(__builtin_ctz(waiting));
        if (warp.mask[k] >> self->lane & 1)
            fail([&] {
                return text("lane %u waits at ", k) + text(warp.place[k]) +
                       text(" with mask 0x%08x, but lane %u returns", warp.mask[k], self->lane);
            });
    }
    --block->live;
    warp.live &= ~(1u << self->lane);
    set_waiting(self->warp, 1u << self->lane);
    open_barrier();
    yield(true);
    __builtin_unreachable();
}

// Runs the block whose index, shape and body have been set.
inline void run() {
    Block& b = *block;
    b.threads = b.live = b.shape.x * b.shape.y * b.shape.z;
    b.waiting = 0, b.any = 0, b.met = 0, b.ready_warps = 0;
    b.error.clear();
    b.home = Context{};
    std::fill_n(b.at_barrier, b.threads, false);
    for (unsigned i = 0; i < b.threads; ++i) {
        Fiber& f = b.fibers[i];
        f.thread = {i % b.shape.x, i / b.shape.x % b.shape.y, i / (b.shape.x * b.shape.y)};
        f.lane = i % warp_size, f.warp = i / warp_size;
        prepare(f.context, b.stacks[i], i, enter);
    }
    for (unsigned first = 0; first < b.threads; first += warp_size) {
        Warp& warp = b.warps[first / warp_size];
        const unsigned lanes = std::min(warp_size, b.threads - first);
        warp.present = warp.live = warp.ready = lanes == warp_size ? ~0u : (1u << lanes) - 1;
        warp.arrived = 0;
        b.ready_warps |= 1u << first / warp_size;
    }
    self = b.fibers;
    Fiber* const to = next();
    self = to;
    change(b.home, to->context, b.home);
}

}  // namespace simt

#define threadIdx (simt::self->thread)
#define blockIdx (simt::block->index)
#define blockDim (simt::block->shape)
#define gridDim (simt::block->grid)
inline constexpr int warpSize = 32;

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    simt::meet(false, {file, line, "__syncthreads"});
}
inline int __syncthreads_or(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    simt::meet(predicate != 0, {file, line, "__syncthreads_or"});
    return simt::block->result_any;
}
inline int __syncthreads_count(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    simt::meet(predicate != 0, {file, line, "__syncthreads_count"});
    return simt::block->result_count;
}
inline int __syncthreads_and(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    simt::meet(predicate == 0, {file, line, "__syncthreads_and"});
    return !simt::block->result_any;
}
inline void __threadfence_block() {}
inline void __threadfence() {}
inline void __threadfence_system() {}
