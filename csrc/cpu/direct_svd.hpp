// SVD by way of a bidiagonal matrix, one matrix at a time, vectors along the columns (docs/numerics.md, Core SVD).
//
// Included once per instruction set after columns.hpp, with FEDLORA_BIDIAGONAL the variant of the bidiagonal SVD. Errors are
// small beside the largest singular value, not beside each.

template <class T>
FEDLORA_INLINE T square_of(const Vec<T> *v, int start, int vectors) {
    Vec<T> sum = {}, other = {};
    int i = start;
    for (; i + 1 < vectors; i += 2) {
        sum += v[i] * v[i];
        other += v[i + 1] * v[i + 1];
    }
    if (i < vectors) sum += v[i] * v[i];
    return total<T>(sum + other);
}

// x, rows k and on, is mapped onto its first element: x becomes v with v_k = 1 and zeros above, the answer is that element;
// tau is 0 where there is nothing to map.
template <class T>
T unit_reflection(T *x, int k, int vectors, T &tau) {
    const T alpha = x[k];
    for (int i = k / kLanes<T> * kLanes<T>; i < k; ++i) x[i] = 0;
    Vec<T> *v = (Vec<T> *)x;
    const int start = k / kLanes<T>;
    const T square = square_of<T>(v, start, vectors);
    tau = 0;
    if (!(square > Lane<T>::smallest)) {
        for (int i = start; i < vectors; ++i) v[i] = Vec<T>{};
        x[k] = 1;
        return 0;
    }
    const T size = Native<T>::sqrt(Vec<T>{} + square)[0], beta = alpha < 0 ? size : -size, factor = 1 / (alpha - beta);
    for (int i = start; i < vectors; ++i) v[i] *= factor;
    x[k] = 1;
    // From the rounded v: what tau and v lack together would make every vector longer or shorter.
    tau = 2 / square_of<T>(v, start, vectors);
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
            Vec<T> here = a.vectors(0)[i] * r[0];
#pragma GCC unroll 8
            for (int j = 1; j < kBlock; ++j) here += a.vectors(j)[i] * r[j];
            sum[i] += here;
        }
    }

    const Room room_;
    const int cols_, vectors_, row_vectors_;
};

// W <- H_0 H_1 ... W for reflections in the columns of H, H_k from row k + shift on, and W by rows: no sum crosses lanes. So many
// reflections at a time, 1 - H C H^T with triangular C, and so many vectors of each row.
template <class T>
class Reflections {
  public:
    Reflections(const Columns<T> &H, const T *tau, int count, int shift, int rows)
        : H_(H), tau_(tau), count_(count), shift_(shift), rows_(rows) {}

    // `across` vectors of each row.
    void apply(T *W, int64_t gap, int across) const {
        const int odd = count_ % kDeep;
        for (int first = 0; first < across; first += kAcross) {
            Vec<T> *w = (Vec<T> *)W + first;
            const int step = (int)(gap / kLanes<T>);
            const bool whole = first + kAcross <= across;
            for (int k = count_ - 1; k >= count_ - odd; --k)
                whole ? reflect<1, kAcross>(k, w, step) : last<1>(k, w, step, across - first);
            for (int k = count_ - odd - kDeep; k >= 0; k -= kDeep)
                whole ? reflect<kDeep, kAcross>(k, w, step) : last<kDeep>(k, w, step, across - first);
        }
    }

  private:
    static constexpr int kStrip = 16;
    static constexpr int kDeep = FEDLORA_VECTOR_BYTES == 64 ? 4 : 2;
    static constexpr int kAcross = FEDLORA_VECTOR_BYTES == 64 ? 4 : 2;

    template <int D>
    void last(int k, Vec<T> *w, int step, int across) const {
        for (int i = 0; i < across; ++i) reflect<D, 1>(k, w + i, step);
    }

    template <int D, int A>
    FEDLORA_INLINE void reflect(int k, Vec<T> *w, int step) const {
        const T *h[D];
        for (int d = 0; d < D; ++d) h[d] = H_[k + d];
        const int begin = k + shift_;
        // Sums of short sums: the errors of a long one add up where all elements are alike.
        Vec<T> along[D][A] = {};
        for (int strip = begin; strip < rows_; strip += kStrip) {
            const int end = strip + kStrip < rows_ ? strip + kStrip : rows_;
            Vec<T> part[D][A] = {};
            for (int i = strip; i < end; ++i) {
                const Vec<T> *row = w + (int64_t)i * step;
#pragma GCC unroll 4
                for (int d = 0; d < D; ++d)
#pragma GCC unroll 4
                    for (int a = 0; a < A; ++a) part[d][a] += row[a] * h[d][i];
            }
#pragma GCC unroll 4
            for (int d = 0; d < D; ++d)
#pragma GCC unroll 4
                for (int a = 0; a < A; ++a) along[d][a] += part[d][a];
        }
        // The last reflection comes first.
        for (int d = D - 1; d >= 0; --d) {
            for (int e = d + 1; e < D; ++e) {
                const T cross = product(h[d], h[e], begin + e);
                for (int a = 0; a < A; ++a) along[d][a] -= along[e][a] * cross;
            }
            for (int a = 0; a < A; ++a) along[d][a] *= tau_[k + d];
        }
        for (int i = begin; i < rows_; ++i) {
            Vec<T> *row = w + (int64_t)i * step;
#pragma GCC unroll 4
            for (int a = 0; a < A; ++a) {
                Vec<T> x = row[a];
#pragma GCC unroll 4
                for (int d = 0; d < D; ++d) x -= along[d][a] * h[d][i];
                row[a] = x;
            }
        }
    }

