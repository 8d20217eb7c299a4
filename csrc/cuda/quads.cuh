// Factors as blocks of 128 threads walk through them, a tile of 128 rows at a time, sixteen bytes at a time whichever way they
// lie.
#pragma once

#include "four.cuh"

namespace fedlora {

constexpr int kTurnTile = 128, kTurnThreads = 128, kTurnWarps = kTurnThreads / kWarp;

// Quads of numbers that lie together, of some rows, a tile at most, and columns: visit(row, column, distance, how many, whether
// down a column).
template <class F>
__device__ __forceinline__ void for_quads(const fedlora_block &b, int rows, int columns, const F &visit) {
    const int lane = (int)threadIdx.x % kWarp, warp = (int)threadIdx.x / kWarp;
    if (llabs(b.col_stride) > llabs(b.row_stride)) {
#pragma unroll 2
        for (int quad = (int)threadIdx.x; quad < columns * (kTurnTile / 4); quad += kTurnThreads) {
            const int row = quad % (kTurnTile / 4) * 4;
            if (row < rows) visit(row, quad / (kTurnTile / 4), b.row_stride, min(rows - row, 4), true);
        }
    } else {
        // a warp takes four quads of eight rows: whole sectors
        const int groups = (columns + 15) / 16;
#pragma unroll 2
        for (int item = warp; item < groups * (kTurnTile / 8); item += kTurnWarps) {
            const int row = item / groups * 8 + lane % 8, column = item % groups * 16 + lane / 8 * 4;
            if (row < rows && column < columns) visit(row, column, b.col_stride, min(columns - column, 4), false);
        }
    }
}

template <class S>
__device__ S *element(const fedlora_block &b, int64_t matrix, int64_t row, int64_t column) {
    return address<S>(b, matrix) + row * b.row_stride + column * b.col_stride;
}

} // namespace fedlora
