// Runs fedlora_product_svd on awkward sizes, layouts and numbers of threads, in buffers of exactly the right length: what it keeps of
// all directions is the update again.
#include <cmath>
#include <cstdio>
#include <vector>

#include "fedlora.h"

namespace {

double number(size_t i) { return std::sin((double)(i * 7 + 1)); }

struct Case {
    int m, n, batch;
    std::vector<int> ranks;
    bool by_columns;  // B; A is not
    int64_t output;
};

// One block for every matrix of the batch.
struct Blocks {
    int rows, cols, batch;
    bool by_columns;
    std::vector<float> data;
    Blocks(int rows, int cols, int batch, bool by_columns, size_t seed)
        : rows(rows), cols(cols), batch(batch), by_columns(by_columns), data((size_t)rows * cols * batch) {
        for (size_t i = 0; i < data.size(); ++i) data[i] = (float)number(i + 1000 * seed);
    }
    double at(int b, int i, int j) const {
        return data[(size_t)b * rows * cols + (by_columns ? (size_t)j * rows + i : (size_t)i * cols + j)];
    }
    fedlora_block block() const {
        return {(int64_t)data.data(), rows, cols, by_columns ? 1 : cols, by_columns ? rows : 1, FEDLORA_FLOAT32, batch, (int64_t)rows * cols};
    }
};

template <class T>
fedlora_block block_of(const std::vector<T> &data, int64_t dtype, int64_t rows, int64_t cols, int64_t row, int64_t col, int64_t batch,
                       int64_t step) {
    return {(int64_t)data.data(), rows, cols, row, col, dtype, batch, step};
}

int check(const Case &c, int64_t threads) {
    const int64_t K = (int64_t)c.ranks.size();
    std::vector<Blocks> B, A;
    int R = 0;
    for (const int r : c.ranks) {
        B.emplace_back(c.m, r, c.batch, c.by_columns, B.size() + 1);
        A.emplace_back(r, c.n, c.batch, !c.by_columns, A.size() + 50);
        R += r;
    }
    std::vector<fedlora_block> of_B, of_A;
    for (int64_t k = 0; k < K; ++k) of_B.push_back(B[k].block()), of_A.push_back(A[k].block());
    const int p = c.m < c.n ? (c.m < R ? c.m : R) : (c.n < R ? c.n : R);
    const size_t N = (size_t)c.batch;
    std::vector<double> weights(N * K), S(N * p, NAN), values(N * FEDLORA_PRODUCT_VALUES, NAN), balance(N * R, NAN);
    std::vector<float> left(N * c.m * p, 0), right(N * c.n * p, 0);
    std::vector<int32_t> codes(N * FEDLORA_PRODUCT_CODES, 85);
    for (size_t i = 0; i < weights.size(); ++i) weights[i] = 0.5 + (double)(i % 3);
    const fedlora_block weight = block_of(weights, FEDLORA_FLOAT64, c.batch, K, K, 1, 1, 0),
                        of_left = block_of(left, FEDLORA_FLOAT32, c.m, p, p, 1, c.batch, (int64_t)c.m * p),
                        of_right = block_of(right, FEDLORA_FLOAT32, p, c.n, c.n, 1, c.batch, (int64_t)c.n * p),
                        of_S = block_of(S, FEDLORA_FLOAT64, 1, p, p, 1, c.batch, p),
                        of_values = block_of(values, FEDLORA_FLOAT64, FEDLORA_PRODUCT_VALUES, 1, c.batch, 1, c.batch, 1),
                        of_codes = block_of(codes, FEDLORA_INT32, FEDLORA_PRODUCT_CODES, 1, c.batch, 1, c.batch, 1),
                        of_balance = block_of(balance, FEDLORA_FLOAT64, 1, R, R, 1, c.batch, R);
    int64_t bytes = 0;
    if (fedlora_product_svd_workspace(of_B.data(), of_A.data(), &K, &of_left, &of_right, 1, threads, &bytes)) return 1;
    std::vector<char> workspace((size_t)bytes, (char)0xff);
    const auto call = [&](int64_t room) {
        return fedlora_product_svd(of_B.data(), of_A.data(), &K, &weight, &of_left, &of_S, &of_right, &of_values, &of_codes, &of_balance, 1,
                                   FEDLORA_RULE_RANK, p, 0, c.output, nullptr, workspace.data(), room, threads, nullptr);
    };
    if (call(bytes - 1) != FEDLORA_BAD_WORKSPACE || call(bytes) != FEDLORA_OK) return 1;
    int wrong = 0;
    for (int b = 0; b < c.batch; ++b) {
        double worst = 0;
        for (int i = 0; i < c.m; ++i)
            for (int j = 0; j < c.n; ++j) {
                double wanted = 0, found = 0;
                for (int64_t k = 0; k < K; ++k)
                    for (int r = 0; r < c.ranks[k]; ++r) wanted += weights[b * K + k] * B[k].at(b, i, r) * A[k].at(b, r, j);
                for (int t = 0; t < p; ++t)
                    found += (double)left[((size_t)b * c.m + i) * p + t] * (double)right[((size_t)b * p + t) * c.n + j] *
                             (c.output == FEDLORA_OUTPUT_USV ? S[(size_t)b * p + t] : 1);
                worst = std::fmax(worst, std::fabs(wanted - found));
            }
        // a matrix that asks for a second pass has no factors
        const bool doubtful = codes[5 * N + b] != 0;
        wrong += !doubtful && !(worst <= 1e-5 * S[(size_t)b * p]);
        wrong += doubtful && (left[(size_t)b * c.m * p] != 0 || codes[2 * N + b] != 1);
        wrong += !(values[b] > 0) || codes[3 * N + b] != 0;
    }
    return wrong;
}

}  // namespace

int check_product_svds() {
    const std::vector<Case> cases = {
        {1, 1, 3, {1}, false, FEDLORA_OUTPUT_USV},
        {7, 9, 19, {2, 3}, false, FEDLORA_OUTPUT_LEFT},
        {31, 40, 9, {3, 0, 20}, true, FEDLORA_OUTPUT_BALANCED},
        {40, 60, 5, {33}, false, FEDLORA_OUTPUT_USV},
        {37, 70, 3, {20, 30}, true, FEDLORA_OUTPUT_LEFT},
        {2100, 9, 2, {4}, false, FEDLORA_OUTPUT_USV},
        {11, 4100, 1, {3, 5}, true, FEDLORA_OUTPUT_BALANCED},
    };
    int failures = 0;
    for (const Case &c : cases)
        for (int64_t threads = 1; threads < 4; ++threads) {
            const int wrong = check(c, threads);
            if (wrong) std::printf("product_svd: %d x %d, %d threads: wrong in %d places\n", c.m, c.n, (int)threads, wrong);
            failures += wrong;
        }
    return failures;
}
