// Pivoted Cholesky elimination of a Gram by one block (docs/numerics.md, Pivoted Cholesky).
//
// What is left of G is brought up to date after every panel of columns; within a panel each column is, when it becomes the pivot.
// Every warp looks for the pivot by itself and the diagonal has two copies that change roles, so that a column takes one barrier.
#pragma once

#include <cmath>

#include "runtime.cuh"

namespace fedlora {

constexpr int kCholeskyThreads = 256;

namespace cholesky {

constexpr double kRoundoff = 0x1p-53, kDone = -HUGE_VAL; // kDone: the diagonal of a former pivot
constexpr int kPanel = 16, kWhole = 48; // columns of a panel; matrices up to kWhole are one
constexpr int kNone = 0x7fffffff;

__host__ __device__ inline int64_t panel_of(int64_t R) { return R <= kWhole ? R : kPanel; }

// Numbers beside G: the panel and two diagonals.
__host__ __device__ inline int64_t beside(int64_t R) { return R * (panel_of(R) + 2); }

// Place of the largest diagonal left, the first of equal ones; kNone where none is above stop or one is NaN. Of a whole warp.
__device__ inline int pivot_of(const double *diag, int R, double stop, double &largest) {
    largest = 0;
    int place = kNone;
    bool unsound = false;
    for (int i = threadIdx.x % kWarp; i < R; i += kWarp) {
        const double d = diag[i];
        unsound |= d != d;
        if (d > largest) {
            largest = d;
            place = i;
        }
    }
    for (int step = kWarp / 2; step > 0; step /= 2) {
        const double other = __shfl_xor_sync(kAllLanes, largest, step);
        const int there = __shfl_xor_sync(kAllLanes, place, step);
        if (other > largest || (other == largest && there < place)) {
            largest = other;
            place = there;
        }
    }
    return __any_sync(kAllLanes, unsound) || !(largest > stop) ? kNone : place;
}

// G -= P^T P, 4 x 4 numbers to a thread of a 64 x 64 tile.
__device__ inline void take_panel(double *G, int64_t ld, const double *P, int R, int columns) {
    constexpr int kSide = 16, kEach = 4, kTile = kSide * kEach;
    const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
    for (int top = 0; top < R; top += kTile)
        for (int left = 0; left < R; left += kTile) {
            double sum[kEach][kEach] = {};
            for (int t = 0; t < columns; ++t) {
                const double *const column = P + (int64_t)t * R;
                double a[kEach], b[kEach];
#pragma unroll
                for (int q = 0; q < kEach; ++q) {
                    const int i = top + y + kSide * q, j = left + x + kSide * q;
                    a[q] = i < R ? column[i] : 0;
                    b[q] = j < R ? column[j] : 0;
                }
#pragma unroll
                for (int q = 0; q < kEach; ++q)
#pragma unroll
                    for (int r = 0; r < kEach; ++r) sum[q][r] += a[q] * b[r];
            }
#pragma unroll
            for (int q = 0; q < kEach; ++q)
#pragma unroll
                for (int r = 0; r < kEach; ++r) {
                    const int i = top + y + kSide * q, j = left + x + kSide * r;
                    if (i < R && j < R) G[i * ld + j] -= sum[q][r];
                }
        }
}

} // namespace cholesky

// L of G = L L^T (R x R, symmetric, rows ld apart) up to a remainder below width u max(diag G); answers its rank. Column k of L, rows in
// the order of G, begins at L + k * col; columns from the rank on are zero. By all kCholeskyThreads threads of a block; G is used up, and
// beside holds as many numbers as cholesky::beside says. What others wrote of G must be seen already.
__device__ inline int pivoted_cholesky(double *G, int64_t ld, int R, double width, double *beside, double *L, int64_t row, int64_t col) {
    using namespace cholesky;
    const int columns = (int)panel_of(R);
    double *const panel = beside, *diag = panel + (int64_t)columns * R, *next = diag + R;
    for (int i = threadIdx.x; i < R; i += blockDim.x) diag[i] = G[i * (ld + 1)];
    __syncthreads();
    double largest;
    pivot_of(diag, R, 0, largest);
    const double stop = largest * width * kRoundoff;
    int rank = 0;
    for (bool open = R > 0; open;) {
        int k = 0;
        for (; k < columns && rank < R; ++k, ++rank) {
            double top;
            const int pivot = pivot_of(diag, R, stop, top);
            open = pivot != kNone;
            if (!open) break;
            const double root = sqrt(top);
            for (int i = threadIdx.x; i < R; i += blockDim.x) {
                const double left = diag[i];
                double x = 0;
                if (i == pivot) {
                    x = root;
                    next[i] = kDone;
                } else if (left == kDone) {
                    next[i] = kDone;
                } else {
                    double sum = G[pivot * ld + i];
                    for (int t = 0; t < k; ++t) sum -= panel[(int64_t)t * R + i] * panel[(int64_t)t * R + pivot];
                    x = sum / root;
                    next[i] = left - x * x;
                }
                panel[(int64_t)k * R + i] = x;
                L[i * row + rank * col] = x;
            }
            __syncthreads();
            double *const former = diag;
            diag = next;
            next = former;
        }
        open &= rank < R;
        if (open) take_panel(G, ld, panel, R, k);
        __syncthreads();
    }
    for (int64_t at = threadIdx.x; at < (int64_t)(R - rank) * R; at += blockDim.x) L[at % R * row + (rank + at / R) * col] = 0;
    return rank;
}

} // namespace fedlora
