// Runs the kernels of rotations and of rotated factors of every instruction set on awkward sizes, in buffers of exactly the right length:
// inner products, X Q against the definition, rotations against their own laws, and the whole alignment of planted pairs.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "dots.h"
#include "polar.h"
#include "turn.h"

namespace {

struct Isa {
    const char *name;
    const fedlora::PolarVariant &polar;
    const fedlora::Dots &dots;
    const fedlora::Turn &turn;
};

// Those that this machine can run.
std::vector<Isa> variants() {
    std::vector<Isa> found{{"portable", fedlora::small_polar_base(), fedlora::dots_base(), fedlora::turn_base()}};
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
        found.push_back({"x86-64-v3", fedlora::small_polar_v3(), fedlora::dots_v3(), fedlora::turn_v3()});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found.push_back({"x86-64-v4", fedlora::small_polar_v4(), fedlora::dots_v4(), fedlora::turn_v4()});
#endif
    return found;
}

unsigned state = 1;

double random_number() { return (double)((int)((state = state * 1664525u + 1013904223u) >> 8) - (1 << 23)) / (1 << 23); }

double small_integer() { return std::floor(random_number() * 8); }

template <class T>
struct Aligned {
    std::unique_ptr<T, decltype(&std::free)> data;
    explicit Aligned(int64_t count) : data((T *)std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64 + 64), std::free) {}
    operator T *() const { return data.get(); }
};

template <class T>
int check_dots(fedlora::AddDots<T> add, int rows, int cols, int count) {
    const int ldx = count + 8, ldy = count + 16;
    Aligned<T> X(rows * ldx), Y(cols * ldy);
    for (int e = 0; e < rows * ldx; ++e) X[e] = (T)small_integer();
    for (int e = 0; e < cols * ldy; ++e) Y[e] = (T)small_integer();
    std::vector<double> sums((size_t)rows * cols * 8, 1.0), squares(16, 2.0);
    add(sums.data(), squares.data(), X, ldx, Y, ldy, rows, cols, count);
    int wrong = 0;
    for (int l = 0; l < 8; ++l) {
        for (int i = 0; i < rows; ++i)
            for (int j = 0; j < cols; ++j) {
                double wanted = 1.0;
                for (int d = l; d < count; d += 8) wanted += (double)X[i * ldx + d] * Y[j * ldy + d];
                wrong += sums[(i * cols + j) * 8 + l] != wanted;
            }
        double of_X = 2.0, of_Y = 2.0;
        for (int d = l; d < count; d += 8) {
            for (int i = 0; i < rows; ++i) of_X += (double)X[i * ldx + d] * X[i * ldx + d];
            for (int j = 0; j < cols; ++j) of_Y += (double)Y[j * ldy + d] * Y[j * ldy + d];
        }
        wrong += squares[l] != of_X || squares[8 + l] != of_Y;
    }
    return wrong;
}

// Small integers: every sum is exact. `shift` moves the answer off the lines of the cache.
template <class T>
int check_turn(const fedlora::Turns<T> &turns, int count, int r, bool by_columns, int shift, bool poisoned) {
    const int ldq = (r + 15) / 16 * 16, ld = count + (shift ? 3 : 0);
    std::vector<T> Q((size_t)r * ldq, T(0));
    for (int i = 0; i < r; ++i)
        for (int j = 0; j < r; ++j) Q[i * ldq + j] = (T)small_integer();
    const size_t size = by_columns ? (size_t)(r - 1) * ld + count : (size_t)count * r;
    std::vector<T> X(size), memory(size + shift, T(-99));
    for (T &x : X) x = (T)small_integer();
    const auto at = [&](int d, int j) { return by_columns ? (size_t)j * ld + d : (size_t)d * r + j; };
    if (poisoned) X[at(count - 1, r - 1)] = (T)INFINITY;
    T *const out = memory.data() + shift;
    const bool finite = by_columns ? turns.columns(X.data(), ld, Q.data(), out, ld, count, r, true) : turns.rows(X.data(), Q.data(), out, count, r, true);
    int wrong = finite == poisoned;
    for (int d = 0; d < count - poisoned; ++d)
        for (int j = 0; j < r; ++j) {
            T wanted = 0;
            for (int i = 0; i < r; ++i) wanted += X[at(d, i)] * Q[i * ldq + j];
            wrong += out[at(d, j)] != wanted;
        }
    return wrong;
}

