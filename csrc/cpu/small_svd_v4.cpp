// The small SVD for AVX-512: packs of 64 bytes.
#include "small_svd.h"

#ifdef __x86_64__
#include <immintrin.h>
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define FEDLORA_VECTOR_BYTES 64

namespace fedlora {
namespace {
#include "simd.hpp"
#include "small_svd.hpp"
}  // namespace

const SmallSvd &small_svd_v4() {
    static constexpr SmallSvd variant{"x86-64-v4", matrices_per_task, scratch_bytes, run};
    return variant;
}

}  // namespace fedlora
#endif
