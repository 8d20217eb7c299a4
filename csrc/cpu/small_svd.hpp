// One-sided Jacobi SVD of small matrices, one matrix per SIMD lane (docs/numerics.md, Core SVD).
//
// Included once per instruction set after svd_view.hpp. Every lane runs the same instructions on its own matrix and keeps its
// values by masks, so that the result of a matrix depends on nothing but the matrix.
//
// The work is X J = U diag(s) for X = C, or C^T where C is wide. Column c of X and of J lie one above the other in one
// column of `rows + cols` packs. Rotations are scaled ("fast") ones: a stored column x^ stands for x = d x^, a rotation
// takes two FMA per pair of elements, and d^2 (`weight`) carries the cosines until the next sweep begins.

constexpr int kMax = kSmallSvdMax;

// C as the work sees it: at least as many rows as columns.
struct Shape {
    int rows, cols;
    bool wide;
    explicit Shape(const fedlora_block &C)
        : rows((int)(C.rows < C.cols ? C.cols : C.rows)),
          cols((int)(C.rows < C.cols ? C.rows : C.cols)),
          wide(C.rows < C.cols) {}
};

template <class T, int W>
class JacobiSvd {
  public:
    using P = Pack<T, W>;
    using M = Mask<T, W>;
    static constexpr int lanes = P::lanes;

    JacobiSvd(const Shape &shape, void *scratch)
        : rows_(shape.rows),
          cols_(shape.cols),
          even_(shape.cols + (shape.cols & 1)),
          length_(shape.rows + shape.cols),
          wide_(shape.wide),
          data_((P *)scratch),
          tolerance_(broadcast<W>(T(shape.rows + 10) * Lane<T>::roundoff * Lane<T>::roundoff)) {}

    static int64_t scratch_bytes(const Shape &shape) {
        return (int64_t)sizeof(P) * (shape.cols + (shape.cols & 1)) * (shape.rows + shape.cols);
    }

    // Element (i, c) of X in all lanes; rows from `rows` on are J.
    T *at(int i, int c) { return (T *)(data_ + c * length_ + i); }

    void clear() {
        for (int i = 0; i < even_ * length_; ++i) data_[i] = broadcast<W>(T(0));
        for (int c = 0; c < cols_; ++c) column(c)[rows_ + c] = broadcast<W>(T(1));
    }

    // Powers of two bring the largest element of each lane into [1/2, 1); a lane with NaN or Inf becomes zero.
    void scale() {
        const P zero = broadcast<W>(T(0));
        P largest = zero, probe = zero;
        for (int c = 0; c < cols_; ++c)
            for (int i = 0; i < rows_; ++i) {
                largest = max(abs(column(c)[i]), largest);
                probe = probe + (column(c)[i] - column(c)[i]);
            }
        P first, second;
        for (int l = 0; l < lanes; ++l) {
            finite_[l] = lane(probe, l) == 0;
            zero_[l] = lane(largest, l) == 0;
            exponent_[l] = finite_[l] && !zero_[l] ? exponent_of<T>(lane(largest, l)) : 0;
            lane(first, l) = finite_[l] ? power_of_two<T>(-(exponent_[l] / 2)) : T(0);
            lane(second, l) = power_of_two<T>(-(exponent_[l] - exponent_[l] / 2));
        }
        const M finite = greater(first, zero);
        for (int c = 0; c < cols_; ++c)
            for (int i = 0; i < rows_; ++i) column(c)[i] = select(finite, column(c)[i] * first * second, zero);
    }

    void iterate(int max_sweeps) {
        for (int c = 0; c < even_; ++c) weight_[c] = broadcast<W>(T(1));
        for (int sweep = 0; sweep < max_sweeps; ++sweep) {
            begin_sweep();
            rotated_ = greater(tolerance_, tolerance_);
            rotate_all();
            if (!any(rotated_)) return;
        }
        begin_sweep();
    }

