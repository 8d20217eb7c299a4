// What the instruction-set variants of the small SVD offer to the entry point.
#pragma once

#include <cstdint>

#include "fedlora.h"

namespace fedlora {

// One group of equally shaped problems, as the caller described it.
struct SvdGroup {
    fedlora_block C, U, S, Vh, info, notes;
};

// A variant: how many matrices one task takes, the scratch of one task, and the task itself.
struct SmallSvd {
    const char *isa;
    int64_t (*matrices_per_task)(const fedlora_block &C);
    int64_t (*scratch_bytes)(const fedlora_block &C);
    void (*run)(const SvdGroup &group, int64_t first, int max_sweeps, void *scratch);
};

#ifdef __x86_64__
const SmallSvd &small_svd_v4();
const SmallSvd &small_svd_v3();
#endif
const SmallSvd &small_svd_base();

}  // namespace fedlora
