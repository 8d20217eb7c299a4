// Rotations of small correlations, one matrix per SIMD lane, on top of the small SVD (docs/numerics.md, Procrustes).
//
// Included once per instruction set after small_svd.hpp and polar_rule.hpp. Q = U V^T is added up from the columns of the Jacobi
// iteration and made orthogonal to the last bits by one Newton-Schulz step; all of it in the lanes. Lanes whose singular
// values count as zero are completed one at a time.

inline fedlora_block square(int r) { return {0, r, r, r, 1, FEDLORA_FLOAT64, 1, 0}; }

// out(i, j) = sum_c a(c, i) b(c, j), element (c, i) of a at a[c * a_step + i * a_gap], and so on; I x J of them in registers.
template <int I, int J, class P>
FEDLORA_INLINE void product_tile(P *out, int ld, const P *a, int a_step, int a_gap, const P *b, int b_step, int depth, const P &zero) {
    P sum[I][J];
#pragma GCC unroll 4
    for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) sum[i][j] = zero;
    for (int c = 0; c < depth; ++c, a += a_step, b += b_step) {
        P left[I];
#pragma GCC unroll 4
        for (int i = 0; i < I; ++i) left[i] = a[i * a_gap];
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) {
            const P right = b[j];
#pragma GCC unroll 4
            for (int i = 0; i < I; ++i) sum[i][j] = sum[i][j] + left[i] * right;
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) out[i * ld + j] = sum[i][j];
}

template <class P>
void product(P *out, int r, const P *a, int a_step, int a_gap, const P *b, int b_step, const P &zero) {
    int i = 0;
    for (; i + 4 <= r; i += 4) {
        int j = 0;
        for (; j + 4 <= r; j += 4) product_tile<4, 4>(out + i * r + j, r, a + i * a_gap, a_step, a_gap, b + j, b_step, r, zero);
        for (; j < r; ++j) product_tile<4, 1>(out + i * r + j, r, a + i * a_gap, a_step, a_gap, b + j, b_step, r, zero);
    }
    for (; i < r; ++i) {
        int j = 0;
        for (; j + 4 <= r; j += 4) product_tile<1, 4>(out + i * r + j, r, a + i * a_gap, a_step, a_gap, b + j, b_step, r, zero);
        for (; j < r; ++j) product_tile<1, 1>(out + i * r + j, r, a + i * a_gap, a_step, a_gap, b + j, b_step, r, zero);
    }
}

template <int W>
class LanePolar {
  public:
    using P = Pack<double, W>;
    using Solver = JacobiSvd<double, W>;
    static constexpr int lanes = P::lanes;

    LanePolar(int r, void *scratch)
        : r_(r),
          shape_(square(r)),
          solver_(shape_, scratch),
          Q_((P *)((char *)scratch + Solver::scratch_bytes(shape_))),
          work_(Q_ + r * r),
          spare_((double *)((char *)Q_ + own_bytes(r))) {}

    static int64_t scratch_bytes(int r) {
        return Solver::scratch_bytes(Shape(square(r))) + own_bytes(r) + spare_bytes(r) + fedlora::complete_rotation_scratch(r);
    }

    // Matrices first .. first + count - 1; other lanes are zero.
    void load(const fedlora::Correlations &from, int64_t first, int count) {
        solver_.clear();
        solver_.left().load(View<const double>(from.M, first, false), from.M.batch_stride, count);
        for (int l = 0; l < lanes; ++l) size_[l] = l < count ? scalar_at<const double>(from.size, first + l) : 0.0;
    }

    void rotate(const fedlora::PolarOptions &options) {
        double threshold[lanes];
        decompose();
        for (int l = 0; l < lanes; ++l) {
            finite_[l] = solver_.finite(l) && __builtin_isfinite(size_[l]);
            exponent_[l] = solver_.exponent(l);
            size_[l] = finite_[l] ? times_power(size_[l], -exponent_[l]) : 0.0;
            threshold[l] = 8 * r_ * Lane<double>::roundoff * size_[l];
            converged_[l] = solver_.converged(l);
            reflected_[l] = false;
        }
        if (options.blend > 0 || options.special) form(threshold, options.special, options.special);
        for (int l = 0; l < lanes; ++l) verdict_[l] = judge(values_[l], r_, threshold[l], reflected_[l], options.special);
        for (int l = 0; l < lanes; ++l)
            for (int c = 0; c < r_; ++c) singular_[l][c] = values_[l][c];
        if (options.blend == 0) set_identity();
        else if (options.blend < 1) mix(options);
    }

