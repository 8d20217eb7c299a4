// Runs the kernels that read files on awkward sizes, in buffers of exactly the right length: sums against those of the same blocks in
// memory, bit for bit, turned sums of pairs against their product, files that end too early.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unistd.h>
#include <vector>

#include "fedlora.h"

namespace {

fedlora_block block(const void *data, int64_t rows, int64_t cols, int64_t dtype, int64_t batch) {
    return {(int64_t)data, rows, cols, cols, 1, dtype, batch, rows * cols};
}

// A file without a name that holds these numbers behind a few other bytes.
class Stored {
  public:
    explicit Stored(const std::vector<float> &numbers) {
        char name[] = "/tmp/fedlora-check-XXXXXX";
        fd_ = mkstemp(name);
        unlink(name);
        const size_t bytes = numbers.size() * sizeof(float);
        if (write(fd_, "odd", 3) != 3 || write(fd_, numbers.data(), bytes) != (ssize_t)bytes) std::abort();
    }
    Stored(const Stored &) = delete;
    ~Stored() { close(fd_); }
    fedlora_range range(int64_t first, int64_t rows, int64_t cols) const { return {fd_, 3 + first * 4, rows, cols, FEDLORA_FLOAT32}; }
    void cut(int64_t bytes) const {
        if (ftruncate(fd_, bytes)) std::abort();
    }

