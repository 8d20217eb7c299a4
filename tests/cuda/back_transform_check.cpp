// The back-transform of one batch of pairs, for a test: it is part of fedlora_product_svd and has no entry of its own.
#include "mixed_sum.cuh"

extern "C" FEDLORA_API int check_back_transform(const fedlora_block *blocks, const fedlora_block *mixers, const fedlora_block *scales,
                                                const fedlora_block *out, int64_t count, const int32_t *ranks,
                                                const fedlora_block *info, const fedlora_block *notes) {
    using namespace fedlora;
    const MixedSum left = {blocks, mixers, count, scales[0], out[0], ranks};
    const MixedSum right = {blocks + count, mixers + count, count, scales[1], out[1], ranks};
    const std::vector<FactorPair> pairs = {{left, right, *info, *notes}};
    Workspace counted;
    Upload nothing(counted);
    BackTransform(pairs, counted, nothing);
    std::vector<char> memory((size_t)counted.bytes(), (char)0xff);
    Workspace workspace(memory.data(), counted.bytes());
    Upload upload(workspace);
    const BackTransform plan(pairs, workspace, upload);
    if (!workspace.fits()) return FEDLORA_BAD_WORKSPACE;
    upload.send(nullptr);
    plan.launch(nullptr);
    return finish();
}
