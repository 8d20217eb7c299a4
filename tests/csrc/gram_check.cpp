// Runs fedlora_gram and fedlora_orient on awkward sizes and layouts, in buffers of exactly the right length, against the
// definition. Numbers are small integers: every sum is exact.
#include <cmath>
#include <cstdio>
#include <vector>

#include "fedlora.h"

namespace {

double number(size_t i) { return (double)((int)(i * 37 % 23) - 11); }

// Number (i, j) of block k of matrix b; blocks lie one after the other, each by rows or by columns.
struct Stack {
    int rows, batch;
    std::vector<int> ranks;
    bool by_columns;
    std::vector<std::vector<float>> data;
    Stack(int rows, const std::vector<int> &ranks, int batch, bool by_columns)
        : rows(rows), batch(batch), ranks(ranks), by_columns(by_columns) {
        for (const int r : ranks) {
            data.emplace_back((size_t)rows * r * batch);
            for (size_t i = 0; i < data.back().size(); ++i) data.back()[i] = (float)number(i + 3 * data.size());
        }
    }
    std::vector<fedlora_block> blocks() const {
        std::vector<fedlora_block> all;
        all.reserve(ranks.size() + 1);  // tables are not null
        for (size_t k = 0; k < ranks.size(); ++k) {
            const int64_t row = by_columns ? 1 : ranks[k], col = by_columns ? rows : 1;
            all.push_back({(int64_t)data[k].data(), rows, ranks[k], row, col, FEDLORA_FLOAT32, batch, (int64_t)rows * ranks[k]});
        }
        return all;
    }
    std::vector<double> row(int b, int i) const {
        std::vector<double> numbers;
        for (size_t k = 0; k < ranks.size(); ++k)
            for (int j = 0; j < ranks[k]; ++j) {
                const size_t at = by_columns ? (size_t)j * rows + i : (size_t)i * ranks[k] + j;
                numbers.push_back(data[k][(size_t)b * rows * ranks[k] + at]);
            }
        return numbers;
    }
};

int check_gram(int rows, const std::vector<int> &ranks, int batch, bool by_columns, bool scaled, int threads) {
    const Stack stack(rows, ranks, batch, by_columns);
    int R = 0;
    for (const int r : ranks) R += r;
    std::vector<double> G((size_t)batch * R * R, NAN), wanted(G.size(), 0.0), factors((size_t)batch * R);
    for (size_t i = 0; i < factors.size(); ++i) factors[i] = std::ldexp(1.0, (int)(i % 5) - 2);
    const std::vector<fedlora_block> X = stack.blocks();
    const fedlora_block out = {(int64_t)G.data(), R, R, R, 1, FEDLORA_FLOAT64, batch, (int64_t)R * R};
    const fedlora_block scale = {(int64_t)factors.data(), scaled, R, R, 1, FEDLORA_FLOAT64, batch, R};
    const int64_t count = (int64_t)ranks.size();
    int64_t bytes = 0;
    if (fedlora_gram_workspace(X.data(), &count, &out, 1, threads, &bytes)) return 1;
    std::vector<char> workspace(bytes, (char)0xff);
    if (fedlora_gram(X.data(), &count, &scale, &out, 1, workspace.data(), bytes - 1, threads, nullptr) != FEDLORA_BAD_WORKSPACE) return 1;
    if (fedlora_gram(X.data(), &count, &scale, &out, 1, workspace.data(), bytes, threads, nullptr)) return 1;
    for (int b = 0; b < batch; ++b)
        for (int i = 0; count && i < rows; ++i) {
            std::vector<double> x = stack.row(b, i);
            for (int p = 0; scaled && p < R; ++p) x[p] *= factors[(size_t)b * R + p];
            for (int p = 0; p < R; ++p)
                for (int q = 0; q < R; ++q) wanted[((size_t)b * R + p) * R + q] += x[p] * x[q];
        }
    int wrong = 0;
    for (size_t i = 0; i < G.size(); ++i) wrong += G[i] != wanted[i];
    return wrong;
}

template <class T>
int check_orient(int rows, int cols, int batch, bool by_columns, int threads) {
    std::vector<T> x((size_t)rows * cols * batch);
    for (size_t i = 0; i < x.size(); ++i) x[i] = (T)number(i);
    const std::vector<T> before = x;
    std::vector<double> signs((size_t)batch * cols, NAN);
    const int64_t row = by_columns ? 1 : cols, col = by_columns ? rows : 1;
    const fedlora_block X = {(int64_t)x.data(), rows, cols, row, col, sizeof(T) == 4 ? FEDLORA_FLOAT32 : FEDLORA_FLOAT64, batch, (int64_t)rows * cols};
    const fedlora_block out = {(int64_t)signs.data(), 1, cols, cols, 1, FEDLORA_FLOAT64, batch, cols};
    if (fedlora_orient(&X, &out, 1, threads, nullptr)) return 1;
    int wrong = 0;
    for (int b = 0; b < batch; ++b)
        for (int j = 0; j < cols; ++j) {
            const size_t start = (size_t)b * rows * cols + j * col;
            double sign = 1, largest = 0;
            for (int i = 0; i < rows; ++i)
                if (std::fabs(before[start + i * row]) > largest) {
                    largest = std::fabs(before[start + i * row]);
                    sign = before[start + i * row] < 0 ? -1 : 1;
                }
            wrong += signs[(size_t)b * cols + j] != sign;
            for (int i = 0; i < rows; ++i) wrong += x[start + i * row] != (T)sign * before[start + i * row];
        }
    return wrong;
}

}  // namespace

int check_grams() {
    int failures = 0;
    const std::vector<std::vector<int>> ranks = {{1}, {4, 4}, {3, 0, 9}, {16, 16, 16}, {33, 2, 95}, {0}, {}, {150, 49}};
    for (const int rows : {0, 1, 31, 64, 65, 2049})
        for (const auto &r : ranks)
            for (const int batch : {0, 1, 3})
                for (const bool by_columns : {false, true}) failures += check_gram(rows, r, batch, by_columns, rows % 2, 1 + batch) != 0;
    for (const int rows : {0, 1, 7, 100})
        for (const int cols : {0, 1, 24, 64, 65, 130})
            for (const bool by_columns : {false, true}) {
                failures += check_orient<float>(rows, cols, 2, by_columns, 2) != 0;
                failures += check_orient<double>(rows, cols, 3, by_columns, 1) != 0;
            }
    std::printf("grams: %d problems wrong\n", failures);
    return failures;
}
