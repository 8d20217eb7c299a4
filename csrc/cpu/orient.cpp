// fedlora_orient: columns turned so that their largest element is positive.
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "../include/fedlora.h"

namespace {

#ifdef __x86_64__
#define FEDLORA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FEDLORA_CLONES
#endif

constexpr double kTie = 1 - 0x1p-20;  // docs/numerics.md, Sign rule
constexpr int64_t kColumns = 64;      // of a step: their state stays on the stack

// Up to kColumns columns of one matrix.
template <class T>
inline void orient(T *x, int64_t row, int64_t col, int64_t rows, int64_t cols, double *signs, int64_t step) {
    T bar[kColumns] = {}, sign[kColumns];
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) {
            const T size = std::fabs(x[i * row + j * col]);
            bar[j] = size > bar[j] ? size : bar[j];
        }
    for (int64_t j = 0; j < cols; ++j) bar[j] *= (T)kTie, sign[j] = 1;
    int64_t open = cols;
    for (int64_t i = 0; i < rows && open > 0; ++i) {
        int reached = 0;
        for (int64_t j = 0; j < cols; ++j) reached |= std::fabs(x[i * row + j * col]) >= bar[j];
        for (int64_t j = 0; reached && j < cols; ++j)
            if (std::fabs(x[i * row + j * col]) >= bar[j]) {
                sign[j] = x[i * row + j * col] < 0 ? -1 : 1;
                bar[j] = (T)INFINITY;
                --open;
            }
    }
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) x[i * row + j * col] *= sign[j];
    for (int64_t j = 0; j < cols; ++j) signs[j * step] = (double)sign[j];
}

// A distance that the compiler knows is one that it can vectorise.
#define FEDLORA_ORIENT(name, T)                                                                                             \
    FEDLORA_CLONES void name(T *x, int64_t row, int64_t col, int64_t rows, int64_t cols, double *signs, int64_t step) { \
        if (col == 1)                                                                                                       \
            orient(x, row, 1, rows, cols, signs, step);                                                                     \
        else                                                                                                                \
            orient(x, row, col, rows, cols, signs, step);                                                                   \
    }
FEDLORA_ORIENT(orient_float32, float)
FEDLORA_ORIENT(orient_float64, double)

void run(const fedlora_block &X, const fedlora_block &signs, int64_t i) {
    for (int64_t j = 0; j < X.cols; j += kColumns) {
        const int64_t cols = X.cols - j < kColumns ? X.cols - j : kColumns, offset = i * X.batch_stride + j * X.col_stride;
        double *const out = (double *)signs.data + i * signs.batch_stride + j * signs.col_stride;
        if (X.dtype == FEDLORA_FLOAT32)
            orient_float32((float *)X.data + offset, X.row_stride, X.col_stride, X.rows, cols, out, signs.col_stride);
        else
            orient_float64((double *)X.data + offset, X.row_stride, X.col_stride, X.rows, cols, out, signs.col_stride);
    }
}

int check(const fedlora_block &X, const fedlora_block &signs) {
    if ((X.dtype != FEDLORA_FLOAT32 && X.dtype != FEDLORA_FLOAT64) || signs.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
    if (X.batch < 0 || X.rows < 0 || X.cols < 0) return FEDLORA_BAD_SHAPE;
    return signs.batch == X.batch && signs.rows == 1 && signs.cols == X.cols ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

}  // namespace

extern "C" int fedlora_orient(const fedlora_block *X, const fedlora_block *signs, int64_t groups, int64_t threads, void *) {
    if (!X || !signs || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    for (int64_t g = 0; g < groups; ++g)
        if (const int status = check(X[g], signs[g])) return status;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t batch = X[g].batch;
#pragma omp parallel for num_threads(batch < threads ? (batch > 0 ? (int)batch : 1) : (int)threads) schedule(dynamic)
        for (int64_t i = 0; i < batch; ++i) run(X[g], signs[g], i);
    }
    return FEDLORA_OK;
}
