// Strips of X Q in registers. Included once per instruction set after FEDLORA_VECTOR_BYTES, FEDLORA_TURN_SUMS (how many sums a tile holds)
// and `stream_store` are defined.

template <class T>
struct Vector {
    typedef T V __attribute__((vector_size(FEDLORA_VECTOR_BYTES)));
    typedef decltype(V{} < V{}) I;
    static constexpr int lanes = FEDLORA_VECTOR_BYTES / sizeof(T);
};

#define FEDLORA_INLINE inline __attribute__((always_inline))

template <class T>
FEDLORA_INLINE typename Vector<T>::V load(const T *x) {
    typename Vector<T>::V v;
    __builtin_memcpy(&v, x, sizeof v);
    return v;
}

template <class T>
FEDLORA_INLINE void store(T *x, typename Vector<T>::V v, bool stream) {
    if (stream)
        stream_store(x, (Bytes)v);
    else
        __builtin_memcpy(x, &v, sizeof v);
}

// Adds zero for finite numbers, NaN for all others.
template <class V>
FEDLORA_INLINE void watch(V &probe, V v) {
    probe += v * (V{});
}

template <class T>
bool is_zero(typename Vector<T>::V probe) {
    T sum = 0;
    for (int l = 0; l < Vector<T>::lanes; ++l) sum += probe[l];
    return sum == 0;
}

template <class T>
bool streams(const T *out, int64_t ld) {
    return ((uintptr_t)out | (uintptr_t)(ld * (int64_t)sizeof(T))) % FEDLORA_VECTOR_BYTES == 0;
}

// J columns of the answer by D vectors along the columns.
template <int J, int D, class T>
FEDLORA_INLINE void column_tile(const T *X, int64_t ldx, const T *Q, int64_t ldq, T *out, int64_t ldo, int64_t r, bool stream,
                                typename Vector<T>::V &probe) {
    using V = typename Vector<T>::V;
    V sum[J][D];
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j)
#pragma GCC unroll 16
        for (int d = 0; d < D; ++d) sum[j][d] = V{};
    for (int64_t i = 0; i < r; ++i) {
        V x[D];
#pragma GCC unroll 16
        for (int d = 0; d < D; ++d) x[d] = load(X + i * ldx + d * Vector<T>::lanes);
#pragma GCC unroll 16
        for (int j = 0; j < J; ++j)
#pragma GCC unroll 16
            for (int d = 0; d < D; ++d) sum[j][d] += Q[i * ldq + j] * x[d];
    }
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j)
#pragma GCC unroll 16
        for (int d = 0; d < D; ++d) {
            watch(probe, sum[j][d]);
            store(out + j * ldo + d * Vector<T>::lanes, sum[j][d], stream);
        }
}

template <int J, class T>
FEDLORA_INLINE void columns_at_once(const T *X, int64_t ldx, const T *Q, int64_t ldq, T *out, int64_t ldo, int64_t count, int64_t r, bool stream,
                                    typename Vector<T>::V &probe) {
    constexpr int D = FEDLORA_TURN_SUMS / J < 4 ? FEDLORA_TURN_SUMS / J : 4, lanes = Vector<T>::lanes;
    int64_t d = 0;
    for (; d + D * lanes <= count; d += D * lanes) column_tile<J, D>(X + d, ldx, Q, ldq, out + d, ldo, r, stream, probe);
    for (; d + lanes <= count; d += lanes) column_tile<J, 1>(X + d, ldx, Q, ldq, out + d, ldo, r, stream, probe);
    if (d == count) return;
    // the last vector once more, shifted: nothing is written but the same numbers
    if (count >= lanes) return column_tile<J, 1>(X + count - lanes, ldx, Q, ldq, out + count - lanes, ldo, r, false, probe);
    for (int j = 0; j < J; ++j)
        for (d = 0; d < count; ++d) {
            T sum = 0;
            for (int64_t i = 0; i < r; ++i) sum += Q[i * ldq + j] * X[i * ldx + d];
            probe[0] += sum * 0;
            out[j * ldo + d] = sum;
        }
}

template <class T>
bool columns(const T *X, int64_t ldx, const T *Q, T *out, int64_t ldo, int64_t count, int64_t r, bool stream) {
    const int64_t ldq = (r + fedlora::kTurnPad - 1) / fedlora::kTurnPad * fedlora::kTurnPad;
    typename Vector<T>::V probe = {};
    stream = stream && streams(out, ldo);
    int64_t j = 0;
    for (; j + FEDLORA_TURN_SUMS <= r; j += FEDLORA_TURN_SUMS)
        columns_at_once<FEDLORA_TURN_SUMS>(X, ldx, Q + j, ldq, out + j * ldo, ldo, count, r, stream, probe);
    if constexpr (FEDLORA_TURN_SUMS > 8)
        for (; j + 8 <= r; j += 8) columns_at_once<8>(X, ldx, Q + j, ldq, out + j * ldo, ldo, count, r, stream, probe);
    for (; j + 4 <= r; j += 4) columns_at_once<4>(X, ldx, Q + j, ldq, out + j * ldo, ldo, count, r, stream, probe);
    for (; j < r; ++j) columns_at_once<1>(X, ldx, Q + j, ldq, out + j * ldo, ldo, count, r, stream, probe);
    return is_zero<T>(probe);
}