    void store(const fedlora::Correlations &from, const fedlora::Rotations &to, int64_t first, int count) {
        Interleaved<double, W>(Q_, r_, r_, r_).store(View<double>(to.Q, first, true), to.Q.batch_stride, count);
        for (int l = 0; l < count; ++l) {
            if (!finite_[l]) {
                write_nonfinite(to, first + l, r_);
                continue;
            }
            const int64_t shift = exponent_[l] + scalar_at<const int32_t>(from.exponent, first + l);
            write_verdict(to, first + l, singular_[l], r_, size_[l], shift, from.unit, verdict_[l], converged_[l]);
        }
    }

  private:
    static int64_t own_bytes(int r) { return (2 * (int64_t)sizeof(P) * r * r + 63) / 64 * 64; }
    static int64_t spare_bytes(int r) { return (3 * 8 * (int64_t)r * r + 63) / 64 * 64; }

    P *left(int c) { return (P *)solver_.at(0, c); }
    P *right(int c) { return (P *)solver_.at(r_, c); }
    double &lane(P *p, int l) { return ((double *)p)[l]; }

    void decompose() {
        solver_.scale();
        solver_.iterate(kDefaultSweeps);
        solver_.finish();
        for (int l = 0; l < lanes; ++l)
            for (int c = 0; c < r_; ++c) {
                values_[l][solver_.place(l, c)] = solver_.value(l, c);
                column_[l][solver_.place(l, c)] = c;
            }
    }

    // Q of the decomposition, whose values are those of a matrix with a largest element in [1/2, 1); values up to the threshold of a lane count as zero. flip: the smallest direction is turned
    // round where that takes Q into SO(r).
    void form(const double *threshold, bool special, bool flip) {
        int rank[lanes];
        bool partial = false;
        for (int l = 0; l < lanes; ++l) {
            rank[l] = (int)judge(values_[l], r_, threshold[l], false, special).rank;
            partial |= rank[l] < r_;
        }
        const P zero = broadcast<W>(0.0);
        product(Q_, r_, left(0), 2 * r_, 1, right(0), 2 * r_, zero);
        if (flip) turn_round(rank);
        if (partial)
            for (int l = 0; l < lanes; ++l)
                if (rank[l] < r_) complete_lane(l, rank[l], special);
        orthonormalise();
    }

    // The sign of det Q from an elimination without pivoting of Q + diag(signs), stable for orthogonal Q: the signs of the pivots
    // multiply to it. Q loses the smallest direction twice where it is negative.
    void turn_round(const int *rank) {
        const P one = broadcast<W>(1.0), zero = broadcast<W>(0.0);
        P sign = one;
        for (int e = 0; e < r_ * r_; ++e) work_[e] = Q_[e];
        for (int k = 0; k < r_; ++k) {
            const P *pivot = work_ + k * r_;
            const P own = copysign(one, pivot[k]), inverse = one / (pivot[k] + own);
            sign = sign * own;
            for (int i = k + 1; i < r_; ++i) {
                P *row = work_ + i * r_;
                const P factor = row[k] * inverse;
                for (int c = k + 1; c < r_; ++c) row[c] = row[c] - factor * pivot[c];
            }
        }
        bool any_turned = false;
        for (int l = 0; l < lanes; ++l) {
            reflected_[l] = rank[l] == r_ && lane(&sign, l) < 0;
            any_turned |= reflected_[l];
        }
        if (!any_turned) return;
        P *const u = work_, *const v = work_ + r_;
        for (int i = 0; i < r_; ++i) u[i] = v[i] = zero;
        for (int l = 0; l < lanes; ++l)
            if (reflected_[l])
                for (int i = 0; i < r_; ++i) {
                    lane(u + i, l) = 2 * lane(left(column_[l][r_ - 1]) + i, l);
                    lane(v + i, l) = lane(right(column_[l][r_ - 1]) + i, l);
                }
        for (int i = 0; i < r_; ++i)
            for (int c = 0; c < r_; ++c) Q_[i * r_ + c] = Q_[i * r_ + c] - u[i] * v[c];
    }

