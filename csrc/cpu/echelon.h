// Row-echelon form of a small triangle (docs/numerics.md, Stacked QR).
#pragma once

#include <cstdint>

namespace fedlora {

// F = [T | I] by rows, `rows` x (cols + rows) numbers of float64, T zero below its diagonal. Rows are reflected until T is in echelon form
// with positive leading entries, a column whose rest is at most `tolerance` being left out; answers the rank r. I becomes Q^T with
// T = Q (echelon form); rows from r on are zero in both. `scratch` holds cols + rows numbers.
int64_t echelon(double *F, int64_t rows, int64_t cols, double tolerance, double *scratch);

}  // namespace fedlora
