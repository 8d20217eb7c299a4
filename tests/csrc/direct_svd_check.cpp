// Runs the direct SVD on awkward sizes in buffers of exactly the right length, poisoned, and checks values against vectors,
// residual and orthogonality.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "bidiagonal.h"
#include "direct_svd.h"

namespace {

int failures = 0;

void fail(const char *isa, int rows, int cols, const char *what) {
    std::printf("direct, %s: %d x %d: %s\n", isa, rows, cols, what);
    ++failures;
}

std::vector<double> random_matrix(int rows, int cols) {
    std::vector<double> C(rows * cols);
    unsigned state = 2024u + rows * 1000 + cols;
    for (double &x : C) {
        x = 0;
        for (int k = 0; k < 12; ++k) x += ((state = state * 1664525u + 1013904223u) >> 8) / 16777216.0 - 0.5;
    }
    return C;
}

void check(const fedlora::DirectSvd &direct, int rows, int cols) {
    const std::vector<double> C = random_matrix(rows, cols);
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const int64_t bytes = (direct.scratch_bytes(rows, cols) + 63) / 64 * 64;
    std::unique_ptr<double, decltype(&std::free)> scratch((double *)std::aligned_alloc(64, bytes), std::free);
    for (int64_t i = 0; i < bytes / 8; ++i) scratch.get()[i] = nan;
    std::vector<double> s(cols, nan);
    if (!direct.values(C.data(), rows, rows, cols, s.data(), scratch.get())) return fail(direct.isa, rows, cols, "values");
    const double limit = 4 * std::sqrt(rows) * std::numeric_limits<double>::epsilon() / 2;
    for (const int p : {1, (cols + 1) / 2, cols}) {
        std::vector<double> U(rows * p, nan), V(cols * p, nan);
        if (!direct.vectors(p, U.data(), rows, V.data(), cols, scratch.get())) return fail(direct.isa, rows, cols, "vectors");
        double residual = 0, skew = 0;
        for (int c = 0; c < p; ++c) {
            if (!(c == 0 || s[c - 1] >= s[c])) fail(direct.isa, rows, cols, "order");
            for (int i = 0; i < rows; ++i) {
                double x = -U[c * rows + i] * s[c];
                for (int j = 0; j < cols; ++j) x += C[j * rows + i] * V[c * cols + j];
                residual += x * x;
            }
            for (int d = 0; d <= c; ++d) {
                double u = c == d ? -1 : 0, v = u;
                for (int i = 0; i < rows; ++i) u += U[c * rows + i] * U[d * rows + i];
                for (int j = 0; j < cols; ++j) v += V[c * cols + j] * V[d * cols + j];
                skew = std::fmax(skew, std::fmax(std::fabs(u), std::fabs(v)));
            }
        }
        if (!(skew <= limit)) fail(direct.isa, rows, cols, "orthogonality");
        if (!(std::sqrt(residual) <= limit * std::sqrt(p) * s[0])) fail(direct.isa, rows, cols, "residual");
    }
}

// The bidiagonal matrices of Gaussian ones: their values are apart, so there is always an answer.
void check_fallbacks(const fedlora::BidiagonalSvd &bidiagonal) {
    int refused = 0;
    unsigned state = 77;
    const auto normal = [&state] {
        double x = 0;
        for (int k = 0; k < 12; ++k) x += ((state = state * 1664525u + 1013904223u) >> 8) / 16777216.0 - 0.5;
        return x;
    };
    for (const int n : {33, 40, 64, 128}) {
        const int64_t bytes = (bidiagonal.scratch_bytes(n) + 63) / 64 * 64;
        std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, bytes), std::free);
        const int ld = (n + 15) / 16 * 16;
        std::vector<double> q(n), e(n), s(n), U(n * ld), V(n * ld);
        std::vector<float> Uf(n * ld), Vf(n * ld);
        for (int trial = 0; trial < 40; ++trial) {
            for (int k = 0; k < n; ++k) {
                double right = 0, below = 0;
                for (int i = k; i < n; ++i) below += std::pow(normal(), 2);
                for (int i = k + 1; i < n; ++i) right += std::pow(normal(), 2);
                q[k] = trial % 2 ? -std::sqrt(below) : std::sqrt(below);
                e[k] = trial % 3 ? -std::sqrt(right) : std::sqrt(right);
            }
            refused += !bidiagonal.values(n, q.data(), e.data(), s.data(), scratch.get()) ||
                       !bidiagonal.vectors_double(n, n, U.data(), ld, V.data(), ld, scratch.get()) ||
                       !bidiagonal.vectors_float(n, n, Uf.data(), ld, Vf.data(), ld, scratch.get());
        }
        // Values that are all the same have no answer.
        for (int k = 0; k < n; ++k) q[k] = 1, e[k] = 0;
        if (bidiagonal.values(n, q.data(), e.data(), s.data(), scratch.get()) &&
            bidiagonal.vectors_double(n, n, U.data(), ld, V.data(), ld, scratch.get()))
            ++failures;
    }
    std::printf("bidiagonals refused: %d\n", refused);
    failures += refused;
}

bool has_v3() {
#ifdef __x86_64__
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#else
    return false;
#endif
}

bool has_v4() {
#ifdef __x86_64__
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd");
#else
    return false;
#endif
}

std::vector<const fedlora::DirectSvd *> variants() {
    std::vector<const fedlora::DirectSvd *> found{&fedlora::direct_svd_base()};
#ifdef __x86_64__
    if (has_v3()) found.push_back(&fedlora::direct_svd_v3());
    if (has_v4()) found.push_back(&fedlora::direct_svd_v4());
#endif
    return found;
}

std::vector<const fedlora::BidiagonalSvd *> bidiagonals() {
    std::vector<const fedlora::BidiagonalSvd *> found{&fedlora::bidiagonal_base()};
#ifdef __x86_64__
    if (has_v3()) found.push_back(&fedlora::bidiagonal_v3());
    if (has_v4()) found.push_back(&fedlora::bidiagonal_v4());
#endif
    return found;
}

}  // namespace

int check_direct_svds() {
    const int sizes[][2] = {{1, 1}, {3, 2}, {9, 9}, {33, 33}, {64, 64}, {70, 41}, {97, 96}, {130, 33}};
    for (const fedlora::DirectSvd *direct : variants())
        for (const auto &size : sizes) check(*direct, size[0], size[1]);
    for (const fedlora::BidiagonalSvd *bidiagonal : bidiagonals()) check_fallbacks(*bidiagonal);
    return failures;
}
