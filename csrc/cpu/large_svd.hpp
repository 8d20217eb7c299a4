// SVD of larger matrices, one matrix at a time, vectors along the columns (docs/numerics.md, Core SVD).
//
// Included once per instruction set after direct_svd.hpp. X = C, or C^T where C is wide, goes the direct way if its columns are
// about as long as each other: errors small beside the largest value are then as good as errors small beside each. Otherwise,
// and where values are clustered, it is Jacobi:
//
//   X P = Q T          Householder with column pivoting; Q is never formed
//   T^T J = Z diag(s)  one-sided Jacobi; J is never formed
//   V = P Z            and X V = U R, Householder without pivoting, columns by falling s: R is diag(s) up to rounding
//
// U is orthogonal to rounding however small its singular value, and what the columns of X V lack in orthogonality falls on
// those of smaller s, where it weighs nothing. The rows of T^T carry the scales of the columns of X, and rotations from
// the right keep errors within rows: that is why small singular values come out relatively accurate.
//
// Jacobi takes blocks of eight columns. The 64 products between two blocks are formed in one pass over the data, their
// rotations follow from the 16 x 16 Gram matrix, eight disjoint ones at a time, and are applied in a second pass.

// products[i] = x_i . y_0 .. x_i . y_7 for eight columns each.
template <class T>
void products(const Columns<T> &X, const Columns<T> &Y, int vectors, Eight<T> *products) {
    constexpr int rows = FEDLORA_VECTOR_BYTES == 64 ? 2 : 1;  // by the number of registers
    for (int i = 0; i < kBlock; i += rows) {
        Vec<T> sum[rows][kBlock] = {};
        for (int v = 0; v < vectors; ++v) {
            Vec<T> y[kBlock];
#pragma GCC unroll 8
            for (int j = 0; j < kBlock; ++j) y[j] = Y.vectors(j)[v];
#pragma GCC unroll 2
            for (int r = 0; r < rows; ++r) {
                const Vec<T> x = X.vectors(i + r)[v];
#pragma GCC unroll 8
                for (int j = 0; j < kBlock; ++j) sum[r][j] += x * y[j];
            }
        }
        for (int r = 0; r < rows; ++r) products[i + r] = totals<T>(sum[r]);
    }
}

// Squares of cosines. Pairs are turned from `turn` on, near the rounding of a product, because what the columns of V lack in
// orthogonality becomes residual; but only a pair above `rest`, which rounding cannot reach, keeps the iteration going.
template <class T>
struct Thresholds {
    T turn, rest;
};

// Eight rotations at a time: x <- c (x - t y), y <- c (y + t x); the longer column grows.
template <class T>
struct Rotations {
    // A pack of at least eight lanes; those beyond are idle.
    static constexpr int W = kLanes<T> >= kBlock ? 1 : kBlock / kLanes<T>;
    using P = Pack<T, W>;
    alignas(64) T a[P::lanes], b[P::lanes], g[P::lanes];  // |x|^2, |y|^2, x . y; a and b become the new ones
    alignas(64) T t[P::lanes], c[P::lanes], inverse[P::lanes];

    Rotations() {
        for (int l = 0; l < P::lanes; ++l) a[l] = b[l] = 1, g[l] = 0;
    }

    // False where no cosine is above the threshold of turning; a NaN never is. See the small SVD for the powers of two.
    FEDLORA_INLINE bool plan(const Thresholds<T> &thresholds, bool &restless) {
        const P x = *(const P *)a, y = *(const P *)b, product = *(const P *)g;
        const P cosine = product * rsqrt_estimate(x) * rsqrt_estimate(y);
        const Mask<T, W> where = greater(cosine * cosine, broadcast<W>(thresholds.turn));
        if (!any(where)) return false;
        restless |= any(greater(cosine * cosine, broadcast<W>(thresholds.rest)));
        const P zero = broadcast<W>(T(0)), one = broadcast<W>(T(1));
        const P f = inverse_power(x + y), delta = (y - x) * f, twice = (product + product) * f;
        const P h = sqrt(delta * delta + twice * twice);
        const P tangent = select(where, twice / (delta + copysign(h, delta)), zero);
        // Near one, the rounded root of 1 + t^2 is too small more often than too large, which would let every column grow by
        // u / 8 a rotation; these corrections are unbiased.
        const P square = tangent * tangent, root = sqrt(one + square);
        const P shift = tangent * product;
        *(P *)t = tangent;
        *(P *)inverse = one + square / (one + root);
        *(P *)c = one - square / (one + square + root);
        *(P *)a = max(x - shift, zero);
        *(P *)b = max(y + shift, zero);
        return true;
    }
};

