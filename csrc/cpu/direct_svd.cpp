// The direct SVD by way of the Jacobi kernels: all vectors at once, kept in the scratch.
#include "direct_svd.h"

#include "svd.h"

namespace fedlora {
namespace {

const SvdVariant &jacobi() {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return large_svd_v4();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return large_svd_v3();
#endif
    return large_svd_base();
}

struct Kept {
    int64_t rows, cols;
    int32_t info, notes;
    int64_t pad[5];

    double *U() { return (double *)(this + 1); }
    double *V() { return U() + rows * cols; }
    double *end() { return V() + (cols * cols + 7) / 8 * 8; }
};

fedlora_block block(const void *data, int64_t rows, int64_t cols, int64_t ld) {
    return {(int64_t)data, rows, cols, 1, ld, FEDLORA_FLOAT64, 1, 0};
}

int64_t scratch_bytes(int64_t rows, int64_t cols) {
    return (int64_t)sizeof(Kept) + (rows * cols + cols * cols + 16) * 8 + jacobi().scratch_bytes(block(nullptr, rows, cols, rows));
}

bool values(const double *C, int64_t ld, int64_t rows, int64_t cols, double *s, void *scratch) {
    Kept &kept = *(Kept *)scratch;
    kept.rows = rows;
    kept.cols = cols;
    fedlora_block Vh = block(kept.V(), cols, cols, cols);
    Vh.row_stride = cols;
    Vh.col_stride = 1;
    fedlora_block flag = block(&kept.info, 1, 1, 1);
    flag.dtype = FEDLORA_INT32;
    fedlora_block notes = flag;
    notes.data = (int64_t)&kept.notes;
    const uintptr_t rest = ((uintptr_t)kept.end() + 63) / 64 * 64;
    jacobi().run({block(C, rows, cols, ld), block(kept.U(), rows, cols, rows), block(s, 1, cols, 1), Vh, flag, notes}, 0, 0,
                 (void *)rest);
    return kept.info == 0;
}

bool vectors(int64_t p, double *U, int64_t ldu, double *V, int64_t ldv, void *scratch) {
    Kept &kept = *(Kept *)scratch;
    for (int64_t c = 0; c < p; ++c) {
        for (int64_t i = 0; i < kept.rows; ++i) U[c * ldu + i] = kept.U()[c * kept.rows + i];
        for (int64_t i = 0; i < kept.cols; ++i) V[c * ldv + i] = kept.V()[c * kept.cols + i];
    }
    return true;
}

}  // namespace

const DirectSvd &direct_svd() {
    static const DirectSvd chosen{jacobi().isa, scratch_bytes, values, vectors};
    return chosen;
}

}  // namespace fedlora
