// What is said of rounded sums: norm, what the rounding took away, trouble and facts; fedlora_weighted_sum and fedlora_mixed_sum.
//
// Every tile of a sum leaves a partial answer, in an order of additions that the shape alone decides; a warp per matrix adds them
// up.
#pragma once

#include <vector>

#include "four.cuh"
#include "workspace.cuh"

namespace fedlora {

struct SumAnswers {
    fedlora_block norm, rounding, info, notes;
};

// Partial answers of the matrices of a group, `each` of every matrix one after the other.
struct PartialSum {
    double squares, lost_squares;
    uint32_t marks, unused;
};
constexpr uint32_t kNonfinite = 1, kOverflow = 2, kNonzero = 4;

struct AnswersGroup {
    SumAnswers to;
    const PartialSum *partials;
    int64_t each, batch;
};

// x was rounded to kept.
__device__ inline void add_number(PartialSum &sum, double x, double kept) {
    const double gap = x - kept;
    sum.squares += x * x;
    sum.lost_squares += gap * gap;
    sum.marks |= (is_finite(x) ? 0u : kNonfinite) | (is_finite(kept) ? 0u : kOverflow) | (x != 0.0 ? kNonzero : 0u);
}

__device__ inline void add_partial(PartialSum &sum, const PartialSum &other) {
    sum.squares += other.squares;
    sum.lost_squares += other.lost_squares;
    sum.marks |= other.marks;
}

// All lanes get the sum over the warp.
__device__ inline PartialSum over_warp(PartialSum sum) {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
        PartialSum other;
        other.squares = __shfl_xor_sync(kAllLanes, sum.squares, lanes);
        other.lost_squares = __shfl_xor_sync(kAllLanes, sum.lost_squares, lanes);
        other.marks = __shfl_xor_sync(kAllLanes, sum.marks, lanes);
        add_partial(sum, other);
    }
    return sum;
}

// The sum over a block of so many warps, to `to`. The room, a partial sum for every warp, is free again after the next barrier.
__device__ inline void over_block(PartialSum sum, PartialSum *room, int warps, PartialSum *to) {
    const int lane = (int)threadIdx.x % kWarp, warp = (int)threadIdx.x / kWarp;
    sum = over_warp(sum);
    if (lane == 0) room[warp] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < warps; ++w) add_partial(sum, room[w]);
    sum.unused = 0;
    *to = sum;
}

// Whether descriptors of answers fit a batch.
inline bool fit(const SumAnswers &to, int64_t batch) {
    const auto scalar = [&](const fedlora_block &b, int64_t dtype) {
        return b.rows == 1 && b.cols == 1 && b.batch == batch && b.dtype == dtype;
    };
    return scalar(to.norm, FEDLORA_FLOAT64) && scalar(to.rounding, FEDLORA_FLOAT64) && scalar(to.info, FEDLORA_INT32) &&
           scalar(to.notes, FEDLORA_INT32);
}

// The last launch of a sum.
class AnswersPlan {
  public:
    AnswersPlan() = default;
    AnswersPlan(const std::vector<AnswersGroup> &groups, Upload &upload);
    void launch(void *stream) const;

  private:
    const AnswersGroup *groups_ = nullptr;
    const int64_t *first_ = nullptr; // matrix of each group
    int64_t count_ = 0, matrices_ = 0;
};

} // namespace fedlora
