// Four numbers of any float dtype on their way from memory.
#pragma once

#include "element.cuh"

namespace fedlora {

__device__ inline bool is_finite(double x) { return fabs(x) <= 1.7976931348623157e308; }

// As they lie in memory: whoever loads them waits for nothing until they are looked at.
struct Four {
    uint32_t words[8];
};

__device__ inline void put(Four &four, int i, float x) { four.words[i] = __float_as_uint(x); }
__device__ inline void put(Four &four, int i, double x) {
    const uint64_t bits = (uint64_t)__double_as_longlong(x);
    four.words[2 * i] = (uint32_t)bits;
    four.words[2 * i + 1] = (uint32_t)(bits >> 32);
}
template <class T>
__device__ inline void put(Four &four, int i, T x) { // halves, in order
    const uint32_t low = i & 1 ? four.words[i / 2] : 0u;
    four.words[i / 2] = low | (uint32_t)x.bits << 16 * (i & 1);
}

__device__ inline void take(const Four &four, int i, float &x) { x = __uint_as_float(four.words[i]); }
__device__ inline void take(const Four &four, int i, double &x) {
    x = __longlong_as_double((long long)((uint64_t)four.words[2 * i + 1] << 32 | four.words[2 * i]));
}
template <class T>
__device__ inline void take(const Four &four, int i, T &x) {
    x.bits = (uint16_t)(four.words[i / 2] >> 16 * (i & 1));
}

// x[0], x[step], ...: so many of four, zeros for the others, which are not read.
template <class T>
__device__ inline void load_four(Four &four, const T *x, int64_t step, int64_t count) {
    constexpr int kBytes = 4 * (int)sizeof(T), kAligned = kBytes < 16 ? kBytes : 16;
    if (step == 1 && count >= 4 && reinterpret_cast<uintptr_t>(x) % kAligned == 0) {
        if constexpr (kBytes == 8) {
            const uint2 v = *reinterpret_cast<const uint2 *>(x);
            four.words[0] = v.x, four.words[1] = v.y;
        } else {
#pragma unroll
            for (int half = 0; half < kBytes / 16; ++half) {
                const uint4 v = reinterpret_cast<const uint4 *>(x)[half];
                four.words[4 * half] = v.x, four.words[4 * half + 1] = v.y;
                four.words[4 * half + 2] = v.z, four.words[4 * half + 3] = v.w;
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i, x += step) put(four, i, i < count ? *x : T{});
    }
}

// The other way round: so many of four.
template <class T>
__device__ inline void store_four(const Four &four, T *x, int64_t step, int64_t count) {
    constexpr int kBytes = 4 * (int)sizeof(T), kAligned = kBytes < 16 ? kBytes : 16;
    if (step == 1 && count >= 4 && reinterpret_cast<uintptr_t>(x) % kAligned == 0) {
        if constexpr (kBytes == 8) {
            *reinterpret_cast<uint2 *>(x) = make_uint2(four.words[0], four.words[1]);
        } else {
#pragma unroll
            for (int half = 0; half < kBytes / 16; ++half)
                reinterpret_cast<uint4 *>(x)[half] =
                    make_uint4(four.words[4 * half], four.words[4 * half + 1], four.words[4 * half + 2], four.words[4 * half + 3]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i, x += step)
            if (i < count) take(four, i, *x);
    }
}

} // namespace fedlora
