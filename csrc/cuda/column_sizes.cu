// The largest finite magnitude of every column of a stack, piece by piece of its rows.
#include <cfloat>

#include "gram.cuh"
#include "slots.cuh"
#include "strips.cuh"

namespace fedlora {

struct ColumnSizesOf::Task {
    StackReading reading;
    fedlora_block largest;
    int64_t rows, pieces, length; // length: rows of a piece
    int64_t groups;               // of columns, as many as a warp has lanes
};

namespace {

constexpr int kWarps = kStripThreads / kWarp;

using Task = ColumnSizesOf::Task;

// One block for the same rows of 32 columns: its warps share out the rows, lanes have a column each; or the columns, where those lie
// together, lanes having every 32nd row.
__global__ void __launch_bounds__(kStripThreads) column_sizes(const Task *tasks, const int64_t *first, int64_t count) {
    __shared__ double found[kWarps][kWarp];
    const int64_t t = slot_group(first, count, blockIdx.x);
    const Task &task = tasks[t];
    const uint32_t item = (uint32_t)(blockIdx.x - first[t]), groups = (uint32_t)task.groups, pieces = (uint32_t)task.pieces;
    const int64_t group = item % groups, piece = item / groups % pieces, matrix = item / groups / pieces, begin = piece * task.length;
    const int64_t rows = task.rows - begin < task.length ? task.rows - begin : task.length;
    const int warp = (int)threadIdx.x / kWarp, lane = (int)threadIdx.x % kWarp;
    const auto largest_of = [&](int column, int64_t row, int64_t step) {
        const StripColumn c = strip_column(task.reading, group * kWarp + column, matrix, begin);
        double largest = 0.0;
        if (!c.address) return largest;
        with_float(c.dtype, [&](auto zero) {
#pragma unroll 4
            for (int64_t r = row; r < rows; r += step) {
                const double size = fabs(widen(*reinterpret_cast<const decltype(zero) *>(c.address + r * c.step)));
                if (size <= DBL_MAX && size > largest) largest = size;
            }
        });
        return largest;
    };
    if (task.reading.turned) {
        for (int column = warp; column < kWarp; column += kWarps) {
            double largest = largest_of(column, lane, kWarp);
            for (int distance = kWarp / 2; distance; distance /= 2)
                largest = fmax(largest, __shfl_xor_sync(kAllLanes, largest, distance));
            if (lane == 0) found[0][column] = largest;
        }
    } else {
        found[warp][lane] = largest_of(lane, warp, kWarps);
    }
    __syncthreads();
    const int64_t column = group * kWarp + threadIdx.x;
    if (threadIdx.x >= kWarp || column >= task.largest.cols) return;
    double largest = found[0][lane];
    for (int w = 1; w < kWarps && !task.reading.turned; ++w) largest = fmax(largest, found[w][lane]);
    address<double>(task.largest, matrix)[piece * task.largest.row_stride + column * task.largest.col_stride] = largest;
}

} // namespace

ColumnSizesOf::ColumnSizesOf(const std::vector<ColumnSizes> &stacks, Upload &upload) {
    std::vector<Task> tasks;
    std::vector<int64_t> first;
    for (const ColumnSizes &stack : stacks) {
        const int64_t R = stack.largest.cols, rows = stack.count ? stack.X[0].rows : 0;
        const int64_t pieces = pieces_of(rows), length = (rows + pieces - 1) / pieces;
        const Task task = {reading_of(stack.X, stack.count, upload), stack.largest, rows, pieces, length, (R + kWarp - 1) / kWarp};
        first.push_back(blocks_);
        blocks_ += stack.largest.batch * task.pieces * task.groups;
        tasks.push_back(task);
    }
    count_ = (int64_t)tasks.size();
    tasks_ = upload.add(tasks);
    first_ = upload.add(first);
}

void ColumnSizesOf::launch(void *stream) const {
    fedlora::launch(column_sizes, dim3((unsigned)blocks_), dim3(kStripThreads), 0, stream, tasks_, first_, count_);
}

} // namespace fedlora
