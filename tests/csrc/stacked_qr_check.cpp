// Runs the reflections of every instruction set and fedlora_stacked_qr on awkward sizes and layouts, in buffers of exactly the right
// length: Q R = X, Q^T Q = 1 up to the rank, R in echelon form.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "fedlora.h"
#include "reflectors.h"

namespace {

using fedlora::kBlock;
using fedlora::kGroup;
using fedlora::kSquare;
using fedlora::Reflectors;

double number(size_t i) { return (double)((int)(i * 7919 % 2003) - 1001) / 1001; }

std::vector<const Reflectors *> variants() {
    std::vector<const Reflectors *> found = {&fedlora::reflectors_base()};
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&fedlora::reflectors_v3());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found.push_back(&fedlora::reflectors_v4());
#endif
    return found;
}

// Memory from a multiple of 64 bytes on that ends with its last number.
struct Numbers {
    double *at;
    int64_t count;
    explicit Numbers(int64_t count, size_t seed = 0) : at((double *)std::aligned_alloc(64, (size_t)(count * 8 + 63) / 64 * 64)), count(count) {
        for (int64_t i = 0; i < count; ++i) at[i] = number((size_t)i + seed);
    }
    Numbers(const Numbers &other) : Numbers(other.count) {
        for (int64_t i = 0; i < count; ++i) at[i] = other.at[i];
    }
    ~Numbers() { std::free(at); }
    double far_from(const Numbers &other) const {
        double most = 0;
        for (int64_t i = 0; i < count; ++i) most = std::fmax(most, std::fabs(at[i] - other.at[i]));
        return most;
    }
};

// A panel and others to its right: their reflections undo what their transpose has done, and leave a triangle above zeros.
int check_reflections(const Reflectors &of, int64_t rows, int64_t width, bool zero_column) {
    Numbers pivot(kSquare, 3), below(8 * rows, 50), block(kBlock);
    for (int64_t i = 0; zero_column && i < rows; ++i) below.at[8 * i + 3] = 0;
    const Numbers first_pivot(pivot), first_below(below);
    of.factor(pivot.at, below.at, rows, block.at);
    int wrong = 0;
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < i; ++j) wrong += pivot.at[8 * i + j] != 0;
    Numbers turned_pivot(first_pivot), turned_below(first_below), zeros(8 * rows);
    for (int64_t i = 0; i < zeros.count; ++i) zeros.at[i] = 0;
    of.apply(block.at, below.at, rows, turned_pivot.at, kSquare, turned_below.at, 8 * rows, 1, true);
    wrong += !(turned_pivot.far_from(pivot) < 1e-13) + !(turned_below.far_from(zeros) < 1e-13);
    Numbers back_pivot(pivot), back_below(8 * rows, 9);
    of.start(block.at, below.at, rows, back_pivot.at, back_below.at);
    wrong += !(back_pivot.far_from(first_pivot) < 1e-13) + !(back_below.far_from(first_below) < 1e-13);
    Numbers pivots(kSquare * width, 7), all(8 * rows * width, 11);
    const Numbers first_pivots(pivots), first_all(all);
    of.apply(block.at, below.at, rows, pivots.at, kSquare, all.at, 8 * rows, width, true);
    of.apply(block.at, below.at, rows, pivots.at, kSquare, all.at, 8 * rows, width, false);
    wrong += !(pivots.far_from(first_pivots) < 1e-13) + !(all.far_from(first_all) < 1e-13);
    Numbers W(kSquare * width, 23), expected(all);
    for (int64_t p = 0; p < width; ++p)
        for (int64_t i = 0; i < rows; ++i)
            for (int j = 0; j < 8; ++j)
                for (int k = 0; k < 8; ++k) expected.at[8 * (rows * p + i) + j] -= below.at[8 * i + k] * W.at[kSquare * p + 8 * k + j];
    of.update(all.at, 8 * rows, below.at, rows, W.at, kSquare, width);
    wrong += !(all.far_from(expected) < 1e-13);
    if (wrong) std::printf("reflections %s: rows %d, width %d: %d wrong\n", of.isa, (int)rows, (int)width, wrong);
    return wrong;
}

template <class T>
fedlora_block matrices(std::vector<T> &data, int64_t rows, int64_t cols, int64_t batch, bool by_columns, int64_t dtype) {
    data.resize((size_t)(rows * cols * batch));
    return {(int64_t)data.data(), rows, cols, by_columns ? 1 : cols, by_columns ? rows : 1, dtype, batch, rows * cols};
}

template <class T>
T &at(const fedlora_block &M, int64_t b, int64_t i, int64_t j) {
    return ((T *)M.data)[b * M.batch_stride + i * M.row_stride + j * M.col_stride];
}

