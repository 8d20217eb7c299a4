// fedlora_read_turned: means of pairs that lie in files, each turned towards a reference, a matrix at a time.
//
// A thread reads one factor of all clients, rotates it towards the reference, adds it up while it is in the caches, and then the
// other factor. The steps are those of fedlora_cross_products, fedlora_polar and fedlora_mixed_sum, and so are the bits.
#include <omp.h>

#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "cross.h"
#include "mixed_sum.h"
#include "partial.h"
#include "polar.h"
#include "range.h"

namespace {

#include "element.hpp"

using fedlora::Cross;
using fedlora::MixedSum;
using fedlora::Rotations;

int64_t in_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

fedlora_block dense(void *data, int64_t rows, int64_t cols, int64_t dtype, int64_t batch) {
    return {(int64_t)data, rows, cols, cols, 1, dtype, batch, rows * cols};
}

// The matrix with its r directions as columns.
fedlora_block standing(void *data, const fedlora_range &range, bool left) {
    if (!left) return {(int64_t)data, range.rows, range.cols, range.cols, 1, range.dtype, 1, 0};
    return {(int64_t)data, range.cols, range.rows, 1, range.cols, range.dtype, 1, 0};
}

struct Problem {
    const fedlora_range *factors[2];  // B and A of the matrices one after the other, count of each
    const fedlora_range *reference;   // of each matrix, as the factor on this side is
    int64_t side, count;              // 0 turns B to its reference, 1 turns A
    const fedlora_block *weights, *sum, *norm, *rounding, *info, *notes;
    fedlora::PolarOptions options;
    double unit;

    int64_t batch() const { return sum[0].batch; }
    int64_t rank() const { return sum[0].cols; }
    const fedlora_range *of(int64_t side, int64_t i) const { return factors[side] + i * count; }
    double weight(int64_t side, int64_t i, int64_t k) const {
        const fedlora_block &w = weights[side];
        return ((const double *)w.data)[i * w.row_stride + k * w.col_stride];
    }

    int status() const {
        if (side < 0 || side > 1 || count < 1 || batch() < 0 || rank() < 1 || rank() > FEDLORA_CORE_SVD_MAX) return FEDLORA_BAD_SHAPE;
        if (sum[1].batch != batch() || sum[1].rows != rank() || sum[0].rows < 1 || sum[1].cols < 1) return FEDLORA_BAD_SHAPE;
        for (int64_t s = 0; s < 2; ++s) {
            if (!is_float(sum[s].dtype) || weights[s].dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
            if (sum[s].col_stride != 1 || sum[s].row_stride != sum[s].cols) return FEDLORA_BAD_SHAPE;
            if (weights[s].rows != batch() || weights[s].cols != count) return FEDLORA_BAD_SHAPE;
            for (int64_t n = 0; n < batch() * count; ++n)
                if (!fits(factors[s][n], s)) return FEDLORA_BAD_SHAPE;
            const bool fit = scalar(norm[s], FEDLORA_FLOAT64, batch()) && scalar(rounding[s], FEDLORA_FLOAT64, batch()) &&
                             scalar(info[s], FEDLORA_INT32, batch()) && scalar(notes[s], FEDLORA_INT32, batch());
            if (!fit) return FEDLORA_BAD_SHAPE;
        }
        for (int64_t i = 0; i < batch(); ++i)
            if (!fits(reference[i], side)) return FEDLORA_BAD_SHAPE;
        return FEDLORA_OK;
    }

    bool fits(const fedlora_range &x, int64_t s) const { return fedlora::is_valid(x) && x.rows == sum[s].rows && x.cols == sum[s].cols; }

    // The sum with its r directions as columns.
    static fedlora_block standing_sum(int64_t s, const fedlora_block &out) {
        if (s == 0) return out;
        return {out.data, out.cols, out.rows, 1, out.row_stride, out.dtype, out.batch, out.batch_stride};
    }
};

// Bytes of the parts of a thread's scratch.
struct Layout {
    int64_t reference, factors, blocks, leavings, products, rotations, mixers, steps, partials;
    int64_t bytes() const { return reference + factors + blocks + leavings + products + rotations + mixers + steps + partials; }
};

int64_t bytes_of(const fedlora_range &x) { return in_lines(x.rows * x.cols * size_of(x.dtype)); }

Layout layout_of(const Problem &p) {
    Layout layout = {};
    const int64_t r = p.rank(), size = r * r * 8;
    for (int64_t i = 0; i < p.batch(); ++i) {
        layout.reference = larger(layout.reference, bytes_of(p.reference[i]));
        for (int64_t s = 0; s < 2; ++s) {
            int64_t total = 0;
            for (int64_t k = 0; k < p.count; ++k) total += bytes_of(p.of(s, i)[k]);
            layout.factors = larger(layout.factors, total);
        }
    }
    layout.blocks = in_lines(2 * p.count * (int64_t)sizeof(fedlora_block));
    layout.products = in_lines(p.count * (size + 16));
    layout.rotations = in_lines(p.count * (size + 8 * r + 32));
    layout.mixers = in_lines(p.count * size);
    layout.steps = fedlora::polar(r).scratch_bytes(r);
    if (p.batch() == 0) return layout;
    const Cross pair = {standing(nullptr, p.of(p.side, 0)[0], p.side == 1), standing(nullptr, p.reference[0], p.side == 1)};
    layout.leavings = in_lines(pair.chunks() * pair.leaving() * 8);
    layout.steps = larger(layout.steps, in_lines(pair.scratch() * 8));
    for (int64_t s = 0; s < 2; ++s) {
        // one mixer of all rows needs as much as one for each client
        const fedlora_block all = dense(nullptr, r * p.count, r, FEDLORA_FLOAT64, 1);
        const MixedSum sum = {nullptr, &all, 1, {}, p.standing_sum(s, p.sum[s])};
        layout.steps = larger(layout.steps, in_lines((sum.scratch() + p.count + 8) * 8));
        layout.partials = larger(layout.partials, in_lines(sum.chunks() * (int64_t)sizeof(Partial)));
    }
    return layout;
}

// The work on one matrix, in the scratch of one thread.
class Mean {
  public:
    Mean(const Problem &p, int64_t i, const Layout &layout, char *memory) : p_(p), i_(i) {
        const auto take = [&](int64_t bytes) { char *at = memory; memory += bytes; return at; };
        reference_ = take(layout.reference);
        factors_ = take(layout.factors);
        blocks_ = (fedlora_block *)take(layout.blocks);
        leavings_ = (double *)take(layout.leavings);
        products_ = (double *)take(layout.products);
        rotations_ = (double *)take(layout.rotations);
        mixers_ = (double *)take(layout.mixers);
        steps_ = take(layout.steps);
        partials_ = (Partial *)take(layout.partials);
    }

