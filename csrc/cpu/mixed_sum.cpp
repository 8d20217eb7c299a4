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
#include <utility>

#include "mixed_sum.h"
#include "panel.h"

namespace {

#include "element.hpp"
#include "strips.hpp"

using fedlora::kGroup;
using fedlora::kPad;
using fedlora::MixedSum;

constexpr int64_t kDeep = 256;   // columns of the blocks that are multiplied at once
constexpr int64_t kHigh = 64;    // rows of a strip of a sum that lies by rows,
constexpr int64_t kLong = 192;   // and by columns

// Some rows of the sum. The strip of the blocks, of the mixers' columns and of the sum are turned where the sum lies by columns:
// then rows are next to each other.
struct Strip {
    int64_t i, first, rows;
    bool turned;
};

// Numbers of float64 that one thread needs: which blocks count, their mixers, and strips of the blocks and of the sum.
struct Scratch {
    int64_t kept, mixers, block, sum;
    int64_t total() const { return kept + mixers + block + sum; }
};

// Distances between the rows of the strips.
int64_t block_distance(bool turned) { return turned ? kLong + kPad : kDeep + kPad; }
int64_t sum_distance(bool turned, int64_t cols) { return turned ? kLong + kPad : padded(cols); }

// Enough for fewer columns, too, and wherever those lie.
Scratch scratch_of(const fedlora_block *mixers, int64_t count, const fedlora_block &sum) {
    const int64_t cols = sum.cols;
    int64_t R = 0;
    for (int64_t k = 0; k < count; ++k) R += mixers[k].rows;
    return {padded(count), R * padded(cols), larger(kHigh * block_distance(false), smaller(R, kDeep) * block_distance(true)),
            larger(kHigh * sum_distance(false, cols), cols * sum_distance(true, cols))};
}

// The matrix in float64 with padded rows.
void widen_mixer(const fedlora_block &mixer, int64_t i, double *out, int64_t ld) {
    fedlora::panel().widen(out, ld, mixer, i * mixer.batch_stride, mixer.rows, mixer.cols);
    for (int64_t row = 0; row < mixer.rows; ++row)
        for (int64_t j = mixer.cols; j < ld; ++j) out[row * ld + j] = 0.0;
}

bool is_zero(const double *x, int64_t count) {
    for (int64_t e = 0; e < count; ++e)
        if (x[e] != 0.0) return false;
    return true;
}

// The mixers of the blocks that count, one below the other; their rows.
int64_t widen_mixers(const MixedSum &p, int64_t i, double *kept, double *out) {
    const int64_t width = padded(p.sum.cols);
    int64_t rows = 0;
    for (int64_t k = 0; k < p.count; ++k) {
        widen_mixer(p.mixers[k], i, out + rows * width, width);
        kept[k] = is_zero(out + rows * width, p.mixers[k].rows * width) ? 0.0 : 1.0;
        if (kept[k] != 0.0) rows += p.mixers[k].rows;
    }
    return rows;
}

int64_t shares_of(int64_t whole, int64_t most) { return (whole + most - 1) / most; }

// Equal shares of the whole, each at most so much: a small one would be slow.
template <class F>
void for_shares(int64_t whole, int64_t most, const F &visit) {
    const int64_t shares = shares_of(whole, most);
    for (int64_t s = 0; s < shares; ++s) visit(whole * s / shares, whole * (s + 1) / shares - whole * s / shares);
}

fedlora_block transposed(fedlora_block X) {
    std::swap(X.rows, X.cols);
    std::swap(X.row_stride, X.col_stride);
    return X;
}

// Numbers (row, j) at x[row * row_step + j * col_step] times factors[j * step].
void multiply(double *x, int64_t row_step, int64_t col_step, int64_t rows, int64_t cols, const double *factors, int64_t step) {
    for (int64_t j = 0; j < cols; ++j)
        for (int64_t row = 0; row < rows; ++row) x[row * row_step + j * col_step] *= factors[j * step];
}

// Columns [begin, begin + depth) of the blocks that count, side by side.
void widen_strip(const MixedSum &p, const Strip &s, int64_t begin, int64_t depth, const double *kept, double *out) {
    const int64_t ld = block_distance(s.turned), row_step = s.turned ? 1 : ld, col_step = s.turned ? ld : 1;
    int64_t at = 0, column = 0;  // of the block, in what counts and in all
    for (int64_t k = 0; k < p.count; column += p.X[k].cols, ++k) {
        const fedlora_block &X = p.X[k];
        if (kept[k] == 0.0) continue;
        const int64_t from = larger(at, begin), cols = smaller(at + X.cols, begin + depth) - from;
        const int64_t offset = s.i * X.batch_stride + s.first * X.row_stride + (from - at) * X.col_stride;
        double *const to = out + (from - begin) * col_step;
        if (cols > 0) {
            if (s.turned)
                fedlora::panel().widen(to, ld, transposed(X), offset, cols, s.rows);
            else
                fedlora::panel().widen(to, ld, X, offset, s.rows, cols);
            if (p.scale.rows)
                multiply(to, row_step, col_step, s.rows, cols, &scale_at(p.scale, s.i, column + from - at), p.scale.col_stride);
        }
        at += X.cols;
    }
}

// Rows and columns of the strip of the sum as it lies.
int64_t rows_of(const Strip &s, int64_t cols) { return s.turned ? cols : s.rows; }
int64_t cols_of(const Strip &s, int64_t cols) { return padded(s.turned ? s.rows : cols); }

int64_t tiles_of(const Strip &s, int64_t cols) {
    return shares_of(rows_of(s, cols), kPad) * shares_of(cols_of(s, cols), kGroup * kPad);
}

// total += block mixer, a tile at a time.
void multiply_strip(const Strip &s, int64_t cols, int64_t depth, const double *block, const double *mixer, double *total,
                    Ahead &ahead) {
    const int64_t ldb = block_distance(s.turned), ldm = padded(cols), ld = sum_distance(s.turned, cols);
    for_shares(cols_of(s, cols) / kPad, kGroup, [&](int64_t group, int64_t groups) {
        for_shares(rows_of(s, cols), kPad, [&](int64_t row, int64_t rows) {
            double *const C = total + row * ld + group * kPad;
            if (s.turned)
                fedlora::panel().add(C, ld, mixer + row, 1, ldm, block + group * kPad, ldb, rows, depth, groups * kPad);
            else
                fedlora::panel().add(C, ld, block + row * ldb, ldb, 1, mixer + group * kPad, ldm, rows, depth, groups * kPad);
            ahead.fetch();
        });
    });
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
        if (x.batch != batch || mixer.batch != batch || x.rows != sum.rows || x.cols < 0) return FEDLORA_BAD_SHAPE;
        if (mixer.rows != x.cols || mixer.cols != sum.cols) return FEDLORA_BAD_SHAPE;
        R += x.cols;
    }
    return scale_status(scale, R, batch);
}

