// Parts of blocks to float64 and back. Included once per instruction set, after widen.hpp and panel.hpp.

typedef int64_t Lanes __attribute__((vector_size(FEDLORA_VECTOR_BYTES)));
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <class To, class From>
inline __attribute__((always_inline)) To bits_of(const From &from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof(To));
    return to;
}

template <class T>
inline __attribute__((always_inline)) T read(const void *x) {
    T all;
    __builtin_memcpy(&all, x, sizeof(T));
    return all;
}

inline __attribute__((always_inline)) V widen_lanes(Floats x) {
#if FEDLORA_VECTOR_BYTES == 64
    return (V)_mm512_maskz_cvtps_pd(0xff, (__m256)x);  // the compiler would take it apart
#else
    return __builtin_convertvector(x, V);
#endif
}
inline __attribute__((always_inline)) V widen_lanes(const double *x) { return read<V>(x); }
inline __attribute__((always_inline)) V widen_lanes(const float *x) { return widen_lanes(read<Floats>(x)); }
inline __attribute__((always_inline)) V widen_lanes(const Bfloat16 *x) {
    return widen_lanes(bits_of<Floats>(__builtin_convertvector(read<Halves>(x), Words) << 16));
}
inline __attribute__((always_inline)) V widen_lanes(const Float16 *x) {  // as widen(Float16)
    const Words bits = __builtin_convertvector(read<Halves>(x), Words), sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
    const Words finite = bits_of<Words>(bits_of<Floats>(rest << 13) * as_float((254 - 15) << 23));
    return widen_lanes(bits_of<Floats>((rest >= 0x7c00 ? 0x7f800000u | (rest << 13) : finite) | sign));
}

// The blocks of H numbers of two rows that are off the diagonal change places.
template <int H, int... L>
inline __attribute__((always_inline)) void exchange(V &x, V &y, std::integer_sequence<int, L...>) {
    const V upper = __builtin_shuffle(x, y, Lanes{(L & H ? kLanes + L - H : L)...});
    y = __builtin_shuffle(x, y, Lanes{(L & H ? kLanes + L : L + H)...});
    x = upper;
}

template <int H>
inline __attribute__((always_inline)) void transpose(V *x) {
    if constexpr (H < kLanes) {
#pragma GCC unroll 8
        for (int i = 0; i < kLanes; ++i)
            if (!(i & H)) exchange<H>(x[i], x[i + H], std::make_integer_sequence<int, kLanes>());
        transpose<2 * H>(x);
    }
}

// The first W numbers of a vector.
template <int W>
inline __attribute__((always_inline)) void store_some(double *out, V x) {
    __builtin_memcpy(out, &x, sizeof(double) * W);
}

// out[i * ld + j] = x[i + j * col] for W columns, at most a vector.
template <int W, class T>
inline __attribute__((always_inline)) void turn(double *out, int64_t ld, const T *x, int64_t col, int64_t rows) {
    int64_t i = 0;
    for (; i + kLanes <= rows; i += kLanes) {
        V all[kLanes] = {};
#pragma GCC unroll 8
        for (int j = 0; j < W; ++j) all[j] = widen_lanes(x + i + j * col);
        transpose<1>(all);
#pragma GCC unroll 8
        for (int k = 0; k < kLanes; ++k) store_some<W>(out + (i + k) * ld, all[k]);
    }
    for (; i < rows; ++i)
        for (int j = 0; j < W; ++j) out[i * ld + j] = widen(x[i + j * col]);
}

template <int W, class T>
inline __attribute__((always_inline)) void widen_row(double *out, const T *x) {
    int j = 0;
    for (; j + kLanes <= W; j += kLanes) store(out + j, widen_lanes(x + j));
#pragma GCC unroll 8
    for (; j < W; ++j) out[j] = widen(x[j]);
}

template <class T>
void widen_block(double *out, int64_t ld, const T *x, int64_t row, int64_t col, int64_t rows, int64_t cols) {
    int64_t j = 0;
    if (col == 1) {
        for (int64_t i = 0; i < rows; ++i)
            for (j = 0; j + kPad <= cols; j += kPad) widen_row<kPad>(out + i * ld + j, x + i * row + j);
        j = cols / kPad * kPad;
        for (int64_t i = 0; cols - j >= 4 && i < rows; ++i) widen_row<4>(out + i * ld + j, x + i * row + j);
        j = cols / 4 * 4;
    } else if (row == 1) {
        for (; j + kLanes <= cols; j += kLanes) turn<kLanes>(out + j, ld, x + j * col, col, rows);
        for (; j + 4 <= cols; j += 4) turn<(kLanes < 4 ? kLanes : 4)>(out + j, ld, x + j * col, col, rows);
    }
    for (; j < cols; ++j)
        for (int64_t i = 0; i < rows; ++i) out[i * ld + j] = widen(x[i * row + j * col]);
}

