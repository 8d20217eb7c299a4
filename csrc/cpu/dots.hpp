// Tiles of inner products in registers; each call is a short chain from zero, so that long sums are sums of short ones. Included once
// per instruction set after FEDLORA_DOTS_ROWS and FEDLORA_DOTS_COLS are defined.

typedef double V __attribute__((vector_size(64)));
typedef float Singles __attribute__((vector_size(32)));

inline __attribute__((always_inline)) V load(const double *x) {
    V v;
    __builtin_memcpy(&v, x, sizeof(V));
    return v;
}

inline __attribute__((always_inline)) V load(const float *x) {
    Singles v;
    __builtin_memcpy(&v, x, sizeof v);
    return __builtin_convertvector(v, V);
}

inline __attribute__((always_inline)) void add_to(double *lanes, V v) {
    v += load(lanes);
    __builtin_memcpy(lanes, &v, sizeof(V));
}

// The squares of X or Y are added up on the way where they are asked for.
template <int R, int C, class T>
inline __attribute__((always_inline)) void tile(double *sums, int64_t gap, double *squares_X, double *squares_Y, const T *X, int64_t ldx,
                                                const T *Y, int64_t ldy, int64_t count) {
    V sum[R][C], own_X = {}, own_Y = {};
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) sum[i][j] = V{};
    for (int64_t d = 0; d < count; d += 8) {
        V x[R];
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            x[i] = load(X + i * ldx + d);
            if (squares_X) own_X += x[i] * x[i];
        }
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) {
            const V y = load(Y + j * ldy + d);
            if (squares_Y) own_Y += y * y;
#pragma GCC unroll 8
            for (int i = 0; i < R; ++i) sum[i][j] += x[i] * y;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) add_to(sums + i * gap + j * 8, sum[i][j]);
    if (squares_X) add_to(squares_X, own_X);
    if (squares_Y) add_to(squares_Y, own_Y);
}

// One copy of the loop for each pair of questions, so that no loop asks them.
template <int R, int C, class T>
void tile_of(double *sums, int64_t gap, double *squares_X, double *squares_Y, const T *X, int64_t ldx, const T *Y, int64_t ldy,
             int64_t count) {
    if (squares_X && squares_Y)
        tile<R, C>(sums, gap, squares_X, squares_Y, X, ldx, Y, ldy, count);
    else if (squares_X)
        tile<R, C>(sums, gap, squares_X, nullptr, X, ldx, Y, ldy, count);
    else if (squares_Y)
        tile<R, C>(sums, gap, nullptr, squares_Y, X, ldx, Y, ldy, count);
    else
        tile<R, C>(sums, gap, nullptr, nullptr, X, ldx, Y, ldy, count);
}

template <int R, class T>
void rows_of_tiles(double *sums, double *squares_X, double *squares_Y, const T *X, int64_t ldx, const T *Y, int64_t ldy, int64_t cols,
                   int64_t count) {
    constexpr int C = FEDLORA_DOTS_COLS;
    int64_t j = 0;
    for (; j + C <= cols; j += C)
        tile_of<R, C>(sums + j * 8, cols * 8, j ? nullptr : squares_X, squares_Y, X, ldx, Y + j * ldy, ldy, count);
    for (; j < cols; ++j) tile_of<R, 1>(sums + j * 8, cols * 8, j ? nullptr : squares_X, squares_Y, X, ldx, Y + j * ldy, ldy, count);
}

template <class T>
void add(double *sums, double *squares, const T *X, int64_t ldx, const T *Y, int64_t ldy, int64_t rows, int64_t cols, int64_t count) {
    constexpr int R = FEDLORA_DOTS_ROWS;
    double *const of_Y = squares + 8;
    int64_t i = 0;
    for (; i + R <= rows; i += R)
        rows_of_tiles<R>(sums + i * cols * 8, squares, i ? nullptr : of_Y, X + i * ldx, ldx, Y, ldy, cols, count);
    for (; i < rows; ++i) rows_of_tiles<1>(sums + i * cols * 8, squares, i ? nullptr : of_Y, X + i * ldx, ldx, Y, ldy, cols, count);
}