// The Gram matrix of two blocks, rows and columns 0 .. 7 of X and 8 .. 15 of Y, and the rotations between them. Columns are
// kept without the cosines of their rotations, which `scale` collects.
template <class T>
struct BlockPair {
    using E = Eight<T>;
    using I = typename EightOf<T>::I;
    E to_x[2 * kBlock], to_y[2 * kBlock];
    E scale_x, scale_y, unscale_x, unscale_y;  // of the columns as rotated so far: what they are stored without
    E first[kBlock], second[kBlock];           // x <- x - first y, y <- y + second x; one of each round

    BlockPair(const E *inner_x, const E *inner_y, const E *cross) {
        for (int i = 0; i < kBlock; ++i) {
            to_x[i] = inner_x[i];
            to_y[i] = cross[i];
            to_y[kBlock + i] = inner_y[i];
            for (int j = 0; j < kBlock; ++j) to_x[kBlock + j][i] = cross[i][j];
        }
    }

    // Round s pairs x_i with y_(i + s): the lanes that belong to Y move on by one each round.
    bool plan(const Thresholds<T> &thresholds, bool &restless) {
        bool rotated = false;
        Rotations<T> r;
        scale_x = scale_y = unscale_x = unscale_y = E{} + T(1);
        for (int s = 0; s < kBlock; ++s) {
            const E zero = {}, a = diagonal(to_x, 0) * scale_x * scale_x, b = diagonal(to_y + kBlock, s) * scale_y * scale_y;
            *(E *)r.a = a > zero ? a : zero;
            *(E *)r.b = b > zero ? b : zero;
            *(E *)r.g = diagonal(to_y, 0) * scale_x * scale_y;
            if (r.plan(thresholds, restless)) {
                rotated = true;
                turn(r, s);
            } else {
                first[s] = second[s] = E{};
            }
            const I next = {1, 2, 3, 4, 5, 6, 7, 0};
            for (int k = 0; k < 2 * kBlock; ++k) to_y[k] = __builtin_shuffle(to_y[k], next);
            scale_y = __builtin_shuffle(scale_y, next);
            unscale_y = __builtin_shuffle(unscale_y, next);
        }
        return rotated;
    }

    // Lane i of row (i + s) mod 8.
    static FEDLORA_INLINE E diagonal(const E *rows, int s) {
        const auto row = [&](int i) -> const E & { return rows[(i + s) % kBlock]; };
        const E p0 = __builtin_shuffle(row(0), row(1), I{0, 9, 0, 0, 0, 0, 0, 0});
        const E p1 = __builtin_shuffle(row(2), row(3), I{0, 0, 2, 11, 0, 0, 0, 0});
        const E p2 = __builtin_shuffle(row(4), row(5), I{0, 0, 0, 0, 4, 13, 0, 0});
        const E p3 = __builtin_shuffle(row(6), row(7), I{0, 0, 0, 0, 0, 0, 6, 15});
        return __builtin_shuffle(__builtin_shuffle(p0, p1, I{0, 1, 10, 11, 0, 0, 0, 0}),
                                 __builtin_shuffle(p2, p3, I{0, 0, 0, 0, 4, 5, 14, 15}), I{0, 1, 2, 3, 12, 13, 14, 15});
    }

