// What the instruction-set variants of the direct SVD offer: norm-wise accurate values first, then as many vectors as wanted.
#pragma once

#include <cstdint>

namespace fedlora {

// For 1 <= cols <= rows <= FEDLORA_CORE_SVD_MAX. Matrices lie by columns, column c at C + c * ld. Scratch is aligned to 64
// bytes; it holds the factorisation between the two calls, so the second may come once or more, for any p <= cols.
struct DirectSvd {
    const char *isa;
    int64_t (*scratch_bytes)(int64_t rows, int64_t cols);
    // All singular values, falling, with an error of a few roundoffs of the largest. C: finite, not all zero, its largest element
    // scaled to about one. False: no answer.
    bool (*values)(const double *C, int64_t ld, int64_t rows, int64_t cols, double *s, void *scratch);
    // After values: the first p columns of U (rows x p) and V (cols x p), orthonormal, C V = U diag(s), to a few roundoffs.
    // Signs are arbitrary. False: clustered values, no answer.
    bool (*vectors)(int64_t p, double *U, int64_t ldu, double *V, int64_t ldv, void *scratch);
};

#ifdef __x86_64__
const DirectSvd &direct_svd_v4();
const DirectSvd &direct_svd_v3();
#endif
const DirectSvd &direct_svd_base();

// The one for this machine.
const DirectSvd &direct_svd();

}  // namespace fedlora
