// The words and the small types of CUDA C++.
#pragma once

// All that kernels' hosts may want of the standard library comes before the macros: it uses __noinline__ itself.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __shared__ static thread_local

#define SIMT_VECTOR(name, type, align2, align4)                                          \
    struct name##1 { type x; };                                                          \
    struct alignas(align2) name##2 { type x, y; };                                       \
    struct name##3 { type x, y, z; };                                                    \
    struct alignas(align4) name##4 { type x, y, z, w; };                                 \
    inline name##1 make_##name##1(type x) { return {x}; }                                \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                     \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }          \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

SIMT_VECTOR(char, signed char, 2, 4)
SIMT_VECTOR(uchar, unsigned char, 2, 4)
SIMT_VECTOR(short, short, 4, 8)
SIMT_VECTOR(ushort, unsigned short, 4, 8)
SIMT_VECTOR(int, int, 8, 16)
SIMT_VECTOR(uint, unsigned, 8, 16)
SIMT_VECTOR(float, float, 8, 16)
SIMT_VECTOR(longlong, long long, 16, 16)
SIMT_VECTOR(ulonglong, unsigned long long, 16, 16)
SIMT_VECTOR(double, double, 16, 16)
#undef SIMT_VECTOR

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