    void turn(const Rotations<T> &r, int s) {
        const E t = *(const E *)r.t, c = *(const E *)r.c, inverse = *(const E *)r.inverse;
        const E f = t * scale_y * unscale_x, e = t * scale_x * unscale_y;
        first[s] = f;
        second[s] = e;
        scale_x *= c;
        scale_y *= c;
        unscale_x *= inverse;
        unscale_y *= inverse;
        for (int i = 0; i < kBlock; ++i) {
            const int j = kBlock + (i + s) % kBlock;
            const E xx = to_x[i], xy = to_y[i];
            to_x[i] -= to_x[j] * first[s][i];
            to_y[i] -= to_y[j] * first[s][i];
            to_x[j] += xx * second[s][i];
            to_y[j] += xy * second[s][i];
        }
        for (int k = 0; k < 2 * kBlock; ++k) {
            const E x = to_x[k];
            to_x[k] -= to_y[k] * f;
            to_y[k] += x * e;
        }
    }

    // `next` is the block that comes after Y: on its way into the cache meanwhile.
    void apply(const Columns<T> &X, const Columns<T> &Y, const Columns<T> &next, int vectors) const {
        for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 8
            for (int i = 0; i < kBlock; ++i) __builtin_prefetch(next.vectors(i) + v);
            Vec<T> x[kBlock], y[kBlock];
#pragma GCC unroll 8
            for (int i = 0; i < kBlock; ++i) x[i] = X.vectors(i)[v], y[i] = Y.vectors(i)[v];
#pragma GCC unroll 8
            for (int s = 0; s < kBlock; ++s)
#pragma GCC unroll 8
                for (int i = 0; i < kBlock; ++i) {
                    const Vec<T> old = x[i];
                    x[i] -= y[(i + s) % kBlock] * first[s][i];
                    y[(i + s) % kBlock] += old * second[s][i];
                }
#pragma GCC unroll 8
            for (int i = 0; i < kBlock; ++i) {
                X.vectors(i)[v] = x[i] * scale_x[i];
                Y.vectors(i)[v] = y[i] * scale_y[i];
            }
        }
    }
};

// One-sided Jacobi on the columns of Y, a multiple of eight.
template <class T>
class Jacobi {
  public:
    Jacobi(const Columns<T> &Y, int rows, int cols, Eight<T> *inner)
        : Y_(Y), vectors_(vectors_of<T>(rows)), blocks_(cols / kBlock), inner_(inner),
          thresholds_{9 * Lane<T>::roundoff * Lane<T>::roundoff, T(rows + 10) * Lane<T>::roundoff * Lane<T>::roundoff} {}

    // Whether it came to rest within so many sweeps.
    bool iterate(int max_sweeps) {
        for (int sweep = 0; sweep < max_sweeps; ++sweep) {
            restless_ = false;
            for (int b = 0; b < blocks_; ++b) rotate_within(b);
            for (int x = 0; x < blocks_; ++x)
                for (int y = x + 1; y < blocks_; ++y) rotate_between(x, y);
            if (!restless_) return true;
        }
        return false;
    }

  private:
    Columns<T> block(int b) const { return {Y_[b * kBlock], Y_.stride}; }

    void rotate_between(int bx, int by) {
        Eight<T> cross[kBlock], *inner_x = inner_ + bx * kBlock, *inner_y = inner_ + by * kBlock;
        products<T>(block(bx), block(by), vectors_, cross);
        BlockPair<T> pair(inner_x, inner_y, cross);
        if (!pair.plan(thresholds_, restless_)) return;
        pair.apply(block(bx), block(by), block(by + 1 < blocks_ ? by + 1 : by), vectors_);
        for (int i = 0; i < kBlock; ++i) {
            inner_x[i] = pair.to_x[i] * pair.scale_x * pair.scale_x[i];
            inner_y[i] = pair.to_y[kBlock + i] * pair.scale_y * pair.scale_y[i];
        }
    }

