// Included once per instruction set, as panel.hpp is, after FEDLORA_VECTOR_BYTES is defined.

typedef double V __attribute__((vector_size(FEDLORA_VECTOR_BYTES)));

constexpr int kLanes = FEDLORA_VECTOR_BYTES / 8, kEach = 8 / kLanes;  // vectors of a row
constexpr int kRow = 8 * fedlora::kGroup;  // numbers of a row of U^T A

#define FEDLORA_INLINE inline __attribute__((always_inline))

FEDLORA_INLINE V load(const double *x) {
    V v;
    __builtin_memcpy(&v, x, sizeof(V));
    return v;
}

FEDLORA_INLINE void store(double *x, V v) { __builtin_memcpy(x, &v, sizeof(V)); }

// Vector w of the rows of some panels.
FEDLORA_INLINE int64_t place(int w, int64_t gap) { return w / kEach * gap + w % kEach * kLanes; }

// Rows r .. r + H of U^T A, and vectors w .. w + W, to the same of out, whose rows are kRow long.
template <int H, int W>
FEDLORA_INLINE void project(const double *U, const double *A, int64_t gap, int64_t rows, int w, double *out) {
    V c[H][W];
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 3
        for (int n = 0; n < W; ++n) c[h][n] = V{};
    for (int64_t i = 0; i < rows; ++i, U += 8, A += 8) {
        V a[W];
#pragma GCC unroll 3
        for (int n = 0; n < W; ++n) a[n] = load(A + place(w + n, gap));
#pragma GCC unroll 8
        for (int h = 0; h < H; ++h)
#pragma GCC unroll 3
            for (int n = 0; n < W; ++n) c[h][n] += U[h] * a[n];
    }
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 3
        for (int n = 0; n < W; ++n) store(out + h * kRow + (w + n) * kLanes, c[h][n]);
}

// A -= U W, vectors w .. w + N of A, or A = -U W.
template <int N, bool Fresh = false>
FEDLORA_INLINE void subtract(double *A, int64_t gap, const double *U, int64_t rows, const double *W, int64_t w_row,
                             int64_t w_gap, int w) {
    V m[8][N];
#pragma GCC unroll 8
    for (int h = 0; h < 8; ++h)
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) m[h][n] = load(W + h * w_row + place(w + n, w_gap));
    for (int64_t i = 0; i < rows; ++i, U += 8, A += 8) {
        V a[N];
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) a[n] = Fresh ? V{} : load(A + place(w + n, gap));
#pragma GCC unroll 8
        for (int h = 0; h < 8; ++h)
#pragma GCC unroll 3
            for (int n = 0; n < N; ++n) a[n] -= U[h] * m[h][n];
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) store(A + place(w + n, gap), a[n]);
    }
}

// As many vectors at a time as fit the registers.
FEDLORA_INLINE void subtract_all(double *A, int64_t gap, const double *U, int64_t rows, const double *W, int64_t w_row, int64_t w_gap,
                                 int64_t width) {
    if constexpr (kLanes == 8) {
        switch (width) {
            case 1: return subtract<1>(A, gap, U, rows, W, w_row, w_gap, 0);
            case 2: return subtract<2>(A, gap, U, rows, W, w_row, w_gap, 0);
            default: return subtract<3>(A, gap, U, rows, W, w_row, w_gap, 0);
        }
    } else {
        for (int w = 0; w < width * kEach; ++w) subtract<1>(A, gap, U, rows, W, w_row, w_gap, w);
    }
}

FEDLORA_INLINE void project_all(const double *U, const double *A, int64_t gap, int64_t rows, int64_t width, double *out) {
    if constexpr (kLanes == 8) {
        switch (width) {
            case 1: return project<8, 1>(U, A, gap, rows, 0, out);
            case 2: return project<8, 2>(U, A, gap, rows, 0, out);
            default: return project<8, 3>(U, A, gap, rows, 0, out);
        }
    } else {
        for (int w = 0; w < width * kEach; w += 2)
            for (int h = 0; h < 8; h += 4) project<4, 2>(U + h, A, gap, rows, w, out + h * kRow);
    }
}

void update(double *A, int64_t gap, const double *U, int64_t rows, const double *W, int64_t w_gap, int64_t width) {
    subtract_all(A, gap, U, rows, W, 8, w_gap, width);
}

// turned = T (W + U^T pivot) for the rows of U at the pivots, or with T^T.
FEDLORA_INLINE void turn(const double *block, const double *pivot, int64_t pivot_gap, int64_t width, bool transposed, const double *W,
                         double *turned) {
    const double *const T = block + fedlora::kSquare;
    for (int w = 0; w < width * kEach; ++w) {
        const double *const at = pivot + place(w, pivot_gap);
        V c[8];
#pragma GCC unroll 8
        for (int h = 0; h < 8; ++h) {
            c[h] = load(W + h * kRow + w * kLanes);
#pragma GCC unroll 8
            for (int i = h; i < 8; ++i) c[h] += block[i * 8 + h] * load(at + i * 8);
        }
#pragma GCC unroll 8
        for (int h = 0; h < 8; ++h) {
            V sum{};
            if (transposed) {
#pragma GCC unroll 8
                for (int i = 0; i <= h; ++i) sum += T[h * 8 + i] * c[i];
            } else {
#pragma GCC unroll 8
                for (int i = h; i < 8; ++i) sum += T[i * 8 + h] * c[i];
            }
            store(turned + h * kRow + w * kLanes, sum);
        }
    }
}

