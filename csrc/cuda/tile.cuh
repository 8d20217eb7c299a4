// Products of small tiles in float64 by one warp, on the tensor cores where there are some for float64.
//
// A warp holds C as tiles of 16 x 8. Lane 4 g + t has, of each, rows g (entries 0, 1) and g + 8 (entries 2, 3) of columns 2 t and
// 2 t + 1. A operand of 16 rows and S slices of four k lies as rows g and g + 8, k = t + 4 s; one of 8 columns as column g, k = t + 4 s.
// So a lane that has columns g, g + 8, ... of X for its k has both operands of X^T X. sm_80 multiplies 8 x 8 x 4, two to a tile, in
// the same layout, and sm_100 makes that of whatever it is asked for. Elsewhere every lane adds up its entries one by one, k rising.
#pragma once

#include "runtime.cuh"

namespace fedlora {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define FEDLORA_TENSOR_FLOAT64 1
#endif

struct LaneOfTile {
    int g, t;
    __device__ LaneOfTile() : g((int)(threadIdx.x % kWarp) / 4), t((int)threadIdx.x % 4) {}
    // Where entry e of a tile is.
    __device__ int row(int e) const { return g + 8 * (e >> 1); }
    __device__ int col(int e) const { return 2 * t + (e & 1); }
};

#ifdef FEDLORA_TENSOR_FLOAT64
// c += a b over S slices, a by rows g and g + 8.
template <int S>
__device__ __forceinline__ void multiply_tile(double (&c)[4], const double (&low)[S], const double (&high)[S], const double (&b)[S]) {
#if __CUDA_ARCH__ >= 900
    static_assert(S == 2 || S == 4, "what mma can multiply at once");
    if constexpr (S == 4)
        asm("mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7, %8, %9, %10, %11}, "
            "{%12, %13, %14, %15}, {%0, %1, %2, %3};"
            : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
            : "d"(low[0]), "d"(high[0]), "d"(low[1]), "d"(high[1]), "d"(low[2]), "d"(high[2]), "d"(low[3]), "d"(high[3]), "d"(b[0]),
              "d"(b[1]), "d"(b[2]), "d"(b[3]));
    else
        asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
            : "d"(low[0]), "d"(high[0]), "d"(low[1]), "d"(high[1]), "d"(b[0]), "d"(b[1]));
#else
#pragma unroll
    for (int s = 0; s < S; ++s) {
        asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+d"(c[0]), "+d"(c[1])
            : "d"(low[s]), "d"(b[s]));
        asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+d"(c[2]), "+d"(c[3])
            : "d"(high[s]), "d"(b[s]));
    }
#endif
}
#endif

// c += left right, 16 M x 8 N, over 4 S k: left(row, k), right(k, col). All lanes of a warp take part.
template <int S, int M, int N, class Left, class Right>
__device__ __forceinline__ void multiply(double (&c)[M][N][4], const Left &left, const Right &right) {
    const LaneOfTile lane;
#ifdef FEDLORA_TENSOR_FLOAT64
    double low[M][S], high[M][S];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int s = 0; s < S; ++s) {
            low[m][s] = left(16 * m + lane.g, lane.t + 4 * s);
            high[m][s] = left(16 * m + lane.g + 8, lane.t + 4 * s);
        }
#pragma unroll
    for (int n = 0; n < N; ++n) {
        double b[S];
#pragma unroll
        for (int s = 0; s < S; ++s) b[s] = right(lane.t + 4 * s, 8 * n + lane.g);
#pragma unroll
        for (int m = 0; m < M; ++m) multiply_tile<S>(c[m][n], low[m], high[m], b);
    }
#else
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n)
            for (int e = 0; e < 4; ++e)
                for (int k = 0; k < 4 * S; ++k)
                    c[m][n][e] = fma(left(16 * m + lane.row(e), k), right(k, 8 * n + lane.col(e)), c[m][n][e]);
#endif
}

// Tiles of X^T X on and above the diagonal, for X with 8 V columns, and the row of tiles and column of tiles of one of them.
constexpr int upper_tiles(int V) { return V * (V + 2) / 4; }
__host__ __device__ constexpr int upper_tile(int V, int m, int n) { return m * (V - m + 1) + n - 2 * m; }

// c += X^T X, over 4 S k: x(k, col). Entries below the diagonal of a tile on it are there as well.
template <int S, int V, class Value>
__device__ __forceinline__ void multiply_upper(double (&c)[upper_tiles(V)][4], const Value &x) {
    const LaneOfTile lane;
#ifdef FEDLORA_TENSOR_FLOAT64
    double own[V][S];
#pragma unroll
    for (int v = 0; v < V; ++v)
#pragma unroll
        for (int s = 0; s < S; ++s) own[v][s] = x(lane.t + 4 * s, 8 * v + lane.g);
#pragma unroll
    for (int m = 0; m < V / 2; ++m)
#pragma unroll
        for (int n = 2 * m; n < V; ++n) multiply_tile<S>(c[upper_tile(V, m, n)], own[2 * m], own[2 * m + 1], own[n]);
#else
    for (int m = 0; m < V / 2; ++m)
        for (int n = 2 * m; n < V; ++n)
            for (int e = 0; e < 4; ++e)
                for (int k = 0; k < 4 * S; ++k) {
                    double &sum = c[upper_tile(V, m, n)][e];
                    sum = fma(x(k, 16 * m + lane.row(e)), x(k, 8 * n + lane.col(e)), sum);
                }
#endif
}

// Copies from global to shared memory that run on their own, in groups of each thread. `bytes` of the first argument's size are
// there to be read, the rest becomes zero; both addresses are multiples of that size.
template <int Size>
__device__ __forceinline__ void copy_async(void *shared, const void *global, int bytes) {
    static_assert(Size == 4 || Size == 8 || Size == 16, "what cp.async can copy");
#ifdef FEDLORA_TENSOR_FLOAT64
    const unsigned there = (unsigned)__cvta_generic_to_shared(shared);
    if constexpr (Size == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(there), "l"(global), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(there), "l"(global), "n"(Size), "r"(bytes) : "memory");
#else
    // An address that the device refuses gives wrong numbers here.
    const auto aligned = [](const void *address) { return reinterpret_cast<uintptr_t>(address) / Size * Size; };
    unsigned char *const to = reinterpret_cast<unsigned char *>(aligned(shared));
    const unsigned char *const from = reinterpret_cast<const unsigned char *>(aligned(global));
    for (int i = 0; i < Size; ++i) to[i] = i < bytes ? from[i] : (unsigned char)0;
#endif
}

__device__ __forceinline__ void close_group() {
#ifdef FEDLORA_TENSOR_FLOAT64
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most so many of the thread's newest groups are on their way.
template <int Groups>
__device__ __forceinline__ void wait_groups() {
#ifdef FEDLORA_TENSOR_FLOAT64
    asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
#endif
}

} // namespace fedlora
