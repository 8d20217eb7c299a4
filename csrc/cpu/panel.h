// C += P Q in float64, the inner loop of mixed sums and cross products, as the instruction sets offer it.
#pragma once

#include <cstdint>

namespace fedlora {

// Columns of C and Q are computed this many at a time: their rows are padded to it.
constexpr int64_t kPad = 8;

// P is read number by number, (i, d) at P[i * row + d * step]; rows of C (rows x cols) and Q (depth x cols) lie ldc and
// ldq apart and start at multiples of 64 bytes. Every number of P Q is its own chain over d, in order and from zero, so it
// does not depend on where it stands, and long sums are sums of short ones.
struct Panel {
    const char *isa;
    void (*add)(double *C, int64_t ldc, const double *P, int64_t row, int64_t step, const double *Q, int64_t ldq, int64_t rows,
                int64_t depth, int64_t cols);
};

#ifdef __x86_64__
const Panel &panel_v4();
const Panel &panel_v3();
#endif
const Panel &panel_base();

// The one for this machine.
const Panel &panel();

}  // namespace fedlora
