// A warp per matrix adds up what the tiles of its sum have left.
#include "sum_answers.cuh"

#include "slots.cuh"

namespace fedlora {
namespace {

constexpr int kWarps = 4;

__global__ void __launch_bounds__(kWarps *kWarp) tell(const AnswersGroup *groups, const int64_t *first, int64_t count, int64_t matrices) {
    const int64_t slot = (int64_t)blockIdx.x * kWarps + threadIdx.x / kWarp;
    if (slot >= matrices) return;
    const int64_t g = slot_group(first, count, slot), i = slot - first[g];
    const AnswersGroup &group = groups[g];
    const PartialSum *const partials = group.partials + i * group.each;
    const int lane = (int)threadIdx.x % kWarp;
    PartialSum sum = {0.0, 0.0, 0u, 0u};
    for (int64_t c = lane; c < group.each; c += kWarp) add_partial(sum, partials[c]);
    sum = over_warp(sum);
    if (lane != 0) return;
    *address<double>(group.to.norm, i) = sqrt(sum.squares);
    *address<double>(group.to.rounding, i) = sqrt(sum.lost_squares);
    *address<int32_t>(group.to.info, i) =
        sum.marks & kNonfinite ? FEDLORA_INFO_NONFINITE : sum.marks & kOverflow ? FEDLORA_INFO_OVERFLOW : 0;
    *address<int32_t>(group.to.notes, i) = sum.marks & kNonzero ? 0 : FEDLORA_NOTE_ZERO;
}

} // namespace

AnswersPlan::AnswersPlan(const std::vector<AnswersGroup> &groups, Upload &upload) : count_((int64_t)groups.size()) {
    std::vector<int64_t> first = {0};
    for (const AnswersGroup &group : groups) first.push_back(first.back() + group.batch);
    matrices_ = first.back();
    groups_ = upload.add(groups);
    first_ = upload.add(first);
}

void AnswersPlan::launch(void *stream) const {
    const dim3 grid((unsigned)((matrices_ + kWarps - 1) / kWarps));
    fedlora::launch(tell, grid, dim3(kWarps * kWarp), 0, stream, groups_, first_, count_, matrices_);
}

} // namespace fedlora
