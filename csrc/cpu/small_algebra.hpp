// What fedlora_product_svd does to small float64 matrices, and to the numbers that it reads and writes.
//
// Included once per source file after element.hpp and strips.hpp, inside the same namespace.

// largest[j] = max_i |x_ij|, NaN aside.
template <class T>
inline void maxima(const T *x, int64_t row, int64_t col, int64_t rows, int64_t cols, double *largest) {
    for (int64_t j = 0; j < cols; ++j) largest[j] = 0;
    if (row < col)
        for (int64_t j = 0; j < cols; ++j)
            for (int64_t i = 0; i < rows; ++i) {
                const double size = std::fabs(widen(x[i * row + j * col]));
                largest[j] = size > largest[j] ? size : largest[j];
            }
    else
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < cols; ++j) {
                const double size = std::fabs(widen(x[i * row + j * col]));
                largest[j] = size > largest[j] ? size : largest[j];
            }
}

inline void column_maxima(const fedlora_block &X, int64_t i, double *largest) {
    const char *x = (const char *)X.data + i * X.batch_stride * size_of(X.dtype);
    const int64_t row = X.row_stride, col = X.col_stride;
    switch (X.dtype) {
        case FEDLORA_FLOAT64: return maxima((const double *)x, row, col, X.rows, X.cols, largest);
        case FEDLORA_FLOAT32: return maxima((const float *)x, row, col, X.rows, X.cols, largest);
        case FEDLORA_BFLOAT16: return maxima((const Bfloat16 *)x, row, col, X.rows, X.cols, largest);
        default: return maxima((const Float16 *)x, row, col, X.rows, X.cols, largest);
    }
}

// The rows and columns index[0..n) of symmetric G move to the front, each number times weight_i weight_j and d_i d_j. Answers
// an upper bound of the 2-norm: the smaller of the row-sum and the Frobenius norm.
FEDLORA_CLONES double balance(double *G, int64_t ld, int64_t R, const int64_t *index, int64_t n, const double *weight,
                              const double *d) {
    double most = 0, squares = 0;
    for (int64_t a = 0; a < n; ++a) {
        const int64_t i = index[a];
        const double *const from = G + i * ld, w = weight[i], own = d[i];
        double *const to = G + a * ld;
        double sum = 0, square = 0;
        if (n == R) {
#pragma omp simd reduction(+ : sum, square)
            for (int64_t b = 0; b < R; ++b) {
                const double x = from[b] * (w * weight[b]) * own * d[b];
                to[b] = x;
                sum += std::fabs(x);
                square += x * x;
            }
        } else {
            for (int64_t b = 0; b < n; ++b) {
                const int64_t j = index[b];
                const double x = from[j] * (w * weight[j]) * own * d[j];
                to[b] = x;
                sum += std::fabs(x);
                square += x * x;
            }
        }
        most = sum > most ? sum : most;
        squares += square;
    }
    const double frobenius = std::sqrt(squares);
    return most < frobenius ? most : frobenius;
}

// sum of F o G and of its magnitudes.
FEDLORA_CLONES void inner_product(const double *F, const double *G, int64_t ld, int64_t n, double &sum, double &sizes) {
    sum = sizes = 0;
    for (int64_t a = 0; a < n; ++a) {
        double of_row = 0, size = 0;
#pragma omp simd reduction(+ : of_row, size)
        for (int64_t b = 0; b < n; ++b) {
            const double x = F[a * ld + b] * G[a * ld + b];
            of_row += x;
            size += std::fabs(x);
        }
        sum += of_row;
        sizes += size;
    }
}

// out[i * ld + c] = L[c * stride + i] for n rows; zeros fill the rows up to the padding.
FEDLORA_CLONES void transpose(const double *L, int64_t stride, int64_t n, int64_t cols, double *out, int64_t ld) {
    constexpr int64_t tile = 8;
    for (int64_t c = 0; c < cols; c += tile)
        for (int64_t i = 0; i < n; ++i)
            for (int64_t cc = c; cc < c + tile; ++cc) out[i * ld + cc] = cc < cols ? L[cc * stride + i] : 0;
}

FEDLORA_CLONES double largest_of(const double *C, int64_t ld, int64_t rows, int64_t cols) {
    double largest = 0;
    for (int64_t c = 0; c < cols; ++c)
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < rows; ++i) {
            const double size = std::fabs(C[c * ld + i]);
            largest = size > largest ? size : largest;
        }
    return largest;
}

FEDLORA_CLONES void scale_columns(double *C, int64_t ld, int64_t rows, int64_t cols, double one, double other) {
    for (int64_t c = 0; c < cols; ++c)
        for (int64_t i = 0; i < rows; ++i) C[c * ld + i] = C[c * ld + i] * one * other;
}

