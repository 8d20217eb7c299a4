// What the instruction-set variants of the SVD of a bidiagonal matrix offer.
#pragma once

#include <cstdint>

namespace fedlora {

// B of order n, q its diagonal and e[k] right of q[k]; scratch is aligned to 64 bytes and holds what the calls share.
struct BidiagonalSvd {
    int64_t (*scratch_bytes)(int n);
    // All values, falling. False: they do not come to rest.
    bool (*values)(int n, const double *q, const double *e, double *s, void *scratch);
    // After values: the first p columns of U and V by rows, row k at U + k * ldu, padded with something to a multiple of 16
    // columns. False: clustered values.
    bool (*vectors_float)(int n, int p, float *U, int64_t ldu, float *V, int64_t ldv, void *scratch);
    bool (*vectors_double)(int n, int p, double *U, int64_t ldu, double *V, int64_t ldv, void *scratch);
};

#ifdef __x86_64__
const BidiagonalSvd &bidiagonal_v4();
const BidiagonalSvd &bidiagonal_v3();
#endif
const BidiagonalSvd &bidiagonal_base();

}  // namespace fedlora
