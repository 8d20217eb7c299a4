// What singular values say of a rotation (docs/numerics.md, Procrustes), and where it is written.
//
// Included inside the anonymous namespace of its source file, after svd_view.hpp.

constexpr double kSingularBlend = 1e-6;  // singular values of a blend that count as zero: eigenvalues -1 met halfway

struct Verdict {
    int64_t rank;
    bool unique;
    double gap;  // what divides perturbations of M
};

// s falls; reflected says that the smallest direction was turned round to stay in SO(r).
inline Verdict judge(const double *s, int64_t r, double threshold, bool reflected, bool special) {
    Verdict v = {0, true, __builtin_inf()};
    while (v.rank < r && s[v.rank] > threshold) ++v.rank;
    if (r == 0 || (special && r == 1)) return v;
    const double last = s[r - 1], before = s[r > 1 ? r - 2 : 0];
    const bool turned = special && reflected && v.rank == r;
    v.gap = before + (turned ? -last : last);
    v.unique = special ? v.rank >= r - 1 && !(turned && before - last <= threshold) : v.rank == r;
    return v;
}

inline double times_power(double x, int64_t e) {
    const int half = (int)(e < -2000 ? -2000 : e > 2000 ? 2000 : e) / 2, rest = (int)(e < -2000 ? -2000 : e > 2000 ? 2000 : e) - half;
    return x * power_of_two<double>(half) * power_of_two<double>(rest);
}

template <class T>
T &scalar_at(const fedlora_block &b, int64_t i, int64_t column = 0) {
    return ((T *)b.data)[i * b.batch_stride + column * b.col_stride];
}

// Everything but Q of matrix i: s and size are what M 2^-shift has.
inline void write_verdict(const fedlora::Rotations &to, int64_t i, const double *s, int64_t r, double size, int64_t shift, double unit,
                          const Verdict &v, bool converged) {
    bool overflow = false;
    for (int64_t c = 0; c < r; ++c) {
        const double value = times_power(s[c], shift);
        overflow |= __builtin_isinf(value) != 0;
        scalar_at<double>(to.singular_values, i, c) = value;
    }
    scalar_at<uint8_t>(to.unique, i) = v.unique;
    scalar_at<double>(to.condition, i) = v.gap > 0 ? 2 * size / v.gap : __builtin_inf();
    scalar_at<int32_t>(to.info, i) = (overflow ? FEDLORA_INFO_OVERFLOW : 0) | (converged ? 0 : FEDLORA_INFO_NOT_CONVERGED);
    scalar_at<int32_t>(to.notes, i) = v.gap <= 16 * unit * size ? FEDLORA_NOTE_ILL_CONDITIONED : 0;
}

inline void write_nonfinite(const fedlora::Rotations &to, int64_t i, int64_t r) {
    const double nan = __builtin_nan("");
    const View<double> Q(to.Q, i, false);
    for (int row = 0; row < r; ++row)
        for (int c = 0; c < r; ++c) Q(row, c) = nan;
    for (int64_t c = 0; c < r; ++c) scalar_at<double>(to.singular_values, i, c) = nan;
    scalar_at<uint8_t>(to.unique, i) = 0;
    scalar_at<double>(to.condition, i) = nan;
    scalar_at<int32_t>(to.info, i) = FEDLORA_INFO_NONFINITE;
    scalar_at<int32_t>(to.notes, i) = 0;
}

// Exponent of the largest element of M, 0 for a zero matrix; false where M is not finite.
inline bool largest_exponent(const View<const double> &M, int r, int &exponent) {
    double largest = 0, probe = 0;
    for (int i = 0; i < r; ++i)
        for (int c = 0; c < r; ++c) {
            const double x = __builtin_fabs(M(i, c));
            largest = x > largest ? x : largest;
            probe += x - x;
        }
    exponent = probe == 0 && largest > 0 ? exponent_of<double>(largest) : 0;
    return probe == 0;
}
