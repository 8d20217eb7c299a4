// Singular values and vectors of an upper bidiagonal matrix B, one value to a lane (docs/numerics.md, Core SVD).
//
// Included once per instruction set after svd_view.hpp, where a * b + c is not contracted (fp-contract=off): doubled numbers need
// every rounding where it is written.
//
// With q the diagonal, e the other one and y = sigma^2, the determinants P_k of y - B_k^T B_k of the leading blocks follow
//
//   R_k = P_(k-1) - e_(k-1)^2 R_(k-1)      P_k = y R_k - q_k^2 P_(k-1)
//
// without a division. Their changes of sign count the values above sigma, P_n / P_n' is a step of Newton, and P_(k-1), R_k are,
// but for factors that all lanes share, the elements v_k, u_k of the vectors as the first k equations say; the same recurrence
// from the other end says them as the last equations do. Both are joined where their product, and so the vector, is largest (a
// twisted factorisation). Each step is exact for a B whose elements differ by a few roundoffs, so vectors err by roundoff over
// relative gap: in doubled numbers (106 bits) they are orthogonal to working precision unless two values agree to 13 digits.

constexpr int kWide = FEDLORA_VECTOR_BYTES == 64 ? 4 : 2;    // packs of values, by the number of registers
constexpr int kNarrow = FEDLORA_VECTOR_BYTES == 64 ? 2 : 1;  // packs of vectors, from both ends at a time
constexpr int kRescale = 4;                                  // steps between two rescalings of a recurrence

typedef Lane<double>::V V;
typedef Lane<double>::I I;
constexpr int kVector = FEDLORA_VECTOR_BYTES / 8;

template <int W>
using Reals = Pack<double, W>;

template <int W>
struct Integers {
    I v[W];
};

// a b + c: what rounds once where the machine can.
FEDLORA_INLINE V multiply_add(V a, V b, V c) {
#if FEDLORA_VECTOR_BYTES == 64
    return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif FEDLORA_VECTOR_BYTES == 32
    return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
    return a * b + c;
#endif
}

// c - a b, likewise.
FEDLORA_INLINE V subtract_product(V a, V b, V c) {
#if FEDLORA_VECTOR_BYTES == 64
    return (V)_mm512_fnmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif FEDLORA_VECTOR_BYTES == 32
    return (V)_mm256_fnmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
    return c - a * b;
#endif
}

// a b - product, for the rounded product.
FEDLORA_INLINE V lost(V a, V b, V product) {
#if (FEDLORA_VECTOR_BYTES == 64) || (FEDLORA_VECTOR_BYTES == 32)
    return multiply_add(a, b, -product);
#else
    const V split = V{} + 134217729.0, sa = a * split, sb = b * split;
    const V ah = sa - (sa - a), al = a - ah, bh = sb - (sb - b), bl = b - bh;
    return ((ah * bh - product) + ah * bl + al * bh) + al * bl;
#endif
}

template <int W>
FEDLORA_INLINE Reals<W> multiply_add(const Reals<W> &a, const Reals<W> &b, const Reals<W> &c) {
    Reals<W> r;
    FEDLORA_EACH r.v[w] = multiply_add(a.v[w], b.v[w], c.v[w]);
    return r;
}

template <int W>
FEDLORA_INLINE Mask<double, W> operator&(const Mask<double, W> &a, const Mask<double, W> &b) {
    Mask<double, W> r;
    FEDLORA_EACH r.m[w] = a.m[w] & b.m[w];
    return r;
}

template <int W>
FEDLORA_INLINE Reals<W> subtract_product(double a, const Reals<W> &b, const Reals<W> &c) {
    Reals<W> r;
    FEDLORA_EACH r.v[w] = subtract_product(V{} + a, b.v[w], c.v[w]);
    return r;
}

// A coefficient that all lanes share, to 106 bits.
struct Square {
    double high, low;
};

inline Square square(double x) {
    const V high = (V{} + x) * x;
    return {high[0], lost(V{} + x, V{} + x, high)[0]};
}

// Numbers of 53 bits ...
template <int W>
struct Plain {
    static constexpr int width = W;
    Reals<W> high;