int64_t MixedSum::chunks() const { return chunks_of(sum.rows); }

int64_t MixedSum::scratch() const { return scratch_of(mixers, count, sum).total(); }

void MixedSum::run(int64_t i, int64_t chunk, double *scratch, Partial &partial) const {
    const Scratch need = scratch_of(mixers, count, sum);
    const bool turned = by_columns(sum);
    const int64_t begin = chunk * kChunk, end = smaller(begin + kChunk, sum.rows), step = turned ? kLong : kHigh;
    double *const kept = scratch, *const mixer = kept + need.kept, *const block = mixer + need.mixers;
    double *const total = block + need.block;
    const int64_t R = widen_mixers(*this, i, kept, mixer), ld = sum_distance(turned, sum.cols);
    partial = {};
    for (int64_t first = begin; first < end; first += step) {
        const Strip strip = {i, first, smaller(step, end - first), turned};
        Ahead ahead(X, count, i, first + step, smaller(step, end - first - step), tiles_of(strip, sum.cols));
        std::memset(total, 0, sizeof(double) * (size_t)(rows_of(strip, sum.cols) * ld));
        for (int64_t at = 0; at < R; at += kDeep) {
            const int64_t depth = smaller(kDeep, R - at);
            widen_strip(*this, strip, at, depth, kept, block);
            multiply_strip(strip, sum.cols, depth, block, mixer + at * padded(sum.cols), total, ahead);
        }
        const int64_t offset = i * sum.batch_stride + first * sum.row_stride;
        if (turned)
            panel().narrow(total, ld, transposed(sum), offset, sum.cols, strip.rows, partial);
        else
            panel().narrow(total, ld, sum, offset, strip.rows, sum.cols, partial);
    }
}

}  // namespace fedlora

namespace {

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