// K = diag(weight o d) G^T diag(factor) times two powers of two: row index[a] of K from column a of G, count rows of it.
FEDLORA_CLONES void expand_rows(const double *G, int64_t ld, const int64_t *index, int64_t n, int64_t count, const double *weight,
                                const double *d, const double *factor, double one, double other, double *K) {
    for (int64_t a = 0; a < n; ++a) {
        double *const row = K + index[a] * ld;
        const double own = weight[index[a]] * d[index[a]];
        for (int64_t j = 0; j < count; ++j) row[j] = own * G[j * ld + a] * factor[j] * one * other;
    }
}

// Whether a number rounds to infinity.
inline bool is_beyond(double x, int64_t dtype) {
    Bfloat16 brain;
    Float16 half;
    narrow(x, brain);
    narrow(x, half);
    return std::isinf(dtype == FEDLORA_BFLOAT16 ? widen(brain) : widen(half));
}

// float32 to a half, rows by rows.
template <class T>
inline void narrow_rows(const float *x, int64_t ld, int64_t rows, int64_t cols, T *out, int64_t row, int64_t col) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) narrow((double)x[i * ld + j], out[i * row + j * col]);
}

#define FEDLORA_NARROW(name, T)                                                                                              \
    FEDLORA_CLONES void name(const float *x, int64_t ld, int64_t rows, int64_t cols, T *out, int64_t row, int64_t col) { \
        if (col == 1)                                                                                                        \
            narrow_rows(x, ld, rows, cols, out, row, 1);                                                                     \
        else                                                                                                                 \
            narrow_rows(x, ld, rows, cols, out, row, col);                                                                   \
    }
FEDLORA_NARROW(narrow_bfloat16, Bfloat16)
FEDLORA_NARROW(narrow_float16, Float16)

inline bool is_half(int64_t dtype) { return dtype == FEDLORA_BFLOAT16 || dtype == FEDLORA_FLOAT16; }

inline char *address(const fedlora_block &X, int64_t i, int64_t row) {
    return (char *)X.data + (i * X.batch_stride + row * X.row_stride) * size_of(X.dtype);
}

// Bits of numbers as unsigned words: signs turned, infinities found, NaN written.
template <class Word>
inline void turn_rows(Word *x, int64_t row, int64_t col, int64_t rows, int64_t cols, const double *sign) {
    const Word top = (Word)((Word)1 << (8 * sizeof(Word) - 1));
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) x[i * row + j * col] ^= sign[j] < 0 ? top : (Word)0;
}

#define FEDLORA_TURN(name, Word)                                                                                            \
    FEDLORA_CLONES void name(Word *x, int64_t row, int64_t col, int64_t rows, int64_t cols, const double *sign) { \
        if (col == 1)                                                                                                       \
            turn_rows(x, row, 1, rows, cols, sign);                                                                         \
        else                                                                                                                \
            turn_rows(x, row, col, rows, cols, sign);                                                                       \
    }
FEDLORA_TURN(turn_16, uint16_t)
FEDLORA_TURN(turn_32, uint32_t)
FEDLORA_TURN(turn_64, uint64_t)

inline void turn_any(const fedlora_block &X, int64_t i, int64_t first, int64_t rows, int64_t cols, const double *sign) {
    char *const x = address(X, i, first);
    switch (size_of(X.dtype)) {
        case 8: return turn_64((uint64_t *)x, X.row_stride, X.col_stride, rows, cols, sign);
        case 4: return turn_32((uint32_t *)x, X.row_stride, X.col_stride, rows, cols, sign);
        default: return turn_16((uint16_t *)x, X.row_stride, X.col_stride, rows, cols, sign);
    }
}

template <class T>
inline void fill_rows(const fedlora_block &X, int64_t i, int64_t first, int64_t rows, double value) {
    T number;
    narrow(value, number);
    T *const x = (T *)address(X, i, first);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t j = 0; j < X.cols; ++j) x[row * X.row_stride + j * X.col_stride] = number;
}

inline void fill_any(const fedlora_block &X, int64_t i, int64_t first, int64_t rows, double value) {
    switch (X.dtype) {
        case FEDLORA_FLOAT64: return fill_rows<double>(X, i, first, rows, value);
        case FEDLORA_FLOAT32: return fill_rows<float>(X, i, first, rows, value);
        case FEDLORA_BFLOAT16: return fill_rows<Bfloat16>(X, i, first, rows, value);
        default: return fill_rows<Float16>(X, i, first, rows, value);
    }
}
