// fedlora_align_factors: correlation, rotation and rotated factors of every pair while it is in the caches.
//
// A task is as many pairs as the rotation has lanes. Where there are fewer tasks than threads would like, the chunks of all pairs
// are shared out step by step instead; the numbers are the same.
#include <omp.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "cross.h"
#include "pages.hpp"
#include "polar.h"
#include "turned.h"

namespace {

using fedlora::Cross;
using fedlora::Rotations;
using fedlora::Turned;

int64_t in_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

fedlora_block transposed(fedlora_block b) {
    const int64_t rows = b.rows, row_stride = b.row_stride;
    b.rows = b.cols, b.row_stride = b.col_stride, b.cols = rows, b.col_stride = row_stride;
    return b;
}

fedlora_block dense(void *data, int64_t rows, int64_t cols, int64_t dtype, int64_t batch) {
    return {(int64_t)data, rows, cols, cols, 1, dtype, batch, rows * cols};
}

fedlora_block from(fedlora_block b, int64_t first, int64_t bytes) {
    b.data += first * b.batch_stride * bytes;
    return b;
}

int64_t bytes_of(int64_t dtype) { return dtype == FEDLORA_FLOAT64 ? 8 : dtype == FEDLORA_FLOAT32 ? 4 : 2; }

double unit_of(int64_t dtype) {
    switch (dtype) {
        case FEDLORA_FLOAT64: return 0x1p-53;
        case FEDLORA_FLOAT32: return 0x1p-24;
        case FEDLORA_BFLOAT16: return 0x1p-8;
        default: return 0x1p-11;
    }
}

template <class T>
T &scalar_at(const fedlora_block &b, int64_t i) {
    return ((T *)b.data)[i * b.batch_stride];
}

struct Problem {
    Cross terms[2];      // of weight > 0
    double weights[2];
    int count;
    Turned factors[2];   // B, and A by columns
    Rotations to;
    fedlora::PolarOptions options;

    int64_t batch() const { return factors[0].X.batch; }
    int64_t rank() const { return factors[0].X.cols; }
    int64_t term_chunks() const { return terms[0].chunks() + (count > 1 ? terms[1].chunks() : 0); }
    int64_t factor_chunks() const { return factors[0].chunks() + factors[1].chunks(); }
    double unit() const {
        double most = 0;
        for (int t = 0; t < count; ++t) most = std::fmax(most, std::fmax(unit_of(terms[t].X.dtype), unit_of(terms[t].Y.dtype)));
        return most;
    }

    int status() const {
        for (const Turned &factor : factors)
            if (const int status = factor.status()) return status;
        if (rank() > FEDLORA_CORE_SVD_MAX || factors[1].X.cols != rank() || factors[1].X.batch != batch()) return FEDLORA_BAD_SHAPE;
        for (int t = 0; t < count; ++t) {
            const int64_t dtype = terms[t].Y.dtype;
            if (dtype < FEDLORA_FLOAT32 || dtype > FEDLORA_FLOAT16 || dtype == FEDLORA_INT32) return FEDLORA_BAD_DTYPE;
            if (!terms[t].valid() || terms[t].Y.cols != rank()) return FEDLORA_BAD_SHAPE;
        }
        return fedlora::check_rotations(to, rank(), batch());
    }

    int64_t pairs_per_task() const { return fedlora::polar(rank()).matrices_per_task(rank()); }
    int64_t tasks() const { return (batch() + pairs_per_task() - 1) / pairs_per_task(); }

    // Bytes of what the steps leave for so many pairs, and of the scratch of a thread.
    int64_t leavings() const {
        int64_t total = 0;
        for (int t = 0; t < count; ++t) total += terms[t].chunks() * terms[t].leaving();
        return total;
    }
    int64_t record() const { return in_lines(8 * (leavings() + rank() * rank() + 2 + 4 + factor_chunks())); }
    int64_t scratch() const {
        int64_t most = fedlora::polar(rank()).scratch_bytes(rank());
        for (int t = 0; t < count; ++t) most = std::max(most, in_lines(8 * terms[t].scratch()));
        for (const Turned &factor : factors) most = std::max(most, factor.scratch());
        return most;
    }
};

// The steps for pairs first .. first + count - 1, whose leavings lie in memory of count records.
class Steps {
  public:
    Steps(const Problem &p, int64_t first, int64_t count, char *memory, bool stream)
        : p_(p), first_(first), count_(count), stream_(stream) {
        const int64_t size = p.rank() * p.rank();
        leavings_ = (double *)memory;
        M_ = leavings_ + count * p.leavings();
        sizes_ = M_ + count * size;
        exponents_ = (int64_t *)(sizes_ + count);
        finite_ = exponents_ + 4 * count;
        powers_ = (int32_t *)(finite_ + count * p.factor_chunks());
    }

