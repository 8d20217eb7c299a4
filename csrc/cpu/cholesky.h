// Pivoted Cholesky elimination of one Gram, as fedlora_cholesky and fedlora_product_svd call it.
#pragma once

#include <cstdint>

namespace fedlora {

// Distance of the columns of a factor of order R: whole cache lines, an odd number of them, so that equal rows of
// neighbouring columns do not meet in one set of the cache.
int64_t factor_stride(int64_t R);

// Numbers of float64 that an elimination works in beside the factor.
int64_t factor_scratch(int64_t R);

// L of G = L L^T (R x R, number (i, j) at G[i * row + j * col]) up to a remainder below width u max(diag G); answers its rank.
// Columns of L come in order of elimination, factor_stride(R) apart and with zeros between; there is room for R of them, and those
// from the rank on are not written. L and scratch start at multiples of 64 bytes.
int64_t pivoted_cholesky(const double *G, int64_t row, int64_t col, int64_t R, double width, double *L, double *scratch);

}  // namespace fedlora
