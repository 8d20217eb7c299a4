// SVD of matrices of up to 32 rows and columns: many of them at once in registers (docs/numerics.md, Core SVD).
#pragma once

#include "svd_regimes.cuh"

namespace fedlora {

class SmallSvd {
  public:
    SmallSvd(const std::vector<SvdGroup> &groups, Workspace &workspace, Upload &upload);
    void launch(int64_t max_sweeps, void *stream) const;

  private:
    // The groups of one kernel, and the blocks that they take.
    struct Share {
        const struct SmallScheme *scheme;
        SvdList list;
        int64_t blocks;
    };
    std::vector<Share> shares_;
};

} // namespace fedlora
