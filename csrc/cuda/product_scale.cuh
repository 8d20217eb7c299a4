// Powers of two that bring the columns of stacks into a range where squares are safe (docs/numerics.md, Balancing).
#pragma once

#include "spectrum.h"
#include "strips.cuh"

namespace fedlora {

constexpr int32_t kExponentOfZero = -10000; // below all others, so that a column of zeros never decides the scale

// A stack of which some matrices are scaled.
struct ScaleTask {
    StackReading reading;
    int64_t rows;
    const uint8_t *scaled; // of each matrix
    int32_t *exponents;    // batch x columns: 0 where a matrix is not scaled
    double *scale;         // 2^-exponent
};

// Tasks on the device, and where their share of the blocks begins.
struct ScaleList {
    const ScaleTask *tasks;
    const int64_t *first; // count + 1 of them, rising from 0
    int64_t count, blocks;
};

// A block for every 32 columns of every matrix, one launch: their largest numbers end up in [1, 2).
void scale_columns(const ScaleList &list, void *stream);

} // namespace fedlora