  private:
    int fd_;
};

std::vector<float> draw(size_t count, unsigned seed) {
    std::vector<float> numbers(count);
    unsigned state = seed * 2654435761u + 1;
    for (float &x : numbers) x = (float)((int)((state = state * 1664525u + 1013904223u) >> 8) - (1 << 23)) / (1 << 21);
    return numbers;
}

// What is said of a batch of sums, one number each.
struct Said {
    std::vector<double> norm, rounding;
    std::vector<int32_t> info, notes;
    explicit Said(int64_t batch) : norm((size_t)batch), rounding((size_t)batch), info((size_t)batch), notes((size_t)batch) {}
    fedlora_block of(const void *data, int64_t dtype) const { return block(data, 1, 1, dtype, (int64_t)norm.size()); }
};

int check_sums(const std::vector<std::pair<int64_t, int64_t>> &shapes, int64_t batch, int64_t threads) {
    const int64_t K = (int64_t)shapes.size();
    int64_t p = 0, q = 0;
    for (const auto &s : shapes) p = s.first > p ? s.first : p, q = s.second > q ? s.second : q;
    std::vector<std::vector<float>> data;
    std::vector<Stored *> files;
    for (int64_t k = 0; k < K; ++k) {
        data.push_back(draw((size_t)(batch * shapes[k].first * shapes[k].second), (unsigned)k));
        files.push_back(new Stored(data.back()));
    }
    std::vector<fedlora_block> X;
    std::vector<fedlora_range> ranges;
    for (int64_t k = 0; k < K; ++k) X.push_back(block(data[k].data(), shapes[k].first, shapes[k].second, FEDLORA_FLOAT32, batch));
    for (int64_t i = 0; i < batch; ++i)
        for (int64_t k = 0; k < K; ++k)
            ranges.push_back(files[k]->range(i * shapes[k].first * shapes[k].second, shapes[k].first, shapes[k].second));
    std::vector<double> weights((size_t)(batch * K));
    for (size_t n = 0; n < weights.size(); ++n) weights[n] = 0.3 * (double)((int)n % 5) + 0.1;
    const fedlora_block w = block(weights.data(), batch, K, FEDLORA_FLOAT64, 1);
    std::vector<float> wanted((size_t)(batch * p * q)), found(wanted.size());
    const Said first(batch), second(batch);
    int failures = 0;
    const auto call = [&](const Said &said, std::vector<float> &out, bool read) {
        const fedlora_block sum = block(out.data(), p, q, FEDLORA_FLOAT32, batch);
        const fedlora_block n = said.of(said.norm.data(), FEDLORA_FLOAT64), r = said.of(said.rounding.data(), FEDLORA_FLOAT64);
        const fedlora_block i32 = said.of(said.info.data(), FEDLORA_INT32), z = said.of(said.notes.data(), FEDLORA_INT32);
        int64_t bytes = 0;
        failures += (read ? fedlora_read_sum_workspace(&sum, 1, threads, &bytes) : fedlora_weighted_sum_workspace(&K, &sum, 1, threads, &bytes)) != 0;
        std::vector<char> memory((size_t)bytes);
        if (read) return fedlora_read_sum(ranges.data(), &K, &w, &sum, &n, &r, &i32, &z, 1, memory.data(), bytes, threads, nullptr);
        return fedlora_weighted_sum(X.data(), &K, &w, &sum, &n, &r, &i32, &z, 1, memory.data(), bytes, threads, nullptr);
    };
    failures += call(first, wanted, false) != FEDLORA_OK;
    failures += call(second, found, true) != FEDLORA_OK;
    failures += !wanted.empty() && std::memcmp(wanted.data(), found.data(), wanted.size() * sizeof(float)) != 0;
    failures += first.norm != second.norm || first.rounding != second.rounding || first.info != second.info || first.notes != second.notes;
    if (batch && shapes.back().first * shapes.back().second > 0) {
        files.back()->cut(5);
        failures += call(second, found, true) != FEDLORA_UNREADABLE;
    }
    for (Stored *file : files) delete file;
    return failures;
}

// Clients whose pairs are one pair turned by rotations of two coordinates: turned back, their mean has the product of that pair.
int check_turned(int64_t m, int64_t n, int64_t r, int64_t side, int64_t threads) {
    const int64_t K = 3, batch = 2;
    const std::vector<float> B = draw((size_t)(batch * m * r), 5), A = draw((size_t)(batch * r * n), 6);
    const Stored reference(side ? A : B);
    std::vector<Stored *> left, right;
    for (int64_t k = 0; k < K; ++k) {
        std::vector<float> b = B, a = A;
        const float c = std::cos(0.4f * (float)k), s = std::sin(0.4f * (float)k);
        for (int64_t i = 0; i < batch; ++i) {
            for (int64_t row = 0; row < m; ++row) {
                float *x = b.data() + (i * m + row) * r, one = x[0], two = x[1];
                x[0] = c * one - s * two, x[1] = s * one + c * two;
            }
            for (int64_t col = 0; col < n; ++col) {
                float *x = a.data() + i * r * n + col, one = x[0], two = x[n];
                x[0] = c * one - s * two, x[n] = s * one + c * two;
            }
        }
        left.push_back(new Stored(b)), right.push_back(new Stored(a));
    }
    std::vector<fedlora_range> X, targets;
    for (int64_t i = 0; i < batch; ++i)
        for (int64_t k = 0; k < K; ++k) X.push_back(left[k]->range(i * m * r, m, r));
    for (int64_t i = 0; i < batch; ++i)
        for (int64_t k = 0; k < K; ++k) X.push_back(right[k]->range(i * r * n, r, n));
    for (int64_t i = 0; i < batch; ++i) targets.push_back(side ? reference.range(i * r * n, r, n) : reference.range(i * m * r, m, r));
    const std::vector<double> shares((size_t)(batch * K), 1.0 / 3.0);
    std::vector<float> mean_B(B.size()), mean_A(A.size());
    const Said one(batch), two(batch);
    const fedlora_block w = block(shares.data(), batch, K, FEDLORA_FLOAT64, 1), weights[2] = {w, w};
    const fedlora_block sums[2] = {block(mean_B.data(), m, r, FEDLORA_FLOAT32, batch), block(mean_A.data(), r, n, FEDLORA_FLOAT32, batch)};
    const fedlora_block norms[2] = {one.of(one.norm.data(), FEDLORA_FLOAT64), two.of(two.norm.data(), FEDLORA_FLOAT64)};
    const fedlora_block roundings[2] = {one.of(one.rounding.data(), FEDLORA_FLOAT64), two.of(two.rounding.data(), FEDLORA_FLOAT64)};
    const fedlora_block infos[2] = {one.of(one.info.data(), FEDLORA_INT32), two.of(two.info.data(), FEDLORA_INT32)};
    const fedlora_block notes[2] = {one.of(one.notes.data(), FEDLORA_INT32), two.of(two.notes.data(), FEDLORA_INT32)};
    std::vector<int32_t> plain((size_t)batch, -1);
    int64_t bytes = 0;
    int failures = fedlora_read_turned_workspace(X.data(), targets.data(), side, K, sums, threads, &bytes) != 0;
    std::vector<char> memory((size_t)bytes);
    const auto call = [&] {
        return fedlora_read_turned(X.data(), targets.data(), side, K, weights, sums, norms, roundings, infos, notes, 0x1p-24, 1, 1.0,
                                   plain.data(), memory.data(), bytes, threads, nullptr);
    };
    failures += call() != FEDLORA_OK || plain[0] != 0 || plain[1] != 0;
    // turned all the way, every client is the first again
    for (size_t e = 0; e < B.size(); ++e) failures += !(std::fabs(mean_B[e] - B[e]) < 1e-4f);
    for (size_t e = 0; e < A.size(); ++e) failures += !(std::fabs(mean_A[e] - A[e]) < 1e-4f);
    right.back()->cut(9);
    failures += call() != FEDLORA_UNREADABLE;
    for (int64_t k = 0; k < K; ++k) delete left[k], delete right[k];
    return failures;
}

}  // namespace

int check_read() {
    int failures = 0;
    const std::vector<std::vector<std::pair<int64_t, int64_t>>> problems = {
        {{5, 3}, {5, 3}},       {{5, 1}, {5, 7}, {5, 4}}, {{1, 9}, {6, 9}},           {{2, 7}, {5, 3}},           {{1, 1}},
        {{3, 0}, {3, 2}},       {{0, 4}},                 {{3, 2049}, {3, 2049}},     {{70001, 1}, {70001, 1}},   {{33000, 2}, {33000, 3}},
        {{2, 17001}, {3, 16500}},
    };
    for (const auto &shapes : problems)
        for (int64_t batch : {1, 3})
            for (int64_t threads : {1, 2, 5}) failures += check_sums(shapes, batch, threads) != 0;
    for (int64_t side : {0, 1})
        for (int64_t threads : {1, 2})
            for (int64_t r : {2, 3, 7, 33}) failures += check_turned(61, 2051, r, side, threads) != 0;
    std::printf("files: %d problems wrong\n", failures);
    return failures;
}
