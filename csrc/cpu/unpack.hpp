// Panels of eight columns to the rows of a matrix of float32 or float64.
//
// Included once per source file after strips.hpp, inside the same namespace.

constexpr int64_t kAtOnce = 32;  // rows that are written together

// Rows of panels, gap apart, to the rows of Q from `first` on.
template <class T>
inline void write_panels(const fedlora_block &Q, T *out, const double *panels, int64_t gap,
                         int64_t column, int64_t width, int64_t rows) {
    for (; column < Q.cols && width > 0; column += 8, width -= 8, panels += gap) {
        const int64_t count = smaller(8, Q.cols - column);
        T *const to = out + column * Q.col_stride;
        if (Q.col_stride == 1 && count == 8)
            for (int64_t row = 0; row < rows; ++row)
#pragma GCC unroll 8
                for (int64_t j = 0; j < 8; ++j) to[row * Q.row_stride + j] = (T)panels[8 * row + j];
        else
            for (int64_t j = 0; j < count; ++j)
                for (int64_t row = 0; row < rows; ++row) to[row * Q.row_stride + j * Q.col_stride] = (T)panels[8 * row + j];
    }
}

FEDLORA_CLONES void write_panels_float32(const fedlora_block &Q, float *out, const double *panels, int64_t gap,
                                         int64_t column, int64_t width, int64_t rows) {
    write_panels(Q, out, panels, gap, column, width, rows);
}
FEDLORA_CLONES void write_panels_float64(const fedlora_block &Q, double *out, const double *panels, int64_t gap,
                                         int64_t column, int64_t width, int64_t rows) {
    write_panels(Q, out, panels, gap, column, width, rows);
}

// Columns [column, column + width) of rows [begin, end) of Q, a few rows of all panels at a time: those lie together in Q.
void write_rows(const fedlora_block &Q, int64_t i, int64_t begin, int64_t end, const double *panels, int64_t gap, int64_t column,
                int64_t width) {
    for (int64_t first = begin; first < end; first += kAtOnce, panels += 8 * kAtOnce) {
        const int64_t offset = i * Q.batch_stride + first * Q.row_stride, rows = smaller(kAtOnce, end - first);
        if (Q.dtype == FEDLORA_FLOAT64)
            write_panels_float64(Q, (double *)Q.data + offset, panels, gap, column, width, rows);
        else
            write_panels_float32(Q, (float *)Q.data + offset, panels, gap, column, width, rows);
    }
}
