// Rank and certified errors of a spectrum (docs/numerics.md, Floor and certificate, Rank rules).
#pragma once

#include <cstdint>

namespace fedlora {

struct Rule {
    int64_t code;  // FEDLORA_RULE_ENERGY, ...
    double value;
    int64_t cap;  // 0: none
};

// What one pass knows of an update, all of it in a scale of 2^-e.
struct Spectrum {
    const double *s;  // `count` singular values, falling; zeros where the factors give no more
    int64_t count, live, width;  // columns that are not zero, and all columns
    double energy, energy_abs, floor, norm;
    int64_t e;
};

struct Certificate {
    int64_t rank, numerical_rank, notes;
    double error, error_bound, rho, sigma_err;
    bool doubtful;  // a second pass has to follow
};

// x 2^e, where 2^e itself may leave the range.
double scale_pow2(double x, int64_t e);

// e with 2^e <= |x| < 2^(e + 1); 0 where x is zero or not finite.
int64_t exponent_of(double x);

// Exactly 2^e, for exponents of normal numbers; others are clamped to them.
double pow2(int64_t e);

Certificate certify(const Spectrum &spectrum, const Rule &rule, double rho_max);

}  // namespace fedlora
