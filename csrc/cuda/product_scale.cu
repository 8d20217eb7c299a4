// Powers of two that bring columns into a range where squares are safe (docs/numerics.md, Balancing).
#include <cfloat>

#include "product_scale.cuh"
#include "slots.cuh"

namespace fedlora {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;

// The largest finite magnitude of a column over some of its rows.
__device__ double largest_of(const StripColumn &column, int64_t rows, int64_t row, int64_t step) {
    double largest = 0;
    if (!column.address) return largest;
    with_float(column.dtype, [&](auto zero) {
#pragma unroll 4
        for (int64_t r = row; r < rows; r += step) {
            const double size = fabs(widen(*reinterpret_cast<const decltype(zero) *>(column.address + r * column.step)));
            if (size <= DBL_MAX && size > largest) largest = size;
        }
    });
    return largest;
}

// Warps share out the rows and lanes have a column each; or, where columns lie together, warps share them out and lanes the rows.
__global__ void __launch_bounds__(kThreads) scales(ScaleList list) {
    __shared__ double found[kWarps][kWarp];
    const int64_t t = slot_group(list.first, list.count, blockIdx.x);
    const ScaleTask &task = list.tasks[t];
    const int64_t R = task.reading.columns, strips = (R + kWarp - 1) / kWarp, item = (int64_t)blockIdx.x - list.first[t];
    const int64_t at = item / strips, begin = item % strips * kWarp, column = begin + threadIdx.x;
    const int warp = (int)threadIdx.x / kWarp, lane = (int)threadIdx.x % kWarp;
    if (!task.scaled[at]) {
        if (threadIdx.x >= kWarp || column >= R) return;
        task.exponents[at * R + column] = 0;
        task.scale[at * R + column] = 1;
        return;
    }
    if (task.reading.turned) {
        for (int c = warp; c < kWarp; c += kWarps) {
            double largest = largest_of(strip_column(task.reading, begin + c, at, 0), task.rows, lane, kWarp);
            for (int step = kWarp / 2; step > 0; step /= 2) largest = fmax(largest, __shfl_xor_sync(kAllLanes, largest, step));
            if (lane == 0) found[0][c] = largest;
        }
    } else {
        found[warp][lane] = largest_of(strip_column(task.reading, begin + lane, at, 0), task.rows, warp, kWarps);
    }
    __syncthreads();
    if (threadIdx.x >= kWarp || column >= R) return;
    double largest = found[0][lane];
    for (int w = 1; w < kWarps && !task.reading.turned; ++w) largest = fmax(largest, found[w][lane]);
    const int64_t e = exponent_of(largest), near = e < -1022 ? -1022 : e > 1022 ? 1022 : e;
    task.exponents[at * R + column] = largest == 0 ? kExponentOfZero : (int32_t)near;
    task.scale[at * R + column] = pow2(largest == 0 ? 0 : -near);
}

} // namespace

void scale_columns(const ScaleList &list, void *stream) {
    launch(scales, dim3((unsigned)list.blocks), dim3(kThreads), 0, stream, list);
}

} // namespace fedlora
