// fedlora_core_svd: checks the descriptors and shares the matrices out over the schemes.
#include "svd.cuh"

namespace fedlora {
namespace {

std::vector<SvdGroup> those(const std::vector<SvdGroup> &groups, bool small) {
    std::vector<SvdGroup> chosen;
    for (const SvdGroup &group : groups)
        if (!is_empty(group) && is_small(group) == small) chosen.push_back(group);
    return chosen;
}

int check_input(const fedlora_block &C) {
    if (C.dtype != FEDLORA_FLOAT32 && C.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
    const bool served = C.rows >= 0 && C.cols >= 0 && C.batch >= 0 && C.rows <= FEDLORA_CORE_SVD_MAX &&
                        C.cols <= FEDLORA_CORE_SVD_MAX;
    return served ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

bool has_shape(const fedlora_block &block, int64_t rows, int64_t cols, int64_t batch) {
    return block.rows == rows && block.cols == cols && block.batch == batch;
}

int check(const SvdGroup &g) {
    if (const int status = check_input(g.C)) return status;
    const int64_t p = g.C.rows, q = g.C.cols, k = p < q ? p : q, batch = g.C.batch;
    if (!has_shape(g.U, p, k, batch) || !has_shape(g.S, 1, k, batch) || !has_shape(g.Vh, k, q, batch) ||
        !has_shape(g.info, 1, 1, batch) || !has_shape(g.notes, 1, 1, batch))
        return FEDLORA_BAD_SHAPE;
    if (g.U.dtype != g.C.dtype || g.S.dtype != g.C.dtype || g.Vh.dtype != g.C.dtype || g.info.dtype != FEDLORA_INT32 ||
        g.notes.dtype != FEDLORA_INT32)
        return FEDLORA_BAD_DTYPE;
    return FEDLORA_OK;
}

} // namespace

CoreSvd::CoreSvd(const std::vector<SvdGroup> &groups, Workspace &workspace, Upload &upload)
    : small_(those(groups, true), workspace, upload), block_(those(groups, false), workspace, upload) {}

void CoreSvd::launch(int64_t max_sweeps, void *stream) const {
    small_.launch(max_sweeps, stream);
    block_.launch(max_sweeps, stream);
}

} // namespace fedlora

extern "C" {

int fedlora_core_svd_workspace(const fedlora_block *C, int64_t groups, int64_t threads, int64_t *bytes) {
    if (!C || !bytes || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    std::vector<fedlora::SvdGroup> all;
    for (int64_t g = 0; g < groups; ++g) {
        if (const int status = fedlora::check_input(C[g])) return status;
        all.push_back({C[g], {}, {}, {}, {}, {}, nullptr});
    }
    fedlora::Workspace workspace;
    fedlora::Upload upload(workspace);
    fedlora::CoreSvd(all, workspace, upload);
    *bytes = workspace.bytes();
    return FEDLORA_OK;
}

int fedlora_core_svd(const fedlora_block *C, const fedlora_block *U, const fedlora_block *S, const fedlora_block *Vh,
                     const fedlora_block *info, const fedlora_block *notes, int64_t groups, int64_t max_sweeps, void *workspace,
                     int64_t workspace_bytes, int64_t threads, void *stream) {
    if (!C || !U || !S || !Vh || !info || !notes || groups < 0 || max_sweeps < 0 || max_sweeps > 1000000 || threads < 1)
        return FEDLORA_BAD_ARGUMENT;
    std::vector<fedlora::SvdGroup> all;
    for (int64_t g = 0; g < groups; ++g) {
        all.push_back({C[g], U[g], S[g], Vh[g], info[g], notes[g], nullptr});
        if (const int status = fedlora::check(all.back())) return status;
    }
    if (!workspace) return FEDLORA_BAD_WORKSPACE;
    fedlora::Workspace room(workspace, workspace_bytes);
    fedlora::Upload upload(room);
    const fedlora::CoreSvd svd(all, room, upload);
    if (!room.fits()) return FEDLORA_BAD_WORKSPACE;
    upload.send(stream);
    svd.launch(max_sweeps, stream);
    return fedlora::finish();
}

} // extern "C"
