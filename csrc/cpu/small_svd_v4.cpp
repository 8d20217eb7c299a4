// The small SVD and the small rotations for AVX-512: packs of 64 bytes.
#include "polar.h"
#include "svd.h"

#ifdef __x86_64__
#include <immintrin.h>
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define FEDLORA_VECTOR_BYTES 64

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

const SvdVariant &small_svd_v4() {
    static constexpr SvdVariant variant{"x86-64-v4", matrices_per_task, scratch_bytes, run};
    return variant;
}

const PolarVariant &small_polar_v4() {
    static constexpr PolarVariant variant{polar_matrices_per_task, polar_scratch_bytes, polar_run};
    return variant;
}

}  // namespace fedlora
#endif