    static FEDLORA_INLINE Plain of(double x) { return {broadcast<W>(x)}; }
    static FEDLORA_INLINE Plain square_of(const Reals<W> &x) { return {x * x}; }
    FEDLORA_INLINE Plain minus(const Reals<W> &x) const { return {high - x}; }

    // a - c b
    static FEDLORA_INLINE Plain difference(const Plain &a, const Square &c, const Plain &b) {
        return {subtract_product(c.high, b.high, a.high)};
    }
    // y r - c p
    static FEDLORA_INLINE Plain difference(const Plain &y, const Plain &r, const Square &c, const Plain &p) {
        return {subtract_product(c.high, p.high, y.high * r.high)};
    }
    FEDLORA_INLINE void scale(const Reals<W> &f) { high = high * f; }
};

// ... and of 106, in two parts.
template <int W>
struct Doubled {
    static constexpr int width = W;
    Reals<W> high, low;

    static FEDLORA_INLINE Doubled of(double x) { return {broadcast<W>(x), broadcast<W>(0.0)}; }
    static FEDLORA_INLINE Doubled square_of(const Reals<W> &x) {
        Doubled r;
        r.high = x * x;
        FEDLORA_EACH r.low.v[w] = lost(x.v[w], x.v[w], r.high.v[w]);
        return r;
    }
    FEDLORA_INLINE Doubled minus(const Reals<W> &x) const {
        Doubled r;
        FEDLORA_EACH r.join(w, high.v[w], x.v[w], low.v[w]);
        return r;
    }

    static FEDLORA_INLINE Doubled difference(const Doubled &a, const Square &c, const Doubled &b) {
        Doubled r;
        FEDLORA_EACH {
            const V ch = V{} + c.high, cl = V{} + c.low;
            const V product = ch * b.high.v[w];
            const V rest = multiply_add(cl, b.high.v[w], multiply_add(ch, b.low.v[w], lost(ch, b.high.v[w], product)));
            r.join(w, a.high.v[w], product, a.low.v[w] - rest);
        }
        return r;
    }
    static FEDLORA_INLINE Doubled difference(const Doubled &y, const Doubled &r, const Square &c, const Doubled &p) {
        Doubled d;
        FEDLORA_EACH {
            const V first = y.high.v[w] * r.high.v[w];
            const V more = multiply_add(y.low.v[w], r.high.v[w],
                                        multiply_add(y.high.v[w], r.low.v[w], lost(y.high.v[w], r.high.v[w], first)));
            const V ch = V{} + c.high, cl = V{} + c.low;
            const V second = ch * p.high.v[w];
            const V less = multiply_add(cl, p.high.v[w], multiply_add(ch, p.low.v[w], lost(ch, p.high.v[w], second)));
            d.join(w, first, second, more - less);
        }
        return d;
    }
    FEDLORA_INLINE void scale(const Reals<W> &f) {
        high = high * f;
        low = low * f;
    }

  private:
    // a - b + rest
    FEDLORA_INLINE void join(int w, V a, V b, V rest) {
        const V sum = a - b, back = sum - a;
        const V low_part = ((a - (sum - back)) - (b + back)) + rest;
        high.v[w] = sum + low_part;
        low.v[w] = low_part - (high.v[w] - sum);
    }
};

// One end of the recurrence: P and R, and the power of two that they were divided by.
template <class N>
struct Chain {
    static constexpr int W = N::width;
    N value, other;
    Integers<W> exponent;

    Chain() {
        value = N::of(1);
        other = N::of(0);
        FEDLORA_EACH exponent.v[w] = I{};
    }
    FEDLORA_INLINE void half_step(const Square &e) { other = N::difference(value, e, other); }
    FEDLORA_INLINE void whole_step(const N &y, const Square &q) { value = N::difference(y, other, q, value); }

    // The factor that was applied.
    FEDLORA_INLINE Reals<W> rescale() {
        const Reals<W> size = max(abs(value.high), abs(other.high)), f = inverse_power(size);
        value.scale(f);
        other.scale(f);
        FEDLORA_EACH exponent.v[w] += 1023 - ((I)f.v[w] >> 52);
        return f;
    }
};

// A chain from the first element together with dP/dy, and with the changes of sign: the values above sigma.
template <class N>
struct Counted {
    static constexpr int W = N::width;
    Chain<N> chain;
    Reals<W> slope = broadcast<W>(0.0), other_slope = broadcast<W>(0.0);
    Integers<W> changes;

