// Which matrices of the block SVD share a launch, and with what shared memory.
#include "block_solver.cuh"

#include <algorithm>

#include "element.cuh"

namespace fedlora {
namespace {

using namespace block;

constexpr int kThreads = kMostWarps * kWarp, kHalfWarps = 10;
constexpr int kDefaultSweeps = 60;
// More than kernels declare themselves.
constexpr int64_t kStaticBytes = 1 << 10;

// Elements of a column that a lane has registers for: of any, of one in a kernel of which two blocks share a processor, and of one
// that fills shared memory.
constexpr int kMostLanes = FEDLORA_CORE_SVD_MAX / kWarp;
template <class T>
constexpr int kHalfLanes = sizeof(T) == 4 ? 6 : 4;
template <class T>
constexpr int kAllCols = sizeof(T) == 4 ? 8 : 6;

template <class T>
__global__ void __launch_bounds__(kHalfWarps *kWarp, 2) block_svd_half(BlockTask task, int max_sweeps) {
    solve_all<T, true, kHalfLanes<T>, kHalfLanes<T>>(task, max_sweeps);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) block_svd_all(BlockTask task, int max_sweeps) {
    solve_all<T, true, kMostLanes, kAllCols<T>>(task, max_sweeps);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) block_svd_none(BlockTask task, int max_sweeps) {
    solve_all<T, false, kMostLanes, kMostLanes>(task, max_sweeps);
}

template <class T>
void launch_room(BlockRoom room, dim3 grid, dim3 threads, int64_t bytes, void *stream, const BlockTask &task, int max_sweeps) {
    switch (room) {
        case BlockRoom::half: return launch(block_svd_half<T>, grid, threads, bytes, stream, task, max_sweeps);
        case BlockRoom::all: return launch(block_svd_all<T>, grid, threads, bytes, stream, task, max_sweeps);
        default: return launch(block_svd_none<T>, grid, threads, bytes, stream, task, max_sweeps);
    }
}

int64_t element_of(const SvdGroup &group) { return size_of(group.C.dtype); }

BlockRoom room_of(const SvdGroup &group, int64_t shared_bytes) {
    const BlockSizes size(group.C);
    const bool single = group.C.dtype == FEDLORA_FLOAT32;
    const int64_t bytes = size.whole_bytes(element_of(group));
    if (2 * bytes <= shared_bytes && size.rows <= kWarp * (single ? kHalfLanes<float> : kHalfLanes<double>))
        return BlockRoom::half;
    const bool fits = bytes <= shared_bytes && size.cols <= kWarp * (single ? kAllCols<float> : kAllCols<double>);
    return fits ? BlockRoom::all : BlockRoom::none;
}

} // namespace

BlockSvd::BlockSvd(const std::vector<SvdGroup> &groups, Workspace &workspace, Upload &upload) {
    const Limits here = limits();
    const int64_t shared_bytes = here.shared_bytes - kStaticBytes;
    for (const int64_t dtype : {FEDLORA_FLOAT32, FEDLORA_FLOAT64})
        for (const BlockRoom room : {BlockRoom::half, BlockRoom::all, BlockRoom::none}) {
            std::vector<SvdGroup> mine;
            std::vector<int64_t> first = {0};
            int64_t bytes = 0, scratch = 0;
            int cols = 0;
            for (const SvdGroup &group : groups) {
                if (group.C.dtype != dtype || room_of(group, shared_bytes) != room) continue;
                const BlockSizes size(group.C);
                const int64_t element = element_of(group);
                mine.push_back(group);
                first.push_back(first.back() + group.C.batch);
                const int64_t most = room == BlockRoom::none ? size.panel_bytes(element, shared_bytes) : size.whole_bytes(element);
                bytes = std::max(bytes, most);
                scratch = std::max(scratch, element * size.scratch());
                cols = std::max(cols, size.cols);
            }
            if (mine.empty()) continue;
            // Four pairs of columns to a warp, or more; registers of a processor serve two of the largest blocks.
            const int warps = room == BlockRoom::half ? std::clamp((cols + 7) / 8, 4, kHalfWarps) : kMostWarps;
            const int64_t together = room == BlockRoom::half ? std::min<int64_t>(shared_bytes / bytes, 2 * kHalfWarps / warps) : 1;
            const int64_t blocks = std::min(first.back(), here.processors * together);
            scratch = (scratch + 255) / 256 * 256;
            BlockSvdShare share;
            share.task = {upload_groups(upload, mine, first), first.back(), workspace.take<unsigned char>(blocks * scratch), scratch,
                          shared_bytes};
            share.room = room;
            share.dtype = dtype;
            share.dynamic_bytes = bytes;
            share.threads = warps * kWarp;
            share.blocks = (int)blocks;
            shares_.push_back(share);
        }
}

void BlockSvd::launch(int64_t max_sweeps, void *stream) const {
    const int sweeps = max_sweeps > 0 ? (int)max_sweeps : kDefaultSweeps;
    for (const BlockSvdShare &share : shares_) {
        const dim3 grid((unsigned)share.blocks), threads((unsigned)share.threads);
        if (share.dtype == FEDLORA_FLOAT32)
            launch_room<float>(share.room, grid, threads, share.dynamic_bytes, stream, share.task, sweeps);
        else
            launch_room<double>(share.room, grid, threads, share.dynamic_bytes, stream, share.task, sweeps);
    }
}

} // namespace fedlora
