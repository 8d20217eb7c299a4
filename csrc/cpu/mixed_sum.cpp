// fedlora_mixed_sum: blocks times small matrices, added up in one pass over the blocks.
//
// A strip of every block is widened into the first-level cache and multiplied there; the sum of the strip stays beside
// it, so blocks are read once and the sum is written once. Matrices are cut into chunks of rows that do not depend on the
// threads; each leaves its partial norms in the workspace, and they are added up in order.
#include <omp.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "mixed_sum.h"
#include "panel.h"

namespace {

#include "element.hpp"
#include "strips.hpp"

// Numbers of float64 that one thread needs.
struct Scratch {
    int64_t mixers, block, sum;
    int64_t total() const { return mixers + block + sum; }
};

Scratch scratch_of(const fedlora_block *mixers, int64_t count, const fedlora_block &sum) {
    int64_t width = padded(sum.cols), rows = 0;
    for (int64_t k = 0; k < count; ++k) {
        width = larger(width, padded(mixers[k].rows));
        rows += mixers[k].rows;
    }
    return {rows * padded(sum.cols), kStrip * width, kStrip * padded(sum.cols)};
}

// The matrix in float64 with padded rows.
void widen_mixer(const fedlora_block &mixer, int64_t i, double *out, int64_t ld) {
    for (int64_t row = 0; row < mixer.rows; ++row, out += ld) {
        spread_any(mixer, i * mixer.batch_stride + row * mixer.row_stride, out, 1, mixer.col_stride, mixer.cols);
        for (int64_t j = mixer.cols; j < ld; ++j) out[j] = 0.0;
    }
}

bool is_zero(const double *x, int64_t count) {
    for (int64_t e = 0; e < count; ++e)
        if (x[e] != 0.0) return false;
    return true;
}

// One strip of the sum in float64: rows by columns with distance ld, or, where the sum lies by columns, turned.
struct Strip {
    int64_t i, first, rows;
    bool turned;
    int64_t ld;
    double *data;
};

// Numbers (row, j) at block[row * row_step + j * col_step] times scale[j].
void scale_block(double *block, int64_t row_step, int64_t col_step, int64_t rows, int64_t cols, const double *scale, int64_t step) {
    for (int64_t j = 0; j < cols; ++j)
        for (int64_t row = 0; row < rows; ++row) block[row * row_step + j * col_step] *= scale[j * step];
}

void add_block(const Strip &s, const fedlora_block &X, const double *mixer, int64_t cols, const double *factors, int64_t step, double *block) {
    const int64_t width = padded(cols);
    if (s.turned) {
        strip_by_columns(X, s.i, s.first, s.rows, block, s.ld);
        if (factors) scale_block(block, 1, s.ld, s.rows, X.cols, factors, step);
        fedlora::panel().add(s.data, s.ld, mixer, 1, width, block, s.ld, cols, X.cols, padded(s.rows));
    } else {
        strip_by_rows(X, s.i, s.first, s.rows, block, X.cols);
        if (factors) scale_block(block, X.cols, 1, s.rows, X.cols, factors, step);
        fedlora::panel().add(s.data, s.ld, block, X.cols, 1, mixer, width, s.rows, X.cols, width);
    }
}

void store_strip(const Strip &s, const fedlora_block &S, Partial &partial) {
    const int64_t offset = s.i * S.batch_stride + s.first * S.row_stride;
    if (s.turned)
        for (int64_t j = 0; j < S.cols; ++j) store_any(S, offset + j * S.col_stride, s.data + j * s.ld, S.row_stride, s.rows, partial);
    else if (S.col_stride == 1 && S.row_stride == S.cols && s.ld == S.cols)
        store_any(S, offset, s.data, 1, s.rows * S.cols, partial);
    else
        for (int64_t row = 0; row < s.rows; ++row) store_any(S, offset + row * S.row_stride, s.data + row * s.ld, S.col_stride, S.cols, partial);
}

}  // namespace