    Counted() { FEDLORA_EACH changes.v[w] = I{}; }

    FEDLORA_INLINE void step(const N &y, const Square &e, const Square &q) {
        const N before = chain.value;
        chain.half_step(e);
        other_slope = subtract_product(e.high, other_slope, slope);
        chain.whole_step(y, q);
        slope = multiply_add(y.high, other_slope, subtract_product(q.high, slope, chain.other.high));
        typedef uint64_t Bits __attribute__((vector_size(FEDLORA_VECTOR_BYTES)));
        FEDLORA_EACH changes.v[w] += (I)((Bits)((I)before.high.v[w] ^ (I)chain.value.high.v[w]) >> 63);
    }
    FEDLORA_INLINE void rescale() {
        const Reals<W> f = chain.rescale();
        slope = slope * f;
        other_slope = other_slope * f;
    }
    FEDLORA_INLINE Reals<W> count() const {
        Reals<W> r;
        FEDLORA_EACH r.v[w] = __builtin_convertvector(changes.v[w], V);
        return r;
    }
};

#define FEDLORA_NARROW for (int w = 0; w < kNarrow; ++w)

class Bidiagonal {
  public:
    Bidiagonal(int n, void *scratch)
        : n_(n), padded_((n + kWide * kVector - 1) / (kWide * kVector) * (kWide * kVector)), next_((uintptr_t)scratch),
          exponent_((int *)take(64)), q_(reals(n + 1)), e_(reals(n + 1)), q2_((Square *)take((n + 1) * sizeof(Square))),
          e2_((Square *)take((n + 1) * sizeof(Square))), grid_(reals(padded_ + 1)), low_(reals(padded_)), high_(reals(padded_)),
          above_low_(reals(padded_)), above_high_(reals(padded_)), sigma_(reals(padded_)), factor_(reals(n)),
          u_sign_(reals(n)), v_sign_(reals(n)),
          power_((int64_t *)take(n * 8)), from_start_(half()), from_end_(half()) {}

    static int64_t scratch_bytes(int n) { return (int64_t)Bidiagonal(n, nullptr).next_; }

    // e[k] stands right of q[k]. False where the iteration does not end.
    bool values(const double *q, const double *e, double *s) {
        if (!load(q, e)) return false;
        bracket();
        for (int first = 0; first < n_; first += kWide * kVector)
            if (!refine(first)) return false;
        for (int i = 1; i < n_; ++i) {
            const double x = sigma_[i];
            int at = i;
            for (; at > 0 && sigma_[at - 1] < x; --at) sigma_[at] = sigma_[at - 1];
            sigma_[at] = x;
        }
        for (int i = n_; i < padded_; ++i) sigma_[i] = sigma_[n_ - 1];
        for (int i = 0; i < n_; ++i) s[i] = sigma_[i] * power_of_two<double>(*exponent_);
        return true;
    }

    // After values: the first p vectors of both sides by rows, row k at U + k ldu, and something up to a whole number of
    // kNarrow vectors. False where values lie too close together.
    template <class T>
    bool vectors(int p, T *U, int64_t ldu, T *V, int64_t ldv) {
        const double roundoff = Lane<T>::roundoff;
        share_factors();
        for (int first = 0; first < p; first += kNarrow * kVector) {
            const int count = p - first < kNarrow * kVector ? p - first : kNarrow * kVector;
            const double gap = smallest_gap(first, count, p);
            const bool found = (gap * roundoff > n_ * 0x1p-52 && solve<Plain<kNarrow>>(first, count, gap, roundoff)) ||
                               (gap > 0x1p-44 && solve<Doubled<kNarrow>>(first, count, gap, roundoff));
            if (!found) return false;
            for (int k = 0; k < n_; ++k)
                for (int l = 0; l < R::lanes; ++l) {
                    U[k * ldu + first + l] = (T)(lane(from_start_.u[k], l) * u_sign_[k]);
                    V[k * ldv + first + l] = (T)(lane(from_start_.v[k], l) * v_sign_[k]);
                }
        }
        return true;
    }

  private:
    typedef Reals<kNarrow> R;
    typedef Integers<kNarrow> Z;

    // The vectors as the recurrence from one end says them, but for factors: element k times 2^power[steps / kRescale].
    struct Half {
        R *v, *u;
        Z *power;
    };

