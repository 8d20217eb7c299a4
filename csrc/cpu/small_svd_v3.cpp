// The small SVD for AVX2 and FMA: packs of 32 bytes.
#include "small_svd.h"

#ifdef __x86_64__
#include <immintrin.h>
#pragma GCC target("arch=x86-64-v3")
#define FEDLORA_VECTOR_BYTES 32

namespace fedlora {
namespace {
#include "simd.hpp"
#include "small_svd.hpp"
}  // namespace

const SmallSvd &small_svd_v3() {
    static constexpr SmallSvd variant{"x86-64-v3", matrices_per_task, scratch_bytes, run};
    return variant;
}

}  // namespace fedlora
#endif
