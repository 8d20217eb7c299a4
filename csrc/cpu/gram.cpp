// fedlora_gram: X^T X of blocks side by side, in one pass over the blocks.
//
// A strip of all blocks is widened into the first-level cache and multiplied there with itself, above the diagonal only.
// Matrices are cut into chunks of rows that do not depend on the threads; each leaves its triangle in the workspace, and
// they are added up in order, a few at a time.
#include <omp.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "gram.h"
#include "panel.h"
#include "partial.h"

namespace {

#include "element.hpp"
#include "strips.hpp"

constexpr int64_t kPanel = 16;        // columns of a step along the triangle
constexpr int64_t kCache = 32 << 10;  // bytes of a strip
constexpr int64_t kTile = 8;          // of a transposition
constexpr int64_t kWave = 16 << 20;   // bytes of triangles that may wait for their turn

// Distance of rows: an odd number of cache lines, so that the rows of a strip do not share their places in the cache.
int64_t distance_of(int64_t R) { return padded(R) | fedlora::kPad; }

int64_t strip_of(int64_t ld) { return larger(16, smaller(kStrip, kCache / 8 / ld / 16 * 16)); }

int64_t triangle_of(int64_t R) { return R * distance_of(R); }

int64_t scratch_of(int64_t R) { return strip_of(distance_of(R)) * distance_of(R); }

// out[i * ld + j] = x[i * row + j * col] for count rows of cols numbers.
template <class T>
inline void widen_rows(double *out, int64_t ld, const T *x, int64_t row, int64_t col, int64_t count, int64_t cols) {
    if (col == 1) {
        for (int64_t i = 0; i < count; ++i)
            for (int64_t j = 0; j < cols; ++j) out[i * ld + j] = widen(x[i * row + j]);
        return;
    }
    int64_t first = 0;
    for (; row == 1 && first + kTile <= cols; first += kTile)  // tiles: columns are read and rows are written by whole lines
        for (int64_t begin = 0; begin < count; begin += kTile) {
            const int64_t end = smaller(begin + kTile, count);
            for (int64_t i = begin; i < end; ++i)
#pragma GCC unroll 8
                for (int64_t j = 0; j < kTile; ++j) out[i * ld + first + j] = widen(x[i + (first + j) * col]);
        }
    for (int64_t j = first; j < cols; ++j)
        for (int64_t i = 0; i < count; ++i) out[i * ld + j] = widen(x[i * row + j * col]);
}

#define FEDLORA_WIDEN(name, T)                                                                                              \
    FEDLORA_CLONES void name(double *out, int64_t ld, const T *x, int64_t row, int64_t col, int64_t count, int64_t cols) { \
        widen_rows(out, ld, x, row, col, count, cols);                                                                      \
    }
FEDLORA_WIDEN(widen_float32, float)
FEDLORA_WIDEN(widen_float64, double)
FEDLORA_WIDEN(widen_bfloat16, Bfloat16)
FEDLORA_WIDEN(widen_float16, Float16)

void widen_strip(const fedlora_block &X, int64_t i, int64_t first, int64_t count, double *out, int64_t ld) {
    const int64_t row = X.row_stride, col = X.col_stride;
    const char *x = (const char *)X.data + (i * X.batch_stride + first * row) * size_of(X.dtype);
    switch (X.dtype) {
        case FEDLORA_FLOAT64: return widen_float64(out, ld, (const double *)x, row, col, count, X.cols);
        case FEDLORA_FLOAT32: return widen_float32(out, ld, (const float *)x, row, col, count, X.cols);
        case FEDLORA_BFLOAT16: return widen_bfloat16(out, ld, (const Bfloat16 *)x, row, col, count, X.cols);
        default: return widen_float16(out, ld, (const Float16 *)x, row, col, count, X.cols);
    }
}

// Columns of a strip times powers of two, or whatever the scale holds.
FEDLORA_CLONES void scale_strip(double *strip, int64_t ld, int64_t rows, int64_t R, const double *scale, int64_t step) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t j = 0; j < R; ++j) strip[row * ld + j] *= scale[j * step];
}

}  // namespace

