// fedlora_cross_products: X_k^T Y of many blocks with one matrix.
//
// Strips of both are widened into the first-level cache and multiplied there: where columns lie together in memory, as inner products along
// them, else as a panel. Matrices are cut into chunks of rows that do not depend on the threads; each leaves its product in
// the workspace, and they are added up in order.
#include "cross.h"

#include <omp.h>

#include <cfloat>
#include <cmath>
#include <cstring>

#include "dots.h"
#include "panel.h"
#include "partial.h"

namespace {

#include "element.hpp"
#include "strips.hpp"

int64_t in_lines(int64_t count) { return (count + 7) / 8 * 8; }

// Several chains at once, added up in order at the end: one would wait for itself.
FEDLORA_CLONES double sum_of_squares(const double *x, int64_t count) {
    constexpr int64_t width = 4 * kLanes;
    double lanes[width] = {};
    int64_t i = 0;
    for (; i + width <= count; i += width)
        for (int64_t l = 0; l < width; ++l) lanes[l] += x[i + l] * x[i + l];
    for (; i < count; ++i) lanes[0] += x[i] * x[i];
    double total = 0.0;
    for (int64_t l = 0; l < width; ++l) total += lanes[l];
    return total;
}

// Largest magnitude; NaN and Inf do not count.
FEDLORA_CLONES double largest_of(const double *x, int64_t stride, int64_t count) {
    double lanes[kLanes] = {};
    for (int64_t begin = 0; begin < count; begin += kLanes) {
        const int64_t end = count - begin < kLanes ? count - begin : kLanes;
        for (int64_t l = 0; l < end; ++l) {
            const double size = std::fabs(x[(begin + l) * stride]);
            lanes[l] = size <= DBL_MAX && size > lanes[l] ? size : lanes[l];
        }
    }
    double largest = 0.0;
    for (int l = 0; l < kLanes; ++l) largest = lanes[l] > largest ? lanes[l] : largest;
    return largest;
}

FEDLORA_CLONES void times(double *x, int64_t count, double first, double second) {
    for (int64_t i = 0; i < count; ++i) x[i] = x[i] * first * second;
}

// x 2^-exponent in two steps, so that the power itself may leave the range.
void scale(double *x, int64_t count, int64_t exponent) {
    const int half = (int)(exponent / 2);
    if (exponent) times(x, count, std::ldexp(1.0, -half), std::ldexp(1.0, half - (int)exponent));
}

bool along_columns(const fedlora::Cross &pair) { return by_columns(pair.X) && by_columns(pair.Y); }

constexpr int64_t kDirect = 8;  // columns; with more of them each number would be widened too often

// Whether the numbers of a column are float32 side by side, so that the inner products need no strip of it.
bool runs_of_float32(const fedlora_block &b) { return b.dtype == FEDLORA_FLOAT32 && b.row_stride == 1; }

// Asks for the next strip of each column; `rest` numbers of each are left, this strip's included.
void ahead(const float *x, int64_t stride, int64_t columns, int64_t rest) {
    const int64_t end = smaller(2 * kStrip, rest);
    for (int64_t j = 0; j < columns; ++j)
        for (int64_t d = kStrip; d < end; d += 16) __builtin_prefetch(x + j * stride + d);
}

}  // namespace

