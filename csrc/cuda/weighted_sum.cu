// fedlora_weighted_sum: one pass over the blocks, sums in registers.
//
// Memory sets the pace: a thread asks for sixteen bytes of each of four blocks before it adds the first. What lies by rows
// without gaps in the sum and in all blocks is one long row; a sum by columns is taken as its transpose.
#include <algorithm>

#include "four.cuh"
#include "gram.cuh"
#include "slots.cuh"
#include "sum_answers.cuh"

namespace fedlora {
namespace {

constexpr int kThreads = 128, kQuadsEach = 8, kAtOnce = 4;
constexpr int64_t kTileQuads = kThreads * kQuadsEach;

// A sum of a batch of matrices; quads of four numbers along a row, tiles of quads.
struct WeightedSum {
    const fedlora_block *X;
    const double *weights; // (matrix, block)
    int64_t count, quads, tiles;
    fedlora_block sum;
    PartialSum *partials; // (matrix, tile)
};

// Products and sums round one by one: torch's do, and so do those of every other backend.
__device__ void add_block(double (&sum)[4], const Four &four, int dtype, double weight, int there) {
    with_float(dtype, [&](auto kind) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            decltype(kind) x;
            take(four, i, x);
            if (i < there) sum[i] = __dadd_rn(sum[i], __dmul_rn(weight, widen(x)));
        }
    });
}

__device__ void sum_quad(const WeightedSum &p, int64_t matrix, int64_t row, int64_t column, PartialSum &said) {
    double sum[4] = {0.0, 0.0, 0.0, 0.0};
    const double *const weights = p.weights + matrix * p.count;
    for (int64_t first = 0; first < p.count; first += kAtOnce) {
        Four four[kAtOnce];
        int there[kAtOnce], dtype[kAtOnce]; // numbers that a block has here, four at most
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            there[k] = 0, dtype[k] = FEDLORA_FLOAT32;
            if (first + k >= p.count) continue;
            const fedlora_block &X = p.X[first + k];
            const int64_t left = row < X.rows ? X.cols - column : 0;
            there[k] = left < 4 ? (int)left : 4, dtype[k] = (int)X.dtype;
            if (there[k] > 0)
                with_float(X.dtype, [&](auto kind) {
                    load_four(four[k], address<decltype(kind)>(X, matrix) + row * X.row_stride + column * X.col_stride, X.col_stride, there[k]);
                });
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
            if (there[k] > 0) add_block(sum, four[k], dtype[k], weights[first + k], there[k]);
    }
    const int64_t there = p.sum.cols - column;
    with_float(p.sum.dtype, [&](auto kind) {
        using T = decltype(kind);
        Four four;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            T rounded;
            narrow(sum[i], rounded);
            put(four, i, rounded);
            if (i < there) add_number(said, sum[i], widen(rounded));
        }
        store_four(four, address<T>(p.sum, matrix) + row * p.sum.row_stride + column * p.sum.col_stride, p.sum.col_stride, there);
    });
}

__global__ void __launch_bounds__(kThreads, 5) add_up(const WeightedSum *sums, const int64_t *first, int64_t count) {
    __shared__ PartialSum room[kThreads / kWarp];
    const int64_t slot = blockIdx.x, g = slot_group(first, count, slot);
    const WeightedSum &p = sums[g];
    const int64_t matrix = (slot - first[g]) / p.tiles, tile = (slot - first[g]) % p.tiles, all = p.sum.rows * p.quads;
    PartialSum said = {0.0, 0.0, 0u, 0u};
#pragma unroll 1
    for (int64_t q = tile * kTileQuads + threadIdx.x; q < min(all, (tile + 1) * kTileQuads); q += kThreads) {
        // divisions in 64 bits are slow
        const int64_t row = all >> 32 ? q / p.quads : (int64_t)((uint32_t)q / (uint32_t)p.quads);
        sum_quad(p, matrix, row, 4 * (q - row * p.quads), said);
    }
    over_block(said, room, kThreads / kWarp, p.partials + matrix * p.tiles + tile);
}

struct Group {
    std::vector<fedlora_block> X;
    const double *weights;
    fedlora_block sum;
    SumAnswers answers;
};

bool is_packed(const fedlora_block &b, int64_t cols) { return b.cols == cols && b.row_stride == cols && b.col_stride == 1; }

// The same numbers with the fast side along the rows, and in one row where nothing is in between.
void straighten(Group &group) {
    fedlora_block &sum = group.sum;
    if (std::abs(sum.col_stride) > std::abs(sum.row_stride)) {
        sum = transposed(sum);
        for (fedlora_block &X : group.X) X = transposed(X);
    }
    const int64_t cols = sum.cols;
    bool packed = is_packed(sum, cols);
    for (const fedlora_block &X : group.X) packed &= is_packed(X, cols);
    const auto in_one = [](fedlora_block &b) { b.cols *= b.rows, b.row_stride *= b.rows, b.rows = 1; };
    if (packed) in_one(sum), std::for_each(group.X.begin(), group.X.end(), in_one);
}

