// Runs fedlora_weighted_sum on awkward sizes and layouts, in buffers of exactly the right length, against the definition.
#include <cmath>
#include <cstdio>
#include <vector>

#include "fedlora.h"

namespace {

struct Shape {
    int rows, cols;
};

fedlora_block block(const void *data, int rows, int cols, int dtype, int batch) {
    return {(int64_t)data, rows, cols, cols, 1, dtype, batch, (int64_t)rows * cols};
}

// One group of float32 blocks of these shapes; the number of wrong elements.
int check_shapes(const std::vector<Shape> &shapes, int batch, int threads) {
    const int K = (int)shapes.size();
    int p = 0, q = 0;
    for (const Shape &s : shapes) p = s.rows > p ? s.rows : p, q = s.cols > q ? s.cols : q;
    std::vector<std::vector<float>> data;
    std::vector<fedlora_block> X;
    for (int k = 0; k < K; ++k) {
        data.emplace_back((size_t)batch * shapes[k].rows * shapes[k].cols);
        for (size_t i = 0; i < data[k].size(); ++i) data[k][i] = (float)((int)(i * 37 + k * 11) % 101 - 50) / 7;
    }
    for (int k = 0; k < K; ++k) X.push_back(block(data[k].data(), shapes[k].rows, shapes[k].cols, FEDLORA_FLOAT32, batch));
    std::vector<double> weights((size_t)batch * K), norm(batch), rounding(batch);
    for (size_t i = 0; i < weights.size(); ++i) weights[i] = 0.25 * (double)((int)i % 5) - 0.5;
    std::vector<float> sum((size_t)batch * p * q);
    std::vector<int32_t> info(batch), notes(batch);
    const fedlora_block w = block(weights.data(), batch, K, FEDLORA_FLOAT64, 1);
    const fedlora_block out = block(sum.data(), p, q, FEDLORA_FLOAT32, batch);
    const fedlora_block n = block(norm.data(), 1, 1, FEDLORA_FLOAT64, batch), r = block(rounding.data(), 1, 1, FEDLORA_FLOAT64, batch);
    const fedlora_block i32 = block(info.data(), 1, 1, FEDLORA_INT32, batch), z = block(notes.data(), 1, 1, FEDLORA_INT32, batch);
    const int64_t count = K;
    int64_t bytes = 0;
    if (fedlora_weighted_sum_workspace(&count, &out, 1, threads, &bytes)) return 1;
    std::vector<char> workspace(bytes);
    if (fedlora_weighted_sum(X.data(), &count, &w, &out, &n, &r, &i32, &z, 1, workspace.data(), bytes, threads, nullptr)) return 1;
    if (fedlora_weighted_sum(X.data(), &count, &w, &out, &n, &r, &i32, &z, 1, workspace.data(), bytes - 1, threads, nullptr) != FEDLORA_BAD_WORKSPACE)
        return 1;
    int wrong = 0;
    for (int b = 0; b < batch; ++b)
        for (int i = 0; i < p; ++i)
            for (int j = 0; j < q; ++j) {
                volatile double total = 0;  // volatile: no fused multiply-add
                for (int k = 0; k < K; ++k)
                    if (i < shapes[k].rows && j < shapes[k].cols) {
                        volatile double term = weights[(size_t)b * K + k] * (double)data[k][((size_t)b * shapes[k].rows + i) * shapes[k].cols + j];
                        total = total + term;
                    }
                wrong += (float)total != sum[((size_t)b * p + i) * q + j];
            }
    return wrong;
}

}  // namespace

int check_weighted_sum() {
    int failures = 0;
    const std::vector<std::vector<Shape>> problems = {
        {{5, 3}, {5, 3}}, {{5, 1}, {5, 7}, {5, 4}}, {{1, 9}, {6, 9}}, {{2, 7}, {5, 3}}, {{1, 1}},
        {{3, 0}, {3, 2}}, {{0, 4}}, {{3, 2049}, {3, 2049}}, {{70001, 1}, {70001, 1}}, {{33000, 2}, {33000, 3}},
    };
    for (const auto &shapes : problems)
        for (int batch : {0, 1, 3})
            for (int threads : {1, 2, 5}) failures += check_shapes(shapes, batch, threads) != 0;
    std::printf("weighted_sum: %d problems wrong\n", failures);
    return failures;
}
