// fedlora_tall_qr.
#include "tall_qr.cuh"

#include <algorithm>

#include "element.cuh"

namespace fedlora {
namespace {

constexpr int64_t kWidest = 16384; // so that a leaf is counted in 32 bits

struct Tables {
    const fedlora_block *X;
    const int64_t *counts;
    const fedlora_block *scale, *Q, *R;
    int64_t groups;

    int status(int64_t g, const fedlora_block *blocks) const {
        for (const fedlora_block &numbers : {Q[g], R[g], scale[g]})
            if (numbers.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
        if (counts[g] < 1 || Q[g].batch < 0 || Q[g].rows < 1 || R[g].cols < 1) return FEDLORA_BAD_SHAPE;
        int64_t width = 0;
        for (const fedlora_block *block = blocks; block < blocks + counts[g]; ++block) {
            if (!is_float(block->dtype)) return FEDLORA_BAD_DTYPE;
            if (block->batch != Q[g].batch || block->rows != Q[g].rows || block->cols < 0) return FEDLORA_BAD_SHAPE;
            width += block->cols;
        }
        if (width > kWidest) return FEDLORA_BAD_SHAPE;
        const int64_t least = std::min(Q[g].rows, width);
        const bool fit = R[g].cols == width && R[g].rows == least && R[g].batch == Q[g].batch && Q[g].cols == least &&
                         scale[g].rows == 1 && scale[g].cols == width && scale[g].batch == Q[g].batch;
        return fit ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
    }
    int status() const {
        const fedlora_block *blocks = X;
        for (int64_t g = 0; g < groups; blocks += counts[g], ++g)
            if (const int found = status(g, blocks)) return found;
        return FEDLORA_OK;
    }
};

// The layout of a call, and the call itself where there is memory for it.
int run(const Tables &tables, Workspace &workspace, void *stream) {
    if (const int status = tables.status()) return status;
    std::vector<TallStack> stacks;
    std::vector<TallProduct> products;
    const fedlora_block *blocks = tables.X;
    for (int64_t g = 0; g < tables.groups; blocks += tables.counts[g], ++g) {
        products.push_back({(int64_t)stacks.size(), {}, tables.Q[g], nullptr, true});
        stacks.push_back({blocks, tables.counts[g], tables.scale[g], tables.R[g], nullptr, true});
    }
    Upload upload(workspace);
    const TallQR qr(stacks, workspace, upload);
    const TallProducts Q(qr, products, workspace, upload);
    if (!workspace.real()) return FEDLORA_OK;
    if (!workspace.fits()) return FEDLORA_BAD_WORKSPACE;
    upload.send(stream);
    qr.launch(stream);
    Q.launch(stream);
    return finish();
}

} // namespace
} // namespace fedlora

extern "C" {

int fedlora_tall_qr_workspace(const fedlora_block *X, const int64_t *counts, const fedlora_block *scale, const fedlora_block *Q,
                              const fedlora_block *R, int64_t groups, int64_t threads, int64_t *bytes) {
    if (!X || !counts || !scale || !Q || !R || !bytes || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    fedlora::Workspace workspace;
    const int status = fedlora::run({X, counts, scale, Q, R, groups}, workspace, nullptr);
    *bytes = workspace.bytes();
    return status;
}

int fedlora_tall_qr(const fedlora_block *X, const int64_t *counts, const fedlora_block *scale, const fedlora_block *Q,
                    const fedlora_block *R, int64_t groups, void *memory, int64_t bytes, int64_t threads, void *stream) {
    if (!X || !counts || !scale || !Q || !R || !memory || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    fedlora::Workspace workspace(memory, bytes);
    return fedlora::run({X, counts, scale, Q, R, groups}, workspace, stream);
}

} // extern "C"