    void complete_lane(int l, int rank, bool special) {
        double *const U = spare_, *const V = U + r_ * r_, *const Q = V + r_ * r_;
        if (rank == 0) {
            for (int e = 0; e < r_ * r_; ++e) lane(Q_ + e, l) = e % (r_ + 1) == 0;
            return;
        }
        int positive = 0;
        for (int c = 0; c < r_; ++c) {
            positive += values_[l][c] > 0;
            for (int i = 0; i < r_; ++i) {
                U[c * r_ + i] = lane(left(column_[l][c]) + i, l);
                V[c * r_ + i] = lane(right(column_[l][c]) + i, l);
            }
        }
        if (positive < r_) {
            fedlora_block columns = square(r_);
            columns.data = (int64_t)U, columns.row_stride = 1, columns.col_stride = r_;
            complete(View<double>(columns, 0, false), r_, positive, r_);
        }
        fedlora::complete_rotation(U, V, r_, rank, special, Q, r_, (char *)spare_ + spare_bytes(r_));
        for (int e = 0; e < r_ * r_; ++e) lane(Q_ + e, l) = Q[e];
    }

    // Q <- Q + Q (1 - Q^T Q) / 2: singular vectors miss orthogonality by a multiple of u that grows with r.
    void orthonormalise() {
        const P zero = broadcast<W>(0.0), one = broadcast<W>(1.0), half = broadcast<W>(0.5);
        P *const gram = work_, *const change = left(0);
        product(gram, r_, Q_, r_, 1, Q_, r_, zero);
        for (int i = 0; i < r_; ++i)
            for (int c = 0; c < r_; ++c) gram[i * r_ + c] = half * ((i == c ? one : zero) - gram[i * r_ + c]);
        product(change, r_, Q_, 1, r_, gram, r_, zero);
        for (int e = 0; e < r_ * r_; ++e) Q_[e] = Q_[e] + change[e];
    }

    void set_identity() {
        for (int i = 0; i < r_; ++i)
            for (int c = 0; c < r_; ++c) Q_[i * r_ + c] = broadcast<W>(i == c ? 1.0 : 0.0);
    }

    // The polar factor of (1 - t) 1 + t Q in the place of Q. Nothing is turned round: without singular values that count as zero
    // a blend of rotations has det 1.
    void mix(const fedlora::PolarOptions &options) {
        double threshold[lanes];
        const P t = broadcast<W>(options.blend), rest = broadcast<W>(1.0 - options.blend);
        solver_.clear();
        for (int c = 0; c < r_; ++c)
            for (int i = 0; i < r_; ++i) {
                const P part = t * Q_[i * r_ + c];
                left(c)[i] = i == c ? rest + part : part;
            }
        decompose();
        for (int l = 0; l < lanes; ++l) {
            threshold[l] = times_power(kSingularBlend, -solver_.exponent(l));
            converged_[l] &= solver_.converged(l);
        }
        form(threshold, options.special, false);
    }

    const int r_;
    const Shape shape_;
    Solver solver_;
    P *const Q_, *const work_;  // r x r, rows first
    double *const spare_;
    bool finite_[lanes], converged_[lanes], reflected_[lanes];
    int exponent_[lanes], column_[lanes][kMax];
    double size_[lanes], values_[lanes][kMax], singular_[lanes][kMax];
    Verdict verdict_[lanes];
};

template <int W>
void rotate_lanes(const fedlora::Correlations &from, const fedlora::Rotations &to, const fedlora::PolarOptions &options, int64_t first,
                  int64_t count, void *scratch) {
    LanePolar<W> lanes((int)from.M.rows, scratch);
    lanes.load(from, first, (int)count);
    lanes.rotate(options);
    lanes.store(from, to, first, (int)count);
}

// Two packs hide latencies as long as the columns of both stay in the first-level cache.
inline bool polar_doubled(int64_t r) { return r <= 8; }

int64_t polar_matrices_per_task(int64_t r) { return polar_doubled(r) ? LanePolar<2>::lanes : LanePolar<1>::lanes; }

int64_t polar_scratch_bytes(int64_t r) {
    return polar_doubled(r) ? LanePolar<2>::scratch_bytes((int)r) : LanePolar<1>::scratch_bytes((int)r);
}

void polar_run(const fedlora::Correlations &from, const fedlora::Rotations &to, const fedlora::PolarOptions &options, int64_t first,
               int64_t count, void *scratch) {
    polar_doubled(from.M.rows) ? rotate_lanes<2>(from, to, options, first, count, scratch)
                               : rotate_lanes<1>(from, to, options, first, count, scratch);
}
