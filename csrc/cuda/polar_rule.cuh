// What singular values say of a rotation (docs/numerics.md, Procrustes), and where it is written.
#pragma once

#include "element.cuh"
#include "jacobi.cuh"

namespace fedlora {

constexpr double kSingularBlend = 1e-6; // singular values of a blend that count as zero: eigenvalues -1 met halfway

struct PolarOptions {
    bool special;
    double blend;

    // Whether Q itself is not the answer: it, or the identity, is one at either end.
    __host__ __device__ bool mixes() const { return blend > 0 && blend < 1; }
};

// Correlations M 2^exponent of data of norms |X| |Y| = size 2^exponent, made of numbers of this unit roundoff, and their
// rotations.
struct PolarGroup {
    fedlora_block M, size, exponent;
    fedlora_block Q, singular_values, unique, condition, info, notes;
    double unit;
};

struct Verdict {
    int rank;
    bool unique;
    double gap; // what divides perturbations of M
};

// s falls; reflected says that the smallest direction was turned round to stay in SO(r).
__device__ inline Verdict judge(const double *s, int r, double threshold, bool reflected, bool special) {
    Verdict v = {0, true, HUGE_VAL};
    while (v.rank < r && s[v.rank] > threshold) ++v.rank;
    if (r == 0 || (special && r == 1)) return v;
    const double last = s[r - 1], before = s[r > 1 ? r - 2 : 0];
    const bool turned = special && reflected && v.rank == r;
    v.gap = before + (turned ? -last : last);
    v.unique = special ? v.rank >= r - 1 && !(turned && before - last <= threshold) : v.rank == r;
    return v;
}

// x 2^e, for any e.
__device__ inline double times_power(double x, int64_t e) {
    return scaled_by(x, (int)(e < -2000 ? -2000 : e > 2000 ? 2000 : e));
}

// Singular values up to which directions count as undetermined, for data of this size.
__device__ inline double polar_threshold(int r, double size) { return 8 * r * Real<double>::roundoff * size; }

template <class T>
__device__ T &scalar_of(const fedlora_block &block, int64_t matrix) {
    return *address<T>(block, matrix);
}

// Everything but Q and the singular values of a matrix: size is what M 2^-shift has.
__device__ inline void write_verdict(const PolarGroup &group, int64_t matrix, const Verdict &v, double size, bool overflow,
                                     bool converged) {
    scalar_of<uint8_t>(group.unique, matrix) = v.unique;
    scalar_of<double>(group.condition, matrix) = v.gap > 0 ? 2 * size / v.gap : HUGE_VAL;
    const int32_t info = (overflow ? FEDLORA_INFO_OVERFLOW : 0) | (converged ? 0 : FEDLORA_INFO_NOT_CONVERGED);
    scalar_of<int32_t>(group.info, matrix) = info;
    scalar_of<int32_t>(group.notes, matrix) = v.gap <= 16 * group.unit * size ? FEDLORA_NOTE_ILL_CONDITIONED : 0;
}

__device__ inline void write_nonfinite(const PolarGroup &group, int64_t matrix) {
    scalar_of<uint8_t>(group.unique, matrix) = 0;
    scalar_of<double>(group.condition, matrix) = nan("");
    scalar_of<int32_t>(group.info, matrix) = FEDLORA_INFO_NONFINITE;
    scalar_of<int32_t>(group.notes, matrix) = 0;
}

} // namespace fedlora
