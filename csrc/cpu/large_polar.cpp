// Rotations of larger correlations, one matrix at a time on top of the large SVD, and the completion of deficient ones of any size.
#include <cstring>

#include "panel.h"
#include "polar.h"
#include "svd.h"

#define FEDLORA_VECTOR_BYTES 16

namespace fedlora {
namespace {

#include "simd.hpp"
#include "svd_view.hpp"
#include "polar_rule.hpp"

int64_t padded(int64_t count) { return (count + kPad - 1) / kPad * kPad; }

int64_t whole(int64_t bytes) { return (bytes + 63) / 64 * 64; }

fedlora_block dense(const void *data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int64_t dtype = FEDLORA_FLOAT64) {
    return {(int64_t)data, rows, cols, row_stride, col_stride, dtype, 1, 0};
}

// Most scratch that a SVD of up to r x r needs.
int64_t svd_scratch(int64_t r) {
    int64_t most = 0;
    for (int64_t d = 1; d <= r; ++d) {
        const fedlora_block C = dense(nullptr, d, d, d, 1);
        const int64_t bytes = svd_variant(C).scratch_bytes(C);
        most = bytes > most ? bytes : most;
    }
    return whole(most);
}

// C = U diag(S) Vh, rows of Vh ldv apart, all else dense and by rows; whether the iteration converged.
bool decompose(const double *C, double *U, double *S, double *Vh, int64_t r, int64_t ldv, void *scratch) {
    int32_t info = 0, notes = 0;
    const fedlora_block block = dense(C, r, r, r, 1);
    svd_variant(block).run({block, dense(U, r, r, r, 1), dense(S, 1, r, r, 1), dense(Vh, r, r, ldv, 1), dense(&info, 1, 1, 1, 1, FEDLORA_INT32),
                            dense(&notes, 1, 1, 1, 1, FEDLORA_INT32)},
                           0, 0, scratch);
    return !(info & FEDLORA_INFO_NOT_CONVERGED);
}

// Whether det Q < 0: see turn_round in polar.hpp. The copy in work is used up.
bool reflects(const double *Q, int64_t ld, int64_t r, double *work) {
    bool negative = false;
    for (int64_t i = 0; i < r; ++i) std::memcpy(work + i * r, Q + i * ld, sizeof(double) * (size_t)r);
    for (int64_t k = 0; k < r; ++k) {
        const double *pivot = work + k * r;
        const double own = __builtin_copysign(1.0, pivot[k]), inverse = 1.0 / (pivot[k] + own);
        negative ^= own < 0;
        for (int64_t i = k + 1; i < r; ++i) {
            double *row = work + i * r;
            const double factor = row[k] * inverse;
            for (int64_t c = k + 1; c < r; ++c) row[c] -= factor * pivot[c];
        }
    }
    return negative;
}

// out (ld apart) = sum_c u_c v_c^T over the columns of U and V.
void add_up(const double *U, const double *V, int64_t r, double *out, int64_t ld) {
    for (int64_t i = 0; i < r; ++i) {
        double *row = out + i * ld;
        std::memset(row, 0, sizeof(double) * (size_t)r);
        for (int64_t c = 0; c < r; ++c)
            for (int64_t j = 0; j < r; ++j) row[j] += U[c * r + i] * V[c * r + j];
    }
}

double inner(const double *x, const double *y, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += x[i] * y[i];
    return sum;
}

// Scratch of a large rotation: matrices with rows r and padded(r) apart, then that of the SVD and of the completion.
struct Room {
    int64_t dense, wide, svd, completion;
    explicit Room(int64_t r)
        : dense(whole(8 * r * r)), wide(8 * r * padded(r)), svd(svd_scratch(r)), completion(complete_rotation_scratch(r)) {}
    int64_t bytes() const { return 3 * dense + 4 * wide + svd + completion; }
};

class LargePolar {
  public:
    LargePolar(int64_t r, void *scratch) : r_(r), ld_(padded(r)) {
        const Room room(r);
        char *at = (char *)scratch;
        const auto next = [&](int64_t bytes) {
            char *const here = at;
            at += bytes;
            return (double *)here;
        };
        C_ = next(room.dense), U_ = next(room.dense), spare_ = next(room.dense);
        Vh_ = next(room.wide), Q_ = next(room.wide), gram_ = next(room.wide), old_ = next(room.wide);
        svd_ = next(room.svd), completion_ = next(room.completion);
    }

    void run(const Correlations &from, const Rotations &to, const PolarOptions &options, int64_t i) {
        const View<const double> M(from.M, i, false);
        const double given = scalar_at<const double>(from.size, i);
        int exponent;
        if (!largest_exponent(M, (int)r_, exponent) || !__builtin_isfinite(given)) return write_nonfinite(to, i, r_);
        for (int row = 0; row < r_; ++row)
            for (int c = 0; c < r_; ++c) C_[row * r_ + c] = times_power(M(row, c), -exponent);
        const double size = times_power(given, -exponent), threshold = 8 * r_ * Lane<double>::roundoff * size;
        bool converged = form(threshold, options.special, options.special), reflected = reflected_;
        std::memcpy(singular_, S_, sizeof S_);
        if (options.blend == 0) {
            set_identity();
        } else if (options.blend < 1) {
            for (int64_t row = 0; row < r_; ++row)
                for (int64_t c = 0; c < r_; ++c) C_[row * r_ + c] = (row == c ? 1 - options.blend : 0) + options.blend * Q_[row * ld_ + c];
            converged &= form(kSingularBlend, options.special, false);
        }
        const View<double> Q(to.Q, i, false);
        for (int row = 0; row < r_; ++row)
            for (int c = 0; c < r_; ++c) Q(row, c) = Q_[row * ld_ + c];
        const Verdict verdict = judge(singular_, r_, threshold, reflected, options.special);
        write_verdict(to, i, singular_, r_, size, exponent + scalar_at<const int32_t>(from.exponent, i), from.unit, verdict, converged);
    }

