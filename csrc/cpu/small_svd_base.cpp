// The small SVD for any processor: packs of 16 bytes, in whatever vectors the compiler finds.
#include "small_svd.h"


#define FEDLORA_VECTOR_BYTES 16

namespace fedlora {
namespace {
#include "simd.hpp"
#include "small_svd.hpp"
}  // namespace

const SmallSvd &small_svd_base() {
    static constexpr SmallSvd variant{"portable", matrices_per_task, scratch_bytes, run};
    return variant;
}

}  // namespace fedlora
