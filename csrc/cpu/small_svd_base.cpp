// The small SVD for any processor: packs of 16 bytes, in whatever vectors the compiler finds.
#include "svd.h"


#define FEDLORA_VECTOR_BYTES 16

namespace fedlora {
namespace {
#include "simd.hpp"
#include "svd_view.hpp"
#include "transpose.hpp"
#include "interleave.hpp"
#include "small_svd.hpp"
}  // namespace

const SvdVariant &small_svd_base() {
    static constexpr SvdVariant variant{"portable", matrices_per_task, scratch_bytes, run};
    return variant;
}

}  // namespace fedlora
