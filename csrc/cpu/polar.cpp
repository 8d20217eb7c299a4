// fedlora_polar: checks the descriptors, picks the variant, shares the tasks out over threads.
#include <omp.h>

#include "polar.h"
#include "svd.h"

using fedlora::Correlations;
using fedlora::polar;
using fedlora::PolarOptions;
using fedlora::Rotations;

namespace {

bool is(const fedlora_block &b, int64_t rows, int64_t cols, int64_t batch, int64_t dtype) {
    return b.rows == rows && b.cols == cols && b.batch == batch && b.dtype == dtype;
}

int check(const Correlations &from, const Rotations &to) {
    const int64_t r = from.M.rows, batch = from.M.batch;
    if (r < 0 || batch < 0 || r > FEDLORA_CORE_SVD_MAX || !is(from.M, r, r, batch, FEDLORA_FLOAT64)) return FEDLORA_BAD_SHAPE;
    if (!is(from.size, 1, 1, batch, FEDLORA_FLOAT64) || !is(from.exponent, 1, 1, batch, FEDLORA_INT32)) return FEDLORA_BAD_SHAPE;
    return fedlora::check_rotations(to, r, batch);
}

int64_t tasks_of(const fedlora_block &M) {
    const int64_t step = polar(M.rows).matrices_per_task(M.rows);
    return (M.batch + step - 1) / step;
}

int64_t slice_of(const fedlora_block *M, int64_t groups) {
    int64_t most = 0;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t bytes = polar(M[g].rows).scratch_bytes(M[g].rows);
        most = bytes > most ? bytes : most;
    }
    return most;
}

int useful_threads(const fedlora_block *M, int64_t groups, int64_t threads) {
    int64_t tasks = 1;
    for (int64_t g = 0; g < groups; ++g) tasks += tasks_of(M[g]);
    return (int)(tasks - 1 < threads ? (tasks > 1 ? tasks - 1 : 1) : threads);
}

void run_group(const Correlations &from, const Rotations &to, const PolarOptions &options, char *scratch) {
    const int64_t r = from.M.rows, step = polar(r).matrices_per_task(r), tasks = tasks_of(from.M);
#pragma omp for schedule(dynamic) nowait
    for (int64_t t = 0; t < tasks; ++t) {
        const int64_t first = t * step, left = from.M.batch - first;
        polar(r).run(from, to, options, first, left < step ? left : step, scratch);
    }
}

}  // namespace

namespace fedlora {

const PolarVariant &large_polar();

const PolarVariant &polar(int64_t r) {
#ifdef __x86_64__
    static const PolarVariant &small = []() -> const PolarVariant & {
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            return small_polar_v4();
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return small_polar_v3();
        return small_polar_base();
    }();
#else
    static const PolarVariant &small = small_polar_base();
#endif
    return r <= kSmallSvdMax ? small : large_polar();
}

int check_rotations(const Rotations &to, int64_t r, int64_t batch) {
    const bool fit = is(to.Q, r, r, batch, FEDLORA_FLOAT64) && is(to.singular_values, 1, r, batch, FEDLORA_FLOAT64) &&
                     is(to.unique, 1, 1, batch, FEDLORA_BOOL) && is(to.condition, 1, 1, batch, FEDLORA_FLOAT64) &&
                     is(to.info, 1, 1, batch, FEDLORA_INT32) && is(to.notes, 1, 1, batch, FEDLORA_INT32);
    return fit ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

}  // namespace fedlora

extern "C" {

int fedlora_polar_workspace(const fedlora_block *M, int64_t groups, int64_t threads, int64_t *bytes) {
    if (!M || !bytes || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    for (int64_t g = 0; g < groups; ++g)
        if (M[g].rows < 0 || M[g].rows > FEDLORA_CORE_SVD_MAX || M[g].batch < 0) return FEDLORA_BAD_SHAPE;
    *bytes = slice_of(M, groups) * threads + 64;
    return FEDLORA_OK;
}

int fedlora_polar(const fedlora_block *M, const fedlora_block *size, const fedlora_block *exponent, const double *unit,
                  const fedlora_block *rotations, int64_t groups, int64_t special, double blend, void *workspace, int64_t workspace_bytes,
                  int64_t threads, void *) {
    if (!M || !size || !exponent || !unit || !rotations || !workspace || groups < 0 || threads < 1 || !(blend >= 0 && blend <= 1))
        return FEDLORA_BAD_ARGUMENT;
    const Rotations *const to = (const Rotations *)rotations;
    for (int64_t g = 0; g < groups; ++g)
        if (const int status = check({M[g], size[g], exponent[g], unit[g]}, to[g])) return status;
    const int64_t slice = slice_of(M, groups);
    if (workspace_bytes < slice * threads + 64) return FEDLORA_BAD_WORKSPACE;
    char *const start = (char *)(((uintptr_t)workspace + 63) / 64 * 64);
#pragma omp parallel num_threads(useful_threads(M, groups, threads))
    for (int64_t g = 0; g < groups; ++g)
        run_group({M[g], size[g], exponent[g], unit[g]}, to[g], {special != 0, blend}, start + slice * omp_get_thread_num());
    return FEDLORA_OK;
}

}  // extern "C"
