// The sign rule over a factor that is made in chunks of rows (docs/numerics.md, Sign rule).
//
// Included once per source file after element.hpp, inside the same namespace.
//
// The first element that is within the window of the largest of its column decides. When it comes it is larger than all before
// it, so of each chunk only those count that are larger than all before them and within the window of the largest of the chunk:
// a handful, since their first 24 bits differ.

constexpr double kTie = 1 - 0x1p-20;

struct Records {
    static constexpr int64_t kMost = 18;
    int64_t count;
    double largest, kept[kMost];
};

// Magnitude in 24 bits.
inline double coarse(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, 8);
    bits &= 0x7fffffffe0000000u;
    std::memcpy(&x, &bits, 8);
    return x;
}

// x is larger than all that came before it.
inline void append(Records &r, double x) {
    const double size = std::fabs(x), bar = kTie * size;
    int64_t out = 0;
    while (out < r.count && std::fabs(r.kept[out]) < bar) ++out;
    for (int64_t i = out; i < r.count; ++i) r.kept[i - out] = r.kept[i];
    r.count -= out;
    r.largest = size;
    if (r.count == Records::kMost || (r.count > 0 && coarse(x) == coarse(r.kept[r.count - 1]))) return;
    r.kept[r.count++] = x;
}

// Records of up to kColumns columns of a chunk.
constexpr int64_t kColumns = 64, kFew = 8;

// The largest of each column: row by row, or where there are few columns one after the other.
template <class T>
inline __attribute__((always_inline)) void tops(const T *x, int64_t row, int64_t col, int64_t rows, int64_t cols,
                                                T *__restrict top) {
    for (int64_t j = 0; j < cols; ++j) top[j] = 0;
    if (cols < kFew) {
        for (int64_t j = 0; j < cols; ++j) {
            T largest = 0;
#pragma omp simd reduction(max : largest)
            for (int64_t i = 0; i < rows; ++i) {
                const T size = std::fabs(x[i * row + j * col]);
                largest = size > largest ? size : largest;
            }
            top[j] = largest;
        }
        return;
    }
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) {
            const T size = std::fabs(x[i * row + j * col]);
            top[j] = size > top[j] ? size : top[j];
        }
}

template <class T>
inline __attribute__((always_inline)) void record(const T *x, int64_t row, int64_t col, int64_t rows, int64_t cols,
                                                  Records *records) {
    T top[kColumns], bar[kColumns];
    tops(x, row, col, rows, cols, top);
    int64_t open = 0;
    for (int64_t j = 0; j < cols; ++j) {
        records[j].count = 0;
        records[j].largest = 0;
        bar[j] = top[j] > 0 ? top[j] * (T)kTie : (T)INFINITY;
        open += top[j] > 0;
    }
    const auto visit = [&](int64_t i, int64_t j) {
        const double value = (double)x[i * row + j * col], size = std::fabs(value);
        if (!(size >= (double)bar[j]) || !(size > records[j].largest)) return;
        append(records[j], value);
        if (size == (double)top[j]) bar[j] = (T)INFINITY, --open;  // nothing larger comes
    };
    if (cols < kFew) {
        for (int64_t j = 0; j < cols; ++j)
            for (int64_t i = 0; i < rows && records[j].largest < (double)top[j]; ++i)
                if (std::fabs(x[i * row + j * col]) >= bar[j]) visit(i, j);
        return;
    }
    for (int64_t i = 0; i < rows && open > 0; ++i) {
        int reached = 0;
        for (int64_t j = 0; j < cols; ++j) reached |= std::fabs(x[i * row + j * col]) >= bar[j];
        for (int64_t j = 0; reached && j < cols; ++j) visit(i, j);
    }
}

#define FEDLORA_RECORD(name, T)                                                                                       \
    FEDLORA_CLONES void name(const T *x, int64_t row, int64_t col, int64_t rows, int64_t cols, Records *records) { \
        if (col == 1)                                                                                                 \
            record(x, row, 1, rows, cols, records);                                                                   \
        else                                                                                                          \
            record(x, row, col, rows, cols, records);                                                                 \
    }
FEDLORA_RECORD(record_float32, float)
FEDLORA_RECORD(record_float64, double)

// The sign of a column from the records of its chunks, in order and `step` apart.
inline double sign_of(const Records *records, int64_t chunks, int64_t step) {
    double bar = 0;
    for (int64_t c = 0; c < chunks; ++c) bar = std::fmax(bar, kTie * records[c * step].largest);
    for (int64_t c = 0; c < chunks; ++c)
        for (int64_t i = 0; i < records[c * step].count; ++i) {
            const double x = records[c * step].kept[i];
            if (std::fabs(x) >= bar) return x < 0 ? -1 : 1;
        }
    return 1;
}
