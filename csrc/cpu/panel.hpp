// Tiles of C in registers: kRows rows of kVectors native vectors. Included once per instruction set, as simd.hpp is, after
// FEDLORA_VECTOR_BYTES, FEDLORA_PANEL_ROWS and FEDLORA_PANEL_VECTORS are defined.

typedef double V __attribute__((vector_size(FEDLORA_VECTOR_BYTES)));

constexpr int kLanes = FEDLORA_VECTOR_BYTES / 8, kRows = FEDLORA_PANEL_ROWS, kVectors = FEDLORA_PANEL_VECTORS;

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
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) c[r][w] = V{};
    for (int64_t d = 0; d < depth; ++d, P += step, Q += ldq) {
        V q[W];
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) q[w] = load(Q + w * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int w = 0; w < W; ++w) c[r][w] += P[r * row] * q[w];
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) store(C + r * ldc + w * kLanes, load(C + r * ldc + w * kLanes) + c[r][w]);
}

// One function for each number of rows.
template <int R, int W>
inline __attribute__((always_inline)) void some_rows(int64_t rows, double *C, int64_t ldc, const double *P, int64_t row,
                                                     int64_t step, const double *Q, int64_t ldq, int64_t depth) {
    if constexpr (R > 0) {
        if (rows < R)
            some_rows<R - 1, W>(rows, C, ldc, P, row, step, Q, ldq, depth);
        else if (row == 1)  // a constant distance: addresses need no registers
            tile<R, W>(C, ldc, P, 1, step, Q, ldq, depth);
        else
            tile<R, W>(C, ldc, P, row, step, Q, ldq, depth);
    }
}

// Equal shares of the whole: a tile of few rows is slow.
inline int64_t share(int64_t whole, int64_t most, int64_t at) {
    const int64_t shares = (whole + most - 1) / most;
    return whole * at / shares;
}

template <int W>
void strip(double *C, int64_t ldc, const double *P, int64_t row, int64_t step, const double *Q, int64_t ldq, int64_t rows,
           int64_t depth) {
    for (int64_t t = 0, i = 0, end = 0; i < rows; ++t, i = end) {
        end = share(rows, kRows, t + 1);
        some_rows<kRows, W>(end - i, C + i * ldc, ldc, P + i * row, row, step, Q, ldq, depth);
    }
}

void add(double *C, int64_t ldc, const double *P, int64_t row, int64_t step, const double *Q, int64_t ldq, int64_t rows,
         int64_t depth, int64_t cols) {
    const int64_t vectors = cols / kLanes;
    for (int64_t t = 0, j = 0, end = 0; j < vectors; ++t, j = end) {
        end = share(vectors, kVectors, t + 1);
        double *const c = C + j * kLanes;
        const double *const q = Q + j * kLanes;
        switch (end - j) {
            case 1: strip<1>(c, ldc, P, row, step, q, ldq, rows, depth); break;
            case 2: strip<2>(c, ldc, P, row, step, q, ldq, rows, depth); break;
            default: strip<kVectors>(c, ldc, P, row, step, q, ldq, rows, depth);
        }
    }
}

// Rows of C from r on, H of them, and vectors from w on, W of them.
template <int H, int W>
inline __attribute__((always_inline)) void part_of_tile(double *C, int64_t ldc, const double *P, const double *Q, int64_t gap,
                                                        int64_t depth, bool more) {
    constexpr int kEach = (int)kPad / kLanes;  // vectors of a block
    V c[H][W];
#pragma GCC unroll 16
    for (int r = 0; r < H; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) c[r][w] = V{};
    for (int64_t d = 0; d < depth; ++d, P += kPad, Q += kPad) {
        V q[W];
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) q[w] = load(Q + w / kEach * gap + w % kEach * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < H; ++r)
#pragma GCC unroll 4
            for (int w = 0; w < W; ++w) c[r][w] += P[r] * q[w];
    }
#pragma GCC unroll 16
    for (int r = 0; r < H; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
            double *const to = C + r * ldc + w * kLanes;
            store(to, more ? load(to) + c[r][w] : c[r][w]);
        }
}

template <int W>
inline __attribute__((always_inline)) void whole_tile(double *C, const double *P, const double *Q, int64_t gap, int64_t depth,
                                                      bool more) {
    if constexpr (kLanes == kPad) {
        part_of_tile<8, W>(C, W * kPad, P, Q, gap, depth, more);
    } else {
        for (int w = 0; w < W; ++w)
            for (int64_t l = 0; l < kPad; l += 2 * kLanes)
                for (int r = 0; r < 8; r += 4)
                    part_of_tile<4, 2>(C + r * W * kPad + w * kPad + l, W * kPad, P + r, Q + w * gap + l, gap, depth, more);
    }
}

void tile_of(double *C, const double *P, const double *Q, int64_t gap, int64_t depth, int64_t width, bool more) {
    switch (width) {
        case 1: return whole_tile<1>(C, P, Q, gap, depth, more);
        case 2: return whole_tile<2>(C, P, Q, gap, depth, more);
        default: return whole_tile<3>(C, P, Q, gap, depth, more);
    }
}
