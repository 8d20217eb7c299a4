// The small SVD for AVX2 and FMA: packs of 32 bytes.
#include "svd.h"

#ifdef __x86_64__
#include <immintrin.h>
#pragma GCC target("arch=x86-64-v3")
#define FEDLORA_VECTOR_BYTES 32

namespace fedlora {
namespace {
#include "simd.hpp"
#include "svd_view.hpp"
#include "transpose.hpp"
#include "interleave.hpp"
#include "small_svd.hpp"
}  // namespace

const SvdVariant &small_svd_v3() {
    static constexpr SvdVariant variant{"x86-64-v3", matrices_per_task, scratch_bytes, run};
    return variant;
}

}  // namespace fedlora
#endif