    static double lane(const R &x, int l) { return ((const double *)&x)[l]; }
    static double &lane(R &x, int l) { return ((double *)&x)[l]; }
    static int64_t lane(const Z &x, int l) { return ((const int64_t *)&x)[l]; }
    static int64_t &lane(Z &x, int l) { return ((int64_t *)&x)[l]; }

    char *take(int64_t bytes) {
        char *here = (char *)next_;
        next_ += (bytes + 63) / 64 * 64;
        return here;
    }
    double *reals(int count) { return (double *)take((int64_t)count * 8); }
    Half half() {
        return {(R *)take(n_ * sizeof(R)), (R *)take(n_ * sizeof(R)), (Z *)take((n_ / kRescale + 1) * sizeof(Z))};
    }

    template <int W>
    static FEDLORA_INLINE Reals<W> read(const double *x) {
        return *(const Reals<W> *)x;
    }
    template <int W>
    static FEDLORA_INLINE void write(double *x, const Reals<W> &v) {
        *(Reals<W> *)x = v;
    }

    // Elements that are nothing beside the largest become 2^-90 of it, so that no value is zero and none is double for good.
    bool load(const double *q, const double *e) {
        double largest = 0, probe = 0, sign = 1;
        for (int k = 0; k < n_; ++k) {
            v_sign_[k] = sign;
            u_sign_[k] = q[k] < 0 ? -sign : sign;
            if (k + 1 < n_) sign = e[k] < 0 ? -u_sign_[k] : u_sign_[k];
            const double a = q[k] < 0 ? -q[k] : q[k], b = k + 1 == n_ ? 0.0 : e[k] < 0 ? -e[k] : e[k];
            q_[k] = a;
            e_[k] = b;
            probe += (a - a) + (b - b);
            largest = a > largest ? a : largest;
            largest = b > largest ? b : largest;
        }
        if (!(probe == 0 && largest > 0)) return false;
        *exponent_ = exponent_of<double>(largest);
        if (*exponent_ < -1000 || *exponent_ > 1000) return false;
        const double f = power_of_two<double>(-*exponent_), least = 0x1p-90;
        for (int k = 0; k < n_; ++k) {
            q_[k] = q_[k] * f > least ? q_[k] * f : least;
            e_[k] = e_[k] * f > least ? e_[k] * f : least;
            q2_[k] = square(q_[k]);
            e2_[k + 1] = square(e_[k]);
        }
        e2_[0] = e2_[n_] = {0, 0};
        return true;
    }

    template <class N>
    FEDLORA_INLINE Counted<N> evaluate(const N &y) const {
        Counted<N> all;
        int k = 0;
        for (; k + kRescale <= n_; k += kRescale) {
#pragma GCC unroll 4
            for (int s = 0; s < kRescale; ++s) all.step(y, e2_[k + s], q2_[k + s]);
            all.rescale();
        }
        for (; k < n_; ++k) all.step(y, e2_[k], q2_[k]);
        all.rescale();
        return all;
    }

    // Counts on a uniform grid give each value its first bracket.
    void bracket() {
        double bound = 0;
        for (int k = 0; k < n_; ++k) {
            const double right = q_[k] + (k + 1 < n_ ? e_[k] : 0), left = q_[k] + (k > 0 ? e_[k - 1] : 0);
            bound = right > bound ? right : bound;
            bound = left > bound ? left : bound;
        }
        bound *= 1 + 0x1p-20;
        const double step = bound / (padded_ + 1);
        for (int j = 0; j < padded_; ++j) grid_[j] = (j + 1) * step;
        for (int j = 0; j < padded_; j += kWide * kVector) {
            const Reals<kWide> x = read<kWide>(grid_ + j);
            write(sigma_ + j, evaluate(Plain<kWide>{x * x}).count());
        }
        int j = padded_ - 1;
        for (int i = 0; i < padded_; ++i) {
            const int index = i < n_ ? i : n_ - 1;
            while (j >= 0 && sigma_[j] <= index) --j;
            low_[i] = j < 0 ? 0 : grid_[j];
            above_low_[i] = j < 0 ? n_ : sigma_[j];
            high_[i] = j + 1 < padded_ ? grid_[j + 1] : bound;
            above_high_[i] = j + 1 < padded_ ? sigma_[j + 1] : 0;
        }
    }