  private:
    // Q of C, as LanePolar has it.
    bool form(double threshold, bool special, bool flip) {
        std::memset(Vh_, 0, sizeof(double) * (size_t)(r_ * ld_));
        const bool converged = decompose(C_, U_, S_, Vh_, r_, ld_, svd_);
        const int64_t rank = judge(S_, r_, threshold, false, special).rank;
        reflected_ = false;
        if (rank == 0) {
            set_identity();
            return converged;
        }
        if (rank == r_) {
            multiply(Q_, U_, r_, 1, Vh_);
            if (flip) turn_round();
        } else {
            double *const U = spare_, *const V = gram_;
            for (int64_t c = 0; c < r_; ++c)
                for (int64_t j = 0; j < r_; ++j) U[c * r_ + j] = U_[j * r_ + c], V[c * r_ + j] = Vh_[c * ld_ + j];
            std::memset(Q_, 0, sizeof(double) * (size_t)(r_ * ld_));
            complete_rotation(U, V, r_, rank, special, Q_, ld_, completion_);
        }
        orthonormalise();
        return converged;
    }

    void turn_round() {
        reflected_ = reflects(Q_, ld_, r_, spare_);
        if (!reflected_) return;
        const double *v = Vh_ + (r_ - 1) * ld_;
        for (int64_t i = 0; i < r_; ++i) {
            const double u = 2 * U_[i * r_ + r_ - 1];
            for (int64_t j = 0; j < r_; ++j) Q_[i * ld_ + j] -= u * v[j];
        }
    }

    void orthonormalise() {
        multiply(gram_, Q_, 1, ld_, Q_);
        for (int64_t i = 0; i < r_; ++i)
            for (int64_t j = 0; j < r_; ++j) gram_[i * ld_ + j] = 0.5 * ((i == j ? 1.0 : 0.0) - gram_[i * ld_ + j]);
        std::memcpy(old_, Q_, sizeof(double) * (size_t)(r_ * ld_));
        panel().add(Q_, ld_, old_, ld_, 1, gram_, ld_, r_, r_, ld_);
    }

    void multiply(double *out, const double *P, int64_t row, int64_t step, const double *right) {
        std::memset(out, 0, sizeof(double) * (size_t)(r_ * ld_));
        panel().add(out, ld_, P, row, step, right, ld_, r_, r_, ld_);
    }

    void set_identity() {
        std::memset(Q_, 0, sizeof(double) * (size_t)(r_ * ld_));
        for (int64_t i = 0; i < r_; ++i) Q_[i * ld_ + i] = 1;
    }

    const int64_t r_, ld_;
    double *C_, *U_, *spare_, *Vh_, *Q_, *gram_, *old_;
    void *svd_, *completion_;
    double S_[FEDLORA_CORE_SVD_MAX], singular_[FEDLORA_CORE_SVD_MAX];
    bool reflected_ = false;
};

int64_t large_matrices_per_task(int64_t) { return 1; }

int64_t large_scratch_bytes(int64_t r) { return Room(r).bytes(); }

void large_run(const Correlations &from, const Rotations &to, const PolarOptions &options, int64_t first, int64_t count, void *scratch) {
    LargePolar polar(from.M.rows, scratch);
    for (int64_t i = first; i < first + count; ++i) polar.run(from, to, options, i);
}

}  // namespace

const PolarVariant &large_polar() {
    static constexpr PolarVariant variant{large_matrices_per_task, large_scratch_bytes, large_run};
    return variant;
}

void spoil_rotation(const Rotations &to, int64_t i) { write_nonfinite(to, i, to.Q.rows); }

int64_t complete_rotation_scratch(int64_t r) { return 5 * whole(8 * r * r) + whole(8 * r) + svd_scratch(r); }

// N = U2^T V2 = P D R^T over the columns that do not count; Z = P R^T makes the trace of U1 V1^T + U2 Z V2^T largest.
void complete_rotation(const double *U, const double *V, int64_t r, int64_t k, bool special, double *Q, int64_t ld, void *scratch) {
    const int64_t d = r - k, step = whole(8 * r * r) / 8;
    double *const N = (double *)scratch, *const P = N + step, *const Rh = P + step, *const turned = Rh + step, *const work = turned + step;
    double *const S = work + step;
    for (int64_t i = 0; i < d; ++i)
        for (int64_t j = 0; j < d; ++j) N[i * d + j] = inner(U + (k + i) * r, V + (k + j) * r, r);
    decompose(N, P, S, Rh, d, d, S + whole(8 * r) / 8);
    for (int pass = 0; pass < 2; ++pass) {
        // columns of U2 Z
        std::memcpy(turned, U, sizeof(double) * (size_t)(k * r));
        std::memset(turned + k * r, 0, sizeof(double) * (size_t)(d * r));
        for (int64_t j = 0; j < d; ++j)
            for (int64_t i = 0; i < d; ++i) {
                double z = 0;
                for (int64_t c = 0; c < d; ++c) z += P[i * d + c] * Rh[c * d + j];
                for (int64_t row = 0; row < r; ++row) turned[(k + j) * r + row] += z * U[(k + i) * r + row];
            }
        add_up(turned, V, r, Q, ld);
        if (pass > 0 || !special || !reflects(Q, ld, r, work)) return;
        for (int64_t i = 0; i < d; ++i) P[i * d + d - 1] = -P[i * d + d - 1];
    }
}

}  // namespace fedlora
