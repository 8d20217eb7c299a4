// Runs fedlora_core_svd, and every instruction-set variant this machine can run, on awkward sizes in buffers of exactly the
// right length, and checks residual and orthogonality. Meant to be compiled with the sources under sanitizers.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "svd.h"

namespace {

int failures = 0;

// Every allocation has its exact size, so that one element too far is seen.
template <class T>
struct Problem {
    int p, q, k, batch;
    std::vector<T> C, U, S, Vh;
    std::vector<int32_t> info, notes;
    fedlora::SvdGroup group;

    Problem(int p, int q, int batch, bool transposed)
        : p(p), q(q), k(p < q ? p : q), batch(batch), C(batch * p * q), U(batch * p * k), S(batch * k), Vh(batch * k * q),
          info(batch), notes(batch) {
        const int64_t dtype = sizeof(T) == 4 ? FEDLORA_FLOAT32 : FEDLORA_FLOAT64;
        group.C = {(int64_t)C.data(), p, q, transposed ? 1 : q, transposed ? p : 1, dtype, batch, p * q};
        group.U = {(int64_t)U.data(), p, k, k, 1, dtype, batch, p * k};
        group.S = {(int64_t)S.data(), 1, k, k, 1, dtype, batch, k};
        group.Vh = {(int64_t)Vh.data(), k, q, q, 1, dtype, batch, k * q};
        group.info = {(int64_t)info.data(), 1, 1, 1, 1, FEDLORA_INT32, batch, 1};
        group.notes = {(int64_t)notes.data(), 1, 1, 1, 1, FEDLORA_INT32, batch, 1};
        unsigned state = 12345u + p * 100 + q;
        for (T &x : C) x = (T)((int)((state = state * 1664525u + 1013904223u) >> 8) - (1 << 23)) / (1 << 20);
        if (batch > 2)
            for (int i = 0; i < p * q; ++i) C[2 * p * q + i] = 0;
        if (batch > 3) C[3 * p * q] = std::numeric_limits<T>::quiet_NaN();
        if (batch > 4)
            for (int i = 0; i < p * q; ++i) C[4 * p * q + i] *= std::numeric_limits<T>::min();
        if (batch > 5)  // mostly zeros, which keep their sign only if nobody adds to them
            for (int i = 0; i < p * q; ++i) C[5 * p * q + i] = i % (k + 1) ? T(-0.0) : -C[5 * p * q + i];
    }

    T entry(int b, int i, int j) const { return C[b * p * q + i * group.C.row_stride + j * group.C.col_stride]; }

    void check(const char *isa) const {
        const double limit = 4 * std::sqrt(p > q ? p : q) * std::numeric_limits<T>::epsilon() / 2;
        for (int b = 0; b < batch; ++b) {
            if ((b == 3) != (info[b] == FEDLORA_INFO_NONFINITE)) fail(isa, b, "info");
            if (b == 3) continue;
            double residual = 0, size = 0, skew = 0;
            for (int i = 0; i < p; ++i)
                for (int j = 0; j < q; ++j) {
                    double x = entry(b, i, j);
                    size += x * x;
                    for (int c = 0; c < k; ++c) x -= (double)U[(b * p + i) * k + c] * S[b * k + c] * Vh[(b * k + c) * q + j];
                    residual += x * x;
                }
            for (int c = 0; c < k; ++c)
                for (int d = 0; d < k; ++d) {
                    double u = c == d ? -1 : 0, v = u;
                    for (int i = 0; i < p; ++i) u += (double)U[(b * p + i) * k + c] * U[(b * p + i) * k + d];
                    for (int j = 0; j < q; ++j) v += (double)Vh[(b * k + c) * q + j] * Vh[(b * k + d) * q + j];
                    skew = std::fmax(skew, std::fmax(std::fabs(u), std::fabs(v)));
                }
            if (!(skew <= limit)) fail(isa, b, "orthogonality");
            // At the edge of the range the values themselves are rounded to subnormals.
            if (b != 4 && !(std::sqrt(residual) <= limit * std::sqrt(size))) fail(isa, b, "residual");
        }
    }

    // Matrix b by itself.
    fedlora::SvdGroup alone(int b) const {
        fedlora::SvdGroup one = group;
        for (fedlora_block *block : {&one.C, &one.U, &one.S, &one.Vh, &one.info, &one.notes}) {
            block->data += b * block->batch_stride * (block->dtype == FEDLORA_FLOAT64 ? 8 : 4);
            block->batch = 1;
        }
        return one;
    }

