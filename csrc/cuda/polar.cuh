// Rotations from correlations, in any number of groups: what fedlora_polar is (docs/numerics.md, Procrustes).
#pragma once

#include "polar_rule.cuh"
#include "svd.cuh"

namespace fedlora {

// Up to 32 x 32: a part of a warp each, by `TeamPolar` (team_polar.cuh), which other kernels may call as well.
class SmallPolar {
  public:
    SmallPolar(const std::vector<PolarGroup> &groups, const PolarOptions &options, Workspace &workspace, Upload &upload);
    void launch(void *stream) const;

  private:
    // The groups of one kernel, the blocks that they take, and which of their matrices the first launch leaves to the second.
    struct Share {
        const struct PolarScheme *scheme;
        GroupList<PolarGroup> list;
        int64_t blocks;
        int32_t *left;
    };
    PolarOptions options_;
    std::vector<Share> shares_;
};

// Beyond that: SVDs of whole matrices, and kernels between them. No launch for no matrices.
class LargePolar {
  public:
    LargePolar(const std::vector<PolarGroup> &groups, const PolarOptions &options, Workspace &workspace, Upload &upload);
    void launch(void *stream) const;

  private:
    LargePolar(const std::vector<struct LargePolarGroup> &groups, const PolarOptions &options, Workspace &workspace,
               Upload &upload);

    PolarOptions options_;
    int64_t matrices_;
    GroupList<LargePolarGroup> list_;
    CoreSvd first_, second_;
};

} // namespace fedlora
