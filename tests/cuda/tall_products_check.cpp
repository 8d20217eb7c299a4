// The QR of one batch of stacks and products with its Q, for a test: they are part of fedlora_product_svd and have no entry of
// their own.
#include "tall_qr.cuh"

extern "C" FEDLORA_API int check_tall_products(const fedlora_block *blocks, int64_t count, const fedlora_block *scale,
                                               const fedlora_block *R, const int32_t *active, const fedlora_block *C,
                                               const fedlora_block *out, int64_t products, const int32_t *ranks,
                                               const int32_t *triangular) {
    using namespace fedlora;
    const std::vector<TallStack> stacks = {{blocks, count, *scale, *R, active, true}};
    std::vector<TallProduct> turned;
    for (int64_t k = 0; k < products; ++k) turned.push_back({0, C[k], out[k], ranks, false, triangular});
    const auto plan = [&](Workspace &workspace, Upload &upload) {
        const TallQR qr(stacks, workspace, upload);
        const TallProducts all(qr, turned, workspace, upload);
        if (!workspace.real() || !workspace.fits()) return;
        upload.send(nullptr);
        qr.launch(nullptr);
        all.launch(nullptr);
    };
    Workspace counted;
    Upload nothing(counted);
    plan(counted, nothing);
    std::vector<char> memory((size_t)counted.bytes(), (char)0xff);
    Workspace workspace(memory.data(), counted.bytes());
    Upload upload(workspace);
    plan(workspace, upload);
    return workspace.fits() ? finish() : FEDLORA_BAD_WORKSPACE;
}
