// SVD by way of a bidiagonal matrix, one matrix at a time, vectors along the columns (docs/numerics.md, Core SVD).
//
// Included once per instruction set after columns.hpp, with FEDLORA_BIDIAGONAL the variant of the bidiagonal SVD. Errors are
// small beside the largest singular value, not beside each.

// x, rows k and on, is mapped onto its first element: x becomes v with v_k = 1 and zeros above, the answer is that element;
// tau is 0 where there is nothing to map.
template <class T>
T unit_reflection(T *x, int k, int vectors, T &tau) {
    const T alpha = x[k];
    for (int i = k / kLanes<T> * kLanes<T>; i < k; ++i) x[i] = 0;
    Vec<T> *v = (Vec<T> *)x, sum = {}, other = {};
    int i = k / kLanes<T>;
    for (; i + 1 < vectors; i += 2) {
        sum += v[i] * v[i];
        other += v[i + 1] * v[i + 1];
    }
    if (i < vectors) sum += v[i] * v[i];
    const T square = total<T>(sum + other);
    tau = 0;
    if (!(square > Lane<T>::smallest)) {
        for (int c = k / kLanes<T>; c < vectors; ++c) v[c] = Vec<T>{};
        x[k] = 1;
        return 0;
    }
    const T size = Native<T>::sqrt(Vec<T>{} + square)[0], beta = alpha < 0 ? size : -size, factor = 1 / (alpha - beta);
    for (int c = k / kLanes<T>; c < vectors; ++c) v[c] *= factor;
    x[k] = 1;
    tau = (beta - alpha) / beta;
    return beta;
}

// X = H B G^T with H and G products of reflections: those from the left in the columns of A, those from the right in the
// columns of R. One pass over what is left of A for each pair: eight columns at a time are updated by the reflections before
// (A <- A - u z^T - x v^T), multiplied by the new u, which makes their elements of the row that the next v comes from, and added
// up with those as weights.
template <class T>
class Bidiagonalisation {
  public:
    // A: a multiple of eight columns, zero beyond cols; row_z and row_v that long too; x, sum and none as long as a column.
    struct Room {
        Columns<T> A, R;
        T *left, *right, *row_z, *row_v, *x, *sum, *none;
        double *q, *e;
    };

    Bidiagonalisation(const Room &room, int rows, int cols)
        : room_(room), cols_(cols), vectors_(vectors_of<T>(rows)), row_vectors_(vectors_of<T>(cols)) {}

    void reduce() {
        for (int i = 0; i < vectors_; ++i) vec(room_.x)[i] = vec(room_.none)[i] = Vec<T>{};
        for (int c = 0; c < Columns<T>::padded(cols_ + kBlock); ++c) room_.row_z[c] = room_.row_v[c] = 0;
        const Vec<T> *before = vec(room_.none);
        for (int k = 0; k < cols_; ++k) {
            Vec<T> *u = room_.A.vectors(k), *x = vec(room_.x);
            const T z = room_.row_z[k], v = room_.row_v[k];
            for (int i = k / kLanes<T>; i < vectors_; ++i) u[i] -= before[i] * z + x[i] * v;
            room_.q[k] = unit_reflection(room_.A[k], k, vectors_, room_.left[k]);
            room_.row_z[k] = room_.row_v[k] = 0;
            room_.e[k] = k + 1 < cols_ ? row(k, before) : T(0);
            before = u;
        }
    }

  private:
    static Vec<T> *vec(T *x) { return (Vec<T> *)x; }

    // The reflection from the right that belongs to row k, and x for the next pass.
    T row(int k, const Vec<T> *before) {
        Vec<T> *sum = vec(room_.sum);
        const int start = k / kLanes<T>;
        for (int i = start; i < vectors_; ++i) sum[i] = Vec<T>{};
        for (int c = (k + 1) / kBlock * kBlock; c < cols_; c += kBlock) columns(k, c, before);
        T *r = room_.row_v, tau;
        const T edge = r[k + 1], beta = unit_reflection(r, k + 1, row_vectors_, tau);
        const Vec<T> *u = room_.A.vectors(k), *next = room_.A.vectors(k + 1);
        Vec<T> *x = vec(room_.x), *v = vec(r), product = {};
        for (int i = start; i < row_vectors_; ++i) product += vec(room_.row_z)[i] * v[i];
        room_.right[k] = tau;
        for (int i = 0; i < row_vectors_; ++i) room_.R.vectors(k)[i] = i < (k + 1) / kLanes<T> ? Vec<T>{} : v[i];
        if (tau == 0) {
            for (int i = start; i < vectors_; ++i) x[i] = Vec<T>{};
            return 0;
        }
        const T share = tau / (edge - beta), along = tau * total<T>(product);
        for (int i = start; i < vectors_; ++i) x[i] = (sum[i] - next[i] * beta) * share - u[i] * along;
        return beta;
    }

