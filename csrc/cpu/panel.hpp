// Tiles of C in registers: kRows rows of kVectors native vectors. Included once per instruction set, as simd.hpp is, after
// FEDLORA_VECTOR_BYTES and FEDLORA_PANEL_ROWS are defined.

typedef double V __attribute__((vector_size(FEDLORA_VECTOR_BYTES)));

constexpr int kLanes = FEDLORA_VECTOR_BYTES / 8, kRows = FEDLORA_PANEL_ROWS, kVectors = 2;

inline __attribute__((always_inline)) V load(const double *x) {
    V v;
    __builtin_memcpy(&v, x, sizeof(V));
    return v;
}

inline __attribute__((always_inline)) void store(double *x, V v) { __builtin_memcpy(x, &v, sizeof(V)); }

template <int R, int W>
inline __attribute__((always_inline)) void tile(double *C, int64_t ldc, const double *P, int64_t row, int64_t step,
                                                const double *Q, int64_t ldq, int64_t depth) {
    V c[R][W];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int w = 0; w < W; ++w) c[r][w] = V{};
    for (int64_t d = 0; d < depth; ++d, P += step, Q += ldq) {
        V q[W];
#pragma GCC unroll 2
        for (int w = 0; w < W; ++w) q[w] = load(Q + w * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int w = 0; w < W; ++w) c[r][w] += P[r * row] * q[w];
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int w = 0; w < W; ++w) store(C + r * ldc + w * kLanes, load(C + r * ldc + w * kLanes) + c[r][w]);
}

// Fewer rows than a whole tile has: one function for each number.
template <int R, int W>
inline __attribute__((always_inline)) void last_rows(int64_t rows, double *C, int64_t ldc, const double *P, int64_t row,
                                                     int64_t step, const double *Q, int64_t ldq, int64_t depth) {
    if constexpr (R > 0) {
        if (rows == R)
            tile<R, W>(C, ldc, P, row, step, Q, ldq, depth);
        else
            last_rows<R - 1, W>(rows, C, ldc, P, row, step, Q, ldq, depth);
    }
}

template <int W>
void strip(double *C, int64_t ldc, const double *P, int64_t row, int64_t step, const double *Q, int64_t ldq, int64_t rows,
           int64_t depth) {
    int64_t i = 0;
    if (row == 1)  // a constant distance: addresses need no registers
        for (; i + kRows <= rows; i += kRows) tile<kRows, W>(C + i * ldc, ldc, P + i, 1, step, Q, ldq, depth);
    else
        for (; i + kRows <= rows; i += kRows) tile<kRows, W>(C + i * ldc, ldc, P + i * row, row, step, Q, ldq, depth);
    last_rows<kRows - 1, W>(rows - i, C + i * ldc, ldc, P + i * row, row, step, Q, ldq, depth);
}

void add(double *C, int64_t ldc, const double *P, int64_t row, int64_t step, const double *Q, int64_t ldq, int64_t rows,
         int64_t depth, int64_t cols) {
    int64_t j = 0;
    for (; j + kVectors * kLanes <= cols; j += kVectors * kLanes) strip<kVectors>(C + j, ldc, P, row, step, Q + j, ldq, rows, depth);
    for (; j < cols; j += kLanes) strip<1>(C + j, ldc, P, row, step, Q + j, ldq, rows, depth);
}