    // False where a file could not be read. plain: nobody turns, or a rotation is in trouble; then there is no sum.
    bool run(int32_t &plain) {
        const int64_t first = p_.side, second = 1 - p_.side;
        if (!read(first) || !fedlora::read_range(p_.reference[i_], 0, p_.reference[i_].rows * p_.reference[i_].cols, reference_)) return false;
        rotate();
        plain = is_plain();
        if (plain) return true;
        add(first);
        if (!read(second)) return false;
        add(second);
        return true;
    }

  private:
    int64_t entries() const { return p_.rank() * p_.rank(); }

    bool read(int64_t s) {
        char *at = factors_;
        for (int64_t k = 0; k < p_.count; ++k) {
            const fedlora_range &x = p_.of(s, i_)[k];
            if (!fedlora::read_range(x, 0, x.rows * x.cols, at)) return false;
            blocks_[k] = standing(at, x, s == 1);
            at += bytes_of(x);
        }
        return true;
    }

    void rotate() {
        const int64_t r = p_.rank(), K = p_.count, step = fedlora::polar(r).matrices_per_task(r);
        double *const sizes = products_ + K * entries();
        int32_t *const exponents = (int32_t *)(sizes + K);
        const fedlora_block Y = standing(reference_, p_.reference[i_], p_.side == 1);
        const int64_t exponent_Y = fedlora::exponent_of(Y, 0);
        for (int64_t k = 0; k < K; ++k) {
            const Cross pair = {blocks_[k], Y};
            const int64_t exponent_X = fedlora::exponent_of(blocks_[k], 0);
            for (int64_t chunk = 0; chunk < pair.chunks(); ++chunk)
                pair.run(0, chunk, exponent_X, exponent_Y, (double *)steps_, leavings_ + chunk * pair.leaving());
            sizes[k] = pair.add(leavings_);
            exponents[k] = (int32_t)(exponent_X + exponent_Y);
            std::memcpy(products_ + k * entries(), leavings_, sizeof(double) * (size_t)entries());
        }
        const fedlora::Correlations from = {dense(products_, r, r, FEDLORA_FLOAT64, K), dense(sizes, 1, 1, FEDLORA_FLOAT64, K),
                                            dense(exponents, 1, 1, FEDLORA_INT32, K), p_.unit};
        double *at = rotations_ + K * entries();
        const fedlora_block values = dense(at, 1, r, FEDLORA_FLOAT64, K), condition = dense(at += K * r, 1, 1, FEDLORA_FLOAT64, K);
        info_ = (int32_t *)(at += K);
        const fedlora_block info = dense(info_, 1, 1, FEDLORA_INT32, K), notes = dense(info_ + K, 1, 1, FEDLORA_INT32, K);
        const fedlora_block unique = dense(info_ + 2 * K, 1, 1, FEDLORA_BOOL, K);
        const Rotations to = {dense(rotations_, r, r, FEDLORA_FLOAT64, K), values, unique, condition, info, notes};
        for (int64_t begin = 0; begin < K; begin += step)
            fedlora::polar(r).run(from, to, p_.options, begin, K - begin < step ? K - begin : step, steps_);
    }