// Rows shorter than a vector, several to one: each number of Q stands once for every row of the vector.
template <int R, class T>
bool short_rows(const T *X, const T *Q, int64_t ldq, T *out, int64_t count, bool stream) {
    using V = typename Vector<T>::V;
    using I = typename Vector<T>::I;
    constexpr int lanes = Vector<T>::lanes, many = 4;
    V q[R], probe = {};
    I from[R];
    for (int i = 0; i < R; ++i)
        for (int l = 0; l < lanes; ++l) q[i][l] = Q[i * ldq + l % R], from[i][l] = l / R * R + i;
    const int64_t size = count * R;
    int64_t e = 0;
    for (; e + many * lanes <= size; e += many * lanes) {
        V x[many], sum[many];
#pragma GCC unroll 4
        for (int v = 0; v < many; ++v) {
            __builtin_prefetch(X + e + (v + 6 * many) * lanes);
            x[v] = load(X + e + v * lanes), sum[v] = V{};
        }
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < many; ++v) sum[v] += q[i] * __builtin_shuffle(x[v], from[i]);
#pragma GCC unroll 4
        for (int v = 0; v < many; ++v) {
            watch(probe, sum[v]);
            store(out + e + v * lanes, sum[v], stream);
        }
    }
    T rest = 0;
    for (; e < size; e += R)
        for (int j = 0; j < R; ++j) {
            T sum = 0;
            for (int i = 0; i < R; ++i) sum += Q[i * ldq + j] * X[e + i];
            rest += sum * 0;
            out[e + j] = sum;
        }
    return is_zero<T>(probe) && rest == 0;
}

// D rows by W vectors of the answer; the last vector may hold fewer than its lanes. R is r where that is known beforehand, so that the
// addresses of the rows need no registers, else 0.
template <int D, int W, int R, class T>
FEDLORA_INLINE void row_tile(const T *X, const T *Q, int64_t ldq, T *out, int64_t given, int64_t width, bool stream, typename Vector<T>::V &probe) {
    const int64_t r = R ? R : given;
    using V = typename Vector<T>::V;
    constexpr int lanes = Vector<T>::lanes;
    V sum[D][W];
#pragma GCC unroll 16
    for (int d = 0; d < D; ++d)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) sum[d][w] = V{};
#pragma GCC unroll 16
    for (int d = 0; d < D; ++d) __builtin_prefetch(X + (d + 3 * D) * r);
    for (int64_t i = 0; i < r; ++i) {
        V q[W];
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) q[w] = load(Q + i * ldq + w * lanes);
#pragma GCC unroll 16
        for (int d = 0; d < D; ++d)
#pragma GCC unroll 4
            for (int w = 0; w < W; ++w) sum[d][w] += X[d * r + i] * q[w];
    }
#pragma GCC unroll 16
    for (int d = 0; d < D; ++d)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
            watch(probe, sum[d][w]);
            if (w < W - 1 || width == W * lanes)
                store(out + d * r + w * lanes, sum[d][w], stream);
            else
                __builtin_memcpy(out + d * r + w * lanes, &sum[d][w], sizeof(T) * (width - w * lanes));
        }
}

template <int W, int R, class T>
void rows_at_once(const T *X, const T *Q, int64_t ldq, T *out, int64_t count, int64_t r, int64_t width, bool stream,
                  typename Vector<T>::V &probe) {
    constexpr int D = FEDLORA_TURN_SUMS / W;
    int64_t d = 0;
    for (; d + D <= count; d += D) row_tile<D, W, R>(X + d * r, Q, ldq, out + d * r, r, width, stream, probe);
    for (; d < count; ++d) row_tile<1, W, R>(X + d * r, Q, ldq, out + d * r, r, width, stream, probe);
}

template <class T>
bool rows(const T *X, const T *Q, T *out, int64_t count, int64_t r, bool stream) {
    const int64_t ldq = (r + fedlora::kTurnPad - 1) / fedlora::kTurnPad * fedlora::kTurnPad;
    constexpr int lanes = Vector<T>::lanes;
    stream = stream && streams(out, lanes);
    if (r < lanes) switch (r) {
            case 1: return short_rows<1>(X, Q, ldq, out, count, stream);
            case 2: return short_rows<2>(X, Q, ldq, out, count, stream);
            case 4: return short_rows<4>(X, Q, ldq, out, count, stream);
            case 8: return short_rows<8>(X, Q, ldq, out, count, stream);
        }
    stream = stream && r % lanes == 0;
    typename Vector<T>::V probe = {};
    if (r == lanes) {
        rows_at_once<1, lanes>(X, Q, ldq, out, count, r, r, stream, probe);
        return is_zero<T>(probe);
    }
    if (r == 2 * lanes) {
        rows_at_once<2, 2 * lanes>(X, Q, ldq, out, count, r, r, stream, probe);
        return is_zero<T>(probe);
    }
    int64_t j = 0;
    for (; j + 2 * lanes <= r; j += 2 * lanes) rows_at_once<2, 0>(X, Q + j, ldq, out + j, count, r, 2 * lanes, stream, probe);
    if (j + lanes < r)
        rows_at_once<2, 0>(X, Q + j, ldq, out + j, count, r, r - j, stream, probe);
    else if (j < r)
        rows_at_once<1, 0>(X, Q + j, ldq, out + j, count, r, r - j, stream, probe);
    return is_zero<T>(probe);
}