// The columns of the second block repeat those of the first if they are to be dependent.
template <class T>
int check_stack(int64_t m, int64_t first, int64_t second, int64_t batch, bool by_columns, bool dependent, bool want_q, int64_t threads) {
    const int64_t dtype = sizeof(T) == 8 ? FEDLORA_FLOAT64 : FEDLORA_FLOAT32, width = first + second, k = m < width ? m : width;
    std::vector<T> data[2], q, r;
    const fedlora_block X[2] = {matrices(data[0], m, first, batch, by_columns, dtype), matrices(data[1], m, second, batch, !by_columns, dtype)};
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < width; ++j)
                at<T>(X[j >= first], b, i, j < first ? j : j - first) =
                    (T)number((size_t)((b * m + i) * width + (dependent && j >= first && first ? j % first : j) * 17 + i * i));
    std::vector<double> weights((size_t)(2 * batch), -0.5);
    std::vector<int32_t> rank, info, notes;
    const fedlora_block w = {(int64_t)weights.data(), batch, 2, 2, 1, FEDLORA_FLOAT64, 1, 2 * batch};
    const fedlora_block Q = matrices(q, m, k, batch, by_columns, dtype), R = matrices(r, k, width, batch, false, dtype);
    const fedlora_block one = matrices(rank, 1, 1, batch, false, FEDLORA_INT32), two = matrices(info, 1, 1, batch, false, FEDLORA_INT32),
                        three = matrices(notes, 1, 1, batch, false, FEDLORA_INT32);
    const int64_t blocks = 2;
    int64_t bytes = 0;
    if (fedlora_stacked_qr_workspace(X, &blocks, &w, want_q ? &Q : nullptr, &R, &one, &two, &three, 1, threads, &bytes)) return 1;
    std::vector<char> workspace((size_t)bytes);
    const auto run = [&](int64_t size) {
        return fedlora_stacked_qr(X, &blocks, &w, want_q ? &Q : nullptr, &R, &one, &two, &three, 1, workspace.data(), size, threads, nullptr);
    };
    if (run(bytes - 1) != FEDLORA_BAD_WORKSPACE || run(bytes)) return 1;
    int wrong = 0;
    const double limit = (sizeof(T) == 8 ? 1e-14 : 3e-7) * (1 + (double)(m + width) / 100);
    for (int64_t b = 0; b < batch; ++b) {
        wrong += info[(size_t)b] != 0 || rank[(size_t)b] > k;
        for (int64_t i = 0; i < k; ++i)
            for (int64_t j = 0; j < i; ++j) wrong += at<T>(R, b, i, j) != 0;
        for (int64_t i = 0; want_q && i < m; ++i)
            for (int64_t j = 0; j < width; ++j) {
                double sum = 0;
                for (int64_t e = 0; e < k; ++e) sum += (double)at<T>(Q, b, i, e) * at<T>(R, b, e, j);
                wrong += !(std::fabs(sum + 0.5 * at<T>(X[j >= first], b, i, j < first ? j : j - first)) <= limit * (1 + std::sqrt((double)m)));
            }
        for (int64_t c = 0; want_q && c < k; ++c)
            for (int64_t d = 0; d <= c; ++d) {
                double sum = 0;
                for (int64_t i = 0; i < m; ++i) sum += (double)at<T>(Q, b, i, c) * at<T>(Q, b, i, d);
                wrong += !(std::fabs(sum - (c == d && c < rank[(size_t)b])) <= limit);
            }
    }
    if (wrong) std::printf("stacked qr: %d x (%d + %d), batch %d: %d wrong\n", (int)m, (int)first, (int)second, (int)batch, wrong);
    return wrong;
}

}  // namespace

int check_stacked_qr() {
    int failures = 0;
    for (const Reflectors *of : variants())
        for (const int64_t rows : {0, 1, 7, 64, 131})
            for (const int64_t width : {1, 2, 3})
                for (const bool zero : {false, true}) failures += check_reflections(*of, rows, width, zero) != 0;
    const int64_t shapes[][3] = {{1, 1, 0}, {5, 3, 9}, {40, 7, 1}, {90, 20, 13}, {13, 40, 2}, {300, 5, 6}, {4200, 3, 4}, {0, 2, 1}, {3, 0, 0}};
    for (const auto &shape : shapes)
        for (const bool flag : {false, true})
            for (const int64_t batch : {0, 1, 9}) {
                failures += check_stack<float>(shape[0], shape[1], shape[2], batch, flag, false, true, 2) != 0;
                failures += check_stack<double>(shape[0], shape[1], shape[2], batch, !flag, flag, true, 2) != 0;
                failures += check_stack<float>(shape[0], shape[1], shape[2], batch, flag, true, flag, 1) != 0;
            }
    std::printf("stacked qr: %d problems wrong\n", failures);
    return failures;
}