namespace fedlora {

bool Cross::valid() const {
    return X.rows >= 0 && X.cols >= 0 && Y.cols >= 0 && X.batch >= 0 && X.rows == Y.rows && X.batch == Y.batch;
}

int64_t Cross::chunks() const { return larger(chunks_of(X.rows), 1); }

int64_t Cross::leaving() const { return in_lines(X.cols * Y.cols + 2); }

int64_t Cross::scratch() const {
    if (along_columns(*this)) return kStrip * (X.cols + Y.cols) + kDotLanes * X.cols * Y.cols;
    return kStrip * (padded(X.cols) + padded(Y.cols)) + X.cols * padded(Y.cols);
}

void Cross::run(int64_t i, int64_t chunk, int64_t exponent_X, int64_t exponent_Y, double *scratch, double *leaving) const {
    const int64_t begin = chunk * kChunk, end = smaller(begin + kChunk, X.rows), q = X.cols, r = Y.cols;
    const bool along = along_columns(*this), turned = by_columns(X), direct = along && runs_of_float32(X) && runs_of_float32(Y) && larger(q, r) <= kDirect;
    const int64_t width = along ? r : padded(r), ld = kStrip;
    double *const left = scratch, *const right = left + kStrip * (along ? q : padded(q)), *const sums = right + kStrip * width;
    const int64_t lanes = along ? kDotLanes : 1;
    double squares[2 * kDotLanes] = {};
    std::memset(sums, 0, sizeof(double) * (size_t)(q * width * lanes));
    if (!along) std::memset(right, 0, sizeof(double) * (size_t)(kStrip * width));
    for (int64_t first = begin; first < end && q && r; first += kStrip) {
        const int64_t rows = smaller(kStrip, end - first);
        if (direct && rows == kStrip) {
            const float *x = (const float *)X.data + i * X.batch_stride + first, *y = (const float *)Y.data + i * Y.batch_stride + first;
            ahead(x, X.col_stride, q, end - first);
            // every few columns of X meet all of Y, which lie together in the first-level cache then, however far apart in memory
            for (int64_t j = 0; j < r; ++j) std::memcpy((float *)right + j * kStrip, y + j * Y.col_stride, sizeof(float) * kStrip);
            dots().single(sums, squares, x, X.col_stride, (const float *)right, kStrip, q, r, kStrip);
            continue;
        }
        // a strip by columns is padded with zeros, here to the full distance of columns
        const int64_t size_X = turned ? q * ld : rows * q, size_Y = along ? r * ld : rows * width;
        if (rows < kStrip && turned) std::memset(left, 0, sizeof(double) * (size_t)size_X);
        if (rows < kStrip && along) std::memset(right, 0, sizeof(double) * (size_t)size_Y);
        turned ? strip_by_columns(X, i, first, rows, left, ld) : strip_by_rows(X, i, first, rows, left, q);
        along ? strip_by_columns(Y, i, first, rows, right, ld) : strip_by_rows(Y, i, first, rows, right, width);
        scale(left, size_X, exponent_X);
        scale(right, size_Y, exponent_Y);
        if (along) {
            dots().wide(sums, squares, left, ld, right, ld, q, r, padded(rows));
        } else {
            squares[0] += sum_of_squares(left, size_X);
            squares[kDotLanes] += sum_of_squares(right, size_Y);
            panel().add(sums, width, left, turned ? ld : 1, turned ? 1 : q, right, width, q, rows, width);
        }
    }
    const auto total = [](const double *x, int64_t count) {
        double sum = 0.0;
        for (int64_t l = 0; l < count; ++l) sum += x[l];
        return sum;
    };
    for (int64_t row = 0; row < q; ++row)
        for (int64_t col = 0; col < r; ++col) leaving[row * r + col] = total(sums + (row * width + col) * lanes, lanes);
    leaving[q * r] = total(squares, kDotLanes);
    leaving[q * r + 1] = total(squares + kDotLanes, kDotLanes);
}

double Cross::add(double *leavings) const {
    const int64_t size = X.cols * Y.cols;
    for (int64_t c = 1; c < chunks(); ++c)
        for (int64_t e = 0; e < size + 2; ++e) leavings[e] += leavings[c * leaving() + e];
    return std::sqrt(leavings[size]) * std::sqrt(leavings[size + 1]);
}

int64_t exponent_of(const fedlora_block &X, int64_t i) {
    if (X.dtype != FEDLORA_FLOAT64) return 0;
    double largest = 0.0;
    const bool turned = by_columns(X);
    for (int64_t line = 0; line < (turned ? X.cols : X.rows); ++line) {
        const double *x = (const double *)X.data + i * X.batch_stride + line * (turned ? X.col_stride : X.row_stride);
        const double own = turned ? largest_of(x, X.row_stride, X.rows) : largest_of(x, X.col_stride, X.cols);
        largest = own > largest ? own : largest;
    }
    int exponent = 0;
    std::frexp(largest, &exponent);
    return exponent;
}

}  // namespace fedlora

