// The larger SVDs, Jacobi and direct, for AVX2 and FMA: packs of 32 bytes.
#include "bidiagonal.h"
#include "direct_svd.h"
#include "svd.h"

#ifdef __x86_64__
#include <immintrin.h>
#pragma GCC target("arch=x86-64-v3")
#define FEDLORA_VECTOR_BYTES 32
#define FEDLORA_BIDIAGONAL bidiagonal_v3

namespace fedlora {
namespace {
#include "simd.hpp"
#include "svd_view.hpp"
#include "columns.hpp"
#include "direct_svd.hpp"
#include "large_svd.hpp"
}  // namespace

const SvdVariant &large_svd_v3() {
    static constexpr SvdVariant variant{"x86-64-v3", matrices_per_task, scratch_bytes, run};
    return variant;
}

const DirectSvd &direct_svd_v3() {
    static constexpr DirectSvd variant{"x86-64-v3", direct_bytes, direct_values, direct_vectors};
    return variant;
}

}  // namespace fedlora
#endif
