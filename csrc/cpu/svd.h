// What the instruction-set variants of the SVD offer to the entry point.
#pragma once

#include <cstdint>

#include "fedlora.h"

namespace fedlora {

// Up to here a matrix fits a vector lane: the small SVD takes many matrices at once, the large one at a time.
constexpr int kSmallSvdMax = 32;

// One group of equally shaped problems, as the caller described it.
struct SvdGroup {
    fedlora_block C, U, S, Vh, info, notes;
};

// A variant: how many matrices one task takes, the scratch of one task, and the task itself.
struct SvdVariant {
    const char *isa;
    int64_t (*matrices_per_task)(const fedlora_block &C);
    int64_t (*scratch_bytes)(const fedlora_block &C);
    void (*run)(const SvdGroup &group, int64_t first, int max_sweeps, void *scratch);
};

// The one for matrices of this shape on this machine; p and q at most FEDLORA_CORE_SVD_MAX.
const SvdVariant &svd_variant(const fedlora_block &C);

#ifdef __x86_64__
const SvdVariant &small_svd_v4();
const SvdVariant &small_svd_v3();
const SvdVariant &large_svd_v4();
const SvdVariant &large_svd_v3();
#endif
const SvdVariant &small_svd_base();
const SvdVariant &large_svd_base();

}  // namespace fedlora
