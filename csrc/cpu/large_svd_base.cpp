// The larger SVDs, Jacobi and direct, for any processor: packs of 16 bytes, in whatever vectors the compiler finds.
#include "bidiagonal.h"
#include "direct_svd.h"
#include "svd.h"

#define FEDLORA_VECTOR_BYTES 16
#define FEDLORA_BIDIAGONAL bidiagonal_base

namespace fedlora {
namespace {
#include "simd.hpp"
#include "svd_view.hpp"
#include "columns.hpp"
#include "direct_svd.hpp"
#include "large_svd.hpp"
}  // namespace

const SvdVariant &large_svd_base() {
    static constexpr SvdVariant variant{"portable", matrices_per_task, scratch_bytes, run};
    return variant;
}

const DirectSvd &direct_svd_base() {
    static constexpr DirectSvd variant{"portable", direct_bytes, direct_values, direct_vectors};
    return variant;
}

}  // namespace fedlora