    // Unit columns in X and J by the sign rule, their singular values, and the places of the columns by falling value; equal values keep
    // their order.
    void finish() {
        const P zero = broadcast<W>(T(0)), one = broadcast<W>(T(1));
        for (int c = 0; c < cols_; ++c) {
            P *x = column(c), *j = x + rows_;
            const P x_norm = sqrt(norm_[c]), j_norm = sqrt(dot(j, j, cols_));
            const P sign = wide_ ? sign_of(j, cols_) : sign_of(x, rows_);
            const P x_divisor = select(greater(x_norm, zero), x_norm, one) * sign, j_divisor = j_norm * sign;
            for (int i = 0; i < rows_; ++i) x[i] = x[i] / x_divisor;
            for (int i = 0; i < cols_; ++i) j[i] = j[i] / j_divisor;
            value_[c] = x_norm / j_norm;
        }
        for (int c = 0; c < cols_; ++c) {
            place_[c] = zero;
            for (int o = 0; o < c; ++o) place_[c] = place_[c] + select(greater(value_[c], value_[o]), zero, one);
            for (int o = c + 1; o < cols_; ++o) place_[c] = place_[c] + select(greater(value_[o], value_[c]), one, zero);
        }
        rotated_flag_ = select(rotated_, one, zero);
    }

    T value(int l, int c) const { return lane(value_[c], l); }
    int place(int l, int c) const { return (int)lane(place_[c], l); }
    bool finite(int l) const { return finite_[l]; }
    bool zero(int l) const { return zero_[l]; }
    bool converged(int l) const { return lane(rotated_flag_, l) == 0; }
    T unscale(T x, int l) const {
        return x * power_of_two<T>(exponent_[l] / 2) * power_of_two<T>(exponent_[l] - exponent_[l] / 2);
    }

  private:
    // x <- x - first y, y <- y + second x in the lanes of `where`.
    struct Rotation {
        P first, second;
        M where;
    };

    P *column(int c) { return data_ + c * length_; }
    static T &lane(P &p, int l) { return ((T *)&p)[l]; }
    static T lane(const P &p, int l) { return ((const T *)&p)[l]; }

    static P dot(const P *x, const P *y, int n) {
        P even = broadcast<W>(T(0)), odd = even;
        int i = 0;
        for (; i + 1 < n; i += 2) {
            even = even + x[i] * y[i];
            odd = odd + x[i + 1] * y[i + 1];
        }
        if (i < n) even = even + x[i] * y[i];
        return even + odd;
    }

    // 1 or -1: what makes the first nearly largest element of u positive (docs/numerics.md, Sign rule).
    static P sign_of(const P *u, int n) {
        const P zero = broadcast<W>(T(0)), one = broadcast<W>(T(1));
        P largest = zero, first = zero;
        for (int i = 0; i < n; ++i) largest = max(abs(u[i]), largest);
        const P limit = largest * broadcast<W>(kNearly<T>);
        for (int i = n - 1; i >= 0; --i) first = select(greater(limit, abs(u[i])), first, u[i]);
        return select(greater(zero, first), zero - one, one);
    }

    // Folds the cosines of the last sweep into the columns, takes fresh norms, and flushes columns so small that their
    // products would underflow: with them the iteration may never end.
    void begin_sweep() {
        const P zero = broadcast<W>(T(0)), flush = broadcast<W>(Lane<T>::flush);
        for (int c = 0; c < even_; ++c) {
            P *x = column(c);
            const P d = sqrt(weight_[c]);
            for (int i = 0; i < length_; ++i) x[i] = x[i] * d;
            weight_[c] = broadcast<W>(T(1));
            norm_[c] = dot(x, x, rows_);
            const M dust = greater(flush, norm_[c]);
            if (!any(dust)) continue;
            for (int i = 0; i < rows_; ++i) x[i] = select(dust, zero, x[i]);
            norm_[c] = select(dust, zero, norm_[c]);
        }
    }

