// Tiles of inner products in registers; each call is a short chain from zero, so that long sums are sums of short ones. Included once per instruction set after FEDLORA_DOTS_ROWS and FEDLORA_DOTS_COLS are defined.

typedef double V __attribute__((vector_size(64)));

inline __attribute__((always_inline)) V load(const double *x) {
    V v;
    __builtin_memcpy(&v, x, sizeof(V));
    return v;
}

template <int R, int C>
void tile(double *sums, int64_t gap, const double *X, const double *Y, int64_t ld, int64_t count) {
    V sum[R][C];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) sum[i][j] = V{};
    for (int64_t d = 0; d < count; d += 8) {
        V x[R];
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) x[i] = load(X + i * ld + d);
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) {
            const V y = load(Y + j * ld + d);
#pragma GCC unroll 8
            for (int i = 0; i < R; ++i) sum[i][j] += x[i] * y;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) {
            const V total = load(sums + i * gap + j * 8) + sum[i][j];
            __builtin_memcpy(sums + i * gap + j * 8, &total, sizeof(V));
        }
}

template <int R>
void rows_of_tiles(double *sums, const double *X, const double *Y, int64_t ld, int64_t cols, int64_t count) {
    int64_t j = 0;
    for (; j + FEDLORA_DOTS_COLS <= cols; j += FEDLORA_DOTS_COLS)
        tile<R, FEDLORA_DOTS_COLS>(sums + j * 8, cols * 8, X, Y + j * ld, ld, count);
    for (; j < cols; ++j) tile<R, 1>(sums + j * 8, cols * 8, X, Y + j * ld, ld, count);
}

void add(double *sums, const double *X, const double *Y, int64_t ld, int64_t rows, int64_t cols, int64_t count) {
    int64_t i = 0;
    for (; i + FEDLORA_DOTS_ROWS <= rows; i += FEDLORA_DOTS_ROWS)
        rows_of_tiles<FEDLORA_DOTS_ROWS>(sums + i * cols * 8, X + i * ld, Y, ld, cols, count);
    for (; i < rows; ++i) rows_of_tiles<1>(sums + i * cols * 8, X + i * ld, Y, ld, cols, count);
}
