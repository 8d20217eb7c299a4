// The small SVD and the small rotations for AVX2 and FMA: packs of 32 bytes.
#include "polar.h"
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
#include "polar_rule.hpp"
#include "polar.hpp"
}  // namespace

const SvdVariant &small_svd_v3() {
    static constexpr SvdVariant variant{"x86-64-v3", matrices_per_task, scratch_bytes, run};
    return variant;
}

const PolarVariant &small_polar_v3() {
    static constexpr PolarVariant variant{polar_matrices_per_task, polar_scratch_bytes, polar_run};
    return variant;
}

}  // namespace fedlora
#endif