    // The pairs inside a block, with fresh products; columns so small that products of theirs would underflow become zero.
    void rotate_within(int b) {
        const Columns<T> X = block(b);
        Eight<T> *G = inner_ + b * kBlock;
        products<T>(X, X, vectors_, G);
        for (int i = 0; i < kBlock; ++i)
            if (G[i][i] < Lane<T>::flush) {
                for (int v = 0; v < vectors_; ++v) X.vectors(i)[v] = Vec<T>{};
                G[i] = Eight<T>{};
                for (int k = 0; k < kBlock; ++k) G[k][i] = 0;
            }
        // Round robin: seven rounds of four disjoint pairs.
        Rotations<T> r;
        for (int s = 0; s < kBlock - 1; ++s) {
            int x[kBlock / 2], y[kBlock / 2];
            for (int k = 0; k < kBlock / 2; ++k) {
                const int one = k == 0 ? kBlock - 1 : (s + k) % (kBlock - 1), other = (s + kBlock - 1 - k) % (kBlock - 1);
                x[k] = one < other ? one : other;
                y[k] = one < other ? other : one;
                r.a[k] = G[x[k]][x[k]];
                r.b[k] = G[y[k]][y[k]];
                r.g[k] = G[x[k]][y[k]];
            }
            if (!r.plan(thresholds_, restless_)) continue;
            for (int k = 0; k < kBlock / 2; ++k)
                if (r.t[k] != 0) rotate(X, G, x[k], y[k], r.t[k], r.c[k], r.a[k], r.b[k]);
        }
    }

    void rotate(const Columns<T> &X, Eight<T> *G, int x, int y, T t, T c, T a, T b) {
        const T s = t * c;
        for (int v = 0; v < vectors_; ++v) {
            const Vec<T> old = X.vectors(x)[v], other = X.vectors(y)[v];
            X.vectors(x)[v] = old * c - other * s;
            X.vectors(y)[v] = other * c + old * s;
        }
        const Eight<T> gx = G[x], gy = G[y];
        G[x] = gx * c - gy * s;
        G[y] = gy * c + gx * s;
        for (int k = 0; k < kBlock; ++k) {
            const T old = G[k][x], other = G[k][y];
            G[k][x] = old * c - other * s;
            G[k][y] = other * c + old * s;
        }
        G[x][x] = a;
        G[y][y] = b;
    }

    const Columns<T> Y_;
    const int vectors_, blocks_;
    Eight<T> *const inner_;  // Gram matrices of the blocks
    const Thresholds<T> thresholds_;
    bool restless_ = true;
};

// X P = Q T by reflections, T on and above the diagonal of W, order[c] the column of X that stands at c.
template <class T>
void pivoted_qr(const Columns<T> &W, int rows, int cols, int *order, T *norms, T *v) {
    const int vectors = vectors_of<T>(rows);
    for (int c = 0; c < cols; ++c) {
        Vec<T> sum = {};
        for (int i = 0; i < vectors; ++i) sum += W.vectors(c)[i] * W.vectors(c)[i];
        norms[c] = total<T>(sum);
        order[c] = c;
    }
    for (int k = 0; k < cols; ++k) {
        int best = k;
        for (int c = k + 1; c < cols; ++c)
            if (norms[c] > norms[best]) best = c;
        if (best != k) {
            for (int i = 0; i < vectors; ++i) {
                const Vec<T> other = W.vectors(best)[i];
                W.vectors(best)[i] = W.vectors(k)[i];
                W.vectors(k)[i] = other;
            }
            const int place = order[best];
            order[best] = order[k];
            order[k] = place;
            norms[best] = norms[k];
        }
        for (int i = 0; i < vectors; ++i) ((Vec<T> *)v)[i] = W.vectors(k)[i];
        T tau;
        W[k][k] = reflection(v, k, vectors, tau);
        // Fresh norms of what is left, rows k + 1 and on: subtracting would cancel.
        const int start = k / kLanes<T>, below = (start + 1) * kLanes<T>;
        reflect<T, true>((Vec<T> *)v, tau, {W[k + 1], W.stride}, cols - k - 1, start, vectors, norms + k + 1);
        for (int c = k + 1; c < cols; ++c)
            for (int i = k + 1; i < below && i < rows; ++i) norms[c] += W[c][i] * W[c][i];
    }
}