struct Answers {
    int r, batch;
    std::vector<double> Q, S, condition;
    std::vector<uint8_t> unique;
    std::vector<int32_t> info, notes;
    Answers(int r, int batch)
        : r(r), batch(batch), Q((size_t)batch * r * r, NAN), S((size_t)batch * r, NAN), condition(batch, NAN), unique(batch, 9), info(batch, -1),
          notes(batch, -1) {}
    fedlora::Rotations blocks() {
        const auto scalar = [&](void *data, int64_t dtype) { return fedlora_block{(int64_t)data, 1, 1, 1, 1, dtype, batch, 1}; };
        return {{(int64_t)Q.data(), r, r, r, 1, FEDLORA_FLOAT64, batch, r * r},
                {(int64_t)S.data(), 1, r, r, 1, FEDLORA_FLOAT64, batch, r},
                scalar(unique.data(), FEDLORA_BOOL),
                scalar(condition.data(), FEDLORA_FLOAT64),
                scalar(info.data(), FEDLORA_INT32),
                scalar(notes.data(), FEDLORA_INT32)};
    }
};

// Matrix 1 is zero, 2 of rank 1, 3 holds NaN, 4 loses half of its columns.
std::vector<double> correlations(int r, int batch) {
    std::vector<double> M((size_t)batch * r * r);
    for (double &x : M) x = random_number();
    for (int i = 0; i < r; ++i)
        for (int j = 0; j < r; ++j) {
            if (batch > 1) M[r * r + i * r + j] = 0;
            if (batch > 2) M[2 * r * r + i * r + j] = (i + 1) * (j - 1.5);
            if (batch > 4 && j >= (r + 1) / 2) M[4 * r * r + i * r + j] = 0;
        }
    if (batch > 3) M[3 * r * r] = NAN;
    return M;
}

int check_polar(const fedlora::PolarVariant &polar, int r, int batch, bool special, double blend) {
    std::vector<double> M = correlations(r, batch), sizes(batch);
    std::vector<int32_t> exponents(batch, 3);
    for (int b = 0; b < batch; ++b) {
        double square = 0;
        for (int e = 0; e < r * r; ++e) square += M[(size_t)b * r * r + e] * M[(size_t)b * r * r + e];
        sizes[b] = std::sqrt(square);
    }
    Answers got(r, batch);
    const fedlora::Rotations to = got.blocks();
    const fedlora::Correlations from = {{(int64_t)M.data(), r, r, r, 1, FEDLORA_FLOAT64, batch, r * r},
                                        {(int64_t)sizes.data(), 1, 1, 1, 1, FEDLORA_FLOAT64, batch, 1},
                                        {(int64_t)exponents.data(), 1, 1, 1, 1, FEDLORA_INT32, batch, 1},
                                        0x1p-53};
    Aligned<char> scratch(polar.scratch_bytes(r) - 64);
    const int64_t step = polar.matrices_per_task(r);
    for (int64_t first = 0; first < batch; first += step)
        polar.run(from, to, {special, blend}, first, batch - first < step ? batch - first : step, scratch);
    int wrong = 0;
    for (int b = 0; b < batch; ++b) {
        wrong += got.info[b] != (b == 3 ? FEDLORA_INFO_NONFINITE : 0) || got.unique[b] > 1;
        if (b == 3) continue;
        double trace = 0, sum = 0;
        for (int c = 0; c < r; ++c) sum += got.S[b * r + c] / 8;
        for (int i = 0; i < r; ++i)
            for (int j = 0; j < r; ++j) {
                double inner = i == j ? -1 : 0;
                for (int k = 0; k < r; ++k) inner += got.Q[((size_t)b * r + k) * r + i] * got.Q[((size_t)b * r + k) * r + j];
                wrong += !(std::fabs(inner) <= 16 * 0x1p-53);
                trace += got.Q[((size_t)b * r + i) * r + j] * M[((size_t)b * r + i) * r + j];
                if (b == 1) wrong += got.Q[((size_t)b * r + i) * r + j] != (i == j);
            }
        const double lost = special ? got.S[b * r + r - 1] / 4 : 0;
        if (blend == 1) wrong += !(trace <= sum * (1 + 1e-12) && trace >= sum * (1 - 1e-12) - lost - 1e-13 * sizes[b]);
    }
    return wrong;
}