    int64_t correlations() const { return count_ * p_.term_chunks(); }
    int64_t turns() const { return count_ * p_.factor_chunks(); }

    void exponents(int64_t j) const {
        for (int t = 0; t < p_.count; ++t) {
            exponents_[4 * j + 2 * t] = fedlora::exponent_of(p_.terms[t].X, first_ + j);
            exponents_[4 * j + 2 * t + 1] = fedlora::exponent_of(p_.terms[t].Y, first_ + j);
        }
    }

    void correlate(int64_t task, void *scratch) const {
        const int64_t j = task / p_.term_chunks(), chunk = task % p_.term_chunks(), before = p_.terms[0].chunks();
        const int t = chunk < before ? 0 : 1;
        const int64_t own = t ? chunk - before : chunk;
        p_.terms[t].run(first_ + j, own, exponents_[4 * j + 2 * t], exponents_[4 * j + 2 * t + 1], (double *)scratch,
                        place(j, t) + own * p_.terms[t].leaving());
    }

    // M = sum of weight X^T Y, each taken to a size in [1/2, 1) first: what is left out by the sum has no weight in it.
    void combine(int64_t j) const {
        const int64_t entries = p_.rank() * p_.rank();
        double *const M = M_ + j * entries, sizes[2];
        int weight_power[2], size_power[2];
        int64_t powers[2], most = INT64_MIN;
        for (int t = 0; t < p_.count; ++t) {
            sizes[t] = p_.terms[t].add(place(j, t));
            std::frexp(p_.weights[t], &weight_power[t]);
            std::frexp(sizes[t], &size_power[t]);
            if (!(sizes[t] <= DBL_MAX)) size_power[t] = 0;
            powers[t] = exponents_[4 * j + 2 * t] + exponents_[4 * j + 2 * t + 1] + weight_power[t] + size_power[t];
            if (sizes[t] != 0 && powers[t] > most) most = powers[t];
        }
        std::memset(M, 0, sizeof(double) * (size_t)entries);
        sizes_[j] = 0;
        powers_[j] = most == INT64_MIN ? 0 : (int32_t)most;
        for (int t = 0; t < p_.count; ++t) {
            if (sizes[t] == 0) continue;
            const int64_t shift = std::max(powers[t] - most, (int64_t)-2000);
            const double weight = std::ldexp(std::ldexp(p_.weights[t], -weight_power[t]), (int)shift);
            const double *product = place(j, t);
            const double first = std::ldexp(1.0, -size_power[t] / 2), second = std::ldexp(1.0, -size_power[t] / 2 - size_power[t] % 2);
            for (int64_t e = 0; e < entries; ++e) M[e] += weight * (product[e] * first * second);
            sizes_[j] += weight * (sizes[t] * first * second);
        }
    }

    // Rotations of pairs j .. j + count - 1.
    void rotate(int64_t j, int64_t count, void *scratch) const {
        const int64_t r = p_.rank(), at = first_ + j;
        const Rotations to = {from(p_.to.Q, at, 8),         from(p_.to.singular_values, at, 8), from(p_.to.unique, at, 1),
                              from(p_.to.condition, at, 8), from(p_.to.info, at, 4),            from(p_.to.notes, at, 4)};
        fedlora::polar(r).run({dense(M_ + j * r * r, r, r, FEDLORA_FLOAT64, count), dense(sizes_ + j, 1, 1, FEDLORA_FLOAT64, count),
                               dense(powers_ + j, 1, 1, FEDLORA_INT32, count), p_.unit()},
                              to, p_.options, 0, count, scratch);
    }

