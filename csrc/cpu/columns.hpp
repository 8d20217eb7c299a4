// Matrices of columns, one at a time, vectors along the columns: sums and reflections.
//
// Included once per instruction set after svd_view.hpp.

constexpr int kBlock = 8;

template <class T>
using Vec = typename Lane<T>::V;

template <class T>
constexpr int kLanes = FEDLORA_VECTOR_BYTES / (int)sizeof(T);

template <class T>
struct EightOf;
template <>
struct EightOf<float> {
    typedef float V __attribute__((vector_size(32)));
    typedef int32_t I __attribute__((vector_size(32)));
};
template <>
struct EightOf<double> {
    typedef double V __attribute__((vector_size(64)));
    typedef int64_t I __attribute__((vector_size(64)));
};
template <class T>
using Eight = typename EightOf<T>::V;

// Columns of `length` elements, padded with zeros to whole vectors and to an odd number of cache lines, so that equal rows
// of neighbouring columns do not meet in one set of the cache.
template <class T>
struct Columns {
    T *data;
    int stride;

    static int padded(int length) {
        const int line = 64 / (int)sizeof(T);
        return ((length + line - 1) / line | 1) * line;
    }
    T *operator[](int c) const { return data + (int64_t)c * stride; }
    Vec<T> *vectors(int c) const { return (Vec<T> *)(*this)[c]; }
};

template <class T>
int vectors_of(int length) {
    return (length + kLanes<T> - 1) / kLanes<T>;
}

template <class T>
FEDLORA_INLINE T total(const Vec<T> &v) {
    T lane[kLanes<T>];
    __builtin_memcpy(lane, &v, sizeof v);
    for (int step = kLanes<T> / 2; step > 0; step /= 2)
        for (int l = 0; l < step; ++l) lane[l] += lane[l + step];
    return lane[0];
}

// The sums of eight vectors.
template <class T>
FEDLORA_INLINE Eight<T> totals(const Vec<T> *v) {
    if constexpr (kLanes<T> >= 8) {
        using E = Eight<T>;
        using I = typename EightOf<T>::I;
        E e[8];
        for (int k = 0; k < 8; ++k) {
            if constexpr (kLanes<T> == 16) {
                E half[2];
                __builtin_memcpy(half, &v[k], sizeof half);
                e[k] = half[0] + half[1];
            } else {
                e[k] = (E)v[k];
            }
        }
        E pair[4], quad[2];
        for (int k = 0; k < 4; ++k)
            pair[k] = __builtin_shuffle(e[2 * k], e[2 * k + 1], I{0, 8, 2, 10, 4, 12, 6, 14}) +
                      __builtin_shuffle(e[2 * k], e[2 * k + 1], I{1, 9, 3, 11, 5, 13, 7, 15});
        for (int k = 0; k < 2; ++k)
            quad[k] = __builtin_shuffle(pair[2 * k], pair[2 * k + 1], I{0, 1, 8, 9, 4, 5, 12, 13}) +
                      __builtin_shuffle(pair[2 * k], pair[2 * k + 1], I{2, 3, 10, 11, 6, 7, 14, 15});
        return __builtin_shuffle(quad[0], quad[1], I{0, 1, 2, 3, 8, 9, 10, 11}) +
               __builtin_shuffle(quad[0], quad[1], I{4, 5, 6, 7, 12, 13, 14, 15});
    } else {
        Eight<T> sums;
        for (int k = 0; k < 8; ++k) sums[k] = total<T>(v[k]);
        return sums;
    }
}

// N columns w <- w - tau v (v . w), from vector `start` on; with `squares`, also what is then the square of each from
// vector `start + 1` on.
template <class T, int N, bool kSquares>
FEDLORA_INLINE Eight<T> reflect(const Vec<T> *v, T tau, const Columns<T> &w, int start, int vectors) {
    Vec<T> sum[8] = {}, square[8] = {};
    for (int i = start; i < vectors; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) sum[j] += v[i] * w.vectors(j)[i];
    const Eight<T> all = totals<T>(sum) * tau;
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) w.vectors(j)[start] -= v[start] * all[j];
    for (int i = start + 1; i < vectors; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) {
            const Vec<T> x = w.vectors(j)[i] - v[i] * all[j];
            w.vectors(j)[i] = x;
            if (kSquares) square[j] += x * x;
        }
    return kSquares ? totals<T>(square) : all;
}

