// Inner products of many rows in float64, the inner loop of cross products, as the instruction sets offer it.
#pragma once

#include <cstdint>

namespace fedlora {

constexpr int64_t kDotLanes = 8;

// sums[(i * cols + j) * kDotLanes + l] += sum over d = l, l + 8, ... of X[i * ld + d] Y[j * ld + d], d < count, in order and from zero.
// Rows start at multiples of 64 bytes, count is a multiple of 8.
struct Dots {
    void (*add)(double *sums, const double *X, const double *Y, int64_t ld, int64_t rows, int64_t cols, int64_t count);
};

#ifdef __x86_64__
const Dots &dots_v4();
const Dots &dots_v3();
#endif
const Dots &dots_base();

// The one for this machine.
const Dots &dots();

}  // namespace fedlora
