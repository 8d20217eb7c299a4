// One rotation of a one-sided Jacobi iteration, and the numbers that its rules need (docs/numerics.md, Core SVD).
//
// Rotations are scaled ("fast") ones: a stored column x^ stands for x = d x^, a rotation takes two multiply-adds per pair of
// elements, and d^2 (`weight`) carries the cosines until the next sweep begins.
#pragma once

#include "runtime.cuh"

namespace fedlora {

template <class T>
struct Real;

template <>
struct Real<float> {
    using Bits = int32_t;
    static constexpr int mantissa = 23, bias = 127;
    static constexpr Bits rsqrt_magic = 0x5f375a86;
    static constexpr float roundoff = 0x1p-24f, flush = 0x1p-96f, smallest = 0x1p-126f;
};

template <>
struct Real<double> {
    using Bits = int64_t;
    static constexpr int mantissa = 52, bias = 1023;
    static constexpr Bits rsqrt_magic = 0x5fe6eb50c7b537a9;
    static constexpr double roundoff = 0x1p-53, flush = 0x1p-960, smallest = 0x1p-1022;
};

template <class T>
using BitsOf = typename Real<T>::Bits;

__device__ inline int32_t as_bits(float x) { return __float_as_int(x); }
__device__ inline int64_t as_bits(double x) { return __double_as_longlong(x); }
__device__ inline float from_bits(int32_t x) { return __int_as_float(x); }
__device__ inline double from_bits(int64_t x) { return __longlong_as_double(x); }

// Elements of a column from this share of the largest on count as largest: the window of the sign rule.
template <class T>
constexpr T kNearly = T(1) - T(0x1p-20);

// 2^e, for exponents of normal numbers.
template <class T>
__device__ inline T power_of_two(int e) {
    return from_bits((BitsOf<T>)(e + Real<T>::bias) << Real<T>::mantissa);
}

// e with x in [2^(e-1), 2^e), for a finite x > 0, subnormal or not.
template <class T>
__device__ inline int exponent_of(T x) {
    const bool subnormal = x < Real<T>::smallest;
    const T normal = subnormal ? x * power_of_two<T>(Real<T>::mantissa) : x;
    return (int)(as_bits(normal) >> Real<T>::mantissa) - Real<T>::bias + 1 - (subnormal ? Real<T>::mantissa : 0);
}

// x 2^e in two steps, neither of which leaves the range before the result does.
template <class T>
__device__ inline T scaled_by(T x, int e) {
    return x * power_of_two<T>(e / 2) * power_of_two<T>(e - e / 2);
}

// 1/sqrt(a) to 4 % for a > 0, finite for a = 0: good enough to compare with a threshold, and never underflows.
template <class T>
__device__ inline T rsqrt_estimate(T a) {
    return from_bits((BitsOf<T>)(Real<T>::rsqrt_magic - (as_bits(a) >> 1)));
}

// The power of two that brings a > 0 (normal) into [1, 2).
template <class T>
__device__ inline T inverse_power(T a) {
    constexpr BitsOf<T> field = (BitsOf<T>)(2 * Real<T>::bias + 1) << Real<T>::mantissa;
    constexpr BitsOf<T> top = (BitsOf<T>)(2 * Real<T>::bias) << Real<T>::mantissa;
    return from_bits((BitsOf<T>)(top - (as_bits(a) & field)));
}

// x, of which the compiler is not to know that it is x: what follows from it is worked out after this point, where it would else
// be worked out before an iteration and kept in registers that the iteration needs.
__device__ inline int anew(int x) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(x));
#endif
    return x;
}
template <class T>
__device__ inline T *anew(T *x) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+l"(x));
#endif
    return x;
}

template <class T>
__device__ inline T larger(T a, T b) {
    return a > b ? a : b;
}

// Bound of the squared cosine from which on a pair is turned: |x.y| > sqrt(rows + 10) u |x| |y|. The 10 is for short columns,
// where the rounding of a rotation alone can exceed sqrt(rows) u, and one 2 x 2 matrix in a thousand would rotate for ever.
template <class T>
__device__ inline T jacobi_tolerance(int rows) {
    return T(rows + 10) * Real<T>::roundoff * Real<T>::roundoff;
}

// What goes with a column besides its elements: |x|^2, d^2, and |x|^2 as the sweep began.
template <class T>
struct ColumnState {
    T norm, weight, start;
};

// The rotation x <- x - first y, y <- y + second x that makes two columns orthogonal, given their stored product g; the longer
// one grows. False where there is nothing to turn, which is where a NaN ends.
//
// Everything is divided by a power of two near |x|^2 + |y|^2, so that no square leaves the range; the threshold is tested on the
// cosine for the same reason.
template <class T>
__device__ inline bool plan_rotation(ColumnState<T> &x, ColumnState<T> &y, T g, T tolerance, T &first, T &second) {
    const T product = x.weight * y.weight;
    const T cosine = g * rsqrt_estimate(x.norm) * rsqrt_estimate(y.norm);
    if (!(cosine * cosine * product > tolerance)) return false;
    const T f = inverse_power(x.norm + y.norm), delta = (y.norm - x.norm) * f, twice = (g + g) * f;
    const T h = sqrt(delta * delta + twice * twice * product);
    const T q = twice / (delta + copysign(h, delta));
    first = q * y.weight;
    second = q * x.weight;
    const T cosine2 = T(1) / (T(1) + first * second), shift = first * x.weight * g;
    x.weight *= cosine2;
    y.weight *= cosine2;
    x.norm = larger(x.norm - shift, T(0));
    y.norm = larger(y.norm + shift, T(0));
    return true;
}

// Whether cosines of earlier sweeps should be folded into the column, as they have grown small.
template <class T>
__device__ inline bool is_light(const ColumnState<T> &x) {
    return x.weight < T(0x1p-16);
}

// Whether a column is to be zero, given its fresh norm: one so small that its products would underflow, or one of which a sweep
// has left less than its own rounding errors, which where columns are dependent are dependent again, on and on. Like those
// errors, what is flushed is small beside the column that it comes from.
template <class T>
__device__ inline bool is_dust(const ColumnState<T> &x) {
    return x.norm < larger(Real<T>::flush, x.start * (16 * Real<T>::roundoff * Real<T>::roundoff));
}

} // namespace fedlora
