// Runs the direct SVD on awkward sizes in buffers of exactly the right length, poisoned, and checks values against vectors,
// residual and orthogonality.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

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

}  // namespace

int check_direct_svds() {
    const int sizes[][2] = {{1, 1}, {3, 2}, {9, 9}, {33, 33}, {64, 64}, {70, 41}, {97, 96}, {130, 33}};
    for (const auto &size : sizes) check(fedlora::direct_svd(), size[0], size[1]);
    return failures;
}
