// Pairs aligned step by step, all of them together in each: the rotations, which take longest and are bound by latency, then have
// the whole device, and the rest is bound by memory.
#include "align.cuh"
#include "slots.cuh"

namespace fedlora {
namespace {

constexpr int kThreads = kTurnThreads;

fedlora_block dense(void *data, int64_t rows, int64_t cols, int64_t dtype, int64_t batch) {
    return {reinterpret_cast<int64_t>(data), rows, cols, cols, 1, dtype, batch, rows * cols};
}

// The correlation of a pair in the place of the product of its first term.
__global__ void __launch_bounds__(kThreads) combine(const AlignStep *steps, const int64_t *first, int64_t count) {
    const int64_t slot = blockIdx.x, g = slot_group(first, count, slot), matrix = slot - first[g];
    const AlignStep &step = steps[g];
    double sizes[2] = {0.0, 0.0};
    int powers[2] = {0, 0};
#pragma unroll
    for (int t = 0; t < 2; ++t)
        if (t < step.group.count) {
            sizes[t] = scalar_of<double>(step.sizes[t], matrix);
            powers[t] = scalar_of<int32_t>(step.exponents[t], matrix);
        }
    const AlignScales scales = align_scales(step.group, sizes, powers);
    __syncthreads(); // all have seen the sizes
    double *const M = address<double>(step.products[0], matrix), *const other = address<double>(step.products[1], matrix);
    const int64_t numbers = step.group.rank() * step.group.rank();
    for (int64_t e = threadIdx.x; e < numbers; e += kThreads) {
        double sum = scales.weights[0] * M[e];
        if (step.group.count > 1) sum += scales.weights[1] * other[e];
        M[e] = sum;
    }
    if (threadIdx.x == 0) settle_scales(step, matrix, scales);
}

__global__ void __launch_bounds__(kThreads, 4) settle(const AlignStep *steps, const int64_t *first, int64_t count) {
    const int64_t slot = blockIdx.x, g = slot_group(first, count, slot), matrix = slot - first[g];
    const AlignStep &step = steps[g];
    const bool sound = !(scalar_of<int32_t>(step.group.to.info, matrix) & FEDLORA_INFO_NONFINITE);
    if (!sound || step.marks[matrix]) settle_trouble(step.group, matrix, sound);
}

} // namespace

AlignSteps::List AlignSteps::list_of(const std::vector<AlignStep> &steps, Upload &upload) const {
    std::vector<int64_t> first = {0};
    for (const AlignStep &step : steps) first.push_back(first.back() + step.group.batch());
    return {upload.add(steps), upload.add(first), (int64_t)steps.size(), first.back()};
}

AlignSteps::AlignSteps(const std::vector<AlignGroup> &groups, const PolarOptions &options, Workspace &workspace, Upload &upload)
    : options_(options) {
    std::vector<AlignStep> steps, large;
    std::vector<Turned> turned;
    for (const AlignGroup &group : groups) {
        const int64_t r = group.rank(), batch = group.batch();
        AlignStep step = {group, {}, {}, {}, workspace.take<int32_t>(batch)};
        const bool correlated = r <= kCorrelatedMax;
        for (int t = 0; t < (correlated ? 1 : group.count); ++t) {
            step.products[t] = dense(workspace.take<double>(batch * r * r), r, r, FEDLORA_FLOAT64, batch);
            step.sizes[t] = dense(workspace.take<double>(batch), 1, 1, FEDLORA_FLOAT64, batch);
            step.exponents[t] = dense(workspace.take<int32_t>(batch), 1, 1, FEDLORA_INT32, batch);
            if (correlated) continue;
            cross_.X.push_back(group.terms[t].X), cross_.Y.push_back(group.terms[t].Y), cross_.ones.push_back(1);
            cross_.products.push_back(step.products[t]), cross_.sizes.push_back(step.sizes[t]);
            cross_.exponents.push_back(step.exponents[t]);
        }
        for (int f = 0; f < 2; ++f) turned.push_back({group.X[f], group.to.Q, group.out[f], step.marks});
        M_.push_back(step.products[0]), size_.push_back(step.sizes[0]), exponent_.push_back(step.exponents[0]);
        const PolarGroup &to = group.to;
        for (const fedlora_block &field : {to.Q, to.singular_values, to.unique, to.condition, to.info, to.notes}) rotations_.push_back(field);
        units_.push_back(to.unit);
        steps.push_back(step);
        if (!correlated) large.push_back(step);
    }
    all_ = list_of(steps, upload);
    large_ = list_of(large, upload);
    correlations_.emplace_back(steps, upload);
    turns_.emplace_back(turned, upload);
    const int64_t terms = (int64_t)cross_.X.size();
    if (terms) status_ = fedlora_cross_products_workspace(cross_.X.data(), cross_.ones.data(), cross_.Y.data(), terms, 1, &cross_room_.bytes);
    if (!status_ && !M_.empty()) status_ = fedlora_polar_workspace(M_.data(), (int64_t)M_.size(), 1, &polar_room_.bytes);
    cross_room_.memory = workspace.take<unsigned char>(cross_room_.bytes);
    polar_room_.memory = workspace.take<unsigned char>(polar_room_.bytes);
}

int AlignSteps::launch(void *stream) const {
    if (!all_.count) return FEDLORA_OK;
    correlations_[0].launch(stream);
    if (large_.count) {
        if (const int status = fedlora_cross_products(cross_.X.data(), cross_.ones.data(), cross_.Y.data(), cross_.products.data(),
                                                      cross_.sizes.data(), cross_.exponents.data(), (int64_t)cross_.X.size(),
                                                      cross_room_.memory, cross_room_.bytes, 1, stream))
            return status;
        fedlora::launch(combine, dim3((unsigned)large_.pairs), dim3(kThreads), 0, stream, large_.steps, large_.first, large_.count);
    }
    if (const int status = fedlora_polar(M_.data(), size_.data(), exponent_.data(), units_.data(), rotations_.data(), all_.count,
                                         options_.special, options_.blend, polar_room_.memory, polar_room_.bytes, 1, stream))
        return status;
    turns_[0].launch(stream);
    fedlora::launch(settle, dim3((unsigned)all_.pairs), dim3(kThreads), 0, stream, all_.steps, all_.first, all_.count);
    return FEDLORA_OK;
}

} // namespace fedlora