    bool is_plain() const {
        const int64_t r = p_.rank();
        bool still = true;
        for (int64_t k = 0; k < p_.count; ++k) {
            if (info_[k]) return true;
            const double *Q = rotations_ + k * entries();
            for (int64_t e = 0; still && e < entries(); ++e) still = Q[e] == (e / r == e % r ? 1.0 : 0.0);
        }
        return still;
    }

    void add(int64_t s) {
        const int64_t r = p_.rank();
        fedlora_block *const mixers = blocks_ + p_.count;
        for (int64_t k = 0; k < p_.count; ++k) {
            const double w = p_.weight(s, i_, k), *Q = rotations_ + k * entries();
            double *const mixer = mixers_ + k * entries();
            for (int64_t e = 0; e < entries(); ++e) mixer[e] = w == 0.0 ? 0.0 : w * Q[e];
            mixers[k] = dense(mixer, r, r, FEDLORA_FLOAT64, 1);
        }
        fedlora_block out = p_.sum[s];
        out.data += i_ * out.batch_stride * size_of(out.dtype), out.batch = 1;
        const MixedSum sum = {blocks_, mixers, p_.count, {}, p_.standing_sum(s, out)};
        for (int64_t chunk = 0; chunk < sum.chunks(); ++chunk) sum.run(0, chunk, (double *)steps_, partials_[chunk]);
        finish(p_.norm[s], p_.rounding[s], p_.info[s], p_.notes[s], i_, partials_, sum.chunks());
    }

    const Problem &p_;
    int64_t i_;
    char *reference_, *factors_, *steps_;
    fedlora_block *blocks_;
    double *leavings_, *products_, *rotations_, *mixers_;
    int32_t *info_ = nullptr;
    Partial *partials_;
};

int64_t workspace_bytes_of(const Problem &p, int64_t threads) { return layout_of(p).bytes() * threads + 64; }

}  // namespace

extern "C" {

int fedlora_read_turned_workspace(const fedlora_range *X, const fedlora_range *reference, int64_t side, int64_t count,
                                  const fedlora_block *sum, int64_t threads, int64_t *bytes) {
    if (!X || !reference || !sum || !bytes || count < 1 || side < 0 || side > 1 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    if (sum[0].cols < 1 || sum[0].cols > FEDLORA_CORE_SVD_MAX) return FEDLORA_BAD_SHAPE;
    *bytes = workspace_bytes_of({{X, X + sum[0].batch * count}, reference, side, count, nullptr, sum, nullptr, nullptr, nullptr, nullptr, {}, 0.0},
                                threads);
    return FEDLORA_OK;
}

int fedlora_read_turned(const fedlora_range *X, const fedlora_range *reference, int64_t side, int64_t count, const fedlora_block *weights,
                        const fedlora_block *sum, const fedlora_block *norm, const fedlora_block *rounding, const fedlora_block *info,
                        const fedlora_block *notes, double unit, int64_t special, double blend, int32_t *plain, void *workspace,
                        int64_t workspace_bytes, int64_t threads, void *) {
    if (!X || !reference || !weights || !sum || !norm || !rounding || !info || !notes || !plain || !workspace || threads < 1)
        return FEDLORA_BAD_ARGUMENT;
    if (!(blend >= 0 && blend <= 1)) return FEDLORA_BAD_ARGUMENT;
    const Problem p = {{X, X + sum[0].batch * count}, reference, side, count, weights, sum, norm, rounding, info, notes, {special != 0, blend}, unit};
    if (const int status = p.status()) return status;
    if (workspace_bytes < workspace_bytes_of(p, threads)) return FEDLORA_BAD_WORKSPACE;
    const Layout layout = layout_of(p);
    char *const start = (char *)in_lines((int64_t)workspace);
    std::atomic<bool> read{true};
    const int64_t tasks = p.batch();
#pragma omp parallel for num_threads(tasks < threads ? (tasks > 0 ? (int)tasks : 1) : (int)threads) schedule(dynamic)
    for (int64_t i = 0; i < tasks; ++i) {
        if (!read.load(std::memory_order_relaxed)) continue;
        if (!Mean(p, i, layout, start + layout.bytes() * omp_get_thread_num()).run(plain[i])) read = false;
    }
    return read ? FEDLORA_OK : FEDLORA_UNREADABLE;
}

}  // extern "C"
