// The SVD of a bidiagonal matrix for any processor: packs of 16 bytes, in whatever vectors the compiler finds.
#include "bidiagonal.h"

#include "fedlora.h"

#pragma GCC optimize("fp-contract=off")
#define FEDLORA_VECTOR_BYTES 16

namespace fedlora {
namespace {
#include "simd.hpp"
#include "svd_view.hpp"
#include "bidiagonal.hpp"
}  // namespace

const BidiagonalSvd &bidiagonal_base() {
    static constexpr BidiagonalSvd variant{scratch_bytes, values, vectors<float>, vectors<double>};
    return variant;
}

}  // namespace fedlora
