// Sums over a warp, of several numbers at once.
#pragma once

#include "runtime.cuh"

namespace fedlora {

// The same in all lanes.
template <class T>
__device__ inline T warp_sum(T x) {
#pragma unroll
    for (int o = kWarp / 2; o > 0; o /= 2) x += __shfl_xor_sync(kAllLanes, x, o);
    return x;
}

template <class T>
__device__ inline T warp_largest(T x) {
#pragma unroll
    for (int o = kWarp / 2; o > 0; o /= 2) {
        const T other = __shfl_xor_sync(kAllLanes, x, o);
        x = other > x ? other : x;
    }
    return x;
}

// K sums, the j-th in the j-th of K equal parts of the warp. The tree of each is that of warp_sum, whatever K and j.
template <int K, class T>
__device__ inline T part_sums(T (&x)[K]) {
    static_assert(K == 1 || K == 2 || K == 4, "parts of a warp are equal");
    const int lane = (int)threadIdx.x % kWarp;
    int o = kWarp / 2;
#pragma unroll
    for (int half = K / 2; half > 0; half /= 2, o /= 2) {
        const bool upper = (lane & o) != 0;
#pragma unroll
        for (int j = 0; j < half; ++j) {
            const T kept = upper ? x[j + half] : x[j], given = upper ? x[j] : x[j + half];
            x[j] = kept + __shfl_xor_sync(kAllLanes, given, o);
        }
    }
    T sum = x[0];
#pragma unroll
    for (int rest = kWarp / (2 * K); rest > 0; rest /= 2) sum += __shfl_xor_sync(kAllLanes, sum, rest);
    return sum;
}

// What part j of K has, for all lanes.
template <int K, class T>
__device__ inline T of_part(T x, int j) {
    return __shfl_sync(kAllLanes, x, j * (kWarp / K));
}

} // namespace fedlora
