// One tile of a sum of blocks times mixers: 128 rows by 32 or 64 columns, all of the depth, by four warps of 32 rows each.
//
// The depth goes in steps of sixteen columns of the stack, four quads of columns that lie in one block each: a block whose
// columns are no multiple of four is filled up with zeros. Numbers of the next step are on their way from memory, as they lie
// there, while those of this one are multiplied. What is multiplied, and in which order, depends on the columns of the blocks
// alone.
#pragma once

#include "four.cuh"
#include "mixed_sum.cuh"
#include "signs.cuh"
#include "slots.cuh"
#include "sum_answers.cuh"
#include "tile.cuh"

namespace fedlora {

constexpr int kTileRows = 128, kStripColumns = 32, kDepth = 16, kMixThreads = 128;

// Columns [column, column + count) of a block, which are so many at most; `place` in the stack.
struct Quad {
    int32_t block, column, count, place;
};

// A sum of a batch of matrices.
struct MixedTable {
    const fedlora_block *X, *mixers;
    const Quad *quads;     // of matrix i: from i * quad_stride on
    const int32_t *counts; // of quads, per matrix; null: `most` of them
    int64_t quad_stride, most;
    fedlora_block scale, sum;
    const int32_t *ranks;
    PartialSum *partials; // (matrix, tile of rows, strip of columns), null: nobody asks
    SignRecord *records;  // (matrix, tile of rows, column), null: nobody asks
    int32_t *overflows;   // (matrix, tile of rows, strip of columns), null: nobody asks
    int64_t row_tiles, strips, column_tiles;
    bool by_columns; // which way the sum and the blocks are read and written
};

// The operands of a step in shared memory. Distances between rows and between columns are such that no two lanes meet in a bank:
// four more than a multiple of sixteen numbers.
template <int Columns>
struct MixedShared {
    static constexpr int kRow = kDepth + 4, kColumn = kTileRows + 4, kMixer = Columns + 4;
    static constexpr int kBlock = kTileRows * kRow, kStage = kBlock + kDepth * kMixer;
    static constexpr int64_t kBytes = 2 * kStage * (int64_t)sizeof(double);
    static_assert(kDepth * kColumn <= kBlock, "a step by columns fits as well");
};

template <int Columns, bool ByColumns>
class MixedTile {
  public:
    static constexpr int kStrips = Columns / kStripColumns;
    using Shared = MixedShared<Columns>;

    __device__ MixedTile(const MixedTable &table, int64_t matrix, int row_tile, int column, int64_t columns, double *shared)
        : table_(table), matrix_((int)matrix), row_tile_(row_tile), column_(column),
          rows_(up_to(table.sum.rows - (int64_t)row_tile * kTileRows, kTileRows)), columns_(up_to(columns - column, Columns)),
          count_(table.counts ? table.counts[matrix] : (int)table.most),
          quads_(table.quads + matrix * table.quad_stride), shared_(shared) {}

    __device__ void run() {
        const int steps = (count_ + 3) / 4;
        zero();
        if (steps > 0) load(0), copy_mixer(0);
        for (int step = 0; step < steps; ++step) {
            store(step);
            wait_groups<0>();
            __syncthreads();
            if (step + 1 < steps) load(step + 1), copy_mixer(step + 1);
            multiply_step(step);
        }
        __syncthreads();
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip)
            if (strip * kStripColumns < columns_) write(strip);
    }

  private:
    __device__ static int up_to(int64_t count, int most) { return count < most ? (int)count : most; }

    // A thread fetches four quads of numbers of a step. By rows: one quad of columns, of rows that are eight apart. By columns:
    // four rows next to each other, of the columns of one quad.
    __device__ static int lane() { return (int)threadIdx.x % kWarp; }
    __device__ static int warp() { return (int)threadIdx.x / kWarp; }
    __device__ static int own_quad() { return ByColumns ? warp() : lane() / 8; }
    __device__ static int own_row(int slot) { return ByColumns ? 4 * lane() : 32 * warp() + 8 * slot + lane() % 8; }

    __device__ Quad quad(int index) const { return index < count_ ? quads_[index] : Quad{0, 0, 0, 0}; }

