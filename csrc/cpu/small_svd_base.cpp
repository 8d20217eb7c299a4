// The small SVD and the small rotations for any processor: packs of 16 bytes, in whatever vectors the compiler finds.
#include "polar.h"
#include "svd.h"


#define FEDLORA_VECTOR_BYTES 16

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

const SvdVariant &small_svd_base() {
    static constexpr SvdVariant variant{"portable", matrices_per_task, scratch_bytes, run};
    return variant;
}

const PolarVariant &small_polar_base() {
    static constexpr PolarVariant variant{polar_matrices_per_task, polar_scratch_bytes, polar_run};
    return variant;
}

}  // namespace fedlora
