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
        for (int c = 0; c < even_; ++c) weight_[c] = broadcast<W>(T(1)), start_[c] = broadcast<W>(T(0));
        for (int sweep = 0; sweep < max_sweeps; ++sweep) {
            begin_sweep();
            rotated_ = greater(tolerance_, tolerance_);
            rotate_all();
            if (!any(rotated_)) return;
        }
        begin_sweep();
    }

    // Unit columns in X and J by the sign rule, their singular values, and the places of the columns by falling value; equal
    // values keep their order. Adding zero makes every zero positive: the sign of one may depend on lane-mates.
    void finish() {
        const P zero = broadcast<W>(T(0)), one = broadcast<W>(T(1));
        for (int c = 0; c < cols_; ++c) {
            P *x = column(c), *j = x + rows_;
            const P x_norm = sqrt(dot(x, x, rows_)), j_norm = sqrt(dot(j, j, cols_));
            const P sign = wide_ ? sign_of(j, cols_) : sign_of(x, rows_);
            const P x_factor = sign / select(greater(x_norm, zero), x_norm, one), j_factor = sign / j_norm;
            for (int i = 0; i < rows_; ++i) x[i] = x[i] * x_factor + zero;
            for (int i = 0; i < cols_; ++i) j[i] = j[i] * j_factor + zero;
            value_[c] = x_norm / j_norm;
        }
        for (int c = 0; c < cols_; ++c) {
            place_[c] = zero;
            for (int o = 0; o < c; ++o) place_[c] = place_[c] + select(greater(value_[c], value_[o]), zero, one);
            for (int o = c + 1; o < cols_; ++o) place_[c] = place_[c] + select(greater(value_[o], value_[c]), one, zero);
        }
        rotated_flag_ = select(rotated_, one, zero);
    }

    // X (in the end U), J (V) and, after `sort`, the singular values of the matrices as they came.
    Interleaved<T, W> left() { return {data_, rows_, cols_, length_}; }
    Interleaved<T, W> right() { return {data_ + rows_, cols_, cols_, length_}; }
    Interleaved<T, W> values() {
        for (int c = 0; c < cols_; ++c)
            for (int l = 0; l < lanes; ++l) lane(norm_[c], l) = unscale(lane(value_[c], l), l);
        return {norm_, cols_, 1, cols_};
    }

    // Columns to their places, by a network of exchanges (Batcher's merge exchange).
    void sort() {
        for (int run = 1; run < cols_; run *= 2)
            for (int gap = run; gap > 0; gap /= 2)
                for (int first = gap % run; first + gap < cols_; first += 2 * gap)
                    for (int c = first; c < first + gap && c + gap < cols_; ++c)
                        if (c / (2 * run) == (c + gap) / (2 * run)) exchange(c, c + gap);
    }

    T value(int l, int c) const { return lane(value_[c], l); }
    int place(int l, int c) const { return (int)lane(place_[c], l); }
    int exponent(int l) const { return exponent_[l]; }
    bool finite(int l) const { return finite_[l]; }
    bool zero(int l) const { return zero_[l]; }
    bool converged(int l) const { return lane(rotated_flag_, l) == 0; }
    T unscale(T x, int l) const {
        return x * power_of_two<T>(exponent_[l] / 2) * power_of_two<T>(exponent_[l] - exponent_[l] / 2);
    }

  private:
    // x <- x - first y, y <- y + second x; zeros in the lanes that `where` leaves alone.
    struct Rotation {
        P first, second;
        M where;
    };

    // Two pairs of columns, x at cx and y at cy, and the products of the four.
    struct Meeting {
        int cx, cy;
        P g11, g12, g21, g22, gx, gy;
        Rotation r1, r2, r3, r4;
        Meeting(int cx, int cy) : cx(cx), cy(cy) {}
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

    // Fresh norms. Folds the cosines of earlier sweeps into a column once they have grown small, and flushes columns that the
    // iteration might never end with: those so small that their products would underflow, and those of which a sweep has left
    // less than its own rounding errors, which where columns are dependent are dependent again, on and on. Like those errors,
    // what is flushed is small beside the column that it comes from.
    void begin_sweep() {
        const P zero = broadcast<W>(T(0)), one = broadcast<W>(T(1));
        const P flush = broadcast<W>(Lane<T>::flush), light = broadcast<W>(T(0x1p-16));
        const P rounding = broadcast<W>(16 * Lane<T>::roundoff * Lane<T>::roundoff);
        for (int c = 0; c < even_; ++c) {
            P *x = column(c);
            const M fold = greater(light, weight_[c]);
            if (any(fold)) {
                const P d = select(fold, sqrt(weight_[c]), one);
                for (int i = 0; i < length_; ++i) x[i] = x[i] * d;
                weight_[c] = select(fold, one, weight_[c]);
            }
            norm_[c] = dot(x, x, rows_) * weight_[c];
            const M dust = greater(max(flush, start_[c] * rounding), norm_[c]);
            if (any(dust)) {
                for (int i = 0; i < rows_; ++i) x[i] = select(dust, zero, x[i]);
                norm_[c] = select(dust, zero, norm_[c]);
            }
            start_[c] = norm_[c];
        }
    }

    // Every pair of columns once: those inside a block of four, then those between two blocks. Meetings without a common
    // column are planned side by side, which hides the latency of their square roots and divisions.
    void rotate_all() {
        for (int x = 0; x < even_; x += 4)
            x + 2 < even_ ? rotate_four(x) : rotate_pair(x, x + 1);
        for (int x = 0; x < even_; x += 4)
            for (int y = x + 4; y < even_; y += 4) {
                if (y + 2 < even_) {
                    meet(x, y, x + 2, y + 2);
                    meet(x, y + 2, x + 2, y);
                } else {
                    meet(x, y);
                    meet(x + 2, y);
                }
            }
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

    // Whether a pair must be turned at all.
    FEDLORA_INLINE M oblique(int x, int y, const P &g) const {
        const P cosine = g * rsqrt_estimate(norm_[x]) * rsqrt_estimate(norm_[y]);
        return greater(cosine * cosine * (weight_[x] * weight_[y]), tolerance_);
    }

    // A lane that is left alone subtracts and adds zero times a number: nothing but the sign of a zero can change.
    static FEDLORA_INLINE void apply(const Rotation &r, P &x, P &y) {
        const P old = x;
        x = x - r.first * y;
        y = y + r.second * old;
    }

    void rotate_pair(int cx, int cy) {
        P *x = column(cx), *y = column(cy);
        const Rotation r = plan(cx, cy, dot(x, y, rows_));
        if (!any(r.where)) return;
        for (int i = 0; i < length_; ++i) apply(r, x[i], y[i]);
    }

    FEDLORA_INLINE void measure(Meeting &m) {
        const P *x1 = column(m.cx), *x2 = column(m.cx + 1), *y1 = column(m.cy), *y2 = column(m.cy + 1);
        m.g11 = m.g12 = m.g21 = m.g22 = m.gx = m.gy = broadcast<W>(T(0));
#pragma GCC unroll 2
        for (int i = 0; i < rows_; ++i) {
            m.g11 = m.g11 + x1[i] * y1[i];
            m.g12 = m.g12 + x1[i] * y2[i];
            m.g21 = m.g21 + x2[i] * y1[i];
            m.g22 = m.g22 + x2[i] * y2[i];
            m.gx = m.gx + x1[i] * x2[i];
            m.gy = m.gy + y1[i] * y2[i];
        }
    }

    FEDLORA_INLINE bool quiet(const Meeting &m) const {
        return !any((oblique(m.cx, m.cy, m.g11) | oblique(m.cx + 1, m.cy + 1, m.g22)) |
                    (oblique(m.cx, m.cy + 1, m.g12) | oblique(m.cx + 1, m.cy, m.g21)));
    }

    // (x1, y1) and (x2, y2), then (x1, y2) and (x2, y1), whose products follow from those before the first two.
    FEDLORA_INLINE void plan_first(Meeting &m) {
        m.r1 = plan(m.cx, m.cy, m.g11);
        m.r2 = plan(m.cx + 1, m.cy + 1, m.g22);
    }

    FEDLORA_INLINE void plan_second(Meeting &m) {
        const P h12 = (m.g12 - m.r1.first * m.gy) + m.r2.second * (m.gx - m.r1.first * m.g21);
        const P h21 = (m.g21 + m.r1.second * m.gx) - m.r2.first * (m.gy + m.r1.second * m.g12);
        m.r3 = plan(m.cx, m.cy + 1, h12);
        m.r4 = plan(m.cx + 1, m.cy, h21);
    }

    FEDLORA_INLINE void turn(const Meeting &m) {
        P *x1 = column(m.cx), *x2 = column(m.cx + 1), *y1 = column(m.cy), *y2 = column(m.cy + 1);
        if (!any((m.r1.where | m.r2.where) | (m.r3.where | m.r4.where))) return;
        const Rotation r1 = m.r1, r2 = m.r2, r3 = m.r3, r4 = m.r4;
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

    void meet(int cx, int cy) {
        Meeting m(cx, cy);
        measure(m);
        if (quiet(m)) return;
        plan_first(m);
        plan_second(m);
        turn(m);
    }

    void meet(int cx, int cy, int dx, int dy) {
        Meeting m(cx, cy), n(dx, dy);
        measure(m);
        measure(n);
        if (quiet(m) && quiet(n)) return;
        plan_first(m);
        plan_first(n);
        plan_second(m);
        plan_second(n);
        turn(m);
        turn(n);
    }

    // All pairs of the four columns from c on: (1, 2) and (3, 4), then as in a meeting.
    void rotate_four(int c) {
        Meeting m(c, c + 2);
        measure(m);
        const Rotation r5 = plan(c, c + 1, m.gx), r6 = plan(c + 2, c + 3, m.gy);
        const P g1 = m.g11 - r5.first * m.g21, g2 = m.g12 - r5.first * m.g22;
        const P g3 = m.g21 + r5.second * m.g11, g4 = m.g22 + r5.second * m.g12;
        m.g11 = g1 - r6.first * g2;
        m.g12 = g2 + r6.second * g1;
        m.g21 = g3 - r6.first * g4;
        m.g22 = g4 + r6.second * g3;
        m.gx = select(r5.where, broadcast<W>(T(0)), m.gx);
        m.gy = select(r6.where, broadcast<W>(T(0)), m.gy);
        plan_first(m);
        plan_second(m);
        const Rotation r1 = m.r1, r2 = m.r2, r3 = m.r3, r4 = m.r4;
        if (!any((r1.where | r2.where) | (r3.where | r4.where) | (r5.where | r6.where))) return;
        P *x1 = column(c), *x2 = column(c + 1), *y1 = column(c + 2), *y2 = column(c + 3);
        for (int i = 0; i < length_; ++i) {
            P p = x1[i], q = x2[i], r = y1[i], s = y2[i];
            apply(r5, p, q);
            apply(r6, r, s);
            apply(r1, p, r);
            apply(r2, q, s);
            apply(r3, p, s);
            apply(r4, q, r);
            x1[i] = p;
            x2[i] = q;
            y1[i] = r;
            y2[i] = s;
        }
    }

    // Columns c and d change places in the lanes where d comes first.
    void exchange(int c, int d) {
        const M swap = greater(place_[c], place_[d]);
        if (!any(swap)) return;
        const auto apart = [&](P &x, P &y) {
            const P old = x;
            x = select(swap, y, x);
            y = select(swap, old, y);
        };
        P *x = column(c), *y = column(d);
        for (int i = 0; i < length_; ++i) apart(x[i], y[i]);
        apart(value_[c], value_[d]);
        apart(place_[c], place_[d]);
    }

    const int rows_, cols_, even_, length_;
    const bool wide_;
    P *const data_;
    const P tolerance_;  // squared
    P norm_[kMax + 1], weight_[kMax + 1], start_[kMax + 1], value_[kMax], place_[kMax], rotated_flag_;
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

template <class T>
void fill(const View<T> &to, int rows, int cols, T value) {
    for (int i = 0; i < rows; ++i)
        for (int c = 0; c < cols; ++c) to(i, c) = value;
}

// What is left of one matrix once its vectors and values are stored: the codes, and the vectors that the iteration cannot give.
template <class T, int W>
void settle(JacobiSvd<T, W> &solver, int l, const Shape &shape, const SvdGroup &group, int64_t index) {
    const View<T> S(group.S, index, false);
    int32_t &info = View<int32_t>(group.info, index, false)(0, 0);
    int32_t &notes = View<int32_t>(group.notes, index, false)(0, 0);
    info = notes = 0;
    const bool overflow = __builtin_isinf(S(0, 0)), full = solver.value(l, shape.cols - 1) > 0;
    if (full && solver.converged(l) && !overflow) return;
    const View<T> left(shape.wide ? group.Vh : group.U, index, shape.wide);
    if (!solver.finite(l)) {
        const T nan = (T)__builtin_nan("");
        fill(left, shape.rows, shape.cols, nan);
        fill(View<T>(shape.wide ? group.U : group.Vh, index, !shape.wide), shape.cols, shape.cols, nan);
        fill(S, 1, shape.cols, nan);
        info = FEDLORA_INFO_NONFINITE;
        return;
    }
    info = (overflow ? FEDLORA_INFO_OVERFLOW : 0) | (solver.converged(l) ? 0 : FEDLORA_INFO_NOT_CONVERGED);
    notes = solver.zero(l) ? FEDLORA_NOTE_ZERO : 0;
    int rank = 0;
    while (rank < shape.cols && solver.value(l, rank) > 0) ++rank;
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
    solver.left().load(View<const T>(group.C, first, shape.wide), group.C.batch_stride, count);
    solver.scale();
    solver.iterate(max_sweeps > 0 ? max_sweeps : kDefaultSweeps);
    solver.finish();
    solver.sort();

    const fedlora_block &of_x = shape.wide ? group.Vh : group.U, &of_j = shape.wide ? group.U : group.Vh;
    solver.left().store(View<T>(of_x, first, shape.wide), of_x.batch_stride, count);
    solver.right().store(View<T>(of_j, first, !shape.wide), of_j.batch_stride, count);
    solver.values().store(View<T>(group.S, first, true), group.S.batch_stride, count);
    for (int l = 0; l < count; ++l) settle(solver, l, shape, group, first + l);
}

// Two packs side by side hide the latency of square roots and divisions where columns are short; where they are long,
// the working set had better stay small. A function of shape and dtype alone.
inline bool doubled(const fedlora_block &C) { return C.rows * C.cols <= 10 * 10; }

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
