// The larger SVDs, Jacobi and direct, for AVX-512: packs of 64 bytes.
#include "bidiagonal.h"
#include "direct_svd.h"
#include "svd.h"

#ifdef __x86_64__
#include <immintrin.h>
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define FEDLORA_VECTOR_BYTES 64
#define FEDLORA_BIDIAGONAL bidiagonal_v4

namespace fedlora {
namespace {
#include "simd.hpp"
#include "svd_view.hpp"
#include "columns.hpp"
#include "direct_svd.hpp"
#include "large_svd.hpp"
}  // namespace

const SvdVariant &large_svd_v4() {
    static constexpr SvdVariant variant{"x86-64-v4", matrices_per_task, scratch_bytes, run};
    return variant;
}

const DirectSvd &direct_svd_v4() {
    static constexpr DirectSvd variant{"x86-64-v4", direct_bytes, direct_values, direct_vectors};
    return variant;
}

}  // namespace fedlora
#endif
