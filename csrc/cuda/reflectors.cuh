// Householder reflections eight at a time, I - V T V^T, on columns of float64 in shared or global memory.
//
// Vectors are kept as they come, v = x + sign(x_1) |x| e_1 with tau = 1 / (|x| (|x| + |x_1|)): scaling a column by a power of
// two scales everything with it exactly. A panel stands on rows of its own, or is stacked: eight rows of a triangle, with the
// rows of another below them, of which the reflections see one row of the first and all of the second each.
#pragma once

#include "tile.cuh"

namespace fedlora {

constexpr int kPanel = 8;
constexpr int kPanelKept = kPanel * kPanel + kPanel;        // numbers besides V: T by rows, then V in the first of two triangles
constexpr int kPanelScratch = kPanel * kPanel + 2 * kPanel; // numbers of shared memory that factoring a panel takes
constexpr int kTileCols = 16;                               // that a warp updates at once
constexpr int kTileGap = 12;                                // between rows of a tile in scratch, so that lanes meet in no bank
constexpr int kTileScratch = kTileCols * kTileGap;          // numbers of shared memory that a warp takes for it
constexpr double kNothing = 0x1p-450;                       // shorter columns count as zero

// X^T Y of `count` rows, a multiple of eight: sixteen columns of X, of which those from `cols` on are not there, by eight of Y.
// Sums of so many rows are added up, lest long columns of numbers alike lose digits.
__device__ inline void inner_products(double (&sum)[4], const double *X, int X_gap, int cols, const double *Y, int Y_gap,
                                      int count) {
    constexpr int kStretch = 32;
    int i = 0;
    const auto x = [&](int col, int k) { return col < cols ? X[col * X_gap + i + k] : 0; };
    const auto y = [&](int k, int col) { return Y[col * Y_gap + i + k]; };
    while (i < count) {
        const int end = min(i + kStretch, count);
        double part[1][1][4] = {};
        for (; i + 16 <= end; i += 16) multiply<4>(part, x, y);
        if (i < end) multiply<2>(part, x, y), i = end;
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] += part[0][0][e];
    }
}

// Sixteen rows of eight numbers that tiles are multiplied with from the left, as far as this lane needs them.
struct LeftRows {
#ifdef FEDLORA_TENSOR_FLOAT64
    double low[2], high[2];
    __device__ explicit LeftRows(const double *scratch) {
        const LaneOfTile lane;
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            low[s] = scratch[lane.g * kTileGap + lane.t + 4 * s];
            high[s] = scratch[(lane.g + 8) * kTileGap + lane.t + 4 * s];
        }
    }
    // tile += these rows times eight rows b(k, col).
    template <class Right>
    __device__ void multiply(double (&tile)[4], const Right &b) const {
        const LaneOfTile lane;
        const double right[2] = {b(lane.t, lane.g), b(lane.t + 4, lane.g)};
        multiply_tile<2>(tile, low, high, right);
    }
#else
    const double *scratch;
    __device__ explicit LeftRows(const double *scratch_) : scratch(scratch_) {}
    template <class Right>
    __device__ void multiply(double (&tile)[4], const Right &b) const {
        const LaneOfTile lane;
        for (int e = 0; e < 4; ++e)
            for (int k = 0; k < kPanel; ++k) tile[e] = fma(scratch[lane.row(e) * kTileGap + k], b(k, lane.col(e)), tile[e]);
    }
#endif
};

__device__ inline double sum_of_warp(double x) {
    for (int apart = kWarp / 2; apart; apart /= 2) x += __shfl_xor_sync(kAllLanes, x, apart);
    return x;
}

// Columns of a panel. Where it is stacked, `pivots` are the eight rows of the triangle above; else they are the first of `rows`.
struct Panel {
    double *rows;
    int gap;
    int count; // of rows, a multiple of eight
    double *pivots;
    int pivot_gap;
};