    bool same(const Problem &other, int b) const {
        return !std::memcmp(&U[b * p * k], &other.U[b * p * k], p * k * sizeof(T)) &&
               !std::memcmp(&S[b * k], &other.S[b * k], k * sizeof(T)) &&
               !std::memcmp(&Vh[b * k * q], &other.Vh[b * k * q], k * q * sizeof(T)) && info[b] == other.info[b] &&
               notes[b] == other.notes[b];
    }

    void fail(const char *isa, int b, const char *what) const {
        std::printf("%s: %d x %d, %zu bytes, matrix %d of %d: %s\n", isa, p, q, sizeof(T), b, batch, what);
        ++failures;
    }
};

// Those that take matrices of this size, and that this machine can run.
std::vector<const fedlora::SvdVariant *> variants(int p, int q) {
    const bool small = p <= fedlora::kSmallSvdMax && q <= fedlora::kSmallSvdMax;
    std::vector<const fedlora::SvdVariant *> found{small ? &fedlora::small_svd_base() : &fedlora::large_svd_base()};
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        found.push_back(small ? &fedlora::small_svd_v3() : &fedlora::large_svd_v3());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd"))
        found.push_back(small ? &fedlora::small_svd_v4() : &fedlora::large_svd_v4());
#endif
    return found;
}

template <class T>
void check_variants(int p, int q, int batch, bool transposed) {
    for (const fedlora::SvdVariant *variant : variants(p, q)) {
        Problem<T> problem(p, q, batch, transposed);
        const int64_t bytes = (variant->scratch_bytes(problem.group.C) + 63) / 64 * 64;
        std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, bytes), std::free);
        for (int64_t first = 0; first < batch; first += variant->matrices_per_task(problem.group.C))
            variant->run(problem.group, first, 0, scratch.get());
        problem.check(variant->isa);
        Problem<T> single(p, q, batch, transposed);
        for (int b = 0; b < batch; ++b) {
            variant->run(single.alone(b), 0, 0, scratch.get());
            if (!single.same(problem, b)) problem.fail(variant->isa, b, "differs from the same matrix alone");
        }
    }
}

template <class T>
void check_entry_point(int p, int q, int batch, int threads) {
    Problem<T> problem(p, q, batch, false);
    const fedlora::SvdGroup &g = problem.group;
    int64_t bytes = -1;
    if (fedlora_core_svd_workspace(&g.C, 1, threads, &bytes)) problem.fail(fedlora_isa(), 0, "workspace");
    std::vector<char> workspace(bytes);
    if (fedlora_core_svd(&g.C, &g.U, &g.S, &g.Vh, &g.info, &g.notes, 1, 0, workspace.data(), bytes, threads, nullptr))
        problem.fail(fedlora_isa(), 0, "status");
    problem.check(fedlora_isa());
}

}  // namespace

int check_read();
int check_weighted_sum();
int check_panels();
int check_calibrate();
int check_cholesky();
int check_grams();
int check_direct_svds();
int check_product_svds();
int check_stacked_qr();
int check_alignment();

int main() {
    const int shapes[][2] = {{1, 1}, {1, 7}, {7, 1}, {2, 2}, {3, 2}, {4, 4}, {5, 8}, {13, 11}, {17, 16}, {31, 32}, {32, 32}};
    for (const auto &shape : shapes)
        for (const int batch : {0, 1, 5, 16, 35}) {
            for (const bool transposed : {false, true}) {
                check_variants<float>(shape[0], shape[1], batch, transposed);
                check_variants<double>(shape[0], shape[1], batch, transposed);
            }
            check_entry_point<float>(shape[0], shape[1], batch, 2);
            check_entry_point<double>(shape[0], shape[1], batch, 1);
        }
    const int larger[][2] = {{33, 33}, {1, 40}, {40, 3}, {47, 64}, {65, 34}};
    for (const auto &shape : larger)
        for (const int batch : {1, 5}) {
            for (const bool transposed : {false, true}) {
                check_variants<float>(shape[0], shape[1], batch, transposed);
                check_variants<double>(shape[0], shape[1], batch, transposed);
            }
            check_entry_point<float>(shape[0], shape[1], batch, 2);
            check_entry_point<double>(shape[0], shape[1], batch, 1);
        }
    failures += check_weighted_sum();
    failures += check_read();
    failures += check_panels();
    failures += check_calibrate();
    failures += check_cholesky();
    failures += check_grams();
    failures += check_direct_svds();
    failures += check_product_svds();
    failures += check_stacked_qr();
    failures += check_alignment();
    std::printf("variants:");
    for (const fedlora::SvdVariant *variant : variants(1, 1)) std::printf(" %s", variant->isa);
    std::printf("; failures: %d\n", failures);
    return failures != 0;
}
