// fedlora_weighted_sum: one pass over the blocks, float64 in registers and first-level cache, no temporary of their size.
//
// Every block is read once and the sum written once, so memory sets the pace. A matrix is cut into chunks of rows that
// do not depend on the threads; each leaves its partial norms in the workspace, and they are added up in order.

// Products and sums must round as they are written: torch's do, and so do those of every instruction set.
#pragma GCC optimize("fp-contract=off")

#include <omp.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../include/fedlora.h"
#include "partial.h"

namespace {

#include "element.hpp"
#include "add.hpp"

struct Problem {
    const fedlora_block *X;
    int64_t count;
    fedlora_block weights, sum, norm, rounding, info, notes;
};

double weight(const Problem &p, int64_t i, int64_t k) {
    return ((const double *)p.weights.data)[i * p.weights.row_stride + k * p.weights.col_stride];
}

bool packed(const fedlora_block &b, int64_t cols) { return b.cols == cols && b.row_stride == cols && b.col_stride == 1; }

// Whether rows follow one another without gaps, in the sum and in every block: then a chunk is one run.
bool is_packed(const Problem &p) {
    bool all = packed(p.sum, p.sum.cols);
    for (int64_t k = 0; k < p.count; ++k) all = all && packed(p.X[k], p.sum.cols);
    return all;
}

// Columns [begin, begin + count) of the run that starts at element (row, 0): packed runs go on over the rows.
void run_tile(const Problem &p, bool packed_run, int64_t i, int64_t row, int64_t begin, int64_t count, Partial &partial) {
    double acc[kTile];
    std::memset(acc, 0, sizeof(double) * (size_t)count);
    for (int64_t k = 0; k < p.count; ++k) {
        const fedlora_block &X = p.X[k];
        const int64_t whole = packed_run ? (X.rows - row) * X.cols : row < X.rows ? X.cols : 0;
        const int64_t there = whole - begin < count ? whole - begin : count;
        if (there <= 0) continue;
        const int64_t offset = i * X.batch_stride + row * X.row_stride + begin * X.col_stride;
        add_any(X.dtype, (const char *)X.data + offset * size_of(X.dtype), X.col_stride, acc, weight(p, i, k), there);
    }
    const int64_t offset = i * p.sum.batch_stride + row * p.sum.row_stride + begin * p.sum.col_stride;
    store_any(p.sum, offset, acc, p.sum.col_stride, count, partial);
}

void run_span(const Problem &p, bool packed_run, int64_t i, int64_t row, int64_t length, Partial &partial) {
    for (int64_t begin = 0; begin < length; begin += kTile)
        run_tile(p, packed_run, i, row, begin, length - begin < kTile ? length - begin : kTile, partial);
}

void run_chunk(const Problem &p, bool packed_run, int64_t i, int64_t chunk, Partial &partial) {
    const int64_t step = rows_of_chunk(p.sum), first = chunk * step;
    const int64_t last = first + step < p.sum.rows ? first + step : p.sum.rows;
    partial = {};
    if (packed_run) return run_span(p, true, i, first, (last - first) * p.sum.cols, partial);
    for (int64_t row = first; row < last; ++row) run_span(p, false, i, row, p.sum.cols, partial);
}

int check(const Problem &p) {
    const int64_t batch = p.sum.batch;
    if (!is_float(p.sum.dtype)) return FEDLORA_BAD_DTYPE;
    if (p.count < 0 || batch < 0 || p.sum.rows < 0 || p.sum.cols < 0) return FEDLORA_BAD_SHAPE;
    if (p.weights.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
    if (p.weights.rows != batch || p.weights.cols != p.count) return FEDLORA_BAD_SHAPE;
    for (int64_t k = 0; k < p.count; ++k) {
        if (!is_float(p.X[k].dtype)) return FEDLORA_BAD_DTYPE;
        const fedlora_block &X = p.X[k];
        if (X.batch != batch || X.rows < 0 || X.cols < 0 || X.rows > p.sum.rows || X.cols > p.sum.cols) return FEDLORA_BAD_SHAPE;
    }
    const bool fit = scalar(p.norm, FEDLORA_FLOAT64, batch) && scalar(p.rounding, FEDLORA_FLOAT64, batch) &&
                     scalar(p.info, FEDLORA_INT32, batch) && scalar(p.notes, FEDLORA_INT32, batch);
    return fit ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

// All chunks of all matrices of a group over the threads, then the matrices' totals.
void run_group(const Problem &p, Partial *partials, int threads) {
    const int64_t chunks = chunks_of(p.sum), tasks = chunks * p.sum.batch;
    const bool packed_run = is_packed(p);
#pragma omp parallel for num_threads(tasks < threads ? (tasks > 0 ? (int)tasks : 1) : threads) schedule(dynamic)
    for (int64_t t = 0; t < tasks; ++t) run_chunk(p, packed_run, t / chunks, t % chunks, partials[t]);
    for (int64_t i = 0; i < p.sum.batch; ++i) finish(p.norm, p.rounding, p.info, p.notes, i, partials + i * chunks, chunks);
}

int64_t workspace_bytes_of(const fedlora_block *sum, int64_t groups) {
    int64_t most = 0;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t tasks = chunks_of(sum[g]) * sum[g].batch;
        most = tasks > most ? tasks : most;
    }
    return most * (int64_t)sizeof(Partial);
}

}  // namespace

extern "C" {

int fedlora_weighted_sum_workspace(const int64_t *counts, const fedlora_block *sum, int64_t groups, int64_t threads, int64_t *bytes) {
    if (!counts || !sum || !bytes || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    *bytes = workspace_bytes_of(sum, groups) + 64;
    return FEDLORA_OK;
}

int fedlora_weighted_sum(const fedlora_block *X, const int64_t *counts, const fedlora_block *weights,
                         const fedlora_block *sum, const fedlora_block *norm, const fedlora_block *rounding,
                         const fedlora_block *info, const fedlora_block *notes, int64_t groups, void *workspace,
                         int64_t workspace_bytes, int64_t threads, void *) {
    if (!X || !counts || !weights || !sum || !norm || !rounding || !info || !notes || !workspace || groups < 0 || threads < 1)
        return FEDLORA_BAD_ARGUMENT;
    const fedlora_block *blocks = X;
    for (int64_t g = 0; g < groups; blocks += counts[g], ++g)
        if (const int status = check({blocks, counts[g], weights[g], sum[g], norm[g], rounding[g], info[g], notes[g]})) return status;
    if (workspace_bytes < workspace_bytes_of(sum, groups) + 64) return FEDLORA_BAD_WORKSPACE;
    Partial *partials = (Partial *)(((uintptr_t)workspace + 63) / 64 * 64);
    blocks = X;
    for (int64_t g = 0; g < groups; blocks += counts[g], ++g)
        run_group({blocks, counts[g], weights[g], sum[g], norm[g], rounding[g], info[g], notes[g]}, partials, (int)threads);
    return FEDLORA_OK;
}

}  // extern "C"