// Clients turned by planted rotations come back to their reference, in many tasks or in steps, from exact buffers.
int check_alignment_of(int m, int r, int n, int batch, int threads) {
    std::vector<float> B((size_t)batch * m * r), A((size_t)batch * r * n), BQ(B.size(), NAN), QA(A.size(), NAN), reference((size_t)r * n);
    for (float &x : reference) x = (float)random_number();
    for (float &x : B) x = (float)random_number();
    for (int b = 0; b < batch; ++b)
        for (int i = 0; i < r; ++i)  // rows go round, one sign makes it a rotation where the order is odd
            for (int j = 0; j < n; ++j) A[((size_t)b * r + i) * n + j] = (i == 0 && r % 2 == 0 ? -1 : 1) * reference[(size_t)((i + 1) % r) * n + j];
    Answers got(r, batch);
    const fedlora::Rotations to = got.blocks();
    const auto block = [&](std::vector<float> &x, int rows, int cols, bool one) {
        return fedlora_block{(int64_t)x.data(), rows, cols, cols, 1, FEDLORA_FLOAT32, batch, one ? 0 : (int64_t)rows * cols};
    };
    const fedlora_block b = block(B, m, r, false), a = block(A, r, n, false), target = block(reference, r, n, true), left = block(BQ, m, r, false),
                        right = block(QA, r, n, false);
    const fedlora_block *table = (const fedlora_block *)&to;
    int64_t bytes = 0;
    if (fedlora_align_factors_workspace(&b, &a, nullptr, &target, 2.0, 0.0, &left, &right, table, 1, threads, &bytes)) return 1;
    std::vector<char> workspace(bytes, (char)0xff);
    if (fedlora_align_factors(&b, &a, nullptr, &target, 2.0, 0.0, &left, &right, table, 1, 1, 1.0, workspace.data(), bytes - 1, threads, nullptr) !=
        FEDLORA_BAD_WORKSPACE)
        return 1;
    if (fedlora_align_factors(&b, &a, nullptr, &target, 2.0, 0.0, &left, &right, table, 1, 1, 1.0, workspace.data(), bytes, threads, nullptr)) return 1;
    int wrong = 0;
    for (const int32_t code : got.info) wrong += code != 0;
    for (int i = 0; i < batch; ++i)
        for (int e = 0; r <= n && e < r * n; ++e) wrong += !(std::fabs(QA[(size_t)i * r * n + e] - reference[e]) <= 1e-6);
    for (const float x : BQ) wrong += !std::isfinite(x);
    return wrong;
}

}  // namespace

int check_alignment() {
    int failures = 0;
    for (const Isa &isa : variants()) {
        for (const int rows : {1, 3, 4, 9})
            for (const int cols : {1, 4, 6})
                for (const int count : {0, 8, 64}) {
                    failures += check_dots(isa.dots.wide, rows, cols, count) != 0;
                    failures += check_dots(isa.dots.single, rows, cols, count) != 0;
                }
        for (const int r : {1, 2, 3, 4, 5, 8, 13, 16, 17, 24, 32, 33, 50})
            for (const int count : {1, 2, 7, 16, 33, 100})
                for (const bool by_columns : {false, true})
                    for (const int shift : {0, 1})
                        for (const bool poisoned : {false, true}) {
                            failures += check_turn(isa.turn.single, count, r, by_columns, shift, poisoned) != 0;
                            failures += check_turn(isa.turn.wide, count, r, by_columns, shift, poisoned) != 0;
                        }
        for (const int r : {1, 2, 3, 8, 9, 17, 32})
            for (const int batch : {1, 5, 19})
                for (const bool special : {false, true})
                    for (const double blend : {0.0, 0.5, 1.0}) failures += check_polar(isa.polar, r, batch, special, blend) != 0;
    }
    for (const int r : {33, 70}) failures += check_polar(fedlora::polar(r), r, 5, true, 1.0) != 0;
    for (const int r : {1, 4, 5, 16, 33})
        for (const int batch : {0, 1, 3, 150})
            for (const int threads : {1, 2}) {
                if (r > 16 && batch > 3) continue;
                failures += check_alignment_of(37, r, 40, batch, threads) != 0;
                if (batch == 1) failures += check_alignment_of(2049, r, 4100, batch, threads) != 0;
            }
    std::printf("alignment:");
    for (const Isa &isa : variants()) std::printf(" %s", isa.name);
    std::printf("; %d problems wrong\n", failures);
    return failures;
}
