// X^T X of blocks side by side, chunk by chunk: what fedlora_gram runs, for callers with a parallel region of their own.
#pragma once

#include <cstdint>

#include "../include/fedlora.h"

namespace fedlora {

// G = X^T X of X = [X_1 | ... | X_count] diag(scale) for a batch of matrices, as fedlora_gram has it. Chunks of a matrix may
// run at the same time, each with a scratch of its thread and a place of its own for what it leaves; both start at multiples
// of 64 bytes and need not be clean. Then they are added in order, by one thread at a time for a matrix.
struct Gram {
    const fedlora_block *X;
    int64_t count;
    fedlora_block scale;  // 1 x R float64; without rows, columns stay as they are
    fedlora_block G;

    int status() const;       // whether the descriptors fit each other
    int64_t chunks() const;   // of one matrix, at least one
    int64_t leaving() const;  // numbers of float64 that a chunk leaves, a multiple of 8
    int64_t scratch() const;  // numbers of float64 that a thread needs, a multiple of 8
    void run(int64_t i, int64_t chunk, double *scratch, double *leaving) const;
    // The first chunk overwrites G_i, the last one makes it whole.
    void add(int64_t i, int64_t chunk, const double *leaving) const;
};

}  // namespace fedlora