namespace fedlora {

int Gram::status() const {
    const int64_t batch = G.batch, rows = count > 0 ? X[0].rows : 0;
    if (G.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
    if (count < 0 || batch < 0 || G.rows < 0 || G.rows != G.cols) return FEDLORA_BAD_SHAPE;
    int64_t R = 0;
    for (int64_t k = 0; k < count; ++k) {
        if (!is_float(X[k].dtype)) return FEDLORA_BAD_DTYPE;
        if (X[k].batch != batch || X[k].rows != rows || rows < 0 || X[k].cols < 0) return FEDLORA_BAD_SHAPE;
        R += X[k].cols;
    }
    if (R != G.cols) return FEDLORA_BAD_SHAPE;
    return scale_status(scale, R, batch);
}

// A matrix without rows is one empty chunk: its G is written all the same.
int64_t Gram::chunks() const { return larger(chunks_of(count ? X[0].rows : 0), 1); }

int64_t Gram::leaving() const { return triangle_of(G.cols); }

int64_t Gram::scratch() const { return scratch_of(G.cols); }

void Gram::run(int64_t i, int64_t chunk, double *scratch, double *leaving) const {
    const int64_t R = G.cols, ld = distance_of(R), step = strip_of(ld), all = count ? X[0].rows : 0;
    const int64_t begin = chunk * kChunk, end = smaller(begin + kChunk, all);
    std::memset(leaving, 0, sizeof(double) * (size_t)triangle_of(R));
    for (int64_t first = begin; first < end; first += step) {
        const int64_t rows = smaller(step, end - first);
        double *block = scratch;  // what stands in its padding reaches the padding of the triangle alone
        for (int64_t k = 0; k < count; block += X[k].cols, ++k) widen_strip(X[k], i, first, rows, block, ld);
        if (scale.rows) scale_strip(scratch, ld, rows, R, scale_of(scale, i), scale.col_stride);
        for (int64_t j = 0; j < R; j += kPanel)
            panel().add(leaving + j, ld, scratch, 1, ld, scratch + j, ld, smaller(j + kPanel, R), rows, smaller(kPanel, padded(R) - j));
    }
}

void Gram::add(int64_t i, int64_t chunk, const double *leaving) const {
    const int64_t R = G.cols, ld = distance_of(R), row = G.row_stride, col = G.col_stride;
    const bool first = chunk == 0, last = chunk == chunks() - 1;
    double *const out = (double *)G.data + i * G.batch_stride;
    for (int64_t a = 0; a < R; ++a)
        for (int64_t b = a; b < R; ++b) {
            double &sum = out[a * row + b * col];
            sum = first ? leaving[a * ld + b] : sum + leaving[a * ld + b];
            if (last) out[b * row + a * col] = sum;
        }
}

}  // namespace fedlora

namespace {

using fedlora::Gram;

// Chunks between two barriers: some for every thread as long as their triangles are small.
int64_t wave_of(const Gram &gram, int64_t threads) {
    const int64_t size = larger(gram.leaving() * 8, 1), tasks = gram.chunks() * gram.G.batch;
    return smaller(larger(threads, smaller(4 * threads, kWave / size)), tasks);
}

// The workspace: what a wave of the greatest group leaves, then the scratch of every thread; in bytes.
struct Layout {
    int64_t leavings, scratch, threads;
    int64_t bytes() const { return leavings + scratch * threads + 64; }
};

Layout layout_of(const fedlora_block *X, const int64_t *counts, const fedlora_block *G, int64_t groups, int64_t threads) {
    Layout layout = {0, 0, threads};
    for (int64_t g = 0; g < groups; X += counts[g], ++g) {
        const Gram gram = {X, counts[g], {}, G[g]};
        layout.leavings = larger(layout.leavings, wave_of(gram, threads) * gram.leaving() * 8);
        layout.scratch = larger(layout.scratch, gram.scratch() * 8);
    }
    return layout;
}

void run_group(const Gram &gram, double *leavings, char *scratch, int64_t slice, int threads) {
    const int64_t chunks = gram.chunks(), tasks = chunks * gram.G.batch, size = gram.leaving(), wave = wave_of(gram, threads);
#pragma omp parallel num_threads(tasks < threads ? (tasks > 0 ? (int)tasks : 1) : threads)
    for (int64_t begin = 0; begin < tasks; begin += wave) {
        const int64_t end = smaller(begin + wave, tasks);
#pragma omp for schedule(dynamic)
        for (int64_t t = begin; t < end; ++t)
            gram.run(t / chunks, t % chunks, (double *)(scratch + slice * omp_get_thread_num()), leavings + (t - begin) * size);
#pragma omp for
        for (int64_t i = begin / chunks; i <= (end - 1) / chunks; ++i)
            for (int64_t t = larger(begin, i * chunks); t < smaller(end, (i + 1) * chunks); ++t)
                gram.add(i, t % chunks, leavings + (t - begin) * size);
    }
}

}  // namespace

extern "C" {

int fedlora_gram_workspace(const fedlora_block *X, const int64_t *counts, const fedlora_block *G, int64_t groups,
                           int64_t threads, int64_t *bytes) {
    if (!X || !counts || !G || !bytes || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    *bytes = layout_of(X, counts, G, groups, threads).bytes();
    return FEDLORA_OK;
}

int fedlora_gram(const fedlora_block *X, const int64_t *counts, const fedlora_block *G, int64_t groups, void *workspace,
                 int64_t workspace_bytes, int64_t threads, void *) {
    if (!X || !counts || !G || !workspace || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    const fedlora_block *at = X;
    for (int64_t g = 0; g < groups; at += counts[g], ++g)
        if (const int status = Gram{at, counts[g], {}, G[g]}.status()) return status;
    const Layout layout = layout_of(X, counts, G, groups, threads);
    if (workspace_bytes < layout.bytes()) return FEDLORA_BAD_WORKSPACE;
    char *const start = (char *)(((uintptr_t)workspace + 63) / 64 * 64);
    at = X;
    for (int64_t g = 0; g < groups; at += counts[g], ++g)
        run_group({at, counts[g], {}, G[g]}, (double *)start, start + layout.leavings, layout.scratch, (int)threads);
    return FEDLORA_OK;
}

}  // extern "C"
