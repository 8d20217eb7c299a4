// Inner products of many rows in float64, the inner loop of cross products, as the instruction sets offer it.
#pragma once

#include <cstdint>

namespace fedlora {

constexpr int64_t kDotLanes = 8;

// sums[(i * cols + j) * kDotLanes + l] += sum over d = l, l + 8, ... of X[i * ldx + d] Y[j * ldy + d], d < count, in order and from zero;
// likewise squares[l] those of all rows of X, squares[8 + l] of Y. rows and cols are at least 1, count is a multiple of 8.
template <class T>
using AddDots = void (*)(double *sums, double *squares, const T *X, int64_t ldx, const T *Y, int64_t ldy, int64_t rows, int64_t cols,
                         int64_t count);

struct Dots {
    AddDots<double> wide;
    AddDots<float> single;
};

#ifdef __x86_64__
const Dots &dots_v4();
const Dots &dots_v3();
#endif
const Dots &dots_base();

// The one for this machine.
const Dots &dots();

}  // namespace fedlora
