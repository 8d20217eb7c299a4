// X Q for strips of X, the inner loop of rotated factors, as the instruction sets offer it.
#pragma once

#include <cstdint>

namespace fedlora {

// Columns of a row of Q are padded with zeros to a multiple of this.
constexpr int64_t kTurnPad = 16;

// out(d, j) = sum_i X(d, i) Q(i, j) for d < count, j < r, in order of i, with Q(i, j) at Q[i * ldq + j], ldq = r padded; out shares no memory
// with X. Each answers whether all numbers written are finite. `stream` writes past the caches where it can.
template <class T>
struct Turns {
    // rows of X and out are together: (d, i) at [d * r + i]
    bool (*rows)(const T *X, const T *Q, T *out, int64_t count, int64_t r, bool stream);
    // columns are: (d, i) at [i * ld + d]
    bool (*columns)(const T *X, int64_t ldx, const T *Q, T *out, int64_t ldo, int64_t count, int64_t r, bool stream);
};

struct Turn {
    Turns<float> single;
    Turns<double> wide;
};

#ifdef __x86_64__
const Turn &turn_v4();
const Turn &turn_v3();
#endif
const Turn &turn_base();

// The one for this machine.
const Turn &turn();

}  // namespace fedlora
