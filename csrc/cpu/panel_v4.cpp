// C += P Q with AVX-512: vectors of 64 bytes.
#include "panel.h"

#include <cstring>
#include <utility>

#ifdef __x86_64__
#include <immintrin.h>

#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define FEDLORA_VECTOR_BYTES 64
#define FEDLORA_PANEL_ROWS 8
#define FEDLORA_PANEL_VECTORS 3

namespace fedlora {
namespace {
#include "widen.hpp"
#include "panel.hpp"
#include "pack.hpp"
}  // namespace

const Panel &panel_v4() {
    static constexpr Panel variant{"x86-64-v4", add, tile_of, widen_any, narrow_any};
    return variant;
}

}  // namespace fedlora
#endif