namespace fedlora {

int MixedSum::status() const {
    const int64_t batch = sum.batch;
    if (!is_float(sum.dtype)) return FEDLORA_BAD_DTYPE;
    if (count < 0 || batch < 0 || sum.rows < 0 || sum.cols < 0) return FEDLORA_BAD_SHAPE;
    int64_t R = 0;
    for (int64_t k = 0; k < count; ++k) {
        const fedlora_block &x = X[k], &mixer = mixers[k];
        if (!is_float(x.dtype) || mixer.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
        if (x.batch != batch || mixer.batch != batch || x.rows != sum.rows || x.cols < 0 || mixer.rows != x.cols || mixer.cols != sum.cols)
            return FEDLORA_BAD_SHAPE;
        R += x.cols;
    }
    return scale_status(scale, R, batch);
}

int64_t MixedSum::chunks() const { return chunks_of(sum.rows); }

int64_t MixedSum::scratch() const { return scratch_of(mixers, count, sum).total(); }

void MixedSum::run(int64_t i, int64_t chunk, double *scratch, Partial &partial) const {
    const Scratch need = scratch_of(mixers, count, sum);
    double *const widened = scratch, *const block = widened + need.mixers, *const total = block + need.block;
    const int64_t width = padded(sum.cols), begin = chunk * kChunk, end = smaller(begin + kChunk, sum.rows);
    const bool turned = by_columns(sum);
    partial = {};
    double *mixer = widened;
    for (int64_t k = 0; k < count; mixer += mixers[k].rows * width, ++k) widen_mixer(mixers[k], i, mixer, width);
    for (int64_t first = begin; first < end; first += kStrip) {
        const Strip strip = {i, first, smaller(kStrip, end - first), turned, turned ? kStrip : width, total};
        std::memset(total, 0, sizeof(double) * (size_t)need.sum);
        mixer = widened;
        const double *factors = scale.rows ? scale_of(scale, i) : nullptr;
        for (int64_t k = 0; k < count; mixer += mixers[k].rows * width, ++k) {
            if (!is_zero(mixer, mixers[k].rows * width)) add_block(strip, X[k], mixer, sum.cols, factors, scale.col_stride, block);
            if (factors) factors += mixers[k].rows * scale.col_stride;
        }
        store_strip(strip, sum, partial);
    }
}

}  // namespace fedlora

namespace {

using fedlora::MixedSum;

struct Problem {
    MixedSum sum;
    fedlora_block norm, rounding, info, notes;
};

int check(const Problem &p) {
    const int64_t batch = p.sum.sum.batch;
    if (const int status = p.sum.status()) return status;
    const bool fit = scalar(p.norm, FEDLORA_FLOAT64, batch) && scalar(p.rounding, FEDLORA_FLOAT64, batch) &&
                     scalar(p.info, FEDLORA_INT32, batch) && scalar(p.notes, FEDLORA_INT32, batch);
    return fit ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

// The workspace: partial norms of the group with most tasks, then the scratch of every thread.
struct Layout {
    int64_t partials, scratch, threads;
    int64_t bytes() const { return partials + scratch * threads + 64; }
};

Layout layout_of(const fedlora_block *mixers, const int64_t *counts, const fedlora_block *sum, int64_t groups, int64_t threads) {
    Layout layout = {0, 0, threads};
    for (int64_t g = 0; g < groups; mixers += counts[g], ++g) {
        layout.partials = larger(layout.partials, chunks_of(sum[g].rows) * sum[g].batch * (int64_t)sizeof(Partial));
        layout.scratch = larger(layout.scratch, scratch_of(mixers, counts[g], sum[g]).total() * 8);
    }
    layout.partials = (layout.partials + 63) / 64 * 64;
    return layout;
}

// All chunks of all matrices of a group over the threads, then the matrices' totals.
void run_group(const Problem &p, Partial *partials, char *scratch, int64_t slice, int threads) {
    const int64_t chunks = p.sum.chunks(), batch = p.sum.sum.batch, tasks = chunks * batch;
#pragma omp parallel for num_threads(tasks < threads ? (tasks > 0 ? (int)tasks : 1) : threads) schedule(dynamic)
    for (int64_t t = 0; t < tasks; ++t)
        p.sum.run(t / chunks, t % chunks, (double *)(scratch + slice * omp_get_thread_num()), partials[t]);
    for (int64_t i = 0; i < batch; ++i) finish(p.norm, p.rounding, p.info, p.notes, i, partials + i * chunks, chunks);
}

}  // namespace

extern "C" {

int fedlora_mixed_sum_workspace(const fedlora_block *mixers, const int64_t *counts, const fedlora_block *sum, int64_t groups,
                                int64_t threads, int64_t *bytes) {
    if (!mixers || !counts || !sum || !bytes || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    *bytes = layout_of(mixers, counts, sum, groups, threads).bytes();
    return FEDLORA_OK;
}

int fedlora_mixed_sum(const fedlora_block *X, const fedlora_block *mixers, const int64_t *counts, const fedlora_block *sum,
                      const fedlora_block *norm, const fedlora_block *rounding, const fedlora_block *info,
                      const fedlora_block *notes, int64_t groups, void *workspace, int64_t workspace_bytes, int64_t threads,
                      void *) {
    if (!X || !mixers || !counts || !sum || !norm || !rounding || !info || !notes || !workspace || groups < 0 || threads < 1)
        return FEDLORA_BAD_ARGUMENT;
    int64_t at = 0;
    for (int64_t g = 0; g < groups; at += counts[g], ++g)
        if (const int status = check({{X + at, mixers + at, counts[g], {}, sum[g]}, norm[g], rounding[g], info[g], notes[g]})) return status;
    const Layout layout = layout_of(mixers, counts, sum, groups, threads);
    if (workspace_bytes < layout.bytes()) return FEDLORA_BAD_WORKSPACE;
    char *const start = (char *)(((uintptr_t)workspace + 63) / 64 * 64);
    at = 0;
    for (int64_t g = 0; g < groups; at += counts[g], ++g)
        run_group({{X + at, mixers + at, counts[g], {}, sum[g]}, norm[g], rounding[g], info[g], notes[g]}, (Partial *)start,
                  start + layout.partials, layout.scratch, (int)threads);
    return FEDLORA_OK;
}

}  // extern "C"