    void turn(int64_t task, void *scratch) const {
        const int64_t j = task / p_.factor_chunks(), chunk = task % p_.factor_chunks(), before = p_.factors[0].chunks();
        const Turned &factor = p_.factors[chunk < before ? 0 : 1];
        const bool sound = !(scalar_at<int32_t>(p_.to.info, first_ + j) & FEDLORA_INFO_NONFINITE);
        finite_[task] = sound && factor.run(first_ + j, chunk < before ? chunk : chunk - before, stream_, scratch);
    }

    // Trouble in either factor marks the pair.
    void finish(int64_t j) const {
        const int64_t chunks = p_.factor_chunks(), i = first_ + j;
        bool finite = true;
        for (int64_t c = 0; c < chunks; ++c) finite &= finite_[j * chunks + c] != 0;
        int32_t &info = scalar_at<int32_t>(p_.to.info, i);
        if (finite && !(info & FEDLORA_INFO_NONFINITE)) return;
        if (!(info & FEDLORA_INFO_NONFINITE) && p_.factors[0].finite(i) && p_.factors[1].finite(i)) {
            info |= FEDLORA_INFO_OVERFLOW;
            return;
        }
        for (const Turned &factor : p_.factors) factor.spoil(i);
        fedlora::spoil_rotation(p_.to, i);
    }

  private:
    double *place(int64_t j, int t) const { return leavings_ + j * p_.leavings() + (t ? p_.terms[0].chunks() * p_.terms[0].leaving() : 0); }

    const Problem &p_;
    const int64_t first_, count_;
    const bool stream_;
    double *leavings_, *M_, *sizes_;
    int64_t *exponents_, *finite_;
    int32_t *powers_;
};

// Whether every thread finds tasks enough.
bool in_tasks(const Problem &p, int64_t threads) { return threads == 1 || p.tasks() >= 4 * threads; }

struct Layout {
    int64_t records, slice;  // shared, and of every thread
    int64_t bytes(int64_t threads) const { return records + slice * threads + 64; }
};

Layout layout_of(const Problem &p, int64_t threads) {
    const bool tasks = in_tasks(p, threads);
    return {tasks ? 0 : p.record() * p.batch(), p.scratch() + (tasks ? p.record() * p.pairs_per_task() : 0)};
}

void run_tasks(const Problem &p, char *memory, int64_t slice, int threads, bool stream) {
    const int64_t step = p.pairs_per_task(), tasks = p.tasks();
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t t = 0; t < tasks; ++t) {
        char *const own = memory + slice * omp_get_thread_num(), *const scratch = own + p.record() * step;
        const int64_t first = t * step, count = std::min(step, p.batch() - first);
        const Steps steps(p, first, count, own, stream);
        for (int64_t j = 0; j < count; ++j) steps.exponents(j);
        for (int64_t c = 0; c < steps.correlations(); ++c) steps.correlate(c, scratch);
        for (int64_t j = 0; j < count; ++j) steps.combine(j);
        steps.rotate(0, count, scratch);
        for (int64_t c = 0; c < steps.turns(); ++c) steps.turn(c, scratch);
        for (int64_t j = 0; j < count; ++j) steps.finish(j);
    }
}

void run_steps(const Problem &p, char *memory, char *scratches, int64_t slice, int threads, bool stream) {
    const int64_t step = p.pairs_per_task(), batch = p.batch();
    const Steps steps(p, 0, batch, memory, stream);
#pragma omp parallel num_threads(threads)
    {
        char *const scratch = scratches + slice * omp_get_thread_num();
#pragma omp for schedule(dynamic)
        for (int64_t j = 0; j < batch; ++j) steps.exponents(j);
#pragma omp for schedule(dynamic)
        for (int64_t c = 0; c < steps.correlations(); ++c) steps.correlate(c, scratch);
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < p.tasks(); ++t) {
            const int64_t first = t * step, count = std::min(step, batch - first);
            for (int64_t j = first; j < first + count; ++j) steps.combine(j);
            steps.rotate(first, count, scratch);
        }
#pragma omp for schedule(dynamic)
        for (int64_t c = 0; c < steps.turns(); ++c) steps.turn(c, scratch);
#pragma omp for
        for (int64_t j = 0; j < batch; ++j) steps.finish(j);
    }
}

