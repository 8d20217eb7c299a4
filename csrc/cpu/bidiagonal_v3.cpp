// The SVD of a bidiagonal matrix for AVX2 and FMA: packs of 32 bytes.
#include "bidiagonal.h"

#include "fedlora.h"

#ifdef __x86_64__
#include <immintrin.h>
#pragma GCC target("arch=x86-64-v3")
#pragma GCC optimize("fp-contract=off")
#define FEDLORA_VECTOR_BYTES 32

namespace fedlora {
namespace {
#include "simd.hpp"
#include "svd_view.hpp"
#include "bidiagonal.hpp"
}  // namespace

const BidiagonalSvd &bidiagonal_v3() {
    static constexpr BidiagonalSvd variant{scratch_bytes, values, vectors<float>, vectors<double>};
    return variant;
}

}  // namespace fedlora
#endif
