// fedlora_cholesky: pivoted Cholesky factors of Gram matrices, a block to a matrix (docs/numerics.md, Pivoted Cholesky).
#include "cholesky.cuh"

#include <algorithm>

#include "element.cuh"
#include "slots.cuh"
#include "workspace.cuh"

namespace fedlora {
namespace {

struct CholeskyGroup {
    fedlora_block G, width, L;
    double *left, *beside; // where shared memory does not have them: what is left of each G, and what it is worked on with
};

__global__ void __launch_bounds__(kCholeskyThreads) factor_grams(const CholeskyGroup *groups, const int64_t *first, int64_t count) {
    FEDLORA_DYNAMIC_SHARED(double, shared);
    const int64_t g = slot_group(first, count, blockIdx.x), at = (int64_t)blockIdx.x - first[g];
    const CholeskyGroup &group = groups[g];
    const fedlora_block &G = group.G, &L = group.L;
    const int64_t R = G.rows;
    const double *const from = address<const double>(G, at);
    double *const left = group.left ? group.left + at * R * R : shared;
    double *const beside = group.beside ? group.beside + at * cholesky::beside(R) : group.left ? shared : shared + R * R;
    for (int64_t n = threadIdx.x; n < R * R; n += blockDim.x) left[n] = from[n / R * G.row_stride + n % R * G.col_stride];
    __syncthreads();
    pivoted_cholesky(left, R, (int)R, *address<const double>(group.width, at), beside, address<double>(L, at), L.row_stride, L.col_stride);
}

class CholeskyPlan {
  public:
    CholeskyPlan(const fedlora_block *G, const fedlora_block *width, const fedlora_block *L, int64_t groups, Workspace &workspace,
                 Upload &upload) {
        std::vector<CholeskyGroup> all;
        std::vector<int64_t> first = {0};
        const int64_t room = limits().shared_bytes;
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t R = G[g].rows, batch = G[g].batch, beside = cholesky::beside(R);
            if (R == 0 || batch == 0) continue;
            const bool whole = (R * R + beside) * 8 <= room, part = beside * 8 <= room;
            all.push_back({G[g], width ? width[g] : G[g], L ? L[g] : G[g], whole ? nullptr : workspace.take<double>(batch * R * R),
                           part ? nullptr : workspace.take<double>(batch * beside)});
            first.push_back(first.back() + batch);
            shared_bytes_ = std::max(shared_bytes_, whole ? (R * R + beside) * 8 : part ? beside * 8 : 0);
        }
        matrices = first.back();
        count_ = (int64_t)all.size();
        groups_ = upload.add(all);
        first_ = upload.add(first);
    }
    void launch(void *stream) const {
        fedlora::launch(factor_grams, dim3((unsigned)matrices), dim3(kCholeskyThreads), shared_bytes_, stream, groups_, first_, count_);
    }
    int64_t matrices;

  private:
    const CholeskyGroup *groups_;
    const int64_t *first_; // matrix of each group
    int64_t count_, shared_bytes_ = 0;
};

int check(const fedlora_block &G, const fedlora_block &width, const fedlora_block &L) {
    if (G.dtype != FEDLORA_FLOAT64 || width.dtype != FEDLORA_FLOAT64 || L.dtype != FEDLORA_FLOAT64) return FEDLORA_BAD_DTYPE;
    const bool fit = G.rows >= 0 && G.batch >= 0 && G.cols == G.rows && L.rows == G.rows && L.cols == G.rows &&
                     L.batch == G.batch && width.rows == 1 && width.cols == 1 && width.batch == G.batch;
    return fit ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

} // namespace
} // namespace fedlora

extern "C" {

int fedlora_cholesky_workspace(const fedlora_block *G, int64_t groups, int64_t threads, int64_t *bytes) {
    using namespace fedlora;
    if (!G || !bytes || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    for (int64_t g = 0; g < groups; ++g)
        if (G[g].rows < 0 || G[g].batch < 0) return FEDLORA_BAD_SHAPE;
    Workspace workspace;
    Upload upload(workspace);
    CholeskyPlan(G, nullptr, nullptr, groups, workspace, upload);
    *bytes = workspace.bytes();
    return FEDLORA_OK;
}

int fedlora_cholesky(const fedlora_block *G, const fedlora_block *width, const fedlora_block *L, int64_t groups, void *memory,
                     int64_t memory_bytes, int64_t threads, void *stream) {
    using namespace fedlora;
    if (!G || !width || !L || groups < 0 || threads < 1) return FEDLORA_BAD_ARGUMENT;
    for (int64_t g = 0; g < groups; ++g)
        if (const int status = check(G[g], width[g], L[g])) return status;
    Workspace workspace(memory, memory_bytes);
    Upload upload(workspace);
    const CholeskyPlan plan(G, width, L, groups, workspace, upload);
    if (plan.matrices == 0) return FEDLORA_OK;
    if (!memory || !workspace.fits()) return FEDLORA_BAD_WORKSPACE;
    upload.send(stream);
    plan.launch(stream);
    return finish();
}

} // extern "C"
