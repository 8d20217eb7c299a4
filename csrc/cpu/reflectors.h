// Householder reflections, eight at a time, on matrices that lie in panels of eight columns.
#pragma once

#include <cstdint>

#include "panel.h"

namespace fedlora {

constexpr int64_t kReflectors = 8;                     // of a block, and columns of a panel
constexpr int64_t kSquare = kReflectors * kReflectors;  // numbers of one panel's eight rows
constexpr int64_t kBlock = 2 * kSquare;                // what a block is besides the rows of U below its pivots

// A block is H_1 ... H_8 = I - U T U^T: first the eight rows of U at the pivots, lower triangular, then T^T, lower triangular. All rows
// have eight numbers, without gaps, and start at multiples of 64 bytes; panels lie `gap` numbers apart.
struct Reflectors {
    const char *isa;
    // [pivot; below] of one panel (8 and so many rows) becomes [R; U], R upper triangular with zeros below.
    void (*factor)(double *pivot, double *below, int64_t rows, double *block);
    // [pivot; below] of up to kGroup panels is multiplied with the block, or with its transpose.
    void (*apply)(const double *block, const double *U, int64_t rows, double *pivot, int64_t pivot_gap, double *below, int64_t gap,
                  int64_t width, bool transposed);
    // The same, not transposed, for one panel whose rows below are zero; what stands there is not read.
    void (*start)(const double *block, const double *U, int64_t rows, double *pivot, double *below);
    // A -= U W for up to kGroup panels of A, W (8 x 8) of each w_gap apart.
    void (*update)(double *A, int64_t gap, const double *U, int64_t rows, const double *W, int64_t w_gap, int64_t width);
};

#ifdef __x86_64__
const Reflectors &reflectors_v4();
const Reflectors &reflectors_v3();
#endif
const Reflectors &reflectors_base();

// Those for this machine.
const Reflectors &reflectors();

}  // namespace fedlora