    // Every pair of columns once: pairs inside a block of two, then the four pairs between two blocks at a time.
    void rotate_all() {
        for (int x = 0; x < even_; x += 2) rotate_pair(x, x + 1);
        for (int x = 0; x < even_; x += 2)
            for (int y = x + 2; y < even_; y += 2) rotate_blocks(x, y);
    }

    // The rotation that makes columns x and y orthogonal, given their stored product g; the longer one grows.
    //
    // Everything is divided by a power of two near |x|^2 + |y|^2, so that no square leaves the range; the threshold
    // |g| > sqrt(rows + 10) u |x| |y| is tested on the cosine for the same reason. The 10 is for short columns: there the
    // rounding of a rotation alone can exceed sqrt(rows) u, and one 2 x 2 matrix in a thousand would rotate for ever.
    // A NaN never rotates.
    FEDLORA_INLINE Rotation plan(int x, int y, const P &g) {
        const P a = norm_[x], b = norm_[y], product = weight_[x] * weight_[y];
        const P cosine = g * rsqrt_estimate(a) * rsqrt_estimate(b);
        const M where = greater(cosine * cosine * product, tolerance_);
        rotated_ = rotated_ | where;

        const P f = inverse_power(a + b), delta = (b - a) * f, twice = (g + g) * f;
        const P h = sqrt(delta * delta + twice * twice * product);
        const P q = twice / (delta + copysign(h, delta));
        const P zero = broadcast<W>(T(0)), one = broadcast<W>(T(1));
        const P first = select(where, q * weight_[y], zero), second = select(where, q * weight_[x], zero);

        const P cosine2 = one / (one + first * second), shift = first * weight_[x] * g;
        weight_[x] = select(where, weight_[x] * cosine2, weight_[x]);
        weight_[y] = select(where, weight_[y] * cosine2, weight_[y]);
        norm_[x] = select(where, max(a - shift, zero), a);
        norm_[y] = select(where, max(b + shift, zero), b);
        return {first, second, where};
    }

    static FEDLORA_INLINE void apply(const Rotation &r, P &x, P &y) {
        const P old = x;
        x = subtract_where(r.where, r.first, y, x);
        y = add_where(r.where, r.second, old, y);
    }

    void rotate_pair(int cx, int cy) {
        P *x = column(cx), *y = column(cy);
        const Rotation r = plan(cx, cy, dot(x, y, rows_));
        if (!any(r.where)) return;
        for (int i = 0; i < length_; ++i) apply(r, x[i], y[i]);
    }

    // Pairs (x1, y1), (x2, y2), then (x1, y2), (x2, y1), with one pass for the products and one for the data: the products
    // of the second two follow from those before the first two.
    void rotate_blocks(int cx, int cy) {
        P *x1 = column(cx), *x2 = column(cx + 1), *y1 = column(cy), *y2 = column(cy + 1);
        const P zero = broadcast<W>(T(0));
        P g11 = zero, g12 = zero, g21 = zero, g22 = zero, gx = zero, gy = zero;
#pragma GCC unroll 2
        for (int i = 0; i < rows_; ++i) {
            g11 = g11 + x1[i] * y1[i];
            g12 = g12 + x1[i] * y2[i];
            g21 = g21 + x2[i] * y1[i];
            g22 = g22 + x2[i] * y2[i];
            gx = gx + x1[i] * x2[i];
            gy = gy + y1[i] * y2[i];
        }
        const Rotation r1 = plan(cx, cy, g11), r2 = plan(cx + 1, cy + 1, g22);
        const P h12 = (g12 - r1.first * gy) + r2.second * (gx - r1.first * g21);
        const P h21 = (g21 + r1.second * gx) - r2.first * (gy + r1.second * g12);
        const Rotation r3 = plan(cx, cy + 1, h12), r4 = plan(cx + 1, cy, h21);
        if (!any((r1.where | r2.where) | (r3.where | r4.where))) return;
#pragma GCC unroll 2
        for (int i = 0; i < length_; ++i) {
            P a = x1[i], b = x2[i], c = y1[i], d = y2[i];
            apply(r1, a, c);
            apply(r2, b, d);
            apply(r3, a, d);
            apply(r4, b, c);
            x1[i] = a;
            x2[i] = b;
            y1[i] = c;
            y2[i] = d;
        }
    }

