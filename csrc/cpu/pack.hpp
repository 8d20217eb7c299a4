// A part of a block, widened. Included once per instruction set, after widen.hpp and panel.hpp.

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

inline __attribute__((always_inline)) V widen_lanes(const double *x) { return read<V>(x); }
inline __attribute__((always_inline)) V widen_lanes(const float *x) { return __builtin_convertvector(read<Floats>(x), V); }
inline __attribute__((always_inline)) V widen_lanes(const Bfloat16 *x) {
    return __builtin_convertvector(bits_of<Floats>(__builtin_convertvector(read<Halves>(x), Words) << 16), V);
}
inline __attribute__((always_inline)) V widen_lanes(const Float16 *x) {  // as widen(Float16)
    const Words bits = __builtin_convertvector(read<Halves>(x), Words), sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
    const Words finite = bits_of<Words>(bits_of<Floats>(rest << 13) * as_float((254 - 15) << 23));
    return __builtin_convertvector(bits_of<Floats>((rest >= 0x7c00 ? 0x7f800000u | (rest << 13) : finite) | sign), V);
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
inline __attribute__((always_inline)) void turn(double *out, int64_t ld, const T *x, int64_t col, int64_t rows, int64_t ahead) {
    int64_t i = 0;
    for (; i + kLanes <= rows; i += kLanes) {
        V all[kLanes] = {};
#pragma GCC unroll 8
        for (int j = 0; j < W; ++j) {
            __builtin_prefetch(x + i + ahead + j * col, 0, 2);
            all[j] = widen_lanes(x + i + j * col);
        }
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
void widen_block(double *out, int64_t ld, const T *x, int64_t row, int64_t col, int64_t rows, int64_t cols, int64_t ahead) {
    int64_t j = 0;
    if (col == 1) {
        constexpr int64_t kLine = 64 / sizeof(T);
        for (int64_t i = 0; i < rows; ++i)
            for (j = 0; j + kPad <= cols; j += kPad) {
                if (j % kLine == 0) __builtin_prefetch(x + (i + ahead) * row + j, 0, 2);
                widen_row<kPad>(out + i * ld + j, x + i * row + j);
            }
        j = cols / kPad * kPad;
        for (int64_t i = 0; cols - j >= 4 && i < rows; ++i) widen_row<4>(out + i * ld + j, x + i * row + j);
        j = cols / 4 * 4;
    } else if (row == 1) {
        for (; j + kLanes <= cols; j += kLanes) turn<kLanes>(out + j, ld, x + j * col, col, rows, ahead);
        for (; j + 4 <= cols; j += 4) turn<(kLanes < 4 ? kLanes : 4)>(out + j, ld, x + j * col, col, rows, ahead);
    }
    for (; j < cols; ++j)
        for (int64_t i = 0; i < rows; ++i) out[i * ld + j] = widen(x[i * row + j * col]);
}

void widen_any(double *out, int64_t ld, const fedlora_block &X, int64_t offset, int64_t rows, int64_t cols, int64_t ahead) {
    const char *const x = (const char *)X.data + offset * size_of(X.dtype);
    const int64_t row = X.row_stride, col = X.col_stride;
    switch (X.dtype) {
        case FEDLORA_FLOAT64: return widen_block(out, ld, (const double *)x, row, col, rows, cols, ahead);
        case FEDLORA_FLOAT32: return widen_block(out, ld, (const float *)x, row, col, rows, cols, ahead);
        case FEDLORA_BFLOAT16: return widen_block(out, ld, (const Bfloat16 *)x, row, col, rows, cols, ahead);
        default: return widen_block(out, ld, (const Float16 *)x, row, col, rows, cols, ahead);
    }
}
