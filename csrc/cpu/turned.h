// X Q in the dtype of X, chunk by chunk: rotated factors.
#pragma once

#include <cstdint>

#include "../include/fedlora.h"

namespace fedlora {

// Answers of more bytes are written past the caches: they would not stay there.
constexpr int64_t kStreamed = 8 << 20;

// out = X Q for a batch of matrices, p x r times r x r float64; X and out of one float dtype. Float32 and narrower are multiplied in float32
// by Q rounded to it. Where Q is the identity to the bit, so is the answer X. Chunks may run at the same time, each with a scratch
// of its thread, which starts at a multiple of 64 bytes and need not be clean.
struct Turned {
    fedlora_block X, Q, out;

    int status() const;       // whether the descriptors fit each other
    int64_t chunks() const;   // of one matrix
    int64_t scratch() const;  // bytes that a thread needs, a multiple of 64
    // Whether everything written is finite. `stream`: past the caches, where nobody reads the answer soon.
    bool run(int64_t i, int64_t chunk, bool stream, void *scratch) const;
    bool finite(int64_t i) const;   // whether X is
    void spoil(int64_t i) const;    // NaN for all of out
};

}  // namespace fedlora