    const int rows_, cols_, even_, length_;
    const bool wide_;
    P *const data_;
    const P tolerance_;  // squared
    P norm_[kMax + 1], weight_[kMax + 1], value_[kMax], place_[kMax], rotated_flag_;
    M rotated_;
    int exponent_[lanes];
    bool finite_[lanes], zero_[lanes];
};

// Orthonormal columns rank..cols-1 beside the first `rank` ones: each time the unit vector that sticks out most, made
// orthogonal twice. Signs follow the sign rule.
template <class T>
void complete(const View<T> &u, int rows, int rank, int cols) {
    T rest[kMax];
    for (int c = rank; c < cols; ++c) {
        int best = 0;
        T largest = -1;
        for (int j = 0; j < rows; ++j) {
            T out = 1;
            for (int k = 0; k < c; ++k) out -= u(j, k) * u(j, k);
            if (out > largest) largest = out, best = j;
        }
        for (int i = 0; i < rows; ++i) rest[i] = i == best;
        for (int pass = 0; pass < 2; ++pass)
            for (int k = 0; k < c; ++k) {
                T along = 0;
                for (int i = 0; i < rows; ++i) along += u(i, k) * rest[i];
                for (int i = 0; i < rows; ++i) rest[i] -= along * u(i, k);
            }
        T norm2 = 0;
        for (int i = 0; i < rows; ++i) norm2 += rest[i] * rest[i];
        T size = 0;
        for (int i = 0; i < rows; ++i) size = __builtin_fabs(rest[i]) > size ? (T)__builtin_fabs(rest[i]) : size;
        int first = 0;
        while (__builtin_fabs(rest[first]) < size * kNearly<T>) ++first;
        const T inverse = (rest[first] < 0 ? T(-1) : T(1)) / (T)__builtin_sqrt(norm2);
        for (int i = 0; i < rows; ++i) u(i, c) = rest[i] * inverse;
    }
}

// Matrices first .. first + count - 1 of the group into the lanes; the other lanes stay zero.
template <class T, int W>
void load(JacobiSvd<T, W> &solver, const Shape &shape, const SvdGroup &group, int64_t first, int count) {
    const View<const T> C(group.C, first, shape.wide);
    for (int i = 0; i < shape.rows; ++i)
        for (int c = 0; c < shape.cols; ++c) {
            const T *from = &C(i, c);
            T *to = solver.at(i, c);
            for (int l = 0; l < count; ++l) to[l] = from[l * group.C.batch_stride];
        }
}

// `length` elements of column c of X (from = 0) or of J (from = rows), each lane's to its own place.
template <class T, int W>
void store_column(JacobiSvd<T, W> &solver, int from, int c, int length, const View<T> &to, int64_t batch_stride, int count) {
    for (int l = 0; l < count; ++l) {
        const T *source = solver.at(from, c) + l;
        T *target = to.data + l * batch_stride + solver.place(l, c) * to.col;
        for (int i = 0; i < length; ++i) target[i * to.row] = source[i * solver.lanes];
    }
}

template <class T>
void fill(const View<T> &to, int rows, int cols, T value) {
    for (int i = 0; i < rows; ++i)
        for (int c = 0; c < cols; ++c) to(i, c) = value;
}

