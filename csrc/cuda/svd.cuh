// SVD of any groups of matrices, each by the scheme that its size asks for: what fedlora_core_svd is, and what the product and
// the rotations call for matrices of their own.
#pragma once

#include "block_svd.cuh"
#include "small_svd.cuh"

namespace fedlora {

// Neither reads the device's memory on the host. Where `active` leaves a matrix out, its blocks return at once.
class CoreSvd {
  public:
    // Groups may be empty; U, S and Vh may lie in the workspace.
    CoreSvd(const std::vector<SvdGroup> &groups, Workspace &workspace, Upload &upload);
    void launch(int64_t max_sweeps, void *stream) const;

  private:
    SmallSvd small_;
    BlockSvd block_;
};

} // namespace fedlora