void apply(const double *block, const double *U, int64_t rows, double *pivot, int64_t pivot_gap, double *below, int64_t gap,
           int64_t width, bool transposed) {
    alignas(64) double W[8 * kRow], turned[8 * kRow];
    project_all(U, below, gap, rows, width, W);
    turn(block, pivot, pivot_gap, width, transposed, W, turned);
    subtract_all(pivot, pivot_gap, block, 8, turned, kRow, 8, width);
    subtract_all(below, gap, U, rows, turned, kRow, 8, width);
}

void start(const double *block, const double *U, int64_t rows, double *pivot, double *below) {
    alignas(64) double W[8 * kRow] = {}, turned[8 * kRow];
    turn(block, pivot, 0, 1, false, W, turned);
    subtract_all(pivot, 0, block, 8, turned, kRow, 8, 1);
    for (int w = 0; w < kEach; ++w) subtract<1, true>(below, 0, U, rows, turned, kRow, 8, w);
}

// One pass over pivots and the rows below: they lose what column K says, and the next column is multiplied with all of them.
template <int K>
FEDLORA_INLINE void pass(double *pivots, int64_t count, double *below, int64_t rows, const V *lose, double *next) {
    constexpr int column = K + 1;
    V sum[4][kEach];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c)
#pragma GCC unroll 4
        for (int e = 0; e < kEach; ++e) sum[c][e] = V{};
    const auto step = [&](double *row, V *total) __attribute__((always_inline)) {
        V r[kEach];
#pragma GCC unroll 4
        for (int e = 0; e < kEach; ++e) {
            r[e] = load(row + e * kLanes);
            if constexpr (K >= 0) {
                r[e] -= row[K] * lose[e];
            }
        }
#pragma GCC unroll 4
        for (int e = 0; e < kEach; ++e) {
            if (K >= 0) store(row + e * kLanes, r[e]);
            total[e] += r[column / kLanes][column % kLanes] * r[e];
        }
    };
    for (int64_t i = 0; i < count; ++i) step(pivots + i * 8, sum[i % 2]);
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4, below += 32)
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) step(below + c * 8, sum[c]);
    for (; i < rows; ++i, below += 8) step(below, sum[0]);
#pragma GCC unroll 4
    for (int e = 0; e < kEach; ++e) store(next + e * kLanes, (sum[0][e] + sum[1][e]) + (sum[2][e] + sum[3][e]));
}

// Column K of [pivot; below] is reflected onto its pivot, which goes to `diagonal`; in its place stands its part of U. sums[j] is the
// product of column K with column j below the pivot. The products of U's column K with those before it go to `products`.
template <int K>
FEDLORA_INLINE void columns_from(double *pivot, double *below, int64_t rows, const double *sums, double *diagonal, double *tau,
                                 double *products) {
    if constexpr (K < 8) {
        double *const row = pivot + K * 8;
        const double alpha = row[K], rest = sums[K], square = alpha * alpha + rest;
        // Columns have lengths around 1: what is below this is no number of theirs, and its square has lost its digits.
        const bool nothing = rest == 0 || square < 0x1p-900;
        const double length = __builtin_sqrt(square), signed_length = __builtin_copysign(length, alpha);
        const double top = nothing ? 0 : alpha + signed_length;
        tau[K] = nothing ? 0 : 1 / (length * (length + __builtin_fabs(alpha)));
        diagonal[K] = nothing ? alpha : -signed_length;
        V lose[kEach];
#pragma GCC unroll 4
        for (int e = 0; e < kEach; ++e) {
            const V at = load(row + e * kLanes), product = load(sums + e * kLanes) + top * at;
            V right;
#pragma GCC unroll 8
            for (int l = 0; l < kLanes; ++l) right[l] = e * kLanes + l > K;
            store(products + K * 8 + e * kLanes, product);
            lose[e] = tau[K] * right * product;
            store(row + e * kLanes, at - top * lose[e]);
        }
        row[K] = top;
        if (nothing) {
            for (int i = K + 1; i < 8; ++i) pivot[i * 8 + K] = 0;
            for (int64_t i = 0; i < rows; ++i) below[i * 8 + K] = 0;
        }
        if constexpr (K < 7) {
            const double last = row[8 + K];
#pragma GCC unroll 4
            for (int e = 0; e < kEach; ++e) store(row + 8 + e * kLanes, load(row + 8 + e * kLanes) - last * lose[e]);
            alignas(64) double next[8];
            pass<K>(row + 16, 6 - K, below, rows, lose, next);
            columns_from<K + 1>(pivot, below, rows, next, diagonal, tau, products);
        }
    }
}

void factor(double *pivot, double *below, int64_t rows, double *block) {
    alignas(64) double sums[8], products[64];
    double diagonal[8], tau[8], *const T = block + fedlora::kSquare;
    pass<-1>(pivot + 8, 7, below, rows, nullptr, sums);
    columns_from<0>(pivot, below, rows, sums, diagonal, tau, products);
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 8; ++j) {
            block[i * 8 + j] = j <= i ? pivot[i * 8 + j] : 0;
            pivot[i * 8 + j] = j < i ? 0 : j == i ? diagonal[i] : pivot[i * 8 + j];
        }
    // T[:, k] = -tau_k T[:, :k] U^T u_k, by the rows of T^T
    for (int k = 0; k < 8; ++k) {
        double row[8] = {};
        for (int j = 0; j < k; ++j)
            for (int i = 0; i < 8; ++i) row[i] += products[k * 8 + j] * T[j * 8 + i];
        for (int i = 0; i < 8; ++i) T[k * 8 + i] = i == k ? tau[k] : i < k ? -tau[k] * row[i] : 0;
    }
}
