// IEEE half precision by its bits.
#pragma once

#include "scalar.h"

struct __half {
    unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 0x3ffu;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13 | (fraction ? 0x400000u : 0u));
    if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
    const float tiny = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -tiny : tiny;
}

// To the nearest, ties to even.
inline __half __float2half_rn(float x) {
    const uint32_t bits = __float_as_uint(x), size = bits & 0x7fffffffu;
    const unsigned short sign = static_cast<unsigned short>(bits >> 16 & 0x8000u);
    uint32_t half;
    if (size > 0x7f800000u) half = 0x7fff;
    else if (size >= 0x477ff000u) half = 0x7c00;  // 65520 and more
    else if (size >= 0x38800000u) half = (size - 0x38000000u + 0xfffu + (size >> 13 & 1)) >> 13;
    else half = __float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000u;  // the unit in the last place of 0.5 is 2^-24
    return {static_cast<unsigned short>(sign | half)};
}
inline __half __float2half(float x) { return __float2half_rn(x); }
