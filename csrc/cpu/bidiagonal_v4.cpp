// The SVD of a bidiagonal matrix for AVX-512: packs of 64 bytes.
#include "bidiagonal.h"

#include "fedlora.h"

#ifdef __x86_64__
#include <immintrin.h>
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#pragma GCC optimize("fp-contract=off")
#define FEDLORA_VECTOR_BYTES 64

namespace fedlora {
namespace {
#include "simd.hpp"
#include "svd_view.hpp"
#include "bidiagonal.hpp"
}  // namespace

const BidiagonalSvd &bidiagonal_v4() {
    static constexpr BidiagonalSvd variant{scratch_bytes, values, vectors<float>, vectors<double>};
    return variant;
}

}  // namespace fedlora
#endif
