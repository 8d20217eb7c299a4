// Strips of a block in float64, as the panel kernel takes them: a few rows of it, by rows or by columns.
//
// Included once per source file after element.hpp, inside the same namespace.

constexpr int64_t kStrip = 64;    // rows of a strip
constexpr int64_t kChunk = 2048;  // rows of one task

inline int64_t padded(int64_t count) { return (count + fedlora::kPad - 1) / fedlora::kPad * fedlora::kPad; }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

inline int64_t chunks_of(int64_t rows) { return (rows + kChunk - 1) / kChunk; }

// Whether the numbers of a column lie closer together than those of a row.
inline bool by_columns(const fedlora_block &b) {
    const int64_t row = b.row_stride < 0 ? -b.row_stride : b.row_stride, col = b.col_stride < 0 ? -b.col_stride : b.col_stride;
    return col > row || b.cols <= 1;
}

// out[i * gap] = x[i * stride]. A run is asked for where it goes on: the next strip lies there, and meanwhile others are read.
template <class T>
inline void spread(double *out, int64_t gap, const T *x, int64_t stride, int64_t count) {
    constexpr int64_t line = 64 / sizeof(T);
    if (gap == 1 && stride == 1)
        for (int64_t begin = 0; begin < count; begin += line) {
            __builtin_prefetch(x + begin + count);
            const int64_t end = smaller(begin + line, count);
            for (int64_t i = begin; i < end; ++i) out[i] = widen(x[i]);
        }
    else
        for (int64_t i = 0; i < count; ++i) out[i * gap] = widen(x[i * stride]);
}

#define FEDLORA_SPREAD(name, T)                                                                     \
    FEDLORA_CLONES void name(double *out, int64_t gap, const T *x, int64_t stride, int64_t count) { \
        spread(out, gap, x, stride, count);                                                         \
    }
FEDLORA_SPREAD(spread_float32, float)
FEDLORA_SPREAD(spread_float64, double)
FEDLORA_SPREAD(spread_bfloat16, Bfloat16)
FEDLORA_SPREAD(spread_float16, Float16)

inline void spread_any(const fedlora_block &X, int64_t offset, double *out, int64_t gap, int64_t stride, int64_t count) {
    const char *x = (const char *)X.data + offset * size_of(X.dtype);
    switch (X.dtype) {
        case FEDLORA_FLOAT64: return spread_float64(out, gap, (const double *)x, stride, count);
        case FEDLORA_FLOAT32: return spread_float32(out, gap, (const float *)x, stride, count);
        case FEDLORA_BFLOAT16: return spread_bfloat16(out, gap, (const Bfloat16 *)x, stride, count);
        default: return spread_float16(out, gap, (const Float16 *)x, stride, count);
    }
}

// Rows [first, first + count) of matrix i, number (row, j) at out[row * ld + j]; the rest of each row is left as it is.
inline void strip_by_rows(const fedlora_block &X, int64_t i, int64_t first, int64_t count, double *out, int64_t ld) {
    const int64_t offset = i * X.batch_stride + first * X.row_stride;
    if (by_columns(X))
        for (int64_t j = 0; j < X.cols; ++j) spread_any(X, offset + j * X.col_stride, out + j, ld, X.row_stride, count);
    else if (X.col_stride == 1 && X.row_stride == X.cols && ld == X.cols)
        spread_any(X, offset, out, 1, 1, count * X.cols);
    else
        for (int64_t row = 0; row < count; ++row) spread_any(X, offset + row * X.row_stride, out + row * ld, 1, X.col_stride, X.cols);
}

// The same, number (row, j) at out[j * ld + row], with zeros up to the next multiple of the padding.
inline void strip_by_columns(const fedlora_block &X, int64_t i, int64_t first, int64_t count, double *out, int64_t ld) {
    const int64_t offset = i * X.batch_stride + first * X.row_stride;
    for (int64_t j = 0; j < X.cols; ++j, out += ld) {
        spread_any(X, offset + j * X.col_stride, out, 1, X.row_stride, count);
        for (int64_t row = count; row < padded(count); ++row) out[row] = 0.0;
    }
}

// The factors of the columns of matrix i, scale.col_stride apart.
inline const double *scale_of(const fedlora_block &scale, int64_t i) { return (const double *)scale.data + i * scale.batch_stride; }

inline double scale_at(const fedlora_block &scale, int64_t i, int64_t column) { return scale_of(scale, i)[column * scale.col_stride]; }

inline int scale_status(const fedlora_block &scale, int64_t cols, int64_t batch) {
    if (!scale.rows) return FEDLORA_OK;
    if (scale.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
    return scale.rows == 1 && scale.cols == cols && scale.batch == batch ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}
