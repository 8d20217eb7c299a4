// The sign rule over columns that are made in tiles of rows (docs/numerics.md, Sign rule).
//
// The first element of a column within a factor 1 - 2^-20 of its largest in magnitude decides. Magnitudes are compared as they
// are in 24 bits, where at most 24 of them lie in that window: a tile says which is its largest, and which sign the first one has
// that is no more than so many steps below it. The tile that decides is the first whose largest is in the window of the column.
#pragma once

#include "runtime.cuh"

namespace fedlora {

constexpr double kSignWindow = 1 - 0x1p-20;

// Exponent and 23 bits of fraction of a magnitude, above a bit for every step down from it: 1 where the first magnitude that is
// no more than so many steps below belongs to a negative number.
using SignRecord = uint64_t;
constexpr int kSignSteps = 29;
constexpr SignRecord kSteps = (SignRecord(1) << kSignSteps) - 1;

// A magnitude in 24 bits, to nearest even; those of float32 are as they are.
__device__ inline uint64_t magnitude_in_steps(double x) {
    const uint64_t bits = (uint64_t)__double_as_longlong(x) & 0x7fffffffffffffffull;
    return (bits + ((1ull << (kSignSteps - 1)) - 1) + (bits >> kSignSteps & 1)) >> kSignSteps;
}

__device__ inline double magnitude_of(uint64_t steps) { return __longlong_as_double((long long)(steps << kSignSteps)); }

// Two parts of a column, the first one above.
__device__ inline SignRecord joined(SignRecord first, SignRecord second) {
    const uint64_t one = first >> kSignSteps, two = second >> kSignSteps;
    if (one >= two) return first;
    const uint64_t apart = two - one;
    if (apart >= (uint64_t)kSignSteps) return second;
    const SignRecord below = (SignRecord(1) << apart) - 1; // these steps the first part does not reach
    return two << kSignSteps | (first << apart & kSteps & ~below) | (second & below);
}

// Of rows numbers that lie `step` apart; NaN does not count.
__device__ inline SignRecord sign_record(const double *x, int64_t step, int64_t rows) {
    double largest = 0.0;
    for (int64_t i = 0; i < rows; ++i) largest = fmax(largest, fabs(x[i * step]));
    const uint64_t top = magnitude_in_steps(largest);
    const double near = magnitude_of(top > (uint64_t)kSignSteps ? top - kSignSteps : 0); // few are as large
    SignRecord all = 0;
    for (int64_t i = 0; i < rows; ++i)
        if (fabs(x[i * step]) >= near) all = joined(all, magnitude_in_steps(x[i * step]) << kSignSteps | (x[i * step] < 0 ? kSteps : 0));
    return all;
}

// The least magnitude in the window of a column with this largest one.
__device__ inline uint64_t window_of(uint64_t top) {
    const double bar = kSignWindow * magnitude_of(top);
    uint64_t least = top > (uint64_t)kSignSteps ? top - kSignSteps + 1 : 0;
    while (magnitude_of(least) < bar) ++least;
    return least;
}

} // namespace fedlora