// W = Q R: Q, its columns turned so that the diagonal of R is not negative, takes the place of W; V is scratch as large.
template <class T>
void orthonormalise(const Columns<T> &W, const Columns<T> &V, int rows, int cols, T *tau, T *sign) {
    const int vectors = vectors_of<T>(rows);
    for (int first = 0; first < cols; first += kBlock) {
        const int count = cols - first < kBlock ? cols - first : kBlock;
        const Columns<T> panel{W[first], W.stride};
        for (int k = 0; k < first; ++k) reflect<T, false>(W.vectors(k), tau[k], panel, count, k / kLanes<T>, vectors);
        for (int j = 0; j < count; ++j) {
            const int k = first + j;
            sign[k] = reflection(W[k], k, vectors, tau[k]) < 0 ? T(-1) : T(1);
            reflect<T, false>(W.vectors(k), tau[k], {W[k + 1], W.stride}, count - j - 1, k / kLanes<T>, vectors);
        }
    }
    for (int first = 0; first < cols; first += kBlock) {
        const int count = cols - first < kBlock ? cols - first : kBlock;
        const Columns<T> panel{V[first], V.stride};
        for (int j = 0; j < count; ++j) {
            for (int i = 0; i < vectors; ++i) panel.vectors(j)[i] = Vec<T>{};
            panel[j][first + j] = sign[first + j];
        }
        for (int k = first + count - 1; k >= 0; --k)
            reflect<T, false>(W.vectors(k), tau[k], panel, count, k / kLanes<T>, vectors);
    }
    for (int c = 0; c < cols; ++c)
        for (int i = 0; i < vectors; ++i) W.vectors(c)[i] = V.vectors(c)[i];
}

// W = A V.
template <class T>
void multiply(const Columns<T> &A, const Columns<T> &V, const Columns<T> &W, int rows, int inner, int cols) {
    constexpr int high = 2;
    const int vectors = vectors_of<T>(rows);
    for (int i = 0; i < vectors; i += high) {
        const int second = i + 1 < vectors ? i + 1 : i;
        for (int c = 0; c < cols; c += kBlock) {
            Vec<T> sum[high][kBlock] = {};
            for (int k = 0; k < inner; ++k) {
                const Vec<T> top = A.vectors(k)[i], bottom = A.vectors(k)[second];
#pragma GCC unroll 8
                for (int j = 0; j < kBlock; ++j) {
                    const T factor = V[c + j][k];
                    sum[0][j] += top * factor;
                    sum[1][j] += bottom * factor;
                }
            }
            for (int j = 0; j < kBlock; ++j) {
                W.vectors(c + j)[i] = sum[0][j];
                W.vectors(c + j)[second] = sum[1][j];
            }
        }
    }
}

// One matrix after the other in one scratch.
template <class T>
class LargeSvd {
  public:
    LargeSvd(const SvdGroup &group, void *scratch)
        : group_(group), wide_(group.C.rows < group.C.cols),
          rows_((int)(wide_ ? group.C.cols : group.C.rows)), cols_((int)(wide_ ? group.C.rows : group.C.cols)),
          even_(up(cols_)), next_((uintptr_t)scratch), X_(columns(rows_, even_)), W_(columns(rows_, even_)),
          Y_(columns(even_, even_)), V_(columns(even_, even_)), vector_(row(rows_)), norms_(row(even_)), tau_(row(even_)),
          sign_(row(even_)), value_(row(even_)), inner_((Eight<T> *)take((int64_t)even_ * sizeof(Eight<T>))),
          order_((int *)take(even_ * sizeof(int))), place_((int *)take(even_ * sizeof(int))),
          direct_values_((double *)take(even_ * 8)),
          direct_(take(cols_ > kSmallSvdMax ? Direct<T>::scratch_bytes(rows_, cols_) : 0)) {}