    // Eight columns; those up to k are done.
    FEDLORA_INLINE void columns(int k, int c, const Vec<T> *before) {
        const Columns<T> a{room_.A[c], room_.A.stride};
        const Vec<T> *u = room_.A.vectors(k), *x = vec(room_.x);
        Vec<T> *sum = vec(room_.sum), dot[kBlock] = {};
        const int start = k / kLanes<T>;
        {
            T z[kBlock], v[kBlock];
            for (int j = 0; j < kBlock; ++j) z[j] = room_.row_z[c + j], v[j] = room_.row_v[c + j];
            for (int i = start; i < vectors_; ++i) {
                const Vec<T> bi = before[i], xi = x[i], ui = u[i];
#pragma GCC unroll 8
                for (int j = 0; j < kBlock; ++j) {
                    const Vec<T> y = a.vectors(j)[i] - bi * z[j] - xi * v[j];
                    a.vectors(j)[i] = y;
                    dot[j] += y * ui;
                }
            }
        }
        const Eight<T> z = totals<T>(dot) * room_.left[k];
        Eight<T> r;
        for (int j = 0; j < kBlock; ++j) r[j] = a[j][k];
        r -= z;
        for (int j = 0; c + j <= k; ++j) r[j] = 0;
        *(Eight<T> *)(room_.row_z + c) = z;
        *(Eight<T> *)(room_.row_v + c) = r;
        for (int j = 0; c + j <= k; ++j) room_.row_z[c + j] = 0;
        for (int i = start; i < vectors_; ++i) {
            Vec<T> here = sum[i];
#pragma GCC unroll 8
            for (int j = 0; j < kBlock; ++j) here += a.vectors(j)[i] * r[j];
            sum[i] = here;
        }
    }

    const Room room_;
    const int cols_, vectors_, row_vectors_;
};

// Eight columns w <- (1 - s a a^T) (1 - t b b^T) w, from vector `start` on.
template <class T>
FEDLORA_INLINE void reflect_twice(const Vec<T> *a, const Vec<T> *b, T s, T t, const Columns<T> &w, int start, int vectors) {
    Vec<T> along_a[kBlock] = {}, along_b[kBlock] = {}, cross = {};
    for (int i = start; i < vectors; ++i) {
        const Vec<T> ai = a[i], bi = b[i];
        cross += ai * bi;
#pragma GCC unroll 8
        for (int j = 0; j < kBlock; ++j) {
            along_a[j] += ai * w.vectors(j)[i];
            along_b[j] += bi * w.vectors(j)[i];
        }
    }
    const Eight<T> fb = totals<T>(along_b) * t, fa = (totals<T>(along_a) - fb * total<T>(cross)) * s;
    for (int i = start; i < vectors; ++i) {
        const Vec<T> ai = a[i], bi = b[i];
#pragma GCC unroll 8
        for (int j = 0; j < kBlock; ++j) w.vectors(j)[i] -= ai * fa[j] + bi * fb[j];
    }
}

// W <- H_0 H_1 ... W for reflections in the columns of H, H_k from row k + shift on, `count` columns of W, a multiple of eight.
template <class T>
void apply_reflections(const Columns<T> &H, const T *tau, int reflections, int shift, const Columns<T> &W, int count, int rows) {
    const int vectors = vectors_of<T>(rows);
    for (int c = 0; c < count; c += kBlock) {
        const Columns<T> w{W[c], W.stride};
        int k = reflections - 1;
        if (reflections % 2 != 0) {
            reflect<T, kBlock, false>(H.vectors(k), tau[k], w, (k + shift) / kLanes<T>, vectors);
            --k;
        }
        for (; k > 0; k -= 2)
            reflect_twice<T>(H.vectors(k - 1), H.vectors(k), tau[k - 1], tau[k], w, (k - 1 + shift) / kLanes<T>, vectors);
    }
}

template <class T>
class Direct {
  public:
    Direct(int rows, int cols, void *scratch)
        : rows_(rows), cols_(cols), even_((cols + kBlock - 1) / kBlock * kBlock), next_((uintptr_t)scratch),
          room_{columns(rows, even_), columns(cols, cols), row(cols), row(cols), row(cols + kBlock),
                row(cols + kBlock), row(rows), row(rows), row(rows), (double *)take(cols * 8), (double *)take(cols * 8)},
          rest_(take(FEDLORA_BIDIAGONAL().scratch_bytes(cols))) {}