// What is left of one matrix once its vectors are stored: S, the codes, and the vectors that the iteration cannot give.
template <class T, int W>
void store_rest(JacobiSvd<T, W> &solver, int l, const Shape &shape, const SvdGroup &group, int64_t index) {
    const View<T> left(shape.wide ? group.Vh : group.U, index, shape.wide);
    const View<T> right(shape.wide ? group.U : group.Vh, index, !shape.wide);
    const View<T> S(group.S, index, false);
    int32_t &info = View<int32_t>(group.info, index, false)(0, 0);
    int32_t &notes = View<int32_t>(group.notes, index, false)(0, 0);
    if (!solver.finite(l)) {
        const T nan = (T)__builtin_nan("");
        fill(left, shape.rows, shape.cols, nan);
        fill(right, shape.cols, shape.cols, nan);
        fill(S, 1, shape.cols, nan);
        info = FEDLORA_INFO_NONFINITE;
        notes = 0;
        return;
    }
    int rank = 0;
    bool overflow = false;
    for (int c = 0; c < shape.cols; ++c) {
        const T value = solver.unscale(solver.value(l, c), l);
        rank += solver.value(l, c) > 0;
        overflow |= __builtin_isinf(value) != 0;
        S(0, solver.place(l, c)) = value;
    }
    info = (overflow ? FEDLORA_INFO_OVERFLOW : 0) | (solver.converged(l) ? 0 : FEDLORA_INFO_NOT_CONVERGED);
    notes = solver.zero(l) ? FEDLORA_NOTE_ZERO : 0;
    if (rank < shape.cols) complete(left, shape.rows, rank, shape.cols);
}

// One task: as many matrices as there are lanes, from `first` on.
template <class T, int W>
void solve(const SvdGroup &group, int64_t first, int max_sweeps, void *scratch) {
    const Shape shape(group.C);
    JacobiSvd<T, W> solver(shape, scratch);
    const int64_t left = group.C.batch - first;
    const int count = left < solver.lanes ? (int)left : solver.lanes;
    solver.clear();
    load(solver, shape, group, first, count);
    solver.scale();
    solver.iterate(max_sweeps > 0 ? max_sweeps : kDefaultSweeps);
    solver.finish();

    const fedlora_block &of_x = shape.wide ? group.Vh : group.U, &of_j = shape.wide ? group.U : group.Vh;
    const View<T> x(of_x, first, shape.wide), j(of_j, first, !shape.wide);
    for (int c = 0; c < shape.cols; ++c) {
        store_column(solver, 0, c, shape.rows, x, of_x.batch_stride, count);
        store_column(solver, shape.rows, c, shape.cols, j, of_j.batch_stride, count);
    }
    for (int l = 0; l < count; ++l) store_rest(solver, l, shape, group, first + l);
}

// Two packs side by side hide the latency of square roots and divisions where columns are short; where they are long,
// the working set had better stay small. A function of shape and dtype alone.
inline bool doubled(const fedlora_block &C) { return C.rows * C.cols <= 16 * 16; }

template <int W>
constexpr int64_t lanes_of(int64_t dtype) {
    return dtype == FEDLORA_FLOAT32 ? Pack<float, W>::lanes : Pack<double, W>::lanes;
}

int64_t matrices_per_task(const fedlora_block &C) { return doubled(C) ? lanes_of<2>(C.dtype) : lanes_of<1>(C.dtype); }

int64_t scratch_bytes(const fedlora_block &C) {
    const Shape shape(C);
    return doubled(C) ? JacobiSvd<float, 2>::scratch_bytes(shape) : JacobiSvd<float, 1>::scratch_bytes(shape);
}

void run(const SvdGroup &group, int64_t first, int max_sweeps, void *scratch) {
    const bool twice = doubled(group.C), single = group.C.dtype == FEDLORA_FLOAT32;
    if (single)
        twice ? solve<float, 2>(group, first, max_sweeps, scratch) : solve<float, 1>(group, first, max_sweeps, scratch);
    else
        twice ? solve<double, 2>(group, first, max_sweeps, scratch) : solve<double, 1>(group, first, max_sweeps, scratch);
}
