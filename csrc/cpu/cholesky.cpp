// fedlora_cholesky: pivoted Cholesky factors of Gram matrices (docs/numerics.md, Pivoted Cholesky), a matrix to a thread.
#include "cholesky.h"

#include <omp.h>

#include "fedlora.h"

namespace {

constexpr double kRoundoff = 0x1p-53;
constexpr int64_t kAlignment = 64, kLanes = 8, kHigh = 8;

// Eight numbers; an instruction set with shorter vectors takes several.
typedef double Vec __attribute__((vector_size(64)));

int64_t vectors_of(int64_t R) { return (R + kLanes - 1) / kLanes; }

int64_t stride_of(int64_t R) { return vectors_of(R) | 1; }

struct Problem {
    const double *G;
    int64_t row, col, R;
    double width;
};

template <class T>
T *first_of(const fedlora_block &block, int64_t index) {
    return (T *)block.data + index * block.batch_stride;
}

// column -= sum_t L_t L_t[pivot], t < count, N vectors from `at` on.
template <int N>
inline __attribute__((always_inline)) void eliminate(Vec *column, const Vec *L, int64_t stride, int64_t at, int64_t count,
                                                     int64_t pivot) {
    Vec sum[N];
    for (int n = 0; n < N; ++n) sum[n] = column[at + n];
    for (int64_t t = 0; t < count; ++t) {
        const Vec *done = L + t * stride;
        const double factor = ((const double *)done)[pivot];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum[n] -= done[at + n] * factor;
    }
    for (int n = 0; n < N; ++n) column[at + n] = sum[n];
}

// Column after column, each from the row of G that has the largest diagonal left, the first of equal ones. Every comparison
// is written so that NaN ends the elimination.
inline __attribute__((always_inline)) int64_t factor(const Problem &p, Vec *scratch) {
    const int64_t R = p.R, stride = stride_of(R), vectors = vectors_of(R);
    double *diag = (double *)(scratch + R * stride), *live = diag + stride * kLanes;
    double largest = 0, probe = 0;
    for (int64_t i = 0; i < R; ++i) {
        diag[i] = p.G[i * (p.row + p.col)];
        live[i] = 1;
        probe += diag[i] - diag[i];
        largest = diag[i] > largest ? diag[i] : largest;
    }
    const double stop = largest * p.width * kRoundoff + probe;
    int64_t rank = 0;
    for (; rank < R; ++rank) {
        int64_t pivot = -1;
        bool sound = true;
        for (int64_t i = 0; i < R; ++i) {
            sound &= diag[i] == diag[i];
            if (live[i] != 0 && (pivot < 0 || diag[i] > diag[pivot])) pivot = i;
        }
        if (!(sound && diag[pivot] > stop)) break;
        Vec *column = scratch + rank * stride;
        double *element = (double *)column;
        for (int64_t i = 0; i < R; ++i) element[i] = p.G[pivot * p.row + i * p.col];
        for (int64_t i = R; i < vectors * kLanes; ++i) element[i] = 0;
        int64_t at = 0;
        for (; at + kHigh <= vectors; at += kHigh) eliminate<kHigh>(column, scratch, stride, at, rank, pivot);
        for (; at < vectors; ++at) eliminate<1>(column, scratch, stride, at, rank, pivot);
        const double root = __builtin_sqrt(diag[pivot]);
        for (int64_t i = 0; i < R; ++i) {
            element[i] = live[i] != 0 ? element[i] / root : 0;
            diag[i] -= element[i] * element[i];
        }
        element[pivot] = root;
        diag[pivot] = live[pivot] = 0;
    }
    return rank;
}

using Factor = int64_t (*)(const Problem &, Vec *);

int64_t factor_base(const Problem &p, Vec *scratch) { return factor(p, scratch); }

#ifdef __x86_64__
__attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))) int64_t factor_v4(const Problem &p, Vec *scratch) {
    return factor(p, scratch);
}
__attribute__((target("arch=x86-64-v3"))) int64_t factor_v3(const Problem &p, Vec *scratch) { return factor(p, scratch); }
#endif

