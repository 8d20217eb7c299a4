// fedlora_cross_products: X_k^T Y of many blocks with one matrix, in one pass over the blocks.
//
// A strip of Y is widened once into the first-level cache and multiplied there with the strips of all blocks. Matrices
// are cut into chunks of rows that do not depend on the threads; each leaves its products in the workspace, and they are
// added up in order.
#include <omp.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../include/fedlora.h"
#include "panel.h"
#include "partial.h"

namespace {

#include "element.hpp"
#include "strips.hpp"

struct Problem {
    const fedlora_block *X, *products;
    int64_t count;
    fedlora_block Y, squares;
};

// What one chunk leaves, in numbers of float64: squared norms of the blocks and of Y, then the products with padded rows.
int64_t squares_of(int64_t count) { return padded(count + 1); }

int64_t leavings_of(const fedlora_block *X, int64_t count, const fedlora_block &Y) {
    int64_t total = squares_of(count);
    for (int64_t k = 0; k < count; ++k) total += X[k].cols * padded(Y.cols);
    return total;
}

// What one thread needs: a strip of Y and one of the widest block.
int64_t scratch_of(const fedlora_block *X, int64_t count, const fedlora_block &Y) {
    int64_t width = 0;
    for (int64_t k = 0; k < count; ++k) width = larger(width, padded(X[k].cols));
    return kStrip * (padded(Y.cols) + width);
}

FEDLORA_CLONES double sum_of_squares(const double *x, int64_t count) {
    double lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int l = 0; l < kLanes; ++l) lanes[l] += x[i + l] * x[i + l];
    for (; i < count; ++i) lanes[0] += x[i] * x[i];
    double total = 0.0;
    for (int l = 0; l < kLanes; ++l) total += lanes[l];
    return total;
}

// Products += X_k^T Y of a strip whose Y is in `right`; the squared norm of the strip of X_k.
double add(const fedlora_block &X, int64_t i, int64_t first, int64_t rows, const double *right, int64_t width, double *block,
           double *products) {
    if (!by_columns(X)) {
        strip_by_rows(X, i, first, rows, block, X.cols);
        fedlora::panel().add(products, width, block, 1, X.cols, right, width, X.cols, rows, width);
        return sum_of_squares(block, rows * X.cols);
    }
    const int64_t ld = padded(rows);
    strip_by_columns(X, i, first, rows, block, ld);
    fedlora::panel().add(products, width, block, ld, 1, right, width, X.cols, rows, width);
    return sum_of_squares(block, X.cols * ld);
}

void run_chunk(const Problem &p, int64_t i, int64_t chunk, double *scratch, double *leavings) {
    const int64_t width = padded(p.Y.cols), begin = chunk * kChunk, end = smaller(begin + kChunk, p.Y.rows);
    double *const right = scratch, *const block = right + kStrip * width;
    std::memset(leavings, 0, sizeof(double) * (size_t)leavings_of(p.X, p.count, p.Y));
    std::memset(right, 0, sizeof(double) * (size_t)(kStrip * width));
    for (int64_t first = begin; first < end; first += kStrip) {
        const int64_t rows = smaller(kStrip, end - first);
        strip_by_rows(p.Y, i, first, rows, right, width);
        double *products = leavings + squares_of(p.count);
        for (int64_t k = 0; k < p.count; products += p.X[k].cols * width, ++k)
            leavings[k] += add(p.X[k], i, first, rows, right, width, block, products);
        leavings[p.count] += sum_of_squares(right, rows * width);
    }
}

double &number(const fedlora_block &b, int64_t i, int64_t row, int64_t col) {
    return ((double *)b.data)[i * b.batch_stride + row * b.row_stride + col * b.col_stride];
}

void total(const Problem &p, int64_t i, const double *leavings, int64_t size, int64_t chunks) {
    const auto sum = [&](int64_t at) {
        double all = 0.0;
        for (int64_t c = 0; c < chunks; ++c) all += leavings[c * size + at];
        return all;
    };
    for (int64_t k = 0; k <= p.count; ++k) number(p.squares, i, 0, k) = sum(k);
    int64_t at = squares_of(p.count);
    for (int64_t k = 0; k < p.count; ++k)
        for (int64_t row = 0; row < p.X[k].cols; ++row, at += padded(p.Y.cols))
            for (int64_t col = 0; col < p.Y.cols; ++col) number(p.products[k], i, row, col) = sum(at + col);
}

