// fedlora_polar: checks the descriptors and shares the matrices out by size.
#include "polar.cuh"

namespace fedlora {
namespace {

bool is(const fedlora_block &b, int64_t rows, int64_t cols, int64_t batch, int64_t dtype) {
    return b.rows == rows && b.cols == cols && b.batch == batch && b.dtype == dtype;
}

int check(const PolarGroup &g) {
    const int64_t r = g.M.rows, batch = g.M.batch;
    if (r < 0 || batch < 0 || r > FEDLORA_CORE_SVD_MAX) return FEDLORA_BAD_SHAPE;
    const bool fit = is(g.M, r, r, batch, FEDLORA_FLOAT64) && is(g.size, 1, 1, batch, FEDLORA_FLOAT64) &&
                     is(g.exponent, 1, 1, batch, FEDLORA_INT32) && is(g.Q, r, r, batch, FEDLORA_FLOAT64) &&
                     is(g.singular_values, 1, r, batch, FEDLORA_FLOAT64) && is(g.unique, 1, 1, batch, FEDLORA_BOOL) &&
                     is(g.condition, 1, 1, batch, FEDLORA_FLOAT64) && is(g.info, 1, 1, batch, FEDLORA_INT32) &&
                     is(g.notes, 1, 1, batch, FEDLORA_INT32);
    return fit ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

std::vector<PolarGroup> those(const std::vector<PolarGroup> &groups, bool small) {
    std::vector<PolarGroup> chosen;
    for (const PolarGroup &group : groups)
        if (group.M.batch > 0 && (group.M.rows <= kSmallSvdMax) == small) chosen.push_back(group);
    return chosen;
}

// Both, as one plan.
struct Polar {
    SmallPolar small;
    LargePolar large;
    Polar(const std::vector<PolarGroup> &groups, const PolarOptions &options, Workspace &workspace, Upload &upload)
        : small(those(groups, true), options, workspace, upload), large(those(groups, false), options, workspace, upload) {}
};

} // namespace
} // namespace fedlora

extern "C" {

int fedlora_polar_workspace(const fedlora_block *M, int64_t groups, int64_t threads, int64_t *bytes) {
    if (!M || !bytes || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    std::vector<fedlora::PolarGroup> all;
    for (int64_t g = 0; g < groups; ++g) {
        if (M[g].rows < 0 || M[g].rows > FEDLORA_CORE_SVD_MAX || M[g].batch < 0) return FEDLORA_BAD_SHAPE;
        all.push_back({M[g], {}, {}, {}, {}, {}, {}, {}, {}, 0});
    }
    fedlora::Workspace workspace;
    fedlora::Upload upload(workspace);
    fedlora::Polar(all, {false, 1}, workspace, upload);
    *bytes = workspace.bytes();
    return FEDLORA_OK;
}

int fedlora_polar(const fedlora_block *M, const fedlora_block *size, const fedlora_block *exponent, const double *unit,
                  const fedlora_block *rotations, int64_t groups, int64_t special, double blend, void *workspace,
                  int64_t workspace_bytes, int64_t threads, void *stream) {
    if (!M || !size || !exponent || !unit || !rotations || !workspace || groups < 0 || threads < 1 || !(blend >= 0 && blend <= 1))
        return FEDLORA_BAD_ARGUMENT;
    std::vector<fedlora::PolarGroup> all;
    for (int64_t g = 0; g < groups; ++g) {
        const fedlora_block *const to = rotations + 6 * g;
        all.push_back({M[g], size[g], exponent[g], to[0], to[1], to[2], to[3], to[4], to[5], unit[g]});
        if (const int status = fedlora::check(all.back())) return status;
    }
    fedlora::Workspace room(workspace, workspace_bytes);
    fedlora::Upload upload(room);
    const fedlora::Polar polar(all, {special != 0, blend}, room, upload);
    if (!room.fits()) return FEDLORA_BAD_WORKSPACE;
    upload.send(stream);
    polar.small.launch(stream);
    polar.large.launch(stream);
    return fedlora::finish();
}

} // extern "C"
