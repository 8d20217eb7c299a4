// C += P Q in float64, the inner loop of mixed sums and cross products, as the instruction sets offer it.
#pragma once

#include <cstdint>

#include "../include/fedlora.h"
#include "partial.h"

namespace fedlora {

// Columns of C and Q are computed this many at a time: their rows are padded to it.
constexpr int64_t kPad = 8;

// Blocks of eight columns that a tile takes at once.
constexpr int64_t kGroup = 3;

// P is read number by number, (i, d) at P[i * row + d * step]; rows of C (rows x cols) and Q (depth x cols) lie ldc and
// ldq apart and start at multiples of 64 bytes. Every number of P Q is its own chain over d, in order and from zero, so it
// does not depend on where it stands, and long sums are sums of short ones.
struct Panel {
    const char *isa;
    void (*add)(double *C, int64_t ldc, const double *P, int64_t row, int64_t step, const double *Q, int64_t ldq, int64_t rows,
                int64_t depth, int64_t cols);
    // C = P^T Q, or more of it: P (depth x 8) and each of up to kGroup blocks of Q, gap apart, lie by rows without gaps; so
    // does C (8 x 8 width).
    void (*tile)(double *C, const double *P, const double *Q, int64_t gap, int64_t depth, int64_t width, bool more);
    // out[i * ld + j] = number (i, j) of X counted from the one at `offset`.
    void (*widen)(double *out, int64_t ld, const fedlora_block &X, int64_t offset, int64_t rows, int64_t cols);
    // Number (i, j) of S counted from the one at `offset` = x[i * ld + j], rounded (halves by way of float32), and what that
    // says of the matrix on top of what partial holds. Rows of x are read up to a multiple of the padding.
    void (*narrow)(const double *x, int64_t ld, const fedlora_block &S, int64_t offset, int64_t rows, int64_t cols,
                   Partial &partial);
};

#ifdef __x86_64__
const Panel &panel_v4();
const Panel &panel_v3();
#endif
const Panel &panel_base();

// The one for this machine.
const Panel &panel();

}  // namespace fedlora