void widen_any(double *out, int64_t ld, const fedlora_block &X, int64_t offset, int64_t rows, int64_t cols) {
    const char *const x = (const char *)X.data + offset * size_of(X.dtype);
    const int64_t row = X.row_stride, col = X.col_stride;
    switch (X.dtype) {
        case FEDLORA_FLOAT64: return widen_block(out, ld, (const double *)x, row, col, rows, cols);
        case FEDLORA_FLOAT32: return widen_block(out, ld, (const float *)x, row, col, rows, cols);
        case FEDLORA_BFLOAT16: return widen_block(out, ld, (const Bfloat16 *)x, row, col, rows, cols);
        default: return widen_block(out, ld, (const Float16 *)x, row, col, rows, cols);
    }
}

inline __attribute__((always_inline)) void narrow_lanes(V x, double *out) { store(out, x); }
inline __attribute__((always_inline)) void narrow_lanes(V x, float *out) {
    const Floats all = __builtin_convertvector(x, Floats);
    __builtin_memcpy(out, &all, sizeof(Floats));
}
inline __attribute__((always_inline)) void narrow_lanes(V x, Bfloat16 *out) {  // as narrow(double, Bfloat16 &)
    const Words bits = bits_of<Words>(__builtin_convertvector(x, Floats)), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words all = (bits & 0x7fffffff) > 0x7f800000 ? Words{} + 0x7fc0 : rounded;
    const Halves some = __builtin_convertvector(all, Halves);
    __builtin_memcpy(out, &some, sizeof(Halves));
}
inline __attribute__((always_inline)) void narrow_lanes(V x, Float16 *out) {  // as narrow(double, Float16 &)
    const Words bits = bits_of<Words>(__builtin_convertvector(x, Floats)), rest = bits & 0x7fffffff;
    const Words small = bits_of<Words>(bits_of<Floats>(rest) + 0.5f) - as_bits(0.5f);
    const Words normal = (rest + 0xfff + ((rest >> 13) & 1) - (112u << 23)) >> 13;
    const Words finite = rest < 0x38800000 ? small : normal;
    const Words large = rest > 0x7f800000 ? Words{} + 0x7e00 : Words{} + 0x7c00;
    const Halves some = __builtin_convertvector((rest >= 0x477ff000 ? large : finite) | ((bits >> 16) & 0x8000), Halves);
    __builtin_memcpy(out, &some, sizeof(Halves));
}

// What some lanes say of the matrix; a number minus itself is zero unless it is not finite.
struct Findings {
    V squares, lost_squares, nonfinite, overflow;
    Lanes bits;
    template <class T>
    inline __attribute__((always_inline)) void add(V x, const T *rounded) {
        const V kept = widen_lanes(rounded), gap = x - kept;
        squares += x * x;
        lost_squares += gap * gap;
        nonfinite += x - x;
        overflow += kept - kept;
        bits |= bits_of<Lanes>(x);
    }
    void total(fedlora::Partial &partial) const {
        for (int l = 0; l < kLanes; ++l) {
            partial.squares += squares[l];
            partial.lost_squares += lost_squares[l];
            partial.nonfinite |= nonfinite[l] != 0.0;
            partial.overflow |= overflow[l] != 0.0;
            partial.nonzero |= (bits[l] & INT64_MAX) != 0;
        }
    }
};

// The first numbers of a vector, zero beyond.
template <int... L>
inline __attribute__((always_inline)) V first(V x, int64_t count, std::integer_sequence<int, L...>) {
    return Lanes{L...} < count ? x : V{};
}

template <class T>
void narrow_block(const double *x, int64_t ld, T *out, int64_t row, int64_t col, int64_t rows, int64_t cols,
                  fedlora::Partial &partial) {
    Findings found = {}, other = {};  // two chains of sums: one would be waited for
    const auto put = [&](int64_t j, Findings &to) __attribute__((always_inline)) {
        const V all = load(x + j);
        narrow_lanes(all, out + j);
        to.add(all, out + j);
    };
    for (int64_t i = 0; i < rows; ++i, x += ld, out += row) {
        int64_t j = 0;
        for (; col == 1 && j + 2 * kLanes <= cols; j += 2 * kLanes) put(j, found), put(j + kLanes, other);
        for (; col == 1 && j + kLanes <= cols; j += kLanes) put(j, found);
        for (; j < cols; j += kLanes) {
            const int64_t count = cols - j < kLanes ? cols - j : kLanes;
            const V some = first(load(x + j), count, std::make_integer_sequence<int, kLanes>());
            T rounded[kLanes];
            narrow_lanes(some, rounded);
            found.add(some, rounded);
            for (int64_t l = 0; l < count; ++l) out[(j + l) * col] = rounded[l];
        }
    }
    found.total(partial);
    other.total(partial);
}

void narrow_any(const double *x, int64_t ld, const fedlora_block &S, int64_t offset, int64_t rows, int64_t cols,
                fedlora::Partial &partial) {
    char *const out = (char *)S.data + offset * size_of(S.dtype);
    const int64_t row = S.row_stride, col = S.col_stride;
    switch (S.dtype) {
        case FEDLORA_FLOAT64: return narrow_block(x, ld, (double *)out, row, col, rows, cols, partial);
        case FEDLORA_FLOAT32: return narrow_block(x, ld, (float *)out, row, col, rows, cols, partial);
        case FEDLORA_BFLOAT16: return narrow_block(x, ld, (Bfloat16 *)out, row, col, rows, cols, partial);
        default: return narrow_block(x, ld, (Float16 *)out, row, col, rows, cols, partial);
    }
}
