// Blocks times small matrices, chunk by chunk: what fedlora_mixed_sum runs, for callers with a parallel region of their own.
#pragma once

#include <cstdint>

#include "../include/fedlora.h"
#include "partial.h"

namespace fedlora {

// sum = sum_k X_k diag(scale_k) M_k for a batch of matrices, as fedlora_mixed_sum has it. Chunks write their own rows of the sum
// and may run at the same time, each with a scratch of its thread, which starts at a multiple of 64 bytes and need not be clean.
struct MixedSum {
    const fedlora_block *X, *mixers;
    int64_t count;
    fedlora_block scale;  // 1 x R float64, R the columns of all blocks; without rows, columns stay as they are
    fedlora_block sum;

    int status() const;       // whether the descriptors fit each other
    int64_t chunks() const;   // of one matrix
    int64_t scratch() const;  // numbers of float64 that a thread needs, a multiple of 8; enough for fewer columns
    // What the chunk says of the matrix goes to partial.
    void run(int64_t i, int64_t chunk, double *scratch, Partial &partial) const;
};

}  // namespace fedlora
