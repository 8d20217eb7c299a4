// R and R^-1 of a well-conditioned stack from its Gram (docs/numerics.md, Stacked QR).
#pragma once

#include <cstdint>

namespace fedlora {

// G = U^T U of order R, in panels of eight columns: row i of panel p at p * gap() + 8 i, float64, from multiples of 64 bytes on. The
// last panel is filled up with rows and columns of the identity.
struct CholeskyQR {
    int64_t R;

    int64_t panels() const { return (R + 7) / 8; }
    int64_t gap() const { return 64 * panels() + 8; }
    int64_t size() const { return panels() * gap(); }
    int64_t at(int64_t i, int64_t j) const { return j / 8 * gap() + 8 * i + j % 8; }

    // U in place of G, of which only the upper triangle is read, and its inverse, negative, both with zeros below the diagonal. Answers
    // (|U|_F |U^-1|_F)^2, or infinity where G is not positive definite. `scratch` holds 64 panels() numbers.
    double factor(double *U, double *negative, double *scratch) const;
};

}  // namespace fedlora
