// fedlora_core_svd: checks the descriptors, picks the instruction set, shares the tasks out over threads.
#include <omp.h>

#include "pages.hpp"
#include "svd.h"

using fedlora::SvdGroup;
using fedlora::SvdVariant;

namespace {

constexpr int64_t kAlignment = 64;

struct Variants {
    const SvdVariant &small, &large;
};

const Variants &variants() {
    static const Variants chosen = [] {
#ifdef __x86_64__
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            return Variants{fedlora::small_svd_v4(), fedlora::large_svd_v4()};
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
            return Variants{fedlora::small_svd_v3(), fedlora::large_svd_v3()};
#endif
        return Variants{fedlora::small_svd_base(), fedlora::large_svd_base()};
    }();
    return chosen;
}

bool is_empty(const fedlora_block &C) { return C.batch == 0 || C.rows == 0 || C.cols == 0; }

int check_input(const fedlora_block &C) {
    if (C.dtype != FEDLORA_FLOAT32 && C.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
    const bool served = C.rows >= 0 && C.cols >= 0 && C.batch >= 0 && C.rows <= FEDLORA_CORE_SVD_MAX &&
                        C.cols <= FEDLORA_CORE_SVD_MAX;
    return served ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

bool has_shape(const fedlora_block &block, int64_t rows, int64_t cols, int64_t batch) {
    return block.rows == rows && block.cols == cols && block.batch == batch;
}

int check(const SvdGroup &g) {
    if (const int status = check_input(g.C)) return status;
    const int64_t p = g.C.rows, q = g.C.cols, k = p < q ? p : q, batch = g.C.batch;
    if (!has_shape(g.U, p, k, batch) || !has_shape(g.S, 1, k, batch) || !has_shape(g.Vh, k, q, batch) ||
        !has_shape(g.info, 1, 1, batch) || !has_shape(g.notes, 1, 1, batch))
        return FEDLORA_BAD_SHAPE;
    if (g.U.dtype != g.C.dtype || g.S.dtype != g.C.dtype || g.Vh.dtype != g.C.dtype ||
        g.info.dtype != FEDLORA_INT32 || g.notes.dtype != FEDLORA_INT32)
        return FEDLORA_BAD_DTYPE;
    return FEDLORA_OK;
}

// Scratch of one thread, a multiple of the alignment; 0 where no group needs any.
int64_t scratch_per_thread(const fedlora_block *C, int64_t groups) {
    int64_t most = 0;
    for (int64_t g = 0; g < groups; ++g) {
        if (is_empty(C[g])) continue;
        const int64_t bytes = fedlora::svd_variant(C[g]).scratch_bytes(C[g]);
        most = bytes > most ? bytes : most;
    }
    return (most + kAlignment - 1) / kAlignment * kAlignment;
}

int64_t tasks_of(const fedlora_block &C) {
    const int64_t step = fedlora::svd_variant(C).matrices_per_task(C);
    return is_empty(C) ? 0 : (C.batch + step - 1) / step;
}

// No more threads than tasks: a thread without work only costs its wake-up.
int useful_threads(const fedlora_block *C, int64_t groups, int64_t threads) {
    int64_t tasks = 0;
    for (int64_t g = 0; g < groups; ++g) tasks += tasks_of(C[g]);
    return (int)(tasks < threads ? tasks : threads);
}

// All tasks of one group, shared by the threads of the enclosing region; nobody waits at the end.
void run_group(const SvdGroup &group, int max_sweeps, char *scratch) {
    const int64_t step = fedlora::svd_variant(group.C).matrices_per_task(group.C);
    const int64_t tasks = tasks_of(group.C);
#pragma omp for schedule(dynamic) nowait
    for (int64_t t = 0; t < tasks; ++t) fedlora::svd_variant(group.C).run(group, t * step, max_sweeps, scratch);
}

}  // namespace

const SvdVariant &fedlora::svd_variant(const fedlora_block &C) {
    return C.rows <= kSmallSvdMax && C.cols <= kSmallSvdMax ? variants().small : variants().large;
}

extern "C" {

uint64_t fedlora_abi(void) { return FEDLORA_ABI_STAMP; }

const char *fedlora_isa(void) { return variants().small.isa; }

int fedlora_core_svd_workspace(const fedlora_block *C, int64_t groups, int64_t threads, int64_t *bytes) {
    if (!C || !bytes || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    for (int64_t g = 0; g < groups; ++g)
        if (const int status = check_input(C[g])) return status;
    *bytes = scratch_per_thread(C, groups) * threads + kAlignment;
    return FEDLORA_OK;
}

int fedlora_core_svd(const fedlora_block *C, const fedlora_block *U, const fedlora_block *S, const fedlora_block *Vh,
                     const fedlora_block *info, const fedlora_block *notes, int64_t groups, int64_t max_sweeps,
                     void *workspace, int64_t workspace_bytes, int64_t threads, void *) {
    if (!C || !U || !S || !Vh || !info || !notes || groups < 0 || max_sweeps < 0 || max_sweeps > 1000000 || threads < 1)
        return FEDLORA_BAD_ARGUMENT;
    for (int64_t g = 0; g < groups; ++g)
        if (const int status = check({C[g], U[g], S[g], Vh[g], info[g], notes[g]})) return status;
    const int64_t slice = scratch_per_thread(C, groups);
    if (slice == 0) return FEDLORA_OK;
    if (!workspace || workspace_bytes < slice * threads + kAlignment) return FEDLORA_BAD_WORKSPACE;
    const uintptr_t address = ((uintptr_t)workspace + kAlignment - 1) / kAlignment * kAlignment;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t element = C[g].dtype == FEDLORA_FLOAT32 ? 4 : 8;
        fedlora::prefer_huge_pages({{U[g], element}, {S[g], element}, {Vh[g], element}});
    }

#pragma omp parallel num_threads(useful_threads(C, groups, threads))
    {
        char *scratch = (char *)address + slice * omp_get_thread_num();
        for (int64_t g = 0; g < groups; ++g)
            run_group({C[g], U[g], S[g], Vh[g], info[g], notes[g]}, (int)max_sweeps, scratch);
    }
    return FEDLORA_OK;
}

}  // extern "C"