namespace {

using fedlora::Cross;

struct Problem {
    const fedlora_block *X, *products, *sizes, *exponents;
    int64_t count;
    fedlora_block Y;
    Cross pair(int64_t k) const { return {X[k], Y}; }
};

int check(const Problem &p) {
    if (!is_float(p.Y.dtype)) return FEDLORA_BAD_DTYPE;
    if (p.count < 0) return FEDLORA_BAD_SHAPE;
    const int64_t batch = p.Y.batch;
    for (int64_t k = 0; k < p.count; ++k) {
        const fedlora_block &M = p.products[k];
        if (!is_float(p.X[k].dtype) || M.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
        if (!p.pair(k).valid() || M.batch != batch || M.rows != p.X[k].cols || M.cols != p.Y.cols) return FEDLORA_BAD_SHAPE;
        if (!scalar(p.sizes[k], FEDLORA_FLOAT64, batch) || !scalar(p.exponents[k], FEDLORA_INT32, batch)) return FEDLORA_BAD_SHAPE;
    }
    return FEDLORA_OK;
}

// The workspace: exponents of the blocks and of Y of every problem, what the chunks of the greatest group leave, then the scratch of
// every thread; in bytes.
struct Layout {
    int64_t exponents, leavings, scratch, threads;
    int64_t bytes() const { return exponents + leavings + scratch * threads + 64; }
};

// What all chunks of one problem leave, block after block.
int64_t leavings_of(const Problem &p) {
    int64_t total = 0;
    for (int64_t k = 0; k < p.count; ++k) total += p.pair(k).leaving() * p.pair(k).chunks();
    return total;
}

Layout layout_of(const fedlora_block *X, const int64_t *counts, const fedlora_block *Y, int64_t groups, int64_t threads) {
    Layout layout = {0, 0, 0, threads};
    for (int64_t g = 0; g < groups; X += counts[g], ++g) {
        const Problem p = {X, nullptr, nullptr, nullptr, counts[g], Y[g]};
        layout.exponents = larger(layout.exponents, in_lines((p.count + 1) * p.Y.batch) * 8);
        layout.leavings = larger(layout.leavings, leavings_of(p) * p.Y.batch * 8);
        for (int64_t k = 0; k < p.count; ++k) layout.scratch = larger(layout.scratch, in_lines(p.pair(k).scratch()) * 8);
    }
    return layout;
}

double &number(const fedlora_block &b, int64_t i, int64_t row, int64_t col) {
    return ((double *)b.data)[i * b.batch_stride + row * b.row_stride + col * b.col_stride];
}

void finish(const Problem &p, int64_t i, int64_t k, const int64_t *exponents, double *leavings) {
    element<double>(p.sizes[k], i) = p.pair(k).add(leavings);
    element<int32_t>(p.exponents[k], i) = (int32_t)(exponents[k] + exponents[p.count]);
    for (int64_t row = 0; row < p.X[k].cols; ++row)
        for (int64_t col = 0; col < p.Y.cols; ++col) number(p.products[k], i, row, col) = *leavings++;
}

void run_group(const Problem &p, int64_t *exponents, double *leavings, char *scratch, int64_t slice, int threads) {
    const int64_t batch = p.Y.batch, chunks = Cross{p.Y, p.Y}.chunks(), pairs = p.count * batch, each = leavings_of(p), given = p.count + 1;
    const auto place = [&](int64_t i, int64_t k) {
        double *at = leavings + i * each;
        for (int64_t o = 0; o < k; ++o) at += p.pair(o).leaving() * chunks;
        return at;
    };
    const int64_t tasks = pairs * chunks;
#pragma omp parallel num_threads(tasks < threads ? (tasks > 0 ? (int)tasks : 1) : threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < batch * given; ++t) exponents[t] = fedlora::exponent_of(t % given < p.count ? p.X[t % given] : p.Y, t / given);
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < tasks; ++t) {
            const int64_t chunk = t % chunks, k = t / chunks % p.count, i = t / chunks / p.count;
            const int64_t *own = exponents + i * given;
            p.pair(k).run(i, chunk, own[k], own[p.count], (double *)(scratch + slice * omp_get_thread_num()),
                          place(i, k) + chunk * p.pair(k).leaving());
        }
#pragma omp for
        for (int64_t t = 0; t < pairs; ++t) finish(p, t / p.count, t % p.count, exponents + t / p.count * given, place(t / p.count, t % p.count));
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
                           const fedlora_block *sizes, const fedlora_block *exponents, int64_t groups, void *workspace,
                           int64_t workspace_bytes, int64_t threads, void *) {
    if (!X || !counts || !Y || !products || !sizes || !exponents || !workspace || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    int64_t at = 0;
    for (int64_t g = 0; g < groups; at += counts[g], ++g)
        if (const int status = check({X + at, products + at, sizes + at, exponents + at, counts[g], Y[g]})) return status;
    const Layout layout = layout_of(X, counts, Y, groups, threads);
    if (workspace_bytes < layout.bytes()) return FEDLORA_BAD_WORKSPACE;
    char *const start = (char *)(((uintptr_t)workspace + 63) / 64 * 64), *const leavings = start + layout.exponents;
    at = 0;
    for (int64_t g = 0; g < groups; at += counts[g], ++g)
        run_group({X + at, products + at, sizes + at, exponents + at, counts[g], Y[g]}, (int64_t *)start, (double *)leavings,
                  leavings + layout.leavings, layout.scratch, (int)threads);
    return FEDLORA_OK;
}

}  // extern "C"
