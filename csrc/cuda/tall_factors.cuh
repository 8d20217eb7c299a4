// What the device keeps of a tall stack: shape, reflections, tree (see tall_qr.cuh).
#pragma once

#include <algorithm>

#include "reflectors.cuh"
#include "slots.cuh"
#include "tall_qr.cuh"

namespace fedlora {

constexpr int kTallThreads = 256, kTallWarps = kTallThreads / kWarp;

__host__ __device__ constexpr int panels_up(int n) { return (n + kPanel - 1) / kPanel * kPanel; }
__host__ __device__ constexpr int gap_of(int height) { return height + 4; } // columns of a tile begin in different banks

// What m and R decide. Leaves and triangles are stored by columns, which begin a little further apart than they are high.
struct TallShape {
    int64_t rows;
    int cols, width;             // as given, and in whole panels
    int leaves, base, extra;     // rows of a leaf: base, and one more in the first `extra` of them
    int least, order, reflected; // rows of R; of a triangle, in whole panels; panels that have reflections
    int leaf_gap, gap;

    TallShape(int64_t rows_, int64_t cols_) : rows(rows_), cols((int)cols_), width(panels_up(cols)) {
        // At least so many rows has a leaf, if there are as many: about 80 KiB, two of which fit on a multiprocessor, and never
        // less than two triangles.
        const int height = std::max(2 * width, std::min(1024, 10240 / width / kPanel * kPanel));
        leaves = (int)std::max<int64_t>(1, rows / height);
        base = (int)(rows / leaves);
        extra = (int)(rows % leaves);
        least = (int)std::min(rows, cols_);
        order = panels_up(least);
        reflected = order / kPanel;
        leaf_gap = gap_of(panels_up(height_of(0)));
        gap = gap_of(order);
    }

    __host__ __device__ int64_t begin(int leaf) const { return (int64_t)base * leaf + (leaf < extra ? leaf : extra); }
    __host__ __device__ int height_of(int leaf) const { return base + (leaf < extra); }
    __host__ __device__ int64_t leaf_size() const { return (int64_t)leaf_gap * width; }
    __host__ __device__ int64_t triangle_size() const { return (int64_t)gap * width; }
    __host__ __device__ int kept_size() const { return width / kPanel * kPanelKept; }
    __host__ __device__ int panel_size() const { return leaf_gap * kPanel; }
    __host__ __device__ int tile_size() const { return leaf_gap * kTileCols; }
};

// Where the numbers lie that a block works on.
enum Room : int32_t {
    kInShared,    // all in shared memory
    kPanelShared, // a panel in shared memory, the rest in the workspace
    kInWorkspace, // all in the workspace
};

struct TallFactors {
    const fedlora_block *X;
    int64_t count;
    fedlora_block scale, R;
    const int32_t *active;
    TallShape shape;
    bool keep;
    Room leaf_room, node_room;
    double *leaves;    // of all matrices, where they are kept or do not fit elsewhere
    double *triangles; // of all leaves; that of a right child becomes the reflections of its node
    double *leaf_kept, *node_kept;
    int32_t *arrivals; // of blocks at every node, as the leaf that its right child begins with
};

__device__ inline void copy_numbers(double *to, const double *from, int count) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}

// `count` rows of eight columns.
__device__ inline void copy_panel(double *to, int to_gap, const double *from, int from_gap, int count) {
    for (int j = threadIdx.x / kWarp; j < kPanel; j += blockDim.x / kWarp)
        for (int i = threadIdx.x % kWarp; i < count; i += kWarp) to[j * to_gap + i] = from[j * from_gap + i];
}

// Whether lanes should go down the rows of a matrix in memory, rather than along them.
__device__ inline bool is_down(const fedlora_block &X) {
    return (X.row_stride < 0 ? -X.row_stride : X.row_stride) < (X.col_stride < 0 ? -X.col_stride : X.col_stride);
}

} // namespace fedlora