Problem problem_of(const fedlora_block *B, const fedlora_block *A, const fedlora_block *B_ref, const fedlora_block *A_ref, double alpha,
                   double beta, const fedlora_block *BQ, const fedlora_block *QA, const fedlora_block *rotations, int64_t special,
                   double blend, int64_t g) {
    Problem p = {};
    const Rotations to = ((const Rotations *)rotations)[g];
    if (alpha > 0) p.terms[p.count] = {transposed(A[g]), transposed(A_ref[g])}, p.weights[p.count++] = alpha;
    if (beta > 0) p.terms[p.count] = {B[g], B_ref[g]}, p.weights[p.count++] = beta;
    p.factors[0] = {B[g], to.Q, BQ[g]};
    p.factors[1] = {transposed(A[g]), to.Q, transposed(QA[g])};
    p.to = to;
    p.options = {special != 0, blend};
    return p;
}

}  // namespace

extern "C" {

int fedlora_align_factors_workspace(const fedlora_block *B, const fedlora_block *A, const fedlora_block *B_ref, const fedlora_block *A_ref,
                                    double alpha, double beta, const fedlora_block *BQ, const fedlora_block *QA,
                                    const fedlora_block *rotations, int64_t groups, int64_t threads, int64_t *bytes) {
    if (!B || !A || !BQ || !QA || !rotations || !bytes || groups < 0 || threads < 1 || (alpha > 0 && !A_ref) || (beta > 0 && !B_ref))
        return FEDLORA_BAD_ARGUMENT;
    *bytes = 64;
    for (int64_t g = 0; g < groups; ++g) {
        const Problem p = problem_of(B, A, B_ref, A_ref, alpha, beta, BQ, QA, rotations, 0, 1.0, g);
        if (const int status = p.status()) return status;
        *bytes = std::max(*bytes, layout_of(p, threads).bytes(threads));
    }
    return FEDLORA_OK;
}

int fedlora_align_factors(const fedlora_block *B, const fedlora_block *A, const fedlora_block *B_ref, const fedlora_block *A_ref,
                          double alpha, double beta, const fedlora_block *BQ, const fedlora_block *QA, const fedlora_block *rotations,
                          int64_t groups, int64_t special, double blend, void *workspace, int64_t workspace_bytes, int64_t threads, void *) {
    const bool weighed = alpha >= 0 && beta >= 0 && alpha <= DBL_MAX && beta <= DBL_MAX && alpha + beta > 0;
    if (!B || !A || !BQ || !QA || !rotations || !workspace || groups < 0 || threads < 1 || !weighed || !(blend >= 0 && blend <= 1) ||
        (alpha > 0 && !A_ref) || (beta > 0 && !B_ref))
        return FEDLORA_BAD_ARGUMENT;
    int64_t needed = 0;
    if (const int status = fedlora_align_factors_workspace(B, A, B_ref, A_ref, alpha, beta, BQ, QA, rotations, groups, threads, &needed)) return status;
    if (workspace_bytes < needed) return FEDLORA_BAD_WORKSPACE;
    char *const start = (char *)(((uintptr_t)workspace + 63) / 64 * 64);
    for (int64_t g = 0; g < groups; ++g) {
        const Problem p = problem_of(B, A, B_ref, A_ref, alpha, beta, BQ, QA, rotations, special, blend, g);
        const Layout layout = layout_of(p, threads);
        fedlora::prefer_huge_pages({{p.factors[0].out, bytes_of(BQ[g].dtype)}, {p.factors[1].out, bytes_of(QA[g].dtype)}});
        const bool stream = (p.factors[0].X.rows + p.factors[1].X.rows) * p.rank() * p.batch() * bytes_of(p.factors[0].X.dtype) > fedlora::kStreamed;
        if (in_tasks(p, threads))
            run_tasks(p, start, layout.slice, (int)threads, stream);
        else
            run_steps(p, start, start + layout.records, layout.slice, (int)threads, stream);
    }
    return FEDLORA_OK;
}

}  // extern "C"