    // Bisection until a value is alone in its bracket and Newton stays inside.
    bool refine(int first) {
        constexpr int W = kWide;
        typedef Reals<W> R;
        const R zero = broadcast<W>(0.0), half = broadcast<W>(0.5), one = broadcast<W>(1.0), nothing = broadcast<W>(0x1p-110);
        R low = read<W>(low_ + first), high = read<W>(high_ + first), above_low = read<W>(above_low_ + first),
          above_high = read<W>(above_high_ + first), index, last = zero, running = one;
        for (int l = 0; l < R::lanes; ++l) ((double *)&index)[l] = first + l < n_ ? first + l : n_ - 1;
        R x = low + (high - low) * (above_low - index - half) / (above_low - above_high);
        for (int evaluation = 0; evaluation < 160; ++evaluation) {
            const R y = x * x;
            const Counted<Plain<W>> found = evaluate(Plain<W>{y});
            const R count = found.count();
            const auto up = greater(count, index), active = greater(running, zero);
            low = select(up, x, low);
            above_low = select(up, count, above_low);
            high = select(up, high, x);
            above_high = select(up, above_high, count);
            const R target = sqrt(max(y - found.chain.value.high / found.slope, zero)), move = abs(target - x);
            // A step d after a step D leaves d^3 / D^2; steps of the size of rounding may leave the bracket, and end it when they
            // do not get smaller.
            const R small = broadcast<W>(0x1p-47) * x, cube = move * move * move;
            const auto tiny = greater(small, move), inside = greater(target, low) & greater(high, target);
            // Steps that hardly shrink follow many values far away.
            const R free = select(greater(last, zero) & greater(move, broadcast<W>(0.625) * last), zero, one);
            const auto newton = greater(broadcast<W>(1.5), above_low - above_high) & (tiny | (inside & greater(free, zero)));
            const auto quick = greater(last, move + move) & greater(broadcast<W>(0x1p-58) * x * last * last, cube);
            const auto stalled = tiny & greater(small, last) & greater(move + move, last);
            const auto settled = quick | stalled | greater(small * broadcast<W>(0x1p-4), move);
            const R wide = (low + high) * half;
            const auto graded = greater(broadcast<W>(0x1p-12), high) & greater(high, broadcast<W>(16.0) * low);
            const R middle = select(graded, sqrt(max(low, nothing) * high), wide);
            const auto closed = greater(broadcast<W>(0x1p-51) * high, high - low) | greater(nothing + nothing, high);
            const R next = select(newton, target, middle);
            last = select(newton, move, zero);
            x = select(active, next, x);
            const auto done = (newton & settled) | closed;
            running = select(done, zero, running);
            if (!any(greater(running, zero))) {
                write(sigma_ + first, x);
                return true;
            }
        }
        return false;
    }

    // Smallest of |s_i - s_j| / s_i over the neighbours of so many values, among the first p.
    double smallest_gap(int first, int count, int p) const {
        double gap = 1;
        for (int i = first; i < first + count; ++i) {
            if (i > 0) gap = least(gap, (sigma_[i - 1] - sigma_[i]) / sigma_[i - 1]);
            if (i + 1 < p) gap = least(gap, (sigma_[i] - sigma_[i + 1]) / sigma_[i]);
        }
        return gap;
    }
    static double least(double a, double b) { return b < a ? b : a; }

    // factor 2^power = 1 / (q_0 e_0 ... q_(k-1) e_(k-1))
    void share_factors() {
        double factor = 1;
        int64_t power = 0;
        for (int k = 0; k < n_; ++k) {
            const int e = exponent_of<double>(factor);
            factor *= power_of_two<double>(-e);
            power += e;
            factor_[k] = factor;
            power_[k] = power;
            factor = factor / q_[k] / e_[k];
        }
    }