// V in place of the panel, with ones for which it stands nowhere written down: zeros above the diagonal of a panel of its own.
// The triangle that is left goes to `corner`, T and the tops of V to `kept` in shared memory. All of a block of eight warps or
// more comes here; one column is that of one warp, and all warps work out the reflection that is next for themselves.
template <bool kStacked>
__device__ void factor_panel(const Panel &panel, double *corner, int corner_gap, double *kept, double *scratch) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    double *const products = scratch, *const taus = scratch + kPanel * kPanel, *const betas = taus + kPanel;
    double *const tops = kept + kPanel * kPanel;
    double *const own = panel.rows + warp * panel.gap;
    for (int j = 0; j < kPanel; ++j) {
        if (warp < kPanel) {
            const double *const column = panel.rows + j * panel.gap;
            const double alpha = panel.pivots[j * panel.pivot_gap + j];
            const double own_top = kStacked && warp < j ? 0 : panel.pivots[warp * panel.pivot_gap + j];
            double squares = 0, dot = 0;
            for (int i = (kStacked ? 0 : j + 1) + lane; i < panel.count; i += kWarp) {
                squares += column[i] * column[i];
                dot += column[i] * own[i];
            }
            squares = sum_of_warp(squares);
            dot = sum_of_warp(dot);
            const double length = sqrt(alpha * alpha + squares);
            const bool nothing = !(length >= kNothing);
            const double top = alpha + copysign(length, alpha), tau = nothing ? 0 : 1 / (length * (length + fabs(alpha)));
            if (warp > j) {
                const double part = tau * (dot + top * own_top);
                for (int i = (kStacked ? 0 : j + 1) + lane; i < panel.count; i += kWarp) own[i] -= part * column[i];
                __syncwarp(); // all lanes have read it
                if (lane == 0) panel.pivots[warp * panel.pivot_gap + j] = own_top - part * top;
            } else if (lane == 0 && warp < j) {
                products[warp * kPanel + j] = dot + top * own_top;
            } else if (lane == 0) {
                taus[j] = tau;
                betas[j] = nothing ? 0 : -copysign(length, alpha);
                tops[j] = top;
            }
        }
        __syncthreads();
    }
    if (warp == 0 && lane < kPanel) {
        double *const T = kept + lane * kPanel;
        for (int j = 0; j < kPanel; ++j) {
            double sum = 0;
            for (int k = lane; k < j; ++k) sum += T[k] * products[k * kPanel + j];
            T[j] = j < lane ? 0 : j == lane ? taus[j] : -taus[j] * sum;
        }
    }
    if (warp < kPanel && lane < kPanel) {
        double *const above = panel.pivots + warp * panel.pivot_gap + lane;
        corner[warp * corner_gap + lane] = lane < warp ? *above : lane == warp ? betas[warp] : 0;
        if (!kStacked && lane <= warp) *above = lane < warp ? 0 : tops[warp];
    }
    __syncthreads();
}

// Columns, sixteen or eight of them, lose what the reflections of a panel take: with kForward they are multiplied with Q^T,
// else with Q. A warp does this. `rows` are the columns beside those of the panel, `pivots`, where it is stacked, those beside
// its eight rows above.
template <bool kStacked, bool kForward>
__device__ void update_tile(const double *V, int V_gap, int count, const double *kept, double *rows, int gap, int cols,
                            double *pivots, int pivot_gap, double *scratch) {
    const LaneOfTile lane;
    const double *const tops = kept + kPanel * kPanel;
    double W[4] = {}; // W^T: columns by reflections
    inner_products(W, rows, gap, cols, V, V_gap, count);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        if (kStacked && lane.row(e) < cols) W[e] += tops[lane.col(e)] * pivots[lane.row(e) * pivot_gap + lane.col(e)];
        scratch[lane.row(e) * kTileGap + lane.col(e)] = W[e];
    }
    __syncwarp();
    double turned[4] = {};
    LeftRows(scratch).multiply(turned, [&](int k, int j) { return kForward ? kept[k * kPanel + j] : kept[j * kPanel + k]; });
    __syncwarp();
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        scratch[lane.row(e) * kTileGap + lane.col(e)] = -turned[e];
        if (kStacked && lane.row(e) < cols) pivots[lane.row(e) * pivot_gap + lane.col(e)] -= turned[e] * tops[lane.col(e)];
    }
    __syncwarp();
    const LeftRows taken(scratch);
    const bool both = cols > kPanel;
#pragma unroll 2
    for (int i = 0; i < count; i += kPanel) {
        double2 *const low = reinterpret_cast<double2 *>(rows + lane.g * gap + i + 2 * lane.t);
        double2 *const high = reinterpret_cast<double2 *>(rows + (lane.g + 8) * gap + i + 2 * lane.t);
        const double2 first = *low, second = both ? *high : make_double2(0, 0);
        double tile[4] = {first.x, first.y, second.x, second.y};
        taken.multiply(tile, [&](int k, int j) { return V[k * V_gap + i + j]; });
        *low = make_double2(tile[0], tile[1]);
        if (both) *high = make_double2(tile[2], tile[3]);
    }
    __syncwarp();
}

} // namespace fedlora