    T product(const T *x, const T *y, int begin) const {
        Vec<T> sum = {};
        for (int i = begin / kLanes<T>; i < vectors_of<T>(rows_); ++i) sum += ((const Vec<T> *)x)[i] * ((const Vec<T> *)y)[i];
        return total<T>(sum);
    }

    const Columns<T> H_;
    const T *const tau_;
    const int count_, shift_, rows_;
};

template <class T>
class Direct {
  public:
    Direct(int rows, int cols, void *scratch)
        : rows_(rows), cols_(cols), even_((cols + kBlock - 1) / kBlock * kBlock), next_((uintptr_t)scratch),
          room_{columns(rows, even_), columns(cols, cols), row(cols), row(cols), row(cols + kBlock),
                row(cols + kBlock), row(rows), row(rows), row(rows), (double *)take(cols * 8), (double *)take(cols * 8)},
          U_(columns(even_ + kTogether, rows)), V_(columns(even_ + kTogether, cols)), image_(row(rows)),
          s_((double *)take(cols * 8)),
          rest_(take(FEDLORA_BIDIAGONAL().scratch_bytes(cols))) {}

    static int64_t scratch_bytes(int rows, int cols) { return Direct(rows, cols, nullptr).next_; }

    // For the caller to fill before values: rows x cols, zero beyond, up to whole strides and eights of columns.
    const Columns<T> &matrix() const { return room_.A; }
    int columns_taken() const { return even_; }

    bool values(double *s) {
        for (int i = 0; i < vectors_of<T>(rows_); ++i) ((Vec<T> *)image_)[i] = Vec<T>{};
        for (int c = 0; c < cols_; ++c)
            for (int i = 0; i < vectors_of<T>(rows_); ++i) ((Vec<T> *)image_)[i] += room_.A.vectors(c)[i] * probe(c);
        Bidiagonalisation<T>(room_, rows_, cols_).reduce();
        if (!FEDLORA_BIDIAGONAL().values(cols_, room_.q, room_.e, s, rest_)) return false;
        for (int c = 0; c < cols_; ++c) s_[c] = s[c];
        return true;
    }

    // The first p columns of U and V.
    bool vectors(int p, T *U, int64_t ldu, T *V, int64_t ldv) {
        const int across = (p + kTogether - 1) / kTogether * kTogether / kLanes<T>;
        if (!of_bidiagonal(p, U_.data, V_.data)) return false;
        for (int i = cols_; i < rows_; ++i)
            for (int a = 0; a < across; ++a) U_.vectors(i)[a] = Vec<T>{};
        Reflections<T>(room_.A, room_.left, cols_, 0, rows_).apply(U_.data, U_.stride, across);
        Reflections<T>(room_.R, room_.right, cols_ - 1, 1, cols_).apply(V_.data, V_.stride, across);
        if (!is_answer(p)) return false;
        transpose(U_.data, U_.stride, U, ldu, rows_, p);
        transpose(V_.data, V_.stride, V, ldv, cols_, p);
        return true;
    }

  private:
    static constexpr int kTogether = 16;  // columns that a bidiagonal SVD may write at once

    // Signs that look random.
    static T probe(int c) { return (((uint32_t)c + 1) * 2654435769u) >> 31 ? T(1) : T(-1); }

    // U^T X w = S V^T w for one w: what no error of the steps before would leave alone.
    bool is_answer(int p) const {
        double size = 0;
        for (int c = 0; c < cols_; ++c) size += s_[c] * s_[c];
        const double limit = 16 * Lane<T>::roundoff * __builtin_sqrt(rows_ * size);
        for (int first = 0; first < p; first += kLanes<T>) {
            Vec<T> left = {}, right = {};
            for (int i = 0; i < rows_; ++i) left += U_.vectors(i)[first / kLanes<T>] * image_[i];
            for (int i = 0; i < cols_; ++i) right += V_.vectors(i)[first / kLanes<T>] * probe(i);
            for (int c = first; c < p && c < first + kLanes<T>; ++c) {
                const double error = left[c - first] - s_[c] * right[c - first];
                if (!(error <= limit && -error <= limit)) return false;
            }
        }
        return true;
    }

    bool of_bidiagonal(int p, float *U, float *V) {
        return FEDLORA_BIDIAGONAL().vectors_float(cols_, p, U, U_.stride, V, V_.stride, rest_);
    }
    bool of_bidiagonal(int p, double *U, double *V) {
        return FEDLORA_BIDIAGONAL().vectors_double(cols_, p, U, U_.stride, V, V_.stride, rest_);
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
    const Columns<T> U_, V_;  // by rows
    T *const image_;          // X w
    double *const s_;
    void *const rest_;
};

// The scratch of the table: the sizes, then the factorisation.
struct DirectScratch {
    int64_t rows, cols;
    char unused[48];

    Direct<double> direct() { return Direct<double>((int)rows, (int)cols, this + 1); }
};

int64_t direct_bytes(int64_t rows, int64_t cols) {
    return (int64_t)sizeof(DirectScratch) + Direct<double>::scratch_bytes((int)rows, (int)cols);
}

bool direct_values(const double *C, int64_t ld, int64_t rows, int64_t cols, double *s, void *scratch) {
    DirectScratch &here = *(DirectScratch *)scratch;
    here.rows = rows;
    here.cols = cols;
    Direct<double> direct = here.direct();
    const Columns<double> &A = direct.matrix();
    for (int c = 0; c < direct.columns_taken(); ++c) {
        for (int i = 0; i < A.stride; ++i) A[c][i] = 0;
        if (c < cols) __builtin_memcpy(A[c], C + c * ld, rows * sizeof(double));
    }
    return direct.values(s);
}

bool direct_vectors(int64_t p, double *U, int64_t ldu, double *V, int64_t ldv, void *scratch) {
    return ((DirectScratch *)scratch)->direct().vectors((int)p, U, ldu, V, ldv);
}
