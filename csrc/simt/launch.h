// Launches: the blocks of a grid one after the other, or over FEDLORA_SIMT_THREADS OS threads. Every OS thread runs one block
// at a time. What goes wrong is kept for cudaGetLastError, and nothing is launched until somebody has asked.
#pragma once

#include <utility>

#include "shared.h"
#include "warp.h"

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr {
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive, cudaStreamCaptureStatusInvalidated };

namespace simt {

struct Error {
    cudaError_t code = cudaSuccess;
    std::string message;
};

inline thread_local Error last_error;

inline cudaError_t set_error(cudaError_t code, std::string message = {}) {
    last_error = {code, std::move(message)};
    return code;
}

inline cudaError_t take_error() {
    return std::exchange(last_error.code, cudaSuccess);  // the message stays for cudaGetErrorString
}

inline const char* describe(cudaError_t code) {
    if (code == cudaSuccess) return "no error";
    if (!last_error.message.empty()) return last_error.message.c_str();
    if (code == cudaErrorInvalidValue) return "invalid argument";
    if (code == cudaErrorInvalidDevice) return "invalid device ordinal";
    return "unspecified launch failure";
}

inline long number(const char* name, long fallback) {
    const char* value = getenv(name);
    return value && *value ? strtol(value, nullptr, 10) : fallback;
}

inline size_t most_shared_bytes() { return static_cast<size_t>(number("FEDLORA_SIMT_SHARED_BYTES", 232448)); }

// FEDLORA_SIMT_SCHEDULE: forward, reverse, or the seed of a shuffled one.
inline Schedule schedule_from_environment() {
    const char* name = getenv("FEDLORA_SIMT_SCHEDULE");
    if (!name || !*name || !strcmp(name, "forward")) return {};
    if (!strcmp(name, "reverse")) return {Order::reverse, 0};
    char* end = nullptr;
    const uint64_t seed = strtoull(name, &end, 10);
    if (*end) throw std::runtime_error(text("FEDLORA_SIMT_SCHEDULE=%s: forward, reverse or a number", name));
    return {Order::shuffled, seed * 0x9e3779b97f4a7c15ull + 1};
}

// The block to run as the i-th: no block may count on those before it.
inline uint64_t block_number(const Schedule& schedule, uint64_t i, uint64_t count) {
    if (schedule.order == Order::forward) return i;
    if (schedule.order == Order::reverse) return count - 1 - i;
    uint64_t step = (schedule.state >> 20) % count;
    while (std::gcd(step, count) != 1) ++step;
    return static_cast<uint64_t>((static_cast<unsigned __int128>(i) * step + (schedule.state >> 11) % count) % count);
}

// Why hardware would not start it.
inline std::string refused(dim3 grid, dim3 shape, size_t bytes) {
    const uint64_t threads = uint64_t(shape.x) * shape.y * shape.z;
    if (threads == 0 || threads > most_threads || shape.z > 64) return text("a block of %u x %u x %u threads", shape.x, shape.y, shape.z);
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        return text("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
    if (bytes > most_shared_bytes()) return text("%zu bytes of shared memory, but a block has %zu", bytes, most_shared_bytes());
    return {};
}

// Blocks and their stacks are dear: kept for the next launch.
class Pool {
public:
    std::unique_ptr<Block> take() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (free_.empty()) return std::make_unique<Block>();
        std::unique_ptr<Block> one = std::move(free_.back());
        free_.pop_back();
        return one;
    }
    void give(std::unique_ptr<Block> one) {
        const std::lock_guard<std::mutex> lock(mutex_);
        free_.push_back(std::move(one));
    }

private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<Block>> free_;
};

inline Pool& pool() {
    static Pool* blocks = new Pool;  // never destroyed: another thread may still run at exit
    return *blocks;
}

struct Grid {
    dim3 blocks, shape;
    size_t dynamic_bytes = 0;
    void (*body)(void*) = nullptr;
    void* argument = nullptr;
    std::atomic<uint64_t> taken{0};
    std::mutex mutex;
    uint64_t failed = ~uint64_t(0);  // the first block that went wrong, so that the message does not depend on threads
    std::string error;
};

inline void run_taken(Grid& grid) {
    std::unique_ptr<Block> owned = pool().take();
    Block& b = *owned;
    b.shape = grid.shape, b.grid = grid.blocks;
    b.body = grid.body, b.argument = grid.argument;
    b.dynamic_bytes = grid.dynamic_bytes;
    b.dynamic = std::vector<char>(grid.dynamic_bytes + guard_bytes + 128);
    b.dynamic_base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(b.dynamic.data()) + 127) & ~uintptr_t(127));
    Block* const outer = block;
    block = &b;
    char* const storage = own_module().storage;
    const std::vector<Range>& statics = static_shared();
    const Schedule schedule = schedule_from_environment();
    const uint64_t count = uint64_t(grid.blocks.x) * grid.blocks.y * grid.blocks.z;
    for (uint64_t turn; (turn = grid.taken++) < count;) {
        const uint64_t i = block_number(schedule, turn, count);
        b.index = {static_cast<unsigned>(i % grid.blocks.x), static_cast<unsigned>(i / grid.blocks.x % grid.blocks.y),
                   static_cast<unsigned>(i / grid.blocks.x / grid.blocks.y)};
        b.schedule = schedule;
        b.schedule.state += i;
        poison_shared(storage, statics);
        run();
        if (b.error.empty() && !guard_holds())
            b.error = text("block (%u, %u, %u) writes behind its %zu bytes of dynamic shared memory", b.index.x, b.index.y, b.index.z,
                           b.dynamic_bytes);
        if (b.error.empty()) continue;
        const std::lock_guard<std::mutex> lock(grid.mutex);
        if (i < grid.failed) grid.failed = i, grid.error = b.error;
        grid.taken = count;
    }
    block = outer;
    pool().give(std::move(owned));
}

inline void run_blocks(Grid& grid) {
    try {
        run_taken(grid);
    } catch (const std::exception& error) {
        const std::lock_guard<std::mutex> lock(grid.mutex);
        grid.error = error.what();
    }
}

// Of this process so far; the few that a call may take are counted by tests.
inline std::atomic<int64_t> launches{0};

template <class Body>
void launch(dim3 blocks, dim3 shape, size_t dynamic_bytes, Body&& body) {
    ++launches;
    if (last_error.code != cudaSuccess) return;
    const std::string reason = refused(blocks, shape, dynamic_bytes);
    if (!reason.empty()) {
        set_error(cudaErrorInvalidConfiguration, "launch refused: " + reason);
        return;
    }
    using Plain = std::remove_reference_t<Body>;
    Grid grid;
    grid.blocks = blocks, grid.shape = shape, grid.dynamic_bytes = dynamic_bytes;
    grid.body = [](void* argument) { (*static_cast<Plain*>(argument))(); };
    grid.argument = &body;
    const long threads = std::min<long>(number("FEDLORA_SIMT_THREADS", 1), long(blocks.x) * blocks.y * blocks.z);
    std::vector<std::thread> others;
    for (long i = 1; i < threads; ++i) others.emplace_back([&] { run_blocks(grid); });
    run_blocks(grid);
    for (std::thread& other : others) other.join();
    if (!grid.error.empty()) set_error(cudaErrorLaunchFailure, grid.error);
}

}  // namespace simt
