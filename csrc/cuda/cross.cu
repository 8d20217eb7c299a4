// fedlora_cross_products: X_k^T Y of many blocks with one matrix, tile by tile on the float64 tensor cores, and what they weigh.
//
// Blocks share out tiles of the product and parts of the rows; a second kernel adds the parts up in order. Both norms come from the
// same strips. Float64, whose squares may leave the range, is brought near 1 by a power of two, known from a first look at it.
#include <algorithm>

#include "gram.cuh"
#include "shares.cuh"
#include "slots.cuh"
#include "spectrum.h"

namespace fedlora {
namespace {

// One matrix of numbers for every matrix of a batch.
struct Place {
    int64_t data, row_stride, col_stride, batch_stride;

    template <class T>
    __device__ T &at(int64_t matrix, int64_t row, int64_t col) const {
        return reinterpret_cast<T *>(data)[matrix * batch_stride + row * row_stride + col * col_stride];
    }
};

struct CrossTask {
    StackReading X, Y;
    const double *largest_X, *largest_Y; // of the columns of float64, by pieces; null: the exponent is 0
    Place products, size, exponent;
    double *slots;
    int64_t rows;
    int32_t parts, pieces, row_tiles, col_tiles;
};

// A tile of 16 M H x 8 N: four warps with all of it, or two halves of its rows with two warps each.
template <int M, int N, int Shares>
struct CrossShape {
    static constexpr int kHalves = kStripWarps / Shares;
    static constexpr int kSide = 16 * M * kHalves, kTiles = M * N, kShares = Shares, kRows = 1024 / kSide;
    static constexpr int kSlot = kTiles * kHalves * (int)kTile + 2; // the tile, squares of X and of Y
    static_assert(kSide == 8 * N, "tiles are square");
    using Tiles = double[M][N][4];

