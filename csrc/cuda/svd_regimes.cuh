// Who decomposes which matrix: groups of matrices as kernels see them, by size (docs/numerics.md, Core SVD).
//
// `SmallSvd` (small_svd.cuh) takes what fits the registers of a thread or of a part of a warp, `BlockSvd` (block_svd.cuh) all
// else, and `CoreSvd` (svd.cuh) shares any groups out between the two. Each is a plan with the same two steps:
//
//     Plan(const std::vector<SvdGroup> &groups, Workspace &workspace, Upload &upload); takes scratch and adds tables
//     void launch(int64_t max_sweeps, void *stream) const;  once the tables were sent; max_sweeps 0 takes the default
//
// Over a workspace without memory only the first is called. Nothing in either looks at the device's memory.
#pragma once

#include <vector>

#include "workspace.cuh"

namespace fedlora {

// Rows and columns up to here are the small scheme's.
constexpr int64_t kSmallSvdMax = 32;

// Equally shaped matrices C = U diag(S) Vh, as fedlora_core_svd describes them; float32 or float64 throughout.
struct SvdGroup {
    fedlora_block C, U, S, Vh, info, notes;
    const int32_t *active; // on the device, one per matrix: where it is 0 nothing is read or written; null: all are active
};

// SmallSvd takes these; neither it nor BlockSvd is given empty groups.
inline bool is_small(const SvdGroup &group) { return group.C.rows <= kSmallSvdMax && group.C.cols <= kSmallSvdMax; }

inline bool is_empty(const SvdGroup &group) { return group.C.batch == 0 || group.C.rows == 0 || group.C.cols == 0; }

// Groups on the device, and where their share of the slots (threads, teams or blocks, whatever a kernel counts) begins.
template <class Group>
struct GroupList {
    const Group *groups;
    const int64_t *first; // count + 1 of them, rising from 0
    int64_t count;
};
using SvdList = GroupList<SvdGroup>;

template <class Group>
GroupList<Group> upload_groups(Upload &upload, const std::vector<Group> &groups, const std::vector<int64_t> &first) {
    return {upload.add(groups), upload.add(first), (int64_t)groups.size()};
}

// The group that has a slot.
template <class Group>
__device__ int64_t group_of(const GroupList<Group> &list, int64_t slot) {
    int64_t low = 0, high = list.count;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (list.first[middle] <= slot)
            low = middle;
        else
            high = middle;
    }
    return low;
}

__device__ inline bool is_active(const SvdGroup &group, int64_t matrix) { return !group.active || group.active[matrix] != 0; }

} // namespace fedlora