class WeightedSums {
  public:
    WeightedSums(std::vector<Group> groups, Workspace &workspace, Upload &upload) : count_((int64_t)groups.size()) {
        std::vector<WeightedSum> sums;
        std::vector<AnswersGroup> answers;
        std::vector<int64_t> first = {0};
        for (Group &group : groups) {
            straighten(group);
            const fedlora_block &sum = group.sum;
            const int64_t count = (int64_t)group.X.size(), quads = (sum.cols + 3) / 4, tiles = (sum.rows * quads + kTileQuads - 1) / kTileQuads;
            PartialSum *const partials = workspace.take<PartialSum>(sum.batch * tiles);
            sums.push_back({upload.add(group.X), upload.add(group.weights, sum.batch * count), count, quads, tiles, sum, partials});
            answers.push_back({group.answers, partials, tiles, sum.batch});
            first.push_back(first.back() + sum.batch * tiles);
        }
        sums_ = upload.add(sums);
        first_ = upload.add(first);
        tiles_ = first.back();
        answers_ = AnswersPlan(answers, upload);
    }

    void launch(void *stream) const {
        fedlora::launch(add_up, dim3((unsigned)tiles_), dim3(kThreads), 0, stream, sums_, first_, count_);
        answers_.launch(stream);
    }

  private:
    const WeightedSum *sums_;
    const int64_t *first_;
    int64_t count_, tiles_;
    AnswersPlan answers_;
};

int status_of(const Group &group, const fedlora_block &weights) {
    const fedlora_block &sum = group.sum;
    if (!is_float(sum.dtype) || weights.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
    if (sum.batch < 0 || sum.rows < 0 || sum.cols < 0) return FEDLORA_BAD_SHAPE;
    if (weights.rows != sum.batch || weights.cols != (int64_t)group.X.size()) return FEDLORA_BAD_SHAPE;
    for (const fedlora_block &X : group.X) {
        if (!is_float(X.dtype)) return FEDLORA_BAD_DTYPE;
        if (X.batch != sum.batch || X.rows < 0 || X.cols < 0 || X.rows > sum.rows || X.cols > sum.cols) return FEDLORA_BAD_SHAPE;
    }
    return fit(group.answers, sum.batch) ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

// A table of weights as the kernel takes it, all of a matrix side by side.
std::vector<double> packed(const fedlora_block &weights) {
    std::vector<double> all;
    for (int64_t i = 0; i < weights.rows; ++i)
        for (int64_t k = 0; k < weights.cols; ++k) all.push_back(address<double>(weights, 0)[i * weights.row_stride + k * weights.col_stride]);
    return all;
}

} // namespace
} // namespace fedlora

extern "C" {

int fedlora_weighted_sum_workspace(const int64_t *counts, const fedlora_block *sum, int64_t groups, int64_t, int64_t *bytes) {
    using namespace fedlora;
    if (!counts || !sum || !bytes || groups < 0) return FEDLORA_BAD_ARGUMENT;
    // a sum with blocks that keep it from being one long row has the most tiles
    std::vector<Group> all;
    for (int64_t g = 0; g < groups; ++g) {
        if (counts[g] < 0) return FEDLORA_BAD_SHAPE;
        all.push_back({std::vector<fedlora_block>((size_t)counts[g]), nullptr, sum[g], {}});
        if (all.back().X.empty()) all.back().X.resize(1);
    }
    Workspace counted;
    Upload upload(counted);
    const WeightedSums plan(all, counted, upload);
    *bytes = counted.bytes();
    return FEDLORA_OK;
}

int fedlora_weighted_sum(const fedlora_block *X, const int64_t *counts, const fedlora_block *weights, const fedlora_block *sum,
                         const fedlora_block *norm, const fedlora_block *rounding, const fedlora_block *info,
                         const fedlora_block *notes, int64_t groups, void *workspace, int64_t workspace_bytes, int64_t, void *stream) {
    using namespace fedlora;
    if (!X || !counts || !weights || !sum || !norm || !rounding || !info || !notes || !workspace || groups < 0)
        return FEDLORA_BAD_ARGUMENT;
    std::vector<Group> all;
    std::vector<std::vector<double>> given;
    for (int64_t g = 0; g < groups; X += counts[g], ++g) {
        if (counts[g] < 0) return FEDLORA_BAD_SHAPE;
        all.push_back({std::vector<fedlora_block>(X, X + counts[g]), nullptr, sum[g], {norm[g], rounding[g], info[g], notes[g]}});
        if (const int status = status_of(all.back(), weights[g])) return status;
        given.push_back(packed(weights[g]));
        all.back().weights = given.back().data();
    }
    Workspace memory(workspace, workspace_bytes);
    Upload upload(memory);
    const WeightedSums plan(all, memory, upload);
    if (!memory.fits()) return FEDLORA_BAD_WORKSPACE;
    upload.send(stream);
    plan.launch(stream);
    return finish();
}

} // extern "C"
