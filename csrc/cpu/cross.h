// X^T Y of two blocks, chunk by chunk: what fedlora_cross_products runs, for callers with a parallel region of their own.
#pragma once

#include <cstdint>

#include "../include/fedlora.h"

namespace fedlora {

// X^T Y of a batch of pairs of matrices, p x q and p x r. Chunks of a pair may run at the same time, each with a scratch of its thread,
// which starts at a multiple of 64 bytes and need not be clean, and a place of its own for what it leaves.
struct Cross {
    fedlora_block X, Y;

    bool valid() const;
    int64_t chunks() const;   // of one pair, at least one
    int64_t leaving() const;  // numbers of float64 that a chunk leaves: products by rows, squared norms of X and Y, padding
    int64_t scratch() const;  // numbers of float64 that a thread needs, a multiple of 8
    // X and Y are divided by 2^exponent on the way.
    void run(int64_t i, int64_t chunk, int64_t exponent_X, int64_t exponent_Y, double *scratch, double *leaving) const;
    // Adds the other chunks to the first, in order; |X| |Y| of the pair, NaN or Inf where one is not finite.
    double add(double *leavings) const;
};

// What brings the largest number of matrix i into [1/2, 1): float64 alone leaves its range when squared, all else answers 0.
int64_t exponent_of(const fedlora_block &X, int64_t i);

}  // namespace fedlora