int check(const Problem &p) {
    const int64_t batch = p.Y.batch;
    if (!is_float(p.Y.dtype) || p.squares.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
    if (p.count < 0 || batch < 0 || p.Y.rows < 0 || p.Y.cols < 0) return FEDLORA_BAD_SHAPE;
    if (p.squares.batch != batch || p.squares.rows != 1 || p.squares.cols != p.count + 1) return FEDLORA_BAD_SHAPE;
    for (int64_t k = 0; k < p.count; ++k) {
        const fedlora_block &X = p.X[k], &M = p.products[k];
        if (!is_float(X.dtype) || M.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
        if (X.batch != batch || M.batch != batch || X.rows != p.Y.rows || X.cols < 0 || M.rows != X.cols || M.cols != p.Y.cols)
            return FEDLORA_BAD_SHAPE;
    }
    return FEDLORA_OK;
}

// The workspace: what the chunks of the greatest group leave, then the scratch of every thread; in bytes.
struct Layout {
    int64_t leavings, scratch, threads;
    int64_t bytes() const { return leavings + scratch * threads + 64; }
};

Layout layout_of(const fedlora_block *X, const int64_t *counts, const fedlora_block *Y, int64_t groups, int64_t threads) {
    Layout layout = {0, 0, threads};
    for (int64_t g = 0; g < groups; X += counts[g], ++g) {
        const int64_t tasks = chunks_of(Y[g].rows) * Y[g].batch;
        layout.leavings = larger(layout.leavings, tasks * leavings_of(X, counts[g], Y[g]) * 8);
        layout.scratch = larger(layout.scratch, scratch_of(X, counts[g], Y[g]) * 8);
    }
    return layout;
}

void run_group(const Problem &p, double *leavings, char *scratch, int64_t slice, int threads) {
    const int64_t chunks = chunks_of(p.Y.rows), tasks = chunks * p.Y.batch, size = leavings_of(p.X, p.count, p.Y);
#pragma omp parallel num_threads(tasks < threads ? (tasks > 0 ? (int)tasks : 1) : threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < tasks; ++t)
            run_chunk(p, t / chunks, t % chunks, (double *)(scratch + slice * omp_get_thread_num()), leavings + t * size);
#pragma omp for
        for (int64_t i = 0; i < p.Y.batch; ++i) total(p, i, leavings + i * chunks * size, size, chunks);
    }
}

}  // namespace

extern "C" {

int fedlora_cross_products_workspace(const fedlora_block *X, const int64_t *counts, const fedlora_block *Y, int64_t groups,
                                     int64_t threads, int64_t *bytes) {
    if (!X || !counts || !Y || !bytes || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    *bytes = layout_of(X, counts, Y, groups, threads).bytes();
    return FEDLORA_OK;
}

int fedlora_cross_products(const fedlora_block *X, const int64_t *counts, const fedlora_block *Y, const fedlora_block *products,
                           const fedlora_block *squares, int64_t groups, void *workspace, int64_t workspace_bytes,
                           int64_t threads, void *) {
    if (!X || !counts || !Y || !products || !squares || !workspace || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    int64_t at = 0;
    for (int64_t g = 0; g < groups; at += counts[g], ++g)
        if (const int status = check({X + at, products + at, counts[g], Y[g], squares[g]})) return status;
    const Layout layout = layout_of(X, counts, Y, groups, threads);
    if (workspace_bytes < layout.bytes()) return FEDLORA_BAD_WORKSPACE;
    char *const start = (char *)(((uintptr_t)workspace + 63) / 64 * 64);
    at = 0;
    for (int64_t g = 0; g < groups; at += counts[g], ++g)
        run_group({X + at, products + at, counts[g], Y[g], squares[g]}, (double *)start, start + layout.leavings, layout.scratch, (int)threads);
    return FEDLORA_OK;
}

}  // extern "C"
