// Pairs rotated towards a reference: what fedlora_align_factors runs (docs/numerics.md, Procrustes).
#pragma once

#include <vector>

#include "polar_rule.cuh"
#include "quads.cuh"
#include "turned.cuh"
#include "workspace.cuh"

namespace fedlora {

// X^T Y of weight > 0 in the correlation: A^T with its reference, or B.
struct AlignTerm {
    fedlora_block X, Y;
    double weight;
};

// The pairs of a group. Of the rotation only the answers are looked at.
struct AlignGroup {
    AlignTerm terms[2];
    int64_t count;
    fedlora_block X[2], out[2]; // B, and A by columns
    PolarGroup to;

    __host__ __device__ int64_t rank() const { return X[0].cols; }
    __host__ __device__ int64_t batch() const { return X[0].batch; }
};

// Correlation, size and power of two of a pair, from those of its terms: each taken to a size in [1/2, 1), so that what the sum
// leaves out has no weight in it.
struct AlignScales {
    double weights[2], size; // of the products as they are
    int exponent;
};

// e with x in [2^(e-1), 2^e); 0 for what is zero or not finite.
__device__ inline int exponent_above(double x) { return x > 0.0 && is_finite(x) ? exponent_of(x) : 0; }

// sizes[t] and powers[t] are what the products of a term have: a size, and the power of two that was taken out.
__device__ inline AlignScales align_scales(const AlignGroup &group, const double (&sizes)[2], const int (&powers)[2]) {
    AlignScales all = {{0.0, 0.0}, 0.0, 0};
    int total[2] = {0, 0};
    bool any = false;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
        if (t >= group.count || sizes[t] == 0.0) continue;
        total[t] = powers[t] + exponent_above(group.terms[t].weight) + exponent_above(sizes[t]);
        if (!any || total[t] > all.exponent) all.exponent = total[t], any = true;
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
        if (t >= group.count || sizes[t] == 0.0) continue;
        const double given = group.terms[t].weight;
        const double weight = scaled_by(scaled_by(given, -exponent_above(given)), max(total[t] - all.exponent, -2000));
        all.weights[t] = scaled_by(weight, -exponent_above(sizes[t]));
        all.size += weight * scaled_by(sizes[t], -exponent_above(sizes[t]));
    }
    return all;
}

// All numbers of a matrix by a block of threads, a tile of rows at a time: visit(number).
template <class F>
__device__ __forceinline__ void for_numbers(const fedlora_block &b, int64_t matrix, const F &visit) {
    with_float(b.dtype, [&](auto kind) {
        using S = decltype(kind);
        for (int64_t first = 0; first < b.rows; first += kTurnTile)
            for_quads(b, (int)min(b.rows - first, (int64_t)kTurnTile), (int)b.cols, [&](int row, int column, int64_t along, int count, bool) {
                Four four;
                load_four(four, element<S>(b, matrix, first + row, column), along, count);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    S x;
                    take(four, i, x);
                    if (i < count) visit(widen(x));
                }
            });
    });
}

// Whether this thread finds NaN or infinity in a matrix.
__device__ inline bool holds_trouble(const fedlora_block &b, int64_t matrix) {
    double probe = 0.0;
    for_numbers(b, matrix, [&](double x) { probe = fmax(probe, is_finite(x) ? 0.0 : 1.0); });
    return probe != 0.0;
}

// NaN for all of a matrix.
__device__ inline void spoil(const fedlora_block &b, int64_t matrix) {
    with_float(b.dtype, [&](auto kind) {
        using S = decltype(kind);
        S bad;
        narrow(__longlong_as_double(0x7ff8000000000000ll), bad);
        for (int64_t e = threadIdx.x; e < b.rows * b.cols; e += blockDim.x) *element<S>(b, matrix, e / b.cols, e % b.cols) = bad;
    });
}

// What remains to be said of a pair of which something written is not finite: numbers out of range, or trouble in the pair itself
// or its reference, which then answers NaN. By a whole block of threads.
__device__ inline void settle_trouble(const AlignGroup &group, int64_t matrix, bool sound) {
    const bool bad = !sound || holds_trouble(group.X[0], matrix) || holds_trouble(group.X[1], matrix);
    if (!__syncthreads_or(bad)) {
        if (threadIdx.x == 0) scalar_of<int32_t>(group.to.info, matrix) |= FEDLORA_INFO_OVERFLOW;
        return;
    }
    spoil(group.out[0], matrix);
    spoil(group.out[1], matrix);
    spoil(group.to.Q, matrix);
    spoil(group.to.singular_values, matrix);
    if (threadIdx.x == 0) write_nonfinite(group.to, matrix);
}

// A group under way, with what its steps leave for each other.
struct AlignStep {
    AlignGroup group;
    fedlora_block products[2], sizes[2], exponents[2]; // of the terms; the first of each takes the sums
    int32_t *marks;                                    // of pairs whose factors are not finite
};

// Size and power of two of the correlation, which one thread writes; nothing is known to be wrong yet.
__device__ inline void settle_scales(const AlignStep &step, int64_t matrix, const AlignScales &scales) {
    scalar_of<double>(step.sizes[0], matrix) = scales.size;
    scalar_of<int32_t>(step.exponents[0], matrix) = scales.exponent;
    step.marks[matrix] = 0;
}

// Correlations of pairs up to this rank: one launch for each of some sizes of rank, with and without float64.
constexpr int64_t kCorrelatedMax = 32;

class Correlations {
  public:
    Correlations(const std::vector<AlignStep> &steps, Upload &upload); // others are not looked at
    void launch(void *stream) const;

  private:
    struct Share {
        void (*kernel)(const AlignStep *, const int64_t *, int64_t, bool);
        bool wide;
        int64_t bytes;
        const AlignStep *steps;
        const int64_t *first; // pair of each group
        int64_t count, pairs;
    };
    std::vector<Share> shares_;
};

// All steps: correlations (of larger rank by fedlora_cross_products), fedlora_polar, both factors turned, what went wrong.
class AlignSteps {
  public:
    AlignSteps(const std::vector<AlignGroup> &groups, const PolarOptions &options, Workspace &workspace, Upload &upload);
    int status() const { return status_; }
    // FEDLORA_OK, or what one of the functions refused.
    int launch(void *stream) const;

  private:
    // A function's scratch memory.
    struct Room {
        void *memory;
        int64_t bytes;
    };
    struct Tables { // of a function of the library
        std::vector<fedlora_block> X, Y, products, sizes, exponents;
        std::vector<int64_t> ones;
    };
    struct List {
        const AlignStep *steps;
        const int64_t *first; // pair of each group
        int64_t count, pairs;
    };
    List list_of(const std::vector<AlignStep> &steps, Upload &upload) const;

    PolarOptions options_;
    Tables cross_; // of the terms of larger rank
    std::vector<fedlora_block> M_, size_, exponent_, rotations_;
    std::vector<double> units_;
    Room cross_room_ = {}, polar_room_ = {};
    List all_ = {}, large_ = {};
    std::vector<Correlations> correlations_;
    std::vector<Turns> turns_;
    int status_ = FEDLORA_OK;
};

} // namespace fedlora