Factor variant() {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return factor_v4;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return factor_v3;
#endif
    return factor_base;
}

int check(const fedlora_block &G, const fedlora_block &width, const fedlora_block &L) {
    if (G.dtype != FEDLORA_FLOAT64 || width.dtype != FEDLORA_FLOAT64 || L.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
    const bool fit = G.rows >= 0 && G.batch >= 0 && G.cols == G.rows && L.rows == G.rows && L.cols == G.rows &&
                     L.batch == G.batch && width.rows == 1 && width.cols == 1 && width.batch == G.batch;
    return fit ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

int64_t scratch_per_thread(const fedlora_block *G, int64_t groups) {
    int64_t most = 0;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t bytes = fedlora::factor_size(G[g].rows) * 8;
        most = bytes > most ? bytes : most;
    }
    return most;
}

int64_t matrices_of(const fedlora_block *G, int64_t groups) {
    int64_t matrices = 0;
    for (int64_t g = 0; g < groups; ++g) matrices += G[g].batch;
    return matrices;
}

// The factor to the caller's array, in tiles, with zeros from the rank on.
void store(const double *columns, int64_t rank, const fedlora_block &L, int64_t index) {
    constexpr int64_t tile = 8;
    const int64_t R = L.rows, stride = fedlora::factor_stride(R);
    double *const out = first_of<double>(L, index);
    for (int64_t i = 0; i < R; i += tile)
        for (int64_t k = 0; k < R; k += tile)
            for (int64_t kk = k; kk < k + tile && kk < R; ++kk)
                for (int64_t ii = i; ii < i + tile && ii < R; ++ii)
                    out[ii * L.row_stride + kk * L.col_stride] = kk < rank ? columns[kk * stride + ii] : 0;
}

void factor_group(const fedlora_block &G, const fedlora_block &width, const fedlora_block &L, double *scratch) {
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < G.batch; ++i) {
        const double *matrix = first_of<const double>(G, i), columns = *first_of<const double>(width, i);
        store(scratch, fedlora::pivoted_cholesky(matrix, G.row_stride, G.col_stride, G.rows, columns, scratch), L, i);
    }
}

}  // namespace

namespace fedlora {

int64_t factor_stride(int64_t R) { return stride_of(R) * kLanes; }

int64_t factor_size(int64_t R) { return factor_stride(R) * (R + 2); }

int64_t pivoted_cholesky(const double *G, int64_t row, int64_t col, int64_t R, double width, double *L) {
    static const Factor chosen = variant();
    return chosen({G, row, col, R, width}, (Vec *)L);
}

}  // namespace fedlora

extern "C" {

int fedlora_cholesky_workspace(const fedlora_block *G, int64_t groups, int64_t threads, int64_t *bytes) {
    if (!G || !bytes || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    for (int64_t g = 0; g < groups; ++g)
        if (G[g].rows < 0) return FEDLORA_BAD_SHAPE;
    *bytes = scratch_per_thread(G, groups) * threads + kAlignment;
    return FEDLORA_OK;
}

int fedlora_cholesky(const fedlora_block *G, const fedlora_block *width, const fedlora_block *L, int64_t groups,
                     void *workspace, int64_t workspace_bytes, int64_t threads, void *) {
    if (!G || !width || !L || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    for (int64_t g = 0; g < groups; ++g)
        if (const int status = check(G[g], width[g], L[g])) return status;
    const int64_t matrices = matrices_of(G, groups), slice = scratch_per_thread(G, groups);
    if (matrices == 0) return FEDLORA_OK;
    if (!workspace || workspace_bytes < slice * threads + kAlignment) return FEDLORA_BAD_WORKSPACE;
    const uintptr_t address = ((uintptr_t)workspace + kAlignment - 1) / kAlignment * kAlignment;

#pragma omp parallel num_threads((int)(matrices < threads ? matrices : threads))
    {
        double *scratch = (double *)(address + slice * omp_get_thread_num());
        for (int64_t g = 0; g < groups; ++g) factor_group(G[g], width[g], L[g], scratch);
    }
    return FEDLORA_OK;
}

}  // extern "C"
