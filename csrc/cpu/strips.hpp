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
    if (gap == 1 && stride == 1) {
        const int64_t whole = count / line * line;
        for (int64_t begin = 0; begin < whole; begin += line) {
            __builtin_prefetch(x + begin + count);
            for (int64_t i = begin; i < begin + line; ++i) out[i] = widen(x[i]);
        }
        for (int64_t i = whole; i < count; ++i) out[i] = widen(x[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) out[i * gap] = widen(x[i * stride]);
    }
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
inline const double *scale_of(const fedlora_block &scale, int64_t i) {
    return (const double *)scale.data + i * scale.batch_stride;
}

inline const double &scale_at(const fedlora_block &scale, int64_t i, int64_t column) {
    return scale_of(scale, i)[column * scale.col_stride];
}

inline int scale_status(const fedlora_block &scale, int64_t cols, int64_t batch) {
    if (!scale.rows) return FEDLORA_OK;
    if (scale.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
    return scale.rows == 1 && scale.cols == cols && scale.batch == batch ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

// The next strip of the blocks, brought nearer a few lines at a time while the present one is multiplied: all at once, the
// requests would stand in each other's way.
class Ahead {
  public:
    Ahead(const fedlora_block *X, int64_t count, int64_t i, int64_t first, int64_t rows, int64_t shares)
        : X_(X), left_(rows > 0 ? count : 0), i_(i), first_(first), rows_(rows) {
        int64_t bytes = 0;
        for (int64_t k = 0; k < left_; ++k) bytes += X[k].cols * rows * size_of(X[k].dtype);
        share_ = bytes / 64 / larger(shares, 1) + 1;
    }

    void fetch() {
        for (int64_t n = 0; n < share_; ++n, line_ += 64) {
            while (line_ >= end_)
                if (!next_run()) return;
            __builtin_prefetch((const void *)line_, 0, 2);
        }
    }

  private:
    bool next_run() {
        while (!runs_) {
            if (!left_) return false;
            start_block(*X_++);
            --left_;
        }
        line_ = run_ & ~(uintptr_t)63, end_ = run_ + length_;
        run_ += stride_, --runs_;
        return true;
    }

    // Runs of numbers that lie close together; one if there is nothing between them.
    void start_block(const fedlora_block &X) {
        const bool turned = by_columns(X);
        const int64_t size = size_of(X.dtype);
        run_ = (uintptr_t)X.data + (i_ * X.batch_stride + first_ * X.row_stride) * size;
        runs_ = turned ? X.cols : rows_, length_ = (turned ? rows_ : X.cols) * size;
        stride_ = (turned ? X.col_stride : X.row_stride) * size;
        if (stride_ == length_) length_ *= runs_, runs_ = runs_ > 0;
    }

    const fedlora_block *X_;
    int64_t left_, i_, first_, rows_, share_ = 0, runs_ = 0, length_ = 0, stride_ = 0;
    uintptr_t line_ = 0, end_ = 0, run_ = 0;
};