    __device__ void zero() {
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip)
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int n = 0; n < 4; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) sums_[strip][m][n][e] = 0.0;
    }

    __device__ void load(int step) {
        const Quad own = quad(4 * step + own_quad());
        there_ = own.count, place_ = own.place, dtype_ = FEDLORA_FLOAT32;
        fedlora_block X = {};
        if (own.count > 0) X = table_.X[own.block], dtype_ = (int)X.dtype;
        with_float(dtype_, [&](auto kind) {
            using T = decltype(kind);
            const T *x = address<T>(X, matrix_) + own.column * X.col_stride + ((int64_t)row_tile_ * kTileRows + own_row(0)) * X.row_stride;
            const int64_t further = ByColumns ? X.col_stride : 8 * X.row_stride, along = ByColumns ? X.row_stride : X.col_stride;
#pragma unroll
            for (int slot = 0; slot < 4; ++slot, x += further) {
                const int left = rows_ - own_row(slot), there = ByColumns ? (slot < own.count ? left : 0) : (left > 0 ? own.count : 0);
                load_four(given_[slot], x, along, there);
            }
        });
    }

    // Numbers that were loaded, in float64 where the warps find them.
    __device__ void store(int step) const {
        double *const blocks = shared_ + step % 2 * Shared::kStage;
        const bool scaled = table_.scale.rows && there_ > 0;
        const double *const scale = address<double>(table_.scale, matrix_) + place_ * table_.scale.col_stride;
        with_float(dtype_, [&](auto kind) {
            using T = decltype(kind);
#pragma unroll
            for (int slot = 0; slot < 4; ++slot) {
                double x[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    T narrow_x;
                    take(given_[slot], i, narrow_x);
                    x[i] = widen(narrow_x);
                    const int column = ByColumns ? slot : i;
                    if (scaled && column < there_) x[i] *= scale[column * table_.scale.col_stride];
                }
                const double2 first = make_double2(x[0], x[1]), second = make_double2(x[2], x[3]);
                if constexpr (ByColumns) {
                    double2 *const to = reinterpret_cast<double2 *>(blocks + (4 * warp() + slot) * Shared::kColumn + own_row(slot));
                    to[0] = first, to[1] = second;
                } else {
                    // rows four apart meet in a bank: half of the lanes begins with the second half
                    const int late = lane() / 4 % 2;
                    double2 *const to = reinterpret_cast<double2 *>(blocks + own_row(slot) * Shared::kRow + 4 * own_quad());
                    to[late] = late ? second : first;
                    to[1 - late] = late ? first : second;
                }
            }
        });
    }

    // Rows of the mixers of a step: thread 8 k + t fetches columns 2 t, 2 t + 1, then those sixteen further on, of row k.
    __device__ void copy_mixer(int step) const {
        const int k = (int)threadIdx.x / 8, first = 2 * ((int)threadIdx.x % 8);
        const Quad own = quad(4 * step + k / 4);
        double *const to = shared_ + step % 2 * Shared::kStage + Shared::kBlock + k * Shared::kMixer;
        const bool there = k % 4 < own.count;
        fedlora_block mixer = {};
        if (there) mixer = table_.mixers[own.block];
        const double *const from =
            there ? address<double>(mixer, matrix_) + (own.column + k % 4) * mixer.row_stride + column_ * mixer.col_stride : nullptr;
#pragma unroll
        for (int n = first; n < Columns; n += 16) {
            const bool one = there && n < columns_, two = there && n + 1 < columns_;
            const double *const x = one ? from + n * mixer.col_stride : nullptr, *const y = two ? x + mixer.col_stride : nullptr;
            if (two && mixer.col_stride == 1 && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
                copy_async<16>(to + n, x, 16);
            } else {
                copy_async<8>(to + n, x, one ? 8 : 0);
                copy_async<8>(to + n + 1, y, two ? 8 : 0);
            }
        }
        close_group();
    }

    __device__ void multiply_step(int step) {
        const double *const blocks = shared_ + step % 2 * Shared::kStage + 32 * warp() * (ByColumns ? 1 : Shared::kRow);
        const double *const mixer = shared_ + step % 2 * Shared::kStage + Shared::kBlock;
#pragma unroll 1
        for (int depth = 0; depth < kDepth; depth += 8) {
            const auto left = [&](int row, int k) {
                return ByColumns ? blocks[(depth + k) * Shared::kColumn + row] : blocks[row * Shared::kRow + depth + k];
            };
#pragma unroll
            for (int strip = 0; strip < kStrips; ++strip) {
                const auto right = [&](int k, int column) {
                    return mixer[(depth + k) * Shared::kMixer + strip * kStripColumns + column];
                };
                if (strip == 0 || strip * kStripColumns < columns_) multiply<2>(sums_[strip], left, right);
            }
        }
    }

    // A strip of the sum by way of shared memory, so that neighbours in memory are written together.
    __device__ void write(int strip) {
        // no two lanes meet in a bank, neither here nor where the strip is read along its fast side
        constexpr int kRow = ByColumns ? 1 : kStripColumns + 8, kColumn = ByColumns ? kTileRows + 2 : 1;
        static_assert(kTileRows * (kStripColumns + 8) <= 2 * Shared::kStage, "a strip fits where the operands were");
        const LaneOfTile at;
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    shared_[(32 * warp() + 16 * m + at.row(e)) * kRow + (8 * n + at.col(e)) * kColumn] = sums_[strip][m][n][e];
        __syncthreads();
        const int64_t column = column_ + strip * kStripColumns;
        const int columns = columns_ - strip * kStripColumns;
        const int64_t tile = matrix_ * table_.row_tiles + row_tile_;
        PartialSum said = {0.0, 0.0, 0u, 0u};
        with_float(table_.sum.dtype, [&](auto kind) {
            using T = decltype(kind);
            const int64_t row_stride = table_.sum.row_stride, col_stride = table_.sum.col_stride;
            T *const out = address<T>(table_.sum, matrix_) + (int64_t)row_tile_ * kTileRows * row_stride + column * col_stride;
            for (int i = 0; i < kTileRows * kStripColumns / kMixThreads; ++i) {
                const int r = ByColumns ? i % 4 * kWarp + lane() : 4 * i + warp(), c = ByColumns ? i / 4 * 4 + warp() : lane();
                if (r >= rows_ || c >= columns) continue;
                const double x = shared_[r * kRow + c * kColumn];
                T rounded;
                narrow(x, rounded);
                out[r * row_stride + c * col_stride] = rounded;
                add_number(said, x, widen(rounded));
            }
        });
        if (table_.records) record<kRow, kColumn>(tile * table_.sum.cols + column, columns);
        const int64_t place = tile * table_.strips + column / kStripColumns;
        if (table_.overflows) {
            const int overflow = __syncthreads_or(said.marks & kOverflow);
            if (threadIdx.x == 0) table_.overflows[place] = overflow;
        }
        __shared__ PartialSum room[kMixThreads / kWarp];
        if (table_.partials) over_block(said, room, kMixThreads / kWarp, table_.partials + place);
        __syncthreads();
    }

    // What the rows of the strip say of the signs of its columns: a lane per column, a warp for every 32 rows.
    template <int Row, int Column>
    __device__ void record(int64_t place, int columns) const {
        __shared__ SignRecord room[kMixThreads / kWarp][kStripColumns];
        const double *const x = shared_ + 32 * warp() * Row + lane() * Column;
        const int left = rows_ - 32 * warp(), rows = left < 32 ? left : 32;
        room[warp()][lane()] = sign_record(x, Row, rows);
        __syncthreads();
        if (warp() != 0 || lane() >= columns) return;
        SignRecord all = room[0][lane()];
        for (int w = 1; w < kMixThreads / kWarp; ++w) all = joined(all, room[w][lane()]);
        table_.records[place + lane()] = all;
    }

    const MixedTable &table_;
    const int matrix_, row_tile_, column_; // as many as a grid has blocks
    const int rows_, columns_, count_; // rows and columns of this tile, quads
    const Quad *const quads_;
    double *const shared_;
    int dtype_, there_, place_; // of the quad that was loaded: columns, and where they are in the stack
    Four given_[4];
    double sums_[kStrips][2][4][4];
};

// Sums as the tiles see them; which quads count, and what is asked of them, comes later.
MixedTable table_of(const MixedSum &sum, bool narrow, Upload &upload);
// All columns of the blocks of a sum in quads, and how many those are.
std::vector<Quad> all_quads(const MixedSum &sum);
int64_t count_quads(const MixedSum &sum);
bool all_narrow(const std::vector<MixedSum> &sums);

MixedTiles tiles_of(const std::vector<MixedTable> &tables, bool narrow, Upload &upload);
void launch_tiles(const MixedTiles &tiles, void *stream);

} // namespace fedlora
