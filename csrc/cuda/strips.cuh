// Strips of stacked blocks in shared memory, as they are stored: copied there in the background, a few strips ahead of the arithmetic.
//
// Numbers become float64 when a warp takes them for its tile product. In the Grams of up to 64 columns every number is taken by one
// lane once, in wider ones by two warps, so a pass that widens a whole strip first would convert no less, move four times the bytes
// of a half through shared memory twice more, and wait at one more barrier.
#pragma once

#include <vector>

#include "element.cuh"
#include "tile.cuh"
#include "workspace.cuh"

namespace fedlora {

constexpr int kStripThreads = 128;

// The columns of a block, from `first` of the stack on.
struct StackPiece {
    int64_t data, row_stride, col_stride, batch_stride;
    int32_t first, dtype;
};

// How a stack is read: copies of `width` bytes, along the rows of all blocks or, turned, along their columns. The type in shared
// memory is that of the blocks, or float64 where they differ.
struct StackReading {
    const StackPiece *pieces;
    int32_t count, columns, dtype, mixed, width, turned;
};

StackReading reading_of(const fedlora_block *X, int64_t count, Upload &upload);

// One column of some rows; nothing of it is there without an address.
struct StripColumn {
    int64_t address, step; // bytes; of the first of them, and from row to row
    int64_t dtype;
};

__device__ inline StripColumn strip_column(const StackReading &reading, int64_t column, int64_t matrix, int64_t row) {
    if (column >= reading.columns) return {0, 0, reading.dtype};
    int low = 0, high = reading.count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (reading.pieces[middle].first <= column)
            low = middle;
        else
            high = middle;
    }
    const StackPiece piece = reading.pieces[low];
    const int64_t size = size_of(piece.dtype);
    const int64_t there = matrix * piece.batch_stride + (column - piece.first) * piece.col_stride + row * piece.row_stride;
    return {piece.data + size * there, size * piece.row_stride, piece.dtype};
}

__device__ inline double widen_any(int64_t dtype, int64_t address) {
    double value = 0.0;
    with_float(dtype, [&](auto zero) { value = widen(*reinterpret_cast<const decltype(zero) *>(address)); });
    return value;
}

// Rows rows of Columns columns. Lines are padded so that the eight columns and four rows that a warp takes at once lie in banks of
// their own, whichever way the lines run.
template <class T, int Columns, int Rows>
struct Strip {
    static constexpr int kAlong = Columns + (sizeof(T) == 8 ? 4 : 8), kDown = Rows + (sizeof(T) == 2 ? 8 : 4);
    static constexpr int kElements = Rows * kAlong > Columns * kDown ? Rows * kAlong : Columns * kDown;
    static constexpr int kBytes = (kElements * (int)sizeof(T) + 15) / 16 * 16;

    // From column to column and from row to row.
    __device__ static int col_step(bool turned) { return turned ? kDown : 1; }
    __device__ static int row_step(bool turned) { return turned ? 1 : kAlong; }

    // Rows [row, row + Rows) of columns with `end` rows; zeros where there are none. They are there after a wait for the group that
    // the caller closes and a barrier.
    __device__ static void fill(T *strip, const StackReading &reading, const StripColumn *columns, int row, int end) {
        const bool turned = reading.turned != 0;
        const int width = reading.width, rows = end - row < Rows ? end - row : Rows;
        if (reading.mixed || width < 4) return fill_now(strip, reading, columns, row, rows);
        const int numbers = width / (int)sizeof(T);
        const int line = turned ? Rows : kPower, copies = line / numbers, shift = __ffs(copies) - 1;
        const int total = copies * (turned ? Columns : Rows);
        for (int i = (int)threadIdx.x; i < total; i += kStripThreads) {
            const int across = i >> shift, along = (i & (copies - 1)) * numbers;
            const int c = turned ? across : along, r = turned ? along : across;
            if (c >= Columns) continue;
            const StripColumn column = columns[c];
            const int there = turned ? (rows - r) * (int)sizeof(T) : r < rows ? width : 0;
            const int bytes = !column.address || there < 0 ? 0 : there < width ? there : width;
            const void *const from = reinterpret_cast<const void *>(column.address + (row + r) * column.step);
            T *const to = strip + c * col_step(turned) + r * row_step(turned);
            if (width == 16)
                copy_async<16>(to, from, bytes);
            else if (width == 8)
                copy_async<8>(to, from, bytes);
            else
                copy_async<4>(to, from, bytes);
        }
    }

  private:
    static constexpr int kPower = Columns <= 16 ? 16 : Columns <= 32 ? 32 : Columns <= 64 ? 64 : 128;
    static_assert(Columns <= 128 && (Rows & (Rows - 1)) == 0, "lines are cut by shifts");

    // What cannot be copied in the background: single halves, and numbers that change their type. Some at a time are on their way.
    __device__ static void fill_now(T *strip, const StackReading &reading, const StripColumn *columns, int row, int rows) {
        constexpr int kAtOnce = 8;
        const bool turned = reading.turned != 0;
        const int line = turned ? Rows : kPower, total = line * (turned ? Columns : Rows);
        for (int begin = (int)threadIdx.x; begin < total; begin += kAtOnce * kStripThreads) {
            T values[kAtOnce];
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
                const int i = begin + j * kStripThreads, across = i / line, along = i % line;
                const int c = turned ? across : along, r = turned ? along : across;
                values[j] = T{};
                if (i >= total || c >= Columns || r >= rows || !columns[c].address) continue;
                const int64_t from = columns[c].address + (row + r) * columns[c].step;
                if constexpr (sizeof(T) == 8)
                    values[j] = widen_any(columns[c].dtype, from);
                else
                    values[j] = *reinterpret_cast<const T *>(from);
            }
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
                const int i = begin + j * kStripThreads, across = i / line, along = i % line;
                const int c = turned ? across : along, r = turned ? along : across;
                if (i < total && c < Columns) strip[c * col_step(turned) + r * row_step(turned)] = values[j];
            }
        }
    }
};

// Strips on their way at a time, so that some twenty thousand bytes are for every multiprocessor.
template <class T>
constexpr int kStripsAhead = sizeof(T) == 2 ? 6 : sizeof(T) == 4 ? 4 : 3;

} // namespace fedlora
