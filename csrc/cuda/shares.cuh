// Sums of a block whose warps share out the rows of its strips.
#pragma once

#include "strips.cuh"

namespace fedlora {

constexpr int kStripWarps = kStripThreads / kWarp;
constexpr int64_t kTile = 128; // numbers of a tile of the tensor cores

// Every warp has Shape::kTiles tiles of sums, for one of Shape::kShares shares of the rows: the warps of a share have different tiles, one
// after the other in the slot. Shares are added up, ((0 + 1) + (2 + 3)), and join what the slot has already, unless this is the first. In
// two rounds: all of it at once would take the room of a second block. A number of the slot is always the same thread's, so each
// may read its own without a barrier.
template <class Shape>
__device__ __forceinline__ void join(const double *sums, double *handed, double *slot, bool first) {
    constexpr int kTiles = Shape::kTiles / 2, kEntries = 4 * kTiles, kHalves = kStripWarps / Shape::kShares, kCount = kTiles * (int)kTile;
    const int warp = (int)threadIdx.x / kWarp, lane = (int)threadIdx.x % kWarp;
#pragma unroll
    for (int round = 0; round < 2; ++round) {
        if (round) __syncthreads();
#pragma unroll
        for (int e = 0; e < kEntries; ++e) handed[(warp * kEntries + e) * kWarp + lane] = sums[round * kEntries + e];
        __syncthreads();
        for (int n = (int)threadIdx.x; n < kHalves * kCount; n += kStripThreads) {
            double sum = handed[n] + handed[n + kHalves * kCount];
            if constexpr (Shape::kShares == 4) sum += handed[n + 2 * kCount] + handed[n + 3 * kCount];
            double &kept = slot[(n / kCount * 2 + round) * kCount + n % kCount];
            kept = first ? sum : kept + sum;
        }
    }
}

// Numbers that warps hand each other there.
template <class Shape>
constexpr int kHandedNumbers = kStripWarps * Shape::kTiles / 2 * (int)kTile;

} // namespace fedlora
