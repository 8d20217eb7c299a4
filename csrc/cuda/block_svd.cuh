// SVD of matrices beyond 32 rows or columns, up to 512, one block of threads to each: float32 and float64 (docs/numerics.md, Core SVD).
//
// What fits into shared memory decides where a matrix is kept meanwhile; with it may change how its columns are paired, and so its last
// bits. Nothing else does.
#pragma once

#include "svd_regimes.cuh"

namespace fedlora {

// What is kept of a matrix meanwhile takes at most half of the shared memory, so that two blocks or more share a processor; up to all
// of it; or lies in global memory, all but the columns at hand.
enum class BlockRoom { half, all, none };

struct BlockTask {
    SvdList list;
    int64_t matrices;
    unsigned char *scratch;
    int64_t scratch_bytes; // of a block
    int64_t shared_bytes;  // what a block may have
};

// One launch.
struct BlockSvdShare {
    BlockTask task;
    BlockRoom room;
    int64_t dtype, dynamic_bytes;
    int threads, blocks;
};

class BlockSvd {
  public:
    BlockSvd(const std::vector<SvdGroup> &groups, Workspace &workspace, Upload &upload);
    // As many launches as there are kinds of matrices: of two dtypes, small beside shared memory, filling it, beyond it.
    void launch(int64_t max_sweeps, void *stream) const;

  private:
    std::vector<BlockSvdShare> shares_;
};

} // namespace fedlora