    static int64_t scratch_bytes(const fedlora_block &C) { return LargeSvd({C, C, C, C, C, C}, nullptr).next_; }

    void solve(int64_t index, int max_sweeps) {
        int32_t &info = *((int32_t *)group_.info.data + index * group_.info.batch_stride);
        int32_t &notes = *((int32_t *)group_.notes.data + index * group_.notes.batch_stride);
        info = notes = 0;
        const View<const T> C(group_.C, index, wide_);
        const View<T> left(wide_ ? group_.Vh : group_.U, index, wide_);
        const View<T> right(wide_ ? group_.U : group_.Vh, index, !wide_);
        const View<T> S(group_.S, index, false);
        T largest = 0;
        if (!load(C, largest)) {
            fill(left, rows_, T(__builtin_nan("")), T(__builtin_nan("")));
            fill(right, cols_, T(__builtin_nan("")), T(__builtin_nan("")));
            for (int c = 0; c < cols_; ++c) S(0, c) = T(__builtin_nan(""));
            info = FEDLORA_INFO_NONFINITE;
            return;
        }
        if (largest == 0) {
            fill(left, rows_, T(1), T(0));
            fill(right, cols_, T(1), T(0));
            for (int c = 0; c < cols_; ++c) S(0, c) = 0;
            notes = FEDLORA_NOTE_ZERO;
            return;
        }
        const int exponent = exponent_of<T>(largest);
        scale(power_of_two<T>(-(exponent / 2)), power_of_two<T>(-(exponent - exponent / 2)));
        const bool converged = decompose_directly() || decompose(max_sweeps);
        bool overflow = false;
        for (int c = 0; c < cols_; ++c) {
            const T value = value_[place_[c]] * power_of_two<T>(exponent / 2) * power_of_two<T>(exponent - exponent / 2);
            overflow |= __builtin_isinf(value) != 0;
            S(0, c) = value;
            sign_[c] = wide_ ? sign_of(V_, c, cols_) : sign_of(W_, c, rows_);
        }
        for (int c = 0; c < cols_; ++c) {
            const T sign = sign_[c];
            for (int i = 0; i < vectors_of<T>(rows_); ++i) W_.vectors(c)[i] *= sign;
            for (int i = 0; i < vectors_of<T>(cols_); ++i) V_.vectors(c)[i] *= sign;
        }
        store(W_, left, rows_);
        store(V_, right, cols_);
        info = (overflow ? FEDLORA_INFO_OVERFLOW : 0) | (converged ? 0 : FEDLORA_INFO_NOT_CONVERGED);
    }

  private:
    static int up(int n) { return (n + kBlock - 1) / kBlock * kBlock; }

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

    void clear(const Columns<T> &M) {
        for (int c = 0; c < even_; ++c)
            for (int i = 0; i < M.stride; ++i) M[c][i] = 0;
    }

    // What lies beyond an element (rows - 1, cols - 1).
    void clear_ends(const Columns<T> &M, int rows) {
        for (int c = 0; c < even_; ++c)
            for (int i = c < cols_ ? rows / kLanes<T> * kLanes<T> : 0; i < M.stride; ++i) M[c][i] = 0;
    }

    // By the shorter way where rows or columns are contiguous.
    void store(const Columns<T> &M, const View<T> &to, int rows) const {
        if (to.col == 1) return transpose(M.data, M.stride, to.data, to.row, cols_, rows);
        if (to.row == 1) {
            for (int c = 0; c < cols_; ++c) __builtin_memcpy(to.data + c * to.col, M[c], rows * sizeof(T));
            return;
        }
        tiled(rows, cols_, [&](int i, int c) { to(i, c) = M[c][i]; });
    }

