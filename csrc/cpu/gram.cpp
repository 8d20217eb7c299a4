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

#include "../include/fedlora.h"
#include "panel.h"

namespace {

#include "element.hpp"
#include "strips.hpp"

constexpr int64_t kPanel = 16;        // columns of a step along the triangle
constexpr int64_t kCache = 32 << 10;  // bytes of a strip
constexpr int64_t kTile = 8;          // of a transposition
constexpr int64_t kWave = 16 << 20;   // bytes of triangles that may wait for their turn

struct Problem {
    const fedlora_block *X;
    int64_t count;
    fedlora_block G;
    int64_t rows() const { return count ? X[0].rows : 0; }
    int64_t batch() const { return G.batch; }
};

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

void run_chunk(const Problem &p, int64_t i, int64_t chunk, double *strip, double *triangle) {
    const int64_t R = p.G.cols, ld = distance_of(R), step = strip_of(ld);
    const int64_t begin = chunk * kChunk, end = smaller(begin + kChunk, p.rows());
    std::memset(triangle, 0, sizeof(double) * (size_t)triangle_of(R));
    for (int64_t first = begin; first < end; first += step) {
        const int64_t rows = smaller(step, end - first);
        double *block = strip;  // what stands in its padding reaches the padding of the triangle alone
        for (int64_t k = 0; k < p.count; block += p.X[k].cols, ++k) widen_strip(p.X[k], i, first, rows, block, ld);
        for (int64_t j = 0; j < R; j += kPanel)
            fedlora::panel().add(triangle + j, ld, strip, 1, ld, strip + j, ld, smaller(j + kPanel, R), rows,
                                 smaller(kPanel, padded(R) - j));
    }
}

// G, or what there is of it, and one chunk more; the last one fills the other side of the diagonal.
void add(const Problem &p, int64_t i, const double *triangle, bool first, bool last) {
    const int64_t R = p.G.cols, ld = distance_of(R), row = p.G.row_stride, col = p.G.col_stride;
    double *const G = (double *)p.G.data + i * p.G.batch_stride;
    for (int64_t a = 0; a < R; ++a)
        for (int64_t b = a; b < R; ++b) {
            double &sum = G[a * row + b * col];
            sum = first ? triangle[a * ld + b] : sum + triangle[a * ld + b];
            if (last) G[b * row + a * col] = sum;
        }
}

int check(const Problem &p) {
    if (p.G.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
    if (p.count < 0 || p.batch() < 0 || p.G.rows < 0 || p.G.rows != p.G.cols) return FEDLORA_BAD_SHAPE;
    int64_t R = 0;
    for (int64_t k = 0; k < p.count; ++k) {
        const fedlora_block &X = p.X[k];
        if (!is_float(X.dtype)) return FEDLORA_BAD_DTYPE;
        if (X.batch != p.batch() || X.rows != p.rows() || X.rows < 0 || X.cols < 0) return FEDLORA_BAD_SHAPE;
        R += X.cols;
    }
    return R == p.G.cols ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

// Chunks between two barriers: some for every thread as long as their triangles are small.
int64_t wave_of(const Problem &p, int64_t threads) {
    const int64_t size = larger(triangle_of(p.G.cols) * 8, 1), tasks = larger(chunks_of(p.rows()), 1) * p.batch();
    return smaller(larger(threads, smaller(4 * threads, kWave / size)), tasks);
}

// The workspace: the triangles of a wave of the greatest group, then a strip for every thread; in bytes.
struct Layout {
    int64_t triangles, strip, threads;
    int64_t bytes() const { return triangles + strip * threads + 64; }
};

Layout layout_of(const fedlora_block *X, const int64_t *counts, const fedlora_block *G, int64_t groups, int64_t threads) {
    Layout layout = {0, 0, threads};
    for (int64_t g = 0; g < groups; X += counts[g], ++g) {
        layout.triangles = larger(layout.triangles, wave_of({X, counts[g], G[g]}, threads) * triangle_of(G[g].cols) * 8);
        layout.strip = larger(layout.strip, scratch_of(G[g].cols) * 8);
    }
    return layout;
}

void run_group(const Problem &p, double *triangles, char *scratch, int64_t slice, int threads) {
    // a matrix without rows is one empty chunk: its G is written all the same
    const int64_t chunks = larger(chunks_of(p.rows()), 1), tasks = chunks * p.batch(), size = triangle_of(p.G.cols);
    const int64_t wave = wave_of(p, threads);
#pragma omp parallel num_threads(tasks < threads ? (tasks > 0 ? (int)tasks : 1) : threads)
    for (int64_t begin = 0; begin < tasks; begin += wave) {
        const int64_t end = smaller(begin + wave, tasks);
#pragma omp for schedule(dynamic)
        for (int64_t t = begin; t < end; ++t)
            run_chunk(p, t / chunks, t % chunks, (double *)(scratch + slice * omp_get_thread_num()), triangles + (t - begin) * size);
#pragma omp for
        for (int64_t i = begin / chunks; i <= (end - 1) / chunks; ++i)
            for (int64_t t = larger(begin, i * chunks); t < smaller(end, (i + 1) * chunks); ++t)
                add(p, i, triangles + (t - begin) * size, t % chunks == 0, t % chunks == chunks - 1);
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
        if (const int status = check({at, counts[g], G[g]})) return status;
    const Layout layout = layout_of(X, counts, G, groups, threads);
    if (workspace_bytes < layout.bytes()) return FEDLORA_BAD_WORKSPACE;
    char *const start = (char *)(((uintptr_t)workspace + 63) / 64 * 64);
    at = X;
    for (int64_t g = 0; g < groups; at += counts[g], ++g)
        run_group({at, counts[g], G[g]}, (double *)start, start + layout.triangles, layout.strip, (int)threads);
    return FEDLORA_OK;
}

}  // extern "C"