    // Vectors of so many values into from_start_, to a roundoff; gap: how far, relatively, values are apart.
    template <class N>
    bool solve(int first, int count, double gap, double roundoff) {
        R sigma = read<kNarrow>(sigma_ + first);
        for (int l = count; l < R::lanes; ++l) lane(sigma, l) = lane(sigma, count - 1);
        const double tolerance = gap * roundoff / 4;
        N y = N::square_of(sigma);
        Counted<N> found;
        for (int pass = 0;; ++pass) {
            found = evaluate(y);
            const R step = found.chain.value.high / found.slope;
            y = y.minus(step);
            const double moved = largest(step / y.high);
            if (!(moved < gap / 4) || pass == 4) return false;
            if (moved * moved < tolerance * gap / 4) break;
        }
        const Chain<N> rest = march(y);
        // What another step would still change.
        R left = rest.value.high / found.slope / y.high;
        FEDLORA_NARROW left.v[w] *= power_of(rest.exponent.v[w] - found.chain.exponent.v[w]);
        if (!(largest(left) <= tolerance)) return false;
        sigma = sqrt(y.high);
        return join(sigma) && is_solved(sigma, 16 * roundoff);
    }

    // Both halves.
    template <class N>
    Chain<N> march(const N &y) {
        Chain<N> start, end;
        for (int j = 0, k = n_ - 1; j < n_; ++j, --k) {
            if (j % kRescale == 0) {
                start.rescale();
                end.rescale();
                from_start_.power[j / kRescale] = start.exponent;
                from_end_.power[j / kRescale] = end.exponent;
            }
            from_start_.v[j] = start.value.high;
            from_end_.u[k] = end.value.high;
            start.half_step(e2_[j]);
            end.half_step(e2_[k + 1]);
            from_start_.u[j] = start.other.high;
            from_end_.v[k] = end.other.high;
            start.whole_step(y, q2_[j]);
            end.whole_step(y, q2_[k]);
        }
        return start;
    }

    const Z &start_power(int k) const { return from_start_.power[k / kRescale]; }
    const Z &end_power(int k) const { return from_end_.power[(n_ - 1 - k) / kRescale]; }

    // Where the product of both halves is largest, by its logarithm: 2 k for v_k, 2 k + 1 for u_k.
    Z twist() const {
        Z best, place;
        FEDLORA_NARROW best.v[w] = I{} + INT64_MIN, place.v[w] = I{};
        const auto compare = [&](const R &a, const R &b, int k, int64_t here) {
            FEDLORA_NARROW {
                constexpr int left_out = 20;  // bits of a double that make room for the powers
                const I score = ((I)abs(a).v[w] >> left_out) + ((I)abs(b).v[w] >> left_out) +
                                ((start_power(k).v[w] + end_power(k).v[w]) << (52 - left_out));
                const I better = score > best.v[w];
                best.v[w] = (better & score) | (~better & best.v[w]);
                place.v[w] = (better & (I{} + here)) | (~better & place.v[w]);
            }
        };
        for (int k = 0; k < n_; ++k) {
            compare(from_start_.v[k], from_end_.v[k], k, 2 * k);
            compare(from_start_.u[k], from_end_.u[k], k, 2 * k + 1);
        }
        return place;
    }