    // Each element once, in tiles: rows and columns may both lie far apart.
    template <class Visit>
    static void tiled(int rows, int cols, const Visit &visit) {
        constexpr int tile = 8;
        for (int i = 0; i < rows; i += tile)
            for (int c = 0; c < cols; c += tile)
                for (int cc = c; cc < c + tile && cc < cols; ++cc)
                    for (int ii = i; ii < i + tile && ii < rows; ++ii) visit(ii, cc);
    }

    bool load(const View<const T> &C, T &largest) {
        clear_ends(X_, rows_);
        if (C.col == 1)
            transpose(C.data, C.row, X_.data, X_.stride, rows_, cols_);
        else if (C.row == 1)
            for (int c = 0; c < cols_; ++c) __builtin_memcpy(X_[c], C.data + c * C.col, rows_ * sizeof(T));
        else
            tiled(rows_, cols_, [&](int i, int c) { X_[c][i] = C(i, c); });
        Pack<T, 1> most = broadcast<1>(T(0)), probe = most;
        for (int c = 0; c < cols_; ++c)
            for (int i = 0; i < vectors_of<T>(rows_); ++i) {
                const Pack<T, 1> x{{X_.vectors(c)[i]}};
                probe = probe + (x - x);
                most = max(abs(x), most);
            }
        for (int l = 0; l < kLanes<T>; ++l) largest = most.v[0][l] > largest ? most.v[0][l] : largest;
        return total<T>(probe.v[0]) == 0;
    }

    void scale(T one, T other) {
        for (int c = 0; c < even_; ++c)
            for (int i = 0; i < X_.stride; ++i) X_[c][i] = X_[c][i] * one * other;
    }

    // U in W_, V in V_, columns by falling value: column c belongs to value_[place_[c]].
    bool decompose_directly() {
        if (cols_ <= kSmallSvdMax || !balanced()) return false;
        Direct<T> direct(rows_, cols_, direct_);
        for (int c = 0; c < even_; ++c)
            for (int i = 0; i < X_.stride; ++i) direct.matrix()[c][i] = X_[c][i];
        clear_ends(W_, rows_);
        clear_ends(V_, cols_);
        if (!direct.values(direct_values_) || !direct.vectors(cols_, W_.data, W_.stride, V_.data, V_.stride)) return false;
        for (int c = 0; c < cols_; ++c) {
            value_[c] = (T)direct_values_[c];
            place_[c] = c;
        }
        return true;
    }

    // No column of X is more than eight times as long as another.
    bool balanced() const {
        T shortest = 0, longest = 0;
        for (int c = 0; c < cols_; ++c) {
            Vec<T> sum = {};
            for (int i = 0; i < vectors_of<T>(rows_); ++i) sum += X_.vectors(c)[i] * X_.vectors(c)[i];
            const T square = total<T>(sum);
            shortest = c == 0 || square < shortest ? square : shortest;
            longest = square > longest ? square : longest;
        }
        return longest <= 64 * shortest;
    }

    bool decompose(int max_sweeps) {
        for (int c = 0; c < even_; ++c)
            for (int i = 0; i < X_.stride; ++i) W_[c][i] = X_[c][i];
        pivoted_qr(W_, rows_, cols_, order_, norms_, vector_);
        clear(Y_);
        tiled(cols_, cols_, [&](int i, int c) { Y_[c][i] = c <= i ? W_[i][c] : T(0); });
        const bool converged = Jacobi<T>(Y_, cols_, even_, inner_).iterate(max_sweeps);
        const int rank = sort();
        clear(V_);
        for (int c = 0; c < rank; ++c)
            for (int i = 0; i < cols_; ++i) V_[c][i] = Y_[place_[c]][i] / value_[place_[c]];
        if (rank < cols_) complete(rank);
        for (int c = 0; c < cols_; ++c) {
            for (int i = 0; i < cols_; ++i) norms_[order_[i]] = V_[c][i];
            for (int i = 0; i < cols_; ++i) V_[c][i] = norms_[i];
        }
        multiply(X_, V_, W_, rows_, cols_, even_);
        orthonormalise(W_, X_, rows_, cols_, tau_, sign_);
        return converged;
    }

