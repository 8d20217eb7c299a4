// Numbers of every float dtype to float64 and back, and where matrices lie.
#pragma once

#include "runtime.cuh"

namespace fedlora {

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

__device__ inline float widen32(float x) { return x; }
__device__ inline float widen32(Bfloat16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
__device__ inline float widen32(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

// Exact.
__device__ inline double widen(double x) { return x; }
template <class T>
__device__ inline double widen(T x) {
    return (double)widen32(x);
}

// Rounded to nearest even; halves by way of float32.
__device__ inline void narrow(double x, double &out) { out = x; }
__device__ inline void narrow(double x, float &out) { out = (float)x; }
__device__ inline void narrow(double x, Bfloat16 &out) {
    const uint32_t bits = __float_as_uint((float)x);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    out.bits = nan ? (uint16_t)0x7fc0 : (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
__device__ inline void narrow(double x, Float16 &out) { out.bits = __half_as_ushort(__float2half_rn((float)x)); }

// Calls f(T{}) with the type of a float dtype; does nothing for any other.
template <class F>
__host__ __device__ void with_float(int64_t dtype, F &&f) {
    switch (dtype) {
        case FEDLORA_FLOAT32: f(float{}); break;
        case FEDLORA_FLOAT64: f(double{}); break;
        case FEDLORA_BFLOAT16: f(Bfloat16{}); break;
        case FEDLORA_FLOAT16: f(Float16{}); break;
        default: break;
    }
}

__host__ __device__ inline bool is_float(int64_t dtype) {
    return dtype == FEDLORA_FLOAT32 || dtype == FEDLORA_FLOAT64 || dtype == FEDLORA_BFLOAT16 || dtype == FEDLORA_FLOAT16;
}

__host__ __device__ inline int64_t size_of(int64_t dtype) {
    switch (dtype) {
        case FEDLORA_FLOAT64: return 8;
        case FEDLORA_BFLOAT16:
        case FEDLORA_FLOAT16: return 2;
        case FEDLORA_BOOL: return 1;
        default: return 4;
    }
}

// Element (0, 0) of a matrix of a batch.
template <class T>
__host__ __device__ T *address(const fedlora_block &block, int64_t matrix) {
    return reinterpret_cast<T *>(block.data) + matrix * block.batch_stride;
}

} // namespace fedlora