    __device__ static void place(int tile, int &row, int &col) { row = 16 * (tile / N), col = 8 * (tile % N); }
};

using Small = CrossShape<1, 2, 4>;
using Middle = CrossShape<2, 4, 4>;
using Large = CrossShape<2, 8, 2>;

int64_t side_of(int64_t columns) { return columns <= Small::kSide ? Small::kSide : columns <= Middle::kSide ? Middle::kSide : Large::kSide; }
int64_t slot_of(int64_t side) { return side == Small::kSide ? Small::kSlot : side == Middle::kSide ? Middle::kSlot : Large::kSlot; }

// Rows of a part: the sums that it leaves weigh little beside what it reads.
__host__ __device__ inline int64_t length_of(int64_t side) { return side == Large::kSide ? 512 : 1024; }

template <class F>
__device__ void with_shape(const CrossTask &task, F &&f) {
    const int side = task.X.columns > task.Y.columns ? task.X.columns : task.Y.columns;
    if (side <= Small::kSide) f(Small{});
    else if (side <= Middle::kSide) f(Middle{});
    else f(Large{});
}

template <class T, class Shape>
struct Layout {
    static constexpr int kStrips = kStripsAhead<T>, kSide = Shape::kSide;
    using Strips = Strip<T, kSide, Shape::kRows>;
    static constexpr int kHanded = 2 * kStrips * Strips::kBytes;
    static constexpr int kTable = kHanded + kHandedNumbers<Shape> * (int)sizeof(double);
    static constexpr int kSquares = kTable + 2 * kSide * (int)sizeof(StripColumn);
    static constexpr int kBytes = kSquares + 2 * kStripThreads * (int)sizeof(double);
};

// e with the largest finite number of a float64 matrix in [2^(e - 1), 2^e); 0 where all are zero. The same in all lanes.
__device__ int exponent_of_largest(const double *largest, int64_t numbers) {
    if (!largest) return 0;
    double found = 0.0;
    for (int64_t i = threadIdx.x % kWarp; i < numbers; i += kWarp) found = fmax(found, largest[i]);
    for (int distance = kWarp / 2; distance; distance /= 2) found = fmax(found, __shfl_xor_sync(kAllLanes, found, distance));
    return found > 0.0 ? (int)exponent_of(found) + 1 : 0;
}

__device__ int exponent_of_X(const CrossTask &task, int64_t matrix) {
    const int64_t numbers = (int64_t)task.pieces * task.X.columns;
    return exponent_of_largest(task.largest_X ? task.largest_X + matrix * numbers : nullptr, numbers);
}

__device__ int exponent_of_Y(const CrossTask &task, int64_t matrix) {
    const int64_t numbers = (int64_t)task.pieces * task.Y.columns;
    return exponent_of_largest(task.largest_Y ? task.largest_Y + matrix * numbers : nullptr, numbers);
}

// 2^-e in two factors, either of which is in range.
struct Scale {
    double first, second;
    __device__ explicit Scale(int e) : first(pow2(-(e / 2))), second(pow2(e / 2 - e)) {}
};

template <class T>
__device__ __forceinline__ double scaled(T x, const Scale &scale) {
    if constexpr (sizeof(T) == 8)
        return x * scale.first * scale.second;
    else
        return widen(x);
}

// Squares of a strip in an order that does not depend on how it lies.
template <class T, class Shape>
__device__ double squares_of(const T *strip, bool turned, const Scale &scale) {
    using Strips = typename Layout<T, Shape>::Strips;
    const int down = Strips::row_step(turned), right = Strips::col_step(turned);
    double sum = 0.0;
#pragma unroll 4
    for (int n = (int)threadIdx.x; n < Shape::kRows * Shape::kSide; n += kStripThreads) {
        const double x = scaled(strip[n / Shape::kSide * down + n % Shape::kSide * right], scale);
        sum += x * x;
    }
    return sum;
}

template <class T, class Shape>
__device__ __forceinline__ void run_part(const CrossTask &task, int64_t matrix, int64_t part, int row_tile, int col_tile, double *slot,
                                         unsigned char *memory) {
    using Layout = Layout<T, Shape>;
    using Strips = typename Layout::Strips;
    constexpr int kSide = Shape::kSide, kRows = Shape::kRows, kShares = Shape::kShares, kAhead = Layout::kStrips - 1;
    StripColumn *const left = reinterpret_cast<StripColumn *>(memory + Layout::kTable), *const right = left + kSide;
    double *const handed = reinterpret_cast<double *>(memory + Layout::kHanded);
    double *const squares = reinterpret_cast<double *>(memory + Layout::kSquares);
    const auto strip = [&](int s) { return reinterpret_cast<T *>(memory + s % Layout::kStrips * 2 * Strips::kBytes); };
    const auto strip_of_Y = [&](int s) { return reinterpret_cast<T *>(memory + (s % Layout::kStrips * 2 + 1) * Strips::kBytes); };

    const int64_t length = length_of(kSide), begin = part * length;
    const int rows = (int)(task.rows - begin < length ? task.rows - begin : length), strips = (rows + kRows - 1) / kRows;
    for (int c = (int)threadIdx.x; c < kSide; c += kStripThreads) {
        left[c] = strip_column(task.X, (int64_t)row_tile * kSide + c, matrix, begin);
        right[c] = strip_column(task.Y, (int64_t)col_tile * kSide + c, matrix, begin);
    }
    const Scale scale_X(sizeof(T) == 8 ? exponent_of_X(task, matrix) : 0), scale_Y(sizeof(T) == 8 ? exponent_of_Y(task, matrix) : 0);
    __syncthreads();

    const auto fill = [&](int s) {
        if (s < strips) {
            Strips::fill(strip(s), task.X, left, s * kRows, rows);
            Strips::fill(strip_of_Y(s), task.Y, right, s * kRows, rows);
        }
        close_group();
    };
    const int warp = (int)threadIdx.x / kWarp, share = warp * kShares / kStripWarps, half = warp % Shape::kHalves;
    const bool turned_X = task.X.turned != 0, turned_Y = task.Y.turned != 0;
    const int down_X = Strips::row_step(turned_X), right_X = Strips::col_step(turned_X);
    const int down_Y = Strips::row_step(turned_Y), right_Y = Strips::col_step(turned_Y);
    typename Shape::Tiles c = {};
    double squares_X = 0.0, squares_Y = 0.0;
    for (int s = 0; s < kAhead; ++s) fill(s);
    for (int s = 0; s < strips; ++s) {
        wait_groups<kAhead - 1>();
        __syncthreads();
        fill(s + kAhead);
        const T *const X = strip(s), *const Y = strip_of_Y(s);
#pragma unroll 1
        for (int step = 0; step < kRows / (8 * kShares); ++step) {
            const int first = 8 * (step * kShares + share);
            multiply<2>(
                c, [&](int i, int k) { return scaled(X[(first + k) * down_X + (kSide / Shape::kHalves * half + i) * right_X], scale_X); },
                [&](int k, int j) { return scaled(Y[(first + k) * down_Y + j * right_Y], scale_Y); });
        }
        if (col_tile == 0) squares_X += squares_of<T, Shape>(X, turned_X, scale_X);
        if (row_tile == 0) squares_Y += squares_of<T, Shape>(Y, turned_Y, scale_Y);
    }
    join<Shape>(&c[0][0][0], handed, slot, true);
    squares[threadIdx.x] = squares_X, squares[kStripThreads + threadIdx.x] = squares_Y;
    __syncthreads();
    if (threadIdx.x >= 2) return;
    double total = 0.0;
    for (int i = 0; i < kStripThreads; ++i) total += squares[threadIdx.x * kStripThreads + i];
    slot[Shape::kSlot - 2 + threadIdx.x] = total;
}

template <class T>
__global__ void __launch_bounds__(kStripThreads, 2) cross_parts(const CrossTask *tasks, const int64_t *first, int64_t count, int64_t items) {
    FEDLORA_DYNAMIC_SHARED(unsigned char, memory);
    const int64_t block = items + blockIdx.x, t = slot_group(first, count, block);
    const CrossTask &task = tasks[t];
    const uint32_t item = (uint32_t)(block - first[t]), columns = (uint32_t)task.col_tiles, tiles = (uint32_t)task.row_tiles * columns;
    const uint32_t tile = item % tiles, parts = (uint32_t)task.parts;
    const int64_t part = item / tiles % parts, matrix = item / tiles / parts;
    const int row_tile = (int)(tile / columns), col_tile = (int)(tile % columns);
    const auto run = [&](auto shape) {
        using Shape = decltype(shape);
        double *const slot = task.slots + ((matrix * tiles + tile) * task.parts + part) * Shape::kSlot;
        run_part<T, Shape>(task, matrix, part, row_tile, col_tile, slot, memory);
    };
    with_shape(task, run);
}

// One block for every tile of every product.
__global__ void __launch_bounds__(kTile) cross_sums(const CrossTask *tasks, const int64_t *first, int64_t count) {
    const int64_t t = slot_group(first, count, blockIdx.x);
    const CrossTask &task = tasks[t];
    const uint32_t item = (uint32_t)(blockIdx.x - first[t]), columns = (uint32_t)task.col_tiles, tiles = (uint32_t)task.row_tiles * columns;
    const int64_t tile = item % tiles, matrix = item / tiles;
    const int row_tile = (int)((uint32_t)tile / columns), col_tile = (int)((uint32_t)tile % columns);
    const auto run = [&](auto shape) {
        using Shape = decltype(shape);
        const double *const slots = task.slots + matrix * tiles * task.parts * Shape::kSlot;
        const LaneOfTile lane;
        for (int piece = 0; piece < Shape::kTiles * Shape::kHalves; ++piece) {
            double sum = 0.0;
#pragma unroll 8
            for (int part = 0; part < task.parts; ++part) sum += slots[(tile * task.parts + part) * Shape::kSlot + piece * kTile + threadIdx.x];
            int row, col;
            Shape::place(piece, row, col);
            const int e = (int)threadIdx.x / kWarp;
            const int64_t i = (int64_t)row_tile * Shape::kSide + row + lane.row(e), j = (int64_t)col_tile * Shape::kSide + col + lane.col(e);
            if (i < task.X.columns && j < task.Y.columns) task.products.at<double>(matrix, i, j) = sum;
        }
        if (tile != 0 || threadIdx.x >= kWarp) return;
        // The first column of tiles knows the squares of X, the first row those of Y.
        const auto squares = [&](int count, int step, int which) {
            double sum = 0.0;
            for (int n = (int)threadIdx.x; n < count * task.parts; n += kWarp)
                sum += slots[((int64_t)(n / task.parts) * step * task.parts + n % task.parts) * Shape::kSlot + Shape::kSlot - 2 + which];
            for (int distance = kWarp / 2; distance; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
            return sum;
        };
        const double X = squares(task.row_tiles, task.col_tiles, 0), Y = squares(task.col_tiles, 1, 1);
        const int exponent = exponent_of_X(task, matrix) + exponent_of_Y(task, matrix);
        if (threadIdx.x) return;
        task.size.at<double>(matrix, 0, 0) = sqrt(X) * sqrt(Y);
        task.exponent.at<int32_t>(matrix, 0, 0) = exponent;
    };
    with_shape(task, run);
}

Place place_of(const fedlora_block &block) { return {block.data, block.row_stride, block.col_stride, block.batch_stride}; }

bool is_scalar(const fedlora_block &block, int64_t dtype, int64_t batch) {
    return block.rows == 1 && block.cols == 1 && block.batch == batch && block.dtype == dtype;
}

// The blocks of a group, and what is said of each.
struct CrossGroup {
    const fedlora_block *X, *products, *sizes, *exponents;
    int64_t count;
    fedlora_block Y;

    int status() const {
        if (!is_float(Y.dtype)) return FEDLORA_BAD_DTYPE;
        if (count < 0 || Y.batch < 0 || Y.rows < 0 || Y.cols < 0 || Y.cols > INT32_MAX) return FEDLORA_BAD_SHAPE;
        for (int64_t k = 0; k < count; ++k) {
            if (!is_float(X[k].dtype) || products[k].dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
            if (X[k].batch != Y.batch || X[k].rows != Y.rows || X[k].cols < 0 || X[k].cols > INT32_MAX) return FEDLORA_BAD_SHAPE;
            if (products[k].batch != Y.batch || products[k].rows != X[k].cols || products[k].cols != Y.cols) return FEDLORA_BAD_SHAPE;
            if (!is_scalar(sizes[k], FEDLORA_FLOAT64, Y.batch) || !is_scalar(exponents[k], FEDLORA_INT32, Y.batch)) return FEDLORA_BAD_SHAPE;
        }
        return FEDLORA_OK;
    }
};

template <class T>
int64_t shared_of(int64_t side) {
    return side == Small::kSide    ? Layout<T, Small>::kBytes
           : side == Middle::kSide ? Layout<T, Middle>::kBytes
                                   : Layout<T, Large>::kBytes;
}

int64_t shared_of(int64_t side, int64_t dtype) {
    switch (dtype) {
        case FEDLORA_FLOAT32: return shared_of<float>(side);
        case FEDLORA_FLOAT64: return shared_of<double>(side);
        case FEDLORA_BFLOAT16: return shared_of<Bfloat16>(side);
        default: return shared_of<Float16>(side);
    }
}

// All launches of a call.
class CrossProducts {
  public:
    CrossProducts(const std::vector<CrossGroup> &groups, Workspace &workspace, Upload &upload) {
        std::vector<CrossTask> tasks;
        std::vector<int64_t> batches;
        std::vector<ColumnSizes> sizes;
        for (const CrossGroup &group : groups) {
            const int64_t batch = group.Y.batch, pieces = pieces_of(group.Y.rows);
            if (!batch || !group.count) continue;
            const auto largest_of = [&](const fedlora_block &X) -> const double * {
                if (X.dtype != FEDLORA_FLOAT64) return nullptr;
                double *const numbers = workspace.take<double>(batch * pieces * X.cols);
                const int64_t data = reinterpret_cast<int64_t>(numbers), cols = X.cols;
                sizes.push_back({&X, 1, {data, pieces, cols, cols, 1, FEDLORA_FLOAT64, batch, pieces * cols}});
                return numbers;
            };
            const StackReading Y = reading_of(&group.Y, 1, upload);
            const double *const largest_Y = largest_of(group.Y);
            StackReading Y_as_float64 = Y;
            Y_as_float64.dtype = FEDLORA_FLOAT64, Y_as_float64.mixed = 1;
            for (int64_t k = 0; k < group.count; ++k) {
                CrossTask task = {reading_of(group.X + k, 1, upload), Y, nullptr, largest_Y, place_of(group.products[k]),
                                  place_of(group.sizes[k]), place_of(group.exponents[k]), nullptr, group.Y.rows, 0, (int32_t)pieces, 0, 0};
                if (group.X[k].dtype != group.Y.dtype) {
                    if (task.X.dtype != FEDLORA_FLOAT64) task.X.dtype = FEDLORA_FLOAT64, task.X.mixed = 1;
                    if (task.Y.dtype != FEDLORA_FLOAT64) task.Y = Y_as_float64;
                }
                task.largest_X = largest_of(group.X[k]);
                const int64_t side = side_of(std::max(group.X[k].cols, group.Y.cols));
                task.parts = (int32_t)std::max<int64_t>((task.rows + length_of(side) - 1) / length_of(side), 1);
                task.row_tiles = (int32_t)std::max<int64_t>((group.X[k].cols + side - 1) / side, 1);
                task.col_tiles = (int32_t)std::max<int64_t>((group.Y.cols + side - 1) / side, 1);
                task.slots = workspace.take<double>(batch * task.row_tiles * task.col_tiles * task.parts * slot_of(side));
                shared_bytes_ = std::max(shared_bytes_, shared_of(side, task.X.dtype));
                tasks.push_back(task);
                batches.push_back(batch);
            }
        }
        std::vector<CrossTask> sorted;
        std::vector<int64_t> first, first_sum;
        int64_t parts = 0;
        for (int64_t dtype = 0; dtype < kDtypes; ++dtype)
            for (size_t i = 0; i < tasks.size(); ++i) {
                if (tasks[i].X.dtype != dtype) continue;
                const int64_t tiles = batches[i] * tasks[i].row_tiles * tasks[i].col_tiles;
                sorted.push_back(tasks[i]);
                first.push_back(parts), first_sum.push_back(sums_);
                parts += tiles * tasks[i].parts, parts_[dtype] += tiles * tasks[i].parts, sums_ += tiles;
            }
        count_ = (int64_t)sorted.size();
        tasks_ = upload.add(sorted);
        first_ = upload.add(first), first_sum_ = upload.add(first_sum);
        sizes_ = ColumnSizesOf(sizes, upload);
    }

    // Two launches, one more for float64.
    void launch(void *stream) const {
        sizes_.launch(stream);
        int64_t done = 0;
        for (int64_t dtype = 0; dtype < kDtypes; done += parts_[dtype++]) {
            const auto start = [&](auto kernel) {
                fedlora::launch(kernel, dim3((unsigned)parts_[dtype]), dim3(kStripThreads), shared_bytes_, stream, tasks_, first_, count_, done);
            };
            if (dtype == FEDLORA_FLOAT32) start(cross_parts<float>);
            if (dtype == FEDLORA_FLOAT64) start(cross_parts<double>);
            if (dtype == FEDLORA_BFLOAT16) start(cross_parts<Bfloat16>);
            if (dtype == FEDLORA_FLOAT16) start(cross_parts<Float16>);
        }
        fedlora::launch(cross_sums, dim3((unsigned)sums_), dim3((unsigned)kTile), 0, stream, tasks_, first_sum_, count_);
    }

  private:
    static constexpr int kDtypes = FEDLORA_FLOAT16 + 1;
    const CrossTask *tasks_;
    const int64_t *first_, *first_sum_; // part and tile of each task
    int64_t count_ = 0, parts_[kDtypes] = {}, sums_ = 0, shared_bytes_ = 0;
    ColumnSizesOf sizes_;
};

std::vector<CrossGroup> groups_of(const fedlora_block *X, const int64_t *counts, const fedlora_block *Y, const fedlora_block *products,
                                  const fedlora_block *sizes, const fedlora_block *exponents, int64_t groups) {
    std::vector<CrossGroup> all;
    int64_t at = 0;
    for (int64_t g = 0; g < groups; at += counts[g], ++g)
        all.push_back({X + at, products + at, sizes + at, exponents + at, counts[g], Y[g]});
    return all;
}

} // namespace
} // namespace fedlora

extern "C" {

using namespace fedlora;

int fedlora_cross_products_workspace(const fedlora_block *X, const int64_t *counts, const fedlora_block *Y, int64_t groups, int64_t,
                                     int64_t *bytes) {
    if (!X || !counts || !Y || !bytes || groups < 0) return FEDLORA_BAD_ARGUMENT;
    Workspace workspace;
    Upload upload(workspace);
    CrossProducts(groups_of(X, counts, Y, X, X, X, groups), workspace, upload); // where the answers go does not matter
    *bytes = workspace.bytes();
    return FEDLORA_OK;
}

int fedlora_cross_products(const fedlora_block *X, const int64_t *counts, const fedlora_block *Y, const fedlora_block *products,
                           const fedlora_block *sizes, const fedlora_block *exponents, int64_t groups, void *memory, int64_t memory_bytes,
                           int64_t, void *stream) {
    if (!X || !counts || !Y || !products || !sizes || !exponents || !memory || groups < 0) return FEDLORA_BAD_ARGUMENT;
    const std::vector<CrossGroup> all = groups_of(X, counts, Y, products, sizes, exponents, groups);
    for (const CrossGroup &group : all)
        if (const int status = group.status()) return status;
    Workspace workspace(memory, memory_bytes);
    Upload upload(workspace);
    const CrossProducts plan(all, workspace, upload);
    if (!workspace.fits()) return FEDLORA_BAD_WORKSPACE;
    upload.send(stream);
    plan.launch(stream);
    return finish();
}

} // extern "C"
