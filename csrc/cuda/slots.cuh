// Work of many groups in one launch: slots (threads, warps or blocks, whatever a kernel counts) numbered group after group.
#pragma once

#include "runtime.cuh"

namespace fedlora {

// The group that has a slot: first[g] is where the slots of group g begin, count + 1 of them, rising from 0.
__device__ inline int64_t slot_group(const int64_t *first, int64_t count, int64_t slot) {
    int64_t low = 0, high = count;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (first[middle] <= slot)
            low = middle;
        else
            high = middle;
    }
    return low;
}

} // namespace fedlora