template <class T, bool kSquares>
void reflect(const Vec<T> *v, T tau, const Columns<T> &w, int count, int start, int vectors, T *squares = nullptr) {
    for (int j = 0; j < count;) {
        const int step = j + 8 <= count ? 8 : 1;
        const Columns<T> here{w[j], w.stride};
        const Eight<T> found = step == 8 ? reflect<T, 8, kSquares>(v, tau, here, start, vectors)
                                         : reflect<T, 1, kSquares>(v, tau, here, start, vectors);
        if (kSquares)
            for (int k = 0; k < step; ++k) squares[j + k] = found[k];
        j += step;
    }
}

// The reflection that maps x[k..] onto its first element: x becomes v (zero above k), the answer is that element; tau is 0
// where there is nothing to reflect.
template <class T>
T reflection(T *x, int k, int vectors, T &tau) {
    for (int i = 0; i < k; ++i) x[i] = 0;
    Vec<T> sum = {};
    for (int v = k / kLanes<T>; v < vectors; ++v) sum += ((Vec<T> *)x)[v] * ((Vec<T> *)x)[v];
    const T square = total<T>(sum), size = Native<T>::sqrt(Vec<T>{} + square)[0];
    tau = 0;
    if (!(square > Lane<T>::smallest)) return 0;
    const T sign = x[k] < 0 ? T(-1) : T(1);
    x[k] += sign * size;
    // From the rounded v: what tau and v lack together would make every vector longer or shorter.
    sum = Vec<T>{};
    for (int v = k / kLanes<T>; v < vectors; ++v) sum += ((Vec<T> *)x)[v] * ((Vec<T> *)x)[v];
    tau = 2 / total<T>(sum);
    return -sign * size;
}

// Eight rows of eight become columns.
template <class T>
FEDLORA_INLINE void transpose(Eight<T> *rows) {
    using I = typename EightOf<T>::I;
    const auto swap = [rows](int distance, const I &low, const I &high) {
        for (int i = 0; i < 8; ++i)
            if (!(i & distance)) {
                const Eight<T> a = rows[i], b = rows[i + distance];
                rows[i] = __builtin_shuffle(a, b, low);
                rows[i + distance] = __builtin_shuffle(a, b, high);
            }
    };
    swap(1, I{0, 8, 2, 10, 4, 12, 6, 14}, I{1, 9, 3, 11, 5, 13, 7, 15});
    swap(2, I{0, 1, 8, 9, 4, 5, 12, 13}, I{2, 3, 10, 11, 6, 7, 14, 15});
    swap(4, I{0, 1, 2, 3, 8, 9, 10, 11}, I{4, 5, 6, 7, 12, 13, 14, 15});
}

// to[c * to_gap + i] = from[i * from_gap + c].
template <class T>
void transpose(const T *from, int64_t from_gap, T *to, int64_t to_gap, int rows, int cols) {
    for (int i = 0; i < rows; i += 8)
        for (int c = 0; c < cols; c += 8)
            if (i + 8 <= rows && c + 8 <= cols) {
                Eight<T> tile[8];
                for (int k = 0; k < 8; ++k) __builtin_memcpy(&tile[k], from + (i + k) * from_gap + c, sizeof tile[k]);
                transpose<T>(tile);
                for (int k = 0; k < 8; ++k) __builtin_memcpy(to + (c + k) * to_gap + i, &tile[k], sizeof tile[k]);
            } else {
                for (int cc = c; cc < c + 8 && cc < cols; ++cc)
                    for (int ii = i; ii < i + 8 && ii < rows; ++ii) to[cc * to_gap + ii] = from[ii * from_gap + cc];
            }
}
