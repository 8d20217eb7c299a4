// fedlora_align_factors: checks the descriptors and runs the steps.
#include "align.cuh"

#include <algorithm>
#include <cmath>

#include "gram.cuh"

namespace fedlora {
namespace {

double unit_of(int64_t dtype) {
    switch (dtype) {
        case FEDLORA_FLOAT64: return 0x1p-53;
        case FEDLORA_FLOAT32: return 0x1p-24;
        case FEDLORA_BFLOAT16: return 0x1p-8;
        default: return 0x1p-11;
    }
}

bool is(const fedlora_block &b, int64_t rows, int64_t cols, int64_t batch, int64_t dtype) {
    return b.rows == rows && b.cols == cols && b.batch == batch && b.dtype == dtype;
}

int status_of(const AlignGroup &group) {
    const int64_t r = group.rank(), batch = group.batch();
    for (int f = 0; f < 2; ++f) {
        const fedlora_block &X = group.X[f], &out = group.out[f];
        if (!is_float(X.dtype) || out.dtype != X.dtype) return FEDLORA_BAD_DTYPE;
        if (X.rows < 0 || r < 0 || batch < 0 || r > FEDLORA_CORE_SVD_MAX || X.cols != r || X.batch != batch) return FEDLORA_BAD_SHAPE;
        if (!is(out, X.rows, r, batch, X.dtype)) return FEDLORA_BAD_SHAPE;
    }
    for (int t = 0; t < group.count; ++t) {
        const fedlora_block &X = group.terms[t].X, &Y = group.terms[t].Y;
        if (!is_float(Y.dtype)) return FEDLORA_BAD_DTYPE;
        if (Y.rows != X.rows || Y.cols != r || Y.batch != batch) return FEDLORA_BAD_SHAPE;
    }
    const PolarGroup &to = group.to;
    const bool fit = is(to.Q, r, r, batch, FEDLORA_FLOAT64) && is(to.singular_values, 1, r, batch, FEDLORA_FLOAT64) &&
                     is(to.unique, 1, 1, batch, FEDLORA_BOOL) && is(to.condition, 1, 1, batch, FEDLORA_FLOAT64) &&
                     is(to.info, 1, 1, batch, FEDLORA_INT32) && is(to.notes, 1, 1, batch, FEDLORA_INT32);
    return fit ? FEDLORA_OK : FEDLORA_BAD_SHAPE;
}

struct Tables {
    const fedlora_block *B, *A, *B_ref, *A_ref;
    double alpha, beta;
    const fedlora_block *BQ, *QA, *rotations;

    bool complete() const { return B && A && BQ && QA && rotations && !(alpha > 0 && !A_ref) && !(beta > 0 && !B_ref); }

    AlignGroup group(int64_t g) const {
        AlignGroup group = {};
        const fedlora_block *const to = rotations + 6 * g;
        if (alpha > 0) group.terms[group.count++] = {transposed(A[g]), transposed(A_ref[g]), alpha};
        if (beta > 0) group.terms[group.count++] = {B[g], B_ref[g], beta};
        group.X[0] = B[g], group.out[0] = BQ[g];
        group.X[1] = transposed(A[g]), group.out[1] = transposed(QA[g]);
        double unit = 0;
        for (int t = 0; t < group.count; ++t)
            unit = std::max({unit, unit_of(group.terms[t].X.dtype), unit_of(group.terms[t].Y.dtype)});
        group.to = {{}, {}, {}, to[0], to[1], to[2], to[3], to[4], to[5], unit};
        return group;
    }
};

struct Groups {
    std::vector<AlignGroup> all;
    int status = FEDLORA_OK;

    Groups(const Tables &tables, int64_t groups) {
        for (int64_t g = 0; g < groups && !status; ++g) {
            all.push_back(tables.group(g));
            status = status_of(all.back());
        }
    }
};

} // namespace
} // namespace fedlora

extern "C" {

int fedlora_align_factors_workspace(const fedlora_block *B, const fedlora_block *A, const fedlora_block *B_ref, const fedlora_block *A_ref,
                                    double alpha, double beta, const fedlora_block *BQ, const fedlora_block *QA,
                                    const fedlora_block *rotations, int64_t groups, int64_t, int64_t *bytes) {
    using namespace fedlora;
    const Tables tables = {B, A, B_ref, A_ref, alpha, beta, BQ, QA, rotations};
    if (!tables.complete() || !bytes || groups < 0) return FEDLORA_BAD_ARGUMENT;
    const Groups given(tables, groups);
    if (given.status) return given.status;
    Workspace counted;
    Upload upload(counted);
    const AlignSteps steps(given.all, {false, 1.0}, counted, upload);
    *bytes = counted.bytes();
    return steps.status();
}

int fedlora_align_factors(const fedlora_block *B, const fedlora_block *A, const fedlora_block *B_ref, const fedlora_block *A_ref,
                          double alpha, double beta, const fedlora_block *BQ, const fedlora_block *QA, const fedlora_block *rotations,
                          int64_t groups, int64_t special, double blend, void *workspace, int64_t workspace_bytes, int64_t,
                          void *stream) {
    using namespace fedlora;
    const Tables tables = {B, A, B_ref, A_ref, alpha, beta, BQ, QA, rotations};
    const bool weighed = alpha >= 0 && beta >= 0 && std::isfinite(alpha) && std::isfinite(beta) && alpha + beta > 0;
    if (!tables.complete() || !workspace || groups < 0 || !weighed || !(blend >= 0 && blend <= 1)) return FEDLORA_BAD_ARGUMENT;
    const Groups given(tables, groups);
    if (given.status) return given.status;
    Workspace memory(workspace, workspace_bytes);
    Upload upload(memory);
    const AlignSteps steps(given.all, {special != 0, blend}, memory, upload);
    if (steps.status()) return steps.status();
    if (!memory.fits()) return FEDLORA_BAD_WORKSPACE;
    upload.send(stream);
    if (const int status = steps.launch(stream)) return status;
    return finish();
}

} // extern "C"