    // Unit vectors in from_start_: the halves, each up to the twist, where they meet.
    bool join(const R &sigma) {
        const Z at = twist();
        Z start_shift, end_shift;
        R end_v, end_u;
        for (int l = 0; l < R::lanes; ++l) {
            const int k = (int)lane(at, l) / 2;
            const bool in_u = lane(at, l) % 2;
            const double s = lane(sigma, l), a = factor_[k], q = q_[k];
            const double head = in_u ? lane(from_start_.u[k], l) * (a / q) * s : lane(from_start_.v[k], l) * a;
            const double tail = in_u ? lane(from_end_.u[k], l) * (q / a) / s : lane(from_end_.v[k], l) / a;
            const double head_size = head < 0 ? -head : head, tail_size = tail < 0 ? -tail : tail;
            if (!(head_size > 0x1p-1000 && head_size < 0x1p1000 && tail_size > 0x1p-1000 && tail_size < 0x1p1000)) return false;
            const int head_power = exponent_of<double>(head_size), tail_power = exponent_of<double>(tail_size);
            lane(start_shift, l) = -lane(start_power(k), l) - power_[k] - head_power;
            lane(end_shift, l) = -lane(end_power(k), l) + power_[k] - tail_power;
            lane(end_v, l) = head * power_of_two<double>(-head_power) / (tail * power_of_two<double>(-tail_power));
            lane(end_u, l) = lane(end_v, l) / s;
        }
        // Two levels of sums: a norm that is off makes its vector longer or shorter.
        R v_square = broadcast<kNarrow>(0.0), u_square = v_square, v_part = v_square, u_part = v_square;
        for (int k = 0; k < n_; ++k) {
            const double a = factor_[k], q = q_[k];
            FEDLORA_NARROW {
                const V head = power_of(start_power(k).v[w] + start_shift.v[w] + power_[k]) * a;
                const V tail = power_of(end_power(k).v[w] + end_shift.v[w] - power_[k]) * (1 / a);
                const I v_late = at.v[w] < I{} + 2 * k, u_late = at.v[w] < I{} + (2 * k + 1);
                const V v = choose(v_late, from_end_.v[k].v[w] * tail * end_v.v[w], from_start_.v[k].v[w] * head);
                const V u = choose(u_late, from_end_.u[k].v[w] * tail * q * end_u.v[w],
                                   from_start_.u[k].v[w] * head * (1 / q) * sigma.v[w]);
                from_start_.v[k].v[w] = v;
                from_start_.u[k].v[w] = u;
                v_part.v[w] = multiply_add(v, v, v_part.v[w]);
                u_part.v[w] = multiply_add(u, u, u_part.v[w]);
            }
            if (k % 16 == 15 || k + 1 == n_) {
                v_square = v_square + v_part;
                u_square = u_square + u_part;
                v_part = u_part = broadcast<kNarrow>(0.0);
            }
        }
        const R one = broadcast<kNarrow>(1.0), v_factor = one / sqrt(v_square), u_factor = one / sqrt(u_square);
        for (int k = 0; k < n_; ++k) {
            from_start_.v[k] = from_start_.v[k] * v_factor;
            from_start_.u[k] = from_start_.u[k] * u_factor;
        }
        return true;
    }

    // B v = sigma u and B^T u = sigma v, element by element; the elements of B are at most one.
    bool is_solved(const R &sigma, double limit) const {
        R worst = broadcast<kNarrow>(0.0);
        const R *v = from_start_.v, *u = from_start_.u;
        for (int k = 0; k < n_; ++k) {
            R row = v[k] * broadcast<kNarrow>(q_[k]) - sigma * u[k], column = u[k] * broadcast<kNarrow>(q_[k]) - sigma * v[k];
            if (k + 1 < n_) row = row + v[k + 1] * broadcast<kNarrow>(e_[k]);
            if (k > 0) column = column + u[k - 1] * broadcast<kNarrow>(e_[k - 1]);
            worst = worst + max(abs(row), abs(column)) * max(abs(row), abs(column));
        }
        return largest(worst) <= limit * limit;
    }

    // NaN where any lane is.
    static double largest(const R &x) {
        double size = 0, probe = 0;
        for (int l = 0; l < R::lanes; ++l) {
            const double a = lane(x, l) < 0 ? -lane(x, l) : lane(x, l);
            probe += a - a;
            size = a > size ? a : size;
        }
        return size + probe;
    }

    // 2^e, no less than far below everything.
    static FEDLORA_INLINE V power_of(I e) {
        const I low = e < I{} - 1000, high = e > I{} + 1000;
        e = (low & (I{} - 1000)) | (high & (I{} + 1000)) | (~(low | high) & e);
        return (V)((e + 1023) << 52);
    }
    static FEDLORA_INLINE V choose(I mask, V a, V b) { return (V)((mask & (I)a) | (~mask & (I)b)); }

    const int n_, padded_;
    uintptr_t next_;
    int *const exponent_;
    double *const q_, *const e_;
    Square *const q2_, *const e2_;
    double *const grid_, *const low_, *const high_, *const above_low_, *const above_high_, *const sigma_, *const factor_,
        *const u_sign_, *const v_sign_;
    int64_t *const power_;
    const Half from_start_, from_end_;
};

int64_t scratch_bytes(int n) { return Bidiagonal::scratch_bytes(n); }

bool values(int n, const double *q, const double *e, double *s, void *scratch) { return Bidiagonal(n, scratch).values(q, e, s); }

template <class T>
bool vectors(int n, int p, T *U, int64_t ldu, T *V, int64_t ldv, void *scratch) {
    return Bidiagonal(n, scratch).vectors(p, U, ldu, V, ldv);
}