    // Norms of the columns of Y, and their order; how many are not zero.
    int sort() {
        int rank = 0;
        for (int c = 0; c < cols_; ++c) {
            Vec<T> sum = {};
            for (int i = 0; i < vectors_of<T>(cols_); ++i) sum += Y_.vectors(c)[i] * Y_.vectors(c)[i];
            value_[c] = Native<T>::sqrt(Vec<T>{} + total<T>(sum))[0];
            rank += value_[c] > 0;
            int at = c;
            for (; at > 0 && value_[place_[at - 1]] < value_[c]; --at) place_[at] = place_[at - 1];
            place_[at] = c;
        }
        return rank;
    }

    // Orthonormal columns rank .. beside the first ones of V.
    void complete(int rank) {
        for (int c = 0; c < cols_; ++c)
            for (int i = 0; i < Y_.stride; ++i) Y_[c][i] = V_[c][i];
        orthonormalise(Y_, W_, cols_, cols_, tau_, sign_);
        for (int c = rank; c < cols_; ++c)
            for (int i = 0; i < cols_; ++i) V_[c][i] = Y_[c][i];
    }

    // That of the first element that is nearly the largest.
    static T sign_of(const Columns<T> &M, int c, int n) {
        Pack<T, 1> most = broadcast<1>(T(0));
        for (int i = 0; i < vectors_of<T>(n); ++i) most = max(abs(Pack<T, 1>{{M.vectors(c)[i]}}), most);
        T largest = 0;
        for (int l = 0; l < kLanes<T>; ++l) largest = most.v[0][l] > largest ? most.v[0][l] : largest;
        const Pack<T, 1> bound = broadcast<1>(largest * kNearly<T>);
        int i = 0;
        while (i + 1 < vectors_of<T>(n) && !reaches(abs(Pack<T, 1>{{M.vectors(c)[i]}}), bound)) ++i;
        const T *u = M[c];
        int first = i * kLanes<T>;
        while (first + 1 < n && (u[first] < 0 ? -u[first] : u[first]) < bound.v[0][0]) ++first;
        return u[first] < 0 ? T(-1) : T(1);
    }
    // Whether any element is not below the bound.
    static bool reaches(const Pack<T, 1> &x, const Pack<T, 1> &bound) {
        const Pack<T, 1> one = broadcast<1>(T(1)), zero = broadcast<1>(T(0));
        return any(greater(select(greater(bound, x), zero, one), zero));
    }

    void fill(const View<T> &to, int rows, T diagonal, T rest) const {
        for (int i = 0; i < rows; ++i)
            for (int c = 0; c < cols_; ++c) to(i, c) = i == c ? diagonal : rest;
    }

    const SvdGroup &group_;
    const bool wide_;
    const int rows_, cols_, even_;
    uintptr_t next_;
    const Columns<T> X_, W_, Y_, V_;
    T *const vector_, *const norms_, *const tau_, *const sign_, *const value_;
    Eight<T> *const inner_;
    int *const order_, *const place_;
    double *const direct_values_;
    void *const direct_;
};

int64_t matrices_per_task(const fedlora_block &) { return 1; }

int64_t scratch_bytes(const fedlora_block &C) {
    return C.dtype == FEDLORA_FLOAT32 ? LargeSvd<float>::scratch_bytes(C) : LargeSvd<double>::scratch_bytes(C);
}

void run(const SvdGroup &group, int64_t index, int max_sweeps, void *scratch) {
    const int sweeps = max_sweeps > 0 ? max_sweeps : kDefaultSweeps;
    if (group.C.dtype == FEDLORA_FLOAT32)
        LargeSvd<float>(group, scratch).solve(index, sweeps);
    else
        LargeSvd<double>(group, scratch).solve(index, sweeps);
}