    static int64_t scratch_bytes(int rows, int cols) { return Direct(rows, cols, nullptr).next_; }

    // For the caller to fill before values: rows x cols, zero beyond, up to whole strides and eights of columns.
    const Columns<T> &matrix() const { return room_.A; }

    bool values(double *s) {
        Bidiagonalisation<T>(room_, rows_, cols_).reduce();
        return FEDLORA_BIDIAGONAL().values(cols_, room_.q, room_.e, s, rest_);
    }

    // The first p columns of U and V; p up to a multiple of eight are written.
    bool vectors(int p, const Columns<T> &U, const Columns<T> &V) {
        const int count = (p + kBlock - 1) / kBlock * kBlock;
        for (int c = 0; c < count; ++c) {
            for (int i = 0; i < vectors_of<T>(rows_); ++i) U.vectors(c)[i] = Vec<T>{};
            for (int i = 0; i < vectors_of<T>(cols_); ++i) V.vectors(c)[i] = Vec<T>{};
        }
        if (!of_bidiagonal(p, U, V)) return false;
        apply_reflections(room_.A, room_.left, cols_, 0, U, count, rows_);
        apply_reflections(room_.R, room_.right, cols_ - 1, 1, V, count, cols_);
        return true;
    }

  private:
    bool of_bidiagonal(int p, const Columns<float> &U, const Columns<float> &V) {
        return FEDLORA_BIDIAGONAL().vectors_float(cols_, p, U.data, U.stride, V.data, V.stride, rest_);
    }
    bool of_bidiagonal(int p, const Columns<double> &U, const Columns<double> &V) {
        return FEDLORA_BIDIAGONAL().vectors_double(cols_, p, U.data, U.stride, V.data, V.stride, rest_);
    }

    char *take(int64_t bytes) {
        char *here = (char *)next_;
        next_ += (bytes + 63) / 64 * 64;
        return here;
    }
    T *row(int length) { return (T *)take((int64_t)Columns<T>::padded(length) * sizeof(T)); }
    Columns<T> columns(int length, int count) {
        const int stride = Columns<T>::padded(length);
        return {(T *)take((int64_t)stride * count * sizeof(T)), stride};
    }

    const int rows_, cols_, even_;
    uintptr_t next_;
    const typename Bidiagonalisation<T>::Room room_;
    void *const rest_;
};

// The two calls of the table: sizes, room for vectors and the factorisation, in this order.
struct DirectScratch {
    int64_t rows, cols;
    char unused[48];

    int even() const { return (int)(cols + kBlock - 1) / kBlock * kBlock; }
    Columns<double> U() { return {(double *)(this + 1), Columns<double>::padded((int)rows)}; }
    Columns<double> V() { return {U()[even()], Columns<double>::padded((int)cols)}; }
    Direct<double> direct() { return Direct<double>((int)rows, (int)cols, V()[even()]); }
};

int64_t direct_bytes(int64_t rows, int64_t cols) {
    DirectScratch sizes{rows, cols, {}};
    const int64_t vectors = (int64_t)sizes.even() * (sizes.U().stride + sizes.V().stride) * 8;
    return (int64_t)sizeof sizes + vectors + Direct<double>::scratch_bytes((int)rows, (int)cols);
}

bool direct_values(const double *C, int64_t ld, int64_t rows, int64_t cols, double *s, void *scratch) {
    DirectScratch &here = *(DirectScratch *)scratch;
    here.rows = rows;
    here.cols = cols;
    Direct<double> direct = here.direct();
    const Columns<double> &A = direct.matrix();
    for (int c = 0; c < here.even(); ++c)
        for (int i = 0; i < A.stride; ++i) A[c][i] = c < cols && i < rows ? C[c * ld + i] : 0;
    return direct.values(s);
}

bool direct_vectors(int64_t p, double *U, int64_t ldu, double *V, int64_t ldv, void *scratch) {
    DirectScratch &here = *(DirectScratch *)scratch;
    if (!here.direct().vectors((int)p, here.U(), here.V())) return false;
    for (int c = 0; c < p; ++c) {
        for (int i = 0; i < here.rows; ++i) U[c * ldu + i] = here.U()[c][i];
        for (int i = 0; i < here.cols; ++i) V[c * ldv + i] = here.V()[c][i];
    }
    return true;
}
